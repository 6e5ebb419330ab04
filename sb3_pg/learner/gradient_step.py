"""One step of gradient ascent along the policy gradient."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pg import compat
from sb3_pg.functional import policy_gradient_loss, reduce_actor, value_loss
from sb3_pg.learner.critic import correct
from sb3_pg.learner.learner import Learner, Step, StepInputs
from sb3_pg.learner.metrics import Metrics, describe_policy, measure_step
from sb3_pg.learner.rollback import nonfinite_gradient
from sb3_pg.policies import ActionScores, score_actions, uncompiled
from sb3_pg.rollout import RolloutBatch


@dataclass
class GradientStep(Step):
    r"""One step of ``policy.optimizer`` along the gradient of the pseudo-loss.

    .. math:: L(\theta, \phi) = -\hat E[w_t \log \pi_\theta(a_t|s_t) \hat A_t]
              - c_{ent} \hat E[H(\pi_\theta(\cdot|s_t))] + c_k P(\theta) + c_{vf} \hat E[(V_\phi(s_t) - y_t)^2]

    For complete episodes, E is the sum over time and the mean over episodes; for segments, the mean over steps. The
    critic's E is always the mean over steps. A critic with steps of its own has no term here, unless actor and critic
    share features, which are trained by both losses. c_k P is the weighted penalty of an
    :class:`~sb3_pg.learner.Anchor`, a mean over steps. For complete episodes it is multiplied by their mean length: its
    share of the gradient is that with segments.

    :param ent_coef: c_ent, weight of the entropy bonus, reward units per nat
    :param vf_coef: c_vf, weight of the critic's loss
    :param max_grad_norm: the gradient is scaled down to this norm, None for no limit
    """

    ent_coef: float = 0.0
    vf_coef: float = 0.5
    max_grad_norm: float | None = 0.5
    reuses_scores: ClassVar[bool] = True
    #: whether the step uses values, and their gradients, also where the critic's loss is no part of it
    needs_values: ClassVar[bool] = False

    def take(self, learner: Learner, batch: RolloutBatch, inputs: StepInputs) -> Metrics:
        """Take the step."""
        policy, n_episodes, report = learner.policy, batch.n_episodes, learner.report
        scores = self._scores(learner, batch, inputs)
        log_prob, entropy = scores.log_prob, None
        if self.ent_coef > 0 or report != "nothing":
            with th.set_grad_enabled(self.ent_coef > 0):
                entropy = scores.entropy()
        policy_loss = loss = policy_gradient_loss(log_prob, inputs.credit.to(log_prob.dtype), n_episodes=n_episodes)
        metrics: Metrics = {"policy_loss": policy_loss}
        if self.ent_coef > 0:
            # Without a closed form, -log_prob estimates the entropy; its gradient is that of the score function.
            bonus = -log_prob.detach() * log_prob if entropy is None else entropy
            loss = loss - self.ent_coef * reduce_actor(bonus, n_episodes=n_episodes)
        if (anchor := learner.active_anchor) is not None:
            known = None if scores.distribution is None else scores.distribution()
            penalty = anchor.draw(policy)(inputs.observations, known)
            length = 1.0 if n_episodes is None else len(log_prob) / n_episodes
            loss = loss + anchor.weight * length * penalty
            metrics |= anchor.metrics(penalty)
        if scores.values is not None and inputs.targets is not None:
            metrics["value_loss"] = value_loss(scores.values, inputs.targets)
            loss = loss + self.vf_coef * metrics["value_loss"]
        if report != "nothing":
            metrics |= describe_policy(policy, -log_prob if entropy is None else entropy)
        self._gradient = _gradient(-policy_loss, list(learner.actor.values()) if report == "step" else [])
        corrections = self._corrections(learner, batch, inputs, scores)
        norm = descend(policy, loss, inputs, self.max_grad_norm, corrections)
        if not math.isfinite(norm):
            raise nonfinite_gradient(policy, batch, metrics)
        policy.optimizer.step()
        return metrics | {"grad_norm": norm}

    def _corrections(
        self, learner: Learner, batch: RolloutBatch, inputs: StepInputs, scores: ActionScores
    ) -> dict[th.nn.Parameter, th.Tensor]:
        """Return what is subtracted from the loss's gradient, parameter -> correction."""
        if inputs.constants is None:
            return {}
        log_prob, weights = scores.log_prob, learner.estimator.weights(batch)
        ones = batch.select(th.ones_like(batch.rewards) if weights is None else weights).to(log_prob.dtype)
        loss = policy_gradient_loss(log_prob, ones, n_episodes=batch.n_episodes)
        score = _gradient(loss, list(learner.actor.values()))
        parts = inputs.constants.split([part.numel() for part in score.values()])
        return {p: c.view_as(p) * part for (p, part), c in zip(score.items(), parts, strict=True)}

    def _scores(self, learner: Learner, batch: RolloutBatch, inputs: StepInputs) -> ActionScores:
        """Return the scores that the batch has kept, if the policy is still the same, or compute them."""
        policy, with_values = learner.policy, self.needs_values or inputs.targets is not None
        kept, batch.kept_scores = batch.kept_scores, None
        if kept is not None and learner.before is not None:
            scores = kept.of(policy, learner.before, with_values)
            if scores is not None:
                return scores
        twice = self.needs_values or learner.report == "step" or inputs.constants is not None
        with uncompiled() if twice else nullcontext():
            return score_actions(policy, inputs.observations, inputs.actions, with_values)

    def measure(self, learner: Learner, batch: RolloutBatch, inputs: StepInputs) -> Metrics:
        """Compare the policy with the one before the step."""
        assert learner.before is not None
        before = learner.before.values()
        changes = {parameter: parameter.detach() - before[parameter] for parameter in learner.parameters.actor.values()}
        return measure_step(learner.policy, batch, inputs.actions, inputs.credit, changes, self._gradient)


