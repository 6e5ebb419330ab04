"""RLlib's IMPALA on the envs of ``asynchronous.py``: env steps per second. It runs in an environment of its own.

    python -m venv /tmp/rllib && /tmp/rllib/bin/pip install "ray[rllib]" torch "gymnasium[classic-control,mujoco]"
    /tmp/rllib/bin/python benchmarks/asynchronous_rllib.py CartPole-v1 Hopper-v5

The rate is the median over windows of ``--seconds`` each, from the first iteration that reports steps on. With
``--defaults``, RLlib's own settings stay as they are: one env per actor, fragments of 50 steps, batches of 500.
"""

import importlib
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from bench_io import cpu_count, date_and_versions, format_table, make_parser, merge_csv

RESULTS: Final = Path(__file__).resolve().parent / "results" / "asynchronous_rllib.csv"
N_ENVS, N_STEPS = 16, 64
FIGURES: Final = ("env", "n_actors", "rate", "rate_min", "rate_max")
COLUMNS: Final = (*FIGURES, "n_envs", "n_steps", "batch", "seconds", "repeats", "cpu_count", "date", "versions")


def steps_of(result: dict[str, Any]) -> int:
    """Env steps since the start, from what ``train()`` returns. Its first results may have none."""
    return int(result.get("env_runners", {}).get("num_env_steps_sampled_lifetime", 0))


def measure(env: str, n_actors: int, seconds: float, repeats: int, defaults: bool = False) -> dict[str, Any]:
    """One row."""
    config: Any = importlib.import_module("ray.rllib.algorithms.impala").IMPALAConfig()
    config.environment(env).env_runners(num_env_runners=n_actors).learners(num_learners=0)
    if not defaults:
        config.env_runners(num_envs_per_env_runner=N_ENVS // n_actors, rollout_fragment_length=N_STEPS)
        config.training(train_batch_size_per_learner=N_STEPS * N_ENVS // n_actors)
    algorithm = config.build_algo()
    latest = 0
    while not latest:
        latest = steps_of(algorithm.train())
    rates = []
    for _ in range(repeats):
        first, began = latest, time.perf_counter()
        while time.perf_counter() - began < seconds:
            latest = steps_of(algorithm.train())
        rates.append((latest - first) / (time.perf_counter() - began))
    algorithm.stop()
    return {
        "env": env,
        "n_actors": n_actors,
        "rate": round(statistics.median(rates)),
        "rate_min": round(min(rates)),
        "rate_max": round(max(rates)),
        "n_envs": n_actors * config.num_envs_per_env_runner,
        "n_steps": config.get_rollout_fragment_length(),
        "batch": config.total_train_batch_size,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, save each row, print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("envs", nargs="+")
    parser.add_argument("--n-actors", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each window")
    parser.add_argument("--repeats", type=int, default=5, help="windows")
    parser.add_argument("--defaults", action="store_true", help="RLlib's own settings")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file; other rows stay in it")
    options = parser.parse_args(arguments)
    stamps = {
        "seconds": options.seconds,
        "repeats": options.repeats,
        "cpu_count": cpu_count(),
        **date_and_versions(("ray", "gymnasium", "mujoco", "torch", "numpy")),
    }
    rows = []
    for env in options.envs:
        rows.append(measure(env, options.n_actors, options.seconds, options.repeats, options.defaults))
        merge_csv(options.output, [rows[-1] | stamps], COLUMNS, ("env", "n_actors", "n_envs"))
    print(format_table(rows, FIGURES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
