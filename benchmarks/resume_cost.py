"""What checkpoints cost: time, and size on the disk.

    python benchmarks/resume_cost.py --repeats 5         # results/resume_cost.csv

Protocol
--------
- One thread. Training with ResumeCallback and without it takes turns, and so does which of the two comes first.
- ``share``: time of writing checkpoints, but for the first, and of copying the state for signals, over the time of
  training. ``ratio``: time of training with the callback over that without it.
- ``seconds``: time of writing one checkpoint. ``megabytes``: size of the folder at the end, which holds 3 checkpoints.
- ``offpac-1M``: the replay buffer has a million transitions, made up beforehand. ``first_seconds`` is the first
  checkpoint, which writes all of them.
- Times are medians over the repetitions.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from bench_io import format_table, limit_threads, make_parser, merge_csv, versions

limit_threads()

import numpy as np  # noqa: E402 (the number of threads is set before)
import torch as th  # noqa: E402
from stable_baselines3.common.vec_env import VecNormalize  # noqa: E402

from sb3_pg import TRPO, OffPAC, Reinforce  # noqa: E402
from sb3_pg.checkpoints import ResumeCallback  # noqa: E402
from sb3_pg.envs import make_vec_env  # noqa: E402

RESULTS: Final = Path(__file__).resolve().parent / "results"
COLUMNS: Final = (
    *("case", "steps", "every", "checkpoints", "first_seconds", "seconds", "share", "ratio", "ratio_min", "ratio_max"),
    *("megabytes", "date", "versions"),
)
#: case -> env steps, steps between two checkpoints
CASES: Final = {
    "cartpole-8": (150_000, 50_000),
    "hopper-8": (150_000, 50_000),
    "offpac-1M": (4_000, 1_000),
}


def make_model(case: str) -> Any:
    """Return a new model of a case."""
    if case == "cartpole-8":
        return Reinforce(
            "MlpPolicy", make_vec_env("CartPole-v1", 8, "dummy", seed=0), n_episodes=16, seed=0, device="cpu"
        )
    if case == "hopper-8":
        env = VecNormalize(make_vec_env("Hopper-v5", 8, seed=0), gamma=0.99)
        return TRPO("MlpPolicy", env, n_steps=512, seed=0, device="cpu")
    model = OffPAC("MlpPolicy", make_vec_env("Hopper-v5", 1, seed=0), learning_starts=0, seed=0, device="cpu")
    buffer: Any = model.replay_buffer
    numbers = np.random.default_rng(0)
    for array in (buffer.observations, buffer.next_observations):
        array[:] = numbers.normal(size=array.shape)
    buffer.actions[:] = numbers.uniform(-1, 1, size=buffer.actions.shape)
    buffer.rewards[:] = numbers.normal(size=buffer.rewards.shape)
    buffer.full = True
    return model


def time_training(case: str, folder: Path | None) -> tuple[float, ResumeCallback | None]:
    """Return the seconds of training, and the callback that has saved it into a folder."""
    steps, every = CASES[case]
    model = make_model(case)
    callback = None if folder is None else ResumeCallback(folder, every=every)
    began = time.perf_counter()
    model.learn(steps, callback)
    seconds = time.perf_counter() - began
    model.env.close()
    return seconds, callback


def measure(case: str, repeats: int) -> dict[str, Any]:
    """Return the row of a case."""
    ratios, shares, seconds, firsts = [], [], [], []
    size, n_written = 0.0, 0
    for n in range(repeats):
        with tempfile.TemporaryDirectory() as name:
            runs = {folder: time_training(case, folder) for folder in (None, Path(name))[:: 1 if n % 2 else -1]}
            size = sum(path.stat().st_size for path in Path(name).rglob("*") if path.is_file()) / 1e6
        without, (with_it, callback) = runs[None][0], runs[Path(name)]
        assert callback is not None
        first, *others = callback.write_seconds
        firsts.append(first)
        seconds.append(statistics.median(others))
        n_written = len(callback.write_seconds)
        shares.append((sum(others) + callback.copy_seconds) / with_it)
        ratios.append(with_it / without)
    return {
        "case": case,
        "steps": CASES[case][0],
        "every": CASES[case][1],
        "checkpoints": n_written,
        "first_seconds": round(statistics.median(firsts), 4),
        "seconds": round(statistics.median(seconds), 4),
        "share": round(statistics.median(shares), 4),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "megabytes": round(size, 1),
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions("torch", "stable_baselines3", "gymnasium"),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line says."""
    parser = make_parser(__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), help="default: all")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the CSV file (default: %(default)s)")
    args = parser.parse_args(arguments)
    th.set_num_threads(1)
    rows = [measure(case, args.repeats) for case in args.cases]
    merge_csv(args.output / "resume_cost.csv", rows, COLUMNS, ("case",))
    print(format_table(rows, COLUMNS[:-1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
