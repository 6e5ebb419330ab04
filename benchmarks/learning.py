"""Learning results: algorithm x environment x seed, trained on rl_zoo3's path, one CSV row per run.

    python benchmarks/learning.py --algo reinforce --env CartPole-v1 Acrobot-v1 --steps 100000 --jobs 2
    python benchmarks/learning.py --summary

Protocol
--------
- Seeds 0 to 4 are for reports, and 5 to 9 where five cannot tell whether a target is reached. Every one of them is
  reported; a run that fails is a missing seed in the summary, not a dropped one. Tuning uses seeds from 100 up and
  writes to another file (``--output``); a file never holds both.
- Hyperparameters come from the algorithm's YAML file, with ``--hyperparams`` on top (values as Python literals).
- Evaluations: 5 deterministic episodes at every 5 % of the budget, on an env of its own whose seeds are not the
  training env's. The policy after the last update is evaluated on 50 more (``final_mean``). Returns are
  unnormalized; VecNormalize statistics are those of training, frozen. (On Atari and MiniGrid rl_zoo3 evaluates the
  stochastic policy; so does this.)
- The budget may be exceeded by at most one rollout: ``timesteps`` is what was really used.
- A finished run, that is one (algo, env, seed, steps, configuration), is not done again; a killed one starts over.
- ``wall_seconds`` is the whole run, evaluations included; ``steps_per_second`` and the curve's ``train_seconds`` leave
  the evaluations out. Neither is a benchmark of speed: the runs share the machine (see ``speed.py``).
"""

import argparse
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bench_io import (
    cpu_count,
    date_and_versions,
    format_table,
    limit_threads,
    make_parser,
    merge_csv,
    read_csv,
    row_key,
    versions,
)
from learning_spec import KEY, Run, parse_hyperparams

REPORT = Path(__file__).resolve().parent / "results" / "learning.csv"
REPORT_SEEDS = range(5)
FIRST_TUNING_SEED = 100

COLUMNS = (
    *("algo", "env", "seed", "steps", "timesteps", "n_envs", "n_actors"),
    *("final_mean", "final_std", "final_episodes", "best_eval_mean", "best_eval_step"),
    *("wall_seconds", "steps_per_second", "config_hash", "gymnasium", "versions", "date", "command"),
)
CURVE_COLUMNS = (*KEY, "step", "eval_mean", "eval_std", "train_seconds")
PACKAGES = ("sb3_pg", "stable_baselines3", "sb3_contrib", "rl_zoo3", "torch", "numpy")


@dataclass
class Active:
    """A run in progress."""

    run: Run
    process: multiprocessing.process.BaseProcess
    start: float = field(default_factory=time.monotonic)


def config_hash(hyperparams: dict[str, Any], run: Run) -> str:
    """Ten hexadecimal digits for the hyperparameters in use and the evaluation protocol."""
    used = {name: value for name, value in hyperparams.items() if name != "n_timesteps"}  # a budget, and in the key
    protocol = [run.evaluations, run.evaluation_episodes, run.final_episodes]
    protocol += [run.n_actors] if run.n_actors else []
    return hashlib.sha256(json.dumps([used, protocol], sort_keys=True, default=str).encode()).hexdigest()[:10]


def check_seeds(seeds: Sequence[int], output: Path) -> None:
    """Keep reports and tuning apart.

    :raises ValueError: a negative or huge seed; report and tuning seeds together, in the call or with what the file
        holds; tuning seeds for the report's own file
    """
    # beyond, the seeds of training and evaluation envs would meet (learning_run.EVALUATION_SEED)
    if any(not 0 <= seed < 1_000_000 for seed in seeds):
        raise ValueError(f"seeds are 0 to 999999: {list(seeds)}")
    tuning = {seed >= FIRST_TUNING_SEED for seed in seeds}
    if True in tuning and output.resolve() == REPORT.resolve():
        raise ValueError(f"seeds from {FIRST_TUNING_SEED} up are for tuning: give another --output than {REPORT.name}")
    tuning |= {int(row["seed"]) >= FIRST_TUNING_SEED for row in read_csv(output)}
    if len(tuning) > 1:
        raise ValueError(f"{output.name}: tuning seeds (from {FIRST_TUNING_SEED} up) and report seeds do not mix")


def curves_path(output: Path) -> Path:
    """The file of the evaluations beside the file of the runs."""
    return output.with_name(f"{output.stem}_curves.csv")


