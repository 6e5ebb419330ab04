"""What all adapters do: statistics and infos of ended episodes as SB3's Monitor and DummyVecEnv give them."""

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


class Outcome(NamedTuple):
    """One step of all envs."""

    observations: Any  # what the next actions follow
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    infos: list[dict[str, Any]]
    final_observations: Any  # indexed by env, where an episode has ended


class VectorAdapter(VecEnv):
    """A vectorized env that steps all its envs in one call, as an SB3 ``VecEnv``.

    ``infos`` of ended episodes have what SB3's Monitor and DummyVecEnv put there: "episode" (return, length, seconds),
    "terminal_observation", "TimeLimit.truncated" (and not terminated).

    :param num_envs: number of envs
    :param observation_space: of one env
    :param action_space: of one env
    :param resets_late: an ended env is reset by the step that follows, whose action it ignores: a false transition
    """

    env: Any

    def __init__(
        self, num_envs: int, observation_space: spaces.Space[Any], action_space: spaces.Space[Any], resets_late: bool
    ) -> None:
        self._actions: Any = None
        self._returns, self._lengths = np.zeros(num_envs), np.zeros(num_envs, dtype=np.int64)
        self._start = time.time()
        self._results: ResultsWriter | None = None
        #: episodes that have ended since it was made
        self.n_ended = 0
        self._ended = np.zeros(num_envs, dtype=bool)
        self._masked = not resets_late
        self.resets_late = resets_late
        super().__init__(num_envs, observation_space, action_space)

    # ---------------------------------------------------------------- stepping

    @abstractmethod
    def _advance(self, actions: np.ndarray) -> Outcome:
        """Step all envs, and reset those that have ended, unless the next step does."""

    @abstractmethod
    def _restart(self, seeds: list[int | None], options: dict[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
        """Reset all envs.

        :return: observations and infos
        """

    @contextmanager
    def false_steps_masked(self) -> Iterator[np.ndarray | None]:
        """Within it, the caller leaves out the transitions that are none.

        :return: None if there are none; otherwise ``(n_envs,)``, kept up to date: True where the next step will only
            reset, whatever the action
        """
        before, self._masked = self._masked, True
        try:
            yield self._ended if self.resets_late else None
        finally:
            self._masked = before

    def step_async(self, actions: np.ndarray) -> None:
        """Note what to do.

        :param actions: one per env
        :raises RuntimeError: the envs reset late, and nobody has said that they mask those steps
        """
        if not self._masked:
            raise RuntimeError(
                f"{self._name} resets an env in the step that follows an episode's end (NEXT_STEP): a transition that "
                "never happened. sb3_pg's on-policy algorithms and OffPolicyPG leave it out; evaluate_policy, OffPAC "
                "and SB3's own algorithms cannot: give those an env of make_vec_env(..., backend='dummy')"
            )
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Do it.

        :return: observations, rewards, where an episode has ended, infos
        """
        resetting = self._ended.nonzero()[0] if self.resets_late else ()
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
        """Reset all envs, with the seeds and options that were set since the last time.

        :return: observations
        :raises ValueError: different options for different envs
        """
        options = self._options[0]
        if any(other != options for other in self._options):
            raise ValueError(f"options must be the same for all envs, got {self._options}")
        observations, self.reset_infos = self._restart(self._seeds, options)
        self._reset_seeds()
        self._reset_options()
        self._ended[:] = False
        self._forget(slice(None))
        return observations

    def _forget(self, envs: Any) -> None:
        self._returns[envs] = self._lengths[envs] = 0

    def write_results(self, folder: str, env_id: str) -> None:
        """Write return, length and time of every episode that ends from now on, as SB3's Monitor does.

        :param folder: of ``0.monitor.csv``
        :param env_id: what stands in its header
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
        """An attribute of each env.

        :param attr_name: its name
        :param indices: of which envs, None for all
        :raises AttributeError: there is none
        """
        values = self._attributes(attr_name)
        return [values[i] for i in self._get_indices(indices)]

    @abstractmethod
    def _attributes(self, name: str) -> Sequence[Any]:
        """An attribute of all envs."""

    def env_is_wrapped(self, wrapper_class: Any, indices: VecEnvIndices = None) -> list[bool]:
        """Whether envs are wrapped: in a Monitor, yes, as far as anybody can tell.

        :param wrapper_class: the wrapper
        :param indices: which envs, None for all
        """
        wrapped = issubclass(Monitor, wrapper_class)
        return [wrapped or self._is_wrapped(i, wrapper_class) for i in self._get_indices(indices)]

    def _is_wrapped(self, index: int, wrapper_class: Any) -> bool:
        return False


def of_env(observations: Any, index: int) -> Any:
    """A copy of one env's observation.

    :param observations: of all envs; arrays, or dicts of arrays
    :param index: which
    """
    if isinstance(observations, dict):
        return {key: np.array(values[index]) for key, values in observations.items()}
    own = observations[index]
    return {key: np.array(value) for key, value in own.items()} if isinstance(own, dict) else np.array(own)


def as_arrays(observations: Any) -> Any:
    """Observations of all envs as numpy arrays, whatever the library that made them.

    :param observations: arrays, or a dict of arrays
    """
    if isinstance(observations, dict):
        return {key: np.asarray(values) for key, values in observations.items()}
    return np.asarray(observations)
