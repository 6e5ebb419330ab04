"""The average-reward objective beside the discounted one: TRPO with the same settings and the same number of steps.

    python benchmarks/average_reward.py run                       # seeds 0 to 4: results/average_reward.csv
    python benchmarks/average_reward.py run --envs AccessControl-v0 --methods average
    python benchmarks/average_reward.py table

Protocol
--------
- ``average``: ``objective="average"``, observations normalized, rewards as they are, ``normalize_value_targets=True``.
  ``discounted``: gamma 0.99, observations and rewards normalized. All other settings of an env are the same, those in
  ``average_reward.yml``, which were chosen with a discount.
- Envs keep their time limit of 1000 steps in training. Terminal states cost nothing.
- ``average_reward``: of the final policy, most probable actions, in 10 envs of 10,000 steps without a time limit; where
  an env terminates, it is reset, and nothing is subtracted. ``episode_return``: mean return of 50 episodes with the
  time limit. The optimum of ``AccessControl-v0`` is from dynamic programming.
"""

import contextlib
import io
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench_io import Row, cpu_count, date_and_versions, format_table, limit_threads, make_parser, merge_csv, read_csv
from demonstrations import in_processes

RESULTS: Final = Path(__file__).resolve().parent / "results" / "average_reward.csv"
CONFIG: Final = Path(__file__).with_suffix(".yml")
PACKAGES: Final = ("sb3_pg", "stable_baselines3", "rl_zoo3", "gymnasium", "mujoco", "torch", "numpy")
KEY: Final = ("env", "method", "seed", "steps")
COLUMNS: Final = (*KEY, "average_reward", "n_terminated", "episode_return", "optimum", "overrides", "date", "versions")
FIGURES: Final = ("env", "method", "steps", "seeds", "average_reward", "std", "worst", "episode_return", "optimum")
STEPS: Final = {"HalfCheetah-v5": 1_000_000, "Ant-v5": 1_000_000, "Swimmer-v5": 1_000_000, "AccessControl-v0": 200_000}
OVERRIDES: Final[dict[str, dict[str, Any]]] = {
    "average": {
        "objective": "average",
        "normalize": {"norm_obs": True, "norm_reward": False},
        "normalize_value_targets": True,
    },
    "discounted": {"gamma": 0.99},
}
HORIZON: Final = 10_000
N_ENVS: Final = 10
N_EPISODES: Final = 50


@dataclass(frozen=True)
class Run:
    """One training.

    :param overrides: further settings, for tuning
    """

    env: str
    method: str
    seed: int
    steps: int
    overrides: tuple[tuple[str, Any], ...] = ()


def hyperparams(run: Run) -> dict[str, Any]:
    """Settings of a run beside those in ``average_reward.yml``."""
    own = dict(OVERRIDES[run.method])
    if run.env == "AccessControl-v0" and run.method == "average":
        del own["normalize"]
    return own | dict(run.overrides)


