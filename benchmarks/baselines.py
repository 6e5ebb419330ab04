"""What a baseline buys: variance of the policy gradient, and learning curves, estimator by estimator.

    python benchmarks/baselines.py --jobs 2        # everything that is not done yet, then the figure
    python benchmarks/baselines.py --plot          # the figure alone, from the CSV files

Protocol
--------
- Estimators: total return; reward-to-go; reward-to-go minus a baseline (mean, time, optimal, linear, value); GAE with
  the value baseline's critic. Nothing else differs: same nets, Adam, learning rate, gamma, complete episodes, time
  limits that count as ends; neither gradient clipping nor normalized advantages, which would hide a missing baseline.
- gamma is 1: then all but GAE estimate one and the same gradient, up to the O(1/N) of baselines that are fitted to
  their own batch. Below 1, total returns and rewards-to-go would have different expectations, and sizes.
- Learning: one run per estimator, env and seed (0 to 4), evaluated by 5 deterministic episodes at every 5 %
  (LunarLander: 10 %) of the budget, on an env of its own whose seeds are not the training env's. ``train_mean`` is the
  mean return of the rollout that it is then amid: that of the policy as it acts, which is what all estimators maximize.
- Variance: the run of ``value`` is stopped at several points. There 64 complete episodes are collected with the
  policy as it is, and every estimator is applied to these same episodes: the total variance of one episode's gradient
  is the trace of the covariance over the 64. (A batch of N has 1/N of it.) The critic of value and GAE is the run's
  own; the linear baseline is fitted to an earlier batch, as large as those of training; mean, time and optimal are
  fitted to the 64 they are subtracted from, as they are in training.
- ``gradient_squared_norm`` is the unbiased estimate of the true gradient's: negative where noise drowns it.
- A finished run, that is one (estimator, env, seed, steps, configuration), is not done again; a killed one starts over.
- Seeds from 100 up are for tuning, and go to another ``--output`` folder.
"""

import argparse
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from baselines_spec import ESTIMATORS, LEARNING_KEY, REFERENCE, RUN, Result, Run
from bench_io import date_and_versions, limit_threads, make_parser, merge_csv, read_csv, row_key
from learning import FIRST_TUNING_SEED, REPORT_SEEDS, clock, end_with_parent
from learning_spec import parse_hyperparams

RESULTS = Path(__file__).resolve().parent / "results"

COMMON: dict[str, Any] = {
    "n_envs": 4,
    "n_episodes": 8,
    "gamma": 1.0,
    "max_grad_norm": None,
    "truncation": "terminal",
    "critic_learning_rate": 0.003,
}
#: Where hovering episodes make evaluations longer than training, there are fewer of them.
EVALUATIONS = {"LunarLander-v3": 10}
#: Tuned by hand for value and GAE, on seed 100, at gamma 0.99.
SETTINGS: dict[str, dict[str, Any]] = {
    "CartPole-v1": {"steps": 100_000, "learning_rate": 0.005, "n_critic_updates": 10, "critic_batch_size": 256},
    "LunarLander-v3": {"steps": 100_000, "learning_rate": 0.01, "n_critic_updates": 5, "critic_batch_size": 512},
}

STAMPS = ("versions", "date")
LEARNING_COLUMNS = (*LEARNING_KEY, "step", "eval_mean", "eval_std", "eval_episodes", "train_mean", *STAMPS)
MEASURED = ("gradient_variance", "gradient_squared_norm", "half_batch_cosine")
VARIANCE_COLUMNS = (*RUN, "stop", "step", "estimator", "episodes", "episode_length", *MEASURED, *STAMPS)
PACKAGES = ("sb3_pg", "stable_baselines3", "gymnasium", "torch", "numpy")


def start_worker() -> None:
    """Before numpy and torch are imported: one thread; the parent alone hears of an interrupt."""
    limit_threads()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def work(run: Run) -> tuple[Result, float]:
    """In a worker process: one run, and how many seconds it took."""
    import baselines_run  # noqa: PLC0415 (after the limits)

    start = time.monotonic()
    return baselines_run.train(run), time.monotonic() - start


def files(folder: Path) -> tuple[Path, Path]:
    """The CSV files of learning curves and of variances."""
    return folder / "baselines_learning.csv", folder / "baselines_variance.csv"


