"""How one side of a comparison is timed, and the kinds of comparison; see speed.py for the protocol."""

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from sb3_pg.envs import make_vec_env
from sb3_pg.rollout import skip_reset_steps

ROLLOUT = 2048  # env steps per rollout, over all envs
Factory = Callable[[VecEnv, int, int], BaseAlgorithm]  # env, n_steps per env, seed
Clock = Callable[[], float]


@dataclass(frozen=True)
class Sample:
    """One timing: env steps, seconds; and where there is training, seconds in updates and mean episode length."""

    steps: int
    seconds: float
    update_seconds: float = math.nan
    episode: float = math.nan

    @property
    def rate(self) -> float:
        """Env steps per second."""
        return self.steps / self.seconds


class Case(Protocol):
    """A row of the table."""

    @property
    def name(self) -> str:
        """What ``--cases`` takes."""

    @property
    def n_envs(self) -> int:
        """Number of envs."""

    @property
    def ours_name(self) -> str:
        """What is measured."""

    @property
    def peer_name(self) -> str:
        """What it is measured against."""

    def measures(self, repetition: int, steps: int) -> tuple[Callable[[], Sample], ...]:
        """Ours, the peer, and (where there is one) the limit: to be called in turn."""


@dataclass(frozen=True)
class Envs:
    """Envs to train on."""

    env_id: str
    n_envs: int
    backend: str = "dummy"
    n_threads: int | None = None  # of EnvPool

    def make(self, seed: int) -> VecEnv:
        """Make them."""
        kwargs = {"num_threads": self.n_threads} if self.n_threads else {}
        return make_vec_env(self.env_id, self.n_envs, self.backend, seed, backend_kwargs=kwargs)


@dataclass(frozen=True)
class TrainingCase:
    """``learn()`` of two algorithms on the same env."""

    name: str
    ours_name: str
    ours: Factory
    peer_name: str
    peer: Factory
    env: str
    n_envs: int
    n_steps: int | None = None  # per rollout and env; None: ROLLOUT of all envs
    log_interval: int = 1
    warm_up: int = ROLLOUT
    share: float = 1.0  # of the env steps asked for: where each of them takes a gradient step, fewer are enough
    backend: str = "dummy"  # of ours and of the env alone; the peer has SB3's DummyVecEnv
    n_threads: int | None = None

    def measures(self, repetition: int, steps: int) -> tuple[Callable[[], Sample], ...]:
        """Ours, the peer, and the env alone."""
        steps = max(1, int(self.share * steps))
        n_steps = self.n_steps or ROLLOUT // self.n_envs
        theirs, ours = Envs(self.env, self.n_envs), Envs(self.env, self.n_envs, self.backend, self.n_threads)
        return (
            lambda: time_learning(self.ours, ours, n_steps, self.log_interval, repetition, steps, self.warm_up),
            lambda: time_learning(self.peer, theirs, n_steps, self.log_interval, repetition, steps, self.warm_up),
            lambda: time_env(ours, repetition, steps),
        )


@dataclass(frozen=True)
class FloorCase:
    """``learn()`` of an algorithm against the least there is to do: env, one forward per step, one gradient step."""

    name: str
    ours_name: str
    ours: Factory
    env: str
    n_envs: int
    backend: str
    n_threads: int | None = None
    log_interval: int = 100
    peer_name: str = "bare loop"

    def measures(self, repetition: int, steps: int) -> tuple[Callable[[], Sample], ...]:
        """Ours, the bare loop, and the env alone."""
        envs = Envs(self.env, self.n_envs, self.backend, self.n_threads)
        n_steps = ROLLOUT // self.n_envs
        return (
            lambda: time_learning(self.ours, envs, n_steps, self.log_interval, repetition, steps),
            lambda: time_floor(self.ours, envs, n_steps, repetition, steps),
            lambda: time_env(envs, repetition, steps),
        )


