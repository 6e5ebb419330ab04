"""The house: imports point downwards only, and the mathematics knows nothing of SB3."""

import ast
from pathlib import Path

import pytest

import sb3_pg

PACKAGE = Path(sb3_pg.__file__).parent
#: From the bottom up; a module imports from its own level or those below. Siblings share a level where they stand
#: in one set, and do not import each other.
LEVELS: list[set[str]] = [
    {"functional"},
    {"errors"},
    {"extras"},
    {"policies"},
    {"envs", "rollout"},
    {"baselines"},
    {"learner"},
    {"algorithms"},
    {"callbacks"},
    {"zoo", "reporting"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: height for height, names in enumerate(LEVELS) for name in names}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).as_posix() != "__init__.py")


def unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_downwards(path: Path) -> None:
    mine = LEVEL[unit(path)]
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "sb3_pg" and len(parts) > 1 and parts[1] in LEVEL:
            theirs = LEVEL[parts[1]]
            assert theirs < mine or parts[1] == unit(path), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", [p for p in MODULES if unit(p) == "functional"], ids=lambda path: path.name)
def test_functional_imports_torch_and_numpy_only(path: Path) -> None:
    allowed = {"torch", "numpy", "collections", "functools", "inspect", "typing", "math", "sb3_pg"}
    assert {name.split(".")[0] for name in imports(path)} <= allowed


def test_every_public_name_is_there_and_documented() -> None:
    for module in (sb3_pg, sb3_pg.functional):
        for name in module.__all__:
            assert getattr(getattr(module, name), "__doc__", None), name
