"""Learning curves from the folders that ``sb3-pg train`` (or rl_zoo3's train) writes.

Runs of the same algorithm on the same environment form one curve: the mean over the runs, and a 95 % bootstrap band of
that mean. The band of several runs shows how much the runs differ. The band of a single run shows how much its episodes
differ.
"""

import csv
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal
from zipfile import BadZipFile

import numpy as np
import yaml  # type: ignore[import-untyped]
from numpy.typing import NDArray

Axis = Literal["steps", "time"]

_GRID_POINTS: Final = 200


class LogError(ValueError):
    """The logs cannot be read, or lack what is asked for."""


@dataclass(frozen=True)
class Run:
    """One training run's learning curve.

    :param label: the algorithm, or a name given by the user; runs with the same label and env form one curve
    :param env: environment id
    :param x: points of the curve, increasing, shape ``(n_points,)``, env steps or seconds
    :param returns: undiscounted returns of the episodes of each point, shape ``(n_episodes, n_points)``
    """

    label: str
    env: str
    x: NDArray[np.float64]
    returns: NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """Mean and band of the runs of one label on one environment. All arrays have the shape of ``x``."""

    label: str
    env: str
    n_runs: int
    x: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def find_runs(root: Path) -> list[Path]:
    """Return the folders of runs in ``root`` and its subfolders, sorted.

    :param root: a run's folder, or a folder that contains some
    :raises LogError: there are no runs
    """
    logs = [*root.rglob("evaluations.npz"), *root.rglob("*.monitor.csv")]
    if not logs:
        raise LogError(f"no evaluations.npz and no *.monitor.csv in {root} or its subfolders")
    return sorted({log.parent for log in logs})


def label_of(folder: Path) -> str:
    """Return the algorithm's name as saved with the run, or the name of the parent folder.

    If the run continues another one, the env step at which it begins is added.

    :param folder: the run's folder, which may have been moved or renamed
    """
    name, before = _arguments(folder).get("algo"), _steps_before(folder)
    return str(name or folder.resolve().parent.name) + (f" from step {before:,}" if before else "")


def env_of(folder: Path) -> str:
    """Return the environment's id as saved with the run or its monitor files, or the folder's name without its number.

    :param folder: the run's folder, which may have been moved or renamed
    """
    if _arguments(folder).get("env"):
        return str(_arguments(folder)["env"])
    named = [header["env_id"] for header in _headers(folder) if header.get("env_id", "None") != "None"]
    return str(named[0]) if named else re.sub(r"_\d+(_[0-9a-f-]{36})?$", "", folder.name)


def read_evaluations(folder: Path, label: str | None = None) -> Run:
    """Read the evaluations that an ``EvalCallback`` has logged.

    :param folder: the run's folder
    :param label: used instead of the algorithm's name
    :raises LogError: there is no ``evaluations.npz``, or it cannot be read
    """
    path = folder / "evaluations.npz"
    if not path.is_file():
        raise LogError(f"no evaluations.npz in {folder}")
    try:
        with np.load(path) as log:
            steps, returns = log["timesteps"].astype(np.float64), log["results"].astype(np.float64)
    except (BadZipFile, EOFError, KeyError, ValueError) as error:
        raise LogError(f"{path} cannot be read as evaluations of EvalCallback: {error}") from error
    if not returns.size:
        raise LogError(f"no evaluation episode in {path}")
    return Run(label or label_of(folder), env_of(folder), steps, returns.reshape(len(steps), -1).T)


