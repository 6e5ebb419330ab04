"""The learner: new parameters from a batch, without an env or an algorithm."""

from sb3_pg.learner.anchor import Anchor, Penalty
from sb3_pg.learner.critic import CriticFit, ReturnScale, make_critic_optimizer
from sb3_pg.learner.differential import Differential
from sb3_pg.learner.estimators import Bootstrapped, ImportanceSampled, MonteCarlo, VTrace
from sb3_pg.learner.gradient_step import GradientStep
from sb3_pg.learner.kl_penalty_step import KLPenaltyStep
from sb3_pg.learner.learner import Estimator, Learner, LearnerState, Report, Step
from sb3_pg.learner.metrics import Metrics
from sb3_pg.learner.trace_step import TraceStep
from sb3_pg.learner.trust_region import NaturalStep

__all__ = [
    "Anchor",
    "Bootstrapped",
    "CriticFit",
    "Differential",
    "Estimator",
    "GradientStep",
    "ImportanceSampled",
    "KLPenaltyStep",
    "Learner",
    "LearnerState",
    "Metrics",
    "MonteCarlo",
    "NaturalStep",
    "Penalty",
    "Report",
    "ReturnScale",
    "Step",
    "TraceStep",
    "VTrace",
    "make_critic_optimizer",
]
