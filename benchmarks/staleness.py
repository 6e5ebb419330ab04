"""How soon do importance weights wear out? Effective sample size and spread, by form of the ratio, against staleness.

    python benchmarks/staleness.py                 # table, results/staleness.csv, results/staleness.png

Protocol
--------
- CartPole-v1: ``OffPolicyPG`` with the settings of ``zoo_configs/off_policy_pg.yml`` trains up to ``--warmup`` gradient
  steps. Its policy there is the behavior: it collects ``--episodes`` complete episodes (``num_steps`` is their mean
  length). Training goes on, and after every further gradient step the same episodes are weighted with the policy as it
  is then: staleness is the number of those steps.
- Effective sample size: Kish's, as a share of the samples; per episode where an episode has one weight ("trajectory"),
  per step otherwise. Spread: standard deviation of the weights' logarithms.
- The slides call the product "exponential in T": ``spread`` is measured over whole episodes cut to their first T steps
  as well (column ``horizon``; 0 is the whole episode).
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_io import date_and_versions, format_table, limit_threads, make_parser, write_csv

RESULTS = Path(__file__).resolve().parent / "results"
ENV = "CartPole-v1"
STALENESS = (0, 1, 2, 4, 8, 16, 32, 64)
HORIZONS = (0, 10, 20, 50, 100, 200)
PACKAGES = ("sb3_pg", "stable_baselines3", "gymnasium", "torch", "numpy")
COLUMNS = ("ratio", "staleness", "horizon", "seed", "ess", "spread", "largest", "num_steps", "date", "versions")
RATIOS = ("per_step", "prefix", "trajectory")  # per_decision has prefix's weights
COLORS = {"per_step": "#117733", "prefix": "#88CCEE", "trajectory": "#CC3366"}


def measure(seed: int, warmup: int, n_episodes: int) -> Iterator[dict[str, Any]]:
    """The rows of one seed."""
    import yaml  # type: ignore[import-untyped]  # noqa: PLC0415 (after the thread limits)

    from sb3_pg import OffPolicyPG  # noqa: PLC0415
    from sb3_pg.functional import log_importance_ratio  # noqa: PLC0415
    from sb3_pg.policies import evaluation_mode  # noqa: PLC0415
    from sb3_pg.rollout import Trajectory, TrajectoryReplayBuffer, score_batch  # noqa: PLC0415

    torch.set_num_threads(1)
    settings = yaml.safe_load((RESULTS.parent.parent / "zoo_configs" / "off_policy_pg.yml").read_text())[ENV]
    names = ("train_freq", "buffer_trajectories", "ratio", "max_ratio", "normalize_advantage")
    arguments = {name: settings[name] for name in names} | {"train_freq": tuple(settings["train_freq"])}
    model = OffPolicyPG("MlpPolicy", ENV, 1e-3, gradient_steps=1, seed=seed, device="cpu", **arguments)

    def until(n_updates: int) -> None:
        while model._n_updates < n_updates:
            model.learn(1, reset_num_timesteps=False, log_interval=None)

    until(warmup)
    buffer = TrajectoryReplayBuffer(10**6, model.observation_space, model.action_space)
    for trajectory in collect(model, n_episodes):
        buffer.add_trajectories([Trajectory(*trajectory)])
    batch = buffer.batch(buffer.trajectories, bootstrap_truncated=False)
    for staleness in STALENESS:
        until(warmup + staleness)
        with evaluation_mode(model.policy):
            log_prob = score_batch(model.policy, batch, with_values=False)
        assert batch.log_probs is not None
        log_ratio = log_importance_ratio(log_prob, batch.log_probs, batch.mask)
        for horizon in HORIZONS:
            for ratio in RATIOS:
                yield {
                    "ratio": ratio,
                    "staleness": staleness,
                    "horizon": horizon,
                    "seed": seed,
                    **figures(log_ratio, batch.valid, ratio, horizon),
                    "num_steps": float(batch.valid.sum() / len(buffer.trajectories)),
                }


def collect(model: Any, n_episodes: int) -> Iterator[tuple[Any, ...]]:
    """Episodes of the policy as it is, with their log-probs."""
    env = model.get_env()
    for _ in range(n_episodes):
        rows, done, obs = [], False, env.reset()
        while not done:
            with torch.no_grad():
                distribution = model.policy.get_distribution(torch.as_tensor(obs))
                action = distribution.get_actions()
                log_prob = distribution.log_prob(action)
            new_obs, reward, dones, infos = env.step(action.numpy())
            rows.append((obs[0], action[0].numpy(), reward[0], log_prob[0].item()))
            obs, done = new_obs, bool(dones[0])
        truncated = bool(infos[0]["TimeLimit.truncated"])
        yield (*map(np.array, zip(*rows, strict=True)), not truncated, truncated, infos[0]["terminal_observation"])


def figures(log_ratio: torch.Tensor, valid: torch.Tensor, ratio: str, horizon: int) -> dict[str, float]:
    """What one row says of the weights of episodes cut to their first steps (0: not cut)."""
    from sb3_pg.functional import effective_sample_size, log_weights  # noqa: PLC0415

    log_ratio, valid = (x[: horizon or len(x)] for x in (log_ratio, valid))
    ends = valid & ~torch.cat((valid[1:], torch.zeros_like(valid[:1])))
    logs = log_weights(log_ratio, ends, ratio, valid)
    counted = ends if ratio == "trajectory" else valid
    chosen = logs[counted]
    share = effective_sample_size(logs, counted) / counted.sum()
    return {"ess": float(share), "spread": float(chosen.std()), "largest": float(chosen.max().exp())}


def draw(rows: Sequence[dict[str, Any]]) -> Any:
    """Effective sample size against staleness; spread of the product against T."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for ratio in RATIOS:
        whole = [
            [r["ess"] for r in rows if (r["ratio"], r["staleness"], r["horizon"]) == (ratio, k, 0)] for k in STALENESS
        ]
        mean, low, high = (np.array([f(x) for x in whole]) for f in (np.mean, np.min, np.max))
        label = "prefix, per_decision" if ratio == "prefix" else ratio
        left.plot(STALENESS, mean, "o-", color=COLORS[ratio], label=label, markersize=4)
        left.fill_between(STALENESS, low, high, color=COLORS[ratio], alpha=0.15, linewidth=0)
    left.set_xscale("symlog", linthresh=1)
    left.set(xlabel="Staleness [gradient steps]", ylabel="Effective sample size [share of the samples]", ylim=(0, 1.05))
    left.legend()
    for k, shade in {1: 0.35, 4: 0.5, 16: 0.75, 64: 1.0}.items():
        if k not in STALENESS:
            continue
        horizons = HORIZONS[1:]
        spreads = [
            np.mean([r["spread"] for r in rows if (r["ratio"], r["staleness"], r["horizon"]) == ("trajectory", k, t)])
            for t in horizons
        ]
        right.plot(horizons, spreads, "o-", color=COLORS["trajectory"], alpha=shade, label=f"{k}", markersize=4)
    right.set(
        xlabel="T [env steps]", ylabel="Standard deviation of log W, trajectory [nats]", xscale="log", yscale="log"
    )
    right.legend(title="Staleness")
    for panel in (left, right):
        panel.grid(alpha=0.3)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, save, print, draw."""
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--warmup", type=int, default=40, help="gradient steps before the episodes are collected")
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--output", type=Path, default=RESULTS / "staleness.csv")
    options = parser.parse_args(arguments)
    limit_threads()
    stamps = date_and_versions(PACKAGES)
    rows = [row | stamps for seed in options.seeds for row in measure(seed, options.warmup, options.episodes)]
    write_csv(options.output, rows, COLUMNS)
    draw(rows).savefig(options.output.with_suffix(".png"))
    means = [
        {
            "ratio": ratio,
            "staleness": k,
            **{
                name: round(
                    float(
                        np.mean([r[name] for r in rows if (r["ratio"], r["staleness"], r["horizon"]) == (ratio, k, 0)])
                    ),
                    4,
                )
                for name in ("ess", "spread", "largest")
            },
        }
        for ratio in RATIOS
        for k in STALENESS
    ]
    print(format_table(means, ("ratio", "staleness", "ess", "spread", "largest")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
