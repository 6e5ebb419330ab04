"""Checks of an update, and what undoes it: a number that is not finite goes no further."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import is_
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy

from sb3_pg.errors import NonFiniteError
from sb3_pg.policies import policy_cache
from sb3_pg.rollout import RolloutBatch, require_finite_policy

_SMALLER_STEP = "A smaller learning rate may help."
#: The gradient of a Gaussian's density contains std^4. Single precision covers e^-87 to e^88.
_LARGEST_LOG_STD = 20.0


@contextmanager
def undone_on_failure(policy: BasePolicy, *optimizers: th.optim.Optimizer) -> Iterator[None]:
    """Context that puts a policy and its optimizers back as they were if it fails, or leaves a parameter not finite.

    :param policy: one of SB3's, its cache brought up to date by ``set_training_mode``
    :param optimizers: all optimizers that take steps in the context
    :raises NonFiniteError: naming the first parameter that is not finite
    """
    before, statistics = policy_cache(policy).snapshot(), OptimizerSnapshot(*optimizers)
    try:
        yield
        require_finite_parameters(policy)
    except BaseException as error:
        before.restore()
        statistics.restore()
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


def nonfinite_gradient(
    policy: ActorCriticPolicy, batch: RolloutBatch, metrics: Mapping[str, th.Tensor | float] | None = None
) -> NonFiniteError:
    """Return the error for a gradient that is not finite: it names the first such number.

    :param policy: its parameters may have gradients
    :param batch: what the gradient was computed from
    :param metrics: of the update. The penalty of an anchor among them may be what is not finite
    """
    for name, tensor in (("advantage", batch.advantages), ("log_prob", batch.log_probs), ("value", batch.values)):
        if tensor is None:
            continue
        bad = (~tensor.isfinite() & batch.valid).nonzero()
        if len(bad):
            step, env = bad[0].tolist()
            return NonFiniteError(name, float(tensor[step, env]), env, step)
    for name, value in (metrics or {}).items():
        if name.startswith("anchor/") and not math.isfinite(penalty := float(th.as_tensor(value).detach())):
            return NonFiniteError(name, penalty, hint="The policy never takes an action that the anchor asks for.")
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


class OptimizerSnapshot:
    """A copy of what optimizers remember of earlier gradients, such as Adam's averages.

    :param optimizers: optimizers; None is left out
    """

    def __init__(self, *optimizers: th.optim.Optimizer | None) -> None:
        self._copies = [
            (optimizer, statistics, [th.cat(group) for group in statistics.groups])
            for optimizer in optimizers
            if optimizer is not None
            for statistics in [_statistics(optimizer)]
        ]

    def restore(self) -> None:
        """Put the statistics back; those of a parameter that are not finite are forgotten."""
        for optimizer, (_, states, groups), copies in self._copies:
            for group, copy in zip(groups, copies, strict=True):
                for tensor, value in zip(group, copy.split([len(tensor) for tensor in group]), strict=True):
                    tensor.copy_(value)
            optimizer.state.clear()
            optimizer.state.update({parameter: dict(state) for parameter, state in states.items() if _is_finite(state)})


class _Statistics(NamedTuple):
    """What an optimizer remembers.

    :param values: all values, to notice when one is replaced
    :param states: parameter -> name -> value
    :param groups: the tensors as vectors of the same memory, one list for each dtype and device
    """

    values: list[Any]
    states: dict[th.Tensor, dict[str, Any]]
    groups: list[list[th.Tensor]]


#: Steps change the tensors in place, so they are looked for once: this takes longer than to copy them.
_KNOWN: WeakKeyDictionary[th.optim.Optimizer, _Statistics] = WeakKeyDictionary()


def _statistics(optimizer: th.optim.Optimizer) -> _Statistics:
    values = [value for state in optimizer.state.values() for value in state.values()]
    known = _KNOWN.get(optimizer)
    if known is None or len(values) != len(known.values) or not all(map(is_, values, known.values)):
        groups = defaultdict(list)
        for tensor in values:
            if isinstance(tensor, th.Tensor):
                groups[tensor.dtype, tensor.device].append(tensor.detach().as_strided((tensor.numel(),), (1,)))
        states = {parameter: dict(state) for parameter, state in optimizer.state.items()}
        known = _KNOWN[optimizer] = _Statistics(values, states, list(groups.values()))
    return known


def _is_finite(state: Mapping[str, Any]) -> bool:
    return all(value.isfinite().all() for value in state.values() if isinstance(value, th.Tensor))
