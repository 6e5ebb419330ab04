"""Does replay pay? Env steps until a threshold, ``OffPolicyPG`` with replayed trajectories against fresh ones alone.

    python benchmarks/replay.py                                   # both envs, seeds 0 to 4: table, CSV, figure
    python benchmarks/replay.py --tune --output /tmp/tune.csv     # the learning rates of each arm, seeds 100 to 104

Protocol
--------
- All arms take the settings of ``zoo_configs/off_policy_pg.yml`` with those of ``TASKS`` on top, and equally many
  gradient steps per episode collected (``gradient_steps`` has how many there were until the end). "replay" keeps the
  episodes of several updates, "fresh" those of one. "large" is fresh as well, and collects as many episodes per update
  as replay keeps: batches of the same size, with fewer and longer updates. The learning rate, which falls linearly to 0
  over the budget, is each arm's own best of ``RATES``, by ``--tune``: least mean of the steps (a run that does not
  arrive counts with the whole budget).
- Every ``every`` env steps (at the first step at or past them) the deterministic policy plays 24 episodes. Two means in
  a row at or above the threshold end the run; ``steps`` is that of the first of the two.
- A run that is not there at the end of the budget counts as infinitely many steps (it is in the median, not dropped).
"""

import contextlib
import io
import itertools
import math
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_io import date_and_versions, format_table, limit_threads, make_parser, merge_csv, read_csv

RESULTS = Path(__file__).resolve().parent / "results"
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
EPISODES = 24
PACKAGES = ("sb3_pg", "stable_baselines3", "rl_zoo3", "gymnasium", "torch", "numpy")
KEY = ("env", "arm", "learning_rate", "seed")
COLUMNS = (*KEY, "steps", "gradient_steps", "evaluations", "budget", "date", "versions")
FIGURES = ("env", "arm", "learning_rate", "seeds", "solved", "median_steps", "least", "greatest", "times_fewer")


@dataclass(frozen=True)
class Task:
    """An env, when it counts as solved, and how long a run may take."""

    threshold: float
    budget: int
    every: int  # env steps between evaluations
    settings: dict[str, Any]  # on top of zoo_configs/off_policy_pg.yml
    rates: dict[str, float]  # of each arm, as --tune found them


TASKS = {
    "CartPole-v1": Task(
        475.0,
        40_000,
        500,
        {"n_envs": 4, "train_freq": [4, "episode"], "gradient_steps": 4, "buffer_trajectories": 32},
        {"replay": 3e-3, "fresh": 1e-3, "large": 3e-3},
    ),
    "LunarLander-v3": Task(
        200.0,
        400_000,
        20_000,
        # one env: no steps are spent on waiting for other episodes, which here may be ten times as long
        {"n_envs": 1, "train_freq": [2, "episode"], "gradient_steps": 2, "buffer_trajectories": 16}
        | {"gamma": 0.98, "ent_coef": 0.05, "critic_learning_rate": 2e-3, "critic_batch_size": 512},
        {"replay": 1e-3, "fresh": 1e-3},
    ),
}
ARMS = ("replay", "fresh", "large")
COLORS = {"replay": "#117733", "fresh": "#CC6677", "large": "#332288"}


def arrival(points: Sequence[tuple[int, float]], threshold: float) -> float:
    """Steps at the first of two evaluations in a row that are good enough; infinite if there are none."""
    for (steps, first), (_, second) in itertools.pairwise(points):
        if min(first, second) >= threshold:
            return steps
    return math.inf


