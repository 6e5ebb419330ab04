"""AsyncActorCritic against the same learner in one process, and what lag costs; env steps per second, and returns.

    python benchmarks/asynchronous.py rate
    python benchmarks/asynchronous.py lag --lags 1 5 20 50 --seeds 5

Protocol
--------
- ``rate``: asynchronous, one process, asynchronous, ...: what the machine does meanwhile hits both. A rate is the
  median over the repetitions; ``ratio`` is the median of the pairwise ratios, with least and greatest beside.
  ``update`` is the share of the time that the one process spends in updates. ``epochs`` are the updates from each
  fragment, chosen so that collecting and updates take about as long where ``balanced`` is in the name.
- 16 envs, 64 steps of each env per fragment, one torch thread in every process. Both sides make an update from as many
  steps: the one process has the envs of one actor. ``one-env`` is what RLlib's IMPALA has by default: one env per
  actor, and 500 steps for an update.
- ``lag``: actors in this process, so that a fragment's lag is the number of actors: 1, 5, 20 or 50 actors of 4 envs
  each, an update from 64 steps of the 4 envs whatever the lag. Return of the final policy on CartPole-v1 after
  ``--steps`` env steps, with V-trace and without. The settings are those of ``zoo_configs/async_actor_critic.yml``.
- RLlib's IMPALA is measured by its own script in an environment of its own, on the same machine, before and after
  ``rate``: see ``asynchronous_rllib.py``.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from bench_io import cpu_count, date_and_versions, format_table, make_parser, merge_csv, read_csv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv

from sb3_pg import AsyncActorCritic
from sb3_pg.envs import make_vec_env

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("sb3_pg", "stable_baselines3", "gymnasium", "mujoco", "torch", "numpy")
N_ENVS, N_STEPS = 16, 64


@dataclass(frozen=True)
class Case:
    """What is timed.

    :param env: id of the env
    :param epochs: updates from each fragment
    :param envs_per_actor: envs of each actor; None: ``N_ENVS`` are shared out
    :param n_steps: steps of each env per fragment; None: ``N_STEPS``
    """

    env: str
    epochs: int = 1
    envs_per_actor: int | None = None
    n_steps: int | None = None


CASES: Final = {
    "cartpole": Case("CartPole-v1"),
    "hopper": Case("Hopper-v5"),
    "cartpole-balanced": Case("CartPole-v1", epochs=4),
    "hopper-balanced": Case("Hopper-v5", epochs=18),
    "cartpole-one-env": Case("CartPole-v1", envs_per_actor=1, n_steps=500),
    "hopper-one-env": Case("Hopper-v5", envs_per_actor=1, n_steps=500),
}
RATE_FIGURES = ("case", "n_actors", "async_rate", "one_rate", "ratio", "ratio_min", "ratio_max", "update", "lag")
RATE_COLUMNS = (*RATE_FIGURES, "epochs", "n_envs", "n_steps", "steps", "repeats", "cpu_count", "date", "versions")
LAG_ENVS = 4  # of each actor
LAG_SETTINGS: Final = {
    "learning_rate": lambda left: 0.005 * left,
    "critic_learning_rate": 0.01,
    "n_critic_updates": 4,
    "policy_kwargs": {"net_arch": {"pi": [64], "vf": [64]}},
}
LAG_FIGURES = ("lag", "correction", "seed", "score", "measured_lag")
LAG_COLUMNS = (*LAG_FIGURES, "n_steps", "steps", "date", "versions")


class Timed(AsyncActorCritic):
    """Adds up the seconds that updates take."""

    seconds_of_updates = 0.0

    def train(self) -> None:
        """As in the base class."""
        began = time.perf_counter()
        super().train()
        self.seconds_of_updates += time.perf_counter() - began


def model_on(env: VecEnv, seed: int, **arguments: Any) -> Timed:
    """The algorithm, with settings that solve CartPole-v1."""
    given = {
        "n_steps": N_STEPS,
        "gamma": 0.98,
        "gae_lambda": 0.98,
        "learning_rate": 3e-3,
        "use_rms_prop": False,
        "normalize_advantage": True,
    }
    return Timed("MlpPolicy", env, seed=seed, device="cpu", **{**given, **arguments})


def rate_of(env: VecEnv, seed: int, epochs: int, n_steps: int, steps: int) -> tuple[float, float, float]:
    """Env steps per second of ``learn()`` after a warm-up, the updates' share of the time, and the mean policy lag."""
    model = model_on(env, seed, n_epochs=epochs, n_steps=n_steps)
    model.learn(4 * n_steps * env.num_envs, log_interval=None)
    model.seconds_of_updates = 0.0
    began = time.perf_counter()
    model.learn(steps, log_interval=None)
    seconds = time.perf_counter() - began
    env.close()
    lag = model.logger.name_to_value.get("rollout/policy_lag_mean", 0.0)
    return model.num_timesteps / seconds, model.seconds_of_updates / seconds, lag