def train(run: Run) -> Row:
    """Train, and score the final policy."""
    import gymnasium as gym  # noqa: PLC0415 (after the limits)
    import learning_run  # noqa: PLC0415
    import torch  # noqa: PLC0415
    from stable_baselines3.common.env_util import make_vec_env  # noqa: PLC0415
    from stable_baselines3.common.utils import set_random_seed  # noqa: PLC0415
    from stable_baselines3.common.vec_env import VecNormalize, sync_envs_normalization  # noqa: PLC0415

    from sb3_pg.callbacks import average_reward_of  # noqa: PLC0415
    from sb3_pg.envs import AccessControl  # noqa: PLC0415

    torch.set_num_threads(1)
    is_queue = run.env == "AccessControl-v0"
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        set_random_seed(run.seed)
        chosen = hyperparams(run)
        manager = learning_run.make_manager("trpo", run.env, run.seed, run.steps, chosen, str(CONFIG), folder)
        experiment = manager.setup_experiment()
        assert experiment is not None
        model: Any = experiment[0]
        model.learn(run.steps, log_interval=None)
        envs: Any = make_vec_env(
            lambda: gym.make(run.env, max_episode_steps=HORIZON), N_ENVS, seed=learning_run.FINAL_SEED + 1000 * run.seed
        )
        training_env = model.get_env()
        if model.get_vec_normalize_env() is not None:
            envs = VecNormalize(envs, training=False, norm_reward=False)
            sync_envs_normalization(training_env, envs)
        found = average_reward_of(model, envs, HORIZON)
        episodes = learning_run.evaluation_env(manager, N_EPISODES, learning_run.FINAL_SEED + 1000 * run.seed)
        episode_return = str(round(learning_run.evaluate(model, episodes, N_EPISODES, True)[0], 2))
    return {
        "env": run.env,
        "method": run.method,
        "seed": run.seed,
        "steps": run.steps,
        "average_reward": round(float(found.rewards.mean()), 4),
        "n_terminated": found.n_terminated,
        "episode_return": episode_return,
        "optimum": round(AccessControl().optimum()[0], 4) if is_queue else "",
        "overrides": " ".join(f"{name}={value}" for name, value in run.overrides),
        **date_and_versions(PACKAGES),
    }


def figures(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One line for each env and method: mean, standard deviation and worst over seeds."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((str(row["env"]), str(row["method"]), str(row["steps"]), str(row["overrides"])), []).append(
            row
        )
    table = []
    for (env, method, steps, overrides), group in groups.items():
        scores = [float(row["average_reward"]) for row in group]
        returns = [float(row["episode_return"]) for row in group if row["episode_return"] != ""]
        table.append(
            {
                "env": env,
                "method": f"{method} {overrides}".strip(),
                "steps": steps,
                "seeds": len(group),
                "average_reward": round(statistics.fmean(scores), 3),
                "std": round(statistics.pstdev(scores), 3),
                "worst": round(min(scores), 3),
                "episode_return": round(statistics.fmean(returns), 1) if returns else "",
                "optimum": group[0]["optimum"],
            }
        )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is not done yet, save each run, print."""
    parser = make_parser(__doc__)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--envs", nargs="+", choices=list(STEPS), default=list(STEPS), help="default: all")
    parser.add_argument("--methods", nargs="+", choices=list(OVERRIDES), default=list(OVERRIDES), help="default: both")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)), help="default: 0 to 4")
    parser.add_argument("--steps", type=int, help="env steps; default: 200,000 of the queue, 1 million of the others")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="other settings, for tuning")
    parser.add_argument("--jobs", type=int, default=cpu_count(), help="processes, one thread each; default: all CPUs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file; finished runs in it are kept")
    options = parser.parse_args(arguments)
    if options.jobs < 1 or min(options.seeds) < 0 or (options.steps is not None and options.steps < 1):
        parser.error("--jobs and --steps are 1 or more, --seeds 0 or more")
    limit_threads()
    if options.what == "run":
        overrides = tuple((name, _number(value)) for name, value in (pair.split("=", 1) for pair in options.set))
        runs = [
            Run(env, method, seed, options.steps or STEPS[env], overrides)
            for seed in options.seeds
            for env in options.envs
            for method in options.methods
        ]
        done = {tuple(row[name] for name in KEY) for row in read_csv(options.output)}
        todo = [run for run in runs if (run.env, run.method, str(run.seed), str(run.steps)) not in done]
        for row in in_processes(options.jobs, train, todo):
            merge_csv(options.output, [row], COLUMNS, KEY)
            print(format_table(figures(read_csv(options.output)), FIGURES), file=sys.stderr, flush=True)
    print(format_table(figures(read_csv(options.output)), FIGURES))
    return 0


def _number(text: str) -> Any:
    """Return a setting of the command line, as a number if it is one."""
    try:
        return float(text) if any(mark in text for mark in ".e") else int(text)
    except ValueError:
        return text


if __name__ == "__main__":
    sys.exit(main())
