"""The house: imports point downwards only, and the mathematics knows nothing of SB3."""

import ast
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.base_class import BaseAlgorithm

import sb3_pg
from sb3_pg import TRPO, DemonstrationLoss, Demonstrations, KLAnchor, KLPenaltyPG, OffPolicyPG, Reinforce

PACKAGE = Path(sb3_pg.__file__).parent
#: From the bottom up; a module imports from its own level or those below. Siblings share a level where they stand
#: in one set, and do not import each other.
LEVELS: list[set[str]] = [
    {"action_masks", "compat", "errors", "functional"},
    {"extras"},
    {"policies"},
    {"rollout"},
    {"envs"},
    {"baselines"},
    {"learner"},
    {"checkpoints"},
    {"demonstrations"},
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


@pytest.mark.parametrize("path", [p for p in MODULES if unit(p) == "envs"], ids=lambda path: path.name)
def test_only_actors_know_policies_and_rollouts(path: Path) -> None:
    known = {name.split(".")[1] for name in imports(path) if name.startswith("sb3_pg.")}
    assert path.parent.name == "actors" or known.isdisjoint({"policies", "rollout"})


@pytest.mark.parametrize("path", [p for p in MODULES if unit(p) == "functional"], ids=lambda path: path.name)
def test_functional_imports_torch_and_numpy_only(path: Path) -> None:
    allowed = {"torch", "numpy", "collections", "functools", "inspect", "typing", "math", "sb3_pg"}
    assert {name.split(".")[0] for name in imports(path)} <= allowed


@pytest.mark.parametrize("path", [p for p in MODULES if unit(p) in ("policies", "rollout")], ids=lambda path: path.name)
def test_what_acts_and_collects_knows_no_algorithm(path: Path) -> None:
    of_sb3 = {name for name in imports(path) if name.startswith(("stable_baselines3", "sb3_contrib"))}
    assert not [name for name in of_sb3 if name.endswith(("Algorithm", ".callbacks", "BaseCallback"))]


@pytest.mark.parametrize("path", [p for p in MODULES if unit(p) == "learner"], ids=lambda path: path.name)
def test_the_learner_knows_no_env_and_no_algorithm(path: Path) -> None:
    found = imports(path)
    assert "sb3_pg.rollout.collector" not in found
    assert "sb3_pg.rollout.Collector" not in found
    assert not [name for name in found if "vec_env" in name or name.endswith(("Algorithm", "gymnasium.Env"))]


ROOMS = (
    *("sb3_pg.policies.", "sb3_pg.rollout.", "sb3_pg.learner.", "sb3_pg.baselines."),
    "sb3_pg.demonstrations.",
)


@pytest.mark.parametrize("cls", [Reinforce, TRPO, KLPenaltyPG, OffPolicyPG])
def test_no_object_of_the_rooms_below_holds_an_algorithm(cls: Any) -> None:
    demos = Demonstrations(np.zeros((8, 4)), np.zeros(8, int))
    model = cls("MlpPolicy", "CartPole-v1", max_episode_steps=500, seed=0, device="cpu", anchor=KLAnchor(1.0)).learn(
        200
    )
    model.anchor = DemonstrationLoss(demos, 1.0)
    model.learn(200)
    ours = [thing for thing in gc.get_objects() if str(type(thing).__module__).startswith(ROOMS)]
    assert {"Learner", "Collector", "DemonstrationLoss", "DemonstratedSteps"} <= {
        type(thing).__name__ for thing in ours
    }
    for thing in ours:
        held = [value for value in getattr(thing, "__dict__", {}).values() if isinstance(value, BaseAlgorithm)]
        assert not held, f"{type(thing).__name__} holds {held}"
    assert model.num_timesteps >= 200


#: Methods of SB3's classes that subclasses override, by name.
HOOKS = {"_get_samples", "_normalize_obs", "_normalize_reward", "_compute_rewards"}


def private_names(path: Path) -> set[str]:
    """Private names of torch, SB3, Gymnasium and rl_zoo3 that a module imports, or takes from one of these modules."""
    found: set[str] = set()
    modules = {"th", "torch", "nn", "np", "gym"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("sb3_pg"):
            found |= {alias.name for alias in node.names if alias.name.startswith("_")}
            found |= {part for part in node.module.split(".") if part.startswith("_") and part != "__future__"}
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            root: ast.expr = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in modules:
                found.add(node.attr)
    return found


@pytest.mark.parametrize(
    "path", [p for p in MODULES if unit(p) != "compat"], ids=lambda p: p.relative_to(PACKAGE).as_posix()
)
def test_private_names_of_other_packages_stand_in_compat(path: Path) -> None:
    assert private_names(path) <= HOOKS


def test_every_public_name_is_there_and_documented() -> None:
    for module in (sb3_pg, sb3_pg.functional):
        for name in module.__all__:
            assert getattr(getattr(module, name), "__doc__", None), name
