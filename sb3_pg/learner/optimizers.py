"""Optimizer steps in few operations: torch's numbers in less time, which small networks profit from."""

from collections.abc import Callable
from typing import Any

import torch as th

from sb3_pg import compat


def with_fewer_operations(optimizer: th.optim.Optimizer) -> th.optim.Optimizer:
    """The same optimizer, or one that takes the same steps faster.

    :param optimizer: one that has not taken a step yet
    :return: torch's RMSprop as :class:`FlatRMSprop`, torch's Adam in its fused form, any other as it is
    """
    groups = optimizer.param_groups
    parameters = [parameter for group in groups for parameter in group["params"]]
    if not all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters):
        return optimizer
    if type(optimizer) is th.optim.RMSprop:
        optimizer.__class__ = FlatRMSprop  # its groups, hooks and schedulers stay
    elif type(optimizer) is th.optim.Adam:
        for group in groups:
            free = not (group["differentiable"] or group["capturable"])
            if free and group["foreach"] is None and group.get("fused") is None:
                group["fused"] = True
    return optimizer


class FlatRMSprop(th.optim.RMSprop):
    r"""RMSprop on one flat vector.

    .. math:: v \leftarrow \alpha v + (1 - \alpha) g^2, \quad
              \theta \leftarrow \theta - \eta\, g / (\sqrt v + \epsilon)

    Source: Tieleman and Hinton (2012). Arguments and ``state_dict`` are those of :class:`torch.optim.RMSprop`, which
    takes the step itself where there is more to it: momentum, centering, weight decay, parameters without gradient.
    """

    @th.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """As torch's."""
        if closure is not None or not all(map(_is_plain, self.param_groups)):
            step: Any = th.optim.RMSprop.step
            return getattr(step, "__wrapped__", step)(self, closure)  # without the hooks, which this step has called
        for index, group in enumerate(self.param_groups):
            parameters = group["params"]
            square_avg, steps = self._flat_state(index, parameters)
            gradient = compat.flatten([parameter.grad for parameter in parameters])
            steps.add_(1)
            square_avg.mul_(group["alpha"]).addcmul_(gradient, gradient, value=1 - group["alpha"])
            step_ = gradient / square_avg.sqrt().add_(group["eps"])
            compat.add_all(parameters, compat.unflatten(step_, parameters), alpha=-float(group["lr"]))
        return None

    def _flat_state(self, index: int, parameters: list[th.nn.Parameter]) -> tuple[th.Tensor, th.Tensor]:
        """``square_avg`` and ``step`` of all parameters, whose views ``state`` holds; made anew if it was replaced."""
        known: dict[int, Any] = vars(self).setdefault("_flat", {})  # a copied or unpickled optimizer has none
        state = known.get(index)
        if state is None or [id(self.state[p]) for p in parameters] != state[2]:
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter] = {"step": th.zeros(()), "square_avg": th.zeros_like(parameter)}
            square_avg = th.cat([self.state[parameter]["square_avg"].flatten() for parameter in parameters])
            steps = th.stack([self.state[parameter]["step"] for parameter in parameters])
            parts = compat.unflatten(square_avg, parameters)
            for parameter, step, average in zip(parameters, steps, parts, strict=True):
                self.state[parameter] = {"step": step, "square_avg": average}
            held = [self.state[parameter] for parameter in parameters]
            state = known[index] = square_avg, steps, [id(part) for part in held], held
        return state[0], state[1]


def _is_plain(group: dict[str, Any]) -> bool:
    """Whether the step is the formula alone, on dense tensors of one kind."""
    names = ("momentum", "centered", "weight_decay", "maximize", "capturable", "differentiable")
    parameters, first = group["params"], group["params"][0]
    return not any(group[name] for name in names) and all(
        p.grad is not None and p.dtype == first.dtype and p.device == first.device for p in parameters
    )


# torch puts the calls of hooks around a class's ``step`` when it makes the first optimizer of the class.
FlatRMSprop([th.nn.Parameter(th.zeros(1))])
