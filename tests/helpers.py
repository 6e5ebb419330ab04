"""Environments small enough to check by hand."""

from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

OBSERVATION_SPACES: dict[str, spaces.Space[Any]] = {
    "vector": spaces.Box(-10, 10, (3,), np.float32),
    "double": spaces.Box(-10, 10, (2, 3), np.float64),
    "discrete": spaces.Discrete(5),
    "multi_discrete": spaces.MultiDiscrete([3, 4]),
    "multi_binary": spaces.MultiBinary(4),
    "image": spaces.Box(0, 255, (36, 36, 1), np.uint8),
    "dict": spaces.Dict({"vec": spaces.Box(-1, 1, (2,), np.float32), "class": spaces.Discrete(3)}),
}
ACTION_SPACES: dict[str, spaces.Space[Any]] = {
    "discrete": spaces.Discrete(3),
    "box": spaces.Box(np.array([-1, -3], np.float32), np.array([1, 1], np.float32), dtype=np.float32),
    "matrix": spaces.Box(-1, 1, (2, 2), np.float32),
    "multi_discrete": spaces.MultiDiscrete([2, 3]),
    "multi_binary": spaces.MultiBinary(3),
}


class ScriptedEnv(gym.Env[Any, Any]):
    """Episodes of given lengths and endings, with rewards 1, 2, 3, ... counted over the env's whole life.

    :param lengths: lengths of the episodes, repeated for ever
    :param truncate: whether episode number i is truncated rather than terminated, repeated likewise
    :param first_reward: the first step's reward
    """

    def __init__(
        self,
        lengths: tuple[int, ...] = (3,),
        truncate: tuple[bool, ...] = (False,),
        first_reward: float = 1.0,
        observation_space: spaces.Space[Any] = OBSERVATION_SPACES["vector"],
        action_space: spaces.Space[Any] = ACTION_SPACES["discrete"],
    ) -> None:
        self.observation_space, self.action_space = observation_space, action_space
        self.lengths, self.truncate = lengths, truncate
        self.reward, self.episode, self.t, self.resets = first_reward, -1, 0, 0
        self.actions: list[Any] = []

    def _obs(self) -> Any:
        return self.observation_space.sample()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.resets += 1
        self.episode += 1
        self.t = 0
        return self._obs(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.actions.append(action)
        self.t += 1
        reward, self.reward = self.reward, self.reward + 1
        ended = self.t == self.lengths[self.episode % len(self.lengths)]
        cut = ended and self.truncate[self.episode % len(self.truncate)]
        return self._obs(), reward, ended and not cut, cut, {}


class FaultyEnv(ScriptedEnv):
    """Goes wrong at one step of its life.

    :param fault: "reward", "observation" (NaN), or "raise"
    :param at: the step, from 1
    """

    def __init__(self, fault: str, at: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.fault, self.at, self.life = fault, at, 0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = super().step(action)
        self.life += 1
        if self.life == self.at:
            if self.fault == "raise":
                raise RuntimeError("the simulator crashed")
            if self.fault == "reward":
                reward = float("nan")
            else:
                obs = np.full_like(obs, np.nan)
        return obs, reward, terminated, truncated, info


def vec(*envs: gym.Env[Any, Any]) -> VecEnv:
    """These envs, monitored, as one."""
    return DummyVecEnv([lambda env=env: Monitor(env) for env in envs])  # type: ignore[misc]


class BatchNormExtractor(BaseFeaturesExtractor):
    """Features of 3 numbers, normalized by their batch."""

    def __init__(self, space: Any) -> None:
        super().__init__(space, 3)
        self.norm = th.nn.BatchNorm1d(3)

    def forward(self, x: th.Tensor) -> Any:
        return self.norm(x)
