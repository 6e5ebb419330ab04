"""Off-policy actor-critic."""

from sb3_pg.algorithms.off_pac.off_pac import OffPAC

__all__ = ["OffPAC"]
