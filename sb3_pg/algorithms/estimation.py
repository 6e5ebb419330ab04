"""What is estimated from a batch, the training of the critic that helps with it, and the order of both."""

from abc import abstractmethod

import torch as th

from sb3_pg.algorithms.setup import ConfiguredAlgorithm
from sb3_pg.functional import normalize
from sb3_pg.functional.precision import precise
from sb3_pg.learner.critic import fit_critic
from sb3_pg.learner.metrics import Metrics
from sb3_pg.policies import evaluation_mode, predict_values
from sb3_pg.rollout import RolloutBatch, fill_bootstrap


class EstimatingAlgorithm(ConfiguredAlgorithm):
    """Returns, advantages, and a critic of its own optimizer. A subclass adds ``_estimate`` and ``_move_actor``.

    Its arguments are those of :class:`~sb3_pg.algorithms.setup.ConfiguredAlgorithm`.
    """

    recompute_advantage = False
    _n_warmed_up = 0

    @abstractmethod
    def _estimate(self, batch: RolloutBatch) -> tuple[th.Tensor, th.Tensor]:
        """Returns, which critic or baseline are fitted to, and advantages, which actions are credited with.

        :param batch: evaluated with the policy, which is in eval mode
        :return: both ``(n_steps, n_envs)``, reward units
        """

    @abstractmethod
    def _move_actor(self, batch: RolloutBatch) -> Metrics:
        """Move the actor (and a critic that has no steps of its own), and explain it: name -> number to log."""

    def _update(self, batch: RolloutBatch) -> Metrics:
        """Move the actor, and fit a critic that has steps of its own before or after.

        :return: name -> number to log
        """
        metrics: Metrics = {}
        if self._critic_is_separate and (self.critic_fit == "before" or self._warms_up()):
            metrics |= self._fit_critic(batch)
            if self._warms_up():
                return metrics
            self._value_again(batch)
            self._on_new_estimates(batch)
        metrics |= self._move_actor(batch)
        if self._critic_is_separate and self.critic_fit == "after":
            metrics |= self._fit_critic(batch)
        return metrics

    def _on_new_estimates(self, batch: RolloutBatch) -> None:
        """Called when returns and advantages have been estimated anew, before the actor moves."""

    @property
    def _trained_actor(self) -> list[th.nn.Parameter]:
        """The actor's parameters that are not frozen."""
        return [parameter for parameter in self.parameter_sets.actor.values() if parameter.requires_grad]

    def _weights(self, batch: RolloutBatch) -> th.Tensor | None:
        """w_t, the discount of each step's state, ``(n_steps, n_envs)``; None for 1."""
        if not self.state_discount:
            return None
        return (self.gamma ** precise(batch.timesteps)).to(batch.rewards.dtype)

    def _credit(self, batch: RolloutBatch) -> th.Tensor:
        """What each step's log-prob is multiplied with in the loss: w_t A_t, normalized where that is asked for.

        :return: ``(n_steps, n_envs)``, 0 in the padding
        """
        advantages = batch.advantages
        assert advantages is not None
        if self.normalize_advantage:
            advantages = normalize(advantages, batch.mask, tolerance=rounding(batch))
        weights = self._weights(batch)
        return advantages if weights is None else advantages * weights

    def _value_again(self, batch: RolloutBatch) -> None:
        """Replace what the old critic said by what the critic says now."""
        with evaluation_mode(self.policy):
            values = batch.restore(predict_values(self.policy, batch.flat_observations))
            batch.values = values.to(batch.rewards) * self.value_scale
            fill_bootstrap(self.policy, batch, self.value_scale)
            batch.returns, batch.advantages = self._estimate(batch)

    def _critic_targets(self, batch: RolloutBatch) -> th.Tensor:
        """What the policy's critic is trained on, ``(n_samples,)``: returns, in units of ``value_scale``."""
        assert batch.returns is not None
        targets: th.Tensor = batch.select(batch.returns)
        return (targets / self.value_scale if self.normalize_value_targets else targets).float()

    def _fit_critic(self, batch: RolloutBatch) -> Metrics:
        """Train the critic by its own optimizer."""
        optimizer = self.critic_optimizer or self.policy.optimizer
        loss: th.Tensor | float = 0.0
        for n in range(self.n_critic_updates if self.recompute_advantage else 1):
            if n:
                self._value_again(batch)
            loss = fit_critic(
                self.policy,
                optimizer,
                list(self._critic_only().values()),
                batch.flat_observations,
                self._critic_targets(batch),
                1 if self.recompute_advantage else self.n_critic_updates,
                self._critic_minibatch_size,
            )
        return {"value_loss": loss}

    def _warms_up(self) -> bool:
        """Whether the critic is still trained alone."""
        return self._n_warmed_up < self.critic_warmup_updates


def rounding(batch: RolloutBatch) -> th.Tensor:
    """Rounding of the numbers that advantages are differences of: values come from a network in single precision.

    It is 0 where one of them is not finite, so that nothing passes for rounding then.
    """
    returns, advantages = batch.returns, batch.advantages
    assert returns is not None
    assert advantages is not None
    largest = th.maximum(returns.abs().amax(), (returns - advantages).abs().amax())
    return largest.where(largest.isfinite(), 0.0) * th.finfo(th.float32).eps
