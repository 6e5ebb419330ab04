"""Adapter for EnvPool's envs, which step in C++ threads."""

import difflib
import importlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices

from sb3_pg.envs.adapter import Outcome, VectorAdapter
from sb3_pg.extras import extra_hints


class EnvPoolAdapter(VectorAdapter):
    """Envs of EnvPool (Weng et al. 2022) as an SB3 ``VecEnv``. An env that has ended is reset in the same step.

    EnvPool sets seeds when it makes its envs, so ``seed`` makes them anew. EnvPool's own entries of ``infos`` are given
    for ended episodes only. EnvPool reports an episode that ends in its last allowed step as truncated, even if the
    state is terminal.

    :param env_id: a name in ``envpool.list_all_envs()``
    :param num_envs: number of envs
    :param kwargs: arguments of ``envpool.make``, such as ``num_threads`` and ``max_episode_steps``
    :raises MissingExtraError: EnvPool is not installed
    :raises ValueError: EnvPool has no such env, does not know an argument, or the adapter sets it itself
    """

    def __init__(self, env_id: str, num_envs: int = 1, **kwargs: Any) -> None:
        with extra_hints():
            envpool = importlib.import_module("envpool")
        known = envpool.list_all_envs()
        if env_id not in known:
            close = difflib.get_close_matches(env_id, known, n=3)
            hint = f", did you mean one of {close}?" if close else ""
            raise ValueError(f"env_id must be an env of EnvPool, got {env_id!r}{hint}")
        reserved = {"seed": "call seed()", "batch_size": "all envs step together", "env_type": "it is gymnasium's"}
        for name in reserved.keys() & kwargs.keys():
            raise ValueError(f"{name} must be left out, got {kwargs[name]!r}: {reserved[name]}")
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        self._make = partial(envpool.make, env_id, env_type="gymnasium", num_envs=num_envs, **kwargs)
        self._env_id = env_id
        try:
            self.env = self._make()
        except TypeError as error:
            raise ValueError(f"kwargs must be arguments of EnvPool's {env_id}, got {kwargs}: {error}") from error
        super().__init__(num_envs, self.env.observation_space, self.env.action_space, next_step_autoreset=False)

    def _restart(self, seeds: list[int | None], options: dict[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
        if options:
            raise ValueError(f"options must be empty (EnvPool's envs take none), got {options}")
        if seeds[0] is not None:
            self.env.close()
            self.env = self._make(seed=[seed % 2**31 for seed in seeds if seed is not None])
        observations, _ = self.env.reset()
        return observations, [{} for _ in range(self.num_envs)]

    def _advance(self, actions: np.ndarray) -> Outcome:
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        ended = np.flatnonzero(terminated | truncated)
        rows: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        finals = observations
        if len(ended):
            known = {key: values for key, values in infos.items() if isinstance(values, np.ndarray)}
            for i in ended:
                rows[i] = {key: values[i] for key, values in known.items()}
            fresh, reset_infos = self.env.reset(ended)
            observations = _replaced(observations, reset_infos["env_id"], fresh)
        return Outcome(observations, rewards, terminated, truncated, rows, finals)

    # ---------------------------------------------------------------- attributes

    @property
    def _name(self) -> str:
        return f"{type(self).__name__}({self._env_id!r})"

    def _attributes(self, name: str) -> Sequence[Any]:
        return [getattr(self.env, name)] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Raise an error: EnvPool's envs are not Python objects.

        :raises NotImplementedError: always
        """
        raise NotImplementedError(
            f"{self._name}: an env of EnvPool has no attributes that can be set; pass {attr_name} as an argument"
        )

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Raise an error: EnvPool's envs are not Python objects.

        :raises NotImplementedError: always
        """
        raise NotImplementedError(f"{self._name}: an env of EnvPool has no methods to call, got {method_name!r}")

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Return one frame per env. The envs must have been made with ``render_mode="rgb_array"``."""
        return list(self.env.render(range(self.num_envs)))


def _replaced(observations: Any, envs: np.ndarray, fresh: Any) -> Any:
    """Return a copy of the observations in which ``fresh`` replaces those of ``envs``."""
    if isinstance(observations, dict):
        return {key: _replaced(values, envs, fresh[key]) for key, values in observations.items()}
    replaced = observations.copy()
    replaced[envs] = fresh
    return replaced
