"""The update that every algorithm's own step stands in: guarded, explained, logged."""

import math
import time
import warnings
from collections.abc import Mapping
from typing import Any, Final, TypeVar

import torch as th
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import update_learning_rate

from sb3_pg.algorithms.estimation import EstimatingAlgorithm
from sb3_pg.algorithms.learning import LogInterval
from sb3_pg.errors import NonFiniteError
from sb3_pg.learner.metrics import Metrics, clipped_action_fraction, explain_step, explained_variance
from sb3_pg.learner.optimizers import clip_gradient
from sb3_pg.learner.rollback import forget_nonfinite, nonfinite_gradient, require_finite_parameters, unchanged_on_error
from sb3_pg.policies import (
    EntropyUse,
    compiled,
    is_same_in_both_modes,
    set_training_mode,
    structure_of,
    unvalidated_distributions,
)
from sb3_pg.rollout import Collector, RolloutBatch

SelfUpdating = TypeVar("SelfUpdating", bound="UpdatingAlgorithm")
#: What is printed with ``verbose=2`` only. TensorBoard and CSV files have all of it.
DETAILS: Final = frozenset(
    {
        *("clipped_action_fraction", "entropy", "step_size", "surrogate_predicted", "surrogate_realized"),
        *("largest_ratio", "effective_sample_size", "largest_weight", "truncated_fraction"),
        *("cg_iterations", "cg_residual", "line_search_steps"),
    }
)