def read_training(folder: Path, axis: Axis = "steps", window: int = 100, label: str | None = None) -> Run:
    """Read the training episodes of a run. Each point is a window of successive episodes.

    :param folder: the run's folder
    :param axis: unit of ``x``
    :param window: episodes per point, at most a fifth of all episodes
    :param label: used instead of the algorithm's name
    :raises LogError: there is no finished episode
    """
    episodes = sorted(row for path in folder.glob("*.monitor.csv") for row in _read_monitor(path))
    if not episodes:
        raise LogError(f"no finished episode in the *.monitor.csv of {folder}")
    ends, lengths, returns = np.array(episodes, dtype=np.float64).T
    if axis == "steps":
        x = _steps_before(folder) + np.cumsum(lengths)
    else:
        x = ends - min(header["t_start"] for header in _headers(folder))
    window = max(1, min(window, len(returns) // 5))
    windows = np.lib.stride_tricks.sliding_window_view(returns, window)
    x = x[window - 1 :]
    # At most one point per interval of x: vectorized envs may finish many episodes at once.
    points = np.unique(np.searchsorted(x, np.linspace(x[0], x[-1], _GRID_POINTS), side="right")) - 1
    return Run(label or label_of(folder), env_of(folder), x[points], windows[points].T)


def bootstrap_band(
    samples: NDArray[np.float64], level: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Percentile bootstrap confidence band of the mean over the first axis.

    Whole curves are resampled, so that the band is as smooth as the curves.

    :param samples: one curve per row, shape ``(n_samples, n_points)``
    :param level: confidence level, in (0, 1)
    :param n_resamples: number of bootstrap resamples
    :param seed: seed of the resampling
    :return: lower and upper end, each of shape ``(n_points,)``
    """
    n_samples = len(samples)
    # A resample weights each curve by how often it was drawn. The means are then one matrix product.
    counts = np.random.default_rng(seed).multinomial(n_samples, np.full(n_samples, 1 / n_samples), n_resamples)
    tail = (1 - level) / 2
    low, high = np.quantile(counts / n_samples @ samples, [tail, 1 - tail], axis=0)
    return low, high


def aggregate(runs: Sequence[Run]) -> Curve:
    """Mean and band of the runs of one label on one environment, over the range of x that all runs cover.

    :param runs: at least one
    :raises LogError: the runs have no x in common
    """
    first = runs[0]
    if len(runs) == 1:
        low, high = bootstrap_band(first.returns)
        return Curve(first.label, first.env, 1, first.x, first.returns.mean(axis=0), low, high)
    start, end = max(run.x[0] for run in runs), min(run.x[-1] for run in runs)
    if start > end:
        raise LogError(f"the {len(runs)} runs of {first.label} on {first.env} have no x in common")
    grid = np.unique(np.concatenate([run.x for run in runs]))
    grid = grid[(start <= grid) & (grid <= end)]
    if len(grid) > _GRID_POINTS:
        grid = np.linspace(start, end, _GRID_POINTS)
    means = np.stack([np.interp(grid, run.x, run.returns.mean(axis=0)) for run in runs])
    return Curve(first.label, first.env, len(runs), grid, means.mean(axis=0), *bootstrap_band(means))


def group(runs: Iterable[Run]) -> list[Curve]:
    """One curve for each label and environment, in order of appearance.

    :param runs: any runs, in any order
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.env, run.label), []).append(run)
    return [aggregate(members) for members in groups.values()]


class _ArgumentsLoader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads the OrderedDict of arguments that rl_zoo3 saves. It executes no code; other Python objects become None."""


_ArgumentsLoader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
_ArgumentsLoader.add_constructor(
    "tag:yaml.org,2002:python/object/apply:collections.OrderedDict",
    lambda loader, node: dict(loader.construct_sequence(node, deep=True)[0]),
)


def _arguments(folder: Path) -> dict[str, Any]:
    """Return the command-line arguments of the run, empty if they were not saved."""
    for path in folder.glob("*/args.yml"):
        try:
            arguments = yaml.load(path.read_text(), _ArgumentsLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise LogError(f"{path} cannot be read as arguments saved by rl_zoo3: {error}") from error
        if isinstance(arguments, dict):
            return arguments
    return {}


def _steps_before(folder: Path) -> int:
    """Return the number of env steps of the run that this run continues; 0 for a new run."""
    return int(_arguments(folder).get("num_timesteps_before") or 0)


def _headers(folder: Path) -> list[dict[str, Any]]:
    """Return the headers of the run's monitor files, with ``t_start`` (seconds since the epoch) and ``env_id``."""
    return [
        json.loads(path.read_text().partition("\n")[0].lstrip("#")) for path in sorted(folder.glob("*.monitor.csv"))
    ]


def _read_monitor(path: Path) -> list[tuple[float, float, float]]:
    """Return end (seconds since the epoch), length and return of each episode that SB3's ``Monitor`` logged."""
    with path.open(newline="") as file:
        start = float(json.loads(file.readline().lstrip("#"))["t_start"])
        rows = list(csv.DictReader(file))
    # The last line of a run that was killed may be incomplete.
    return [(start + float(row["t"]), float(row["l"]), float(row["r"])) for row in rows if all(row.values())]
