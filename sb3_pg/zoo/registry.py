"""What rl_zoo3 is told: classes, hyperparameter samplers and converters, and where the hyperparameters lie."""

import functools
import inspect
from pathlib import Path
from typing import Any, Final

from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.base_class import BaseAlgorithm

import sb3_pg
from sb3_pg.algorithms.actor_critic import ActorCritic
from sb3_pg.algorithms.kl_penalty_pg import KLPenaltyPG
from sb3_pg.algorithms.npg import NPG
from sb3_pg.algorithms.reinforce import Reinforce
from sb3_pg.algorithms.trpo import TRPO
from sb3_pg.zoo.samplers import (
    convert_actor_critic_params,
    convert_reinforce_params,
    sample_actor_critic_params,
    sample_reinforce_params,
)

ALGORITHMS: Final[dict[str, type[BaseAlgorithm]]] = {
    "reinforce": Reinforce,
    "actor_critic": ActorCritic,
    "npg": NPG,
    "trpo": TRPO,
    "kl_penalty_pg": KLPenaltyPG,
}
"""Name on the command line to class."""

RENAMED: Final = {"trpo": "contrib_trpo"}
"""rl_zoo3's own name to the one that its entry has beside ours."""

_SAMPLERS: Final = {"reinforce": sample_reinforce_params, "actor_critic": sample_actor_critic_params}
_CONVERTERS: Final = {"reinforce": convert_reinforce_params, "actor_critic": convert_actor_critic_params}


def config_path(algo: str) -> Path:
    """File with the tuned hyperparameters of one of our algorithms, in rl_zoo3's format.

    :param algo: a key of :data:`ALGORITHMS`
    :return: ``zoo_configs/<algo>.yml``, inside the installed package or beside it in a checkout
    :raises KeyError: not one of our algorithms
    """
    if algo not in ALGORITHMS:
        raise KeyError(f"{algo!r} is not an algorithm of sb3_pg, which has: {', '.join(ALGORITHMS)}")
    package = Path(sb3_pg.__file__).parent
    installed = package / "zoo_configs"
    folder = installed if installed.is_dir() else package.parent / "zoo_configs"
    return folder / f"{algo}.yml"


def register() -> None:
    """Add our algorithms to rl_zoo3's tables, in place; a second call changes nothing.

    Where rl_zoo3 has an algorithm of the same name, its entries move to a name of their own, :data:`RENAMED`, under
    which it keeps its class, its search and its hyperparameters.

    :raises ValueError: rl_zoo3 has something else under one of our names
    """
    tables: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (ALGOS, ALGORITHMS),
        (HYPERPARAMS_SAMPLER, _SAMPLERS),
        (HYPERPARAMS_CONVERTER, _CONVERTERS),
    ]
    # All checks come before the first change: a clash leaves rl_zoo3 as it was.
    for table, ours in tables:
        _refuse_clashes(table, ours)
    for table, ours in tables:
        for theirs, name in RENAMED.items():
            table.setdefault(name, table[theirs])
        table.update(ours)
    _find_configs()


def _refuse_clashes(table: dict[str, Any], ours: dict[str, Any]) -> None:
    for name, entry in ours.items():
        known = table.get(name, entry)
        if known is not entry and not (name in RENAMED and RENAMED[name] not in table):
            raise ValueError(
                f"rl_zoo3 already has {known!r} under the name {name!r}, so that sb3_pg's {entry!r} cannot be "
                f"registered: give the other one another name, or do not import sb3_pg.zoo"
            )


def _find_configs() -> None:
    """Let an ``ExperimentManager`` without ``config`` take ours for our algorithms, and rl_zoo3's for those renamed.

    rl_zoo3 looks beside its own sources and has no setting for another folder. Both rl_zoo3.train and users' scripts
    hold the class itself, so that its ``__init__`` is the one place that all of them pass through.
    """
    original = ExperimentManager.__init__
    if hasattr(original, "_sb3_pg_configs"):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(*args: Any, **kwargs: Any) -> None:
        arguments = signature.bind(*args, **kwargs).arguments
        algo = arguments["algo"]
        if algo in ALGORITHMS and not arguments.get("config"):
            arguments["config"] = str(config_path(algo))
        if algo in RENAMED.values() and not arguments.get("config"):
            theirs = next(name for name, new in RENAMED.items() if new == algo)
            arguments["config"] = str(Path(inspect.getfile(ExperimentManager)).parent / "hyperparams" / f"{theirs}.yml")
        original(**arguments)

    init._sb3_pg_configs = True  # type: ignore[attr-defined]
    ExperimentManager.__init__ = init  # type: ignore[method-assign]
