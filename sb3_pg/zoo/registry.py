"""Registers our classes, hyperparameter samplers and converters, and config files in rl_zoo3."""

import functools
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import sb3_contrib
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import (
    HYPERPARAMS_CONVERTER,
    HYPERPARAMS_SAMPLER,
    convert_onpolicy_params,
    sample_trpo_params,
)
from rl_zoo3.utils import ALGOS

import sb3_pg
from sb3_pg.algorithms import ALGORITHMS
from sb3_pg.zoo.samplers import COMMON, SEARCHES

RENAMED: Final = {"contrib_trpo": "trpo"}
"""New name of one of rl_zoo3's algorithms -> its original name, which is now ours."""

_SEARCHES: Final = {name: SEARCHES.get(name, COMMON) for name in ALGORITHMS}
# Each of rl_zoo3's tables, what we add to it, and its own entries that get another name.
_TABLES: Final[list[tuple[dict[str, Any], Mapping[str, Any], Mapping[str, Any]]]] = [
    (ALGOS, ALGORITHMS, {"contrib_trpo": sb3_contrib.TRPO}),
    (
        HYPERPARAMS_SAMPLER,
        {name: search.sample for name, search in _SEARCHES.items()},
        {"contrib_trpo": sample_trpo_params},
    ),
    (
        HYPERPARAMS_CONVERTER,
        {name: search.convert for name, search in _SEARCHES.items()},
        {"contrib_trpo": convert_onpolicy_params},
    ),
]


def config_path(algo: str) -> Path:
    """Return the file with the hyperparameters of one of our algorithms, in rl_zoo3's format.

    :param algo: a key of :data:`~sb3_pg.algorithms.ALGORITHMS`
    :return: ``zoo_configs/<algo>.yml``, in the installed package or beside it in a clone of the repository
    :raises KeyError: ``algo`` is not one of our algorithms
    """
    if algo not in ALGORITHMS:
        raise KeyError(f"algo must be one of {list(ALGORITHMS)}, got {algo!r}")
    package = Path(sb3_pg.__file__).parent
    installed = package / "zoo_configs"
    folder = installed if installed.is_dir() else package.parent / "zoo_configs"
    return folder / f"{algo}.yml"


def register() -> None:
    """Add our algorithms to rl_zoo3's tables, in place. A second call changes nothing.

    An algorithm of rl_zoo3 with the name of one of ours keeps its class, search and hyperparameters under another name,
    see :data:`RENAMED`.

    :raises ValueError: rl_zoo3 has another entry under one of these names
    """
    # All checks come before the first change, so that a conflict leaves rl_zoo3 unchanged.
    for table, ours, renamed in _TABLES:
        making_room = {RENAMED[name]: entry for name, entry in renamed.items()}
        for name, entry in {**ours, **renamed}.items():
            known = table.get(name, entry)
            if known is not entry and known is not making_room.get(name):
                raise ValueError(
                    f"rl_zoo3 already has {known!r} under the name {name!r}, so that {entry!r} cannot be registered: "
                    f"give the other one another name, or do not import sb3_pg.zoo"
                )
    for table, ours, renamed in _TABLES:
        table.update({**ours, **renamed})
    _find_configs()


def _find_configs() -> None:
    """Let ``ExperimentManager`` without ``config`` read our files for our algorithms, and rl_zoo3's for renamed ones.

    rl_zoo3 searches config files only beside its own sources. rl_zoo3.train and users' scripts import the class by
    name, so its ``__init__`` is replaced, not the class.
    """
    original = ExperimentManager.__init__
    if hasattr(original, "_sb3_pg_configs"):
        return
    signature = inspect.signature(original)
    theirs = Path(inspect.getfile(ExperimentManager)).parent / "hyperparams"
    configs = {algo: config_path(algo) for algo in ALGORITHMS}
    configs |= {algo: theirs / f"{name}.yml" for algo, name in RENAMED.items()}

    @functools.wraps(original)
    def init(*args: Any, **kwargs: Any) -> None:
        arguments = signature.bind(*args, **kwargs).arguments
        if not arguments.get("config") and arguments["algo"] in configs:
            arguments["config"] = str(configs[arguments["algo"]])
        original(**arguments)

    init._sb3_pg_configs = True  # type: ignore[attr-defined]
    ExperimentManager.__init__ = init  # type: ignore[method-assign]