def measure_rate(case: str, n_actors: int, repeats: int, steps: int) -> dict[str, Any]:
    """One row: ``repeats`` times both sides."""
    timed = CASES[case]
    epochs, n_steps = timed.epochs, timed.n_steps or N_STEPS
    share = timed.envs_per_actor or N_ENVS // n_actors
    mine, one, updates, lags = [], [], [], []
    for seed in range(repeats):
        env = make_vec_env(timed.env, share * n_actors, "actors", seed, n_actors=n_actors)
        rate, _, lag = rate_of(env, seed, epochs, n_steps, steps)
        mine.append(rate)
        lags.append(lag)
        rate, update, _ = rate_of(make_vec_env(timed.env, share, "dummy", seed), seed, epochs, n_steps, steps)
        one.append(rate)
        updates.append(update)
    ratios = [ours / theirs for ours, theirs in zip(mine, one, strict=True)]
    return {
        "case": case,
        "n_actors": n_actors,
        "async_rate": round(statistics.median(mine)),
        "one_rate": round(statistics.median(one)),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
        "update": round(statistics.median(updates), 2),
        "lag": round(statistics.median(lags), 1),
        "epochs": epochs,
        "n_envs": share * n_actors,
        "n_steps": n_steps,
    }


def measure_lag(lag: int, correction: str, seed: int, steps: int) -> dict[str, Any]:
    """One row: the score of a policy whose actors lag by so many updates."""
    env = make_vec_env(
        "CartPole-v1", LAG_ENVS * lag, "actors", seed, n_actors=lag, backend_kwargs={"transport": "serial"}
    )
    model = model_on(env, seed, deterministic=True, correction=correction, **LAG_SETTINGS)
    model.learn(steps, log_interval=None)
    score, _ = evaluate_policy(model, make_vec_env("CartPole-v1", 4, "dummy", 1000 + seed), 20, warn=False)
    env.close()
    logged = model.logger.name_to_value
    return {
        "lag": lag,
        "correction": correction,
        "seed": seed,
        "score": round(float(np.mean(score)), 1),
        "measured_lag": round(logged["rollout/policy_lag_mean"], 1),
        "n_steps": N_STEPS,
    }


def draw(rows: Sequence[dict[str, str]]) -> Any:
    """Return against lag: a point for each seed, a line through the means."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    lags = sorted({int(row["lag"]) for row in rows})
    for shift, (correction, color) in zip((-0.03, 0.03), {"vtrace": "#117733", "none": "#CC3366"}.items(), strict=True):
        scores = [
            [float(row["score"]) for row in rows if (int(row["lag"]), row["correction"]) == (lag, correction)]
            for lag in lags
        ]
        panel.plot(range(len(lags)), [np.mean(of_lag) for of_lag in scores], "-", color=color, label=correction)
        for place, of_lag in enumerate(scores):
            panel.plot([place + shift] * len(of_lag), of_lag, "o", color=color, alpha=0.5, markersize=4)
    panel.set_xticks(range(len(lags)), [str(lag) for lag in lags])
    panel.set(
        xlabel="Lag of the actors' weights [updates]", ylabel="Return of the final policy, CartPole-v1", ylim=(0, None)
    )
    panel.grid(alpha=0.3)
    panel.legend(title="correction")
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, save each row, print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("what", choices=["rate", "lag"])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="of rate; default: all")
    parser.add_argument("--n-actors", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lags", nargs="+", type=int, default=[1, 5, 20, 50])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100_000, help="env steps of each run")
    parser.add_argument("--output", type=Path, help="CSV file; other rows stay in it")
    options = parser.parse_args(arguments)
    if min(options.repeats, options.steps, options.seeds, *options.lags) < 1 or N_ENVS % options.n_actors:
        parser.error(f"all numbers are 1 or more, and --n-actors divides {N_ENVS}")
    torch.set_num_threads(1)
    stamps: dict[str, Any] = {"steps": options.steps, **date_and_versions(PACKAGES)}
    rows = []
    if options.what == "rate":
        stamps |= {"repeats": options.repeats, "cpu_count": cpu_count()}
        for case in options.cases:
            print(f"{case} ...", file=sys.stderr, flush=True)
            rows.append(measure_rate(case, options.n_actors, options.repeats, options.steps))
            # saved case by case: an interrupt costs the current one only
            path = options.output or RESULTS / "asynchronous.csv"
            merge_csv(path, [rows[-1] | stamps], RATE_COLUMNS, ("case", "n_actors"))
        print(format_table(rows, RATE_FIGURES))
        return 0
    for lag in options.lags:
        for correction in ("vtrace", "none"):
            for seed in range(options.seeds):
                rows.append(measure_lag(lag, correction, seed, options.steps))
                path = options.output or RESULTS / "asynchronous_lag.csv"
                merge_csv(path, [rows[-1] | stamps], LAG_COLUMNS, ("lag", "correction", "seed"))
    draw(read_csv(path)).savefig(path.with_suffix(".png"))
    print(format_table(rows, LAG_FIGURES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
