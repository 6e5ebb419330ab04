"""The figure of ``baselines.py``: gradient variance above, learning curves below, a column for each env."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from sb3_pg.reporting.curves import Curve, Run, aggregate

Row = Mapping[str, str]
# Paul Tol's muted scheme, which the colorblind can tell apart, with black and gray for what has no baseline.
COLORS = ("#000000", "#888888", "#DDAA33", "#999933", "#117733", "#88CCEE", "#332288", "#CC3366")
LABELS = {"eval_mean": "Evaluation return", "train_mean": "Training return"}
MARKERS = ("X", "s", "v", "^", "P", "D", "o", "*")


def learning_curves(rows: Sequence[Row], returns: str) -> list[Curve]:
    """Returns of each estimator, over seeds."""
    return curves((row, float(row["step"]), float(row[returns])) for row in rows)


def log_variances(rows: Sequence[Row]) -> list[Curve]:
    """Gradient variances of each estimator, over seeds, as logarithms to the base 10."""
    return curves(
        (row, float(row["stop"]) * int(row["steps"]), math.log10(float(row["gradient_variance"]))) for row in rows
    )


def curves(points: Iterable[tuple[Row, float, float]]) -> list[Curve]:
    """A curve with its band for each estimator, over seeds.

    :param points: row, x, y
    """
    runs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row, x_value, y_value in points:
        runs.setdefault((row["estimator"], row["seed"]), []).append((x_value, y_value))
    by_estimator: dict[str, list[Run]] = {}
    for (estimator, _), found in runs.items():
        x, y = np.array(sorted(found)).T
        by_estimator.setdefault(estimator, []).append(Run(estimator, "", x, y[None]))
    return [aggregate(members) for members in by_estimator.values()]


def draw_curves(panel: Axes, found: Sequence[Curve], estimators: Sequence[str], log: bool = False) -> None:
    """Means and bands."""
    for curve in sorted(found, key=lambda curve: estimators.index(curve.label)):
        n = estimators.index(curve.label)
        mean, low, high = (10.0**y if log else y for y in (curve.mean, curve.low, curve.high))
        every = max(1, len(curve.x) // 8)
        style: dict[str, Any] = {
            "color": COLORS[n],
            "marker": MARKERS[n],
            "markevery": every,
            "markersize": 5,
            "linewidth": 1.6,
        }
        panel.plot(curve.x, mean, label=curve.label, **style)
        panel.fill_between(curve.x, low, high, color=COLORS[n], alpha=0.12, linewidth=0)
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.set_xlim(left=0)
    panel.grid(alpha=0.3)


def draw(
    learning: Sequence[Row], variance: Sequence[Row], estimators: Sequence[str], returns: str = "eval_mean"
) -> Figure:
    """The figure; save it with ``figure.savefig``.

    :param learning: rows of ``baselines_learning.csv``
    :param variance: rows of ``baselines_variance.csv``
    :param estimators: their order
    :param returns: the column of ``learning`` to draw
    """
    envs = sorted({row["env"] for row in learning})
    figure = Figure(figsize=(5.2 * len(envs) + 1.0, 7.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(envs), squeeze=False)
    for env, (above, below) in zip(envs, panels.T, strict=True):
        of_env = [[row for row in rows if row["env"] == env] for rows in (variance, learning)]
        draw_curves(above, log_variances(of_env[0]), estimators, log=True)
        draw_curves(below, learning_curves(of_env[1], returns), estimators)
        above.set(title=env, yscale="log")
        below.set(xlabel="Training time [env steps]")
    panels[0, 0].set_ylabel("Variance of one episode's gradient\n[(reward / parameter)²]")
    panels[1, 0].set_ylabel(f"{LABELS[returns]} [reward per episode]")
    handles, labels = panels[1, 0].get_legend_handles_labels()
    n_seeds = len({row["seed"] for row in learning})
    title = f"{n_seeds} seeds: mean (geometric for variances, of the same policies and episodes), 95 % bootstrap band"
    figure.legend(handles, labels, loc="outside lower center", ncols=8, title=title, fontsize="small")
    return figure
