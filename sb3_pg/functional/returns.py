"""Returns: sums of the rewards that follow a step.

Every function takes time-major ``(n_steps, n_envs)`` tensors. Conventions, used throughout the package:

* ``ends`` (e_t) is True where step t is the last of its episode, terminated or truncated. The rows that follow in the
  same column belong to the next episode.
* ``bootstrap`` (b_t) is the value of the state that follows step t, if the episode was truncated there or the rollout
  ends there (last row); it is 0 elsewhere. Rewards themselves are never edited.
* ``mask`` is True where a step is valid. Padding (an environment that waits for the others) is ignored and comes out as
  0. The valid steps of a column come first; the last of them ends an episode, or has b_t.
"""

import torch as th

from sb3_pg.functional._check import check_fraction, check_shapes
from sb3_pg.functional.scan import scan


def rewards_and_decay(
    rewards: th.Tensor, ends: th.Tensor, gamma: float, bootstrap: th.Tensor | None, mask: th.Tensor | None
) -> tuple[th.Tensor, th.Tensor]:
    """r_t + gamma b_t and gamma (1 - e_t), the two sequences of the recurrence of every return.

    :raises ValueError: unequal shapes, or gamma outside [0, 1]
    """
    check_shapes(rewards=rewards, ends=ends, bootstrap=bootstrap, mask=mask)
    check_fraction("gamma", gamma)
    if bootstrap is not None:
        rewards = rewards + gamma * bootstrap
    return zero_padding(rewards, mask), gamma * (~ends.bool()).to(rewards.dtype)


def zero_padding(values: th.Tensor, mask: th.Tensor | None) -> th.Tensor:
    """The values, with 0 wherever the mask is False."""
    return values if mask is None else th.where(mask, values, 0.0)


def episode_starts(ends: th.Tensor) -> th.Tensor:
    """True where a step is the first of its episode, or of the column."""
    ended = ends.bool()
    return th.cat((th.ones_like(ended[:1]), ended[:-1]))


def reward_to_go(
    rewards: th.Tensor,
    ends: th.Tensor,
    gamma: float,
    bootstrap: th.Tensor | None = None,
    mask: th.Tensor | None = None,
) -> th.Tensor:
    r"""Discounted reward from each step to the end of its episode.

    .. math:: G_t = r_t + \gamma b_t + \gamma (1 - e_t) G_{t+1}

    Source: Sutton and Barto (2018), eq. 3.9 (their R_{t+1} is r_t here).

    :param rewards: r_t, reward units, floating, shape ``(n_steps, n_envs)``
    :param ends: e_t, same shape
    :param gamma: discount per env step, in [0, 1]
    :param bootstrap: b_t, reward units, same shape
    :param mask: True where a step is valid, same shape
    :return: G_t, reward units; shape, dtype and device of ``rewards``; 0 in the padding
    :raises ValueError: unequal shapes, or gamma outside [0, 1]
    """
    x, decay = rewards_and_decay(rewards, ends, gamma, bootstrap, mask)
    return zero_padding(scan(x, decay), mask)


def total_return(rewards: th.Tensor, ends: th.Tensor, gamma: float, mask: th.Tensor | None = None) -> th.Tensor:
    r"""Discounted return of the whole episode, at each of its steps.

    .. math:: R = \sum_{t'=0}^{T-1} \gamma^{t'} r_{t'}

    Source: Williams (1992), the episodic REINFORCE of section 5. Every column must start with an episode's first
    step. An episode that the rollout cuts counts with the rewards it has so far.

    :param rewards: r_t, reward units, floating, shape ``(n_steps, n_envs)``
    :param ends: e_t, same shape
    :param gamma: discount per env step, in [0, 1]
    :param mask: True where a step is valid, same shape
    :return: R of the episode that step t belongs to; shape of ``rewards``; 0 in the padding
    :raises ValueError: unequal shapes, or gamma outside [0, 1]
    """
    to_go = reward_to_go(rewards, ends, gamma, mask=mask)
    starts = episode_starts(ends)
    # The same recurrence on the flipped time axis carries the value at the episode's start forwards.
    carried = scan(th.where(starts, to_go, 0.0).flip(0), (~starts).to(to_go.dtype).flip(0)).flip(0)
    return zero_padding(carried, mask)


