"""Advantages: how much better an action was than expected. Conventions as in :mod:`sb3_pg.functional.returns`."""

import torch as th

from sb3_pg.functional.returns import lambda_return, n_step_return, zero_padding


def td_residual(
    rewards: th.Tensor,
    values: th.Tensor,
    ends: th.Tensor,
    gamma: float,
    bootstrap: th.Tensor | None = None,
    mask: th.Tensor | None = None,
) -> th.Tensor:
    r"""One-step temporal-difference error, the actor-critic advantage.

    .. math:: \delta_t = r_t + \gamma b_t + \gamma (1 - e_t) V(s_{t+1}) - V(s_t)

    Source: Sutton and Barto (2018), eq. 6.5.

    :param rewards: r_t, reward units, floating, shape ``(n_steps, n_envs)``
    :param values: V(s_t), reward units, same shape
    :param ends: e_t, same shape
    :param gamma: discount per env step, in [0, 1]
    :param bootstrap: b_t, reward units, same shape
    :param mask: True where a step is valid, same shape
    :return: delta_t, reward units; shape of ``rewards``; 0 in the padding
    :raises ValueError: unequal shapes, or gamma outside [0, 1]
    """
    return n_step_return(rewards, values, ends, gamma, 1, bootstrap, mask) - zero_padding(values, mask)


def gae(
    rewards: th.Tensor,
    values: th.Tensor,
    ends: th.Tensor,
    gamma: float,
    gae_lambda: float,
    bootstrap: th.Tensor | None = None,
    mask: th.Tensor | None = None,
) -> th.Tensor:
    r"""Generalized advantage estimation.

    .. math:: A_t = \delta_t + \gamma \lambda (1 - e_t) A_{t+1} = G_t^\lambda - V(s_t)

    Source: Schulman et al. (2016), eq. 16.

    :param rewards: r_t, reward units, floating, shape ``(n_steps, n_envs)``
    :param values: V(s_t), reward units, same shape
    :param ends: e_t, same shape
    :param gamma: discount per env step, in [0, 1]
    :param gae_lambda: lambda, in [0, 1]: 0 is the TD residual, 1 the reward-to-go minus V
    :param bootstrap: b_t, reward units, same shape
    :param mask: True where a step is valid, same shape
    :return: A_t, reward units; shape of ``rewards``; 0 in the padding
    :raises ValueError: unequal shapes, gamma or lambda outside [0, 1]
    """
    return lambda_return(rewards, values, ends, gamma, gae_lambda, bootstrap, mask) - zero_padding(values, mask)


def normalize(
    x: th.Tensor, mask: th.Tensor | None = None, epsilon: float = 1e-8, tolerance: th.Tensor | None = None
) -> th.Tensor:
    r"""Shift to mean 0 and scale to standard deviation 1 (the unbiased one, as SB3 does).

    .. math:: (x - \bar x) / (\sigma_x + \epsilon)

    Fewer than two samples, or samples that are all equal, are returned unchanged. So are samples whose standard
    deviation is at most ``tolerance``: scaling would turn their rounding errors into a signal.

    :param x: any shape, floating
    :param mask: True where an element is valid, same shape; None means everywhere
    :param epsilon: added to the standard deviation
    :param tolerance: largest standard deviation that counts as rounding error, for x that is a difference of numbers
    :return: same shape; 0 in the padding
    """
    if x.numel() == 0:
        return x
    if mask is None:
        count, low, high = x.new_tensor(x.numel()), x.amin(), x.amax()
    else:
        x = th.where(mask, x, 0.0)
        count = mask.sum().to(x.dtype)
        low, high = th.where(mask, x, th.inf).amin(), th.where(mask, x, -th.inf).amax()
    mean = x.sum() / count.clamp(min=1)
    centered = x - mean if mask is None else th.where(mask, x - mean, 0.0)
    std = (centered.square().sum() / (count - 1).clamp(min=1)).sqrt()
    spread = high > low
    if tolerance is not None:
        spread &= std > tolerance
    return th.where(spread, centered / (std + epsilon), x)


def rounding(returns: th.Tensor, advantages: th.Tensor) -> th.Tensor:
    """Rounding error of advantages that are differences of returns and a network's values, in single precision.

    It is 0 if a number is not finite.

    :param returns: reward units, any shape
    :param advantages: reward units, same shape
    :return: reward units, a scalar
    """
    largest = th.maximum(returns.abs().amax(), (returns - advantages).abs().amax())
    return largest.where(largest.isfinite(), 0.0) * th.finfo(th.float32).eps
