"""Actors against SB3's DummyVecEnv and SubprocVecEnv with the same envs, in turns; env steps per second.

    python benchmarks/actors.py
    python benchmarks/actors.py --cases collect-hopper train-hopper --repeats 9 --n-actors 2

Protocol
--------
- Dummy, subproc, actors, dummy, ...: what the machine does meanwhile hits all of them. A rate is the median over the
  repetitions; ``of_dummy`` and ``of_subproc`` are the medians of the pairwise ratios, with least and greatest beside.
- 16 envs, 256 steps of each env per rollout, one torch thread in every process. Every side has the same seeds, and
  takes the same steps but for rounding.
- ``collect-*`` times ``Collector.collect`` with SB3's MlpPolicy: env steps, and the log-probs and values of a rollout.
- ``train-*`` times ``learn()`` of ActorCritic, ``trpo-*`` of TRPO, both with their defaults, after a warm-up.
- ``spin`` is an env whose step computes for 1 ms, ``sleep`` one whose step waits for 1 ms; both have 16 numbers to see
  and episodes of 100 steps.
- ``apart-*`` is the limit of this machine: in the place of the actors, as many processes collect in as many envs, each
  for itself. Cores that share a cache or a clock are slower together than alone.
- ``collect-null`` is DummyVecEnv against itself: its ratios are what this machine, at this hour, can tell apart.
"""

import gc
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from bench_io import cpu_count, date_and_versions, format_table, make_parser, merge_csv
from gymnasium import spaces
from speed_timing import Clock, Factory, Sample, time_learning
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from sb3_pg import TRPO, ActorCritic
from sb3_pg.envs import ActorVecEnv
from sb3_pg.rollout import Collector

OUTPUT = Path(__file__).resolve().parent / "results" / "actors.csv"
PACKAGES = ("sb3_pg", "stable_baselines3", "gymnasium", "mujoco", "torch", "numpy")
N_ENVS, N_STEPS = 16, 256
SIDES = ("dummy", "subproc", "actors")
RATIOS = ("of_dummy", "of_dummy_min", "of_dummy_max", "of_subproc", "of_subproc_min", "of_subproc_max")
FIGURES = ("case", "n_actors", *(f"{side}_rate" for side in SIDES), *RATIOS, *(f"{side}_update" for side in SIDES))
COLUMNS = (*FIGURES, "n_envs", "n_steps", "steps", "repeats", "cpu_count", "date", "versions")


