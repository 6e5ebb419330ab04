"""Steps within a trust region: the surrogate objective, how far a policy has gone, and the natural gradient's step."""

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch as th
from stable_baselines3.common.distributions import Distribution as SB3Distribution
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pg.functional import (
    FisherVectorProduct,
    LineSearch,
    Solution,
    conjugate_gradient,
    distribution_parameters,
    joint_kl,
    line_search,
    with_parameters,
)
from sb3_pg.functional.precision import precise
from sb3_pg.learner.anchor import Anchor
from sb3_pg.learner.learner import Learner, Step, StepInputs
from sb3_pg.learner.metrics import Metrics, describe_policy
from sb3_pg.learner.rollback import nonfinite_gradient
from sb3_pg.policies import (
    CHUNK_SIZE,
    Distributions,
    Observations,
    action_dist_kept,
    action_distribution,
    evaluation_mode,
    example_observation,
    minibatches,
    one_in,
    torch_distributions,
    uncompiled,
    unvalidated_distributions,
)
from sb3_pg.rollout import RolloutBatch

#: Reason why no step was taken -> what may help against it.
_ADVICE = {
    "kl": "The divergence is above target_kl even after the shortest step: more line_search_max_iter or cg_damping.",
    "no_improvement": "The objective gains less than predicted: larger batches, or a smaller target_kl.",
    "nonfinite": "A number overflows: look at the observations' and the log-probs' scale.",
    "curvature": "The Fisher matrix is singular to rounding: more cg_damping, or a smaller fisher_subsample.",
    "zero_gradient": "All advantages are equal, which tells no action from another; or the actor is frozen.",
    "zero_step": "The schedule of target_kl, or of NPG's step_size, has come to 0.",
}
_FAILURES_TO_WARN = 3


class Effect(NamedTuple):
    """What a step has done to the policy, measured on the samples that it was made from; by default, no step.

    ``gain`` is that of the objective, entropy and anchor included, in reward units.
    """

    joint_kl: th.Tensor | float = 0.0
    gain: th.Tensor | float = 0.0
    largest_ratio: th.Tensor | float = 1.0
    effective_sample_size: th.Tensor | float = 1.0

    def metrics(self) -> Metrics:
        """Name -> number to log."""
        return {
            "joint_kl": self.joint_kl,
            "surrogate_realized": self.gain,
            "largest_ratio": self.largest_ratio,
            "effective_sample_size": self.effective_sample_size,
        }


class _Old(NamedTuple):
    """The policy before the step, at one chunk of states."""

    log_prob: th.Tensor
    entropy: th.Tensor
    distribution: Sequence[th.distributions.Distribution]
    penalty: th.Tensor