@dataclass(frozen=True)
class KernelCase:
    """Two functions of the same data; ``build`` checks that they agree and returns them."""

    name: str
    ours_name: str
    peer_name: str
    build: Callable[[int], tuple[Callable[[], Any], Callable[[], Any]]]  # seed
    size: int  # env steps that a call handles
    n_envs: int = 1

    def measures(self, repetition: int, steps: int) -> tuple[Callable[[], Sample], ...]:
        """Ours and the peer, on data of this repetition."""
        ours, peer = self.build(repetition)
        n_calls = max(30, steps // self.size)
        return (lambda: time_calls(ours, self.size, n_calls), lambda: time_calls(peer, self.size, n_calls))


def time_learning(
    factory: Factory,
    envs: Envs,
    n_steps: int,
    log_interval: int,
    seed: int,
    steps: int,
    warm_up: int = ROLLOUT,
    clock: Clock = time.perf_counter,
) -> Sample:
    """Time ``learn()`` of at least ``steps`` env steps, a whole number of rollouts, after a warm-up."""
    env = envs.make(seed)
    model = factory(env, n_steps, seed)
    model.learn(warm_up, log_interval=log_interval)
    update_seconds = 0.0
    train: Callable[..., None] = model.train  # type: ignore[attr-defined]

    def timed_train(*args: Any, **kwargs: Any) -> None:
        nonlocal update_seconds
        start = clock()
        train(*args, **kwargs)
        update_seconds += clock() - start

    model.train = timed_train  # type: ignore[attr-defined]
    gc.collect()
    before, start = model.num_timesteps - n_resets(env), clock()
    model.learn(steps, log_interval=log_interval, reset_num_timesteps=False)
    seconds = clock() - start
    env.close()
    lengths = [info["l"] for info in model.ep_info_buffer or []]
    episode = statistics.fmean(lengths) if lengths else math.nan
    return Sample(model.num_timesteps - n_resets(env) - before, seconds, update_seconds, episode)


def n_resets(env: Any) -> int:
    """Steps of envs that were none: an env that resets late has taken one for every episode that has ended."""
    return int(env.n_ended) if getattr(env, "next_step_autoreset", False) else 0


def time_env(envs: Envs, seed: int, steps: int, clock: Clock = time.perf_counter) -> Sample:
    """Time the bare VecEnv under random actions."""
    env, n_envs = envs.make(seed), envs.n_envs
    env.action_space.seed(seed)
    n_calls = math.ceil(steps / n_envs)
    actions = np.array([[env.action_space.sample() for _ in range(n_envs)] for _ in range(n_calls)])
    env.reset()
    gc.collect()
    with skip_reset_steps(env):
        start = clock()
        for action in actions:
            env.step(action)
        seconds = clock() - start
    env.close()
    return Sample(n_calls * n_envs - n_resets(env), seconds)


def time_floor(
    factory: Factory, envs: Envs, n_steps: int, seed: int, steps: int, clock: Clock = time.perf_counter
) -> Sample:
    """Time env steps, each after one forward of the actor's net, and one gradient step per rollout, and nothing else.

    Actions are drawn from the softmax, or are the mean; the loss is the mean square of what actor and critic put out.
    """
    env: Any = envs.make(seed)
    policy: Any = factory(env, n_steps, seed).policy
    n_rollouts = math.ceil(steps / (n_steps * envs.n_envs))
    observations = env.reset()
    rows = torch.zeros((n_steps, *observations.shape))
    noise = torch.empty((envs.n_envs, policy.action_net.out_features))
    discrete = policy.action_net.out_features > 1 and not env.action_space.shape
    gc.collect()
    with skip_reset_steps(env):
        start = clock()
        for _ in range(n_rollouts):
            for t in range(n_steps):
                rows[t] = torch.from_numpy(observations)
                with torch.inference_mode():
                    actions = policy.action_net(policy.mlp_extractor.policy_net(rows[t]))
                    if discrete:
                        actions = (actions.softmax(1) / noise.exponential_()).argmax(1)
                observations, _, _, _ = env.step(actions.numpy())
            latent = policy.mlp_extractor(rows.flatten(0, 1))
            loss = policy.action_net(latent[0]).square().mean() + policy.value_net(latent[1]).square().mean()
            policy.optimizer.zero_grad()
            loss.backward()
            policy.optimizer.step()
        seconds = clock() - start
    env.close()
    taken = n_rollouts * n_steps * envs.n_envs - n_resets(env)
    return Sample(taken, seconds, episode=taken / max(env.n_ended, 1))


def time_calls(function: Callable[[], Any], size: int, n_calls: int, clock: Clock = time.perf_counter) -> Sample:
    """Time calls of a function that handles ``size`` env steps each."""
    function()
    gc.collect()
    start = clock()
    for _ in range(n_calls):
        function()
    return Sample(size * n_calls, clock() - start)
