"""How theta moves: one short file per algorithm, over one template."""

from sb3_pg.algorithms.actor_critic import ActorCritic
from sb3_pg.algorithms.reinforce import Reinforce

__all__ = ["ActorCritic", "Reinforce"]
