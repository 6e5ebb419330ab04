"""How a policy-gradient algorithm makes its learner from its arguments, and takes updates with it."""

import copy
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import fields
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule
from stable_baselines3.common.utils import update_learning_rate

from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.callback_locals import callback_tree
from sb3_pg.algorithms.pretraining import normalizer, space_of
from sb3_pg.checkpoints import ResumeCallback
from sb3_pg.demonstrations import DemonstrationLoss
from sb3_pg.demonstrations.critic_fit import CriticToFit, followers
from sb3_pg.errors import NonFiniteError
from sb3_pg.learner import (
    Anchor,
    CriticFit,
    Estimator,
    Learner,
    LearnerState,
    Report,
    ReturnScale,
    make_critic_optimizer,
)
from sb3_pg.learner.optimizers import with_fewer_operations
from sb3_pg.learner.rollback import require_usable_std
from sb3_pg.policies import original, predict_all_values, predict_values, value_function
from sb3_pg.rollout import RolloutBatch

BuiltT = TypeVar("BuiltT")


def from_arguments(cls: type[BuiltT]) -> Callable[[Any], BuiltT]:
    """Return a method that makes a ``cls`` from the model's attributes of the same names.

    :param cls: a dataclass, whose fields are arguments of the algorithm
    """
    values = attrgetter(*(field.name for field in fields(cls)))  # type: ignore[arg-type]  # dataclasses have no type

    def build(self: Any) -> BuiltT:
        return cls(*values(self))

    build.__doc__ = f"Make a :class:`~{cls.__module__}.{cls.__name__}` from the model's present arguments."
    return build


class CriticRule(NamedTuple):
    """How an algorithm's critic is trained, whatever the arguments are.

    :param own_steps: whether the critic always has gradient steps of its own
    :param shares_batch_size: whether ``batch_size`` is the critic's too, unless ``critic_batch_size`` is given
    :param keeps_statistics: whether training the critic leaves the BatchNorm statistics of shared features unchanged
    """

    own_steps: bool = False
    shares_batch_size: bool = False
    keeps_statistics: bool = False


def uses_critic(model: Any) -> bool:
    """Return whether the algorithm's estimator needs a critic."""
    estimator: Estimator = model.make_estimator()
    return estimator.requires_critic


def bootstraps_truncated(model: Any) -> bool:
    """Return whether the estimator adds the value of a truncated episode's last state."""
    estimator: Estimator = model.learner.estimator
    asked_for: bool = estimator.requires_critic if model.truncation is None else model.truncation == "bootstrap"
    return estimator.bootstraps and asked_for


def wants_critic_optimizer(model: Any) -> bool:
    """Return whether the arguments ask for an optimizer of the critic's own."""
    if model.critic_rule.own_steps:
        return model.critic_learning_rate is not None
    return model.critic_learning_rate is not None or model.n_critic_updates > 1 or model.critic_fit == "before"


def critic_fit(model: Any) -> CriticFit:
    """Return how the critic is trained, according to the model's arguments.

    :param model: a policy-gradient algorithm
    """
    rule: CriticRule = model.critic_rule
    shared = model.batch_size if rule.shares_batch_size else None
    return CriticFit(
        own_steps=rule.own_steps or wants_critic_optimizer(model),
        optimizer=model.critic_optimizer,
        n_passes=model.n_critic_updates,
        batch_size=model.critic_batch_size or shared,
        before_actor=model.critic_fit == "before",
        warmup_updates=model.critic_warmup_updates if model._rollouts_left is None else sys.maxsize,
        normalize_targets=model.normalize_value_targets,
        revalue=getattr(model, "recompute_advantage", False),
        in_eval_mode=rule.keeps_statistics,
    )


def refresh_learner(model: Any) -> Learner:
    """Return the model's learner, with an estimator and a step made from the model's present attributes.

    Users and ``load`` change attributes at any time.

    :param model: a policy-gradient algorithm
    """
    learner: Learner | None = vars(model).get("learner")
    estimator, step = model.make_estimator(), model.make_step()
    if learner is None or learner.policy is not model.policy:
        learner = model.learner = Learner(model.policy, estimator, step, state=model.learner_state)
    learner.estimator, learner.step, learner.critic = estimator, step, critic_fit(model)
    learner.normalize_advantage = model.normalize_advantage
    _refresh_anchor(model, learner)
    return learner


