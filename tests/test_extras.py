"""A missing optional dependency is reported with the extra that brings it."""

import builtins
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from gymnasium.error import DependencyNotInstalled
from stable_baselines3.common import utils

from sb3_pg.extras import EXTRAS, MissingExtraError, explain_missing, extra_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent


def hide(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Make the modules impossible to import, as if they were not installed."""
    original = builtins.__import__

    def importer(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in modules:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(name, *args, **kwargs)

    for name in [loaded for loaded in sys.modules if loaded.partition(".")[0] in modules]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", importer)


@pytest.mark.parametrize(("module", "extra"), EXTRAS.items())
def test_missing_module_names_its_extra(module: str, extra: str) -> None:
    error = ModuleNotFoundError(f"No module named '{module}.sub'", name=f"{module}.sub")
    explained = explain_missing(error)
    assert isinstance(explained, MissingExtraError)
    assert f'pip install "sb3_pg[{extra}]"' in str(explained)
    assert explained.__cause__ is error


def test_gymnasium_error_is_explained_through_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "Box2D")
    for name in [loaded for loaded in sys.modules if loaded.startswith("gymnasium.envs.box2d")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(MissingExtraError, match=r"Box2D is not installed: .*sb3_pg\[envs\]") as raised, extra_hints():
        importlib.import_module("gymnasium.envs.box2d.lunar_lander")
    assert isinstance(raised.value.__cause__, DependencyNotInstalled)


def test_sb3_tensorboard_error_is_explained_by_its_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(utils, "SummaryWriter", None)
    with pytest.raises(MissingExtraError, match=r"sb3_pg\[tensorboard\]"), extra_hints():
        utils.configure_logger(0, tensorboard_log=str(tmp_path))


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'somebody_elses'", name="somebody_elses"),
        ImportError("libGL.so.1: cannot open shared object file"),
        ValueError("moviepy is not installed"),
    ],
    ids=["foreign module", "broken library", "other error"],
)
def test_other_errors_pass_unchanged(error: Exception) -> None:
    assert explain_missing(error) is None
    with pytest.raises(type(error)) as raised, extra_hints():
        raise error
    assert raised.value is error


def test_nested_hints_explain_once() -> None:
    with pytest.raises(MissingExtraError) as raised, extra_hints(), extra_hints():
        raise ModuleNotFoundError("No module named 'moviepy'", name="moviepy")
    assert isinstance(raised.value.__cause__, ModuleNotFoundError)


def test_every_named_extra_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS.values()) <= set(project["optional-dependencies"])
