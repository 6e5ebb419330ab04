r"""Off-policy targets of critics: multi-step returns whose traces are cut where target and behavior policy differ.

Conventions are those of :mod:`sb3_pg.functional.returns`. :math:`\rho_t = \pi(a_t|s_t) / \mu(a_t|s_t)` is given as a
logarithm, as from :func:`sb3_pg.functional.importance.log_importance_ratio`. Targets and advantages are constants:
they have no gradient.
"""

import torch as th

from sb3_pg.functional._check import check_fraction, check_positive, check_shapes
from sb3_pg.functional.importance import importance_weights, require_representable, truncate
from sb3_pg.functional.precision import precise
from sb3_pg.functional.returns import n_step_return, rewards_and_decay, shift, zero_padding
from sb3_pg.functional.scan import scan


def _truncated(name: str, log_ratio: th.Tensor, largest: float, mask: th.Tensor | None) -> th.Tensor:
    check_positive(name, largest)
    return importance_weights(truncate(precise(zero_padding(log_ratio, mask)), largest))


@th.no_grad()
def vtrace(
    rewards: th.Tensor,
    values: th.Tensor,
    log_ratio: th.Tensor,
    ends: th.Tensor,
    gamma: float,
    gae_lambda: float = 1.0,
    max_rho: float = 1.0,
    max_c: float = 1.0,
    bootstrap: th.Tensor | None = None,
    mask: th.Tensor | None = None,
) -> th.Tensor:
    r"""V-trace target of V(s_t).

    .. math:: v_t = V(s_t) + \rho_t \delta_t + \gamma (1 - e_t) \lambda c_t \left(v_{t+1} - V(s_{t+1})\right)

    with :math:`\rho_t = \min(\bar\rho, \pi/\mu)`, :math:`c_t = \min(\bar c, \pi/\mu)` and the TD residual
    :math:`\delta_t = r_t + \gamma b_t + \gamma (1 - e_t) V(s_{t+1}) - V(s_t)`. Source: Espeholt et al. (2018), eq. 1
    and remark 1 (lambda from remark 2), for :math:`\bar\rho \ge \bar c`. Its fixed point is the value of a policy
    between mu and pi (eq. 3), and of pi itself if :math:`\bar\rho` is infinite. With equal policies and both bounds at
    least 1 it is the lambda-return.

    :param rewards: r_t, reward units, floating, ``(n_steps, n_envs)``
    :param values: V(s_t), reward units, same shape
    :param log_ratio: log(pi / mu) of the action taken, same shape
    :param ends: e_t, same shape
    :param gamma: discount per env step, in [0, 1]
    :param gae_lambda: lambda, in [0, 1]
    :param max_rho: bound of rho_t, positive; it decides which policy's value is the fixed point
    :param max_c: bound of c_t, positive; larger values give faster convergence and more variance
    :param bootstrap: b_t, reward units, same shape
    :param mask: True where a step is valid, same shape
    :return: v_t, reward units; shape and dtype of ``rewards``; 0 in the padding
    :raises ValueError: unequal shapes, gamma or lambda outside [0, 1], a bound that is not positive
    :raises OverflowError: a product of ratios is too large for a floating-point number
    """
    check_shapes(rewards=rewards, values=values, log_ratio=log_ratio)
    check_fraction("gae_lambda", gae_lambda)
    rho = _truncated("max_rho", log_ratio, max_rho, mask)
    c = _truncated("max_c", log_ratio, max_c, mask)
    x, decay = rewards_and_decay(precise(rewards), ends, gamma, bootstrap, mask)
    values = zero_padding(values, mask)
    residual = x + decay * shift(values, 1) - values
    targets = zero_padding(values + scan(rho * residual, gae_lambda * decay * c), mask)
    return require_representable("V-trace target", targets.to(rewards.dtype), residual)


