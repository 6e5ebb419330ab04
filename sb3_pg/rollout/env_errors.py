"""Errors that say what an env has done wrong, in place of errors of SB3's vectorized envs that name nothing."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

#: Errors of a pipe to a dead process.
_OF_PIPES = (EOFError, ConnectionError)
_FORM = (
    "env.step must return (observation, reward, terminated, truncated, info) and env.reset (observation, info), with "
    "observations in observation_space and a number as reward"
)


class EnvWorkerError(RuntimeError):
    """A worker process of a SubprocVecEnv, or an actor, has died; or the env of a worker has raised an error."""


@contextmanager
def naming_env_errors(env: VecEnv) -> Iterator[None]:
    """Context that replaces errors of SB3's vectorized envs by errors that say what is wrong.

    Errors of the env itself stay as they are. A SubprocVecEnv may have been interrupted after it sent a step to its
    workers and before it read their answer; the answer is read and dropped first.

    :param env: any VecEnv
    :raises EnvWorkerError: a worker of a SubprocVecEnv has died
    :raises ValueError: SB3 cannot store what an env has returned
    :raises TypeError: SB3 cannot store what an env has returned
    """
    inner = env.unwrapped
    try:
        if isinstance(inner, SubprocVecEnv) and inner.waiting:
            inner.step_wait()
        yield
    except _OF_PIPES as error:
        if isinstance(inner, SubprocVecEnv):
            _name_dead_worker(inner, error)
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if not _comes_from_vec_env(error):
            raise
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"{_FORM}; got something else: {error}") from error


def require_form(observation: Any, space: spaces.Space[Any], env: int) -> None:
    """Require a last observation with as many numbers as the space has, which SB3's vectorized envs do not check.

    :param observation: the observation after an episode's last step
    :param space: observation space
    :param env: index of the env
    :raises ValueError: it has another form
    """
    inner: dict[Any, Any] = dict(space.spaces) if isinstance(space, spaces.Dict) else {"": space}
    given = observation if isinstance(space, spaces.Dict) else {"": observation}
    fits = isinstance(given, dict) and all(
        key in given and np.size(given[key]) == math.prod(part.shape or ()) for key, part in inner.items()
    )
    if not fits:
        raise ValueError(f"{_FORM}; got something else: the last observation of env {env} is not in {space}")


def _name_dead_worker(env: SubprocVecEnv, error: Exception) -> None:
    for i, process in enumerate(env.processes):
        process.join(0.1)
        if process.exitcode is not None:
            raise EnvWorkerError(
                f"The worker process of env {i} has died, exit code {process.exitcode}. If its env has raised an "
                "error, the traceback is on stderr. Make new envs and call set_env(env) to go on."
            ) from error


def _comes_from_vec_env(error: BaseException) -> bool:
    """Whether SB3's vectorized envs or its Monitor raised an error, or NumPy when they called it."""
    names = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
    while names and names[-1].startswith("numpy"):
        names.pop()
    return bool(names) and names[-1].startswith(
        tuple(f"stable_baselines3.common.{name}" for name in ("vec_env", "monitor", "running_mean_std"))
    )
