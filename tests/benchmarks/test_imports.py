"""The benchmark scripts import each other in one direction, inside functions too."""

import ast
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def imports(folder: Path) -> dict[str, set[str]]:
    """Each script of a folder -> the scripts that it imports, anywhere in it."""
    scripts = {path.stem: path for path in folder.glob("*.py")}
    found: dict[str, set[str]] = {}
    for name, path in scripts.items():
        mentioned: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                mentioned |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                mentioned |= {node.module or ""} | {alias.name for alias in node.names if node.level}
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
                mentioned |= {
                    arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
                }
        found[name] = mentioned & scripts.keys()
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Scripts of which each imports the next, and the last the first; empty if there are none."""
    finished: set[str] = set()

    def search(name: str, above: list[str]) -> list[str]:
        if name in above:
            return above[above.index(name) :]
        for other in sorted(graph[name] - finished):
            if found := search(other, [*above, name]):
                return found
        finished.add(name)
        return []

    return next((found for name in sorted(graph) if (found := search(name, []))), [])


def test_no_script_imports_one_that_imports_it() -> None:
    graph = imports(FOLDER)
    assert {"learning", "learning_run", "baselines", "baselines_run"} <= graph.keys()
    assert circle(graph) == []


def test_circles_are_found(tmp_path: Path) -> None:
    scripts = {
        "a": "import b\n",
        "b": "import os\ndef f():\n    from c import g\n",
        "c": "import importlib\nimportlib.import_module('d')\n",
        "d": "import e\n",
        "e": "",
    }
    for name, text in scripts.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert imports(tmp_path) == {"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": {"e"}, "e": set()}
    assert circle(imports(tmp_path)) == []
    (tmp_path / "d.py").write_text("if False:\n    from b import f\n")
    assert circle(imports(tmp_path)) == ["b", "c", "d"]
    (tmp_path / "e.py").write_text("import e\n")
    (tmp_path / "d.py").write_text("")
    assert circle(imports(tmp_path)) == ["e"]
