"""What all algorithms share: arguments, env, ``learn``, log, saving and loading; and the use of a learner."""

import io
import math
import pathlib
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from contextvars import ContextVar
from dataclasses import fields
from operator import attrgetter
from typing import Any, ClassVar, Final, Literal, NamedTuple, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from stable_baselines3.common.base_class import BaseAlgorithm, maybe_make_env
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule, TensorDict
from stable_baselines3.common.utils import update_learning_rate
from stable_baselines3.common.vec_env import VecEnv

from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.environments import check_observation_space
from sb3_pg.algorithms.suggestions import REMOVED
from sb3_pg.algorithms.validation import ALWAYS, SB3, EnvLike, Group, defaults_of
from sb3_pg.checkpoints import renamed_modules
from sb3_pg.envs import GymVectorAdapter
from sb3_pg.errors import NonFiniteError
from sb3_pg.extras import extra_hints
from sb3_pg.learner import (
    CriticFit,
    Estimator,
    Learner,
    LearnerState,
    Metrics,
    Report,
    ReturnScale,
    make_critic_optimizer,
)
from sb3_pg.learner.optimizers import with_fewer_operations
from sb3_pg.learner.rollback import require_usable_std
from sb3_pg.policies import predict
from sb3_pg.rollout import NormalizationGuard, RolloutBatch, require_finite_step

BuiltT = TypeVar("BuiltT")
SelfAlgorithm = TypeVar("SelfAlgorithm", bound="Algorithm")
#: Type of ``log_interval`` in ``learn``: as in SB3, or "auto", which logs about every 500 steps of each env.
LogInterval = int | Literal["auto"] | None
#: Steps of each env between two logs with "auto". A2C logs as often: every 100 updates of 5 steps.
AUTO_LOG_STEPS: Final = 500
#: While ``load`` runs, the names of the attributes that it was given; otherwise None.
_LOADING: ContextVar[Collection[str] | None] = ContextVar("loading", default=None)
#: Attributes that belong to one rollout, or that are made from the policy. They are neither saved nor copied.
TRANSIENT_ATTRS = ("learner", "rollout_batch", "_collected", "_collector", "_pieces")
#: Metrics that are printed only with ``verbose=2``. TensorBoard and CSV files have all metrics.
_DETAILS: Final = frozenset(
    {
        *("clipped_action_fraction", "entropy", "step_size", "surrogate_predicted", "surrogate_realized"),
        *("largest_ratio", "effective_sample_size", "largest_weight", "truncated_fraction"),
        *("cg_iterations", "cg_residual", "line_search_steps"),
    }
)
#: Checks of the arguments of ``learn``, in the order of its signature.
LEARN_CHECKS: dict[str, arg.Check] = {
    "total_timesteps": arg.real(0),
    "callback": arg.callback,
    "log_interval": arg.log_interval,
    "tb_log_name": arg.instance(str, optional=True),
    "reset_num_timesteps": arg.instance(bool),
    "progress_bar": arg.instance(bool),
}


