"""How theta moves: one short file per algorithm, over one template."""

from sb3_pg.algorithms.actor_critic import ActorCritic
from sb3_pg.algorithms.kl_penalty_pg import KLPenaltyPG
from sb3_pg.algorithms.npg import NPG
from sb3_pg.algorithms.off_pac import OffPAC
from sb3_pg.algorithms.off_policy_pg import OffPolicyPG
from sb3_pg.algorithms.reinforce import Reinforce
from sb3_pg.algorithms.trpo import TRPO

__all__ = ["NPG", "TRPO", "ActorCritic", "KLPenaltyPG", "OffPAC", "OffPolicyPG", "Reinforce"]
