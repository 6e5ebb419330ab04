"""Going along a direction as far as a trust region and the objective allow."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch as th


class LineSearch(NamedTuple):
    """What :func:`line_search` did.

    :param fraction: share of the step that was taken; 0 if none was
    :param n_steps: shares that were tried
    :param reason: "accepted"; or why the last one was not: "nonfinite" (divergence or gain), "kl" (above the limit), or
        "no_improvement" (the gain is too small a share of the predicted one)
    """

    fraction: float
    n_steps: int
    reason: str


def line_search(
    parameters: Sequence[th.Tensor],
    step: Sequence[th.Tensor],
    measure: Callable[[], th.Tensor],
    predicted_gain: float,
    max_kl: float = math.inf,
    accept_ratio: float | None = 0.0,
    shrinking_factor: float = 0.8,
    max_iter: int = 10,
) -> LineSearch:
    r"""Take the longest of the steps :math:`\beta^k s` that stays in the trust region and keeps its promise.

    .. math:: \bar D_{KL} \le \delta \quad\text{and}\quad
              L(\theta + \beta^k s) - L(\theta) \ge \eta\, \beta^k\, g^T s, \qquad k = 0, 1, \dots

    There has to be a gain, whatever eta. Source: Schulman et al. (2015), appendix C; the second condition is
    Armijo's (1966).

    :param parameters: theta, moved in place; the same to the bit afterwards if no step was accepted, or on an error
    :param step: s, a tensor per parameter
    :param measure: of theta as it is now: joint KL from where it was, and the gain L(theta) - L(theta_old), as one
        tensor ``(2,)``
    :param predicted_gain: g^T s, the gain of the whole step to first order
    :param max_kl: delta, nats
    :param accept_ratio: eta, at least 0; None asks for no gain
    :param shrinking_factor: beta, in (0, 1)
    :param max_iter: most steps that are tried
    :return: what was taken, and why
    :raises ValueError: shrinking_factor or max_iter out of range
    """
    if not 0 < shrinking_factor < 1:
        raise ValueError(f"shrinking_factor must lie in (0, 1), got {shrinking_factor}")
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")
    parameters, step = list(parameters), list(step)
    fraction, reason, accepted = 1.0, "", False
    with th.no_grad():
        before = [parameter.clone() for parameter in parameters]
        try:
            for n in range(1, max_iter + 1):
                th._foreach_copy_(parameters, th._foreach_add(before, step, alpha=fraction))
                kl, gain = measure().tolist()
                if not (math.isfinite(kl) and math.isfinite(gain)):
                    reason = "nonfinite"
                elif kl > max_kl:
                    reason = "kl"
                elif accept_ratio is not None and not (gain > 0 and gain >= accept_ratio * fraction * predicted_gain):
                    reason = "no_improvement"
                else:
                    accepted = True
                    return LineSearch(fraction, n, "accepted")
                fraction *= shrinking_factor
        finally:
            if not accepted:
                th._foreach_copy_(parameters, before)
    return LineSearch(0.0, max_iter, reason)
