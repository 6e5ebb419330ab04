"""Find the action masks that envs give, and put them into the observations."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, cast
from weakref import WeakKeyDictionary

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    StackedObservations,
    SubprocVecEnv,
    VecEnv,
    VecEnvWrapper,
    VecFrameStack,
    VecNormalize,
)
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from sb3_pg import compat
from sb3_pg.action_masks import MASK_KEY, MASK_METHOD, has_mask_key, mask_sizes, require_masks, sources_of_masks

#: Key of observations that are no Dict, once the mask is beside them.
OBSERVATION_KEY = "observation"
_NO_METHOD = f"{MASK_METHOD} of the env must be a method without arguments, which returns a mask"


class ActionMaskVecEnv(VecEnvWrapper):
    """Adds the key "action_mask" to the observations of envs that say which actions are allowed.

    Observations that are no Dict become ``{"observation": ..., "action_mask": ...}``. The mask of each env is
    ``infos[i]["action_mask"]`` or, where an env's infos have none, what its method ``action_masks()`` returns: one call
    of ``env_method`` per step. For the first observation of an episode, infos are those of the reset. The mask of a
    ``terminal_observation`` is that of its infos, or allows all: no action is taken there. Infos of truncated episodes
    have it in a DummyVecEnv and in what ``make_vec_env`` makes.

    It goes inside or around other wrappers. A VecNormalize or VecFrameStack around it takes the mask for numbers, until
    an algorithm or :func:`with_action_masks` is given the env.

    :param venv: the envs
    :raises ValueError: actions of this space have no masks, or the observations have the key already
    """

    def __init__(self, venv: VecEnv) -> None:
        sizes, space = mask_sizes(venv.action_space), venv.observation_space
        if not sizes:
            raise ValueError(f"masks are for Discrete, MultiDiscrete and MultiBinary actions, got {venv.action_space}")
        parts = dict(space.spaces) if isinstance(space, spaces.Dict) else {OBSERVATION_KEY: space}
        if MASK_KEY in parts:
            raise ValueError(f"observations have the key {MASK_KEY!r} already, got {space}")
        self._is_dict = isinstance(space, spaces.Dict)
        self._n_masks = sum(sizes)
        self._has_method: bool | None = None
        self._next_step = bool(getattr(venv, "next_step_autoreset", False))
        #: where the next step only resets the env
        self._resets = np.zeros(venv.num_envs, dtype=bool)
        # a Box, because VecNormalize and VecFrameStack take no other space, even where they are to leave it alone
        super().__init__(venv, spaces.Dict({**parts, MASK_KEY: spaces.Box(0, 1, (self._n_masks,), np.int8)}))

    def reset(self) -> Any:
        """Reset the envs.

        :return: observations
        :raises ValueError: an env gives no mask, or one of another shape
        """
        observations = self.venv.reset()
        self.reset_infos = _innermost(self.venv).reset_infos
        self._resets[:] = False
        return self._with_masks(observations, self._masks(list(self.reset_infos)))

    def step_wait(self) -> VecEnvStepReturn:
        """Step the envs.

        :return: observations, rewards, True where an episode has ended, infos
        :raises ValueError: an env gives no mask, or one of another shape
        """
        with self._masks_sent_along():
            observations, rewards, dones, infos = self.venv.step_wait()
        of_reset = self._resets if self._next_step else dones
        present = list(infos)
        everything = np.ones(self._n_masks, dtype=np.int8)
        if of_reset.any():
            self.reset_infos = _innermost(self.venv).reset_infos
            for i in np.flatnonzero(of_reset).tolist():
                present[i] = self.reset_infos[i]
        for i in np.flatnonzero(dones).tolist():
            mask = infos[i].get(MASK_KEY)
            mask = everything if mask is None else self._checked(i, mask).astype(np.int8)
            if self._next_step:  # no action is drawn for this observation
                present[i] = {MASK_KEY: mask if mask.any() else everything}
            if infos[i].get("terminal_observation") is not None:
                infos[i]["terminal_observation"] = self._with_masks(infos[i]["terminal_observation"], mask)
        if self._next_step:
            self._resets = dones.copy()
        return self._with_masks(observations, self._masks(present)), rewards, dones, infos

    @contextmanager
    def _masks_sent_along(self) -> Iterator[None]:
        """Context in which infos of a DummyVecEnv have masks. It resets an env before the last one can be asked for."""
        inner = _innermost(self.venv)
        if not isinstance(inner, DummyVecEnv):
            yield
            return
        envs = inner.envs
        wrapped = _WRAPPED.get(self)
        if wrapped is None or wrapped[0] != envs:
            wrapped = _WRAPPED[self] = list(envs), [_with_masks_in_infos(env) for env in envs]
        inner.envs = wrapped[1]
        try:
            yield
        finally:
            inner.envs = envs

    def _with_masks(self, observations: Any, masks: np.ndarray) -> dict[str, Any]:
        parts = observations if self._is_dict else {OBSERVATION_KEY: observations}
        return {**parts, MASK_KEY: masks}

    def _masks(self, infos: list[dict[str, Any]]) -> np.ndarray:
        """Return the masks of all envs, ``(n_envs, n_masks)``.

        :param infos: those that came with the present observations
        """
        given: list[Any] = [info.get(MASK_KEY) for info in infos]
        missing = [i for i, mask in enumerate(given) if mask is None]
        if missing:
            if self._has_method is None:
                self._has_method = _has(self.venv, MASK_METHOD)
            if not self._has_method:
                raise ValueError(
                    f"env {missing[0]} gives no action mask: its infos have no {MASK_KEY!r}, and it has no method "
                    f"{MASK_METHOD}(). Give masks at every step, or set use_action_masks=False"
                )
            asked = self._asked()
            for i in missing:
                given[i] = asked[i]
        try:
            masks = np.stack(given)
        except (TypeError, ValueError):
            masks = np.zeros(0)
        if masks.dtype != bool or masks.shape != (self.num_envs, self._n_masks):
            masks = np.stack([self._checked(i, mask) for i, mask in enumerate(given)])
        return masks.astype(np.int8)

    def _asked(self) -> list[Any]:
        """Return what the envs' method ``action_masks()`` returns."""
        try:
            asked: list[Any] = self.venv.env_method(MASK_METHOD)
        except TypeError as error:
            raise TypeError(f"{_NO_METHOD}: {error}") from error
        steps_as_one = not isinstance(_innermost(self.venv), DummyVecEnv | SubprocVecEnv)
        is_one = steps_as_one and all(one is asked[0] for one in asked)
        if is_one and np.shape(asked[0]) == (self.num_envs, self._n_masks):
            return list(asked[0])  # the masks of all envs
        return asked

    def _checked(self, env: int, mask: Any) -> np.ndarray:
        return require_masks(f"action_mask of env {env}", mask, self.action_space, of_one_env=True)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for pickle and copy, without the table of the class's own, which cannot be copied."""
        return {name: value for name, value in vars(self).items() if name != "class_attributes"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, class_attributes=dict(inspect.getmembers(type(self))))


