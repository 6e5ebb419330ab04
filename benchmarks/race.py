"""A race: training seconds until CartPole-v1 is solved, ours against SB3's PPO and A2C and sb3-contrib's TRPO.

    python benchmarks/race.py                      # 10 seeds of each, in turns: table, results/race.csv
    python benchmarks/race.py --algo actor_critic a2c --seeds 100 101 --output /tmp/race.csv

Protocol
--------
- Settings are those of the configuration files: ours from ``zoo_configs/``, the peers' from rl_zoo3; CPU, one thread.
  Budgets (and so the linear schedules) are theirs too. Envs are DummyVecEnv's, but for ``:vector``: native ones.
- At every 2,000 env steps (at the first step at or past it) the deterministic policy plays 24 episodes. Two means in a
  row of 475 or more end the race; ``steps`` and ``seconds`` are those at the first of the two.
- Seconds are those of ``learn()`` without the evaluations. Algorithms take turns within a seed, in one process, after
  one short run of each that is not counted.
- A run that is not there at ``--limit`` env steps counts as infinitely slow (it is in the median, not dropped).
"""

import contextlib
import io
import itertools
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_io import cpu_count, date_and_versions, format_table, make_parser, merge_csv
from learning_run import EVALUATION_SEED, Evaluations, Point, evaluation_env, make_manager, resolve_hyperparams
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_pg.zoo.experiment import from_functions

OUTPUT = Path(__file__).resolve().parent / "results" / "race.csv"
ENV = "CartPole-v1"
REFERENCE = "actor_critic"
ALGOS = (REFERENCE, "actor_critic:vector", "trpo", "ppo", "a2c", "contrib_trpo")
SOLVED, EVERY, EPISODES = 475.0, 2_000, 24
PACKAGES = ("sb3_pg", "stable_baselines3", "sb3_contrib", "rl_zoo3", "gymnasium", "torch", "numpy")
KEY = ("algo", "seed")
COLUMNS = (*KEY, "steps", "seconds", "evaluations", "limit", "cpu_count", "date", "versions")
FIGURES = ("algo", "seeds", "solved", "median_seconds", "least", "greatest", "median_steps", f"slower_than_{REFERENCE}")


def finish(points: Sequence[Point]) -> Point | None:
    """The first of two evaluations in a row that are good enough; None if there are none."""
    for first, second in itertools.pairwise(points):
        if min(first[1], second[1]) >= SOLVED:
            return first
    return None


class Finish(Evaluations):
    """Ends training when the race is over, won or given up."""

    def _on_step(self) -> bool:
        return super()._on_step() and finish(self.points[-2:]) is None and bool(self.due)


def race(entrant: str, seed: int, limit: int) -> dict[str, Any]:
    """One run, up to the finish or ``limit`` env steps.

    :param entrant: name in rl_zoo3, and maybe a backend after a colon
    """
    algo, _, backend = entrant.partition(":")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        set_random_seed(seed)
        budget = int(resolve_hyperparams(algo, ENV, {}, None)["n_timesteps"])
        manager = make_manager(algo, ENV, seed, budget, {}, None, folder)
        if backend:
            manager.vec_env_class = partial(from_functions, backend)  # type: ignore[assignment]  # rl_zoo3 calls it
        experiment = manager.setup_experiment()
        assert experiment is not None
        model = experiment[0]
        manager.vec_env_class = DummyVecEnv
        env = evaluation_env(manager, EPISODES, EVALUATION_SEED + 1000 * seed)
        last = min(limit, budget)
        callback = Finish(env, last, last // EVERY, EPISODES, True, lambda _: None)
        model.learn(budget, callback=[callback, *manager.callbacks], log_interval=100)
        env.close()
    point = finish(callback.points)
    steps, _, _, seconds = point if point is not None else (math.inf, 0.0, 0.0, math.inf)
    return {
        "algo": entrant,
        "seed": seed,
        "steps": steps,
        "seconds": round(seconds, 4),
        "evaluations": " ".join(f"{mean:.0f}" for _, mean, _, _ in callback.points),
        "limit": last,
    }


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per algorithm; the median of an even number of runs is the mean of the middle two."""
    by_algo: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_algo.setdefault(row["algo"], []).append(row)
    seconds = {algo: [row["seconds"] for row in runs] for algo, runs in by_algo.items()}
    reference = statistics.median(seconds[REFERENCE]) if REFERENCE in seconds else math.nan
    return [
        {
            "algo": algo,
            "seeds": len(runs),
            "solved": sum(math.isfinite(row["seconds"]) for row in runs),
            "median_seconds": round(statistics.median(seconds[algo]), 3),
            "least": round(min(seconds[algo]), 3),
            "greatest": round(max(seconds[algo]), 3),
            "median_steps": statistics.median([row["steps"] for row in runs]),
            f"slower_than_{REFERENCE}": round(statistics.median(seconds[algo]) / reference, 2),
        }
        for algo, runs in by_algo.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Race, save each run, print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--algo", nargs="+", default=list(ALGOS), help="names in rl_zoo3, NAME:vector on native envs")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(10)), help="default: 0 to 9")
    parser.add_argument("--limit", type=int, default=50_000, help="env steps after which a run is given up")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    if options.limit < 2 * EVERY:
        parser.error(f"--limit is {2 * EVERY} or more: two evaluations")
    torch.set_num_threads(1)
    stamps = {
        "cpu_count": cpu_count(),
        **date_and_versions(PACKAGES),
    }
    for algo in options.algo:
        race(algo, options.seeds[0], 2 * EVERY)
    rows = []
    for seed in options.seeds:
        for algo in options.algo:
            rows.append(race(algo, seed, options.limit))
            print(f"{algo} {seed}: {rows[-1]['seconds']} s, {rows[-1]['steps']} steps", file=sys.stderr, flush=True)
            merge_csv(options.output, [rows[-1] | stamps], COLUMNS, KEY)
    print(format_table(summarize(rows), FIGURES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
