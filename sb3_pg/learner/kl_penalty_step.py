"""Dual gradient descent on a KL constraint."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.distributions import Distribution

from sb3_pg.errors import NonFiniteError
from sb3_pg.functional import joint_kl, value_loss, with_parameters
from sb3_pg.learner.anchor import Anchor
from sb3_pg.learner.gradient_step import descend
from sb3_pg.learner.learner import Learner, Step, StepInputs
from sb3_pg.learner.metrics import Metrics, describe_policy
from sb3_pg.learner.rollback import nonfinite_gradient, require_finite_parameters
from sb3_pg.learner.trust_region import SurrogateObjective, require_torch_distributions
from sb3_pg.policies import (
    action_distribution,
    evaluation_mode,
    minibatches,
    score_actions,
)
from sb3_pg.rollout import RolloutBatch


@dataclass
class KLPenaltyStep(Step):
    r"""The surrogate objective under a limit of the KL.

    .. math:: \mathcal L(\theta, \lambda) = L(\theta) - \lambda\, \big(\bar D_{KL}(\theta_{old}, \theta) - \epsilon\big)

    1. :math:`\theta \leftarrow \arg\max_\theta \mathcal L(\theta, \lambda)`, approximately: at most ``n_epochs``
       passes of minibatch gradient steps
    2. :math:`\lambda \leftarrow \max\big(0,\; \lambda + \alpha\, (\bar D_{KL} - \epsilon)\big)`

    The parameters are those of :class:`~sb3_pg.KLPenaltyPG`. ``kl_coef`` is lambda, which the step moves. The penalty
    of an :class:`~sb3_pg.learner.Anchor` is part of each minibatch's loss, with a draw of its own. The logged surrogate
    is without it.
    """

    kl_coef: float = 1.0
    target_kl: float = 0.01
    batch_size: int = 64
    n_epochs: int = 10
    dual_update: Literal["additive", "multiplicative"] = "additive"
    dual_learning_rate: float = 50.0
    max_kl_ratio: float | None = 2.0
    ent_coef: float = 0.0
    vf_coef: float = 0.5
    max_grad_norm: float | None = 0.5
    length_follows_gradient: ClassVar[bool] = False

    def take(self, learner: Learner, batch: RolloutBatch, inputs: StepInputs) -> Metrics:
        """Take step 1; while the critic warms up, it trains the critic alone."""
        policy, self._next_kl_coef = learner.policy, self.kl_coef
        objective = SurrogateObjective(policy, inputs.observations, inputs.actions, inputs.credit, self.ent_coef)
        actor = list(learner.actor.values())
        before = [parameter.detach().clone() for parameter in actor]
        gradient = None
        with evaluation_mode(policy):
            if actor and learner.report == "step":
                gradient = objective.gradient(actor, keep_graph=False)
            else:
                objective.remember()
        metrics = self._ascend(learner, batch, inputs, objective)
        if learner.warms_up:
            return metrics
        with evaluation_mode(policy):
            effect = objective.effect()
        kl = float(effect.joint_kl)
        if not math.isfinite(kl):
            raise NonFiniteError("joint_kl", kl, hint="A smaller learning rate may help.")
        require_finite_parameters(policy)
        changes = [now.detach() - then for now, then in zip(actor, before, strict=True)]
        if gradient is not None:
            metrics["surrogate_predicted"] = gradient.dot(th.cat([change.flatten() for change in changes]))
        metrics |= {
            **describe_policy(policy, objective.entropy),
            **effect.metrics(),
            "kl_coef": self.kl_coef,
            "step_size": th.nn.utils.get_total_norm(changes),
        }
        self._next_kl_coef = self._moved_kl_coef(kl)
        return metrics

    def conclude(self, learner: Learner) -> None:
        """Take step 2, unless the update was undone."""
        if not learner.outcome:
            self.kl_coef = self._next_kl_coef
        super().conclude(learner)

    def _moved_kl_coef(self, kl: float) -> float:
        if self.dual_update == "additive":
            return max(0.0, self.kl_coef + self.dual_learning_rate * (kl - self.target_kl))
        factor = 2.0 if kl > 1.5 * self.target_kl else 0.5 if kl < self.target_kl / 1.5 else 1.0
        return min(max(self.kl_coef * factor, 1e-8), 1e8)  # 0 and infinity would stay what they are

    def _ascend(
        self, learner: Learner, batch: RolloutBatch, inputs: StepInputs, objective: SurrogateObjective
    ) -> Metrics:
        """Step 1.

        :return: means over its gradient steps
        :raises NonFiniteError: a gradient is not finite
        """
        policy, anchor = learner.policy, learner.active_anchor
        kind, old = objective.old_distribution
        targets = inputs.credit if inputs.targets is None else inputs.targets
        columns = (inputs.actions, inputs.credit.float(), objective.old_log_prob, targets, *old)
        steps = []
        for _ in range(self.n_epochs):
            epoch = []
            for obs, rows in minibatches(inputs.observations, columns, self.batch_size, shuffle=True):
                action, credit, log_prob, target, *parameters = rows
                y = None if inputs.targets is None else target
                minibatch = inputs._replace(observations=obs, actions=action, credit=credit, targets=y)
                before = with_parameters(kind, parameters)
                epoch.append(self._minibatch_step(policy, minibatch, log_prob, before, anchor))
            steps += epoch
            kl, norm = th.stack([th.stack((step["kl"], step["grad_norm"])) for step in epoch]).amax(0).tolist()
            if not math.isfinite(norm):
                sums = {name: th.stack([step[name] for step in epoch]).sum() for name in epoch[0]}
                raise nonfinite_gradient(policy, batch, sums)
            if self.max_kl_ratio is not None and kl > self.max_kl_ratio * self.target_kl:
                break
        means = {name: th.stack([step[name] for step in steps]).mean() for name in steps[0] if name != "kl"}
        return means | {"n_epochs": len(steps) / len(epoch)}

    def _minibatch_step(
        self,
        policy: ActorCriticPolicy,
        inputs: StepInputs,
        old_log_prob: th.Tensor,
        old: list[Distribution],
        anchor: Anchor | None,
    ) -> dict[str, th.Tensor]:
        """One step of gradient ascent."""
        observations, with_values = inputs.observations, inputs.targets is not None
        scores = score_actions(policy, observations, inputs.actions, with_values)
        log_prob = scores.log_prob
        ratio = (log_prob - old_log_prob).exp()
        if scores.distribution is None:  # a policy with methods of its own
            new = require_torch_distributions(policy, action_distribution(policy, observations))
        else:
            new = scores.distribution()
        kl = joint_kl(old, new).mean()
        policy_loss = loss = self.kl_coef * kl - (ratio * inputs.credit).mean()
        metrics = {"kl": kl, "policy_loss": policy_loss}
        if self.ent_coef > 0:
            entropy = scores.entropy()
            loss = loss - self.ent_coef * (ratio - 1 - ratio * log_prob if entropy is None else entropy).mean()
        if anchor is not None:
            penalty = anchor.draw(policy)(observations, new)
            loss = loss + anchor.weight * penalty
            metrics |= {name: th.as_tensor(value) for name, value in anchor.metrics(penalty).items()}
        if scores.values is not None and inputs.targets is not None:
            metrics["value_loss"] = value_loss(scores.values, inputs.targets)
            loss = loss + self.vf_coef * metrics["value_loss"]
        metrics["grad_norm"] = descend(policy, loss, inputs, self.max_grad_norm)
        policy.optimizer.step()
        return {name: value.detach() for name, value in metrics.items()}
