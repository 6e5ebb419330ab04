"""popgym's envs, which need memory: each trains, with actions and observations of every kind."""

import importlib
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import FlattenObservation

from sb3_pg import ActorCritic

pytest.importorskip("popgym")

FAMILIES = [
    *("Autoencode", "Battleship", "Concentration", "CountRecall", "HigherLower", "MineSweeper", "MultiarmedBandit"),
    *("NoisyPositionOnlyCartPole", "NoisyPositionOnlyPendulum", "PositionOnlyCartPole", "PositionOnlyPendulum"),
    *("RepeatFirst", "RepeatPrevious", "VelocityOnlyCartpole"),
]


def make(family: str) -> gym.Env[Any, Any]:
    env = gym.make(f"popgym-{family}Easy-v0", disable_env_checker=True)  # its infos are one shared dict
    return FlattenObservation(env) if isinstance(env.observation_space, gym.spaces.Tuple) else env


def test_these_are_all_families() -> None:
    importlib.import_module("popgym")
    assert {f"popgym-{family}Easy-v0" for family in FAMILIES} == {i for i in gym.registry if i.endswith("Easy-v0")}


@pytest.mark.parametrize("family", FAMILIES)
def test_policies_with_memory_train(family: str) -> None:
    importlib.import_module("popgym")
    model = ActorCritic("MlpPolicy", make(family), n_steps=16, memory="gru", seed=0, device="cpu")
    memory: Any = model.policy.mlp_extractor.actor
    before = [parameter.clone() for parameter in memory.parameters()]
    model.learn(32)
    after = list(memory.parameters())
    assert any(not np.array_equal(a.detach(), b.detach()) for a, b in zip(before, after, strict=True))
