"""Metrics of an update: numbers about the batch, the policy and the step's effect."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Final

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pg.functional import joint_kl
from sb3_pg.functional.precision import precise
from sb3_pg.policies import evaluation_mode, score_in_chunks, stored_dtype
from sb3_pg.rollout import RolloutBatch

#: Name -> number to log.
Metrics = dict[str, th.Tensor | float]
#: Returns count as equal up to this ratio of standard deviation and root mean square.
_NEGLIGIBLE_SPREAD: Final = 1e-3


def describe_batch(batch: RolloutBatch, policy: ActorCriticPolicy) -> Metrics:
    """Return metrics of a batch as it was collected.

    :param batch: with returns and advantages
    :param policy: the policy that is trained
    """
    return {
        "explained_variance": explained_variance(batch),
        "clipped_action_fraction": clipped_action_fraction(batch, policy),
    }


def measure_step(
    policy: ActorCriticPolicy,
    batch: RolloutBatch,
    actions: th.Tensor,
    credit: th.Tensor,
    changes: Mapping[th.nn.Parameter, th.Tensor],
    gradient: Mapping[th.nn.Parameter, th.Tensor],
) -> Metrics:
    r"""Compare the policy with the one that collected the batch.

    With the importance ratio :math:`\rho_t = \pi_{new}(a_t|s_t) / \pi_{old}(a_t|s_t)`:

    ====================== ===========================================================================================
    joint_kl               mean over states of KL(old || new) of the whole action vector, nats; if the distributions
                           are not known (a policy that hides its own, or a foreign buffer), the estimate
                           mean(rho - 1 - log rho) (Schulman 2020, "k3")
    step_size              length of the actor's step in parameter space
    surrogate_predicted    the gradient of the surrogate objective times the step, reward units
    surrogate_realized     change of the surrogate objective, mean((rho - 1) w_t A_t), reward units
    largest_ratio          max rho
    effective_sample_size  (sum rho)^2 / sum rho^2, as a share of the samples (Kish 1965)
    ====================== ===========================================================================================

    :param policy: after the step, in train mode
    :param batch: with the log-probs of the policy that collected it; off-policy, the old policy is the one before the
        step
    :param actions: the batch's, as the policy's distribution expects them, ``(n_samples,)`` or more dimensions
    :param credit: w_t A_t, ``(n_samples,)``
    :param changes: the actor's parameters -> their step
    :param gradient: parameter -> gradient of the surrogate objective before the step
    """
    assert batch.log_probs is not None
    old = batch.log_probs if batch.log_ratio is None else batch.log_probs + batch.log_ratio
    with evaluation_mode(policy), th.no_grad():
        new = score_in_chunks(policy, batch.flat_observations, actions)
        log_ratio = precise(new.log_prob - batch.select(old).to(new.log_prob))
        ratio = log_ratio.exp()
        kl = ratio - 1 - log_ratio
        pairs = list(zip(batch.distributions or (), new.distribution, strict=False))
        if pairs and len(pairs) == len(new.distribution) and all(old and new for old, new in pairs):
            with suppress(NotImplementedError):  # torch knows no divergence of the user's own distribution
                kl = th.cat([joint_kl(old(), new()) for old, new in pairs])
        gain = (ratio - 1) * credit
    products = [(g * changes[parameter]).sum() for parameter, g in gradient.items()]
    return {
        "joint_kl": kl.mean(),
        "step_size": th.nn.utils.get_total_norm(list(changes.values())),
        "surrogate_predicted": th.stack(products).sum() if products else 0.0,
        "surrogate_realized": gain.mean() if batch.n_episodes is None else gain.sum() / batch.n_episodes,
        "largest_ratio": ratio.max(),
        "effective_sample_size": ratio.sum().square() / ratio.square().sum() / len(ratio),
    }


def describe_policy(policy: ActorCriticPolicy, entropy: th.Tensor) -> Metrics:
    """Return metrics of how random the policy is.

    :param policy: the policy
    :param entropy: at each state, or its mean, nats
    """
    mean = entropy.detach().mean()
    metrics: Metrics = {"entropy": mean, "entropy_loss": -mean}
    if hasattr(policy, "log_std"):
        metrics["std"] = policy.log_std.detach().exp().mean()
    return metrics


def clipped_action_fraction(batch: RolloutBatch, policy: ActorCriticPolicy) -> th.Tensor | float:
    """Return the share of action components that are outside the env's bounds, and so are clipped."""
    space = policy.action_space
    if not isinstance(space, spaces.Box) or policy.squash_output:
        return 0.0
    actions: th.Tensor = batch.select(batch.actions)
    bounds = (bound.astype(stored_dtype(space), copy=False) for bound in (space.low, space.high))
    low, high = (th.as_tensor(bound.reshape(-1), device=actions.device) for bound in bounds)
    flat = actions.reshape(len(actions), -1)
    return ((flat < low) | (flat > high)).float().mean()


def explained_variance(batch: RolloutBatch) -> th.Tensor:
    """See :func:`share_of_variance`: b is the critic's value, or the baseline of an algorithm without one."""
    assert batch.returns is not None
    assert batch.advantages is not None
    returns: th.Tensor = batch.select(batch.returns)
    error = batch.select(batch.advantages) if batch.values is None else returns - batch.select(batch.values)
    return share_of_variance(returns, error)


def share_of_variance(returns: th.Tensor, error: th.Tensor) -> th.Tensor:
    """1 - Var[G - b] / Var[G]: 1 is a perfect baseline, 0 no better than a constant.

    It is NaN if the standard deviation of G is at most a thousandth of its root mean square. The ratio of the two
    variances means nothing then: a critic of a solved env that errs by 0.03 on returns of 100.00 +- 0.001 would get
    -900.

    :param returns: G, reward units
    :param error: G - b, reward units, same shape
    """
    variance = returns.var(correction=0)
    differ = variance > _NEGLIGIBLE_SPREAD**2 * returns.square().mean()
    result: th.Tensor = 1.0 - error.var(correction=0) / variance.where(differ, th.nan)
    return result
