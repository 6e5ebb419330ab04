"""Estimators: returns and advantages of a batch."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pg.baselines import Baseline, NoBaseline
from sb3_pg.functional import (
    effective_sample_size,
    episode_gradients,
    gae,
    importance_weights,
    lambda_return,
    log_importance_ratio,
    log_weights,
    n_step_return,
    per_decision_return,
    reward_to_go,
    self_normalize,
    td_residual,
    total_return,
    truncate,
    truncated_fraction,
    vtrace,
    vtrace_advantages,
)
from sb3_pg.functional._check import check_fraction, check_positive
from sb3_pg.functional.precision import precise
from sb3_pg.learner.learner import Estimator
from sb3_pg.learner.metrics import Metrics
from sb3_pg.policies import functional_log_prob, parameter_sets_of, policy_actions
from sb3_pg.rollout import RolloutBatch

Advantage = Literal["gae", "td", "td_lambda", "n_step", "monte_carlo"]
CriticTarget = Literal["lambda", "td", "n_step", "monte_carlo"]
Returns = Literal["reward_to_go", "total"]
Ratio = Literal["per_step", "prefix", "per_decision", "trajectory"]
Correction = Literal["vtrace", "none"]

#: Advantage -> default target of the critic, which is the return in that advantage.
OWN_TARGET: dict[str, CriticTarget] = {
    "gae": "lambda",
    "td": "td",
    "td_lambda": "td",
    "n_step": "n_step",
    "monte_carlo": "monte_carlo",
}


class _StateDiscount(Estimator):
    """An estimator whose weight is gamma^t of each step's index t in its episode, or 1."""

    gamma: float
    state_discount: bool

    def weights(self, batch: RolloutBatch) -> th.Tensor | None:
        """w_t, the discount of each step's state."""
        return (self.gamma ** precise(batch.timesteps)).to(batch.rewards.dtype) if self.state_discount else None


def _importance(batch: RolloutBatch, discount: th.Tensor | None) -> th.Tensor:
    """Return the batch's importance weights, times the discount of each step's state if there is one."""
    assert batch.log_weights is not None
    weights = importance_weights(batch.log_weights)
    return weights if discount is None else weights * discount


@dataclass
class Bootstrapped(_StateDiscount):
    r"""Advantage :math:`\hat A_t = G_t - V_\phi(s_t)`, and a return :math:`y_t` that the critic is trained on.

    =============== =============== ================================================== ==============================
    ``advantage``   critic target   return                                             estimate of the advantage
    =============== =============== ================================================== ==============================
    ``gae``         ``lambda``      :math:`G_t^\lambda`                                Schulman et al. (2016), eq. 16
    ``td``          ``td``          :math:`r_t + \gamma V(s_{t+1})`                    one-step actor-critic
    ``td_lambda``   ``td``          as ``td``; :class:`TraceStep` gives earlier        the backward view of
                                    steps their share of each error                    :math:`G_t^\lambda - V(s_t)`
    ``n_step``      ``n_step``      n rewards, then :math:`\gamma^n V(s_{t+n})`        Sutton and Barto, eq. 7.1
    ``monte_carlo`` ``monte_carlo`` all rewards of the episode, or of the segment      unbiased with complete episodes
                                    and the value where it is cut
    =============== =============== ================================================== ==============================

    All but ``monte_carlo`` are biased by the critic's errors, and have less variance the sooner they bootstrap.

    :param gamma: discount per env step, in [0, 1]
    :param gae_lambda: lambda, in [0, 1]
    :param advantage: "gae", "td", "td_lambda", "n_step" or "monte_carlo"
    :param td_steps: n of "n_step": rewards before the critic's value
    :param critic_target: "lambda", "td", "n_step" or "monte_carlo"; None for the one beside the advantage's name
    :param state_discount: the weight gamma^t of each step's term in the gradient, on or off
    """

    gamma: float = 0.99
    gae_lambda: float = 1.0
    advantage: Advantage = "gae"
    td_steps: int = 5
    critic_target: CriticTarget | None = None
    state_discount: bool = False
    requires_critic = True
    bootstraps = True

    def estimate(self, batch: RolloutBatch, policy: ActorCriticPolicy) -> tuple[th.Tensor, th.Tensor]:
        """Return the critic's targets, and advantages."""
        del policy
        rewards, values, ends, gamma = batch.rewards, batch.values, batch.ends, self.gamma
        assert values is not None
        last = batch.bootstrap, batch.mask
        match self.advantage:
            case "gae":
                advantages = gae(rewards, values, ends, gamma, self.gae_lambda, *last)
            case "td" | "td_lambda":
                advantages = td_residual(rewards, values, ends, gamma, *last)
            case "n_step":
                advantages = n_step_return(rewards, values, ends, gamma, self.td_steps, *last) - values
            case _:
                advantages = reward_to_go(rewards, ends, gamma, *last) - values
        target = self.critic_target
        if target is None or target == OWN_TARGET[self.advantage]:
            returns = advantages + values
        elif target == "lambda":
            returns = lambda_return(rewards, values, ends, gamma, self.gae_lambda, *last)
        elif target == "monte_carlo":
            returns = reward_to_go(rewards, ends, gamma, *last)
        else:
            n = 1 if target == "td" else self.td_steps
            returns = n_step_return(rewards, values, ends, gamma, n, *last)
        return returns, advantages

    def trace_decay(self, batch: RolloutBatch) -> th.Tensor:
        """Gamma lambda; 0 where the episode ends, terminated or truncated."""
        return th.where(batch.ends, 0.0, self.gamma * self.gae_lambda)