def end_with_parent() -> None:
    """A worker whose parent was killed would train on, for nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def work(connection: multiprocessing.connection.Connection, run: Run) -> None:
    """A worker process: one run; its evaluations are sent as they come, then its result. An error ends the process."""
    limit_threads()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers; rl_zoo3 would swallow the interrupt
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an orderly end, which removes the temporary folder
    threading.Thread(target=end_with_parent, daemon=True).start()
    import learning_run  # noqa: PLC0415 (after the limits)

    connection.send(("result", learning_run.train(run, lambda point: connection.send(("point", point)))))


def save(run: Run, result: tuple[dict[str, Any], Sequence[tuple[int, float, float, float]]], output: Path) -> None:
    """Curve first, then the row: the row is what marks a run as finished."""
    measured, points = result
    identity = {name: getattr(run, name) for name in KEY}
    curve = [
        identity | {"step": step, "eval_mean": round(mean, 4), "eval_std": round(std, 4), "train_seconds": round(s, 3)}
        for step, mean, std, s in points
    ]
    merge_csv(curves_path(output), curve, CURVE_COLUMNS, KEY)
    stamps = {
        "n_actors": run.n_actors or "",
        "final_episodes": run.final_episodes,
        "gymnasium": versions("gymnasium").partition("gymnasium=")[2],
        **date_and_versions(PACKAGES),
        "command": run.command,
    }
    merge_csv(output, [identity | measured | stamps], COLUMNS, KEY)


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def run_all(runs: Sequence[Run], jobs: int, output: Path) -> int:
    """Do the runs, ``jobs`` at a time, each in a fresh process; save each as it ends.

    :return: number of runs that failed
    """
    # spawn: a forked child would inherit libraries that have counted their threads already
    context = multiprocessing.get_context("spawn")
    say = partial(print, flush=True)
    pending = deque(runs)
    active: dict[Any, Active] = {}
    failed = 0
    try:
        while pending or active:
            while pending and len(active) < jobs:
                run = pending.popleft()
                connection, sender = context.Pipe(duplex=False)
                process = context.Process(target=work, args=(sender, run))
                process.start()
                sender.close()  # else the end of the process would not be seen as the end of the pipe
                active[connection] = Active(run, process)
            receiver: Any
            for receiver in multiprocessing.connection.wait(list(active)):
                job = active[receiver]
                try:
                    kind, content = receiver.recv()
                except EOFError:  # an exception, which the process has printed; or killed
                    kind, content = "failure", None
                elapsed = time.monotonic() - job.start
                if kind == "point":
                    step, mean, std, _ = content
                    left = elapsed * max(job.run.steps - step, 0) / step
                    progress = f"{step:>9}/{job.run.steps} ({step / job.run.steps:4.0%})"
                    say(f"{job.run}: {progress}  eval {mean:.1f} +- {std:.1f}  ETA {clock(left)}")
                    continue
                del active[receiver]
                receiver.close()
                job.process.join()
                if kind == "result":
                    save(job.run, content, output)
                    measured = content[0]
                    final = f"final {measured['final_mean']:.1f} +- {measured['final_std']:.1f}"
                    say(f"{job.run}: done in {clock(elapsed)}, {final}; {len(pending) + len(active)} runs left")
                else:
                    failed += 1
                    say(f"{job.run}: FAILED, exit code {job.process.exitcode}", file=sys.stderr)
    finally:
        for job in active.values():
            job.process.terminate()
            job.process.join()
    return failed


def interquartile_mean(values: Sequence[float]) -> float:
    """Mean without the lowest and the highest floor(n / 4) values (of five seeds: the middle three)."""
    cut = len(values) // 4
    return statistics.fmean(sorted(values)[cut : len(values) - cut])


def summarize(output: Path) -> str:
    """One line per (algo, env, steps, configuration): the final means over seeds; std is the sample's (n - 1)."""
    groups: dict[tuple[str, str, int, str], dict[int, float]] = {}
    for row in read_csv(output):
        group = groups.setdefault((row["env"], row["algo"], int(row["steps"]), row["config_hash"]), {})
        group[int(row["seed"])] = float(row["final_mean"])
    table = []
    for (env, algo, steps, configuration), finals in sorted(groups.items()):
        values = list(finals.values())
        tuning = min(finals) >= FIRST_TUNING_SEED
        line: dict[str, Any] = {"env": env, "algo": algo, "steps": steps, "config": configuration, "seeds": len(values)}
        figures = {
            "mean": statistics.fmean(values),
            "std": statistics.stdev(values) if len(values) > 1 else 0.0,
            "min": min(values),
            "max": max(values),
            "iqm": interquartile_mean(values),
        }
        missing = [] if tuning else [str(seed) for seed in REPORT_SEEDS if seed not in finals]
        line |= {name: round(value, 2) for name, value in figures.items()} | {"missing_seeds": " ".join(missing)}
        table.append(line)
    columns = ("env", "algo", "steps", "config", "seeds", "mean", "std", "min", "max", "iqm", "missing_seeds")
    return format_table(table, columns)


