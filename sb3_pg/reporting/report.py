"""``sb3-pg report``: curves, scores, performance profile and probability of improvement of several algorithms."""

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final

import gymnasium as gym
import numpy as np
from gymnasium.error import Error as GymnasiumError
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sb3_pg.extras import extra_hints
from sb3_pg.reporting.curves import Curve, LogError, find_runs, group
from sb3_pg.reporting.logged import FILE, overview
from sb3_pg.reporting.plots import draw, split_label, styles
from sb3_pg.reporting.scores import (
    Improvements,
    Result,
    Score,
    Task,
    common_tasks,
    improvements,
    matrices,
    profiles,
    read_results,
    score,
    with_common_steps,
)

#: Part of an env's entry point -> name of its family.
_GROUPS: Final = {"classic_control": "classic control", "box2d": "Box2D", "mujoco": "MuJoCo"}


def group_of(env: str) -> str:
    """Return the name of the family of environments that an env belongs to."""
    try:
        entry_point = str(gym.spec(env).entry_point)
    except GymnasiumError:
        return "other"
    return next((name for part, name in _GROUPS.items() if f".{part}" in entry_point), "other")


def table(scores: Sequence[Score]) -> str:
    """Return the scores as a Markdown table."""
    lines = [
        "| env | steps | algorithm | runs | mean | std | worst, best run | IQM (95 %) | best of curve | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in scores:
        low, high = line.interval
        seconds = "" if line.seconds is None else f"{line.seconds:.0f}"
        lines.append(
            f"| {line.env} | {line.steps:,} | {line.label} | {line.n_runs} | {line.mean:.1f} | {line.std:.1f} | "
            f"{line.worst:.1f}, {line.best_run:.1f} | {line.iqm:.1f} ({low:.1f} to {high:.1f}) | "
            f"{line.best_of_curve:.1f} | {seconds} |"
        )
    return "\n".join(lines)


def comparison(better: Improvements, against: str) -> str:
    """Return probabilities of improvement on a peer as a Markdown table.

    :param better: result of :func:`sb3_pg.reporting.scores.improvements`
    :param against: label of the peer
    """
    lines = [f"| algorithm | P(ends higher than {against}), 95 % interval | on |", "|---|---|---|"]
    for label, (point, (low, high), tasks) in better.items():
        lines.append(f"| {label} | {point:.2f} ({low:.2f} to {high:.2f}) | {_envs(tasks)} |")
    return "\n".join(lines)


def learning_curves(results: Sequence[Result]) -> list[Curve]:
    """Return one curve for each label and task. If an env has tasks of several lengths, its name gets the length.

    :param results: results in the order of the curves; among the tasks of one env, shorter ones come first anyway
    """
    envs = list(dict.fromkeys(result.env for result in results))
    several = {env for env in envs if len({result.steps for result in results if result.env == env}) > 1}
    return group(
        replace(result.curve, env=f"{result.env}, {result.steps:,} steps") if result.env in several else result.curve
        for result in sorted(results, key=lambda result: (envs.index(result.env), result.steps))
    )


def profiled(results: Sequence[Result], peers: Sequence[str]) -> list[str]:
    """Return the labels of the performance profile, which is drawn on the tasks that all of them share.

    Without peers these are all labels. With peers they are the labels that have all tasks of the first peer, because a
    label with few tasks would restrict the profile to these; all labels, if only the peer itself has them.

    :param results: results of any labels
    :param peers: only the first one is used
    """
    labels = list(dict.fromkeys(result.label for result in results))
    if not peers:
        return labels
    everywhere = common_tasks(results, peers[:1])
    following = [label for label in labels if everywhere <= common_tasks(results, [label])]
    return following if len(following) > 1 else labels


def draw_summary(
    results: Sequence[Result],
    profile: tuple[Sequence[Task], Mapping[str, NDArray[np.float64]]] | None,
    better: Mapping[str, Improvements],
) -> Figure:
    """Draw performance profiles in one panel, and improvements on each peer in a panel of its own.

    :param results: the results behind ``profile`` and ``better``
    :param profile: result of :func:`sb3_pg.reporting.scores.matrices`, None to leave the panel out
    :param better: peer -> result of :func:`sb3_pg.reporting.scores.improvements`; not empty if ``profile`` is None
    """
    widths = [6.4] * (profile is not None) + [4.8] * len(better)
    height = max([4.4, *(0.6 * len(lines) for lines in better.values())])
    figure = Figure(figsize=(sum(widths), height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0])
    if profile is not None:
        _draw_profiles(panels.pop(0), results, *profile)
    for panel, (peer, lines) in zip(panels, better.items(), strict=True):
        _draw_improvements(panel, lines, peer)
    return figure


def _draw_profiles(
    panel: Any, results: Sequence[Result], tasks: Sequence[Task], scores: Mapping[str, NDArray[np.float64]]
) -> None:
    n_results = Counter((result.label, result.task) for result in results)
    lines = styles(dict.fromkeys(result.label for result in results))
    thresholds, shares, bounds = profiles(scores)
    for label, finals in scores.items():
        n_runs = len(finals)
        which = "first " if any(n_results[label, task] > n_runs for task in tasks) else ""
        name = f"{label} ({which}{n_runs} run{'s' * (n_runs > 1)} of each)"
        color, line = lines[label]
        panel.plot(thresholds, shares[label], label=name, color=color, linestyle=line)
        panel.fill_between(thresholds, *bounds[label], alpha=0.2, linewidth=0, color=color)
    panel.set(
        title=f"Performance profile on {_envs(tasks)}",
        xlabel="Final return, 0 the worst run of all and 1 the best (per env)",
        ylabel="Share of runs above it, 95 % band",
    )
    panel.legend(fontsize="small")
    panel.grid(alpha=0.3)


def _draw_improvements(panel: Any, better: Improvements, against: str) -> None:
    points = [point for point, _, _ in better.values()]
    reach = [[p - low for p, (low, _), _ in better.values()], [high - p for p, (_, high), _ in better.values()]]
    panel.errorbar(points, range(len(better)), xerr=reach, fmt="o", capsize=3)
    panel.axvline(0.5, color="gray", linewidth=1)
    panel.set(
        title=f"Improvement on {against}",
        xlabel=f"P(ends higher than {against}), 95 % interval",
        xlim=(-0.02, 1.02),
        yticks=range(len(better)),
        ylim=(len(better) - 0.5, -0.5),
    )
    panel.set_yticklabels([f"{label}\n{_envs(tasks)}" for label, (_, _, tasks) in better.items()], fontsize="small")
    panel.grid(alpha=0.3)


def _envs(tasks: Sequence[Task]) -> str:
    envs = list(dict.fromkeys(env for env, _ in tasks))
    return ", ".join(envs) if len(envs) < 4 else f"{len(envs)} envs"


def main(arguments: Sequence[str]) -> int:
    """``sb3-pg report``: write figures and tables, and print the tables and the paths of the files.

    :param arguments: the command line, without the program's name
    :return: exit code
    :raises SystemExit: the arguments cannot be parsed, are ``--help``, or there is no run to report
    """
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        results = _read(args)
        with extra_hints():
            written = write_report(results, args.output, args.against)
        if len(results) == 1:
            written += write_overview(args.inputs, args.output)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(map(str, written)))
    return 0


