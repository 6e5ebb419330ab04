r"""Importance weights of samples that a behavior policy has collected, for the gradient of a target policy.

Conventions are those of :mod:`sb3_pg.functional.returns`. :math:`\rho_t = \pi(a_t|s_t) / \mu(a_t|s_t)`, where
:math:`\mu` is the policy that chose the action. Weights are kept as logarithms until :func:`importance_weights` turns
them into numbers, since a product over a thousand steps would overflow or underflow. They have no gradient.

============== =================================== ==================================================================
ratio          weight of step t                    the gradient estimate sum_t W_t score_t (G_t - b) is
============== =================================== ==================================================================
per_step       :math:`\rho_t`                      biased: states and later rewards are the behavior's (the slides'
                                                   first-order approximation)
prefix         :math:`\prod_{t' \le t} \rho_{t'}`  biased: the slides' "ignore this part", the later ratios inside the
                                                   reward-to-go
per_decision   as prefix                           unbiased: each reward in G_t has the ratios up to its own step
                                                   (Precup et al. 2000), see :func:`per_decision_return`
trajectory     :math:`\prod_{t'} \rho_{t'}`        unbiased: the whole episode's product
============== =================================== ==================================================================

With gSDE noise that is kept for several steps, the actions of an episode are not independent given the states, and
products of their ratios are approximate.
"""

import math

import torch as th

from sb3_pg.functional._check import check_positive, check_shapes
from sb3_pg.functional.precision import precise
from sb3_pg.functional.returns import episode_starts, rewards_and_decay, shift, zero_padding
from sb3_pg.functional.scan import scan

#: The forms of :func:`log_weights`.
RATIOS = ("per_step", "prefix", "per_decision", "trajectory")

# Logarithm of a ratio of 0. Its exponential is 0, and unlike sums of -inf, sums of it stay finite.
_LOG_ZERO = -1e6


def log_importance_ratio(log_prob: th.Tensor, behavior_log_prob: th.Tensor, mask: th.Tensor | None = None) -> th.Tensor:
    r"""Log rho_t, the logarithm of each action's importance ratio.

    :param log_prob: log pi(a_t|s_t) of the target policy, nats, floating, ``(n_steps, n_envs)``; -inf where it cannot
        take the action
    :param behavior_log_prob: log mu(a_t|s_t) of the policy that took it, same shape
    :param mask: True where a step is valid, same shape
    :return: same shape, double precision; 0 in the padding
    :raises ValueError: unequal shapes, or an undefined ratio: the behavior policy has probability 0 for its own action,
        or a log-prob is NaN or +inf
    """
    check_shapes(log_prob=log_prob, behavior_log_prob=behavior_log_prob, mask=mask)
    log_prob, behavior_log_prob = precise(log_prob.detach()), precise(behavior_log_prob.detach())
    undefined = log_prob.isnan() | log_prob.isposinf() | ~behavior_log_prob.isfinite()
    if mask is not None:
        undefined &= mask
    if undefined.any():
        step, env = _first(undefined)
        raise ValueError(
            f"importance ratio undefined at step {step} of column {env}: log_prob={log_prob[step, env].item()}, "
            f"behavior_log_prob={behavior_log_prob[step, env].item()}. The behavior policy must have a positive, "
            "finite probability for every action that it takes"
        )
    return zero_padding((log_prob - behavior_log_prob).clamp(min=_LOG_ZERO), mask)


def _first(bad: th.Tensor) -> tuple[int, int]:
    """Return step and column of the first True."""
    step, env = bad.nonzero()[0][:2].tolist()
    return step, env


