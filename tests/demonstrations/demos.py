"""Demonstrations made of random numbers, for the tests."""

import copy
from typing import Any

import numpy as np
from gymnasium import spaces

from sb3_pg import Demonstrations
from tests.helpers import OBSERVATION_SPACES, ScriptedEnv


def demos_in(
    observations: spaces.Space[Any], actions: spaces.Space[Any], n: int = 12, length: int = 4, **kwargs: Any
) -> Any:
    """Random demonstrations in these spaces."""
    observations, actions = copy.deepcopy((observations, actions))
    observations.seed(0)
    actions.seed(0)
    rows = stacked([observations.sample() for _ in range(n)])
    ends = np.arange(n) % length == length - 1
    return Demonstrations(rows, np.stack([actions.sample() for _ in range(n)]), terminated=ends, **kwargs)


def stacked(seen: list[Any]) -> Any:
    """Observations as one array, or as a dict of arrays."""
    return np.stack(seen) if not isinstance(seen[0], dict) else {k: np.stack([s[k] for s in seen]) for k in seen[0]}


def cart_poles(seed: int = 0, n: int = 64) -> Demonstrations:
    """Always push to the right."""
    observations = np.random.default_rng(seed).normal(scale=0.1, size=(n, 4)).astype(np.float32)
    return Demonstrations(observations, np.ones(n, np.int64), terminated=np.arange(n) % 8 == 7)


class Masked(ScriptedEnv):
    """Forbids the last action."""

    def action_masks(self) -> np.ndarray:
        return np.array([True, True, False])


def masked_demos(forbidden: bool) -> Demonstrations:
    """Where the last action is masked: it is taken all the same, or another one is."""
    space = spaces.Dict({"observation": OBSERVATION_SPACES["vector"], "action_mask": spaces.Box(0, 1, (3,), np.int8)})
    demos: Any = demos_in(space, spaces.Discrete(2))
    demos.observations["action_mask"][:] = [1, 1, 0]
    demos.actions[5] = 2 if forbidden else 0
    return demos  # type: ignore[no-any-return]