def require_valid_anchor(anchor: Anchor, model: Any = None) -> None:
    """Require an anchor whose attributes are in range, and that fits a model if one is given.

    :raises TypeError: an attribute is of the wrong type
    :raises ValueError: an attribute is out of range, or the anchor does not fit
    """
    what = "with valid attributes"
    try:
        anchor.require_valid()
        what = "that fits"
        if model is not None and not anchor.fits:
            demos = anchor.demos if isinstance(anchor, DemonstrationLoss) else None
            anchor.require_fit(model.policy, None if demos is None else space_of(model, demos))
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"anchor must be a {type(anchor).__name__} {what}: {error}") from error


def require_anchor_before_learning(model: Any) -> None:
    """Require an anchor that fits, with its data, before anything is collected.

    :raises TypeError: it is no anchor
    :raises ValueError: it does not fit the policy, or its data are missing
    """
    anchor = refresh_learner(model).anchor
    if anchor is None or not anchor.weight or model._rollouts_left is not None:  # warm_up_critic uses none
        return
    if missing := anchor.what_is_missing:
        raise ValueError(missing)


def _refresh_anchor(model: Any, learner: Learner) -> None:
    """Give the learner the model's anchor. A new one is copied first: the user's may be given to several models.

    :raises TypeError: it is no anchor
    :raises ValueError: it does not fit the policy
    """
    if model.anchor is not learner.anchor:
        model.checks["anchor"]("anchor", model.anchor)
        learner.anchor = model.anchor = copy.copy(model.anchor)
    if learner.anchor is not None:
        learner.anchor.normalize = normalizer(model)
        require_valid_anchor(learner.anchor, model)  # users set its attributes too


def set_up_learner(model: Any) -> None:
    """Make the learner and the critic's optimizer, after SB3 has made the policy.

    :param model: a policy-gradient algorithm
    :raises ValueError: the policy's standard deviation overflows, or the critic has no parameters of its own
    """
    require_usable_std(model.policy, model.policy_kwargs, model.use_sde)
    model.policy.optimizer = with_fewer_operations(model.policy.optimizer)
    attributes = vars(model)
    if "learner_state" not in attributes:
        # A zip of an earlier version holds the parts of the learner's state as attributes.
        model.learner_state = LearnerState(attributes.pop("_return_scale", ReturnScale()))
        model.learner_state.n_warmed_up = attributes.pop("_n_warmed_up", 0)
        model.learner_state.n_failures = attributes.pop("_n_failures", 0)
    model.critic_optimizer = None
    attributes.pop("learner", None)
    learner = refresh_learner(model)
    if wants_critic_optimizer(model) and learner.estimator.requires_critic:
        model.critic_optimizer = make_critic_optimizer(list(learner.critic_only.values()), critic_rate(model))


def take_update(model: Any, batch: RolloutBatch, report: Report, seconds: float = 0.0) -> bool:
    """Set the scheduled learning rates, update the learner once, and log its metrics.

    :param model: a policy-gradient algorithm
    :param batch: the batch to learn from
    :param report: which metrics to compute that the update does not need
    :param seconds: time that the batch's estimates took, seconds; it is added to the logged time of the update
    :return: False if the update was skipped
    :raises NonFiniteError: a gradient or a parameter would not be finite
    """
    began = time.perf_counter()
    learner = refresh_learner(model)
    model._update_learning_rate(model.policy.optimizer)
    if model.critic_optimizer is not None:
        rate = critic_rate(model)
        update_learning_rate(model.critic_optimizer, rate)
        model.logger.record("train/critic_learning_rate", rate, model._detail)
    try:
        metrics = learner.update(batch, report)
    except NonFiniteError as error:
        model._skip_or_raise(error)
        return False
    finally:
        if learner.outcome:
            model.logger.record("train/step_outcome", learner.outcome)
    model._n_updates += 1
    model._record(metrics)
    model.logger.record("train/n_updates", model._n_updates, exclude="tensorboard")
    model.logger.record("time/update_seconds", time.perf_counter() - began + seconds, model._detail)
    return True


