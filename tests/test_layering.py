"""Imports point downwards only, and the maths knows nothing of SB3."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sb3_pg"
LAYERS = [
    "errors",
    "extras",
    "curves",
    "functional",
    "rollout",
    "baselines",
    "algorithms",
    "__init__",
    "zoo",
    "plots",
    "demo",
    "cli",
    "__main__",
]
"""Top-level modules and packages from the bottom up; each imports what stands before it and itself."""

MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def imports(module: Path) -> Iterator[str]:
    """Dotted names that the module imports, wherever in it."""
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(name: str) -> int:
    """Layer of what a dotted name in ``sb3_pg`` lies in; what is no module is one of the package's own names."""
    part = name.split(".")[1] if "." in name else "__init__"
    return LAYERS.index(part if part in LAYERS else "__init__")


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_point_downwards(module: Path) -> None:
    own = LAYERS.index(module.parts[0].removesuffix(".py"))
    upwards = [name for name in imports(module) if name.split(".")[0] == "sb3_pg" and layer_of(name) > own]
    assert not upwards


@pytest.mark.parametrize("module", [module for module in MODULES if module.parts[0] == "functional"], ids=str)
def test_maths_needs_torch_and_numpy_only(module: Path) -> None:
    allowed = {"torch", "numpy", "sb3_pg", *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in imports(module)} <= allowed