def log_weights(
    log_ratio: th.Tensor, ends: th.Tensor, ratio: str = "per_step", mask: th.Tensor | None = None
) -> th.Tensor:
    """Log W_t of the table above.

    :param log_ratio: log rho_t of :func:`log_importance_ratio`, ``(n_steps, n_envs)``
    :param ends: e_t, True where step t is the last of its episode, same shape
    :param ratio: "per_step", "prefix", "per_decision" or "trajectory"
    :param mask: True where a step is valid, same shape
    :return: same shape, double precision; 0 in the padding
    :raises ValueError: unequal shapes, or an unknown ratio
    """
    check_shapes(log_ratio=log_ratio, ends=ends, mask=mask)
    if ratio not in RATIOS:
        raise ValueError(f"ratio must be one of {list(RATIOS)}, got {ratio!r}")
    logs = zero_padding(precise(log_ratio.detach()), mask)
    if ratio != "per_step":
        starts = episode_starts(ends)
        # Running sums are the recurrence on the flipped time axis.
        logs = scan(logs.flip(0), (~starts).to(logs).flip(0)).flip(0)
    if ratio == "trajectory":
        # The last running sum of each episode is carried back to all its steps.
        last = ends.bool().clone()
        last[-1] = True
        if mask is not None:
            last |= th.cat((mask[:-1] & ~mask[1:], last[-1:]))
        logs = scan(th.where(last, logs, 0.0), (~last).to(logs))
    return zero_padding(logs, mask)


def truncate(log_weights: th.Tensor, max_ratio: float | None) -> th.Tensor:
    r"""min(W_t, c), which lowers the variance and biases the gradient towards the behavior policy (Ionides 2008).

    :param log_weights: log W_t, any shape
    :param max_ratio: c, positive; None for no truncation
    :return: logarithms, same shape
    :raises ValueError: max_ratio is not positive
    """
    if max_ratio is None:
        return log_weights
    check_positive("max_ratio", max_ratio)
    return log_weights.clamp(max=math.log(max_ratio))


def truncated_fraction(log_weights: th.Tensor, max_ratio: float | None, mask: th.Tensor | None = None) -> th.Tensor:
    """Share of the weights that :func:`truncate` changes.

    :param log_weights: log W_t before truncation, any shape
    :param max_ratio: c, positive; None for no truncation
    :param mask: True where a weight counts, same shape
    :return: a scalar in [0, 1]
    :raises ValueError: unequal shapes, or max_ratio is not positive
    """
    check_shapes(log_weights=log_weights, mask=mask)
    logs = precise(log_weights.flatten() if mask is None else log_weights[mask])
    return precise(truncate(logs, max_ratio) < logs).mean()


def self_normalize(log_weights: th.Tensor, ends: th.Tensor, mask: th.Tensor | None = None) -> th.Tensor:
    r"""Weights divided by their mean over the N episodes at the same step within the episode.

    .. math:: \tilde W^i_t = W^i_t \Big/ \frac{1}{N} \sum_{j=1}^N W^j_{\min(t, T_j - 1)}

    Source: Thomas (2015), chapter 3, the consistent weighted per-decision estimator. After its end, an episode counts
    with its last weight, so that the denominator is over all N episodes at every step. For products of ratios the
    denominator has expectation 1: the estimate is biased by O(1/N), and consistent. With a denominator over only the
    episodes still running it would not be consistent. For single ratios ("per_step") the expectation is only near 1,
    since they are correlated with the episode's end. Weights that are all 0 stay 0.

    :param log_weights: log W_t, ``(n_steps, n_envs)``
    :param ends: True where step t is the last of its episode, same shape
    :param mask: True where a step is valid, same shape
    :return: logarithms, same shape; 0 in the padding
    :raises ValueError: unequal shapes
    """
    check_shapes(log_weights=log_weights, ends=ends, mask=mask)
    valid = th.ones_like(ends, dtype=th.bool) if mask is None else mask
    starts = episode_starts(ends) & valid
    # Transposed, so that the steps of an episode are adjacent.
    logs, kept = log_weights.T[valid.T], valid.T
    episode = starts.T[kept].cumsum(0) - 1
    first = starts.T[kept].nonzero().flatten()
    step = th.arange(len(logs), device=logs.device) - first[episode]
    lengths = th.bincount(episode, minlength=len(first))
    rows = th.arange(int(lengths.max()), device=logs.device).unsqueeze(1).minimum(lengths - 1)
    frozen = logs[first + rows]  # (longest episode, n_episodes)
    log_mean = frozen.logsumexp(1) - math.log(len(first))
    log_mean = log_mean.where(log_mean > _LOG_ZERO / 2, 0.0)  # weights that are all 0 stay 0
    normalized = th.zeros_like(log_weights.T)
    normalized[kept] = logs - log_mean[step]
    return normalized.T


