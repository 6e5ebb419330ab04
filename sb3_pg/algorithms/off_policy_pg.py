"""Off-policy policy gradient: importance-sampled REINFORCE over replayed trajectories."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from typing_extensions import Unpack

from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.learning import waits_for_learning_starts
from sb3_pg.algorithms.monte_carlo import MonteCarloAlgorithm
from sb3_pg.algorithms.off_policy import OTHER_ALGORITHM, ReplayingAlgorithm
from sb3_pg.algorithms.signature import ReplayingArguments
from sb3_pg.baselines import Baseline
from sb3_pg.functional import (
    effective_sample_size,
    importance_weights,
    log_importance_ratio,
    log_weights,
    per_decision_return,
    reward_to_go,
    self_normalize,
    truncate,
    vtrace,
)
from sb3_pg.functional.importance import RATIOS
from sb3_pg.functional.precision import precise
from sb3_pg.learner.metrics import Metrics
from sb3_pg.learner.rollback import require_log_probs
from sb3_pg.policies import evaluation_mode
from sb3_pg.rollout import RolloutBatch, evaluate_batch


class OffPolicyPG(MonteCarloAlgorithm, ReplayingAlgorithm):
    r"""Policy gradient of trajectories that other policies have lived, the last few of one's own or anybody's.

    .. math:: \nabla_\theta J \approx \frac{1}{N} \sum_{i=1}^N \sum_t W_{i,t}\, w_t\,
              \nabla_\theta \log \pi_\theta(a_{i,t}|s_{i,t}) \,(G_{i,t} - b), \qquad
              \rho_t = \frac{\pi_\theta(a_t|s_t)}{\mu(a_t|s_t)}

    Source: Precup et al. (2000); Jie and Abbeel (2010); the lecture's off-policy policy gradient. W_t by ``ratio``:

    ============== ============================= ================================================================
    ratio          W_t                           expectation
    ============== ============================= ================================================================
    per_step       rho_t                         the slides' first-order approximation: of states that mu visits
    prefix         rho_0 ... rho_t               biased by the later ratios, which the slides ignore
    per_decision   rho_0 ... rho_t, and rho_t+1  unbiased
                   ... rho_t' at each reward
                   r_t' in G_t
    trajectory     rho_0 ... rho_T-1             unbiased, with the most variance
    ============== ============================= ================================================================

    Each update takes ``gradient_steps`` steps over trajectories, those collected last and replayed ones, with weights
    of the policy as it is then. With one step on fresh data it is :class:`~sb3_pg.Reinforce`. The baseline "value" is
    a critic trained on V-trace targets (Espeholt et al. 2018) of the same trajectories.

    :param policy: see :class:`~sb3_pg.algorithms.setup.ConfiguredAlgorithm`, as for all arguments but these
    :param env: likewise
    :param learning_rate: likewise
    :param ratio: "per_step", "prefix", "per_decision" or "trajectory"
    :param max_ratio: W_t is truncated there, None for no truncation
    :param self_normalize: divide W_t by its mean over the batch's episodes
    :param min_ess: a gradient step is not taken where the effective sample size of W_t is under this share of the
        samples; the trajectories that were collected first leave the buffer until it is not
    :param returns: as in :class:`~sb3_pg.Reinforce`, like the two that follow
    :param baseline: likewise. What is fitted to returns is fitted to those of the policies that acted, unless ``ratio``
        is "per_decision". "linear", which is fitted after each step, has seen the episodes that the next one corrects
    :param baseline_kwargs: likewise
    :param critic_learning_rate: likewise
    :param n_critic_updates: likewise, per gradient step
    :param kwargs: of :class:`~sb3_pg.algorithms.off_policy.ReplayingAlgorithm`, ``behavior_policy`` among them, and
        those that all algorithms share
    :raises ValueError: an argument out of range, or arguments that contradict each other
    :raises TypeError: an argument of the wrong type, or an unknown one

    ``behavior_policy`` acts instead of the policy that is trained. It is a model, a policy, or a callable that returns
    actions and their log-probs:

    >>> import numpy as np
    >>> from stable_baselines3 import A2C
    >>> from sb3_pg import OffPolicyPG
    >>> teacher = A2C("MlpPolicy", "CartPole-v1", device="cpu").learn(100)
    >>> model = OffPolicyPG("MlpPolicy", "CartPole-v1", behavior_policy=teacher, device="cpu").learn(200)
    >>> rng = np.random.default_rng(0)
    >>> def mostly_right(obs):
    ...     right = rng.random(len(obs)) < 0.6
    ...     return right.astype(int), np.log(np.where(right, 0.6, 0.4))
    >>> model = OffPolicyPG("MlpPolicy", "CartPole-v1", behavior_policy=mostly_right, device="cpu").learn(200)
    """

    checks: ClassVar[Mapping[str, arg.Check]] = {
        **MonteCarloAlgorithm.checks,
        **ReplayingAlgorithm.checks,
        "ratio": arg.choice(*RATIOS),
        "max_ratio": arg.positive(optional=True),
        "self_normalize": arg.instance(bool),
        "min_ess": arg.real(0, 1),
    }

    _n_refused = 0

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str | None,
        learning_rate: float | str | Schedule = 3e-3,
        ratio: str = "per_step",
        max_ratio: float | None = None,
        self_normalize: bool = False,
        min_ess: float = 0.0,
        returns: str = "reward_to_go",
        baseline: str | Baseline = "value",
        baseline_kwargs: dict[str, Any] | None = None,
        critic_learning_rate: float | str | Schedule | None = 3e-3,
        n_critic_updates: int = 2,
        **kwargs: Unpack[ReplayingArguments],
    ) -> None:
        self.ratio = ratio
        self.max_ratio = max_ratio
        self.self_normalize = self_normalize
        self.min_ess = min_ess
        super().__init__(
            policy,
            env,
            learning_rate,
            returns=returns,
            baseline=baseline,
            baseline_kwargs=baseline_kwargs,
            critic_learning_rate=critic_learning_rate,
            n_critic_updates=n_critic_updates,
            **arg.known_arguments(type(self), kwargs),
        )

    def _n_episodes_at_least(self) -> int:
        collected = self.n_envs * (self._episodes_per_env() or 0)
        return max(1, min(collected, self.batch_size or collected, self.buffer_trajectories))

    def _why_no_update(self) -> str:
        assert self.replay_buffer is not None
        if self.gradient_steps == 0 or self._n_skipped:  # which has been said
            return ""
        if self.num_timesteps <= self.learning_starts:
            return waits_for_learning_starts(self)
        if not self.replay_buffer.trajectories:
            return (
                f"no episode has ended in {self.num_timesteps} steps, and updates take complete episodes. Give more "
                f"total_timesteps, give the env a time limit (gymnasium.wrappers.TimeLimit), or {OTHER_ALGORITHM}."
            )
        if self._n_refused:
            return f"the effective sample size has stayed under min_ess={self.min_ess}. Give a smaller one."
        return ""

    # ---------------------------------------------------------------- the formula

    def _next_batch(self, batch_size: int | None) -> RolloutBatch | None:
        buffer = self.replay_buffer
        assert buffer is not None
        while buffer.trajectories:
            chosen = buffer.choose(batch_size)
            batch = buffer.batch(chosen, self._uses_critic() and self._bootstraps_truncated)
            with evaluation_mode(self.policy):
                log_prob = evaluate_batch(
                    self.policy,
                    batch,
                    with_values=self._uses_critic(),
                    value_scale=self.value_scale,
                    gradient_of=self._gradient_of(),
                    entropy=self._entropy_use(),
                )
                require_log_probs(self.policy, log_prob, batch.valid)
                self._weigh(batch, log_prob)
                if self._effective_share(batch) >= self.min_ess:
                    batch.returns, batch.advantages = self._estimate(batch)
                    updates_since = [self._n_updates - trajectory.collected for trajectory in chosen]
                    self.logger.record("train/staleness", sum(updates_since) / len(updates_since), self._detail)
                    return batch
            self._n_refused += 1
            self.logger.record("train/n_refused", self._n_refused)
            if not buffer.drop_oldest():
                break
        return None

    def _weigh(self, batch: RolloutBatch, log_prob: th.Tensor) -> None:
        """Set the batch's log rho_t and log W_t, truncated and normalized where that is asked for."""
        assert batch.log_probs is not None
        batch.log_ratio = log_importance_ratio(log_prob, batch.log_probs, batch.mask)
        logs = truncate(log_weights(batch.log_ratio, batch.ends, self.ratio, batch.mask), self.max_ratio)
        batch.log_weights = self_normalize(logs, batch.ends, batch.mask) if self.self_normalize else logs

    def _effective_share(self, batch: RolloutBatch) -> float:
        """Effective sample size per sample: per episode where an episode has one weight, per step otherwise."""
        counted = batch.valid & batch.ends if self.ratio == "trajectory" else batch.valid
        assert batch.log_weights is not None
        size = effective_sample_size(batch.log_weights, counted)
        return float(size / counted.sum())

    def _weights(self, batch: RolloutBatch) -> th.Tensor:
        assert batch.log_weights is not None
        weights = importance_weights(batch.log_weights)
        discounts = super()._weights(batch)
        return weights if discounts is None else weights * discounts

    def _returns(self, batch: RolloutBatch) -> th.Tensor:
        returns = super()._returns(batch)
        if self.ratio != "per_decision":
            return returns
        assert batch.log_weights is not None
        later = per_decision_return(
            batch.rewards, batch.log_weights, batch.ends, self.gamma, batch.bootstrap, batch.mask
        )
        if self.returns == "reward_to_go":
            return later
        # The rewards before t are weighted with W_t, as they are without this; those from t on with W_t' instead.
        to_go = reward_to_go(batch.rewards, batch.ends, self.gamma, mask=batch.mask)
        return returns + self.gamma ** precise(batch.timesteps) * (later - to_go)

    def _estimate(self, batch: RolloutBatch) -> tuple[th.Tensor, th.Tensor]:
        returns, advantages = super()._estimate(batch)
        if not self._uses_critic():
            return returns, advantages
        assert batch.values is not None
        assert batch.log_ratio is not None
        rewards, gamma = batch.rewards, self.gamma
        if self.returns == "total":  # what the critic predicts then: one reward, at the end
            rewards, gamma = th.where(batch.ends, super()._returns(batch), 0.0), 1.0
        targets = vtrace(
            rewards, batch.values, batch.log_ratio, batch.ends, gamma, bootstrap=batch.bootstrap, mask=batch.mask
        )
        return targets, advantages

    def _explain(self, batch: RolloutBatch, before: Mapping[th.Tensor, th.Tensor]) -> Metrics:
        """What the step has done to the policy that took it, rather than to those that acted."""
        assert batch.log_probs is not None
        assert batch.log_ratio is not None
        assert batch.log_weights is not None
        counted = batch.log_weights[batch.valid]
        metrics: Metrics = {
            "importance_ess": self._effective_share(batch),
            "largest_weight": counted.max().exp(),
            "truncated_fraction": 0.0,
        }
        if self.max_ratio is not None:
            raw = log_weights(batch.log_ratio, batch.ends, self.ratio, batch.mask)[batch.valid]
            metrics["truncated_fraction"] = (raw > math.log(self.max_ratio)).double().mean()
        target = replace(batch, log_probs=(batch.log_probs + batch.log_ratio).to(batch.log_probs))
        return metrics | super()._explain(target, before)
