"""Eligibility traces, the backward view of TD(lambda), and the gradients of single samples that they add up."""

from collections.abc import Sequence
from typing import Any

import torch as th

from sb3_pg.functional._check import check_shapes
from sb3_pg.functional.scan import scan


def eligibility_trace(gradients: th.Tensor, decay: th.Tensor, initial: th.Tensor | None = None) -> th.Tensor:
    r"""Decaying sum of the gradients of an episode's steps so far.

    .. math:: z_t = d_t\, z_{t-1} + g_t

    Source: Sutton and Barto (2018), eq. 12.5 for the critic, with :math:`g_t = \nabla_\phi V(s_t)`, and section 13.5
    for the actor, with :math:`g_t = \nabla_\theta \log \pi_\theta(a_t|s_t)`. d_t is :math:`\gamma \lambda` within an
    episode, and 0 in its first step. With constant parameters :math:`\sum_t \delta_t z_t` is then the forward view
    :math:`\sum_t (G_t^\lambda - V(s_t))\, g_t`, see :func:`~sb3_pg.functional.gae`.

    :param gradients: g_t, floating, shape ``(n_steps, n_envs, ...)``
    :param decay: d_t, shape ``(n_steps, n_envs)``. A trace that is not finite ends too where it is 0
    :param initial: z before the first step, shape ``(n_envs, ...)``; None for 0
    :return: z_t; shape, dtype and device of ``gradients``
    :raises ValueError: shapes that do not fit
    """
    if gradients.dim() < 2 or gradients.shape[:2] != decay.shape:
        raise ValueError(
            "gradients must have the shape (n_steps, n_envs, ...) and decay (n_steps, n_envs), got "
            f"{tuple(gradients.shape)} and {tuple(decay.shape)}"
        )
    decay = decay.to(gradients.dtype).view(*decay.shape, *(1,) * (gradients.dim() - 2))
    if initial is not None:
        check_shapes(gradients_of_one_step=gradients[0], initial=initial)
        first = gradients[:1] + th.where(decay[:1] == 0, 0.0, decay[:1] * initial)
        gradients = first if len(gradients) == 1 else th.cat((first, gradients[1:]))
    if len(gradients) == 1:
        return gradients
    return scan(gradients.flip(0), decay.expand_as(gradients).flip(0)).flip(0)


def row_gradients(outputs: th.Tensor, parameters: Sequence[th.Tensor], weights: th.Tensor | None = None) -> th.Tensor:
    r"""Gradient of each of several outputs.

    .. math:: g_i = w_i \nabla_\theta y_i

    The backward passes of all rows are one, by ``torch.func.vmap``, with the work of ``n_rows`` passes over the whole
    batch. Where vmap does not support an operation, there is one pass after the other. The graph is kept.

    :param outputs: y_i, with gradient, shape ``(n_rows,)``
    :param parameters: theta. One that the outputs do not depend on has the gradient 0
    :param weights: w_i, same shape; None for 1
    :return: shape ``(n_rows, n_parameters)``, the parameters flattened and concatenated in their order
    :raises ValueError: unequal shapes
    """
    check_shapes(outputs=outputs, weights=weights)
    n_rows = len(outputs)
    if not parameters or not outputs.requires_grad:
        return outputs.new_zeros((n_rows, sum(parameter.numel() for parameter in parameters)))
    seeds = th.ones_like(outputs) if weights is None else weights.to(outputs.dtype)
    if n_rows > 1:
        seeds = seeds.diag()
        try:
            return _rows(outputs, parameters, seeds, n_rows)
        except RuntimeError:
            return th.cat([_rows(outputs, parameters, seed) for seed in seeds])
    return _rows(outputs, parameters, seeds)


def _rows(outputs: th.Tensor, parameters: Sequence[th.Tensor], seeds: th.Tensor, n_rows: int = 1) -> th.Tensor:
    gradients: Any = th.autograd.grad(
        outputs, parameters, seeds, retain_graph=True, allow_unused=True, is_grads_batched=n_rows > 1
    )
    rows = [
        parameter.new_zeros((n_rows, parameter.numel())) if gradient is None else gradient.reshape(n_rows, -1)
        for parameter, gradient in zip(parameters, gradients, strict=True)
    ]
    return th.cat(rows, dim=1)