@th.no_grad()
def vtrace_advantages(
    rewards: th.Tensor,
    values: th.Tensor,
    targets: th.Tensor,
    log_ratio: th.Tensor | None,
    ends: th.Tensor,
    gamma: float,
    max_rho: float = 1.0,
    bootstrap: th.Tensor | None = None,
    mask: th.Tensor | None = None,
) -> th.Tensor:
    r"""Factor of each score in the policy gradient of V-trace.

    .. math:: A_t = \rho_t \left(r_t + \gamma b_t + \gamma (1 - e_t) v_{t+1} - V(s_t)\right),
              \qquad \rho_t = \min(\bar\rho, \pi / \mu)

    Source: Espeholt et al. (2018), section 4.2. Where the episode or the rollout ends, v_{t+1} is of another episode or
    unknown, and b_t takes its place. With equal policies and :math:`\bar\rho \ge 1`, this is GAE with lambda = 1 if the
    targets have lambda = 1. For any lambda it is then :math:`\delta_t + \gamma (1 - e_t) A^{GAE}_{t+1}`.

    :param rewards: r_t, reward units, floating, ``(n_steps, n_envs)``
    :param values: V(s_t), reward units, same shape
    :param targets: v_t of :func:`vtrace`, reward units, same shape
    :param log_ratio: log(pi / mu) of the action taken, same shape; None to leave out rho_t, which is then a weight that
        the caller multiplies with after he has normalized the advantages
    :param ends: e_t, same shape
    :param gamma: discount per env step, in [0, 1]
    :param max_rho: bound of rho_t, positive
    :param bootstrap: b_t, reward units, same shape
    :param mask: True where a step is valid, same shape
    :return: A_t, reward units; shape and dtype of ``rewards``; 0 in the padding
    :raises ValueError: unequal shapes, gamma outside [0, 1], a bound that is not positive
    :raises OverflowError: a ratio is too large for a floating-point number
    """
    check_shapes(rewards=rewards, values=values, targets=targets, log_ratio=log_ratio)
    credit = n_step_return(precise(rewards), targets, ends, gamma, 1, bootstrap, mask) - zero_padding(values, mask)
    rho = 1.0 if log_ratio is None else _truncated("max_rho", log_ratio, max_rho, mask)
    return require_representable("V-trace advantage", (rho * credit).to(rewards.dtype), credit)


@th.no_grad()
def retrace(
    rewards: th.Tensor,
    q_values: th.Tensor,
    expected_q_values: th.Tensor,
    log_ratio: th.Tensor,
    ends: th.Tensor,
    gamma: float,
    gae_lambda: float = 1.0,
    max_c: float = 1.0,
    bootstrap: th.Tensor | None = None,
    mask: th.Tensor | None = None,
) -> th.Tensor:
    r"""Retrace(lambda) target of Q(s_t, a_t).

    .. math:: y_t = Q(s_t, a_t) + \delta_t + \gamma (1 - e_t) c_{t+1} \left(y_{t+1} - Q(s_{t+1}, a_{t+1})\right),
              \qquad c_t = \lambda \min(\bar c, \pi / \mu)

    with :math:`\delta_t = r_t + \gamma b_t + \gamma (1 - e_t) E_\pi Q(s_{t+1}, \cdot) - Q(s_t, a_t)`. Source: Munos
    et al. (2016), eq. 3. With equal policies it is Q^pi(lambda) of Harutyunyan et al. (2016).

    :param rewards: r_t, reward units, floating, ``(n_steps, n_envs)``
    :param q_values: Q(s_t, a_t), reward units, same shape
    :param expected_q_values: E_pi Q(s_t, .), reward units, same shape
    :param log_ratio: log(pi / mu) of the action taken, same shape
    :param ends: e_t, same shape
    :param gamma: discount per env step, in [0, 1]
    :param gae_lambda: lambda, in [0, 1]
    :param max_c: bound of pi / mu in c_t, positive; 1 is Retrace, infinity keeps the full ratio
    :param bootstrap: b_t, E_pi Q of the state that follows a truncated or cut-off step, reward units, same shape
    :param mask: True where a step is valid, same shape
    :return: y_t, reward units; shape and dtype of ``rewards``; 0 in the padding
    :raises ValueError: unequal shapes, gamma or lambda outside [0, 1], a bound that is not positive
    :raises OverflowError: a product of ratios is too large for a floating-point number
    """
    check_shapes(rewards=rewards, q_values=q_values, expected_q_values=expected_q_values, log_ratio=log_ratio)
    check_fraction("gae_lambda", gae_lambda)
    c = gae_lambda * _truncated("max_c", log_ratio, max_c, mask)
    x, decay = rewards_and_decay(precise(rewards), ends, gamma, bootstrap, mask)
    q_values, expected_q_values = zero_padding(q_values, mask), zero_padding(expected_q_values, mask)
    residual = x + decay * shift(expected_q_values, 1) - q_values
    targets = zero_padding(q_values + scan(residual, decay * shift(c, 1)), mask)
    return require_representable("Retrace target", targets.to(rewards.dtype), residual)
