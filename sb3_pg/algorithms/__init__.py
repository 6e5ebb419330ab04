"""How theta moves: one template, and one short file per algorithm."""

from sb3_pg.algorithms.reinforce import Reinforce

__all__ = ["Reinforce"]
