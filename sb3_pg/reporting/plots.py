"""``sb3-pg plot``: draw learning curves."""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final, Literal, get_args

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from sb3_pg.reporting.curves import (
    Axis,
    Curve,
    LogError,
    Run,
    env_of,
    find_runs,
    group,
    label_of,
    read_evaluations,
    read_training,
)
from sb3_pg.reporting.logged import read_logged

Source = Literal["evaluation", "training"]
#: What a figure shows: returns of episodes, or metrics from the log.
Content = Source | Literal["log"]
FEWEST_EVALUATIONS: Final = 10
"""If a run has fewer evaluations, training episodes are drawn, unless ``--source`` is given."""

_X_LABELS: Final[dict[tuple[Content, Axis], str]] = {
    ("log", "steps"): "Training time [env steps]",
    ("evaluation", "steps"): "Training time [env steps]",
    ("training", "steps"): "Training time [env steps in finished episodes]",
    ("training", "time"): "Training time [s]",
}
_Y_LABELS: Final[dict[Content, str]] = {
    "log": "",
    "evaluation": "Evaluation return [reward per episode]",
    "training": "Training return [reward per episode]",
}


def styles(labels: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return color and line style of each label, all different for up to 30 labels."""
    return {label: (f"C{i % 10}", ("-", "--", ":")[i // 10 % 3]) for i, label in enumerate(labels)}


def draw(
    curves: Sequence[Curve],
    source: Content = "evaluation",
    axis: Axis = "steps",
    title: str | None = None,
    labels: Iterable[str] | None = None,
) -> Figure:
    """Draw curves, one panel for each environment. Save the figure with ``figure.savefig``.

    :param curves: at least one
    :param source: what is drawn, for the axis label
    :param axis: unit of x
    :param title: title of the figure
    :param labels: labels in the order of their colors; the same labels give figures the same colors (default: the
        labels of the curves)
    """
    envs = list(dict.fromkeys(curve.env for curve in curves))
    lines = styles(dict.fromkeys(curve.label for curve in curves) if labels is None else labels)
    n_columns = min(len(envs), 3)
    n_rows = -(-len(envs) // n_columns)
    figure = Figure(figsize=(6.4 * n_columns, 4.4 * n_rows), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(n_rows, n_columns, squeeze=False).flat)
    for env, panel in zip(envs, panels[: len(envs)], strict=True):
        for curve in (curve for curve in curves if curve.env == env):
            (color, line), marker = lines[curve.label], "." if len(curve.x) < 30 else None
            panel.plot(curve.x, curve.mean, label=curve.label, color=color, linestyle=line, marker=marker)
            panel.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.2, linewidth=0)
        panel.set(title=env, xlabel=_X_LABELS[source, axis], ylabel=_Y_LABELS[source])
        panel.set_xlim(left=0)
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.grid(alpha=0.3)
    for panel in panels[len(envs) :]:
        panel.set_visible(False)
    handles = {line.get_label(): line for panel in panels for line in panel.get_lines()}
    shown = [label for label in lines if label in handles]
    figure.legend(
        handles=[handles[label] for label in shown],
        labels=[_legend(label, [curve.n_runs for curve in curves if curve.label == label]) for label in shown],
        loc="outside lower center",  # where it covers no curve
        title="mean and 95 % bootstrap band over runs (of a single run: over its episodes)",
        title_fontsize="small",
        fontsize="small",
        ncols=2 * n_columns,
    )
    if title is not None:
        figure.suptitle(title)
    return figure


def main(arguments: Sequence[str]) -> int:
    """``sb3-pg plot``: draw learning curves, and print the path of the figure.

    :param arguments: the command line, without the program's name
    :return: exit code
    :raises SystemExit: the arguments cannot be parsed, are ``--help``, or there is no run to draw
    """
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        source, runs = _read_metrics(args) if args.metrics else _read(args)
        curves = group(runs)
        _report_short_runs(curves, runs)
        figure = draw(curves, source, args.x_axis, args.title)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.output)
    except ValueError as error:  # also from matplotlib, for an unknown output format
        parser.error(str(error))
    print(args.output)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sb3-pg plot", description="Draw learning curves with 95 % bootstrap bands.")
    parser.add_argument(
        "inputs",
        nargs="*",
        default=["logs"],
        metavar="[LABEL=]FOLDER",
        help="a run's folder, or a folder with several; LABEL replaces the algorithm's name (default: logs)",
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("learning_curve.png"), help="default: %(default)s")
    parser.add_argument("--title", help="title of the figure")
    parser.add_argument("--env", nargs="+", help="draw only these environments")
    parser.add_argument("--label", nargs="+", help="draw only these algorithms or labels")
    parser.add_argument(
        "--source",
        choices=get_args(Source),
        help="episodes that are drawn (default: evaluation, or training if a run has fewer than 10 evaluations)",
    )
    parser.add_argument(
        "--x-axis", choices=get_args(Axis), default="steps", help="env steps or wall-clock seconds (training only)"
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        help="draw what the runs have logged instead of returns, such as joint_kl,explained_variance,entropy",
    )
    parser.add_argument("--window", type=int, default=100, help="training episodes per point (default: %(default)s)")
    return parser


def _read_metrics(args: argparse.Namespace) -> tuple[Content, list[Run]]:
    if args.source or args.x_axis != "steps":
        raise LogError("--metrics draws what was logged over env steps: it takes neither --source nor --x-axis")
    names = [name for text in args.metrics for name in text.split(",") if name]
    return "log", [run for folder, label in _choose(args) for run in read_logged(folder, names, label)]


def _choose(args: argparse.Namespace) -> list[tuple[Path, str]]:
    """Return folder and label of each run that the command line asks for.

    :raises LogError: there are none
    """
    # A run that several inputs contain counts once.
    found = dict.fromkeys(
        (run.resolve(), label) for root, label in map(split_label, args.inputs) for run in find_runs(root)
    )
    labeled = [(folder, label or label_of(folder)) for folder, label in found]
    chosen = [
        (folder, label)
        for folder, label in labeled
        if (not args.env or env_of(folder) in args.env) and (not args.label or label in args.label)
    ]
    if not chosen:
        raise LogError(f"no run in {', '.join(args.inputs)} matches --env and --label")
    return chosen


def _read(args: argparse.Namespace) -> tuple[Content, list[Run]]:
    chosen = _choose(args)
    source: Source = args.source or _default_source(chosen, args.x_axis)
    if (source, args.x_axis) not in _X_LABELS:
        raise LogError("evaluations are logged without wall-clock time: use --source training with --x-axis time")
    runs = []
    for folder, label in chosen:
        try:
            if source == "evaluation":
                runs.append(read_evaluations(folder, label))
            else:
                runs.append(read_training(folder, args.x_axis, args.window, label))
        except LogError as error:
            print(f"left out: {error}", file=sys.stderr)
    if not runs:
        raise LogError(f"no run with {source} episodes")
    return source, runs


def _default_source(chosen: Iterable[tuple[Path, str]], axis: Axis) -> Source:
    """Return "evaluation", unless a run has too few of them for a curve and every run has training episodes."""
    if axis == "time":
        return "training"
    n_evaluations = [(_n_points(read_evaluations, folder), f"{label} on {env_of(folder)}") for folder, label in chosen]
    trained = all(_n_points(read_training, folder) for folder, _ in chosen)
    (fewest, which), (most, _) = min(n_evaluations), max(n_evaluations)
    if fewest >= FEWEST_EVALUATIONS or (not trained and most > 0):
        return "evaluation"
    if most > 0:
        print(
            f"{which} has {fewest} evaluations, fewer than {FEWEST_EVALUATIONS}: training episodes are drawn; "
            "--source evaluation draws evaluations",
            file=sys.stderr,
        )
    return "training"


def _n_points(read: Callable[[Path], Run], folder: Path) -> int:
    """Return the number of points of a run's curve, 0 if it has none."""
    try:
        return len(read(folder).x)
    except LogError:
        return 0


def _report_short_runs(curves: Iterable[Curve], runs: Sequence[Run]) -> None:
    for curve in curves:
        longest = max(run.x[-1] for run in runs if (run.label, run.env) == (curve.label, curve.env))
        if curve.x[-1] < 0.9 * longest:
            where = f"{curve.label} on {curve.env} ends at {curve.x[-1]:,.0f}"
            print(f"{where}, where its shortest run ends; its longest run ends at {longest:,.0f}", file=sys.stderr)


def split_label(text: str) -> tuple[Path, str | None]:
    """Folder and label of ``LABEL=FOLDER`` or ``FOLDER``. An existing path is a folder even if it contains ``=``."""
    label, equals, folder = text.partition("=")
    return (Path(folder), label) if equals and not Path(text).exists() else (Path(text), None)


def _legend(label: str, n_runs: Sequence[int]) -> str:
    few, many = min(n_runs), max(n_runs)
    return f"{label} ({f'{few} to ' * (few < many)}{many} run{'s' * (many > 1)})"
