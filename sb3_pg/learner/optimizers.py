"""Clipping and steps in a few operations on all parameters: torch's numbers, and less time, which small nets feel."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch as th
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks


def clip_gradient(parameters: list[th.nn.Parameter], max_norm: float | None) -> th.Tensor:
    """Scale the gradient down to a norm, as :func:`torch.nn.utils.clip_grad_norm_` does.

    :param parameters: those without a gradient are left out
    :param max_norm: largest norm, None to scale nothing
    :return: the norm before
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if len({(gradient.dtype, gradient.device) for gradient in gradients}) != 1:  # none at all, or a mixture
        return th.nn.utils.clip_grad_norm_(parameters, max_norm or th.inf).to(parameters[0].device)
    norm: th.Tensor = th.linalg.vector_norm(_flatten_dense_tensors(gradients))
    if max_norm is not None and max_norm < th.inf:
        th._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def with_fewer_operations(optimizer: th.optim.Optimizer) -> th.optim.Optimizer:
    """The same optimizer, or one of the same arguments for the same parameters that takes the same steps faster.

    :param optimizer: one that has not taken a step yet
    :return: torch's RMSprop as :class:`FlatRMSprop`, torch's Adam as its fused form; any other, and one that somebody
        has set up group by group or listens to, as it is
    """
    arguments, parameters = optimizer.defaults, optimizer.param_groups[0]["params"]
    plain = len(optimizer.param_groups) == 1 and all(
        optimizer.param_groups[0][name] == value for name, value in arguments.items()
    )
    if not plain or _has_hooks(optimizer) or "step" in vars(optimizer):  # as learning rate schedulers do
        return optimizer
    if not all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters):
        return optimizer
    if type(optimizer) is th.optim.RMSprop:
        return FlatRMSprop(parameters, **arguments)
    chosen = arguments.get("fused") is None and arguments.get("foreach") is None
    if type(optimizer) is th.optim.Adam and chosen and not (arguments["differentiable"] or arguments["capturable"]):
        return th.optim.Adam(parameters, **{**arguments, "fused": True})
    return optimizer


def _has_hooks(optimizer: th.optim.Optimizer) -> bool:
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return bool(own or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)


class _State(NamedTuple):
    """RMSprop's state of one parameter group: flat, and the views of it that the optimizer's ``state`` holds."""

    square_avg: th.Tensor
    steps: th.Tensor
    parts: list[dict[str, th.Tensor]]


class FlatRMSprop(th.optim.RMSprop):
    r"""RMSprop on one flat vector.

    .. math:: v \leftarrow \alpha v + (1 - \alpha) g^2, \quad
              \theta \leftarrow \theta - \eta\, g / (\sqrt v + \epsilon)

    Source: Tieleman and Hinton (2012). Arguments and ``state_dict`` are :class:`torch.optim.RMSprop`'s, which takes the
    step itself where momentum, centering, weight decay or a parameter without gradient are in play.
    """

    @th.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """As torch's."""
        if closure is not None or _has_hooks(self) or not all(map(_is_simple, self.param_groups)):
            loss: float | None = _step_of_torch(self, closure)
            return loss
        for index, group in enumerate(self.param_groups):
            parameters = group["params"]
            state = self._flat_state(index, parameters)
            gradient = _flatten_dense_tensors([parameter.grad for parameter in parameters])
            state.steps.add_(1)
            state.square_avg.mul_(group["alpha"]).addcmul_(gradient, gradient, value=1 - group["alpha"])
            step = gradient / state.square_avg.sqrt().add_(group["eps"])
            th._foreach_add_(parameters, _unflatten_dense_tensors(step, parameters), alpha=-float(group["lr"]))
        return None

    step.hooked = True  # type: ignore[attr-defined]  # torch wraps what is not, and its own step is: hooks run once

    def _flat_state(self, index: int, parameters: list[th.nn.Parameter]) -> _State:
        """The state as flat vectors, made anew where somebody has replaced a part of it."""
        known: dict[int, _State] = vars(self).setdefault("_flat", {})  # a copied or unpickled optimizer has none
        state = known.get(index)
        if state is not None and len(state.parts) != len(parameters):
            state = None
        if state is None or any(self.state[p] is not part for p, part in zip(parameters, state.parts, strict=True)):
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter] = {"step": th.zeros(()), "square_avg": th.zeros_like(parameter)}
            square_avg = _flatten_dense_tensors([self.state[parameter]["square_avg"] for parameter in parameters])
            steps = th.stack([self.state[parameter]["step"] for parameter in parameters])
            for parameter, step, average in zip(
                parameters, steps, _unflatten_dense_tensors(square_avg, parameters), strict=True
            ):
                self.state[parameter] = {"step": step, "square_avg": average}
            state = known[index] = _State(square_avg, steps, [self.state[parameter] for parameter in parameters])
        return state


def _step_of_torch(optimizer: th.optim.RMSprop, closure: Callable[[], float] | None) -> Any:
    step: Any = th.optim.RMSprop.step
    if not hasattr(step, "hooked"):  # torch wraps it when the first RMSprop is made
        step = th.optim.Optimizer.profile_hook_step(step)
    return step(optimizer, closure)


def _is_simple(group: dict[str, Any]) -> bool:
    """Whether nothing but the formula is asked for, of dense tensors of one kind."""
    parameters = group["params"]
    first = parameters[0]
    return not (
        group["momentum"]
        or group["centered"]
        or group["weight_decay"]
        or group["maximize"]
        or group["capturable"]
        or group["differentiable"]
    ) and all(p.grad is not None and p.dtype == first.dtype and p.device == first.device for p in parameters)
