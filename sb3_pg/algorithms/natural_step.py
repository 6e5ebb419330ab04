"""A step along the natural gradient: what NPG and TRPO share, which is all but how far they go."""

import math
import warnings
from abc import abstractmethod
from typing import Any

import torch as th
from stable_baselines3.common.type_aliases import Schedule

from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.trust_region import TrustRegionAlgorithm
from sb3_pg.errors import NonFiniteError
from sb3_pg.functional import FisherVectorProduct, LineSearch, Solution, conjugate_gradient, line_search
from sb3_pg.functional.precision import precise
from sb3_pg.learner.metrics import Metrics, describe_policy
from sb3_pg.learner.rollback import nonfinite_gradient, require_finite_parameters
from sb3_pg.learner.surrogate import Effect, SurrogateObjective, chunked_distributions
from sb3_pg.policies import evaluation_mode, perceptron_distribution, split_observations
from sb3_pg.rollout import RolloutBatch

#: Why no step was taken -> what may help.
_ADVICE = {
    "kl": "The divergence is above target_kl even after the shortest step: more line_search_max_iter or cg_damping.",
    "no_improvement": "The objective gains less than predicted: larger batches, or a smaller target_kl.",
    "nonfinite": "A number overflows: look at the observations' and the log-probs' scale.",
    "curvature": "The Fisher matrix is singular to rounding: more cg_damping, or a smaller fisher_subsample.",
    "zero_gradient": "All advantages are equal, which tells no action from another; or the actor is frozen.",
    "zero_step": "The schedule of target_kl, or of NPG's step_size, has come to 0.",
}
_FAILURES_TO_WARN = 3


