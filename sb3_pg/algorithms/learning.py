"""What every algorithm's ``learn`` and ``load`` do before SB3's."""

import io
import pathlib
import warnings
from collections.abc import Collection, Mapping
from contextvars import ContextVar
from typing import Any, ClassVar, Final, Literal, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from stable_baselines3.common.base_class import BaseAlgorithm, maybe_make_env
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, TensorDict
from stable_baselines3.common.vec_env import VecEnv

from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.effects import check_effects
from sb3_pg.algorithms.environments import check_observation_space
from sb3_pg.envs import GymVectorAdapter
from sb3_pg.errors import NonFiniteError
from sb3_pg.extras import extra_hints
from sb3_pg.policies import predict
from sb3_pg.rollout import NormalizationGuard, require_finite_step

SelfLearning = TypeVar("SelfLearning", bound="LearningAlgorithm")
#: Of ``learn``: SB3's, or "auto" for about every 500 steps of each env.
LogInterval = int | Literal["auto"] | None
#: As often as A2C logs, every 100 updates of 5 steps.
AUTO_LOG_STEPS: Final = 500
#: Names of the attributes that ``load`` was given; None while nothing is loaded.
_LOADING: ContextVar[Collection[str] | None] = ContextVar("loading", default=None)


#: of ``learn``'s arguments, in their order
LEARN_CHECKS: dict[str, arg.Check] = {
    "total_timesteps": arg.real(0),
    "callback": arg.callback,
    "log_interval": arg.log_interval,
    "tb_log_name": arg.instance(str, optional=True),
    "reset_num_timesteps": arg.instance(bool),
    "progress_bar": arg.instance(bool),
}


