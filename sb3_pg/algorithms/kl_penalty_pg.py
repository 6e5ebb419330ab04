"""Policy gradient under a KL constraint, by dual gradient descent."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from torch.distributions import Distribution

from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.trust_region import TrustRegionAlgorithm
from sb3_pg.errors import NonFiniteError
from sb3_pg.functional import joint_kl, value_loss, with_parameters
from sb3_pg.learner.metrics import Metrics, describe_policy
from sb3_pg.learner.optimizers import clip_gradient
from sb3_pg.learner.rollback import nonfinite_gradient, require_finite_parameters
from sb3_pg.learner.surrogate import SurrogateObjective, require_torch_distributions
from sb3_pg.policies import (
    EntropyUse,
    Observations,
    action_distribution,
    evaluate,
    evaluation_mode,
    split_observations,
    structure_of,
)
from sb3_pg.rollout import RolloutBatch


class KLPenaltyPG(TrustRegionAlgorithm):
    r"""The surrogate objective under a limit of the KL, by dual gradient descent.

    .. math:: \mathcal L(\theta, \lambda) = L(\theta) - \lambda\, \big(\bar D_{KL}(\theta_{old}, \theta) - \epsilon\big)

    1. :math:`\theta \leftarrow \arg\max_\theta \mathcal L(\theta, \lambda)`, approximately: at most
       ``n_epochs`` passes of minibatch gradient steps
    2. :math:`\lambda \leftarrow \max\big(0,\; \lambda + \alpha\, (\bar D_{KL} - \epsilon)\big)`

    L is :class:`~sb3_pg.learner.surrogate.SurrogateObjective`, the KL that of old || new of the whole action vector,
    for step 2 measured on the whole batch. Source: the lecture's policy gradient with constraints (which prints the
    divergence turned round); Boyd et al. (2011), section 2.1, for dual ascent; Schulman et al. (2017), section
    4, for ``dual_update="multiplicative"``: lambda is doubled where the KL is above 1.5 epsilon, halved where it is
    below epsilon / 1.5.

    At the optimum the KL is epsilon, or lambda is 0. lambda's scale is that of the advantages over sqrt(epsilon), and
    alpha's that of lambda over epsilon: the defaults are made for ``normalize_advantage``.

    :param policy: see :class:`~sb3_pg.algorithms.setup.ConfiguredAlgorithm`, as for all arguments but these
    :param batch_size: samples per gradient step, of the critic too unless ``critic_batch_size`` is given
    :param n_epochs: passes over each batch
    :param target_kl: epsilon, the joint KL between one policy and the next, nats
    :param kl_coef: lambda at the start; training moves it, and ``model.kl_coef`` is what it is now
    :param dual_update: "additive", the gradient step above, or "multiplicative"
    :param dual_learning_rate: alpha of "additive", units of lambda per nat
    :param max_kl_ratio: passes over a batch end after one in which a minibatch's KL was above this many times
        ``target_kl``, so that no update carries the policy, and lambda after it, far away; None: never
    :param critic_learning_rate: None, with ``n_critic_updates=1``, trains actor and critic in one step, as PPO
    :param kwargs: of :class:`~sb3_pg.algorithms.critic_estimates.CriticEstimates`, and those that all algorithms share
    :raises ValueError: an argument out of range, arguments that contradict each other, or a policy whose distribution
        is not known
    :raises TypeError: an argument of the wrong type, or an unknown one
    """

    batch_size: int
    checks: ClassVar[Mapping[str, arg.Check]] = {
        **TrustRegionAlgorithm.checks,
        "batch_size": arg.integer(1),
        "n_epochs": arg.integer(1),
        "target_kl": arg.positive(),
        "kl_coef": arg.real(0),
        "dual_update": arg.choice("additive", "multiplicative"),
        "dual_learning_rate": arg.positive(),
        "max_kl_ratio": arg.positive(optional=True),
    }

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str | None,
        learning_rate: float | str | Schedule = 3e-4,
        n_steps: int | None = 2048,
        batch_size: int = 64,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        target_kl: float = 0.01,
        kl_coef: float = 1.0,
        dual_update: str = "additive",
        dual_learning_rate: float = 50.0,
        max_kl_ratio: float | None = 2.0,
        critic_learning_rate: float | str | Schedule | None = 1e-3,
        n_critic_updates: int = 10,
        normalize_advantage: bool = True,
        **kwargs: Any,
    ) -> None:
        self.batch_size = batch_size
        self.n_epochs = n_epochs
        self.target_kl = target_kl
        self.kl_coef = kl_coef
        self.dual_update = dual_update
        self.dual_learning_rate = dual_learning_rate
        self.max_kl_ratio = max_kl_ratio
        super().__init__(
            policy,
            env,
            learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            critic_learning_rate=critic_learning_rate,
            n_critic_updates=n_critic_updates,
            normalize_advantage=normalize_advantage,
            **arg.known_arguments(type(self), kwargs),
        )

    def _check_combinations(self) -> None:
        super()._check_combinations()
        if self.dual_update == "multiplicative" and self.kl_coef == 0:
            raise ValueError("dual_update='multiplicative' leaves kl_coef=0 at 0 for ever: start above 0")

    def _without_effect(self) -> dict[str, str]:
        unused = super()._without_effect()
        if self.dual_update == "multiplicative":
            unused["dual_learning_rate"] = "dual_update='multiplicative': give dual_update='additive'"
        return unused

    def _update(self, batch: RolloutBatch) -> Metrics:
        metrics = super()._update(batch)
        if "joint_kl" in metrics:
            require_finite_parameters(self.policy)
            self.kl_coef = self._next_kl_coef(float(metrics["joint_kl"]))
        return metrics

    def _next_kl_coef(self, kl: float) -> float:
        """Step 2."""
        if self.dual_update == "additive":
            return max(0.0, self.kl_coef + self.dual_learning_rate * (kl - self.target_kl))
        factor = 2.0 if kl > 1.5 * self.target_kl else 0.5 if kl < self.target_kl / 1.5 else 1.0
        return min(max(self.kl_coef * factor, 1e-8), 1e8)  # 0 and infinity would stay what they are

    def _move_actor(self, batch: RolloutBatch) -> Metrics:
        objective = SurrogateObjective(self.policy, batch, self._distinguishing_credit(batch), self.ent_coef)
        actor = self._trained_actor
        before = [parameter.detach().clone() for parameter in actor]
        gradient = None
        with evaluation_mode(self.policy):
            if actor and self._explains():
                gradient = objective.gradient(actor, keep_graph=False)
            else:
                objective.remember()
        metrics = self._ascend(batch, objective)
        if self._warms_up():
            return metrics
        with evaluation_mode(self.policy):
            effect = objective.effect()
        if not math.isfinite(effect.joint_kl):
            raise NonFiniteError("joint_kl", float(effect.joint_kl), hint="A smaller learning rate may help.")
        changes = [now.detach() - then for now, then in zip(actor, before, strict=True)]
        if gradient is not None:
            metrics["surrogate_predicted"] = gradient.dot(th.cat([change.flatten() for change in changes]))
        return metrics | {
            **describe_policy(self.policy, objective.entropy),
            **effect.metrics(),
            "kl_coef": self.kl_coef,
            "step_size": th.nn.utils.get_total_norm(changes),
        }

    def _ascend(self, batch: RolloutBatch, objective: SurrogateObjective) -> Metrics:
        """Step 1.

        :return: means over its gradient steps
        :raises NonFiniteError: a gradient is not finite
        """
        kind, old = objective.old_distribution
        targets = self._critic_targets(batch) if self._critic_shares_step else objective.credit
        columns = (objective.actions, objective.credit.float(), objective.old_log_prob, targets, *old)
        steps = []
        for _ in range(self.n_epochs):
            order = th.randperm(len(targets), device=targets.device)  # one gather per pass; minibatches are views
            observations = split_observations(batch.flat_observations, self.batch_size, order)
            rows = zip(*[column[order].split(self.batch_size) for column in columns], strict=True)
            epoch = [
                self._minibatch_step(observation, action, credit, log_prob, target, with_parameters(kind, parameters))
                for observation, (action, credit, log_prob, target, *parameters) in zip(observations, rows, strict=True)
            ]
            steps += epoch
            kl, norm = th.stack([th.stack((step["kl"], step["grad_norm"])) for step in epoch]).amax(0).tolist()
            if not math.isfinite(norm):
                raise nonfinite_gradient(self.policy, batch)
            if self.max_kl_ratio is not None and kl > self.max_kl_ratio * self.target_kl:
                break
        means = {name: th.stack([step[name] for step in steps]).mean() for name in steps[0] if name != "kl"}
        return means | {"n_epochs": len(steps) / len(epoch)}

    def _minibatch_step(
        self,
        observations: Observations,
        actions: th.Tensor,
        credit: th.Tensor,
        old_log_prob: th.Tensor,
        targets: th.Tensor,
        old: list[Distribution],
    ) -> dict[str, th.Tensor]:
        """A step of gradient ascent."""
        use: EntropyUse = "gradient" if self.ent_coef > 0 else "none"
        log_prob, entropy, values, new, *_ = evaluate(self.policy, observations, actions, self._critic_shares_step, use)
        ratio = (log_prob - old_log_prob).exp()
        if new is None:  # a policy with methods of its own
            shown = action_distribution(self.policy, observations)
            kl = joint_kl(old, require_torch_distributions(self.policy, shown)).mean()
        else:
            kl = joint_kl(old, new()).mean()
        policy_loss = loss = self.kl_coef * kl - (ratio * credit).mean()
        metrics = {"kl": kl, "policy_loss": policy_loss}
        if self.ent_coef > 0:
            loss = loss - self.ent_coef * (ratio - 1 - ratio * log_prob if entropy is None else entropy).mean()
        if values is not None:
            metrics["value_loss"] = value_loss(values, targets)
            loss = loss + self.vf_coef * metrics["value_loss"]
        self._backward(loss)
        metrics["grad_norm"] = clip_gradient(structure_of(self.policy).parameters, self.max_grad_norm)
        self.policy.optimizer.step()
        return {name: value.detach() for name, value in metrics.items()}
