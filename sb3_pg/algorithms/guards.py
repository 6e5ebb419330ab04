"""NaN never travels: what is checked around an update, and how it is undone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pg.errors import NonFiniteError
from sb3_pg.rollout import RolloutBatch, require_finite_policy

_SMALLER_STEP = "A smaller learning rate may help."


@contextmanager
def unchanged_on_error(policy: ActorCriticPolicy) -> Iterator[dict[th.Tensor, th.Tensor]]:
    """Put parameters and buffers back as they were, to the bit, if the body raises (an interruption included).

    :return: each of them -> its value before
    """
    before = {tensor: tensor.detach().clone() for tensor in (*policy.parameters(), *policy.buffers())}
    try:
        yield before
    except BaseException:
        with th.no_grad():
            for tensor, value in before.items():
                tensor.copy_(value)
        raise


def nonfinite_gradient(policy: ActorCriticPolicy, batch: RolloutBatch) -> NonFiniteError:
    """The error for a gradient that is not finite: the batch's first such number, or the parameter."""
    for name, tensor in (("advantage", batch.advantages), ("log_prob", batch.log_probs), ("value", batch.values)):
        if tensor is None:
            continue
        bad = (~tensor.isfinite() & batch.valid).nonzero()
        if len(bad):
            step, env = bad[0].tolist()
            return NonFiniteError(name, float(tensor[step, env]), env, step)
    for name, parameter in policy.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            value = parameter.grad[~parameter.grad.isfinite()][0]
            return NonFiniteError(f"gradient of {name}", float(value), hint=_SMALLER_STEP)
    return NonFiniteError("gradient norm", th.inf, hint="The gradient's squares overflow: scale the rewards.")


def require_finite_parameters(policy: ActorCriticPolicy) -> None:
    """Check the parameters after a step.

    :raises NonFiniteError: naming the first parameter that is not finite
    """
    if not th.nn.utils.parameters_to_vector(policy.parameters()).isfinite().all():
        require_finite_policy(policy, hint=f"It was finite before the step. {_SMALLER_STEP}")
