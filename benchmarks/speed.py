"""Speed: ours against a peer in the same process, in turns, one thread; env steps per second.

    python benchmarks/speed.py
    python benchmarks/speed.py --cases cartpole-8 --repeats 9 --steps 40960

Protocol
--------
- Ours, peer, limit, ours, peer, limit, ...: what the machine does meanwhile hits all of them. A rate is the median over
  the repetitions; ``ratio`` is the median of the pairwise ratios ours / peer, with their least and greatest beside it.
- Training: repetition i builds fresh models and envs from seed i, so all repetitions time the same phase of training
  (early: a policy that improves has longer episodes, fewer resets and a faster env). One ``learn()`` of one rollout
  warms up; the next ``learn()`` is timed. ``verbose=0`` and ``log_interval=1`` on both sides.
- The limit is the same VecEnv under random actions drawn beforehand: no policy, no learning, no buffer.
- ``update`` is the share of the time spent in ``train()``; the rest is collecting, returns and logging.
- ``episode`` is the mean episode length during the timed part: the sides are comparable where these are alike.
- A kernel row times a function against its peer on the same data, after checking that the results agree.
- ``a2c-5-*`` are A2C's defaults, 5 steps per rollout and a log entry in 100; so small an update is all overhead.
- ``critic-*`` times minibatch steps of the critic on one rollout: our loop, and sb3-contrib's, which is the difference
  between its TRPO's ``train()`` with many passes over the critic and with one.
- ``a2c-null`` is A2C against itself: the spread of its ratio is what this machine, at this hour, can tell apart.
"""

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from bench_io import cpu_count, format_table, merge_csv, versions
from gymnasium import spaces
from sb3_contrib import TRPO
from stable_baselines3 import A2C
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv

from sb3_pg import ActorCritic, Reinforce, functional

OUTPUT = Path(__file__).resolve().parent / "results" / "speed.csv"
ROLLOUT = 2048  # env steps per rollout, over all envs
PACKAGES = ("sb3_pg", "stable_baselines3", "sb3_contrib", "gymnasium", "torch", "numpy")
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

    def measures(self, repetition: int, steps: int) -> tuple[Callable[[], Sample], ...]:
        """Ours, the peer, and the env alone."""
        n_steps = self.n_steps or ROLLOUT // self.n_envs
        return (
            lambda: time_learning(self.ours, self.env, self.n_envs, n_steps, self.log_interval, repetition, steps),
            lambda: time_learning(self.peer, self.env, self.n_envs, n_steps, self.log_interval, repetition, steps),
            lambda: time_env(self.env, self.n_envs, repetition, steps),
        )


