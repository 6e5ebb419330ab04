"""Numbers that a run has logged, from its ``progress.csv``, which ``sb3-pg train`` writes."""

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from sb3_pg.reporting.curves import LogError, Run, env_of, label_of

FILE: Final = "progress.csv"
STEPS: Final = "time/total_timesteps"
#: What ``sb3-pg report`` draws of a single run, if it was logged.
OVERVIEW: Final = (
    *("rollout/ep_rew_mean", "train/joint_kl", "train/entropy", "train/explained_variance", "train/value_loss"),
    *("train/critic_loss", "train/q_value", "train/importance_ess", "train/grad_norm", "time/fps"),
)


def read_rows(path: Path) -> list[dict[str, float]]:
    """Return the numbers in each row of a ``progress.csv``. A last line that is not complete yet is left out.

    :param path: the file
    :raises LogError: there is no such file
    """
    if not path.is_file():
        raise LogError(f"no {FILE} in {path.parent}: runs of `sb3-pg train` have one")
    complete, _, _ = path.read_text().rpartition("\n")
    rows = csv.DictReader(complete.splitlines())
    return [{name: number for name, text in row.items() if (number := _number(text)) is not None} for row in rows]


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:  # a word, such as train/step_outcome
        return None


def full_name(metric: str, names: Iterable[str]) -> str:
    """Return a logged name from its last part, ``joint_kl`` for ``train/joint_kl``.

    :param metric: a logged name or its last part
    :param names: what was logged
    :raises LogError: it was not logged
    """
    names = sorted(names)
    found = [name for name in names if metric in (name, name.rpartition("/")[2])]
    if not found:
        raise LogError(f"{metric!r} was not logged; logged are {', '.join(names)}")
    return found[0]


def read_logged(folder: Path, metrics: Sequence[str], label: str | None = None) -> list[Run]:
    """Return each metric of a run as a curve over env steps. Its ``env`` is the env with the metric's name.

    :param folder: a run's folder
    :param metrics: logged names, or their last parts
    :param label: label of the curves, None for the algorithm's name
    :raises LogError: the run has no log, or a metric was not logged
    """
    rows = read_rows(folder / FILE)
    logged = {name for row in rows for name in row}
    runs = []
    for metric in metrics:
        name = full_name(metric, logged)
        points = [(row[STEPS], row[name]) for row in rows if name in row and STEPS in row and math.isfinite(row[name])]
        if not points:
            raise LogError(f"{name!r} was never finite in {folder}")
        x, values = np.array(points).T
        runs.append(Run(label or label_of(folder), f"{env_of(folder)}: {name}", x, values[None]))
    return runs


def overview(folder: Path) -> list[Run]:
    """Return the metrics that tell most of a run, among those that it has logged.

    :param folder: a run's folder
    :raises LogError: the run has no log
    """
    logged = {name for row in read_rows(folder / FILE) for name, value in row.items() if math.isfinite(value)}
    return read_logged(folder, [name for name in OVERVIEW if name in logged])
