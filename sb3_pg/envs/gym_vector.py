"""Adapter for Gymnasium's vector envs, in each of their autoreset modes."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Final, cast

import numpy as np
from gymnasium import Env
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices

from sb3_pg import compat
from sb3_pg.envs.adapter import Outcome, VectorAdapter, as_arrays

# Entries of Gymnasium's infos about the episodes that have just ended (SAME_STEP).
_FINAL_KEYS: Final = {"final_obs", "_final_obs", "final_info", "_final_info"}


class GymVectorAdapter(VectorAdapter):
    """A ``gymnasium.vector.VectorEnv`` as an SB3 ``VecEnv``.

    =============== ==================================================================================================
    autoreset mode  what the adapter does
    =============== ==================================================================================================
    SAME_STEP       the env resets itself in the step that ends an episode, as SB3's VecEnvs do
    DISABLED        the adapter does the same with ``env.reset(options={"reset_mask": ...})``
    NEXT_STEP       a ``SyncVectorEnv`` without wrappers is switched to SAME_STEP. Other envs work with the algorithms
                    of this package that collect rollouts, which leave out the steps that only reset; elsewhere the
                    first step raises RuntimeError
    =============== ==================================================================================================

    As in SB3, env i is seeded with seed + i if each env takes its own seed (Sync, Async). Other vector envs get the
    first seed only.

    :param env: the vector env
    :raises TypeError: ``env`` is not a Gymnasium vector env, or is one of EnvPool
    :raises ValueError: its ``metadata["autoreset_mode"]`` is missing
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        if isinstance(env, cast(Any, Env)) or not isinstance(env, VectorEnv):  # EnvPool's envs are both
            raise TypeError(f"env must be a gymnasium.vector.VectorEnv (EnvPoolAdapter takes EnvPool's), got {env!r}")
        mode = env.metadata.get("autoreset_mode")
        if not isinstance(mode, AutoresetMode):
            raise ValueError(f'env.metadata["autoreset_mode"] must be an AutoresetMode, got {mode!r} of {env!r}')
        if mode is AutoresetMode.NEXT_STEP and type(env) is SyncVectorEnv:
            env.autoreset_mode = env.metadata["autoreset_mode"] = mode = AutoresetMode.SAME_STEP
        self.env, self.mode = env, mode
        self._base: Any = env.unwrapped
        outermost: Any = env  # a wrapper may reuse arrays of its own
        self._gives_copies = type(outermost) in (SyncVectorEnv, AsyncVectorEnv) and outermost.copy
        next_step_autoreset = mode is AutoresetMode.NEXT_STEP
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space, next_step_autoreset)
        self.metadata = {**env.metadata, **self.metadata}

    def _restart(self, seeds: list[int | None], options: dict[str, Any]) -> tuple[Any, list[dict[str, Any]]]:
        seed: Any = None
        if seeds[0] is not None:
            seed = seeds if self._has_single_envs else seeds[0]
        observations, infos = self.env.reset(seed=seed, options=options or None)
        return self._owned(observations), rows_of(infos, self.num_envs)

    def _advance(self, actions: np.ndarray) -> Outcome:
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        terminated, truncated = np.asarray(terminated, dtype=bool), np.asarray(truncated, dtype=bool)
        finals = observations = self._owned(observations)
        dones = terminated | truncated
        if self.mode is AutoresetMode.SAME_STEP:
            finals = infos.get("final_obs")
            if finals is None and dones.any():
                raise RuntimeError(
                    f"{self._name} has autoreset_mode SAME_STEP, but no 'final_obs' in infos where episodes end"
                )
            rows = rows_of({key: infos[key] for key in infos.keys() - _FINAL_KEYS}, self.num_envs)
            if dones.any():
                self._move(dones, rows, rows_of(infos.get("final_info", {}), self.num_envs))
        else:
            rows = rows_of(infos, self.num_envs)
            if self.mode is AutoresetMode.NEXT_STEP:
                self._move(self._ended, rows)
            elif dones.any():
                observations, reset_infos = self._reset_ended(observations, dones)
                for i in np.flatnonzero(dones):
                    self.reset_infos[i] = reset_infos[i]
        return Outcome(observations, np.asarray(rewards), terminated, truncated, rows, finals)

    def _move(self, envs: np.ndarray, rows: list[dict[str, Any]], instead: list[dict[str, Any]] | None = None) -> None:
        """Move these envs' infos, which are those of a reset, to ``reset_infos``, and put others in their place."""
        for i in envs.nonzero()[0]:
            self.reset_infos[i], rows[i] = rows[i], {} if instead is None else instead[i]

    def _reset_ended(self, observations: Any, ended: np.ndarray) -> tuple[Any, list[dict[str, Any]]]:
        """Reset the envs that have ended.

        :raises RuntimeError: the env resets the others too
        """
        fresh, infos = self.env.reset(options={"reset_mask": ended.copy()})
        fresh = self._owned(fresh)
        before, after = (o if isinstance(o, dict) else {"": o} for o in (observations, fresh))
        if not all(np.array_equal(before[key][~ended], after[key][~ended], equal_nan=True) for key in before):
            raise RuntimeError(
                f"{self._name} has autoreset_mode DISABLED, and resets all its envs although options['reset_mask'] "
                "selects some: it must reset only those"
            )
        return fresh, rows_of(infos, self.num_envs)

    def _owned(self, observations: Any) -> Any:
        """Return the observations in arrays that the next step does not overwrite."""
        arrays = as_arrays(observations)
        if self._gives_copies:
            return arrays
        return arrays.copy() if isinstance(arrays, np.ndarray) and arrays.dtype != object else deepcopy(arrays)

    # ---------------------------------------------------------------- attributes

    @property
    def _name(self) -> str:
        return f"{type(self).__name__}({self.env})"

    @property
    def _has_single_envs(self) -> bool:
        """Whether each env is a Gymnasium env of its own (Sync, Async)."""
        return hasattr(self._base, "env_fns")

    def has_attr(self, attr_name: str) -> bool:
        """Whether each env has an attribute.

        :param attr_name: name of the attribute
        """
        if self._has_single_envs:  # `get_attr` would end an env's process with the error
            return all(self._base.call("has_wrapper_attr", attr_name))
        return hasattr(self._owner(attr_name), attr_name)

    def _owner(self, name: str) -> Any:
        """Return the outermost wrapper that has an attribute, or the env inside all wrappers."""
        env: Any = self.env
        while env is not self._base and not hasattr(env, name):
            env = env.env
        return env

    def _attributes(self, name: str) -> Sequence[Any]:
        if not self.has_attr(name):
            raise AttributeError(f"the envs of {self._name} have no attribute {name!r}")
        if self._has_single_envs:
            return list(self._base.get_attr(name))
        return [getattr(self._owner(name), name)] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of envs. In a vector env without single envs, it has one value for all.

        :param attr_name: name of the attribute
        :param value: its value, the same for all these envs
        :param indices: the envs, None for all
        :raises ValueError: ``indices`` selects some envs of a vector env without single envs
        :raises AttributeError: ``indices`` selects some envs in processes, and the others have no such attribute
        """
        chosen = list(compat.env_indices(self, indices))
        if isinstance(self._base, SyncVectorEnv):
            for i in chosen:
                self._base.envs[i].set_wrapper_attr(attr_name, value)
        elif self._has_single_envs:
            values = [value] * self.num_envs
            if len(chosen) < self.num_envs:
                values = [value if i in chosen else old for i, old in enumerate(self._attributes(attr_name))]
            self._base.set_attr(attr_name, values)
        else:
            self._require_all(chosen, "set_attr")
            setattr(self._owner(attr_name), attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of envs. In a vector env without single envs, the method is called once.

        :param method_name: name of the method
        :param indices: the envs, None for all
        :return: one result per env
        :raises ValueError: ``indices`` selects some envs, and they can only be called together (all but Sync)
        """
        chosen = list(compat.env_indices(self, indices))
        if isinstance(self._base, SyncVectorEnv):
            envs = [self._base.envs[i] for i in chosen]
            return [env.get_wrapper_attr(method_name)(*method_args, **method_kwargs) for env in envs]
        self._require_all(chosen, "env_method")
        if self._has_single_envs:
            return list(self._base.call(method_name, *method_args, **method_kwargs))
        return [getattr(self._owner(method_name), method_name)(*method_args, **method_kwargs)] * self.num_envs

    def _require_all(self, chosen: list[int], caller: str) -> None:
        if len(chosen) < self.num_envs:
            raise ValueError(
                f"{caller}: indices must be None (the envs of {self._name} are called together), got {chosen}"
            )

    def _is_wrapped(self, index: int, wrapper_class: Any) -> bool:
        return isinstance(self._base, SyncVectorEnv) and is_wrapped(self._base.envs[index], wrapper_class)

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Return one frame per env. The envs must have been made with ``render_mode="rgb_array"``."""
        frames: Any = self.env.render()
        return [None] * self.num_envs if frames is None else list(frames)


def rows_of(infos: dict[str, Any], n_envs: int) -> list[dict[str, Any]]:
    """Return Gymnasium's infos, a dict of arrays, as one dict per env.

    :param infos: arrays, each with a mask under the same name after an underscore; dicts of such arrays; other values
        are the same for all envs
    :param n_envs: number of envs
    """
    rows: list[dict[str, Any]] = [{} for _ in range(n_envs)]
    for key, values in infos.items():
        if key.startswith("_") and key[1:] in infos:
            continue
        parts: Any = rows_of(values, n_envs) if isinstance(values, dict) else values
        if np.ndim(parts) == 0:
            parts = [values] * n_envs
        mask = infos.get(f"_{key}")
        for i in range(n_envs) if mask is None else np.flatnonzero(mask):
            rows[i][key] = parts[i]
    return rows