def write_report(results: Sequence[Result], folder: Path, peers: Sequence[str] = ()) -> list[Path]:
    """Print the tables of scores and improvements, and write them and the figures.

    :param results: at least one
    :param folder: folder of the files
    :param peers: labels that each of the other labels is compared with
    :return: paths of the files
    :raises LogError: a peer has no runs
    """
    scores = score(results)
    compared = {peer: improvements(results, peer) for peer in dict.fromkeys(peers)}
    better = {peer: lines for peer, lines in compared.items() if lines}
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join([table(scores), *(comparison(lines, peer) for peer, lines in better.items())])
    print(text)
    written = [folder / "scores.md", folder / "scores.csv"]
    written[0].write_text(text + "\n")
    names = [field.name for field in fields(Score) if field.name != "interval"]
    lines = [[*(getattr(line, name) for name in names), *line.interval] for line in scores]
    _write_csv(written[1], [*names, "iqm_low", "iqm_high"], lines)
    if better:
        written.append(folder / "improvements.csv")
        header = ["label", "against", "probability", "low", "high", "envs"]
        _write_csv(
            written[-1],
            header,
            [
                [label, peer, point, *bounds, len(tasks)]
                for peer, lines in better.items()
                for label, (point, bounds, tasks) in lines.items()
            ],
        )
    labels = list(dict.fromkeys(result.label for result in results))
    for family in dict.fromkeys(group_of(result.env) for result in results):
        curves = learning_curves([result for result in results if group_of(result.env) == family])
        written.append(folder / f"curves_{family.lower().replace(' ', '_')}.png")
        draw(curves, title=family, labels=labels).savefig(written[-1])
    try:
        profile = matrices(results, profiled(results, peers)) if len(results) > 1 else None
    except LogError as error:
        print(f"no performance profile: {error}", file=sys.stderr)
        profile = None
    if profile is not None or better:
        written.append(folder / "summary.png")
        draw_summary(results, profile, better).savefig(written[-1])
    return written


def write_overview(inputs: Sequence[str], folder: Path) -> list[Path]:
    """Draw what the only run of a report has logged: training returns, KL, entropy, explained variance and the like.

    :param inputs: the command line's sources; nothing is drawn for a CSV file
    :param folder: folder of the figure
    :return: path of the figure, if it was drawn
    """
    roots = [root for root, _ in map(split_label, inputs) if root.is_dir()]
    runs = [run for root in roots for run in find_runs(root) if (run / FILE).is_file()]
    curves = group(overview(runs[0])) if len(runs) == 1 else []
    if not curves:
        print(f"no overview of the run: it takes a single folder with a {FILE}", file=sys.stderr)
        return []
    draw(curves, "log").savefig(folder / "overview.png")
    return [folder / "overview.png"]


def _write_csv(path: Path, header: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sb3-pg report",
        description="Scores, learning curves, performance profile and probability of improvement of several runs.",
    )
    parser.add_argument(
        "inputs",
        nargs="*",
        default=["logs"],
        metavar="[LABEL=]SOURCE",
        help="a folder of runs trained with evaluations, or a CSV file of benchmarks/learning.py (default: logs)",
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("report"), help="folder (default: %(default)s)")
    parser.add_argument("--env", nargs="+", help="report only these environments")
    parser.add_argument("--label", nargs="+", help="report only these algorithms or labels")
    parser.add_argument("--against", nargs="+", default=[], help="labels that the others are compared with")
    return parser


def _read(args: argparse.Namespace) -> list[Result]:
    found = [result for text in args.inputs for result in read_results(*split_label(text))]
    chosen = [
        result
        for result in found
        if (not args.env or result.env in args.env) and (not args.label or result.label in [*args.label, *args.against])
    ]
    if not chosen:
        raise LogError(f"no run in {', '.join(args.inputs)} matches --env and --label")

    def place(result: Result) -> tuple[int, int]:  # the order of the options
        labels = [*(args.label or ()), *args.against]
        return args.env.index(result.env) if args.env else 0, labels.index(result.label) if args.label else 0

    return with_common_steps(sorted(chosen, key=place))
