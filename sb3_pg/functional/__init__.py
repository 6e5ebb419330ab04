"""Pure functions on tensors. They import PyTorch and NumPy only.

Time is the first axis, environments the second: ``(n_steps, n_envs)``.
"""

from sb3_pg.functional.advantages import gae, normalize, rounding, td_residual
from sb3_pg.functional.average_reward import average_reward, differential_gae
from sb3_pg.functional.diagnostics import GradientDiagnostics, gradient_diagnostics
from sb3_pg.functional.distributions import distribution_parameters, joint_kl, with_parameters
from sb3_pg.functional.eligibility import eligibility_trace, row_gradients
from sb3_pg.functional.episode_gradients import episode_gradients
from sb3_pg.functional.importance import (
    effective_sample_size,
    importance_weights,
    log_importance_ratio,
    log_weights,
    per_decision_return,
    self_normalize,
    truncate,
    truncated_fraction,
)
from sb3_pg.functional.losses import behavior_cloning_loss, policy_gradient_loss, reduce_actor, value_loss
from sb3_pg.functional.natural_gradient import (
    FisherVectorProduct,
    LineSearch,
    Solution,
    conjugate_gradient,
    line_search,
)
from sb3_pg.functional.returns import lambda_return, n_step_return, reward_to_go, total_return
from sb3_pg.functional.scan import scan
from sb3_pg.functional.traces import retrace, vtrace, vtrace_advantages

__all__ = [
    "FisherVectorProduct",
    "GradientDiagnostics",
    "LineSearch",
    "Solution",
    "average_reward",
    "behavior_cloning_loss",
    "conjugate_gradient",
    "differential_gae",
    "distribution_parameters",
    "effective_sample_size",
    "eligibility_trace",
    "episode_gradients",
    "gae",
    "gradient_diagnostics",
    "importance_weights",
    "joint_kl",
    "lambda_return",
    "line_search",
    "log_importance_ratio",
    "log_weights",
    "n_step_return",
    "normalize",
    "per_decision_return",
    "policy_gradient_loss",
    "reduce_actor",
    "retrace",
    "reward_to_go",
    "rounding",
    "row_gradients",
    "scan",
    "self_normalize",
    "td_residual",
    "total_return",
    "truncate",
    "truncated_fraction",
    "value_loss",
    "vtrace",
    "vtrace_advantages",
    "with_parameters",
]
