"""The mathematics: pure functions on tensors, importing torch only.

Time is the first axis, environments the second: ``(n_steps, n_envs)``.
"""

from sb3_pg.functional.advantages import gae, normalize, td_residual
from sb3_pg.functional.diagnostics import GradientDiagnostics, gradient_diagnostics
from sb3_pg.functional.divergence import joint_kl
from sb3_pg.functional.episode_gradients import episode_gradients
from sb3_pg.functional.losses import policy_gradient_loss, reduce_actor, value_loss
from sb3_pg.functional.returns import lambda_return, n_step_return, reward_to_go, total_return
from sb3_pg.functional.scan import scan

__all__ = [
    "GradientDiagnostics",
    "episode_gradients",
    "gae",
    "gradient_diagnostics",
    "joint_kl",
    "lambda_return",
    "n_step_return",
    "normalize",
    "policy_gradient_loss",
    "reduce_actor",
    "reward_to_go",
    "scan",
    "td_residual",
    "total_return",
    "value_loss",
]
