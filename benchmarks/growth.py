"""How the cost of training grows: number of envs, width of the nets, samples per update.

    python benchmarks/growth.py                       # all: table, results/growth.csv, results/growth.png
    python benchmarks/growth.py --axes samples --repeats 5

Protocol
--------
- One thread; sides take turns within a repetition; a point is the median over the repetitions.
- ``n_envs``: seconds of ``learn()`` per 1,000 env steps on CartPole-v1, 2048 env steps per rollout (8 steps per env at
  256 envs), one gradient step per rollout.
- ``hidden``: seconds of one rollout of 2048 samples of CartPole-v1 (8 envs, DummyVecEnv) and the update that follows,
  two hidden layers of this width.
- ``samples``: the same at width 64, for this many samples (64 envs).
- TRPO's settings are sb3-contrib's defaults on both sides, in their own units (speed.py): up to 15 products, and 10
  passes of the critic in minibatches of 128.
"""

import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_io import date_and_versions, format_table, make_parser, merge_csv, read_csv
from speed_cases import a2c, contrib_trpo, reinforce, trpo
from speed_timing import ROLLOUT, Envs, Factory, time_learning
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

RESULTS = Path(__file__).resolve().parent / "results"
ENV = "CartPole-v1"
AXES: dict[str, tuple[int, ...]] = {
    "n_envs": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "hidden": (64, 128, 256, 512, 1024),
    "samples": (2048, 8192, 32768, 131072, 204800),
}
#: of each axis: side -> model factory and backend
SIDES: dict[str, dict[str, tuple[Factory, str]]] = {
    "n_envs": {
        "Reinforce, native": (reinforce, "vector"),
        "Reinforce": (reinforce, "dummy"),
        "A2C": (a2c, "dummy"),
    },
    "hidden": {
        "Reinforce": (reinforce, "dummy"),
        "A2C": (a2c, "dummy"),
        "TRPO": (trpo, "dummy"),
        "contrib TRPO": (contrib_trpo, "dummy"),
    },
}
SIDES["samples"] = SIDES["hidden"]
UNITS = {"n_envs": "s per 1,000 env steps", "hidden": "s per rollout and update", "samples": "s per rollout and update"}
PACKAGES = ("sb3_pg", "stable_baselines3", "sb3_contrib", "gymnasium", "torch", "numpy")
KEY = ("axis", "x", "side")
COLUMNS = (*KEY, "seconds", "least", "greatest", "repeats", "date", "versions")


def seconds_of(axis: str, x: int, side: str, seed: int) -> float:
    """One measurement."""
    factory, backend = SIDES[axis][side]
    if axis == "n_envs":
        sample = time_learning(factory, Envs(ENV, x, backend), max(8, ROLLOUT // x), 1, seed, 5 * ROLLOUT)
        return 1000 * sample.seconds / sample.steps
    samples, hidden = (ROLLOUT, x) if axis == "hidden" else (x, 64)

    def wide(env: VecEnv, n_steps: int, seed: int) -> BaseAlgorithm:
        return with_width(partial(factory, env, n_steps, seed), hidden)

    n_envs = 8 if axis == "hidden" else 64
    return time_learning(wide, Envs(ENV, n_envs, backend), samples // n_envs, 1, seed, samples).seconds


def with_width(make: Callable[[], BaseAlgorithm], hidden: int) -> BaseAlgorithm:
    """The model, with two hidden layers of this width."""
    model: Any = make()
    model.policy_kwargs = {**model.policy_kwargs, "net_arch": [hidden, hidden]}
    model._setup_model()
    return model  # type: ignore[no-any-return]


def draw(rows: Sequence[dict[str, Any]]) -> Any:
    """One log-log panel per axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    axes = [axis for axis in AXES if any(row["axis"] == axis for row in rows)]
    figure = Figure(figsize=(4.2 * len(axes), 3.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    colors = {"Reinforce": "#117733", "A2C": "#CC6677", "TRPO": "#332288", "contrib TRPO": "#DDCC77"}
    for panel, axis in zip(figure.subplots(1, len(axes), squeeze=False)[0], axes, strict=True):
        for side in SIDES[axis]:
            points = sorted((int(r["x"]), float(r["seconds"])) for r in rows if (r["axis"], r["side"]) == (axis, side))
            color = colors.get(side, "#44AA99")
            panel.loglog(*zip(*points, strict=True), "o-", label=side, color=color, markersize=3)
        panel.set(xlabel=axis, ylabel=UNITS[axis])
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize="small")
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, save each point, print the table, draw the figure."""
    parser = make_parser(__doc__)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "growth.csv")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error("--repeats is 1 or more")
    torch.set_num_threads(1)
    stamps = {
        "repeats": options.repeats,
        **date_and_versions(PACKAGES),
    }
    for axis, x in itertools.chain.from_iterable(itertools.product([axis], AXES[axis]) for axis in options.axes):
        print(f"{axis} = {x}", file=sys.stderr, flush=True)
        found: dict[str, list[float]] = {side: [] for side in SIDES[axis]}
        for seed in range(options.repeats):
            for side, seconds in found.items():
                seconds.append(seconds_of(axis, x, side, seed))
        rows = [
            {"axis": axis, "x": x, "side": side, "seconds": round(statistics.median(seconds), 6)}
            | {"least": round(min(seconds), 6), "greatest": round(max(seconds), 6)}
            | stamps
            for side, seconds in found.items()
        ]
        merge_csv(options.output, rows, COLUMNS, KEY)
    rows = [dict(row) for row in read_csv(options.output)]
    print(format_table(rows, COLUMNS[:6]))
    draw(rows).savefig(options.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