class UpdatingAlgorithm(EstimatingAlgorithm):
    """Updates from batches, and logs what they have done. A subclass adds ``_estimate`` and ``_move_actor``.

    Its arguments are those of :class:`~sb3_pg.algorithms.setup.ConfiguredAlgorithm`.
    """

    _collector: Collector | None = None
    _n_skipped = 0
    _estimate_seconds = 0.0
    _log_interval: int | None = 1
    #: of ``log_interval="auto"``: the last iteration that was decided on, and the iterations that are logged
    _decided = 0
    _logged_iterations: tuple[int, ...] = ()
    _iteration = 0
    _is_observed = False
    #: of an update that is explained: w_t A_t, and the surrogate objective's gradient before the step
    _surrogate: tuple[th.Tensor, Mapping[th.nn.Parameter, th.Tensor]] | None = None

    def _gradient_of(self) -> str | None:
        """What the batch's forward keeps the graph of: "actor", "both", or None."""
        return None

    def _learn(
        self: SelfUpdating, total_timesteps: int, callback: MaybeCallback, log_interval: LogInterval, *arguments: Any
    ) -> SelfUpdating:
        self._log_interval = 1 if log_interval == "auto" else log_interval
        self._iteration, self._is_observed = 0, bool(callback)
        self._decided, self._logged_iterations = 0, ()
        return super()._learn(total_timesteps, callback, log_interval, *arguments)

    def _update_from(self, batch: RolloutBatch) -> bool:
        """One update; parameters stay as they were if it fails.

        :return: whether it was taken, rather than skipped
        :raises NonFiniteError: a gradient or a parameter would not be finite
        """
        began, scale = time.perf_counter(), self._return_scale
        set_training_mode(self.policy, True)
        self._update_learning_rate(self.policy.optimizer)
        if self.critic_optimizer is not None:
            rate = self.critic_lr_schedule(self._current_progress_remaining)
            update_learning_rate(self.critic_optimizer, rate)
            self.logger.record("train/critic_learning_rate", rate, self._detail)
        try:
            with unchanged_on_error(self.policy) as before, unvalidated_distributions(), compiled():
                if batch.evaluation is not None and not (
                    batch.evaluation.serves(before, self._entropy_use()) and is_same_in_both_modes(self.policy)
                ):
                    batch.evaluation = None  # the policy was changed since, or what is asked of it
                if self.normalize_value_targets:
                    assert batch.returns is not None
                    self._return_scale = scale.updated(batch.select(batch.returns))
                metrics = self._describe(batch) if self._describes() else {}
                metrics |= self._update(batch)
                require_finite_parameters(self.policy)
                if self._explains():
                    metrics |= self._explain(batch, before.values())
        except BaseException as error:
            self._return_scale, self._surrogate = scale, None
            for optimizer in (self.policy.optimizer, self.critic_optimizer):
                forget_nonfinite(optimizer)
            if not isinstance(error, NonFiniteError):
                raise
            self._skip_or_raise(error)
            return False
        self._n_warmed_up += self._warms_up()
        self._n_updates += 1
        self._record(metrics)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("time/update_seconds", time.perf_counter() - began + self._estimate_seconds, self._detail)
        return True

    def _describe(self, batch: RolloutBatch) -> Metrics:
        """The batch as it was collected."""
        return {
            "explained_variance": explained_variance(batch),
            "clipped_action_fraction": clipped_action_fraction(batch, self.policy),
        }

    def _explain(self, batch: RolloutBatch, before: Mapping[th.Tensor, th.Tensor]) -> Metrics:
        """The actor's step, if it took one: what it takes another forward to tell."""
        if self._surrogate is None:
            return {}
        (credit, gradient), self._surrogate = self._surrogate, None
        changes = {p: p.detach() - before[p] for p in self.parameter_sets.actor.values()}
        return explain_step(self.policy, batch, credit, changes, gradient)

    def _explains(self) -> bool:
        """Whether this update is among those that are written to the log, before which SB3 collects once more."""
        following = self._iteration + 1
        if not self._log_steps:
            return self._log_interval is not None and following % self._log_interval == 0
        if following > self._decided:
            self._decided = following
            if self._is_time_to_log():
                self._logged_iterations = (*self._logged_iterations[-1:], following)
        return following in self._logged_iterations

    def _describes(self) -> bool:
        """Whether somebody may read what this update logs: it is written to the log, or there are callbacks."""
        return self._is_observed or self._explains()

    def _entropy_use(self) -> EntropyUse:
        if self.ent_coef > 0:
            return "gradient"
        return "value" if self._describes() else "none"

    def _backward(self, loss: th.Tensor) -> None:
        """Set the parameters' ``grad``, for :meth:`_gradient_step`, to the gradient of the loss."""
        for parameter in structure_of(self.policy).parameters:
            parameter.grad = None
        for group in self.policy.optimizer.param_groups:  # it may know parameters that the policy has no more
            for parameter in group["params"]:
                parameter.grad = None
        if not self._warms_up():
            if loss.requires_grad:  # not all of it is frozen
                loss.backward()
        elif trained := [parameter for parameter in self._critic_only().values() if parameter.requires_grad]:
            loss.backward(inputs=trained)
        if self._critic_is_separate:
            for parameter in self._critic_only().values():
                parameter.grad = None  # its own optimizer's business

    def _gradient_step(self, batch: RolloutBatch) -> th.Tensor:
        """Clip the gradient that was accumulated, and take a step of ``policy.optimizer``.

        :return: the gradient's norm before clipping
        :raises NonFiniteError: the gradient is not finite
        """
        norm = clip_gradient(structure_of(self.policy).parameters, self.max_grad_norm)
        if not math.isfinite(norm):
            raise nonfinite_gradient(self.policy, batch)
        self.policy.optimizer.step()
        return norm

    def _skip_or_raise(self, error: NonFiniteError) -> None:
        if self.on_nonfinite == "raise":
            raise error
        self._n_skipped += 1
        warnings.warn(f"Update skipped: {error}", stacklevel=2)
        self.logger.record("train/n_skipped", self._n_skipped)

    def _record(self, metrics: Metrics) -> None:
        """Log numbers under ``train/``, with one transfer from the device."""
        values = th.stack([th.as_tensor(v, device=self.device).detach().float() for v in metrics.values()]).tolist()
        for name, value in zip(metrics, values, strict=True):
            self.logger.record(f"train/{name}", value, self._detail if name in DETAILS else None)

    @property
    def _detail(self) -> str | None:
        """Where a detail is not written to."""
        return None if self.verbose > 1 else "stdout"