class Algorithm(BaseAlgorithm):
    """Base class of all algorithms. A subclass derives from it first, and then from a base class of SB3.

    The base class of SB3 is OnPolicyAlgorithm or OffPolicyAlgorithm.
    """

    #: name of an argument -> its check
    checks: ClassVar[Mapping[str, arg.Check]]
    critic_optimizer: th.optim.Optimizer | None = None
    on_nonfinite: str
    _n_skipped = 0
    #: with ``log_interval="auto"``, the smallest number of env steps between two logs; otherwise 0
    _log_steps = 0
    #: ``num_timesteps`` at the last log of ``log_interval="auto"``
    _logged_at = 0

    # ---------------------------------------------------------------- arguments

    #: tables of the class's arguments, see :mod:`sb3_pg.algorithms.arguments`
    groups: ClassVar[tuple[Group, ...]] = ()

    def _construct(self, given: Mapping[str, Any], of_sb3: Collection[str], **fixed: Any) -> None:
        """Check the arguments, set them as attributes, and call the constructor of SB3's base class.

        :param given: the constructor's arguments
        :param of_sb3: names of arguments that SB3's base class takes, besides those of ``ALWAYS`` and ``SB3``
        :param fixed: other arguments of SB3's base class
        :raises ValueError: an argument out of range, or arguments that contradict each other
        :raises TypeError: an argument of the wrong type, or an unknown one
        """
        refused = {name: fixed for group in self.groups for name, fixed in group.refused.items()}
        values = defaults_of(self.groups)
        values |= {name: value for name, (value, _) in refused.items()}
        arg.require_arguments(type(self), given, but={name: why for name, (_, why) in refused.items()})
        values |= given
        arg.check_arguments(values, self.checks)
        init_setup_model = values.pop("_init_setup_model")
        of_base = {name: values.pop(name) for name in (*ALWAYS.arguments, *SB3.arguments, *of_sb3) if name in values}
        of_base["policy_kwargs"] = dict(of_base["policy_kwargs"] or {})  # SB3 writes into it
        for name, value in values.items():
            setattr(self, name, value)
        with extra_hints():
            super().__init__(
                **of_base,
                **fixed,
                supported_action_spaces=(spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
            )
        if init_setup_model:
            self._setup_model()

    def _setup_lr_schedule(self) -> None:
        self.lr_schedule = arg.to_schedule(self.learning_rate)

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        if policy_name in self.policy_aliases:
            return self.policy_aliases[policy_name]
        hint = ""
        if "lstm" in policy_name.lower() or "recurrent" in policy_name.lower():
            hint = f"; {type(self).__name__} has no recurrent policies"
        raise ValueError(f"policy must be one of {list(self.policy_aliases)} or a class, got {policy_name!r}{hint}")

    def _check_combinations(self) -> None:
        """Check the arguments against each other.

        :raises ValueError: naming the arguments that contradict each other
        """
        for group in self.groups:
            group.check(self)

    def _check_effects(self) -> None:
        """Raise an error, or warn, if an argument was given that has no effect. A zip's arguments were not given.

        :raises ValueError: an argument without effect was given, and it is not among those that give a warning
        """
        fixed = {name: value for group in self.groups for name, (value, _) in group.refused.items()}
        unused = {
            name: why
            for group in self.groups
            for name, why in group.without_effect(self).items()
            if not self._is_kept_by_load(name) and not (name in fixed and getattr(self, name) == fixed[name])
        }
        tolerated = {name for group in self.groups for name in group.tolerated}
        arg.check_effects(type(self), vars(self), unused, tolerated)

    def _check_again(self) -> None:
        """Check the arguments again, because ``load`` replaces attributes after the constructor has run.

        :raises ValueError: an argument is out of range, or the model has never had an env
        :raises TypeError: an argument is of the wrong type
        """
        if not hasattr(self, "observation_space"):
            raise ValueError("env must be an environment or the id of a registered one, got None")
        values = {name: value for name, value in vars(self).items() if name not in ("policy", "env")}
        arg.check_arguments(values, self.checks)
        for_dict = self.policy_class is self.policy_aliases["MultiInputPolicy"]
        for_dict = for_dict and "features_extractor_class" not in self.policy_kwargs
        if for_dict and not isinstance(self.observation_space, spaces.Dict):
            raise ValueError(
                "policy='MultiInputPolicy' is for Dict observations: use 'MlpPolicy', or 'CnnPolicy' for images, with "
                f"{self.observation_space}"
            )

    # ---------------------------------------------------------------- saving and loading

    @classmethod
    def load(
        cls: type[SelfAlgorithm],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: EnvLike | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfAlgorithm:
        """Load a model as SB3's ``load`` does. ``kwargs`` replace attributes, and are checked as in the constructor.

        ``env`` may also be the id of a registered environment, or a vector env of Gymnasium. If the arguments ask for
        an optimizer of the critic that was not saved, it starts afresh. If they no longer ask for one that was saved,
        it is dropped. ``policy_kwargs`` need not name the optimizer that ``use_rms_prop`` added to the saved ones.

        :raises TypeError: the name of an argument is misspelled
        """
        arg.require_arguments(cls, kwargs, others=True)
        if "stats_window_size" in kwargs:  # SB3 keeps it under another name
            kwargs["_stats_window_size"] = kwargs.pop("stats_window_size")
        token = _LOADING.set(tuple(kwargs))
        try:
            with renamed_modules():
                if isinstance(kwargs.get("policy_kwargs"), dict):
                    kwargs["policy_kwargs"] = _with_saved_optimizer(kwargs["policy_kwargs"], path, custom_objects)
                given: Any = env  # see _wrap_env
                model = super().load(path, given, device, custom_objects, print_system_info, force_reset, **kwargs)
        finally:
            _LOADING.reset(token)
        for name in REMOVED:  # zips of earlier versions hold them
            vars(model).pop(name, None)
        optimizer = getattr(model.policy, "optimizer", None)  # an OffPACPolicy has one in its actor and its critic
        has_rms_prop = isinstance(optimizer, th.optim.RMSprop)
        if kwargs.get("use_rms_prop", has_rms_prop) != has_rms_prop:
            kept = type(optimizer).__name__
            warnings.warn(
                f"use_rms_prop={not has_rms_prop} has no effect: the model was saved with {kept}", stacklevel=2
            )
        if "rms_prop_eps" in kwargs:
            warnings.warn("rms_prop_eps has no effect: the model was saved with its optimizer", stacklevel=2)
        return model

    @staticmethod
    def _is_loading() -> bool:
        return _LOADING.get() is not None

    @staticmethod
    def _is_given_to_load(name: str) -> bool:
        """Return whether ``load`` is running and was given a value for this attribute."""
        return name in (_LOADING.get() or ())

    @classmethod
    def _is_kept_by_load(cls, name: str) -> bool:
        """Return whether ``load`` is running and takes this attribute's value from the zip."""
        return cls._is_loading() and not cls._is_given_to_load(name)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for pickle and copy: all except the transient ones."""
        return {name: value for name, value in vars(self).items() if name not in TRANSIENT_ATTRS}

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *TRANSIENT_ATTRS]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, variables = super()._get_torch_save_params()
        return state_dicts + ([] if self.critic_optimizer is None else ["critic_optimizer"]), variables

    def get_parameters(self) -> dict[str, dict[str, Any]]:
        """Return parameters as SB3's method does, with the names from before ``torch.compile`` wrapped a module."""
        parameters = super().get_parameters()
        return {key: {_of_original(name): value for name, value in parameters[key].items()} for key in parameters}

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """Set parameters as SB3's method does. Names from before ``torch.compile`` wrapped a module are valid too."""
        params: Any = load_path_or_dict
        if not isinstance(params, dict):
            _, params, _ = load_from_zip_file(params, device=device, load_data=False)
        params = dict(params)
        wrapped = {_of_original(name): name for name in self.policy.state_dict()}
        if "policy" in params:
            named = {wrapped.get(_of_original(name), name): value for name, value in params["policy"].items()}
            params["policy"] = named
        if self._is_loading():  # the arguments of load may add or remove the critic's optimizer
            saved = params.pop("critic_optimizer", None)
            if self.critic_optimizer is not None:
                params["critic_optimizer"] = saved or self.critic_optimizer.state_dict()
        super().set_parameters(params, exact_match, device)

    # ---------------------------------------------------------------- the env

    @classmethod
    def _wrap_env(cls, env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        """Wrap an env as SB3's method does. The constructor, ``set_env`` and ``load`` call this.

        It also makes the env of a registered id, and adapts vector envs of Gymnasium.

        :raises ValueError: no policy takes the observation space, or the algorithm cannot learn from this env
        :raises TypeError: ``env`` is not an environment
        """
        cls.checks["env"]("env", env)
        if env is None:
            raise TypeError("env must be an environment or the id of a registered one, got None")
        env = maybe_make_env(env, verbose)
        if isinstance(env, VectorEnv):
            if verbose >= 1:
                print("Wrapping the env in a GymVectorAdapter.")
            env = GymVectorAdapter(env)
        check_observation_space(env.observation_space)
        wrapped = super()._wrap_env(env, verbose, monitor_wrapper)
        cls._check_env(wrapped)
        return wrapped

    @classmethod
    def _check_env(cls, env: VecEnv) -> None:
        """Require an env that this class can learn from.

        :param env: the env with all its wrappers
        :raises ValueError: the class cannot learn from this env. The message says why, and what to use instead
        """

    # ---------------------------------------------------------------- learning

    def _learn(
        self: SelfAlgorithm,
        total_timesteps: int,
        callback: MaybeCallback,
        log_interval: LogInterval,
        tb_log_name: str | None,
        *arguments: Any,
    ) -> SelfAlgorithm:
        """Check the arguments and call SB3's ``learn``. Warn if there was no update although one was expected.

        :raises ValueError: an argument is out of range, or the model has no env
        :raises TypeError: an argument is of the wrong type
        """
        given = (total_timesteps, callback, log_interval, tb_log_name, *arguments)
        arg.check_arguments(dict(zip(LEARN_CHECKS, given, strict=True)), LEARN_CHECKS)
        self._log_steps = self._logged_at = 0
        if log_interval == "auto":
            log_interval = 1
            # A short run is logged about five times.
            self._log_steps = max(1, min(AUTO_LOG_STEPS * self.n_envs, int(total_timesteps) // 5))
        if self.env is None:
            raise ValueError("learn() needs an environment: call set_env(env), or load(path, env=env)")
        updates_before = self._n_updates
        with extra_hints():
            learn: Any = super().learn  # type: ignore[safe-super]  # a method of SB3's on- or off-policy base
            learn(total_timesteps, callback, log_interval, tb_log_name or type(self).__name__, *arguments)
        was_stopped = self.num_timesteps < self._total_timesteps  # by a callback
        if total_timesteps and self._n_updates == updates_before and not was_stopped and (why := self._why_no_update()):
            warnings.warn(f"learn() has taken no update: {why}", stacklevel=3)
        return self

    def _why_no_update(self) -> str:
        """Return why ``learn`` took no update, for a warning. Empty if none was expected, or if the user knows why."""
        return ""

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        """Prepare training and reset the env as SB3's method does. A NaN does not enter a VecNormalize's statistics.

        :raises NonFiniteError: the first observation is not finite
        """
        assert self.env is not None
        guard = NormalizationGuard(self.env)
        with guard.statistics_kept():
            result = super()._setup_learn(*args, **kwargs)
            try:
                guard.check_reset()
                require_finite_step("observation", self._last_obs, 0, "The env's reset returned it.")
            except NonFiniteError:
                self._last_obs = None
                raise
        return result

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        """Update the progress as SB3's method does, but not below 0 if the last rollout takes more steps than asked."""
        super()._update_current_progress_remaining(min(num_timesteps, total_timesteps), total_timesteps)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Return actions as SB3's method does, in the form that the env takes.

        They are integers for a Box of integers, and count from ``start`` for a Discrete or MultiDiscrete space.

        :return: actions, and the next state of a recurrent policy
        """
        actions, state = predict(self.policy, observation, state, episode_start, deterministic)
        return actions, state

    # ---------------------------------------------------------------- log

    def _is_time_to_log(self) -> bool:
        """Return whether ``log_interval="auto"`` logs now. If so, count the next interval from here."""
        if self.num_timesteps - max(self._logged_at, self._num_timesteps_at_start) < self._log_steps:
            return False
        self._logged_at = self.num_timesteps
        return True

    def _skip_or_raise(self, error: NonFiniteError) -> None:
        if self.on_nonfinite == "raise":
            raise error
        self._n_skipped += 1
        warnings.warn(f"Update skipped: {error}", stacklevel=2)
        self.logger.record("train/n_skipped", self._n_skipped)

    def _record(self, metrics: Metrics) -> None:
        """Log metrics under ``train/``, with a single transfer from the device."""
        values = th.stack([th.as_tensor(v, device=self.device).detach().float() for v in metrics.values()]).tolist()
        for name, value in zip(metrics, values, strict=True):
            self.logger.record(f"train/{name}", value, self._detail if name in _DETAILS else None)

    @property
    def _detail(self) -> str | None:
        """The log format that leaves out details."""
        return None if self.verbose > 1 else "stdout"


def _of_original(name: str) -> str:
    """Return a parameter's name without the prefix that ``torch.compile`` adds."""
    return name.replace("_orig_mod.", "")


def _with_saved_optimizer(
    policy_kwargs: dict[str, Any], path: Any, custom_objects: dict[str, Any] | None
) -> dict[str, Any]:
    """Return ``policy_kwargs`` with the RMSprop that A2C's ``use_rms_prop`` added to the saved ones.

    :param policy_kwargs: argument of ``load``
    :param path: path of the zip
    :param custom_objects: argument of ``load``
    """
    if "optimizer_class" in policy_kwargs:
        return policy_kwargs
    data, _, _ = load_from_zip_file(path, device="cpu", custom_objects=custom_objects)
    saved = (data or {}).get("policy_kwargs", {})
    if not issubclass(saved.get("optimizer_class", object), th.optim.RMSprop):
        return policy_kwargs
    return policy_kwargs | {name: saved[name] for name in ("optimizer_class", "optimizer_kwargs") if name in saved}


def load_replay_buffer(
    self: Any, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True
) -> None:
    """Load a replay buffer as SB3's method does. Files of earlier versions, with other module names, load too."""
    with renamed_modules():
        OffPolicyAlgorithm.load_replay_buffer(self, path, truncate_last_traj)


def waits_for_learning_starts(model: OffPolicyAlgorithm) -> str:
    """Return the message that ``learn`` ended before ``learning_starts``, and what to change."""
    return (
        f"num_timesteps={model.num_timesteps} is not above learning_starts={model.learning_starts}. Give more "
        "total_timesteps, a smaller learning_starts, or reset_num_timesteps=False to go on counting."
    )


# -------------------------------------------------------------------- learners of policy-gradient algorithms


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
        warmup_updates=model.critic_warmup_updates,
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
    return learner


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