def save(run: Run, result: Result, folder: Path) -> None:
    """Variances first, then the curve, which marks a run as finished."""
    learning, variance = files(folder)
    stamps = date_and_versions(PACKAGES)
    if result.variance:
        merge_csv(variance, [run.identity | row | stamps for row in result.variance], VARIANCE_COLUMNS, RUN)
    merge_csv(learning, [run.identity | row | stamps for row in result.learning], LEARNING_COLUMNS, LEARNING_KEY)


def run_all(runs: Sequence[Run], jobs: int, folder: Path) -> int:
    """Do the runs, ``jobs`` processes at a time; save each as it ends.

    :return: number of runs that failed
    """
    failed, start = 0, time.monotonic()
    # spawn: a forked child would inherit libraries that have counted their threads already
    with ProcessPoolExecutor(jobs, get_context("spawn"), start_worker) as executor:
        futures = {executor.submit(work, run): run for run in runs}
        try:
            for n, future in enumerate(as_completed(futures), 1):
                run, error = futures[future], future.exception()
                if error is not None:
                    failed += 1
                    traceback.print_exception(error)
                    print(f"{run}: FAILED", file=sys.stderr, flush=True)
                    continue
                result, seconds = future.result()
                save(run, result, folder)
                final = f"{result.learning[-1]['eval_mean']:.1f}"
                left = clock((time.monotonic() - start) / n * (len(runs) - n))
                print(f"{run}: {final} after {clock(seconds)}; {n}/{len(runs)} runs, ETA {left}", flush=True)
        except KeyboardInterrupt:
            executor.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def plan(options: argparse.Namespace) -> list[Run]:
    """All runs that the options ask for; the slowest envs first, so that the processes end together."""
    runs = []
    for env in sorted(options.env, key=lambda env: -SETTINGS[env]["steps"]):
        settings = COMMON | SETTINGS[env] | parse_hyperparams(options.hyperparams)
        steps = options.steps or settings["steps"]
        del settings["steps"]
        for seed in options.seeds:
            for estimator in options.estimator:
                of_estimator = tuple(sorted((settings | ESTIMATORS[estimator]).items()))
                evaluations = EVALUATIONS.get(env, Run.evaluations)
                run = Run(estimator, env, seed, steps, of_estimator, evaluations=evaluations)
                runs.append(replace(run, stops=run.stops if estimator == REFERENCE else ()))
    return runs


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = make_parser(__doc__)
    parser.add_argument("--estimator", nargs="+", choices=list(ESTIMATORS), default=list(ESTIMATORS))
    parser.add_argument("--env", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(REPORT_SEEDS), help="default: 0 to 4")
    parser.add_argument("--steps", type=int, help="budget in env steps; default: the env's")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each (default: %(default)s)")
    parser.add_argument("--hyperparams", nargs="+", default=[], metavar="NAME:VALUE", help="on top of the settings")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the CSV files and the figure")
    parser.add_argument("--plot", action="store_true", help="draw the figure and stop")
    parser.add_argument("--returns", choices=("eval_mean", "train_mean"), default="eval_mean", help="to be drawn")
    options = parser.parse_args(arguments)
    if options.jobs < 1 or (options.steps is not None and options.steps < 1):
        parser.error("--jobs and --steps are 1 or more")
    # beyond, the seeds of training and evaluation envs would meet (learning_run.EVALUATION_SEED)
    if any(not 0 <= seed < 1_000_000 for seed in options.seeds):
        parser.error("seeds are 0 to 999999")
    if max(options.seeds) >= FIRST_TUNING_SEED and options.output.resolve() == RESULTS.resolve():
        parser.error(f"seeds from {FIRST_TUNING_SEED} up are for tuning: give another --output")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is not done yet, then draw. 1 if a run failed."""
    options = parse_options(arguments)
    failed = 0
    if not options.plot:
        runs = plan(options)
        finished = {row_key(row, LEARNING_KEY) for row in read_csv(files(options.output)[0])}
        todo = [run for run in runs if row_key(run.identity, LEARNING_KEY) not in finished]
        print(f"{len(runs)} runs, {len(runs) - len(todo)} finished before", flush=True)
        try:
            failed = run_all(todo, options.jobs, options.output)
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here", file=sys.stderr)
            return 130
    import baselines_plot  # noqa: PLC0415 (slow, and the workers do without)

    learning, variance = map(read_csv, files(options.output))
    figure = baselines_plot.draw(learning, variance, list(ESTIMATORS), options.returns)
    figure.savefig(options.output / "baselines.png")
    print(options.output / "baselines.png")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
