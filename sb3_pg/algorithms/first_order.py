"""Algorithms that estimate an advantage and take one gradient step on the pseudo-loss."""

import torch as th

from sb3_pg.algorithms.base import Metrics, PolicyGradientAlgorithm
from sb3_pg.functional import normalize, policy_gradient_loss, reduce_actor, value_loss
from sb3_pg.rollout import RolloutBatch, fill_bootstrap, has_own_forward, policy_actions, predict_values


class FirstOrderAlgorithm(PolicyGradientAlgorithm):
    r"""One step of gradient ascent per batch.

    .. math:: L(\theta, \phi) = -\hat E[w_t \log \pi_\theta(a_t|s_t) \hat A_t]
              - c_{ent} \hat E[H(\pi_\theta(\cdot|s_t))] + c_{vf} \hat E[(V_\phi(s_t) - y_t)^2]

    E is the sum over time and mean over episodes for complete episodes, the mean over steps for segments; the
    critic's mean is over steps in both. The critic's term drops out where the critic has an optimizer of its own,
    except for features that actor and critic share: those are trained by both losses.
    """

    def _weights(self, batch: RolloutBatch) -> th.Tensor | None:
        """w_t, ``(n_steps, n_envs)``; None for 1."""
        return None

    def _update(self, batch: RolloutBatch) -> Metrics:
        metrics: Metrics = {}
        fits_critic = self._critic_is_separate
        assert batch.returns is not None
        if fits_critic and self.critic_fit == "before":
            metrics |= self._fit_critic(batch, batch.returns)
            self._value_again(batch)
        metrics |= self._accumulate_gradient(batch)
        metrics["grad_norm"] = self._gradient_step(batch)
        if fits_critic and self.critic_fit == "after":
            metrics |= self._fit_critic(batch, batch.returns)
        return metrics

    def _value_again(self, batch: RolloutBatch) -> None:
        """Replace what the old critic said by what the fitted one says."""
        self.policy.set_training_mode(False)
        batch.values = batch.restore(predict_values(self.policy, batch.flat_observations)).to(batch.rewards)
        fill_bootstrap(self.policy, batch)
        batch.returns, batch.advantages = self._estimate(batch)
        self._publish(batch, self.rollout_buffer)
        self.policy.set_training_mode(True)

    def _accumulate_gradient(self, batch: RolloutBatch) -> Metrics:
        """Set the parameters' ``grad`` to the gradient of the loss.

        :return: the loss's parts
        """
        self.policy.optimizer.zero_grad()
        if batch.returns is None or batch.advantages is None:
            batch.returns, batch.advantages = self._estimate(batch)
        shares_step = self._uses_critic() and not (self._critic_is_separate and not self._shares_features)
        log_prob, entropy, values = self._evaluate(batch, with_values=shares_step)

        advantages = batch.advantages
        if self.normalize_advantage:
            advantages = normalize(advantages, batch.mask, tolerance=_rounding(batch.returns, advantages))
        weights = self._weights(batch)
        if weights is not None:
            advantages = advantages * weights
        policy_loss = policy_gradient_loss(
            log_prob, batch.select(advantages).to(log_prob.dtype), n_episodes=batch.n_episodes
        )
        # Without a closed form, -log_prob estimates the entropy; its gradient is that of the score function.
        bonus = -log_prob.detach() * log_prob if entropy is None else entropy
        loss = policy_loss - self.ent_coef * reduce_actor(bonus, n_episodes=batch.n_episodes)
        metrics: Metrics = {
            "policy_loss": policy_loss,
            "entropy_loss": (log_prob if entropy is None else -entropy).mean(),
            "explained_variance": _explained_variance(batch),
        }
        if values is not None:
            critic_loss = value_loss(values, batch.select(batch.returns).to(values.dtype))
            loss = loss + self.vf_coef * critic_loss
            metrics["value_loss"] = critic_loss
        loss.backward()
        if self._critic_is_separate:
            for parameter in self._critic_only().values():
                parameter.grad = None  # its own optimizer's business
        if hasattr(self.policy, "log_std"):
            metrics["std"] = self.policy.log_std.exp().mean()
        return metrics

    @property
    def _shares_features(self) -> bool:
        actor, critic = self.parameter_sets
        return not actor.keys().isdisjoint(critic)

    def _evaluate(self, batch: RolloutBatch, with_values: bool) -> tuple[th.Tensor, th.Tensor | None, th.Tensor | None]:
        """Log-prob, entropy and, where asked for, values of the valid samples, with gradient."""
        observations = batch.flat_observations
        actions = policy_actions(batch.select(batch.actions), self.action_space)
        if with_values or has_own_forward(self.policy):
            values, log_prob, entropy = self.policy.evaluate_actions(observations, actions)
            return log_prob, entropy, values.flatten() if with_values else None
        distribution = self.policy.get_distribution(observations)
        return distribution.log_prob(actions), distribution.entropy(), None


def _rounding(returns: th.Tensor, advantages: th.Tensor) -> th.Tensor:
    """Rounding of the numbers that advantages are differences of: values come from a network in single precision."""
    return th.maximum(returns.abs().amax(), (returns - advantages).abs().amax()) * th.finfo(th.float32).eps


def _explained_variance(batch: RolloutBatch) -> th.Tensor:
    """1 - Var[G - b] / Var[G]: 1 is a perfect baseline, 0 no better than a constant; NaN if all G are equal."""
    returns: th.Tensor = batch.select(batch.returns)
    advantages: th.Tensor = batch.select(batch.advantages)
    variance = returns.var(correction=0)
    return 1.0 - advantages.var(correction=0) / variance.where(variance > 0, th.nan)