@dataclass(frozen=True)
class KernelCase:
    """Two functions of the same data; ``build`` checks that they agree and returns them."""

    name: str
    ours_name: str
    peer_name: str
    build: Callable[[int, int], tuple[Callable[[], Any], Callable[[], Any]]]  # n_envs, seed
    n_envs: int

    def measures(self, repetition: int, steps: int) -> tuple[Callable[[], Sample], ...]:
        """Ours and the peer, on data of this repetition."""
        ours, peer = self.build(self.n_envs, repetition)
        size = ROLLOUT * self.n_envs
        n_calls = max(10, steps // size)
        return (lambda: time_calls(ours, size, n_calls), lambda: time_calls(peer, size, n_calls))


@dataclass(frozen=True)
class CriticCase:
    """Minibatch steps of the critic: :meth:`_fit_critic` against the loop in sb3-contrib's TRPO."""

    name: str
    n_envs: int
    ours_name: str = "fit_critic"
    peer_name: str = "TRPO"

    def measures(self, repetition: int, steps: int) -> tuple[Callable[[], Sample], ...]:
        """Ours and the peer; ``steps`` counts samples that have been in a minibatch."""
        passes = max(4, steps // ROLLOUT)
        batch_size = 128
        settings: dict[str, Any] = {"n_steps": ROLLOUT // self.n_envs, "seed": repetition, "device": "cpu"}
        env = make_vec_env("CartPole-v1", n_envs=self.n_envs, seed=repetition)
        peer = TRPO("MlpPolicy", env, batch_size=batch_size, n_critic_updates=1, **settings).learn(ROLLOUT)
        ours = ActorCritic("MlpPolicy", env, n_critic_updates=passes, critic_batch_size=batch_size, **settings)
        ours.learn(ROLLOUT)
        batch = ours._batch
        assert batch is not None
        n_minibatches = ROLLOUT // batch_size

        def time_peer() -> Sample:
            start = deepcopy(peer.policy.state_dict())

            def train(n: int) -> float:
                peer.policy.load_state_dict(start)  # so that both meet the same conjugate gradients and line search
                peer.n_critic_updates = n
                begin = time.perf_counter()
                peer.train()
                return time.perf_counter() - begin

            return Sample(passes * n_minibatches, train(passes + 1) - train(1))

        def time_ours() -> Sample:
            begin = time.perf_counter()
            ours._fit_critic(batch)
            return Sample(passes * n_minibatches, time.perf_counter() - begin)

        time_ours()
        time_peer()
        return time_ours, time_peer


def time_learning(
    factory: Factory,
    env_id: str,
    n_envs: int,
    n_steps: int,
    log_interval: int,
    seed: int,
    steps: int,
    clock: Clock = time.perf_counter,
) -> Sample:
    """Time ``learn()`` of at least ``steps`` env steps, a whole number of rollouts, after a warm-up rollout."""
    env = make_vec_env(env_id, n_envs=n_envs, seed=seed)
    model = factory(env, n_steps, seed)
    model.learn(ROLLOUT, log_interval=log_interval)
    update_seconds = 0.0
    train: Callable[..., None] = model.train  # type: ignore[attr-defined]

    def timed_train(*args: Any, **kwargs: Any) -> None:
        nonlocal update_seconds
        start = clock()
        train(*args, **kwargs)
        update_seconds += clock() - start

    model.train = timed_train  # type: ignore[attr-defined]
    gc.collect()
    before, start = model.num_timesteps, clock()
    model.learn(steps, log_interval=log_interval, reset_num_timesteps=False)
    seconds = clock() - start
    env.close()
    lengths = [info["l"] for info in model.ep_info_buffer or []]
    episode = statistics.fmean(lengths) if lengths else math.nan
    return Sample(model.num_timesteps - before, seconds, update_seconds, episode)


def time_env(env_id: str, n_envs: int, seed: int, steps: int, clock: Clock = time.perf_counter) -> Sample:
    """Time the bare VecEnv under random actions."""
    env = make_vec_env(env_id, n_envs=n_envs, seed=seed)
    env.action_space.seed(seed)
    n_calls = math.ceil(steps / n_envs)
    actions = np.array([[env.action_space.sample() for _ in range(n_envs)] for _ in range(n_calls)])
    env.reset()
    gc.collect()
    start = clock()
    for action in actions:
        env.step(action)
    seconds = clock() - start
    env.close()
    return Sample(n_calls * n_envs, seconds)


def time_calls(function: Callable[[], Any], size: int, n_calls: int, clock: Clock = time.perf_counter) -> Sample:
    """Time calls of a function that handles ``size`` env steps each."""
    function()
    gc.collect()
    start = clock()
    for _ in range(n_calls):
        function()
    return Sample(size * n_calls, clock() - start)


def reinforce(env: VecEnv, n_steps: int, seed: int) -> BaseAlgorithm:
    """Reinforce set up as A2C is: segments, a critic, one step of the same optimizer per rollout; both learn alike."""
    rms_prop = {"optimizer_class": torch.optim.RMSprop, "optimizer_kwargs": {"alpha": 0.99, "eps": 1e-5}}
    return Reinforce(
        "MlpPolicy",
        env,
        7e-4,
        baseline="value",
        critic_learning_rate=None,
        n_critic_updates=1,
        n_steps=n_steps,
        policy_kwargs=rms_prop,
        seed=seed,
        device="cpu",
    )


def actor_critic(env: VecEnv, n_steps: int, seed: int) -> BaseAlgorithm:
    """ActorCritic with its defaults, which are A2C's."""
    return ActorCritic("MlpPolicy", env, n_steps=n_steps, seed=seed, device="cpu")


def a2c(env: VecEnv, n_steps: int, seed: int) -> BaseAlgorithm:
    """SB3's A2C with its defaults."""
    return A2C("MlpPolicy", env, n_steps=n_steps, seed=seed, device="cpu")


def build_gae(n_envs: int, seed: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """GAE and returns of one rollout, by ``functional.gae`` and by SB3's buffer; episodes of 50 steps on average."""
    rng = np.random.default_rng(seed)
    gamma, gae_lambda = 0.99, 0.95
    buffer = RolloutBuffer(
        ROLLOUT, spaces.Box(-1, 1, (1,)), spaces.Discrete(2), "cpu", gae_lambda=gae_lambda, gamma=gamma, n_envs=n_envs
    )
    buffer.rewards = rng.standard_normal((ROLLOUT, n_envs), dtype=np.float32)
    buffer.values = rng.standard_normal((ROLLOUT, n_envs), dtype=np.float32)
    terminated = rng.random((ROLLOUT, n_envs)) < 0.02
    buffer.episode_starts = np.concatenate([np.ones((1, n_envs)), terminated[:-1]]).astype(np.float32)
    last_values, last_dones = torch.randn(n_envs, generator=torch.Generator().manual_seed(seed)), terminated[-1]

    rewards, values = torch.from_numpy(buffer.rewards), torch.from_numpy(buffer.values)
    ends = torch.from_numpy(terminated).clone()
    ends[-1] = True
    bootstrap = torch.zeros_like(rewards)
    bootstrap[-1] = torch.where(torch.from_numpy(last_dones), 0.0, last_values)

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        advantages = functional.gae(rewards, values, ends, gamma, gae_lambda, bootstrap)
        return advantages, advantages + values

    def peer() -> tuple[np.ndarray, np.ndarray]:
        buffer.compute_returns_and_advantage(last_values, last_dones)
        return buffer.advantages, buffer.returns

    for mine, theirs in zip(ours(), peer(), strict=True):
        torch.testing.assert_close(mine, torch.from_numpy(theirs), rtol=1e-4, atol=1e-4)
    return ours, peer


CASES: tuple[Case, ...] = (
    TrainingCase("cartpole-1", "Reinforce", reinforce, "A2C", a2c, "CartPole-v1", 1),
    TrainingCase("cartpole-8", "Reinforce", reinforce, "A2C", a2c, "CartPole-v1", 8),
    TrainingCase("a2c-5-1", "ActorCritic", actor_critic, "A2C", a2c, "CartPole-v1", 1, n_steps=5, log_interval=100),
    TrainingCase("a2c-5-8", "ActorCritic", actor_critic, "A2C", a2c, "CartPole-v1", 8, n_steps=5, log_interval=100),
    TrainingCase("hopper-8", "ActorCritic", actor_critic, "A2C", a2c, "Hopper-v4", 8, log_interval=100),
    CriticCase("critic-8", 8),
    TrainingCase("a2c-null", "A2C", a2c, "A2C", a2c, "CartPole-v1", 8),
    KernelCase("gae-1", "functional.gae", "RolloutBuffer", build_gae, 1),
    KernelCase("gae-8", "functional.gae", "RolloutBuffer", build_gae, 8),
    KernelCase("gae-64", "functional.gae", "RolloutBuffer", build_gae, 64),
)

FIGURES = (
    *("case", "ours", "peer", "n_envs", "ours_rate", "peer_rate", "ratio", "ratio_min", "ratio_max"),
    *("env_rate", "ours_of_env", "peer_of_env", "ours_update", "peer_update", "ours_episode", "peer_episode"),
)
COLUMNS = (*FIGURES, "steps", "repeats", "cpu_count", "date", "versions")


def median(values: Sequence[float], digits: int) -> float | str:
    """Rounded median; empty where nothing was measured."""
    middle = statistics.median(values)
    return "" if math.isnan(middle) else round(middle, digits) if digits else round(middle)


def summarize(ours: Sequence[Sample], peer: Sequence[Sample], limit: Sequence[Sample]) -> dict[str, float | str]:
    """The figures of a row. Ratios and shares are taken within a repetition, then their median."""
    ratios = [mine.rate / theirs.rate for mine, theirs in zip(ours, peer, strict=True)]
    row = {
        "ours_rate": median([sample.rate for sample in ours], 0),
        "peer_rate": median([sample.rate for sample in peer], 0),
        "ratio": median(ratios, 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
    }
    for side, samples in (("ours", ours), ("peer", peer)):
        row[f"{side}_update"] = median([sample.update_seconds / sample.seconds for sample in samples], 3)
        row[f"{side}_episode"] = median([sample.episode for sample in samples], 1)
        if limit:
            shares = [sample.rate / most.rate for sample, most in zip(samples, limit, strict=True)]
            row[f"{side}_of_env"] = median(shares, 3)
    if limit:
        row["env_rate"] = median([sample.rate for sample in limit], 0)
    return row


def measure(case: Case, repeats: int, steps: int) -> dict[str, Any]:
    """One row: ``repeats`` times ours, peer, limit."""
    samples = []
    for repetition in range(repeats):
        set_random_seed(repetition)
        samples.append([take() for take in case.measures(repetition, steps)])
    ours, peer, *limit = zip(*samples, strict=True)
    names = {"case": case.name, "ours": case.ours_name, "peer": case.peer_name, "n_envs": case.n_envs}
    return names | summarize(ours, peer, limit[0] if limit else ())


def main(arguments: Sequence[str] | None = None, cases: Sequence[Case] = CASES) -> int:
    """Measure the chosen cases, save each, print the table."""
    description, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [case.name for case in cases]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10 * ROLLOUT, help="env steps per timing, about")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="CSV file; rows of other cases stay in it")
    options = parser.parse_args(arguments)
    if options.repeats < 1 or options.steps < 1:
        parser.error("--repeats and --steps are 1 or more")
    torch.set_num_threads(1)
    stamps = {
        "steps": options.steps,
        "repeats": options.repeats,
        "cpu_count": cpu_count(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": versions(*PACKAGES),
    }
    rows = []
    for case in cases:
        if case.name in options.cases:
            print(f"{case.name} ...", file=sys.stderr, flush=True)
            rows.append(measure(case, options.repeats, options.steps))
            # saved case by case: an interrupt costs the current one only
            merge_csv(options.output, [rows[-1] | stamps], COLUMNS, ("case",))
    print(format_table(rows, FIGURES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
