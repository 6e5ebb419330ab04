"""Algorithms that estimate an advantage and take one gradient step on the pseudo-loss."""

from typing import Any

import torch as th

from sb3_pg.algorithms.update import UpdatingAlgorithm
from sb3_pg.functional import policy_gradient_loss, reduce_actor, value_loss
from sb3_pg.learner.metrics import Metrics, describe_policy
from sb3_pg.policies import Evaluation, compiled, evaluate, is_same_in_both_modes, policy_actions
from sb3_pg.rollout import RolloutBatch


class FirstOrderAlgorithm(UpdatingAlgorithm):
    r"""One step of gradient ascent per batch.

    .. math:: L(\theta, \phi) = -\hat E[w_t \log \pi_\theta(a_t|s_t) \hat A_t]
              - c_{ent} \hat E[H(\pi_\theta(\cdot|s_t))] + c_{vf} \hat E[(V_\phi(s_t) - y_t)^2]

    E is the sum over time and mean over episodes for complete episodes, the mean over steps for segments; the
    critic's mean is over steps in both. The critic's term drops out where the critic has an optimizer of its own,
    except for features that actor and critic share: those are trained by both losses.
    """

    def _move_actor(self, batch: RolloutBatch) -> Metrics:
        metrics = self._accumulate_gradient(batch)
        metrics["grad_norm"] = self._gradient_step(batch)
        return metrics

    def _gradient_of(self) -> str | None:
        fits_first = self._critic_is_separate and self.critic_fit == "before"
        if fits_first or not is_same_in_both_modes(self.policy):
            return None
        return "both" if self._critic_shares_step else "actor"

    def _accumulate_gradient(self, batch: RolloutBatch) -> Metrics:
        """Set the parameters' ``grad`` to the gradient of the loss.

        :return: the loss's parts
        """
        loss, metrics = self._loss(batch)
        self._backward(loss)
        return metrics

    def _loss(self, batch: RolloutBatch) -> tuple[th.Tensor, Metrics]:
        """The loss of the class's docstring, and its parts."""
        if batch.returns is None or batch.advantages is None:  # a batch that no collector has made
            batch.returns, batch.advantages = self._estimate(batch)
        log_prob, entropy, values, *_ = self._evaluation(batch)
        credit = self._credit(batch)
        weights = batch.select(credit).to(log_prob.dtype)
        policy_loss = loss = policy_gradient_loss(log_prob, weights, n_episodes=batch.n_episodes)
        metrics: Metrics = {"policy_loss": policy_loss}
        if self.ent_coef > 0:
            # Without a closed form, -log_prob estimates the entropy; its gradient is that of the score function.
            bonus = -log_prob.detach() * log_prob if entropy is None else entropy
            loss = loss - self.ent_coef * reduce_actor(bonus, n_episodes=batch.n_episodes)
        if values is not None:
            metrics["value_loss"] = value_loss(values, self._critic_targets(batch))
            loss = loss + self.vf_coef * metrics["value_loss"]
        if self._describes():
            metrics |= describe_policy(self.policy, -log_prob if entropy is None else entropy)
        if self._explains():
            actor = self._trained_actor
            gradient: Any = (
                th.autograd.grad(policy_loss, actor, retain_graph=True, materialize_grads=True) if actor else ()
            )
            self._surrogate = credit, {parameter: -g for parameter, g in zip(actor, gradient, strict=True)}
        return loss, metrics

    def _evaluation(self, batch: RolloutBatch) -> Evaluation:
        """The batch's own forward, if it still has its graph; otherwise a new one."""
        evaluation: Evaluation | None = batch.evaluation
        batch.evaluation = None
        if evaluation is not None:
            return evaluation
        # Of a graph that is differentiated twice torch.compile knows only if it was told, as compile=True does.
        with compiled(self.compile or not self._explains()):
            return evaluate(
                self.policy,
                batch.flat_observations,
                policy_actions(batch.select(batch.actions), self.action_space),
                with_values=self._critic_shares_step,
                entropy=self._entropy_use(),
            )