class SlowEnv(gym.Env[Any, Any]):
    """Each step takes a millisecond, of computing or of waiting.

    :param spins: whether it computes
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 (as Gymnasium has it): the default of make_vec_env
    observation_space = spaces.Box(-1, 1, (16,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, spins: bool) -> None:
        self.spins, self.t = spins, 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode."""
        super().reset(seed=seed)
        self.t = 0
        return self._observation(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take a millisecond."""
        if self.spins:
            end = time.thread_time() + 1e-3  # of this thread: other processes do not shorten it
            while time.thread_time() < end:
                pass
        else:
            time.sleep(1e-3)
        self.t += 1
        return self._observation(), float(action), False, self.t == 100, {}

    def _observation(self) -> np.ndarray:
        return self.np_random.uniform(-1, 1, 16).astype(np.float32)


ENVS: dict[str, Callable[[], gym.Env[Any, Any]]] = {
    "hopper": lambda: gym.make("Hopper-v5"),
    "cheetah": lambda: gym.make("HalfCheetah-v5"),
    "spin": lambda: SlowEnv(spins=True),
    "sleep": lambda: SlowEnv(spins=False),
    "null": lambda: gym.make("Hopper-v5"),
}


def actor_critic(env: VecEnv, n_steps: int, seed: int) -> BaseAlgorithm:
    """ActorCritic with its defaults."""
    return ActorCritic("MlpPolicy", env, n_steps=n_steps, seed=seed, device="cpu")


def trpo(env: VecEnv, n_steps: int, seed: int) -> BaseAlgorithm:
    """TRPO with its defaults."""
    return TRPO("MlpPolicy", env, n_steps=n_steps, seed=seed, device="cpu")


ALGORITHMS: dict[str, Factory | None] = {"collect": None, "train": actor_critic, "trpo": trpo}
CASES = (
    *(f"{what}-{env}" for what in (*ALGORITHMS, "apart") for env in ("hopper", "cheetah")),
    *(f"{what}-{env}" for what in ("collect", "train") for env in ("spin", "sleep")),
    "collect-null",
)


#: of a process that collects beside others
_BARRIERS: list[Any] = []


@dataclass(frozen=True)
class Envs:
    """Envs of one side.

    :param env: name of the env
    :param side: "dummy", "subproc" or "actors"
    :param n_actors: processes of the actors
    :param n_envs: number of envs
    """

    env: str
    side: str
    n_actors: int
    n_envs: int

    def make(self, seed: int) -> VecEnv:
        """Make them."""
        make = ENVS[self.env]
        fns = [lambda: Monitor(make()) for _ in range(self.n_envs)]
        kinds: dict[str, Callable[..., VecEnv]] = {
            "dummy": DummyVecEnv,
            "subproc": SubprocVecEnv,
            "actors": ActorVecEnv,
        }
        side = "dummy" if self.env == "null" else self.side
        env = kinds[side](fns, **({"n_actors": self.n_actors} if side == "actors" else {}))
        env.seed(seed)
        return env


def time_collecting(envs: Envs, n_steps: int, seed: int, steps: int, clock: Clock = time.perf_counter) -> Sample:
    """Time rollouts of at least ``steps`` env steps, after one that warms up."""
    env = envs.make(seed)
    torch.manual_seed(seed)
    policy = ActorCriticPolicy(env.observation_space, env.action_space, lambda _: 3e-4)
    collector = Collector(policy, env)
    collector.collect(n_steps=n_steps)
    n_rollouts = math.ceil(steps / (n_steps * env.num_envs))
    gc.collect()
    start = clock()
    for _ in range(n_rollouts):
        collector.collect(n_steps=n_steps)
    seconds = clock() - start
    env.close()
    return Sample(n_rollouts * n_steps * env.num_envs, seconds)


def time_apart(envs: Envs, seed: int, steps: int) -> Sample:
    """Time as many processes as there are actors, which share nothing but the machine."""
    context = multiprocessing.get_context("spawn")
    alone = replace(envs, side="dummy", n_envs=envs.n_envs // envs.n_actors)
    barrier = context.Barrier(envs.n_actors)
    with ProcessPoolExecutor(envs.n_actors, context, _wait_for_others, (barrier,)) as pool:
        tasks = [pool.submit(_collect_beside, alone, seed + i, steps // envs.n_actors) for i in range(envs.n_actors)]
        samples = [task.result() for task in tasks]
    return Sample(sum(sample.steps for sample in samples), max(sample.seconds for sample in samples))


def _wait_for_others(barrier: Any) -> None:
    torch.set_num_threads(1)
    _BARRIERS.append(barrier)


def _collect_beside(envs: Envs, seed: int, steps: int) -> Sample:
    """Collect when all processes are ready."""
    time_collecting(envs, N_STEPS, seed, 1)
    _BARRIERS[0].wait()
    return time_collecting(envs, N_STEPS, seed, steps)


def measure(case: str, n_actors: int, repeats: int, steps: int) -> dict[str, Any]:
    """One row: ``repeats`` times dummy, subproc, actors."""
    what, _, env = case.partition("-")
    steps = steps // 10 if env in ("spin", "sleep") else steps
    factory = ALGORITHMS.get(what)
    sides = [side for side in SIDES if (what, side) != ("apart", "subproc")]
    samples: dict[str, list[Sample]] = {side: [] for side in sides}
    for repetition in range(repeats):
        for side in sides:
            set_random_seed(repetition)
            envs: Any = Envs(env, side, n_actors, N_ENVS)
            if (what, side) == ("apart", "actors"):
                samples[side].append(time_apart(envs, repetition, steps))
                continue
            samples[side].append(
                time_collecting(envs, N_STEPS, repetition, steps)
                if factory is None
                else time_learning(factory, envs, N_STEPS, 1, repetition, steps, N_STEPS * N_ENVS)
            )
    row: dict[str, Any] = {"case": case, "n_actors": n_actors}
    for side in sides:
        row[f"{side}_rate"] = round(statistics.median(sample.rate for sample in samples[side]))
        if factory is not None:
            shares = [sample.update_seconds / sample.seconds for sample in samples[side]]
            row[f"{side}_update"] = round(statistics.median(shares), 3)
    for side in sides[:-1]:
        ratios = [mine.rate / theirs.rate for mine, theirs in zip(samples["actors"], samples[side], strict=True)]
        row[f"of_{side}"] = round(statistics.median(ratios), 2)
        row[f"of_{side}_min"], row[f"of_{side}_max"] = round(min(ratios), 2), round(max(ratios), 2)
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the chosen cases, save each, print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    parser.add_argument("--n-actors", type=int, default=min(N_ENVS, cpu_count()), help="default: one per CPU")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10 * N_STEPS * N_ENVS, help="env steps per timing, about")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="CSV file; rows of other cases stay in it")
    options = parser.parse_args(arguments)
    if options.repeats < 1 or options.steps < 1 or not 1 <= options.n_actors <= N_ENVS:
        parser.error(f"--repeats and --steps are 1 or more, --n-actors is 1 to {N_ENVS}")
    torch.set_num_threads(1)
    stamps = {
        "n_envs": N_ENVS,
        "n_steps": N_STEPS,
        "steps": options.steps,
        "repeats": options.repeats,
        "cpu_count": cpu_count(),
        **date_and_versions(PACKAGES),
    }
    rows = []
    for case in options.cases:
        print(f"{case} ...", file=sys.stderr, flush=True)
        rows.append(measure(case, options.n_actors, options.repeats, options.steps))
        # saved case by case: an interrupt costs the current one only
        merge_csv(options.output, [rows[-1] | stamps], COLUMNS, ("case", "n_actors"))
    print(format_table(rows, FIGURES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