@dataclass
class MonteCarlo(_StateDiscount):
    """Returns of whole episodes (or of segments that a critic bootstraps), less a baseline.

    :param gamma: discount per env step, in [0, 1]
    :param returns: "reward_to_go": the reward from t on; "total": that of the whole episode
    :param baseline: what is subtracted
    :param state_discount: the weight gamma^t of each step's term in the gradient, on or off
    :param fit_baseline_first: fit the baseline to the batch that it then corrects (biased), instead of afterwards
    """

    gamma: float = 0.99
    returns: Returns = "reward_to_go"
    baseline: Baseline = field(default_factory=NoBaseline)
    state_discount: bool = False
    fit_baseline_first: bool = False

    @property
    def requires_critic(self) -> bool:
        """Whether the baseline is the policy's critic."""
        return self.baseline.requires_critic

    @property
    def bootstraps(self) -> bool:
        """True unless a return is the reward that the whole episode has received."""
        return self.returns != "total"

    @property
    def parameter_constants(self) -> th.Tensor | None:
        """The baseline of each parameter, if there is one per parameter."""
        return self.baseline.parameter_constants

    def estimate(self, batch: RolloutBatch, policy: ActorCriticPolicy) -> tuple[th.Tensor, th.Tensor]:
        """Return returns, and returns less baseline."""
        returns = self.returns_of(batch)
        return returns, self.advantages(batch, policy, returns, self.weights(batch))

    def returns_of(self, batch: RolloutBatch) -> th.Tensor:
        """Return the discounted rewards, from each step on or of the whole episode."""
        if self.returns == "total":
            return total_return(batch.rewards, batch.ends, self.gamma, batch.mask)
        return reward_to_go(batch.rewards, batch.ends, self.gamma, batch.bootstrap, batch.mask)

    def advantages(
        self, batch: RolloutBatch, policy: ActorCriticPolicy, returns: th.Tensor, weights: th.Tensor | None
    ) -> th.Tensor:
        """Return returns less baseline, and fit the baseline, before or afterwards.

        :param batch: with values, if the baseline is the critic
        :param policy: in eval mode
        :param returns: ``(n_steps, n_envs)``
        :param weights: w_t, same shape, None for 1
        """
        baseline = self.baseline
        if baseline.uses_gradients:
            ones = th.ones_like(batch.rewards)
            with functional_log_prob(policy) as log_prob:
                actor = {name: p.detach() for name, p in parameter_sets_of(policy).actor.items() if p.requires_grad}

                def gradients(rows: th.Tensor) -> Iterator[th.Tensor]:
                    chunks = episode_gradients(
                        log_prob,
                        actor,
                        batch.flat_observations,
                        policy_actions(batch.select(batch.actions), policy.action_space),
                        th.stack([batch.select(row) for row in rows]).float(),
                        batch.select(batch.episodes),
                    )
                    return (chunk for _, chunk in chunks)

                baseline.fit_gradients(batch, returns, ones if weights is None else weights, gradients)
        if baseline.uses_fit and self.fit_baseline_first:
            baseline.fit(batch, returns)
        advantages = baseline.advantages(batch, returns)
        if baseline.uses_fit and not self.fit_baseline_first:
            baseline.fit(batch, returns)
        return advantages


