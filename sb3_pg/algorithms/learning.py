"""What every algorithm's ``learn`` and ``load`` do before SB3's."""

import io
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm, maybe_make_env
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, TensorDict

from sb3_pg.algorithms import arguments as arg
from sb3_pg.errors import NonFiniteError
from sb3_pg.extras import extra_hints
from sb3_pg.rollout import NormalizationGuard, predict, require_finite_step

SelfLearning = TypeVar("SelfLearning", bound="LearningAlgorithm")


class LearningAlgorithm(BaseAlgorithm):
    """Stands before one of SB3's bases, on- or off-policy, in the order of bases."""

    #: of each argument, what it must be
    checks: ClassVar[Mapping[str, arg.Check]]

    @classmethod
    def load(
        cls: type[SelfLearning],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> SelfLearning:
        """As SB3's; ``kwargs`` replace attributes, and arguments of the constructor are checked as there.

        ``env`` may be the id of a registered environment too.

        :raises TypeError: an argument that is misspelled
        """
        arg.no_typos(cls, kwargs)
        return super().load(path, None if env is None else maybe_make_env(env, verbose=0), *args, **kwargs)

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

    def _learn(
        self: SelfLearning,
        total_timesteps: int,
        callback: MaybeCallback,
        log_interval: int | None,
        tb_log_name: str | None,
        *arguments: Any,
    ) -> SelfLearning:
        """SB3's ``learn``, of arguments that have been looked at; the TensorBoard run is named after the class.

        :raises ValueError: negative ``total_timesteps``, or a model without env
        :raises TypeError: ``total_timesteps`` is not a number
        """
        arg.real(0)("total_timesteps", total_timesteps)
        if self.env is None:
            raise ValueError("learn() needs an environment: call set_env(env), or load(path, env=env)")
        with extra_hints():
            learn: Any = super().learn  # type: ignore[safe-super]  # SB3's on- or off-policy base has it
            learn(total_timesteps, callback, log_interval, tb_log_name or type(self).__name__, *arguments)
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
