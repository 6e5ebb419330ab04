"""Policy gradients for Stable-Baselines3."""

from sb3_pg import algorithms, functional
from sb3_pg.algorithms import *  # noqa: F403 (its __all__, which every new algorithm is added to)
from sb3_pg.callbacks import AverageRewardEvalCallback, GradientDiagnosticsCallback
from sb3_pg.checkpoints import ResumeCallback
from sb3_pg.demonstrations import DemonstrationLoss, Demonstrations, KLAnchor, PretrainReport
from sb3_pg.errors import NonFiniteError
from sb3_pg.policies import Memory

__version__ = "0.1.0"

__all__ = ["AverageRewardEvalCallback", "DemonstrationLoss", "Demonstrations", "GradientDiagnosticsCallback"]
__all__ += ["KLAnchor", "Memory", "NonFiniteError", "PretrainReport", "ResumeCallback", "__version__", "functional"]
__all__ += algorithms.__all__