def n_step_return(
    rewards: th.Tensor,
    values: th.Tensor,
    ends: th.Tensor,
    gamma: float,
    n: int,
    bootstrap: th.Tensor | None = None,
    mask: th.Tensor | None = None,
) -> th.Tensor:
    r"""Sum of n discounted rewards, then the value of the state reached.

    .. math:: G_t^{(n)} = \sum_{k=0}^{n-1} \gamma^k r_{t+k} + \gamma^n V(s_{t+n})

    Source: Sutton and Barto (2018), eq. 7.1. (The lecture's slides print the sum up to t+n; t+n-1 is right, since
    V(s_{t+n}) already counts r_{t+n}.) If the episode ends within n steps, the return ends there, with the value b_t if
    the episode was truncated. If the rollout ends within n steps, the return ends there, with the value b_t.

    :param rewards: r_t, reward units, floating, shape ``(n_steps, n_envs)``
    :param values: V(s_t), reward units, same shape
    :param ends: e_t, same shape
    :param gamma: discount per env step, in [0, 1]
    :param n: number of rewards, at least 1
    :param bootstrap: b_t, reward units, same shape
    :param mask: True where a step is valid, same shape
    :return: the n-step return; shape of ``rewards``; 0 in the padding
    :raises ValueError: unequal shapes, gamma outside [0, 1], or n < 1
    """
    check_shapes(rewards=rewards, values=values)
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    x, decay = rewards_and_decay(rewards, ends, gamma, bootstrap, mask)
    decay = th.cat((decay[:-1], th.zeros_like(decay[-1:])))
    # Windows of length 2^k are composed along the binary digits of n. An n beyond the rollout changes nothing.
    result, result_decay = th.zeros_like(x), th.ones_like(x)
    length, n = 0, min(n, x.shape[0])
    window, window_decay, window_length = x, decay, 1
    while n:
        if n & 1:
            result = result + result_decay * shift(window, length)
            result_decay = result_decay * shift(window_decay, length)
            length += window_length
        window = window + window_decay * shift(window, window_length)
        window_decay = window_decay * shift(window_decay, window_length)
        window_length *= 2
        n >>= 1
    return zero_padding(result + result_decay * shift(zero_padding(values, mask), length), mask)


def shift(x: th.Tensor, n: int) -> th.Tensor:
    """x_{t+n}, with zeros beyond the end."""
    if n == 0:
        return x
    return th.cat((x[n:], th.zeros_like(x[:n])))


def lambda_return(
    rewards: th.Tensor,
    values: th.Tensor,
    ends: th.Tensor,
    gamma: float,
    gae_lambda: float,
    bootstrap: th.Tensor | None = None,
    mask: th.Tensor | None = None,
) -> th.Tensor:
    r"""Exponentially weighted mixture of all n-step returns.

    .. math:: G_t^\lambda = r_t + \gamma b_t + \gamma (1 - e_t) \left[(1 - \lambda) V(s_{t+1})
              + \lambda G_{t+1}^\lambda\right]

    Source: Sutton and Barto (2018), eq. 12.2 in the recursive form of exercise 12.1. Equal to GAE plus V(s_t).

    :param rewards: r_t, reward units, floating, shape ``(n_steps, n_envs)``
    :param values: V(s_t), reward units, same shape
    :param ends: e_t, same shape
    :param gamma: discount per env step, in [0, 1]
    :param gae_lambda: lambda, in [0, 1]: 0 is TD(0), 1 the reward-to-go
    :param bootstrap: b_t, reward units, same shape
    :param mask: True where a step is valid, same shape
    :return: the lambda-return; shape of ``rewards``; 0 in the padding
    :raises ValueError: unequal shapes, gamma or lambda outside [0, 1]
    """
    check_shapes(rewards=rewards, values=values)
    check_fraction("gae_lambda", gae_lambda)
    if gae_lambda == 1:
        return reward_to_go(rewards, ends, gamma, bootstrap, mask)
    x, decay = rewards_and_decay(rewards, ends, gamma, bootstrap, mask)
    next_values = shift(zero_padding(values, mask), 1)
    return zero_padding(scan(x + (1.0 - gae_lambda) * decay * next_values, gae_lambda * decay), mask)
