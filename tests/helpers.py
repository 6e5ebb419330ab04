"""Environments small enough to check by hand, policies, what a model holds, and slow parameters."""

import copy
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy
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
#: where actors may be
TRANSPORTS = ["serial", "processes", pytest.param("ray", marks=pytest.mark.ray)]


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


def policy_for(space: spaces.Space[Any]) -> str:
    """Name of SB3's policy for these observations."""
    if isinstance(space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if len(space.shape or ()) == 3 else "MlpPolicy"


def vec(*envs: gym.Env[Any, Any]) -> VecEnv:
    """These envs, monitored, as one."""
    return DummyVecEnv([lambda env=env: Monitor(env) for env in envs])  # type: ignore[misc]


def two_envs(
    action_space: spaces.Space[Any] = ACTION_SPACES["discrete"],
    observation_space: spaces.Space[Any] = OBSERVATION_SPACES["vector"],
) -> VecEnv:
    """Rewards grow with time, and every other one of the episodes, of unequal length, is truncated."""
    envs = [
        ScriptedEnv(lengths, (False, True), reward, *copy.deepcopy((observation_space, action_space)))
        for lengths, reward in (((3, 4, 9), -5.0), ((2, 9, 4), 1.0))
    ]
    return vec(*envs)


class BatchNormExtractor(BaseFeaturesExtractor):
    """The numbers that are observed, normalized by their batch."""

    def __init__(self, space: Any) -> None:
        super().__init__(space, space.shape[0])
        self.norm = th.nn.BatchNorm1d(space.shape[0])

    def forward(self, x: th.Tensor) -> Any:
        return self.norm(x)


class LinearExtractor(BaseFeaturesExtractor):
    """Four learned features."""

    def __init__(self, space: Any) -> None:
        super().__init__(space, 4)
        self.net = th.nn.Linear(space.shape[0], 4)

    def forward(self, x: th.Tensor) -> Any:
        return self.net(x)


class OwnForward(ActorCriticPolicy):
    """Overrides ``forward``, which is then called at every step."""

    def forward(self, obs: Any, deterministic: bool = False) -> Any:
        return super().forward(obs, deterministic)


class ActingPolicy(ActorCriticPolicy):
    """Counts the calls of ``forward``, and keeps the policy that acted last."""

    calls: ClassVar[int] = 0
    last: ClassVar[list[Any]] = []

    def forward(self, obs: Any, deterministic: bool = False) -> Any:
        ActingPolicy.calls += 1
        self.last[:] = [self]
        return super().forward(obs, deterministic)


def parameters(of: Any) -> th.Tensor:
    """A copy of all parameters of a module, or of a model's policy, in one row."""
    module = getattr(of, "policy", of)
    return th.nn.utils.parameters_to_vector(module.parameters()).detach().clone()


@dataclass(frozen=True)
class Rollout:
    """What a rollout buffer holds, as tensors of shape ``(n_steps, n_envs, ...)``; ``valid`` is False for padding."""

    observations: Any
    actions: th.Tensor
    rewards: th.Tensor
    terminated: th.Tensor
    truncated: th.Tensor
    timesteps: th.Tensor
    valid: th.Tensor
    values: th.Tensor
    log_probs: th.Tensor
    returns: th.Tensor
    advantages: th.Tensor

    @property
    def ends(self) -> th.Tensor:
        return self.terminated | self.truncated

    def select(self, x: Any) -> Any:
        """The valid steps of a tensor, or of a dict of tensors, in one row."""
        return {key: part[self.valid] for key, part in x.items()} if isinstance(x, dict) else x[self.valid]

    @property
    def flat_observations(self) -> Any:
        return self.select(self.observations)

    def flat_actions(self, space: spaces.Space[Any]) -> th.Tensor:
        """The valid steps' actions, as ``evaluate_actions`` takes them."""
        actions: th.Tensor = self.select(self.actions)
        return actions.long().flatten() if isinstance(space, spaces.Discrete) else actions.flatten(1).float()

    def bootstrap(self, gamma: float) -> th.Tensor:
        """What the returns count of the state after the last step of each episode or segment: (G - r) / gamma."""
        last = self.ends | (self.valid & ~th.cat([self.valid[1:], th.zeros_like(self.valid[:1])]))
        return th.where(last, (self.returns - self.rewards) / gamma, 0.0)


def rollout_of(model: Any) -> Rollout:
    """A copy of the model's last rollout."""
    buffer = model.rollout_buffer

    def tensor(array: Any) -> Any:
        return {key: tensor(part) for key, part in array.items()} if isinstance(array, dict) else th.tensor(array)

    return Rollout(
        tensor(buffer.observations),
        tensor(buffer.actions),
        tensor(buffer.rewards),
        tensor(buffer.dones & ~buffer.truncated),
        tensor(buffer.truncated),
        tensor(buffer.timesteps),
        tensor(buffer.mask),
        *(tensor(getattr(buffer, name)) for name in ("values", "log_probs", "returns", "advantages")),
    )


def ready_to_collect(model: Any) -> BaseCallback:
    """Reset the model's env as ``learn`` does, and return a callback for ``collect_rollouts``."""
    model.learn(0)
    callback = CallbackList([])
    callback.init_callback(model)
    return callback


def the_others_slow(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """Return parameters for ``parametrize``, with all but a few marked as slow.

    :param cases: a value each, or a tuple of values each
    :param quick: the cases that are always tested
    """
    cases = list(cases)
    assert all(case in cases for case in quick), f"{quick} are not all among {cases}"
    values = (case if isinstance(case, tuple) else (case,) for case in cases)
    marks: Iterable[Any] = ([] if case in quick else [pytest.mark.slow] for case in cases)
    return [pytest.param(*of_case, marks=of_this) for of_case, of_this in zip(values, marks, strict=True)]


class Interrupts(BaseCallback):
    """Stands for Ctrl-C, at the first step with ``num_timesteps`` of at least ``at``."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.at:
            raise KeyboardInterrupt
        return True