class SurrogateObjective:
    r"""Objective of a new policy, estimated from a batch that the old policy has collected.

    .. math:: L(\theta) = \hat E[\rho_t(\theta)\, w_t \hat A_t] + c_{ent} \hat E[H(\pi_\theta(\cdot|s_t))]
              - c_k P(\theta), \qquad \rho_t(\theta) = \frac{\pi_\theta(a_t|s_t)}{\pi_{old}(a_t|s_t)}

    E is the mean over steps, and c_k P the weighted penalty of an :class:`~sb3_pg.learner.Anchor`. Source: Schulman et
    al. (2015), eq. 14; Kakade and Langford (2002), theorem 4.1. An entropy without closed form is estimated by
    rho - 1 - rho log pi, whose gradient at theta_old is that of the score function.

    :param policy: in evaluation mode whenever a method is called: the policy that acts
    :param observations: the states that it was in, one row per sample, or their history
    :param actions: what it did there, as its distribution expects them
    :param credit: w_t A_t, reward units, ``(n_samples,)``
    :param ent_coef: c_ent
    :param chunk_size: samples per forward; of a single chunk the graph is kept
    :param anchor: the anchor, which draws one penalty for all of this object's computations; None for none
    """

    def __init__(
        self,
        policy: ActorCriticPolicy,
        observations: Any,
        actions: th.Tensor,
        credit: th.Tensor,
        ent_coef: float = 0.0,
        chunk_size: int = CHUNK_SIZE,
        anchor: Anchor | None = None,
    ) -> None:
        self._policy, self._ent_coef, self._chunk_size = policy, ent_coef, chunk_size
        self._n_samples = len(credit)
        self._anchor, self._penalty = anchor, None if anchor is None else anchor.draw(policy)
        samples = th.arange(len(credit), device=credit.device)
        chunks = list(minibatches(observations, [actions, credit, samples], chunk_size, shuffle=False))
        self._chunks = [(chunk, actions, credit) for chunk, (actions, credit, _) in chunks]
        #: how many states each chunk's penalty counts for: a penalty that uses no states is computed once
        self._shares = [len(credit) for *_, credit in self._chunks]
        if anchor is not None and not anchor.uses_states:
            self._shares = [self._n_samples, *(0 for _ in self._chunks[1:])]
        #: place of each sample in the chunks
        self._places = th.cat([rows for _, (_, _, rows) in chunks]).argsort()
        self._old: list[_Old] = []
        #: of a single chunk: the distribution with its graph, once the gradient is known
        self.distribution: Distributions | None = None

    @property
    def old_log_prob(self) -> th.Tensor:
        """Log-probs of the actions before the step, nats, ``(n_samples,)``."""
        return th.cat([old.log_prob for old in self._old])[self._places]

    @property
    def entropy(self) -> th.Tensor:
        """Mean entropy of the policy before the step, nats."""
        return th.cat([old.entropy for old in self._old]).mean()

    @property
    def anchor_metrics(self) -> Metrics:
        """Metrics of the anchor before the step."""
        if self._anchor is None:
            return {}
        return self._anchor.metrics(th.stack([old.penalty for old in self._old]).sum() / self._n_samples)

    @property
    def old_distribution(self) -> tuple[Sequence[th.distributions.Distribution], list[th.Tensor]]:
        """The policy's distribution before the step: an object of its kind, and its parameters at all states."""
        chunks = [distribution_parameters(old.distribution) for old in self._old]
        return self._old[0].distribution, [th.cat(parts)[self._places] for parts in zip(*chunks, strict=True)]

    def remember(self) -> None:
        """Remember the policy as it is now as the one before the step."""
        self._old = []
        with th.no_grad():
            for observations, actions, _ in self._chunks:
                distribution = action_distribution(self._policy, observations)
                self._remember(observations, distribution, distribution.log_prob(actions), distribution.entropy())

    def gradient(self, parameters: Sequence[th.Tensor], keep_graph: bool = True) -> th.Tensor:
        """Return the gradient at theta, and remember the policy as it is now as the one before the step.

        :param parameters: theta
        :param keep_graph: whether to keep the graph of ``distribution``, if there is a single chunk
        :return: ``(n_parameters,)``
        """
        self._old, parts = [], []
        keep_graph &= len(self._chunks) == 1
        for observations, actions, credit in self._chunks:
            with th.enable_grad(), uncompiled() if keep_graph else nullcontext():
                distribution = action_distribution(self._policy, observations)
                log_prob = distribution.log_prob(actions)
                objective = (log_prob * credit.to(log_prob.dtype)).sum()
                with th.set_grad_enabled(self._ent_coef > 0):
                    entropy = distribution.entropy()
                if self._ent_coef > 0:
                    bonus = -log_prob.detach() * log_prob if entropy is None else entropy
                    objective = objective + self._ent_coef * bonus.sum()
                whole, penalty = self._remember(observations, distribution, log_prob, entropy)
                if self._anchor is not None:
                    objective = objective - self._anchor.weight * penalty
            self.distribution = whole if keep_graph else None
            gradients: Sequence[th.Tensor] = [objective.new_zeros(0)]  # where all of theta is frozen
            if parameters:
                gradients = th.autograd.grad(objective, parameters, retain_graph=keep_graph, materialize_grads=True)
            parts.append(th.cat([gradient.flatten() for gradient in gradients]))
        return th.stack(parts).sum(0) / self._n_samples

    def distributions_at(self, observations: Any) -> list[Callable[[], Distributions]]:
        """Return one function per chunk of states, which computes the policy's distributions there, with graph.

        :param observations: one row per state, or their history
        """
        chunks = minibatches(observations, [], self._chunk_size, shuffle=False)
        return [partial(self._distributions_at, chunk) for chunk, _ in chunks]

    def _distributions_at(self, chunk: Observations) -> Distributions:
        with uncompiled():  # the graph is differentiated twice
            return require_torch_distributions(self._policy, action_distribution(self._policy, chunk))

    def _remember(
        self, observations: Any, distribution: SB3Distribution, log_prob: th.Tensor, entropy: th.Tensor | None
    ) -> tuple[Distributions, th.Tensor]:
        """Return the torch distributions at a chunk of states, and the anchor's penalty there."""
        whole = require_torch_distributions(self._policy, distribution)
        penalty = self._penalty_at(observations, whole, self._shares[len(self._old)])
        known = with_parameters(whole, [z.detach() for z in distribution_parameters(whole)])
        entropies = -log_prob if entropy is None else entropy
        self._old.append(_Old(log_prob.detach(), entropies.detach(), known, penalty.detach()))
        return whole, penalty

    def _penalty_at(self, observations: Any, distributions: Distributions, n: int) -> th.Tensor:
        """Return the anchor's penalty at a chunk of states, times n; 0 without an anchor."""
        if self._penalty is None or not n:
            return self._chunks[0][2].new_zeros(())
        return n * self._penalty(observations, distributions)

    def effect(self) -> Effect:
        """Compare the policy as it is now with the remembered one."""
        kls, gains, bonuses, ratios, penalties = [], [], [], [], []
        with th.no_grad():
            for (observations, actions, credit), old, n in zip(self._chunks, self._old, self._shares, strict=True):
                distribution = action_distribution(self._policy, observations)
                log_prob = distribution.log_prob(actions)
                log_ratio = precise(log_prob - old.log_prob)
                excess = log_ratio.expm1()
                ratios.append(excess + 1)
                gains.append(excess * credit)
                now = require_torch_distributions(self._policy, distribution)
                kls.append(joint_kl(old.distribution, now))
                if self._anchor is not None:
                    penalties.append(self._penalty_at(observations, now, n) - old.penalty)
                if self._ent_coef > 0:
                    entropy = distribution.entropy()
                    new = excess - (excess + 1) * log_prob if entropy is None else entropy
                    bonuses.append(new - old.entropy)
            ratio, gain = th.cat(ratios), th.cat(gains).mean()
            if bonuses:
                gain = gain + self._ent_coef * th.cat(bonuses).mean()
            if self._anchor is not None:
                gain = gain - self._anchor.weight * th.stack(penalties).sum() / self._n_samples
            return Effect(
                joint_kl=precise(th.cat(kls)).mean(),
                gain=gain,
                largest_ratio=ratio.max(),
                effective_sample_size=ratio.sum().square() / ratio.square().sum() / len(ratio),
            )