def changes(arm: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What an arm takes in place of the settings."""
    n_episodes, kept = settings["train_freq"][0], settings["buffer_trajectories"]
    if arm == "fresh":
        return {"buffer_trajectories": n_episodes}
    if arm == "large":
        return {"train_freq": [kept, "episode"], "gradient_steps": settings["gradient_steps"] * kept // n_episodes}
    return {}


def run(job: tuple[str, str, float, int]) -> dict[str, Any]:
    """One run, up to its arrival or the end of the budget."""
    limit_threads()
    from learning_run import (  # noqa: PLC0415 (after the limits)
        EVALUATION_SEED,
        Evaluations,
        evaluation_env,
        make_manager,
        resolve_hyperparams,
    )
    from stable_baselines3.common.utils import set_random_seed  # noqa: PLC0415

    env, arm, rate, seed = job
    task = TASKS[env]

    class UntilArrival(Evaluations):
        def _on_step(self) -> bool:
            latest = [point[:2] for point in self.points[-2:]]
            return super()._on_step() and arrival(latest, task.threshold) == math.inf

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        set_random_seed(seed)
        settings = resolve_hyperparams("off_policy_pg", env, task.settings | {"learning_rate": f"lin_{rate}"}, None)
        manager = make_manager("off_policy_pg", env, seed, task.budget, settings | changes(arm, settings), None, folder)
        experiment = manager.setup_experiment()
        assert experiment is not None
        evaluated_on = evaluation_env(manager, EPISODES, EVALUATION_SEED + 1000 * seed)
        n_evaluations = task.budget // task.every
        callback = UntilArrival(evaluated_on, task.budget, n_evaluations, EPISODES, True, lambda _: None)
        model: Any = experiment[0]
        model.learn(task.budget, callback=[callback, *manager.callbacks], log_interval=None)
        evaluated_on.close()
    points = [point[:2] for point in callback.points]
    return {
        "env": env,
        "arm": arm,
        "learning_rate": rate,
        "seed": seed,
        "steps": arrival(points, task.threshold),
        "gradient_steps": experiment[0]._n_updates,
        "evaluations": " ".join(f"{steps}:{mean:.1f}" for steps, mean in points),
        "budget": task.budget,
    }


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per env, arm and learning rate; ``times_fewer`` compares medians with the fresh arm's, same env."""
    groups: dict[tuple[str, str, float], list[float]] = {}
    for row in rows:
        key = (row["env"], row["arm"], float(row["learning_rate"]))
        groups.setdefault(key, []).append(float(row["steps"]))
    fresh = {env: statistics.median(steps) for (env, arm, _), steps in groups.items() if arm == "fresh"}
    return [
        {
            "env": env,
            "arm": arm,
            "learning_rate": rate,
            "seeds": len(steps),
            "solved": sum(map(math.isfinite, steps)),
            "median_steps": statistics.median(steps),
            "least": min(steps),
            "greatest": max(steps),
            "times_fewer": round(fresh.get(env, math.nan) / statistics.median(steps), 2),
        }
        for (env, arm, rate), steps in sorted(groups.items())
    ]


def draw(rows: Sequence[dict[str, Any]]) -> Any:
    """A dot per run, a cross where it did not arrive, and the median of each arm; one panel per env."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import EngFormatter  # noqa: PLC0415

    lines = summarize(rows)
    envs = [env for env in TASKS if any(line["env"] == env for line in lines)]
    figure = Figure(figsize=(5 * len(envs), 2.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for panel, env in zip(figure.subplots(1, len(envs), squeeze=False)[0], envs, strict=True):
        budget = TASKS[env].budget
        for line in (line for line in lines if line["env"] == env):
            arm, median = line["arm"], min(line["median_steps"], budget)
            steps = [float(row["steps"]) for row in rows if (row["env"], row["arm"]) == (env, arm)]
            arrived = [x for x in steps if math.isfinite(x)]
            height = ARMS.index(arm)
            panel.plot(arrived, [height] * len(arrived), "o", color=COLORS[arm], alpha=0.7)
            missing = len(steps) - len(arrived)
            panel.plot([budget] * missing, [height] * missing, "x", color=COLORS[arm], clip_on=False)
            panel.vlines(median, height - 0.25, height + 0.25, color=COLORS[arm])
        shown = [arm for arm in ARMS if arm in TASKS[env].rates]
        panel.set(xlim=(0, budget), ylim=(-0.6, len(shown) - 0.4), yticks=range(len(shown)), yticklabels=shown)
        panel.set(title=f"{env}: until {TASKS[env].threshold:g}", xlabel="Env steps (x: not within these)")
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.grid(alpha=0.3, axis="x")
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, save each run, print the table, draw the figure."""
    parser = make_parser(__doc__)
    parser.add_argument("--env", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--tune", action="store_true", help="every learning rate, on seeds from 100 up")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--output", type=Path, default=RESULTS / "replay.csv")
    options = parser.parse_args(arguments)
    seeds = options.seeds or (range(100, 105) if options.tune else range(5))
    if options.tune != (min(seeds) >= 100) or (options.tune and options.output.parent == RESULTS):
        parser.error("seeds from 100 up are for --tune, which writes to another file than the report")
    jobs = [
        (env, arm, rate, seed)
        for env in options.env
        for seed in seeds
        for arm, best in TASKS[env].rates.items()
        for rate in (RATES if options.tune else [best])
    ]
    stamps = date_and_versions(PACKAGES)
    with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=1) as pool:
        for row in pool.imap_unordered(run, jobs):
            print(" ".join(str(row[name]) for name in (*KEY, "steps")), file=sys.stderr, flush=True)
            merge_csv(options.output, [row | stamps], COLUMNS, KEY)
    rows = [dict(row) for row in read_csv(options.output)]
    print(format_table(summarize(rows), FIGURES))
    if not options.tune:
        draw(rows).savefig(options.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
