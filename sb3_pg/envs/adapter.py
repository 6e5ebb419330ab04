"""Base class of the adapters: episode statistics and infos in the format of SB3's Monitor and DummyVecEnv."""

import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from sb3_pg import compat


class Outcome(NamedTuple):
    """One step of all envs."""

    observations: Any  # the policy acts on these next
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    infos: list[dict[str, Any]]
    final_observations: Any  # the last of each episode that has ended, indexed by env


class VectorAdapter(VecEnv):
    """A vectorized env that steps all its envs in one call, as an SB3 ``VecEnv``.

    ``infos`` of ended episodes have the entries of SB3's Monitor and DummyVecEnv: "episode" (return, length, seconds),
    "terminal_observation", and "TimeLimit.truncated" (truncated and not terminated).

    :param num_envs: number of envs
    :param observation_space: of one env
    :param action_space: of one env
    :param next_step_autoreset: whether the step after an episode's end only resets the env and ignores its action; such
        a step is no transition
    """

    env: Any

    def __init__(
        self,
        num_envs: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        next_step_autoreset: bool,
    ) -> None:
        self._actions: Any = None
        self._returns, self._lengths = np.zeros(num_envs), np.zeros(num_envs, dtype=np.int64)
        self._start = time.time()
        self._results: ResultsWriter | None = None
        #: episodes that have ended since the envs were made
        self.n_ended = 0
        self._ended = np.zeros(num_envs, dtype=bool)
        self._may_step = not next_step_autoreset
        self.next_step_autoreset = next_step_autoreset
        super().__init__(num_envs, observation_space, action_space)

    # ---------------------------------------------------------------- stepping

    @abstractmethod
    def _advance(self, actions: np.ndarray) -> Outcome:
        """Step all envs. Reset those that have ended, unless their next step does it."""

    @abstractmethod
    def _restart(self, seeds: list[int | None], options: dict[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
        """Reset all envs.

        :return: observations and infos
        """

    @contextmanager
    def skip_reset_steps(self) -> Iterator[np.ndarray | None]:
        """Context in which the caller drops the steps that only reset an env (NEXT_STEP autoreset).

        :return: True where the next step only resets the env, ``(n_envs,)``, updated by every step; None for envs
            without such steps
        """
        before, self._may_step = self._may_step, True
        try:
            yield self._ended if self.next_step_autoreset else None
        finally:
            self._may_step = before

    def step_async(self, actions: np.ndarray) -> None:
        """Store the actions for :meth:`step_wait`.

        :param actions: one per env
        :raises RuntimeError: the envs have NEXT_STEP autoreset, and the caller is not in :meth:`skip_reset_steps`
        """
        if not self._may_step:
            raise RuntimeError(
                f"{self._name} has autoreset_mode NEXT_STEP: the step after an episode's end only resets the env, and "
                "is no transition. sb3_pg's on-policy algorithms and OffPolicyPG leave it out. evaluate_policy, "
                "OffPAC and SB3's own algorithms cannot: give them an env of make_vec_env(..., backend='dummy')"
            )
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Step all envs with the stored actions.

        :return: observations, rewards, True where an episode has ended, infos
        """
        resetting = self._ended.nonzero()[0] if self.next_step_autoreset else ()
        observations, rewards, terminated, truncated, infos, finals = self._advance(self._actions)
        self._returns += rewards
        self._lengths += 1
        if len(resetting):
            self._forget(resetting)
        dones = terminated | truncated
        ended = dones.nonzero()[0]
        for i in ended.tolist():
            infos[i]["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
            infos[i]["terminal_observation"] = of_env(finals, i)
            seconds = round(time.time() - self._start, 6)
            infos[i]["episode"] = {"r": round(float(self._returns[i]), 6), "l": int(self._lengths[i]), "t": seconds}
            if self._results is not None:
                self._results.write_row(infos[i]["episode"])
        self.n_ended += len(ended)
        self._forget(ended)
        self._ended[:] = dones
        return observations, np.asarray(rewards, dtype=np.float32), dones, infos

    def reset(self) -> Any:
        """Reset all envs, with the seeds and options that were set since the last reset.

        :return: observations
        :raises ValueError: different options for different envs
        """
        seeds, options = compat.seeds_and_options(self)
        if any(other != options[0] for other in options):
            raise ValueError(f"options must be the same for all envs, got {options}")
        observations, self.reset_infos = self._restart(seeds, options[0])
        compat.clear_seeds_and_options(self)
        self._ended[:] = False
        self._forget(slice(None))
        return observations

    def _forget(self, envs: Any) -> None:
        self._returns[envs] = self._lengths[envs] = 0

    def write_results(self, folder: str, env_id: str) -> None:
        """Write return, length and time of every episode that ends from now on, as SB3's Monitor does.

        :param folder: where ``0.monitor.csv`` is written
        :param env_id: name of the env, for the file's header
        """
        self._results = ResultsWriter(str(Path(folder) / "0"), {"t_start": self._start, "env_id": env_id})

    def close(self) -> None:
        """Close the envs."""
        if self._results is not None:
            self._results.close()
        self.env.close()

    # ---------------------------------------------------------------- attributes

    @property
    def _name(self) -> str:
        return type(self).__name__

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Return an attribute of each env.

        :param attr_name: name of the attribute
        :param indices: the envs, None for all
        :raises AttributeError: the envs have no such attribute
        """
        values = self._attributes(attr_name)
        return [values[i] for i in compat.env_indices(self, indices)]

    @abstractmethod
    def _attributes(self, name: str) -> Sequence[Any]:
        """Return an attribute of every env."""

    def env_is_wrapped(self, wrapper_class: Any, indices: VecEnvIndices = None) -> list[bool]:
        """Whether envs are wrapped in a class. True for Monitor, because the adapter does the same as a Monitor.

        :param wrapper_class: class of the wrapper
        :param indices: the envs, None for all
        """
        wrapped = issubclass(Monitor, wrapper_class)
        return [wrapped or self._is_wrapped(i, wrapper_class) for i in compat.env_indices(self, indices)]

    def _is_wrapped(self, index: int, wrapper_class: Any) -> bool:
        return False


def of_env(observations: Any, index: int) -> Any:
    """Return a copy of one env's observation.

    :param observations: observations of all envs: an array, a dict of arrays, or an array of dicts
    :param index: number of the env
    """
    if isinstance(observations, dict):
        return {key: np.array(values[index]) for key, values in observations.items()}
    own = observations[index]
    return {key: np.array(value) for key, value in own.items()} if isinstance(own, dict) else np.array(own)


def as_arrays(observations: Any) -> Any:
    """Return observations of all envs as NumPy arrays.

    :param observations: an array of any library, or a dict of arrays
    """
    if isinstance(observations, dict):
        return {key: np.asarray(values) for key, values in observations.items()}
    return np.asarray(observations)
