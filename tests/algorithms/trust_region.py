"""Small models of NPG and TRPO."""

from __future__ import annotations

from typing import Any

import pytest
from gymnasium import spaces

from sb3_pg import NPG, TRPO
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES, two_envs

#: name -> (class, what makes it that); "fixed" with a step of a usual length
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "trpo": (TRPO, {}),
    "npg": (NPG, {}),
    "npg-fixed": (NPG, {"step": "fixed", "step_size": 0.01}),
}


all_methods = pytest.mark.parametrize("method", list(METHODS))


def make(
    method: str = "trpo",
    actions: Any = "discrete",
    observations: spaces.Space[Any] = OBSERVATION_SPACES["vector"],
    policy: Any = "MlpPolicy",
    **kwargs: Any,
) -> Any:
    """A model on two envs whose rewards grow with time, and episodes of which every other one is truncated."""
    space = ACTION_SPACES[actions] if isinstance(actions, str) else actions
    cls, chosen = METHODS[method]
    chosen = {"n_steps": 32, "batch_size": None, "seed": 0, "device": "cpu", **chosen}
    return cls(policy, two_envs(space, observations), **{**chosen, **kwargs})


DENSE: dict[str, dict[str, Any]] = {
    "categorical": {},
    "gaussian": {"actions": "box"},
    "raw-advantages": {"normalize_advantage": False, "gamma": 0.9},
    "state-discount": {"state_discount": True, "gamma": 0.8},
    "episodes": {"n_steps": None, "n_episodes": 4, "state_discount": True, "gamma": 0.8},
    "monte-carlo": {"actions": "box", "n_steps": None, "n_episodes": 4, "advantage": "monte_carlo"},
    "entropy": {"actions": "box", "ent_coef": 0.7},
    "undamped": {"actions": "box", "cg_damping": 1e-3},
    "hidden-layer": {"policy_kwargs": {"net_arch": {"pi": [3], "vf": []}}},
}


def small(method: str, case: str, **kwargs: Any) -> Any:
    chosen = {"n_steps": 8, "policy_kwargs": {"net_arch": []}, "cg_max_steps": 60, "cg_tolerance": 1e-7}
    return make(method, **{**chosen, **DENSE[case], **kwargs})