@dataclass
class ImportanceSampled(Estimator):
    r"""Monte-Carlo estimates of trajectories that other policies have collected.

    Each step's term in the gradient is weighted by :math:`W_t`, a product of the ratios
    :math:`\rho_t = \pi_\theta(a_t|s_t) / \mu(a_t|s_t)`; see :class:`~sb3_pg.OffPolicyPG`. The critic is trained on
    V-trace targets (Espeholt et al. 2018).

    :param on_policy: returns, baseline and discount
    :param ratio: "per_step", "prefix", "per_decision" or "trajectory"
    :param max_ratio: largest W_t, above which it is truncated; None for no limit
    :param self_normalize: divide W_t by its mean over the batch's episodes
    """

    on_policy: MonteCarlo
    ratio: Ratio = "per_step"
    max_ratio: float | None = None
    self_normalize: bool = False

    @property
    def requires_critic(self) -> bool:
        """As in :class:`MonteCarlo`."""
        return self.on_policy.requires_critic

    @property
    def bootstraps(self) -> bool:
        """As in :class:`MonteCarlo`."""
        return self.on_policy.bootstraps

    @property
    def parameter_constants(self) -> th.Tensor | None:
        """As in :class:`MonteCarlo`."""
        return self.on_policy.parameter_constants

    def weigh(self, batch: RolloutBatch, log_prob: th.Tensor) -> None:
        """Set the batch's log rho_t and log W_t, truncated and normalized as configured.

        :param batch: with the log-probs of the policies that acted
        :param log_prob: of the policy that is trained, nats, ``(n_steps, n_envs)``
        """
        assert batch.log_probs is not None
        batch.log_ratio = log_importance_ratio(log_prob, batch.log_probs, batch.mask)
        logs = truncate(log_weights(batch.log_ratio, batch.ends, self.ratio, batch.mask), self.max_ratio)
        batch.log_weights = self_normalize(logs, batch.ends, batch.mask) if self.self_normalize else logs

    def effective_share(self, batch: RolloutBatch) -> float:
        """Return the effective sample size per sample: an episode if it has one weight, otherwise a step."""
        counted = batch.valid & batch.ends if self.ratio == "trajectory" else batch.valid
        assert batch.log_weights is not None
        size = effective_sample_size(batch.log_weights, counted)
        return float(size / counted.sum())

    def weights(self, batch: RolloutBatch) -> th.Tensor:
        """W_t, times the discount of each step's state if ``state_discount`` is on."""
        return _importance(batch, self.on_policy.weights(batch))

    def estimate(self, batch: RolloutBatch, policy: ActorCriticPolicy) -> tuple[th.Tensor, th.Tensor]:
        """Return V-trace targets (returns, if there is no critic), and returns less baseline."""
        assert batch.log_ratio is not None
        own = self.on_policy
        returns = self._returns(batch)
        advantages = own.advantages(batch, policy, returns, self.weights(batch))
        if not self.requires_critic:
            return returns, advantages
        assert batch.values is not None
        rewards, gamma = batch.rewards, own.gamma
        if own.returns == "total":  # the critic predicts one reward then, at the end
            rewards, gamma = th.where(batch.ends, own.returns_of(batch), 0.0), 1.0
        targets = vtrace(
            rewards, batch.values, batch.log_ratio, batch.ends, gamma, bootstrap=batch.bootstrap, mask=batch.mask
        )
        return targets, advantages

    def _returns(self, batch: RolloutBatch) -> th.Tensor:
        own = self.on_policy
        returns = own.returns_of(batch)
        if self.ratio != "per_decision":
            return returns
        assert batch.log_weights is not None
        later = per_decision_return(
            batch.rewards, batch.log_weights, batch.ends, own.gamma, batch.bootstrap, batch.mask
        )
        if own.returns == "reward_to_go":
            return later
        # Rewards before t keep the weight W_t; those of the steps t' from t on get W_t'.
        to_go = reward_to_go(batch.rewards, batch.ends, own.gamma, mask=batch.mask)
        return returns + own.gamma ** precise(batch.timesteps) * (later - to_go)

    def describe(self, batch: RolloutBatch) -> Metrics:
        """Return metrics of the importance weights."""
        assert batch.log_ratio is not None
        assert batch.log_weights is not None
        metrics: Metrics = {
            "importance_ess": self.effective_share(batch),
            "largest_weight": batch.log_weights[batch.valid].max().exp(),
            "truncated_fraction": 0.0,
        }
        if self.max_ratio is not None:
            raw = log_weights(batch.log_ratio, batch.ends, self.ratio, batch.mask)[batch.valid]
            metrics["truncated_fraction"] = truncated_fraction(raw, self.max_ratio)
        return metrics