def require_torch_distributions(policy: ActorCriticPolicy, distribution: SB3Distribution) -> Distributions:
    """Return the torch distributions inside an action distribution of SB3's.

    :raises ValueError: it has none, so that its divergence is not known
    """
    held = torch_distributions(distribution)
    if held is None:
        raise ValueError(
            f"policy must draw actions from a distribution of torch's, whose divergence is known: "
            f"{type(policy).__name__} has a {type(distribution).__name__} without one in its attribute 'distribution'"
        )
    return held


def require_known_divergence(policy: ActorCriticPolicy) -> None:
    """Check that the divergence between two of the policy's action distributions can be computed.

    :raises ValueError: the distribution is not one of torch's, torch knows no divergence of it, or the policy's own
        methods score actions by another distribution than the one that ``get_distribution`` returns
    """
    observation = example_observation(policy)
    with evaluation_mode(policy), th.no_grad(), unvalidated_distributions():
        shown = action_distribution(policy, observation)
        distribution = require_torch_distributions(policy, shown)
        try:
            joint_kl(with_parameters(distribution, distribution_parameters(distribution)), distribution)
        except (NotImplementedError, TypeError) as error:
            raise ValueError(f"policy must have action distributions of known divergence: {error}") from error
        actions = shown.mode()
        shown_log_prob = shown.log_prob(actions)
        with action_dist_kept(policy):
            _, log_prob, _ = policy.evaluate_actions(observation, actions)
        if not th.allclose(log_prob, shown_log_prob, rtol=1e-3, atol=1e-3):
            raise ValueError(
                f"policy must have a get_distribution that agrees with evaluate_actions: {type(policy).__name__} gives "
                f"an action the log-probs {shown_log_prob.tolist()} and {log_prob.tolist()}"
            )


