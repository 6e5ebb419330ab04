"""The arguments that every algorithm has, as a type and as a table of checks.

Their meaning and defaults stand in one place, :class:`sb3_pg.algorithms.setup.ConfiguredAlgorithm`.
"""

import math
from os import PathLike
from typing import Any, TypedDict

import gymnasium as gym
import torch as th
from gymnasium.vector import VectorEnv
from stable_baselines3.common.buffers import ReplayBuffer, RolloutBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.vec_env import VecEnv

from sb3_pg.algorithms import validation as arg
from sb3_pg.policies import Behavior, behavior_source
from sb3_pg.rollout import TrajectoryReplayBuffer


class NewSharedArguments(TypedDict, total=False):
    """Keyword arguments of every algorithm that SB3's A2C does not have."""

    state_discount: bool
    truncation: str | None
    critic_batch_size: int | None
    critic_fit: str
    critic_warmup_updates: int
    normalize_value_targets: bool
    max_episode_steps: int
    on_nonfinite: str
    act_device: th.device | str | None
    compile: bool


class NewArguments(NewSharedArguments, total=False):
    """Keyword arguments of every on-policy algorithm that SB3's A2C does not have."""

    n_episodes: int | None


class CommonArguments(NewSharedArguments, total=False):
    """Keyword arguments that every algorithm passes on to its base class."""

    gamma: float
    ent_coef: float
    vf_coef: float
    max_grad_norm: float | None
    normalize_advantage: bool
    use_sde: bool
    sde_sample_freq: int
    stats_window_size: int
    tensorboard_log: str | None
    policy_kwargs: dict[str, Any] | None
    verbose: int
    seed: int | None
    device: th.device | str
    _init_setup_model: bool


class CriticFitArguments(CommonArguments, total=False):
    """Those, where an algorithm has no defaults of its own for the critic's training."""

    critic_learning_rate: float | str | Schedule | None
    n_critic_updates: int


class OnPolicyArguments(CommonArguments, total=False):
    """Keyword arguments that every on-policy algorithm passes on to its base class."""

    n_steps: int | None
    n_episodes: int | None
    gae_lambda: float
    rollout_buffer_class: type[RolloutBuffer] | None
    rollout_buffer_kwargs: dict[str, Any] | None


class ReplayingArguments(CommonArguments, total=False):
    """Keyword arguments of every algorithm that replays trajectories."""

    buffer_size: int
    buffer_trajectories: int
    learning_starts: int
    batch_size: int | None
    train_freq: int | tuple[int, str]
    gradient_steps: int
    replay_buffer_class: type[ReplayBuffer] | None
    replay_buffer_kwargs: dict[str, Any] | None
    optimize_memory_usage: bool
    action_noise: ActionNoise | None
    behavior_policy: Behavior | None


CHECKS: dict[str, arg.Check] = {
    "policy": arg.policy,
    "env": arg.instance(str, gym.Env, VecEnv, VectorEnv, optional=True),
    "learning_rate": arg.schedule(),
    "n_steps": arg.integer(1, optional=True),
    "n_episodes": arg.integer(1, optional=True),
    "gamma": arg.real(0, 1),
    "gae_lambda": arg.real(0, 1),
    "ent_coef": arg.real(0),
    "vf_coef": arg.real(0),
    "max_grad_norm": arg.unless(math.inf, check=arg.positive(optional=True)),
    "state_discount": arg.instance(bool),
    "normalize_advantage": arg.instance(bool),
    "truncation": arg.choice("bootstrap", "terminal", optional=True),
    "critic_learning_rate": arg.schedule(optional=True),
    "n_critic_updates": arg.integer(1),
    "critic_batch_size": arg.integer(1, optional=True),
    "critic_fit": arg.choice("after", "before"),
    "critic_warmup_updates": arg.integer(0),
    "normalize_value_targets": arg.instance(bool),
    "max_episode_steps": arg.integer(1),
    "on_nonfinite": arg.choice("raise", "skip"),
    "use_sde": arg.instance(bool),
    "sde_sample_freq": arg.integer(-1),
    "rollout_buffer_class": arg.subclass(RolloutBuffer),
    "rollout_buffer_kwargs": arg.instance(dict, optional=True),
    "stats_window_size": arg.integer(1),
    "tensorboard_log": arg.instance(str, PathLike, optional=True),
    "policy_kwargs": arg.instance(dict, optional=True),
    "verbose": arg.unless(True, False, check=arg.integer(0)),
    "seed": arg.integer(0, optional=True),
    "device": arg.device,
    "act_device": arg.unless(None, check=arg.device),
    "compile": arg.instance(bool),
}


def _check_behavior(_name: str, value: Any) -> None:
    if value is not None:
        behavior_source(value)


REPLAYING_CHECKS: dict[str, arg.Check] = {
    "buffer_size": arg.integer(1),
    "buffer_trajectories": arg.integer(1),
    "learning_starts": arg.integer(0),
    "batch_size": arg.integer(1, optional=True),
    "train_freq": arg.train_freq,
    "gradient_steps": arg.integer(-1),
    "replay_buffer_class": arg.subclass(TrajectoryReplayBuffer),
    "replay_buffer_kwargs": arg.instance(dict, optional=True),
    "optimize_memory_usage": arg.instance(bool),
    "action_noise": arg.nothing("the log-prob of a noisy action would be unknown"),
    "behavior_policy": _check_behavior,
}
