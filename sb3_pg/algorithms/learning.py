"""What every algorithm's ``learn`` does before SB3's."""

from typing import Any, TypeVar

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import MaybeCallback

from sb3_pg.algorithms import arguments as arg
from sb3_pg.errors import NonFiniteError
from sb3_pg.extras import extra_hints
from sb3_pg.rollout import NormalizationGuard, require_finite_step

SelfLearning = TypeVar("SelfLearning", bound="LearningAlgorithm")


class LearningAlgorithm(BaseAlgorithm):
    """Stands before one of SB3's bases, on- or off-policy, in the order of bases."""

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
