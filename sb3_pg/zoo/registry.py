"""What rl_zoo3 is told: classes, hyperparameter samplers and converters, and where the hyperparameters lie."""

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
from stable_baselines3.common.base_class import BaseAlgorithm

import sb3_pg
from sb3_pg.algorithms.actor_critic import ActorCritic
from sb3_pg.algorithms.kl_penalty_pg import KLPenaltyPG
from sb3_pg.algorithms.npg import NPG
from sb3_pg.algorithms.off_pac.off_pac import OffPAC
from sb3_pg.algorithms.off_policy_pg import OffPolicyPG
from sb3_pg.algorithms.reinforce import Reinforce
from sb3_pg.algorithms.trpo import TRPO
from sb3_pg.zoo import off_policy_samplers, samplers

ALGORITHMS: Final[dict[str, type[BaseAlgorithm]]] = {
    "reinforce": Reinforce,
    "actor_critic": ActorCritic,
    "npg": NPG,
    "trpo": TRPO,
    "kl_penalty_pg": KLPenaltyPG,
    "off_policy_pg": OffPolicyPG,
    "off_pac": OffPAC,
}
"""Name on the command line to class."""

RENAMED: Final = {"contrib_trpo": "trpo"}
"""Name that an algorithm of rl_zoo3's has beside ours to the name that it has without us."""

# Each of rl_zoo3's tables, what we add to it, and its own entries that make room.
_TABLES: Final[list[tuple[dict[str, Any], Mapping[str, Any], Mapping[str, Any]]]] = [
    (ALGOS, ALGORITHMS, {"contrib_trpo": sb3_contrib.TRPO}),
    (
        HYPERPARAMS_SAMPLER,
        {
            "reinforce": samplers.sample_reinforce_params,
            "actor_critic": samplers.sample_actor_critic_params,
            "npg": samplers.sample_npg_params,
            "trpo": samplers.sample_trpo_params,
            "kl_penalty_pg": samplers.sample_kl_penalty_pg_params,
            "off_policy_pg": off_policy_samplers.sample_off_policy_pg_params,
            "off_pac": off_policy_samplers.sample_off_pac_params,
        },
        {"contrib_trpo": sample_trpo_params},
    ),
    (
        HYPERPARAMS_CONVERTER,
        {
            "reinforce": samplers.convert_reinforce_params,
            "actor_critic": samplers.convert_actor_critic_params,
            "npg": samplers.convert_npg_params,
            "trpo": samplers.convert_trpo_params,
            "kl_penalty_pg": samplers.convert_kl_penalty_pg_params,
            "off_policy_pg": off_policy_samplers.convert_off_policy_pg_params,
            "off_pac": off_policy_samplers.convert_off_pac_params,
        },
        {"contrib_trpo": convert_onpolicy_params},
    ),
]


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

    An algorithm of rl_zoo3's that has the name of one of ours keeps its class, its search and its hyperparameters under
    another name, :data:`RENAMED`.

    :raises ValueError: rl_zoo3 has something else under one of these names
    """
    # All checks come before the first change: a clash leaves rl_zoo3 as it was.
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
    """Let an ``ExperimentManager`` without ``config`` take ours for our algorithms, and rl_zoo3's for those renamed.

    rl_zoo3 looks beside its own sources and has no setting for another folder. Both rl_zoo3.train and users' scripts
    hold the class itself, so that its ``__init__`` is the one place that all of them pass through.
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
