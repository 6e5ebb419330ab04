"""Scores of several runs: means, interquartile means, performance profiles, probabilities of improvement.

Source of the statistics: Agarwal et al. (2021), "Deep Reinforcement Learning at the Edge of the Statistical Precipice".
They are computed by its authors' ``rliable`` (extra ``plots``).
"""

import csv
import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sb3_pg.extras import extra_hints
from sb3_pg.reporting.curves import LogError, Run, env_of, find_runs, read_evaluations

_N_RESAMPLES: Final = 2000
_LEVEL: Final = 0.95
Task = tuple[str, int]  # env, steps
Interval = tuple[float, float]
Improvements = dict[str, tuple[float, Interval, list[Task]]]  # label -> probability, its interval, the tasks


@dataclass(frozen=True)
class Result:
    """Result of one run.

    :param label: the algorithm, or a name given by the user
    :param env: environment id
    :param steps: env steps that the run was trained for, as configured or at its last evaluation
    :param final: mean return of the final policy
    :param best: largest mean return of an evaluation
    :param seconds: training time, None if it was not saved
    :param curve: evaluations of the run
    """

    label: str
    env: str
    steps: int
    final: float
    best: float
    seconds: float | None
    curve: Run

    @property
    def task(self) -> Task:
        """Env and number of steps. Results of the same task are comparable."""
        return self.env, self.steps


@dataclass(frozen=True)
class Score:
    """Scores of one label on one task. Returns are undiscounted; ``interval`` is the 95 % interval of the IQM."""

    label: str
    env: str
    steps: int
    n_runs: int
    mean: float
    std: float
    worst: float
    best_run: float
    iqm: float
    interval: Interval
    best_of_curve: float
    seconds: float | None


def read_results(source: Path, label: str | None = None) -> list[Result]:
    """Results of the runs in a folder of logs, or in a table written by ``benchmarks/learning.py``.

    :param source: a folder, see :func:`sb3_pg.reporting.curves.find_runs`, or ``<name>.csv`` beside
        ``<name>_curves.csv``
    :param label: used instead of the algorithms' names
    :raises LogError: no run was evaluated
    """
    if source.suffix == ".csv":
        return _of_table(source, label)
    results = []
    for folder in find_runs(source):
        if (folder / "evaluations.npz").is_file():
            curve = read_evaluations(folder, label)
            if curve.x[-1] == 0:
                print(f"left out: {folder} was evaluated only before the first step", file=sys.stderr)
                continue
            means = curve.returns.mean(axis=0)
            steps = int(curve.x[-1])
            results.append(Result(curve.label, env_of(folder), steps, means[-1], means.max(), None, curve))
    if not results:
        raise LogError(f"no run in {source} has an evaluations.npz: train without --eval-freq -1")
    return results


def with_common_steps(results: Sequence[Result]) -> list[Result]:
    """Make numbers of steps on an env that differ by less than a tenth equal, namely to the largest of them.

    The number of steps is known from the last evaluation, which may come before the last step.

    :param results: any results, in any order
    """
    longest: dict[str, int] = {}
    steps: dict[Task, int] = {}
    for task in sorted({result.task for result in results}, reverse=True):
        env, length = task
        if env not in longest or length < 0.9 * longest[env]:
            longest[env] = length
        steps[task] = longest[env]
    return [replace(result, steps=steps[result.task]) for result in results]


def _of_table(path: Path, label: str | None) -> list[Result]:
    key = ("algo", "env", "seed", "steps", "config_hash")
    curves: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    try:
        for row in _rows(path.with_name(f"{path.stem}_curves.csv")):
            point = float(row["step"]), float(row["eval_mean"])
            curves.setdefault(tuple(row[name] for name in key), []).append(point)
        rows = _rows(path)
        configurations = {(row["algo"], row["env"], row["steps"], row["config_hash"]) for row in rows}
        several = {c[:3] for c in configurations if sum(c[:3] == other[:3] for other in configurations) > 1}
        results = []
        for row in rows:
            x, means = np.array(sorted(curves[tuple(row[name] for name in key)])).T
            name = label or row["algo"]
            if (row["algo"], row["env"], row["steps"]) in several:  # different settings are different curves
                name = f"{name} {row['config_hash']}"
            curve = Run(name, row["env"], x, means[None])
            final, best = float(row["final_mean"]), float(row["best_eval_mean"])
            results.append(
                Result(curve.label, curve.env, int(row["steps"]), final, best, float(row["wall_seconds"]), curve)
            )
    except (OSError, KeyError, ValueError) as error:
        raise LogError(
            f"{path} is not a table of benchmarks/learning.py, with a table of curves beside it: {error}"
        ) from error
    if not results:
        raise LogError(f"no run in {path}")
    return results


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def score(results: Iterable[Result]) -> list[Score]:
    """One score per task and label, sorted by env and steps, then in order of appearance.

    :param results: any results, in any order
    """
    groups: dict[tuple[Task, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.task, result.label), []).append(result)
    scores = []
    for ((env, steps), label), members in groups.items():
        finals = np.array([member.final for member in members])
        seconds = [member.seconds for member in members if member.seconds is not None]
        iqms, intervals = _intervals({"": finals[:, None]}, "aggregate_iqm")
        scores.append(
            Score(
                label=label,
                env=env,
                steps=steps,
                n_runs=len(members),
                mean=float(finals.mean()),
                std=float(finals.std(ddof=1)) if len(finals) > 1 else 0.0,
                worst=float(finals.min()),
                best_run=float(finals.max()),
                iqm=iqms[""],
                interval=intervals[""],
                best_of_curve=float(np.mean([member.best for member in members])),
                seconds=float(np.median(seconds)) if seconds else None,
            )
        )
    return sorted(scores, key=lambda line: (line.env, line.steps))