@dataclass
class NaturalStep(Step):
    r"""The natural gradient's direction x, and the step s along it that the KL's quadratic model allows.

    .. math:: x = (F + c I)^{-1} \nabla L(\theta), \qquad s = \sqrt{\frac{2 \delta}{x^T (F + c I) x}}\; x

    With a line search, the step is :math:`\beta^k s` with the smallest k that keeps to

    .. math:: \bar D_{KL}(\pi_{old} \,\|\, \pi_\theta) \le \delta, \qquad
              L(\theta) - L(\theta_{old}) \ge \eta\, \beta^k\, \nabla L^T s

    L is :class:`~sb3_pg.learner.trust_region.SurrogateObjective`, F the Fisher matrix of the whole action vector's
    distribution, averaged over states (:class:`~sb3_pg.functional.FisherVectorProduct`). An anchor changes L, and
    neither F nor the divergence. Source: Kakade (2001); Schulman et al. (2015), appendix C. (The slides print g^T F g
    for the denominator, which is g^T F^-1 g = x^T F x, and exchange the two policies in the divergence.)

    :param target_kl: delta, joint KL, nats
    :param step_size: alpha of the step :math:`\alpha (F + c I)^{-1} \nabla L`, which is taken instead of the one above;
        None for the one above
    :param line_search: whether to search; otherwise a step is undone only if KL or gain are not finite
    :param accept_ratio: eta, smallest gain that is accepted, as a share of the predicted one
    :param shrinking_factor: beta, in (0, 1)
    :param max_iter: largest number of steps that are tried
    :param cg_max_steps: largest number of steps of the conjugate gradient
    :param cg_damping: c
    :param cg_tolerance: residual, as a share of the gradient's norm, at which the conjugate gradient may stop
    :param chunk_size: samples per forward with graph; a batch of no more keeps its graph
    :param subsample: k: one sample in k goes into the Fisher products
    :param ent_coef: weight of the entropy bonus, reward units per nat
    """

    target_kl: float = 0.01
    step_size: float | None = None
    line_search: bool = True
    accept_ratio: float = 0.1
    shrinking_factor: float = 0.8
    max_iter: int = 10
    cg_max_steps: int = 15
    cg_damping: float = 0.1
    cg_tolerance: float = 1e-5
    chunk_size: int = 16384
    subsample: int = 1
    ent_coef: float = 0.0
    length_follows_gradient: ClassVar[bool] = False

    def take(self, learner: Learner, batch: RolloutBatch, inputs: StepInputs) -> Metrics:
        """Take the step in evaluation mode, in which the policy acts."""
        samples = inputs.observations, inputs.actions, inputs.credit
        objective = SurrogateObjective(learner.policy, *samples, self.ent_coef, self.chunk_size, learner.active_anchor)
        with evaluation_mode(learner.policy):
            metrics, learner.outcome = self._take(learner, batch, objective)
        return metrics

    def conclude(self, learner: Learner) -> None:
        """Count the failures in a row, and warn if there are several."""
        reason, state = learner.outcome, learner.state
        state.n_failures = 0 if reason == "accepted" else state.n_failures + 1
        if state.n_failures == _FAILURES_TO_WARN:
            warnings.warn(
                f"The policy has not moved for {_FAILURES_TO_WARN} updates in a row, now because of {reason!r}. "
                f"{_ADVICE[reason]}",
                stacklevel=2,
            )

    def _take(self, learner: Learner, batch: RolloutBatch, objective: SurrogateObjective) -> tuple[Metrics, str]:
        policy, parameters = learner.policy, list(learner.actor.values())
        gradient = objective.gradient(parameters, keep_graph=self.subsample == 1)
        norm = float(precise(gradient).norm())
        metrics: Metrics = {"grad_norm": norm, **describe_policy(policy, objective.entropy), **objective.anchor_metrics}
        if not math.isfinite(norm):
            raise nonfinite_gradient(policy, batch, metrics)
        step, taken, effect = None, LineSearch(0.0, 0, "zero_gradient"), Effect()
        predicted_gain = step_size = 0.0
        if norm > 0:
            fisher = self._fisher(batch, objective, parameters)
            solution = conjugate_gradient(fisher, gradient / norm, self.cg_max_steps, self.cg_tolerance)
            metrics |= {"cg_iterations": solution.n_iterations, "cg_residual": solution.relative_residual}
            step, reason = self._whole_step(solution, fisher, norm)
            taken = taken._replace(reason=reason)
        if step is not None:
            predicted_gain = norm * float((gradient / norm).dot(step))
            taken, effect = self._move_along(parameters, step, objective, predicted_gain)
            step_size = float(step.norm())
        if not taken.fraction:
            if step is not None:
                metrics |= {"rejected_kl": effect.joint_kl, "rejected_gain": effect.gain}
            # the length of a step that was not taken may be infinite
            effect, predicted_gain, step_size = Effect(), 0.0, 0.0
        return metrics | {
            **effect.metrics(),
            "surrogate_predicted": taken.fraction * predicted_gain,
            "step_size": taken.fraction * step_size,
            "line_search_steps": taken.n_steps,
        }, taken.reason

    def _whole_step(self, solution: Solution, fisher: FisherVectorProduct, norm: float) -> tuple[th.Tensor | None, str]:
        """Return the whole step along the solution, (F + cI)^-1 g / |g|, or the reason why there is none."""
        if solution.failed:
            return None, solution.stop_reason
        curvature = float(solution.x.dot(fisher(solution.x)))
        if not math.isfinite(curvature):
            return None, "nonfinite"
        if curvature <= 0:
            return None, "curvature"
        length = math.sqrt(2 * self.target_kl / curvature) if self.step_size is None else self.step_size * norm
        return (solution.x * length, "") if length > 0 else (None, "zero_step")

    def _move_along(
        self,
        parameters: list[th.nn.Parameter],
        step: th.Tensor,
        objective: SurrogateObjective,
        predicted_gain: float,
    ) -> tuple[LineSearch, Effect]:
        """Take the whole step, or a part of it, and measure its effect."""
        effect = Effect()

        def measure() -> th.Tensor:
            nonlocal effect
            effect = objective.effect()
            return th.stack([th.as_tensor(effect.joint_kl), th.as_tensor(effect.gain)])

        parts = step.split([parameter.numel() for parameter in parameters])
        shaped = [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]
        taken = line_search(
            parameters,
            shaped,
            measure,
            predicted_gain,
            max_kl=self.target_kl if self.line_search else math.inf,
            accept_ratio=self.accept_ratio if self.line_search else None,
            shrinking_factor=self.shrinking_factor,
            max_iter=self.max_iter if self.line_search else 1,
        )
        return taken, effect

    def _fisher(
        self, batch: RolloutBatch, objective: SurrogateObjective, parameters: list[th.nn.Parameter]
    ) -> FisherVectorProduct:
        kept, observations = objective.distribution, batch.flat_observations
        if self.subsample == 1 and kept is not None:
            return FisherVectorProduct([lambda: kept], parameters, self.cg_damping)
        if self.subsample > 1:
            observations = one_in(self.subsample, observations)
        chunks = objective.distributions_at(observations)
        return FisherVectorProduct(chunks, parameters, self.cg_damping)