def importance_weights(log_weights: th.Tensor) -> th.Tensor:
    """W_t as numbers.

    :param log_weights: ``(n_steps, n_envs)``, double precision
    :return: same shape and precision
    :raises OverflowError: a weight is too large for a floating-point number
    """
    weights: th.Tensor = log_weights.exp()
    if not weights.isfinite().all():
        step, env = _first(~weights.isfinite())
        raise OverflowError(
            f"importance weight exp({log_weights[step, env].item():.6g}) at step {step} of column {env} is too large "
            "for a floating-point number: truncate it with max_ratio, or use ratio='per_step'"
        )
    return weights


def require_representable(name: str, result: th.Tensor, given: th.Tensor) -> th.Tensor:
    """Require that finite numbers are still finite after they were weighted.

    :param name: name of the result in the error's message
    :param result: ``(n_steps, n_envs)``
    :param given: the numbers before they were weighted, same shape
    :return: ``result``
    :raises OverflowError: ``given`` is finite, and ``result`` is not
    """
    if not result.isfinite().all() and given.isfinite().all():
        step, env = _first(~result.isfinite())
        raise OverflowError(
            f"{name} at step {step} of column {env} is too large for a floating-point number because of the importance "
            "ratios of later steps: bound them, or use ratio='per_step'"
        )
    return result


def effective_sample_size(log_weights: th.Tensor, mask: th.Tensor | None = None) -> th.Tensor:
    r"""Number of equally weighted samples that give the same variance, between 1 and the number of samples.

    .. math:: \mathrm{ESS} = \Big(\sum_i w_i\Big)^2 \Big/ \sum_i w_i^2

    Source: Kish (1965); for importance sampling, Kong (1992). Computed with logsumexp, so that no weight overflows.

    :param log_weights: log w_i, any shape
    :param mask: True where a weight counts, same shape
    :return: a scalar
    :raises ValueError: unequal shapes
    """
    check_shapes(log_weights=log_weights, mask=mask)
    logs = precise(log_weights.flatten() if mask is None else log_weights[mask])
    return (2 * logs.logsumexp(0) - (2 * logs).logsumexp(0)).exp().clamp(1, len(logs))


def per_decision_return(
    rewards: th.Tensor,
    log_weights: th.Tensor,
    ends: th.Tensor,
    gamma: float,
    bootstrap: th.Tensor | None = None,
    mask: th.Tensor | None = None,
) -> th.Tensor:
    r"""Reward-to-go whose rewards are weighted with the importance ratios of the steps after t, up to their own.

    .. math:: G^\rho_t = \sum_{t' \ge t} \gamma^{t'-t} r_{t'} \prod_{t''=t+1}^{t'} \rho_{t''}
              = r_t + \gamma b_t + \gamma (1 - e_t) \frac{W_{t+1}}{W_t} G^\rho_{t+1}

    Source: Precup et al. (2000). (The lecture's slides print the inner product from t''=t, which counts
    rho_t twice, since the score's weight W_t has it already; t+1 is right.) Ratios of one give the reward-to-go.

    :param rewards: r_t, reward units, ``(n_steps, n_envs)``
    :param log_weights: log W_t of the "per_decision" form, may be truncated or normalized, same shape
    :param ends: e_t, same shape
    :param gamma: discount per env step, in [0, 1]
    :param bootstrap: b_t, the value that follows step t, reward units, same shape
    :param mask: True where a step is valid, same shape
    :return: G^rho_t without the factor W_t, reward units; same shape and dtype; 0 in the padding
    :raises ValueError: unequal shapes, or gamma outside [0, 1]
    :raises OverflowError: a product of ratios is too large for a floating-point number
    """
    check_shapes(rewards=rewards, log_weights=log_weights)
    x, decay = rewards_and_decay(precise(rewards), ends, gamma, bootstrap, mask)
    follows = ~ends.bool()
    follows[-1] = False
    if mask is not None:
        follows[:-1] &= mask[1:]
    logs = zero_padding(precise(log_weights), mask)
    later = importance_weights(th.where(follows, shift(logs, 1) - logs, 0.0))
    returns = zero_padding(scan(x, decay * later), mask)
    return require_representable("per-decision return", returns.to(rewards.dtype), x)