def plan(options: argparse.Namespace) -> list[Run]:
    """All runs that the options ask for, env by env. Without ``--steps`` the budget is the configuration's."""
    import learning_run  # noqa: PLC0415 (slow, and --summary does without)

    runs = []
    for env in options.env:
        for algo in options.algo:
            hyperparams = learning_run.resolve_hyperparams(
                algo, env, parse_hyperparams(options.hyperparams), options.config
            )
            run = Run(
                algo=algo,
                env=env,
                seed=0,
                steps=options.steps or int(hyperparams["n_timesteps"]),
                overrides=tuple(options.hyperparams),
                config=options.config,
                evaluations=options.evaluations,
                evaluation_episodes=options.evaluation_episodes,
                final_episodes=options.final_episodes,
                n_actors=options.n_actors,
            )
            settings = vars(run) | {"config_hash": config_hash(hyperparams, run)}
            runs += [Run(**settings | {"seed": seed}) for seed in dict.fromkeys(options.seeds)]
    return runs


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = make_parser(__doc__)
    parser.add_argument("--algo", nargs="+", default=[], help="names in rl_zoo3: reinforce, a2c, ...")
    parser.add_argument("--env", nargs="+", default=[], help="environment ids")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(REPORT_SEEDS), help="default: 0 to 4")
    parser.add_argument("--steps", type=int, help="budget in env steps; default: the configuration's n_timesteps")
    parser.add_argument("--jobs", type=int, default=cpu_count(), help="processes, one thread each; default: all CPUs")
    parser.add_argument("--hyperparams", nargs="+", default=[], metavar="NAME:VALUE", help="on top of the YAML file")
    parser.add_argument("--config", help="another YAML file (or module) than the algorithm's own")
    parser.add_argument("--n-actors", type=int, default=0, help="actors that collect; default: 0, DummyVecEnv")
    parser.add_argument("--output", type=Path, default=REPORT, help="CSV file; its curves go to *_curves.csv")
    parser.add_argument("--evaluations", type=int, default=Run.evaluations, help="per run, evenly spaced")
    parser.add_argument("--evaluation-episodes", type=int, default=Run.evaluation_episodes)
    parser.add_argument("--final-episodes", type=int, default=Run.final_episodes)
    parser.add_argument("--force", action="store_true", help="do finished runs again")
    parser.add_argument("--summary", action="store_true", help="print the table of --output and stop")
    options = parser.parse_args(arguments)
    if options.n_actors < 0:
        parser.error(f"--n-actors must be at least 0, got {options.n_actors}")
    if not options.summary and not (options.algo and options.env):
        parser.error("--algo and --env are needed (or --summary)")
    numbers = (options.jobs, options.evaluations, options.evaluation_episodes, options.final_episodes)
    if min(numbers) < 1 or (options.steps is not None and options.steps < 1):
        parser.error("numbers of steps, jobs, evaluations and episodes are 1 or more")
    try:
        parse_hyperparams(options.hyperparams)
        if not options.summary:
            check_seeds(options.seeds, options.output)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is not done yet, then print the summary. 1 if a run failed."""
    options = parse_options(arguments)
    failed = 0
    if not options.summary:
        runs = plan(options)
        finished = set() if options.force else {row_key(row, KEY) for row in read_csv(options.output)}
        todo = [run for run in runs if run.key not in finished]
        print(f"{len(runs)} runs, {len(runs) - len(todo)} finished before", flush=True)
        try:
            failed = run_all(todo, options.jobs, options.output)
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here", file=sys.stderr)
            return 130
    print(summarize(options.output))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
