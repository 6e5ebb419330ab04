"""Envs that say which actions are allowed, and check that no other is taken."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

SIZES: dict[str, list[int]] = {"discrete": [4], "multi_discrete": [2, 3], "multi_binary": [2, 2]}
ACTIONS: dict[str, spaces.Space[Any]] = {
    "discrete": spaces.Discrete(4),
    "multi_discrete": spaces.MultiDiscrete([2, 3]),
    "multi_binary": spaces.MultiBinary(2),
}


def mask_at(kind: str, episode: int, t: int) -> np.ndarray:
    """A mask that depends on episode and time, and allows at least one choice per dimension."""
    rng = np.random.default_rng(1000 * episode + t)
    parts = []
    for size in SIZES[kind]:
        part = rng.random(size) < 0.5
        part[rng.integers(size)] = True
        parts.append(part)
    return np.concatenate(parts)


class Restless(gym.Env[Any, Any]):
    """Its mask changes at every step; it raises where a forbidden action is taken. Observations: episode and time.

    :param kind: of actions
    :param source: where it gives the mask: "method", "info", "key", or "none"
    :param length: steps per episode
    :param truncates: whether episodes end by truncation
    :param nothing_at: time at which nothing is allowed
    """

    def __init__(
        self,
        kind: str = "discrete",
        source: str = "method",
        length: int = 5,
        truncates: bool = False,
        nothing_at: int = -1,
        as_dict: bool = False,
    ) -> None:
        self.kind, self.source, self.length, self.truncates, self.nothing_at = (
            kind,
            source,
            length,
            truncates,
            nothing_at,
        )
        self.episode, self.t, self.calls = -1, 0, 0
        self.action_space = ACTIONS[kind]
        self.as_dict = as_dict
        seen: spaces.Space[Any] = spaces.Box(-100, 100, (2,), np.float32)
        if source == "key":
            n = sum(SIZES[kind])
            seen = spaces.Dict({"vec": seen, "action_mask": spaces.Box(0, 1, (n,), np.int8)})
        elif as_dict:
            seen = spaces.Dict({"vec": seen, "class": spaces.Discrete(3)})
        self.observation_space = seen
        if source == "method":
            self.action_masks = self._masks

    def mask(self) -> np.ndarray:
        mask = mask_at(self.kind, self.episode, self.t)
        return np.zeros_like(mask) if self.t == self.nothing_at else mask

    def _masks(self) -> np.ndarray:
        self.calls += 1
        return self.mask()

    def _shown(self) -> tuple[Any, dict[str, Any]]:
        observation: Any = np.array([self.episode, self.t], np.float32)
        if self.source == "key":
            observation = {"vec": observation, "action_mask": self.mask().astype(np.int8)}
        elif self.as_dict:
            observation = {"vec": observation, "class": self.t % 3}
        return observation, {"action_mask": self.mask()} if self.source == "info" else {}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self._shown()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self.source != "none":
            require_allowed(action, self.mask(), SIZES[self.kind])
        self.t += 1
        observation, info = self._shown()
        ends = self.t == self.length
        return observation, float(np.sum(action)), ends and not self.truncates, ends and self.truncates, info


def require_allowed(action: Any, mask: np.ndarray, sizes: list[int]) -> None:
    for dimension, (choice, part) in enumerate(
        zip(np.ravel(action), np.split(mask, np.cumsum(sizes)[:-1]), strict=True)
    ):
        assert part[int(choice)], f"{choice} in dimension {dimension} is forbidden by {part}"


class RestlessVector(VectorEnv[Any, Any, Any]):
    """Several :class:`Restless` envs that step as one and give masks in infos, as Gymnasium's native vector envs do.

    :param mode: autoreset mode
    """

    def __init__(self, num_envs: int, mode: AutoresetMode) -> None:
        self.num_envs, self.mode = num_envs, mode
        self.metadata = {"autoreset_mode": mode}
        self.single_observation_space = spaces.Box(-100, 100, (2,), np.float32)
        self.single_action_space = ACTIONS["discrete"]
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.envs = [Restless("discrete", "info", length=3 + i) for i in range(num_envs)]
        self.ended = np.zeros(num_envs, bool)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        reset_mask = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
        for i in np.flatnonzero(reset_mask):
            self.envs[i].reset()
        self.ended[:] = False
        return self._batch({})

    def _batch(self, others: dict[str, Any]) -> Any:
        observations = np.stack([env._shown()[0] for env in self.envs])
        return observations, {"action_mask": np.stack([env.mask() for env in self.envs]), **others}

    def step(self, actions: Any) -> Any:
        rewards, ends = np.zeros(self.num_envs), np.zeros(self.num_envs, bool)
        for i, env in enumerate(self.envs):
            if self.ended[i]:
                env.reset()
            else:
                _, rewards[i], ends[i], _, _ = env.step(actions[i])
        if self.mode is AutoresetMode.NEXT_STEP:
            self.ended = ends.copy()
        observations, infos = self._batch({})
        return observations, rewards, ends, np.zeros(self.num_envs, bool), infos