def _intervals(scores: Mapping[str, Any], metric: str) -> tuple[dict[str, float], dict[str, Interval]]:
    """Return a metric of rliable's for each entry, and its stratified bootstrap interval."""
    library, metrics = _rliable()
    function = getattr(metrics, metric)
    with _seeded():
        points, bounds = library.get_interval_estimates(
            scores,
            lambda *arrays: np.array([function(*arrays)]),
            reps=_N_RESAMPLES,
            confidence_interval_size=_LEVEL,
        )
    return (
        {name: float(point[0]) for name, point in points.items()},
        {name: (float(bound[0, 0]), float(bound[1, 0])) for name, bound in bounds.items()},
    )


def common_tasks(results: Sequence[Result], labels: Sequence[str]) -> set[Task]:
    """Return the tasks on which each of these labels has a run."""
    return set.intersection(*({result.task for result in results if result.label == label} for label in labels))


def matrices(results: Sequence[Result], labels: Sequence[str]) -> tuple[list[Task], dict[str, NDArray[np.float64]]]:
    """Final returns on the tasks that all labels share, with the same number of runs of a label on each task.

    If a label has more runs on some tasks, only its first runs are used there. :func:`read_results` orders runs by seed
    or folder name, so that this choice does not depend on the scores.

    :param results: results of any labels
    :param labels: at least one
    :return: the tasks; label -> final returns ``(n_runs, n_tasks)``
    :raises LogError: the labels share no task
    """
    finals: dict[str, dict[Task, list[float]]] = {label: {} for label in labels}
    for result in results:
        if result.label in finals:
            finals[result.label].setdefault(result.task, []).append(result.final)
    tasks = sorted(common_tasks(results, labels))
    if not tasks:
        raise LogError(f"no env with the same number of training steps is common to {', '.join(labels)}")
    scores = {}
    for label, of_label in finals.items():
        n_runs = min(len(of_label[task]) for task in tasks)
        scores[label] = np.array([of_label[task][:n_runs] for task in tasks]).T
    return tasks, scores


def profiles(
    scores: Mapping[str, NDArray[np.float64]], n_points: int = 101
) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]], dict[str, NDArray[np.float64]]]:
    """Performance profiles: the share of runs above each threshold.

    Returns of a task are scaled so that the worst run of all labels is 0 and the best is 1; equal returns are all 1.

    :param scores: label -> final returns ``(n_runs, n_tasks)``
    :param n_points: number of thresholds from 0 to 1
    :return: thresholds ``(n_points,)``; label -> shares ``(n_points,)``; label -> 95 % bounds ``(2, n_points)``
    """
    library, _ = _rliable()
    everything = np.concatenate(list(scores.values()))
    low, high = everything.min(axis=0), everything.max(axis=0)
    scale = np.where(high > low, high - low, 1.0)
    thresholds = np.linspace(0.0, 1.0, n_points)
    scaled = {label: np.where(high > low, (values - low) / scale, 1.0) for label, values in scores.items()}
    with _seeded():
        shares, bounds = library.create_performance_profile(scaled, thresholds, reps=_N_RESAMPLES)
    return thresholds, shares, bounds


def improvements(results: Sequence[Result], against: str) -> Improvements:
    """P(the final return of a label's run is higher than that of a run of ``against``), mean over their common tasks.

    :param results: results of any labels
    :param against: label of the peer
    :return: label -> probability, its 95 % interval, the tasks; labels without a common task are left out
    :raises LogError: the peer has no runs
    """
    labels = list(dict.fromkeys(result.label for result in results))
    if against not in labels:
        raise LogError(f"no run of {against!r}; there are runs of {', '.join(labels)}")
    pairs, tasks = {}, {}
    for label in labels:
        if label != against and common_tasks(results, [label, against]):
            tasks[label], scores = matrices(results, [label, against])
            pairs[label] = scores[label], scores[against]
    if not pairs:
        return {}
    points, bounds = _intervals(pairs, "probability_of_improvement")
    return {label: (points[label], bounds[label], tasks[label]) for label in pairs}


@contextmanager
def _seeded() -> Iterator[None]:
    """Context in which NumPy's global generator, which rliable uses, always draws the same numbers."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def _rliable() -> tuple[Any, Any]:
    """Import ``rliable.library`` and ``rliable.metrics``.

    :raises MissingExtraError: it is not installed
    """
    with extra_hints():
        return importlib.import_module("rliable.library"), importlib.import_module("rliable.metrics")
