"""Estimates of the average-reward objective."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pg.functional import average_reward, td_residual
from sb3_pg.functional._check import check_fraction
from sb3_pg.learner.estimators import Bootstrapped, VTrace
from sb3_pg.learner.learner import Estimator, LearnerState
from sb3_pg.learner.metrics import Metrics
from sb3_pg.rollout import RolloutBatch


@dataclass
class Differential(Estimator):
    r"""Returns and advantages for the average reward :math:`r(\pi)`, with a critic of differential values.

    .. math:: \delta_t = r_t - \bar r + V_\phi(s_{t+1}) - V_\phi(s_t), \qquad y_t = \hat A_t + V_\phi(s_t) - \nu \bar V

    The advantages are those of another estimator, of the rewards :math:`r_t - \bar r` and without a discount, see
    :func:`~sb3_pg.functional.differential_gae`. Source: Sutton and Barto (2018), section 13.6.

    - :math:`\bar r` is the mean reward of the batch (Zhang and Ross 2021). With ``step_size`` :math:`\eta` it is
      :math:`\bar r_k`, which changes after each update: :math:`\bar r_{k+1} = \bar r_k + \eta\, \hat E[\delta_t]` (Naik
      et al. 2021; Wan et al. 2021). It begins with the mean of the first batch. Small batches take a step size:
      their own mean depends on the rewards that it is subtracted from. Importance weights count in these means.
    - V is known up to a constant. ``value_center`` :math:`\nu` subtracts a share of the batch's mean value from the
      critic's targets, so that the constant does not drift (Ma et al. 2021, with a running mean). The mean
      of a small batch follows its own states: with one step and one env, nu acts as a discount of 1 / (1 + nu).
    - A terminated step is followed by the first state of the next episode, and costs ``reset_cost`` (Zhang and Ross
      2021): a stationary distribution has no end. A truncated step is followed by the last state of its
      episode. What comes after its reset is no part of the task.

    :param of: the estimator, with ``gamma=1`` and without ``state_discount``
    :param average_reward: r bar_k, reward units per step, after an earlier batch; it counts only with ``step_size``.
        None for the mean of this batch
    :param step_size: eta, in (0, 1]; None for the mean reward of each batch
    :param reset_cost: is subtracted from the reward of a terminated step, reward units
    :param value_center: nu, in [0, 1]
    :raises ValueError: an argument is out of range
    """

    of: Bootstrapped | VTrace
    average_reward: float | None = None
    step_size: float | None = None
    reset_cost: float = 0.0
    value_center: float = 0.0
    requires_critic = True
    bootstraps = True
    continues: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.of.gamma != 1 or self.of.state_discount:
            raise ValueError(f"of must have gamma=1 and state_discount=False, got {self.of}")
        if self.step_size is not None and not 0 < self.step_size <= 1:
            raise ValueError(f"step_size must lie in (0, 1], got {self.step_size}")
        check_fraction("value_center", self.value_center)

    def estimate(self, batch: RolloutBatch, policy: ActorCriticPolicy) -> tuple[th.Tensor, th.Tensor]:
        """Return the critic's targets, and advantages."""
        assert batch.values is not None
        endless = self._endless(batch)
        if isinstance(self.of, VTrace):
            self.of.bound(batch)  # the weights of the average
        batch.average_reward = self._average_reward(batch, endless)
        endless.rewards = endless.rewards - batch.average_reward
        returns, advantages = self.of.estimate(endless, policy)
        if self.value_center:
            returns = returns - self.value_center * average_reward(batch.values, batch.mask)
        return returns, advantages

    def _endless(self, batch: RolloutBatch) -> RolloutBatch:
        """Return the batch with costs in place of terminations."""
        terminated = batch.terminated
        rewards = batch.rewards - self.reset_cost * terminated.to(batch.rewards.dtype)
        return replace(batch, rewards=rewards, terminated=th.zeros_like(terminated))

    def _average_reward(self, batch: RolloutBatch, endless: RolloutBatch) -> th.Tensor:
        if self.step_size is not None and self.average_reward is not None:
            return endless.rewards.new_tensor(self.average_reward)
        return average_reward(endless.rewards, batch.mask, self.weights(batch))

    def remember(self, batch: RolloutBatch, state: LearnerState) -> None:
        """Keep the average reward, after its step if there is a ``step_size``."""
        average = batch.average_reward
        if average is None:  # returns and advantages were given
            return
        if self.step_size is not None:
            endless = self._endless(batch)
            assert batch.values is not None
            residuals = td_residual(
                endless.rewards - average, batch.values, endless.ends, 1.0, batch.bootstrap, batch.mask
            )
            average = average + self.step_size * average_reward(residuals, batch.mask, self.weights(batch))
        state.average_reward = float(average)

    def weights(self, batch: RolloutBatch) -> th.Tensor | None:
        """w_t of the estimator."""
        return self.of.weights(batch)

    def trace_decay(self, batch: RolloutBatch) -> th.Tensor:
        """Factor of the estimator; only truncations cut traces."""
        return self.of.trace_decay(self._endless(batch))

    def describe(self, batch: RolloutBatch) -> Metrics:
        """Return metrics of the estimator, the average reward and the mean value."""
        metrics = self.of.describe(batch)
        if batch.average_reward is not None:
            metrics["average_reward"] = batch.average_reward
        if batch.values is not None:
            metrics["value_mean"] = average_reward(batch.values, batch.mask)
        return metrics