class NaturalStep(TrustRegionAlgorithm):
    r"""Direction x of the natural gradient, and the step s along it that the KL's quadratic model allows.

    .. math:: x = (F + c I)^{-1} \nabla L(\theta), \qquad s = \sqrt{\frac{2 \delta}{x^T (F + c I) x}}\; x

    L is :class:`~sb3_pg.learner.surrogate.SurrogateObjective`, F the Fisher matrix of the whole action vector's
    distribution, averaged over states (:class:`~sb3_pg.functional.FisherVectorProduct`); c is ``cg_damping``, delta
    ``target_kl``. Source: Kakade (2001); Schulman et al. (2015), appendix C. (The slides print g^T F g for the
    denominator, which is g^T F^-1 g = x^T F x, and turn the divergence round.)
    """

    cg_max_steps: int
    cg_damping: float
    cg_tolerance: float
    target_kl: float | str | Schedule
    sub_sampling_factor: int
    fisher_chunk_size: int
    fisher_subsample: int
    _n_failures = 0
    _outcome = ""

    def _step_length(self, curvature: float, gradient_norm: float) -> float:
        """How often the direction fits into the whole step.

        :param curvature: x^T (F + cI) x of the direction x = (F + cI)^-1 g / |g|
        :param gradient_norm: |g|
        """
        del gradient_norm
        return math.sqrt(2 * self._now("target_kl") / curvature)

    def _now(self, name: str) -> float:
        """An argument that may be a schedule, at the present progress.

        :raises ValueError: the schedule is negative or not finite there
        """
        value = float(arg.to_schedule(getattr(self, name), name)(self._current_progress_remaining))
        arg.real(0)(name, value)
        return value

    @abstractmethod
    def _line_search(self) -> dict[str, Any]:
        """What a step has to keep to: arguments of :func:`~sb3_pg.functional.line_search`."""

    def _update(self, batch: RolloutBatch) -> Metrics:
        self._outcome = ""
        try:
            metrics = super()._update(batch)
            require_finite_parameters(self.policy)
        except NonFiniteError:
            self._conclude("nonfinite")
            raise
        if self._outcome:  # not while the critic warms up
            self._conclude(self._outcome)
        return metrics

    def _fit_critic(self, batch: RolloutBatch) -> Metrics:
        if not self._shares_features:
            return super()._fit_critic(batch)
        with evaluation_mode(self.policy):  # the statistics of a BatchNorm in shared features are the actor's
            return super()._fit_critic(batch)

    def _move_actor(self, batch: RolloutBatch) -> Metrics:
        credit = self._distinguishing_credit(batch)
        objective = SurrogateObjective(self.policy, batch, credit, self.ent_coef, self.fisher_chunk_size)
        with evaluation_mode(self.policy):
            return self._natural_step(batch, objective, self._trained_actor)

    def _natural_step(
        self, batch: RolloutBatch, objective: SurrogateObjective, parameters: list[th.nn.Parameter]
    ) -> Metrics:
        gradient = objective.gradient(parameters, keep_graph=self._subsampling == 1)
        norm = float(precise(gradient).norm())
        if not math.isfinite(norm):
            raise nonfinite_gradient(self.policy, batch)
        metrics: Metrics = {"grad_norm": norm, **describe_policy(self.policy, objective.entropy)}
        step, taken, effect = None, LineSearch(0.0, 0, "zero_gradient"), Effect.of_nothing()
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
        self._outcome = taken.reason
        if not taken.fraction:
            if step is not None:
                metrics |= {"rejected_kl": effect.joint_kl, "rejected_gain": effect.gain}
            # of a step that was not taken, the length may be infinite
            effect, predicted_gain, step_size = Effect.of_nothing(), 0.0, 0.0
        return metrics | {
            **effect.metrics(),
            "surrogate_predicted": taken.fraction * predicted_gain,
            "step_size": taken.fraction * step_size,
            "line_search_steps": taken.n_steps,
        }

    def _whole_step(self, solution: Solution, fisher: FisherVectorProduct, norm: float) -> tuple[th.Tensor | None, str]:
        """The whole step along the direction that was found, or why there is none."""
        if solution.failed:
            return None, solution.stop_reason
        curvature = float(solution.x.dot(fisher(solution.x)))
        if not math.isfinite(curvature):
            return None, "nonfinite"
        if curvature <= 0:
            return None, "curvature"
        length = self._step_length(curvature, norm)
        return (solution.x * length, "") if length > 0 else (None, "zero_step")

    def _move_along(
        self,
        parameters: list[th.nn.Parameter],
        step: th.Tensor,
        objective: SurrogateObjective,
        predicted_gain: float,
    ) -> tuple[LineSearch, Effect]:
        """Take the whole step, or a part of it, and see what it has done."""
        effect = Effect.of_nothing()

        def measure() -> th.Tensor:
            nonlocal effect
            effect = objective.effect()
            return th.stack([th.as_tensor(effect.joint_kl), th.as_tensor(effect.gain)])

        parts = step.split([parameter.numel() for parameter in parameters])
        shaped = [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]
        return line_search(parameters, shaped, measure, predicted_gain, **self._line_search()), effect

    @property
    def _subsampling(self) -> int:
        return max(self.fisher_subsample, self.sub_sampling_factor)

    def _fisher(
        self, batch: RolloutBatch, objective: SurrogateObjective, parameters: list[th.nn.Parameter]
    ) -> FisherVectorProduct:
        k = self._subsampling
        kept, observations = objective.distribution, batch.flat_observations
        if k == 1 and kept is not None:
            made = perceptron_distribution(self.policy, observations) or kept
            return FisherVectorProduct([lambda: made], parameters, self.cg_damping)
        if k > 1:
            n_samples = int(batch.valid.sum())
            chosen = th.randperm(n_samples, device=self.device)[: -(-n_samples // k)]
            (observations,) = split_observations(observations, len(chosen), chosen)
        chunks = chunked_distributions(self.policy, observations, self.fisher_chunk_size)
        return FisherVectorProduct(chunks, parameters, self.cg_damping)

    def _conclude(self, reason: str) -> None:
        """Log how the step ended; warn of failures in a row."""
        self.logger.record("train/step_outcome", reason)
        self._n_failures = 0 if reason == "accepted" else self._n_failures + 1
        if self._n_failures == _FAILURES_TO_WARN:
            warnings.warn(
                f"The policy has not moved for {_FAILURES_TO_WARN} updates in a row, now because of {reason!r}. "
                f"{_ADVICE[reason]}",
                stacklevel=2,
            )