def critic_to_fit(self: Any) -> CriticToFit | None:
    """Return the critic V of discounted returns, for demonstrations; None if the algorithm uses none."""
    learner, policy = refresh_learner(self), self.policy
    if not learner.estimator.requires_critic or learner.estimator.continues:
        return None

    head = original(policy).value_net

    def value_after(history: Any, observations: Any) -> th.Tensor:
        if history is None:
            return predict_values(policy, observations)
        values = predict_all_values(policy, history, followers(observations))[1]
        assert values is not None
        return values

    def scaled_by(targets: th.Tensor | None) -> float:
        if targets is not None and learner.critic.normalize_targets:
            learner.state.return_scale = learner.state.return_scale.updated(targets)
        return learner.value_scale

    return CriticToFit(
        parameters=list(learner.critic_only.values()),
        predict=lambda observations, _actions: value_function(policy)(observations),
        value_after=value_after,
        heads=[head] if isinstance(head, th.nn.Linear) and head.bias is not None else [],
        gamma=self.gamma,
        bootstraps=bootstraps_truncated(self),
        total=getattr(self, "returns", None) == "total",
        scaled_by=scaled_by,
        in_training_mode=not learner.shares_features,
    )


def warm_up_critic(self: Any, n_rollouts: int, callback: MaybeCallback = None, tb_log_name: str | None = None) -> Any:
    """Collect rollouts with the present policy, and train only the critic on them.

    An untrained critic gives wrong advantages, which drive a pretrained policy away from what it has learned. This is
    what ``critic_warmup_updates`` does at the beginning of ``learn``, done at once; those updates then count as done.
    A schedule of the critic's learning rate has the value that it has at the beginning of a training.
    ``num_timesteps`` counts the steps. Give ``reset_num_timesteps=False`` to the next ``learn``, which then goes on
    counting, and logs to the same TensorBoard run.

    :param n_rollouts: rollouts, each as long as those of ``learn``. ``learn`` trains the critic on each as often
    :param callback: as in ``learn``. A :class:`~sb3_pg.ResumeCallback` is for ``learn`` alone
    :param tb_log_name: name of the TensorBoard run, None for the name of the class
    :return: the model
    :raises ValueError: no critic is in use, the model has no env, ``learning_starts`` asks for random actions, or an
        argument is out of range
    :raises TypeError: an argument is of the wrong type
    :raises NonFiniteError: as in ``learn``
    """
    arg.integer(1)("n_rollouts", n_rollouts)
    arg.callback("callback", callback)
    if not uses_critic(self):
        raise ValueError("warm_up_critic trains a critic, and none is in use: use baseline='value'")
    given = callback if isinstance(callback, list) else [callback]
    roots = [one for one in given if isinstance(one, BaseCallback)]
    if any(isinstance(one, ResumeCallback) for root in roots for one in callback_tree(root, set())):
        raise ValueError("callback must hold no ResumeCallback, whose checkpoints learn goes on from: give it to learn")
    self._require_no_resumption("warm_up_critic")
    self._require_env("warm_up_critic")
    if self.num_timesteps < getattr(self, "learning_starts", 0):
        raise ValueError(
            "warm_up_critic collects with the present policy, and learning_starts must be at most num_timesteps="
            f"{self.num_timesteps} for that, got {self.learning_starts}: before it, actions are random"
        )
    before = self.learner_state.n_warmed_up
    vars(self).update(_rollouts_left=int(n_rollouts), _current_progress_remaining=1.0)
    try:
        # a new model gets a TensorBoard run of its own
        self.learn(1 << 62, callback, None, tb_log_name, reset_num_timesteps=self.num_timesteps == 0)
        was_stopped = self._rollouts_left >= 0  # by a callback
    finally:
        self._rollouts_left = None
    if self.learner_state.n_warmed_up == before and not was_stopped and (why := self._why_no_update()):
        warnings.warn(f"warm_up_critic() has not trained the critic: {why}", stacklevel=2)
    return self


def value_scale(model: Any) -> float:
    """Factor that turns the critic's output into reward units; 1 without ``normalize_value_targets``."""
    return model.learner_state.return_scale.value if model.normalize_value_targets else 1.0


def critic_rate(model: Any) -> float:
    """Return the present step size of the critic's optimizer. Without ``critic_learning_rate`` it is the policy's.

    :param model: a policy-gradient algorithm
    """
    rate, progress = model.critic_learning_rate, model._current_progress_remaining
    if isinstance(rate, float) and 0 <= rate < math.inf:
        return rate
    schedule: Schedule = model.lr_schedule if rate is None else arg.to_schedule(rate, "critic_learning_rate")
    return schedule(progress)
