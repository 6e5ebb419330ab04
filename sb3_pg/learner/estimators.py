"""Estimators: returns and advantages of a batch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

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
    vtrace,
)
from sb3_pg.functional.precision import precise
from sb3_pg.learner.learner import Estimator
from sb3_pg.learner.metrics import Metrics
from sb3_pg.policies import functional_log_prob, parameter_sets_of, policy_actions
from sb3_pg.rollout import RolloutBatch

Advantage = Literal["gae", "td", "n_step", "monte_carlo"]
CriticTarget = Literal["lambda", "td", "n_step", "monte_carlo"]
Returns = Literal["reward_to_go", "total"]
Ratio = Literal["per_step", "prefix", "per_decision", "trajectory"]

#: Advantage -> default target of the critic, which is the return in that advantage.
OWN_TARGET: dict[str, CriticTarget] = {"gae": "lambda", "td": "td", "n_step": "n_step", "monte_carlo": "monte_carlo"}


class _StateDiscount(Estimator):
    """An estimator whose weight is gamma^t of each step's index t in its episode, or 1."""

    gamma: float
    state_discount: bool

    def weights(self, batch: RolloutBatch) -> th.Tensor | None:
        """w_t, the discount of each step's state."""
        return (self.gamma ** precise(batch.timesteps)).to(batch.rewards.dtype) if self.state_discount else None


@dataclass
class Bootstrapped(_StateDiscount):
    r"""Advantage :math:`\hat A_t = G_t - V_\phi(s_t)`, and a return :math:`y_t` that the critic is trained on.

    =============== =============== ================================================== ==============================
    ``advantage``   critic target   return                                             estimate of the advantage
    =============== =============== ================================================== ==============================
    ``gae``         ``lambda``      :math:`G_t^\lambda`                                Schulman et al. (2016), eq. 16
    ``td``          ``td``          :math:`r_t + \gamma V(s_{t+1})`                    one-step actor-critic
    ``n_step``      ``n_step``      n rewards, then :math:`\gamma^n V(s_{t+n})`        Sutton and Barto, eq. 7.1
    ``monte_carlo`` ``monte_carlo`` all rewards of the episode, or of the segment      unbiased with complete episodes
                                    and the value where it is cut
    =============== =============== ================================================== ==============================

    All but ``monte_carlo`` are biased by the critic's errors, and have less variance the sooner they bootstrap.

    :param gamma: discount per env step, in [0, 1]
    :param gae_lambda: lambda, in [0, 1]
    :param advantage: "gae", "td", "n_step" or "monte_carlo"
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
            case "td":
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
        assert batch.log_weights is not None
        weights, discount = importance_weights(batch.log_weights), self.on_policy.weights(batch)
        return weights if discount is None else weights * discount

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
            metrics["truncated_fraction"] = (raw > math.log(self.max_ratio)).double().mean()
        return metrics
