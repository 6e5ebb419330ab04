r"""The average-reward objective: estimates for tasks that go on for ever, without a discount.

.. math:: J(\theta) = r(\pi_\theta) = \sum_s \mu_\theta(s) \sum_a \pi_\theta(a|s)\, r(s, a)

:math:`\mu_\theta` is the stationary distribution of the states. What an action is worth is measured against
:math:`r(\pi)`: the *differential* return is the sum of :math:`r_{t+k} - r(\pi)`, k = 0, 1, ... Its expectation, the
differential value, is known up to a constant. The policy gradient is :math:`\sum_s \mu(s) \sum_a \nabla \pi(a|s)\,
q(s, a)`. Source: Sutton and Barto (2018), sections 10.3 and 13.6.

Conventions are those of :mod:`sb3_pg.functional.returns`. An *end* is a step whose following state is not that of the
next row. A termination that leads to a reset is no end: the task goes on in the state after the reset.
"""

import torch as th

from sb3_pg.functional._check import check_shapes
from sb3_pg.functional.advantages import gae
from sb3_pg.functional.returns import zero_padding


def average_reward(rewards: th.Tensor, mask: th.Tensor | None = None, weights: th.Tensor | None = None) -> th.Tensor:
    r"""Mean reward of a batch, an estimate of r(pi).

    .. math:: \bar r = \frac{\sum_t w_t r_t}{\sum_t w_t}

    Source: Zhang and Ross (2021); Sutton and Barto (2018), eq. 13.15. With importance weights w_t it is
    the average under the policy that is trained, but for the states, which are those of the policies that acted.

    :param rewards: r_t, reward units, floating, ``(n_steps, n_envs)``
    :param mask: True where a step is valid, same shape; None for everywhere
    :param weights: w_t, at least 0 and not all of them 0, same shape; None for 1
    :return: reward units per step, a scalar
    :raises ValueError: unequal shapes
    """
    check_shapes(rewards=rewards, mask=mask, weights=weights)
    if weights is None and mask is None:
        return rewards.mean()
    weights = zero_padding(th.ones_like(rewards) if weights is None else weights, mask)
    return (weights * zero_padding(rewards, mask)).sum() / weights.sum()


def differential_gae(
    rewards: th.Tensor,
    values: th.Tensor,
    ends: th.Tensor,
    average_reward: float | th.Tensor,
    gae_lambda: float,
    bootstrap: th.Tensor | None = None,
    mask: th.Tensor | None = None,
) -> th.Tensor:
    r"""Generalized advantage estimation for the average reward.

    .. math:: A_t = \delta_t + \lambda (1 - e_t) A_{t+1}, \qquad
              \delta_t = r_t - \bar r + b_t + (1 - e_t) V(s_{t+1}) - V(s_t)

    Source: Sutton and Barto (2018), eq. 10.10; Zhang and Ross (2021). With :math:`\bar r = r(\pi)` and V the
    differential value of pi, its expectation is the advantage :math:`q(s_t, a_t) - V(s_t)` for any lambda. Nothing is
    discounted: with lambda near 1 the variance grows with the distance to the next end, or to the last row.

    :param rewards: r_t, reward units, floating, ``(n_steps, n_envs)``
    :param values: V(s_t), the differential value, reward units, same shape
    :param ends: e_t, same shape
    :param average_reward: r bar, reward units per step
    :param gae_lambda: lambda, in [0, 1]
    :param bootstrap: b_t, reward units, same shape
    :param mask: True where a step is valid, same shape
    :return: A_t, reward units; shape of ``rewards``; 0 in the padding
    :raises ValueError: unequal shapes, or lambda outside [0, 1]
    """
    return gae(rewards - average_reward, values, ends, 1.0, gae_lambda, bootstrap, mask)