#: The envs of a DummyVecEnv, and the same in a :class:`MasksInInfos`. They are no part of the wrapper's state.
_WRAPPED: WeakKeyDictionary[ActionMaskVecEnv, tuple[list[Any], list[Any]]] = WeakKeyDictionary()


class NormalizationWithMasks:
    """What SB3's replay code uses of a VecNormalize, for one inside an :class:`ActionMaskVecEnv`.

    Observations that it gets and returns have masks, which stay as they are. Other attributes are the VecNormalize's.

    :param inner: the VecNormalize
    :param masks: those of the latest observations
    """

    def __init__(self, inner: VecNormalize, masks: np.ndarray) -> None:
        self.inner, self.masks = inner, masks
        self._is_dict = isinstance(inner.observation_space, spaces.Dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def get_original_obs(self) -> dict[str, Any]:
        """Return the latest observations as they were before normalization."""
        original: Any = self.inner.get_original_obs()
        return {**(original if self._is_dict else {OBSERVATION_KEY: original}), MASK_KEY: self.masks}

    def normalize_obs(self, obs: dict[str, Any]) -> dict[str, Any]:
        """Normalize observations.

        :param obs: with masks
        """
        return self._mapped(self.inner.normalize_obs, obs)

    def unnormalize_obs(self, obs: dict[str, Any]) -> dict[str, Any]:
        """Return observations as they were before normalization.

        :param obs: with masks
        """
        return self._mapped(self.inner.unnormalize_obs, obs)

    def _mapped(self, function: Callable[[Any], Any], obs: dict[str, Any]) -> dict[str, Any]:
        parts = {key: part for key, part in obs.items() if key != MASK_KEY}
        changed = function(parts) if self._is_dict else {OBSERVATION_KEY: function(parts[OBSERVATION_KEY])}
        return {**changed, MASK_KEY: obs[MASK_KEY]}


def normalization_with_masks(env: VecEnv, masks: np.ndarray) -> NormalizationWithMasks | None:
    """Return the VecNormalize inside an :class:`ActionMaskVecEnv`, with masks; None if there is no such pair.

    :param env: the envs
    :param masks: those of the latest observations
    """
    has_added = False
    while isinstance(env, VecEnvWrapper) and not isinstance(env, VecNormalize):
        has_added |= isinstance(env, ActionMaskVecEnv)
        env = env.venv
    return NormalizationWithMasks(env, masks) if has_added and isinstance(env, VecNormalize) else None


class MasksInInfos(gym.Wrapper[Any, Any, Any, Any]):
    """Puts what ``env.action_masks()`` returns into infos, which a worker process sends along with observations.

    A terminal state has no mask. Masks are copied, also those that the env itself gives in infos: it may change its
    array when it is reset, before anyone has read the mask of the last state. (Masks in infos of an env in another
    process are copied if it has an attribute ``action_mask``.)

    :param env: the env
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self._has_method = env.has_wrapper_attr(MASK_METHOD) and _takes_no_arguments(env.get_wrapper_attr(MASK_METHOD))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset the env."""
        result: Any = self.env.reset(seed=seed, options=options)
        if not (isinstance(result, tuple) and len(result) == 2):
            return result  # type: ignore[no-any-return]  # the vectorized env refuses it
        return result[0], self._with_mask(result[1], self._has_method)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step the env."""
        result: Any = self.env.step(action)
        if not (isinstance(result, tuple) and len(result) == 5):
            return result  # type: ignore[no-any-return]  # the vectorized env refuses it
        return *result[:4], self._with_mask(result[4], self._has_method and not result[2])

    def _with_mask(self, info: Any, ask: bool) -> Any:
        if not isinstance(info, dict):
            return info  # the vectorized env refuses it
        if MASK_KEY in info:
            return {**info, MASK_KEY: deepcopy(info[MASK_KEY])}
        return {**info, MASK_KEY: np.array(self.env.get_wrapper_attr(MASK_METHOD)())} if ask else info


def masks_in_infos(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    """Return the env in a :class:`MasksInInfos` if it is known to give masks and is in none, otherwise itself.

    :param env: the env
    """
    gives = env.has_wrapper_attr(MASK_METHOD) and _takes_no_arguments(env.get_wrapper_attr(MASK_METHOD))
    gives = (gives or env.has_wrapper_attr(MASK_KEY)) and bool(mask_sizes(env.action_space))
    return MasksInInfos(env) if gives and not is_wrapped(env, MasksInInfos) else env


def _with_masks_in_infos(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    return env if is_wrapped(env, MasksInInfos) else MasksInInfos(env)


def with_action_masks(env: VecEnv, use: bool | None = None, probe: bool = False) -> VecEnv:
    """Return the envs in an :class:`ActionMaskVecEnv` if they give masks, otherwise themselves.

    Where observations have masks already, VecNormalize and VecFrameStack around them are changed: they leave masks as
    they are, and give of all else what they would give without masks. Statistics of masks are dropped.

    :param env: the envs
    :param use: None to look for masks; True to require them; False to leave them out, also where they have been added
    :param probe: whether to reset the envs to see whether their infos have masks. The seeds and options that were set
        stay set. Without it, infos are seen of envs that have been reset, or have an attribute ``action_mask``
    :raises ValueError: ``use`` is True, and no masks were found; or it is False, and other wrappers are around masks
    :raises TypeError: ``action_masks`` of an env is no method, or one that takes arguments
    """
    if isinstance(env, ActionMaskVecEnv):
        return env.venv if use is False else env
    levels = _with_mask_key(env)
    if use is False:
        if any(isinstance(level, ActionMaskVecEnv) for level in levels):
            raise ValueError(
                f"use_action_masks=False cannot take the masks out of a {type(env).__name__} with an ActionMaskVecEnv "
                "inside: make the inner envs with make_vec_env(..., use_action_masks=False)"
            )
        return env
    if levels:
        _let_masks_pass(levels)
    if has_mask_key(env.observation_space, env.action_space):
        return env
    found = bool(mask_sizes(env.action_space)) and not levels
    if found and _has(env, MASK_METHOD):
        _require_methods(_innermost(env))
    elif found:
        look = use is True or probe or _has(env, MASK_KEY)
        found = infos_have_masks(env) or (look and _infos_get_masks(env))
    if found:
        return ActionMaskVecEnv(env)
    if use:
        raise ValueError(
            f"use_action_masks=True takes an env with {sources_of_masks(env.action_space)}, got observation_space "
            f"{env.observation_space} and action_space {env.action_space}"
        )
    return env


def _with_mask_key(env: VecEnv) -> list[VecEnv]:
    """Return the envs, those inside them, and so on, as long as observations have the key of masks."""
    levels: list[VecEnv] = []
    while isinstance(env.observation_space, spaces.Dict) and MASK_KEY in env.observation_space.spaces:
        levels.append(env)
        if not isinstance(env, VecEnvWrapper):
            break
        env = env.venv
    return levels


def _let_masks_pass(levels: list[VecEnv]) -> None:
    """Make wrappers leave masks as they are.

    :param levels: from the outermost wrapper to the envs that give the masks
    """
    *wrappers, source = levels
    if not has_mask_key(source.observation_space, levels[0].action_space):
        return
    space = cast(spaces.Dict, source.observation_space)[MASK_KEY]
    for wrapper in wrappers:
        parts = cast(spaces.Dict, wrapper.observation_space).spaces
        wrapper.observation_space = spaces.Dict({**parts, MASK_KEY: space})
        if isinstance(wrapper, VecNormalize) and wrapper.norm_obs:
            wrapper.norm_obs_keys = [key for key in wrapper.norm_obs_keys or () if key != MASK_KEY]
            wrapper.obs_rms = {key: wrapper.obs_rms[key] for key in wrapper.norm_obs_keys}
        elif isinstance(wrapper, VecFrameStack):  # one frame is the present mask
            one: Any = StackedObservations(wrapper.num_envs, 1, cast(spaces.Box, space))
            wrapper.stacked_obs.sub_stacked_observations[MASK_KEY] = one


def _innermost(env: VecEnv) -> VecEnv:
    """Return the envs without wrappers, which keep no infos of resets."""
    while isinstance(env, VecEnvWrapper):
        env = env.venv
    return env


def _has(env: VecEnv, name: str) -> bool:
    """Whether the envs have an attribute that is not None. (SB3's ``has_attr`` believes any ``get_attr``.)"""
    env = _innermost(env)
    if type(env).has_attr is not VecEnv.has_attr:
        return env.has_attr(name)
    try:
        return all(value is not None for value in env.get_attr(name))
    except (AttributeError, NotImplementedError):
        return False


def _takes_no_arguments(method: Any) -> bool:
    """Whether a value is a function or method that can be called without arguments."""
    try:
        inspect.signature(method).bind()
    except TypeError:
        return False
    except ValueError:  # it has no signature
        return callable(method)
    return True


def _require_methods(env: VecEnv) -> None:
    """Require that ``action_masks`` can be called. Envs in other processes, or that step as one, are asked later.

    :param env: envs without wrappers
    :raises TypeError: it cannot
    """
    for method in env.get_attr(MASK_METHOD) if isinstance(env, DummyVecEnv) else ():
        if not _takes_no_arguments(method):
            raise TypeError(f"{_NO_METHOD}, got {method!r}")


def infos_have_masks(env: VecEnv) -> bool:
    """Whether infos of the latest reset have masks.

    :param env: the envs
    """
    return any(MASK_KEY in info for info in _innermost(env).reset_infos)


def _infos_get_masks(env: VecEnv) -> bool:
    """Whether infos of a reset have masks. A VecNormalize around the envs does not see this reset."""
    env = _innermost(env)
    with _seeds_kept(env):
        env.reset()
    return infos_have_masks(env)


@contextmanager
def _seeds_kept(env: VecEnv) -> Iterator[None]:
    """Context in which a reset uses no seeds and options; they stay set for the next one."""
    seeds, options = compat.seeds_and_options(env)
    seeds, options = list(seeds), list(options)
    compat.clear_seeds_and_options(env)
    try:
        yield
    finally:
        compat.set_seeds_and_options(env, seeds, options)
