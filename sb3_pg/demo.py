"""``sb3-pg demo``: solve an environment, draw a learning curve and save the model, in under a minute."""

import argparse
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from rich.console import Console
from rich.table import Table
from rl_zoo3.utils import create_test_env, get_latest_run_id, get_saved_hyperparams
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_pg.reporting.curves import group, read_evaluations
from sb3_pg.reporting.plots import draw
from sb3_pg.zoo import ALGORITHMS
from sb3_pg.zoo.experiment import CHECKPOINTS
from sb3_pg.zoo.scripts import saved_options, train, unfinished_run

ALGO: Final = "reinforce"
ENV: Final = "CartPole-v1"
SOLVED_AT: Final = 475.0
"""Least mean return that counts as solved: the environment's ``reward_threshold``."""
N_EPISODES: Final = 20


def main(arguments: Sequence[str]) -> int:
    """Train on CartPole-v1 with ``sb3-pg train``, evaluate, plot, save, and print the results.

    :param arguments: the command line, without the program's name
    :return: exit code: 1 if the evaluation stays below :data:`SOLVED_AT`
    :raises SystemExit: the arguments cannot be parsed, or are ``--help``
    """
    parser = argparse.ArgumentParser(prog="sb3-pg demo", description=f"Train {ALGO} on {ENV} and show the results.")
    parser.add_argument("-o", "--output", type=Path, default=Path("logs/demo"), help="folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training (default: %(default)s)")
    parser.add_argument("-n", "--n-timesteps", type=int, default=-1, help="env steps (default: as in the config file)")
    args = parser.parse_args(arguments)

    start = time.perf_counter()
    interrupted = _interrupted_run(args)
    options = {
        "--algo": ALGO,
        "--env": ENV,
        "--seed": args.seed,
        "--log-folder": args.output,
        "--n-timesteps": args.n_timesteps,
        "--num-threads": 1,
        "--verbose": 0,
        "--eval-freq": 5000,
        "--eval-episodes": N_EPISODES,
        "--n-eval-envs": 5,
        "--checkpoint-every": 10_000,
    }
    if interrupted is not None:
        options = {name: options[name] for name in ("--algo", "--env", "--log-folder")}
    command = ["--resume"] if interrupted else ["--progress"]
    train([*command, *(str(word) for option in options.items() for word in option)])
    seconds = time.perf_counter() - start

    run = interrupted or _latest_run(args.output)
    if (run / CHECKPOINTS).exists():
        print("sb3-pg demo: interrupted. Start it again to go on.", file=sys.stderr)
        return 130
    model = args.output / f"{ENV}.zip"
    curve = args.output / "learning_curve.png"
    shutil.copyfile(run / f"{ENV}.zip", model)
    draw(group([read_evaluations(run)])).savefig(curve)
    n_steps, mean, std = _evaluate(model, run / ENV, args.seed)

    table = Table("", "", title=f"{ALGO} on {ENV}", show_header=False)
    table.add_row("env steps", f"{n_steps:,}")
    if interrupted is None:
        table.add_row("training", f"{seconds:.1f} s")
        table.add_row("speed", f"{n_steps / seconds:,.0f} env steps/s")
    else:
        table.add_row("training", f"{seconds:.1f} s since it was resumed")
    table.add_row("evaluation", f"{mean:.1f} ± {std:.1f} reward per episode ({N_EPISODES} episodes, deterministic)")
    table.add_row("model", str(model))
    table.add_row("learning curve", str(curve))
    table.add_row("log folder", str(run))
    Console().print(table)
    _print_next_steps(args.output)
    if mean < SOLVED_AT:
        print(f"sb3-pg demo: not solved: {mean:.1f} is below {SOLVED_AT}", file=sys.stderr)
        return 1
    return 0


def _print_next_steps(folder: Path) -> None:
    """Print commands to try next. They work in the folder in which the demo was run."""
    sb3_pg, logs = this_program(), shlex.quote(str(folder))
    print("Next, show its scores (and a window, without --no-render), or train another algorithm to compare it with:")
    print(f"  {sb3_pg} enjoy --algo {ALGO} --env {ENV} -f {logs} --no-render")
    print(f"  {sb3_pg} train --algo trpo --env {ENV} -f {logs} -P")


def this_program() -> str:
    """Return the shell command that started this process, as the user would type it."""
    script, python = Path(sys.argv[0]), Path(sys.executable)
    if script.stem == "sb3-pg":
        return "sb3-pg" if _is_found(script) else shlex.quote(str(script))
    return f"{'python' if _is_found(python.with_name('python')) else shlex.quote(str(python))} -m sb3_pg"


def _is_found(program: Path) -> bool:
    """Whether the shell finds this program by its name alone."""
    found = shutil.which(program.name)
    return found is not None and Path(found).parent.resolve() == program.parent.resolve()


def _interrupted_run(args: argparse.Namespace) -> Path | None:
    """Return the folder of a demo with the same options that was interrupted, None if there is none."""
    run = unfinished_run(args.output, ALGO, ENV)
    if run is None:
        return None
    saved = saved_options(run, ENV)
    return run if (saved["seed"], saved["n_timesteps"]) == (args.seed, args.n_timesteps) else None


def _latest_run(folder: Path) -> Path:
    runs = folder / ALGO
    return runs / f"{ENV}_{get_latest_run_id(str(runs), ENV)}"


def _evaluate(model_path: Path, run_config: Path, seed: int) -> tuple[int, float, float]:
    """Return the model's number of training steps, and mean and standard deviation of its evaluation returns."""
    hyperparams, stats_path = get_saved_hyperparams(str(run_config))
    env = create_test_env(ENV, stats_path=stats_path, seed=seed + 1, should_render=False, hyperparams=hyperparams)
    model = ALGORITHMS[ALGO].load(model_path, device="cpu")
    returns, _ = evaluate_policy(model, env, N_EPISODES, deterministic=True, return_episode_rewards=True)
    env.close()
    return model.num_timesteps, float(np.mean(returns)), float(np.std(returns))
