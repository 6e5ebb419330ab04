"""Policy gradients for Stable-Baselines3."""

from sb3_pg import functional
from sb3_pg.algorithms import NPG, TRPO, ActorCritic, KLPenaltyPG, OffPAC, OffPolicyPG, Reinforce
from sb3_pg.callbacks import GradientDiagnosticsCallback
from sb3_pg.errors import NonFiniteError

__version__ = "0.1.0"

__all__ = [
    "NPG",
    "TRPO",
    "ActorCritic",
    "GradientDiagnosticsCallback",
    "KLPenaltyPG",
    "NonFiniteError",
    "OffPAC",
    "OffPolicyPG",
    "Reinforce",
    "__version__",
    "functional",
]