def _gradient(objective: th.Tensor, parameters: list[th.nn.Parameter]) -> dict[th.nn.Parameter, th.Tensor]:
    """Return parameter -> gradient, and keep the graph."""
    if not parameters:
        return {}
    gradients = th.autograd.grad(objective, parameters, retain_graph=True, materialize_grads=True)
    return dict(zip(parameters, gradients, strict=True))


def descend(
    policy: ActorCriticPolicy,
    loss: th.Tensor,
    inputs: StepInputs,
    max_norm: float | None,
    corrections: Mapping[th.nn.Parameter, th.Tensor] | None = None,
) -> th.Tensor:
    """Set the parameters' ``grad`` to the clipped gradient of a loss, for ``policy.optimizer``.

    :param policy: the policy
    :param loss: a scalar
    :param inputs: which parameters are trained
    :param max_norm: largest norm, None for no limit
    :param corrections: parameter -> what is subtracted from its gradient, if it has one
    :return: the gradient's norm before clipping
    """
    for parameter in inputs.parameters:
        parameter.grad = None
    for group in policy.optimizer.param_groups:  # it may hold parameters that the policy no longer has
        for parameter in group["params"]:
            parameter.grad = None
    if inputs.trained is None:
        if loss.requires_grad:  # unless all parameters are frozen
            loss.backward()
    elif inputs.trained:
        loss.backward(inputs=inputs.trained)
    for parameter in inputs.untrained:
        parameter.grad = None
    correct(corrections or {})
    return clip_gradient(inputs.parameters, max_norm)


def clip_gradient(parameters: list[th.nn.Parameter], max_norm: float | None) -> th.Tensor:
    """Scale the gradient down to a norm, as :func:`torch.nn.utils.clip_grad_norm_` does.

    :param parameters: those without a gradient are left out
    :param max_norm: largest norm, None for no limit
    :return: the norm before clipping
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if len({(gradient.dtype, gradient.device) for gradient in gradients}) != 1:  # none at all, or a mixture
        return th.nn.utils.clip_grad_norm_(parameters, max_norm or th.inf).to(parameters[0].device)
    norm: th.Tensor = th.linalg.vector_norm(compat.flatten(gradients))
    if max_norm is not None and max_norm < th.inf:
        compat.scale_all(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