class LearningAlgorithm(BaseAlgorithm):
    """Stands before one of SB3's bases, on- or off-policy, in the order of bases."""

    #: of each argument, what it must be
    checks: ClassVar[Mapping[str, arg.Check]]
    #: of ``log_interval="auto"``, otherwise 0: env steps between two logs at least, and when the last one was
    _log_steps = 0
    _logged_at = 0

    @classmethod
    def load(
        cls: type[SelfLearning],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> SelfLearning:
        """As SB3's; ``kwargs`` replace attributes, and arguments of the constructor are checked as there.

        ``env`` may be the id of a registered environment, or one of Gymnasium's vector envs, too.

        :raises TypeError: an argument that is misspelled
        """
        arg.no_typos(cls, kwargs)
        if "stats_window_size" in kwargs:  # SB3 keeps it under another name
            kwargs["_stats_window_size"] = kwargs.pop("stats_window_size")
        token = _LOADING.set(tuple(kwargs))
        try:
            given: Any = env  # see _wrap_env
            return super().load(path, given, *args, **kwargs)
        finally:
            _LOADING.reset(token)

    @staticmethod
    def _is_loading() -> bool:
        return _LOADING.get() is not None

    @staticmethod
    def _is_given_to_load(name: str) -> bool:
        """Whether an attribute's value is not the one that was saved."""
        return name in (_LOADING.get() or ())

    @classmethod
    def _is_kept_by_load(cls, name: str) -> bool:
        """Whether an attribute's value was saved, beside other values than it may have now."""
        return cls._is_loading() and not cls._is_given_to_load(name)

    @classmethod
    def _wrap_env(cls, env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        """As SB3's, which passes the env of the constructor, of ``set_env`` and of ``load`` through here.

        The id of a registered environment is made, and Gymnasium's vector envs are adapted.

        :raises ValueError: an observation space that no policy takes, or wrappers in an order that does not work
        :raises TypeError: no environment
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

        :param env: with all its wrappers
        :raises ValueError: saying why not, and which one would do
        """

    def get_parameters(self) -> dict[str, dict[str, Any]]:
        """As SB3's; names are those of the modules themselves where ``torch.compile`` has wrapped some."""
        parameters = super().get_parameters()
        return {key: {_of_original(name): value for name, value in parameters[key].items()} for key in parameters}

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """As SB3's; modules that ``torch.compile`` has wrapped take the names of the modules themselves."""
        params: Any = load_path_or_dict
        if not isinstance(params, dict):
            _, params, _ = load_from_zip_file(params, device=device, load_data=False)
        wrapped = {_of_original(name): name for name in self.policy.state_dict()}
        if "policy" in params:
            named = {wrapped.get(_of_original(name), name): value for name, value in params["policy"].items()}
            params = {**params, "policy": named}
        super().set_parameters(params, exact_match, device)

    def _check_again(self) -> None:
        """Look at the arguments once more, since ``load`` replaces attributes after the constructor.

        :raises ValueError: one is out of range, or there has never been an env
        :raises TypeError: one is of the wrong type
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

    # ---------------------------------------------------------------- arguments without effect

    #: Arguments that scripts for SB3's classes, config files and comparisons of several modes set whether or not they
    #: have an effect: they give a warning, where others are an error.
    tolerated: ClassVar[frozenset[str]] = frozenset({"sde_sample_freq"})

    def _without_effect(self) -> dict[str, str]:
        """Arguments that have no effect beside the others -> why."""
        return {} if self.use_sde else {"sde_sample_freq": "use_sde=False"}

    def _check_effects(self) -> None:
        """Look for arguments that are given and have no effect; of those of a zip, none has been given.

        :raises ValueError: there is one, and it is not among the tolerated ones, which give a warning
        """
        unused = {name: why for name, why in self._without_effect().items() if not self._is_kept_by_load(name)}
        check_effects(type(self), vars(self), unused, self.tolerated)

    # ---------------------------------------------------------------- learning

    def _learn(
        self: SelfLearning,
        total_timesteps: int,
        callback: MaybeCallback,
        log_interval: LogInterval,
        tb_log_name: str | None,
        *arguments: Any,
    ) -> SelfLearning:
        """SB3's ``learn``, of arguments that have been looked at; the TensorBoard run is named after the class.

        It warns if it ends without an update that was asked for.

        :raises ValueError: an argument out of range, or a model without env
        :raises TypeError: an argument of the wrong type
        """
        given = (total_timesteps, callback, log_interval, tb_log_name, *arguments)
        arg.check_arguments(dict(zip(LEARN_CHECKS, given, strict=True)), LEARN_CHECKS)
        self._log_steps = self._logged_at = 0
        if log_interval == "auto":
            log_interval = 1
            # A short run is logged a few times too.
            self._log_steps = max(1, min(AUTO_LOG_STEPS * self.n_envs, int(total_timesteps) // 5))
        if self.env is None:
            raise ValueError("learn() needs an environment: call set_env(env), or load(path, env=env)")
        updates_before = self._n_updates
        with extra_hints():
            learn: Any = super().learn  # type: ignore[safe-super]  # SB3's on- or off-policy base has it
            learn(total_timesteps, callback, log_interval, tb_log_name or type(self).__name__, *arguments)
        was_stopped = self.num_timesteps < self._total_timesteps  # by a callback
        if total_timesteps and self._n_updates == updates_before and not was_stopped and (why := self._why_no_update()):
            warnings.warn(f"learn() has taken no update: {why}", stacklevel=3)
        return self

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """As SB3's; actions are those that the env receives.

        They are integers where the space is a Box of integers, and counted from the space's ``start``.

        :return: actions, and the next state of a recurrent policy
        """
        actions, state = predict(self.policy, observation, state, episode_start, deterministic)
        return actions, state

    def _why_no_update(self) -> str:
        """Why a ``learn`` that has collected has taken no update; empty where that was asked for or has been said."""
        return ""

    def _is_time_to_log(self) -> bool:
        """Whether enough env steps have gone by since the last log of ``log_interval="auto"``; if so, this is one."""
        if self.num_timesteps - max(self._logged_at, self._num_timesteps_at_start) < self._log_steps:
            return False
        self._logged_at = self.num_timesteps
        return True

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        """As SB3's, which resets the env; a NaN in it must not get into a VecNormalize's statistics.

        :raises NonFiniteError: the observation is not finite
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
        """As SB3's, but never below 0: the last rollout may overshoot, and a linear schedule would turn negative."""
        super()._update_current_progress_remaining(min(num_timesteps, total_timesteps), total_timesteps)


def _of_original(name: str) -> str:
    """A parameter's name without what ``torch.compile`` puts into it."""
    return name.replace("_orig_mod.", "")


def waits_for_learning_starts(model: OffPolicyAlgorithm) -> str:
    """Why there is no update before ``learning_starts``, and what to do."""
    return (
        f"num_timesteps={model.num_timesteps} is not above learning_starts={model.learning_starts}. Give more "
        "total_timesteps, a smaller learning_starts, or reset_num_timesteps=False to go on counting."
    )