@dataclass
class VTrace(_StateDiscount):
    r"""Actor-critic of steps that an older policy :math:`\mu` has taken (Espeholt et al. 2018, section 4).

    .. math:: \hat A_t = r_t + \gamma b_t + \gamma (1 - e_t) v_{t+1} - V_\phi(s_t),
              \qquad w_t = \min(\bar\rho, \pi_\theta(a_t|s_t) / \mu(a_t|s_t))

    The critic is trained on the V-trace targets :math:`v_t`. The ratio is the weight :math:`w_t` and no part of
    :math:`\hat A_t`. A batch's mean advantage can therefore be subtracted: the mean of :math:`w_t \nabla_\theta \log
    \pi_\theta(a_t|s_t)` is 0 unless the ratio is bounded.

    ``correction="none"`` takes all ratios for 1. With ``trace_lambda=1`` this is A3C (Mnih et al. 2016): returns are
    the rewards up to the end of the piece or episode, then the critic's value, whatever policy has acted.

    A batch holds episodes or pieces of them. ``batch.bootstrap`` holds the present critic's value behind each piece.
    A batch without ``log_ratio`` is one of the policy itself: all ratios are 1.

    :param gamma: discount per env step, in [0, 1]
    :param trace_lambda: lambda, in [0, 1], a factor of each trace coefficient
    :param max_ratio: bound of the ratio in TD residuals and weights, positive; infinity for none. It decides which
        policy's value the critic learns
    :param max_trace: bound of the ratio in trace coefficients, positive; infinity for none
    :param correction: "vtrace" or "none"
    :param state_discount: the weight gamma^t of each step's term in the gradient, on or off
    :raises ValueError: an argument is out of range
    """

    gamma: float = 0.99
    trace_lambda: float = 1.0
    max_ratio: float = 1.0
    max_trace: float = 1.0
    correction: Correction = "vtrace"
    state_discount: bool = False
    requires_critic = True
    bootstraps = True

    def __post_init__(self) -> None:
        check_fraction("gamma", self.gamma)
        check_fraction("trace_lambda", self.trace_lambda)
        check_positive("max_ratio", self.max_ratio)
        check_positive("max_trace", self.max_trace)
        if self.correction not in get_args(Correction):
            raise ValueError(f"correction must be one of {list(get_args(Correction))}, got {self.correction!r}")

    def weigh(self, batch: RolloutBatch, log_prob: th.Tensor) -> None:
        """Set the batch's log-ratios and log-weights.

        :param batch: with the log-probs of the policies that acted
        :param log_prob: of the policy that is trained, nats, ``(n_steps, n_envs)``
        """
        assert batch.log_probs is not None
        batch.log_ratio = log_importance_ratio(log_prob, batch.log_probs, batch.mask)
        self.bound(batch)

    def bound(self, batch: RolloutBatch) -> None:
        """Set the batch's log-weights from its log-ratios."""
        batch.log_weights = truncate(_log_ratio(batch), self.max_ratio) if self.correction == "vtrace" else None

    def weights(self, batch: RolloutBatch) -> th.Tensor | None:
        """w_t, times the discount of each step's state if ``state_discount`` is on."""
        discount = super().weights(batch)
        return discount if batch.log_weights is None else _importance(batch, discount)

    def estimate(self, batch: RolloutBatch, policy: ActorCriticPolicy) -> tuple[th.Tensor, th.Tensor]:
        """Return V-trace targets, and advantages without the ratio."""
        del policy
        rewards, values, ends, gamma = batch.rewards, batch.values, batch.ends, self.gamma
        assert values is not None
        last = batch.bootstrap, batch.mask
        self.bound(batch)
        if self.correction == "none":
            returns = lambda_return(rewards, values, ends, gamma, self.trace_lambda, *last)
        else:
            bounds = self.trace_lambda, self.max_ratio, self.max_trace
            returns = vtrace(rewards, values, _log_ratio(batch), ends, gamma, *bounds, *last)
        return returns, vtrace_advantages(rewards, values, returns, None, ends, gamma, 1.0, *last)

    def describe(self, batch: RolloutBatch) -> Metrics:
        """Return metrics of the ratios before they are bounded: how far the policy is from those that acted."""
        logs = _log_ratio(batch)[batch.valid]
        return {
            "importance_ess": effective_sample_size(logs) / len(logs),
            "largest_weight": logs.max().exp().nan_to_num(),  # a ratio without room is the largest number
            "truncated_fraction": truncated_fraction(logs, self.max_ratio),
        }


def _log_ratio(batch: RolloutBatch) -> th.Tensor:
    """Return the logarithms of the ratios, which are 0 if the policy itself has acted."""
    return th.zeros_like(batch.rewards) if batch.log_ratio is None else batch.log_ratio
