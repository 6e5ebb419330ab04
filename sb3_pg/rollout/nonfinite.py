"""Report the first NaN or inf and its source."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_normalize

from sb3_pg.errors import NonFiniteError
from sb3_pg.policies import policy_cache
from sb3_pg.rollout.buffers import TrajectoryRolloutBuffer

_FROM_ENV = "The env returned it."


def _parts(name: str, observations: Any) -> list[tuple[str, Any]]:
    if isinstance(observations, dict):
        return [(f"{name}['{key}']", array) for key, array in observations.items()]
    return [(name, observations)]


def _is_finite(array: Any) -> bool:
    """Whether the sum of an array is finite. If it is, all numbers are; if not, it may have overflowed."""
    if not np.issubdtype(array.dtype, np.floating):
        return True
    with np.errstate(all="ignore"):
        return bool(np.isfinite(array.sum()))


def require_finite_step(
    name: str, values: Any, step: int, hint: str = _FROM_ENV, cause: Exception | None = None
) -> None:
    """Check numbers of one step of all envs.

    :param name: name of the values, for the error message
    :param values: ``(n_envs, ...)``, or a dict of those
    :param step: time step within the rollout
    :param hint: end of the error message
    :param cause: error that the values may have caused
    :raises NonFiniteError: naming the first env whose values are not finite
    """
    for part, array in _parts(name, values):
        if _is_finite(array):
            continue
        bad = np.argwhere(~np.isfinite(array))
        if len(bad):
            raise NonFiniteError(part, float(array[tuple(bad[0])]), int(bad[0][0]), step, hint) from cause


def require_finite_rollout(buffer: TrajectoryRolloutBuffer) -> None:
    """Check the rewards and observations of a finished buffer.

    :raises NonFiniteError: naming the first that is not finite
    """
    for name, array in (("reward", buffer.rewards), *_parts("observation", buffer.observations)):
        if _is_finite(array):
            continue
        bad = ~np.isfinite(array).reshape(*array.shape[:2], -1).all(axis=-1) & buffer.mask
        if bad.any():
            step, env = (int(i) for i in np.argwhere(bad)[0])
            value = np.asarray(array[step, env])
            raise NonFiniteError(name, float(value[~np.isfinite(value)].flat[0]), env, step, _FROM_ENV)
    finals = buffer.final_observations
    values = [np.ravel(array) for observation in finals.values() for _, array in _parts("", observation)]
    floats = [array for array in values if array.dtype.kind == "f"]  # of any shape: as the env returned them
    if not floats or _is_finite(np.concatenate(floats)):
        return
    for (step, env), observation in finals.items():
        require_finite_observation("observation that followed", observation, env, step)


def require_finite_observation(name: str, observation: Any, env: int, step: int, hint: str = _FROM_ENV) -> None:
    """Check one observation of one env.

    :param name: name of the observation, for the error message
    :param observation: an array, or a dict of those
    :param env: the env
    :param step: time step within the rollout
    :param hint: end of the error message
    :raises NonFiniteError: it is not finite
    """
    for part, array in _parts(name, observation):
        values = np.asarray(array)
        if not _is_finite(values) and not np.isfinite(values).all():
            raise NonFiniteError(part, float(values[~np.isfinite(values)].flat[0]), env, step, hint)


def require_finite_policy(policy: BasePolicy, cause: Exception | None = None, hint: str = "") -> None:
    """Check a policy's parameters.

    :param policy: the policy
    :param cause: error that the parameters may have caused
    :param hint: end of the error message
    :raises NonFiniteError: naming the first parameter that is not finite
    """
    for name, parameter in policy.named_parameters():
        bad = parameter.detach()[~parameter.isfinite()]
        if len(bad):
            raise NonFiniteError(f"parameter {name}", float(bad[0]), hint=hint) from cause


def require_usable_policy(policy: BasePolicy) -> None:
    """Check the parameters of a policy that is about to act. They are not read if nothing has changed them since.

    :param policy: its cache must be up to date, see ``set_training_mode``
    :raises NonFiniteError: naming the first parameter that is not finite
    """
    cache = policy_cache(policy)
    if not cache.is_known_finite():
        if not cache.snapshot().is_finite():
            require_finite_policy(policy)
        cache.note_finite()


class NormalizationGuard:
    """Checks rewards and observations before a VecNormalize, whose statistics would spread one env's NaN to all envs.

    :param env: the environments, with or without a VecNormalize among their wrappers
    """

    def __init__(self, env: VecEnv) -> None:
        self.wrapper: VecNormalize | None = unwrap_vec_normalize(env)

    def check(self, step: int) -> None:
        """Check the latest rewards and observations as they were before normalization.

        :param step: time step within the rollout
        :raises NonFiniteError: naming the first env whose numbers are not finite
        """
        if self.wrapper is not None:
            require_finite_step("reward", self.wrapper.old_reward, step)
            require_finite_step("observation", self.wrapper.old_obs, step)

    def check_reset(self, obs: Any) -> None:
        """Check the observations of a reset, as they were before normalization if there is one.

        :param obs: what the reset has returned
        :raises NonFiniteError: naming the first env whose numbers are not finite
        """
        hint = "The env's reset returned it."
        if self.wrapper is not None:
            require_finite_step("observation", self.wrapper.old_obs, 0, hint)
        require_finite_step("observation", obs, 0, hint)

    @contextmanager
    def statistics_kept(self, on: type[BaseException] = NonFiniteError) -> Iterator[None]:
        """Restore the running statistics if the body raises an error.

        :param on: class of the errors
        """
        if self.wrapper is None:
            yield
            return
        observations: Any = getattr(self.wrapper, "obs_rms", None) or {}
        statistics = [*observations.values()] if isinstance(observations, dict) else [observations]
        statistics.append(self.wrapper.ret_rms)
        before = [copy.deepcopy(vars(running)) for running in statistics]
        try:
            yield
        except on:
            for running, values in zip(statistics, before, strict=True):
                vars(running).update(values)  # in place: evaluation envs may share the object
            raise
