"""The algorithms.

To add one, write its file here, add it to the imports, the table and ``__all__`` below, and write its hyperparameters
to ``zoo_configs/<name>.yml``, with a ``default:`` block. ``sb3_pg.zoo.samplers.SEARCHES`` may get a hyperparameter
search for it.
"""

from typing import Final

from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_pg.algorithms.actor_critic import ActorCritic
from sb3_pg.algorithms.async_actor_critic import AsyncActorCritic
from sb3_pg.algorithms.kl_penalty_pg import KLPenaltyPG
from sb3_pg.algorithms.off_pac import OffPAC
from sb3_pg.algorithms.off_policy_pg import OffPolicyPG
from sb3_pg.algorithms.reinforce import Reinforce
from sb3_pg.algorithms.trpo import NPG, TRPO

ALGORITHMS: Final[dict[str, type[BaseAlgorithm]]] = {
    "reinforce": Reinforce,
    "actor_critic": ActorCritic,
    "async_actor_critic": AsyncActorCritic,
    "npg": NPG,
    "trpo": TRPO,
    "kl_penalty_pg": KLPenaltyPG,
    "off_policy_pg": OffPolicyPG,
    "off_pac": OffPAC,
}
"""Name on the command line and of the YAML file -> class."""

__all__ = ["NPG", "TRPO", "ActorCritic", "AsyncActorCritic", "KLPenaltyPG", "OffPAC", "OffPolicyPG", "Reinforce"]
