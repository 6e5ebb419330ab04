"""Losses, scalars to minimize. They take flat samples, or ``(n_steps, n_envs)`` tensors with a validity mask."""

import torch as th
from torch.nn.functional import mse_loss

from sb3_pg.functional._check import check_shapes


def policy_gradient_loss(
    log_prob: th.Tensor, advantages: th.Tensor, mask: th.Tensor | None = None, n_episodes: int | None = None
) -> th.Tensor:
    r"""The pseudo-loss whose gradient is minus the policy gradient, by one backward pass.

    .. math:: L(\theta) = -\frac{1}{N} \sum_{i=1}^{N} \sum_t \log \pi_\theta(a_{i,t} | s_{i,t})\, \hat A_{i,t}

    Source: Williams (1992), eq. 11; as a surrogate loss in the CS 224R and CS 285 lectures on policy gradients.

    :param log_prob: log pi(a_t | s_t), nats, with gradient
    :param advantages: advantage of each action, reward units, same shape; treated as a constant
    :param mask: True where a sample is valid, same shape
    :param n_episodes: N, the number of complete episodes: sum over time, mean over episodes; None: mean over samples
    :return: a scalar
    :raises ValueError: unequal shapes, or n_episodes < 1
    """
    check_shapes(log_prob=log_prob, advantages=advantages)
    return -reduce_actor(log_prob * advantages.detach(), mask, n_episodes)


def behavior_cloning_loss(log_prob: th.Tensor, mask: th.Tensor | None = None) -> th.Tensor:
    r"""Mean negative log-probability of demonstrated actions. Its minimum is the maximum-likelihood policy.

    .. math:: L(\theta) = -\frac{1}{M} \sum_t \log \pi_\theta(a_t | s_t)

    It is :func:`policy_gradient_loss` with an advantage of 1 at every step. So its gradient is minus the policy
    gradient of actions that all have the return 1: behavior cloning makes every action more likely, the policy gradient
    makes it so in proportion to its return. Source: the CS 224R lecture and the slides on policy gradients ("Policy
    Gradient Vs Maximum Likelihood").

    :param log_prob: log pi(a_t | s_t) of the demonstrated actions, nats, with gradient
    :param mask: True where a sample is valid, same shape
    :return: a scalar, nats
    :raises ValueError: unequal shapes
    """
    return policy_gradient_loss(log_prob, th.ones_like(log_prob), mask)


def reduce_actor(per_step: th.Tensor, mask: th.Tensor | None = None, n_episodes: int | None = None) -> th.Tensor:
    """Reduce per-step actor terms: sum over time and mean over episodes, or mean over steps.

    :param per_step: one number per step
    :param mask: True where a step is valid, same shape
    :param n_episodes: number of complete episodes, or None for the mean over steps
    :return: a scalar
    :raises ValueError: unequal shapes, or n_episodes < 1
    """
    check_shapes(per_step=per_step, mask=mask)
    if n_episodes is not None and n_episodes < 1:
        raise ValueError(f"n_episodes must be at least 1, got {n_episodes}")
    if mask is not None:
        per_step = per_step[mask]
    return per_step.mean() if n_episodes is None else per_step.sum() / n_episodes


def value_loss(values: th.Tensor, targets: th.Tensor, mask: th.Tensor | None = None) -> th.Tensor:
    r"""Mean squared error of the critic.

    .. math:: L(\phi) = \frac{1}{M} \sum_t (V_\phi(s_t) - y_t)^2

    The lecture has a factor 1/2. It is left out here, as in SB3's A2C, so that ``vf_coef`` means the same.

    :param values: V(s_t), reward units, with gradient
    :param targets: y_t, reward units, same shape; treated as a constant
    :param mask: True where a sample is valid, same shape
    :return: a scalar
    :raises ValueError: unequal shapes
    """
    check_shapes(values=values, targets=targets, mask=mask)
    if mask is not None:
        values, targets = values[mask], targets[mask]
    return mse_loss(values, targets.detach())
