"""Checks of an update, and what undoes it: a number that is not finite goes no further."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy

from sb3_pg.errors import NonFiniteError
from sb3_pg.policies import policy_cache
from sb3_pg.rollout import RolloutBatch, require_finite_policy

_SMALLER_STEP = "A smaller learning rate may help."
#: The gradient of a Gaussian's density contains std^4. Single precision covers e^-87 to e^88.
_LARGEST_LOG_STD = 20.0


@contextmanager
def unchanged_if_nonfinite(policy: BasePolicy, *optimizers: th.optim.Optimizer) -> Iterator[None]:
    """Put parameters and buffers back as they were, to the bit, if the body raises, or leaves one of them not finite.

    :param policy: one of SB3's, its cache brought up to date by ``set_training_mode``
    :param optimizers: what the body steps with
    :raises NonFiniteError: naming the first parameter that is not finite
    """
    before = policy_cache(policy).snapshot()
    try:
        yield
        require_finite_parameters(policy)
    except BaseException as error:
        before.restore()
        for optimizer in optimizers:
            forget_nonfinite(optimizer)
        if isinstance(error, NonFiniteError):
            require_finite_policy(policy, error)  # the parameters may have been wrong before
        raise


@contextmanager
def frozen(optimizer: th.optim.Optimizer) -> Iterator[None]:
    """Context in which no parameter of an optimizer requires a gradient."""
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def nonfinite_gradient(policy: ActorCriticPolicy, batch: RolloutBatch) -> NonFiniteError:
    """Return the error for a gradient that is not finite: it names the batch's first such number, or the parameter."""
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


def require_log_probs(policy: ActorCriticPolicy, log_probs: th.Tensor, valid: th.Tensor) -> None:
    """Check log-probs: each must be a number, or -inf for an action that the policy never takes.

    :param log_probs: nats, ``(n_steps, n_envs)``
    :param valid: True where a log-prob counts, same shape
    :raises NonFiniteError: naming the parameter that is not finite, or the first log-prob that is NaN or +inf
    """
    bad = ((log_probs.isnan() | log_probs.isposinf()) & valid).nonzero()
    if len(bad):
        require_finite_policy(policy)
        step, env = bad[0].tolist()
        raise NonFiniteError("log_prob", float(log_probs[step, env]), env, step)


def require_usable_std(policy: th.nn.Module, policy_kwargs: Mapping[str, Any], use_sde: bool) -> None:
    """Check the standard deviation that a new policy starts with.

    :param policy: an actor-critic policy, or an actor
    :param policy_kwargs: with or without ``log_std_init``
    :param use_sde: gSDE, which adds to a small standard deviation
    :raises ValueError: a Gaussian's density, or the gradient of it, would overflow in single precision
    """
    log_std = getattr(policy, "log_std", None)
    if "log_std_init" not in policy_kwargs or not isinstance(log_std, th.nn.Parameter):
        return
    large = _LARGEST_LOG_STD
    if not ((log_std <= large) & (use_sde | (log_std >= -large))).all():
        allowed = f"at most {large:g}" if use_sde else f"in [{-large:g}, {large:g}]"
        raise ValueError(
            f"policy_kwargs['log_std_init'] must be {allowed}, got {policy_kwargs['log_std_init']}: the standard "
            "deviation of the actions is exp(log_std_init)"
        )


def require_finite_parameters(policy: BasePolicy) -> None:
    """Check the parameters after a step.

    :raises NonFiniteError: naming the first parameter that is not finite
    """
    if not policy_cache(policy).snapshot().is_finite():
        require_finite_policy(policy, hint=f"It was finite before the step. {_SMALLER_STEP}")


def forget_nonfinite(optimizer: th.optim.Optimizer | None) -> None:
    """Reset an optimizer's statistics of the parameters for which a failed update has made them inf or NaN."""
    if optimizer is None:
        return
    for parameter, state in list(optimizer.state.items()):
        if not all(value.isfinite().all() for value in state.values() if isinstance(value, th.Tensor)):
            del optimizer.state[parameter]
