"""Checks of environments, for constructors, ``set_env`` and ``load``."""

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecNormalize

from sb3_pg.envs import ActionMaskVecEnv
from sb3_pg.errors import SpaceError


def check_observation_space(space: spaces.Space[Any]) -> None:
    """Require an observation space that SB3's policies and buffers support.

    :param space: the environment's observation space
    :raises ValueError: the space is not supported. The message names a wrapper that changes it into one that is
    """
    name = "observation_space"
    if isinstance(space, spaces.Dict):
        if not space.spaces:
            raise ValueError(f"{name} must have at least one key, got {space}")
        for key, part in space.spaces.items():
            _check_part(part, f"{name}[{key!r}]")
    else:
        _check_part(space, name)


def check_action_space(space: spaces.Space[Any]) -> None:
    """Require an action space that SB3's policies support.

    :param space: the environment's action space
    :raises SpaceError: the space is not supported. The message says what is
    """
    flatten = "gymnasium.wrappers.TransformAction(env, ...) changes it into one that is"
    if not isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        allowed = "a Box, Discrete, MultiDiscrete or MultiBinary space"
        raise SpaceError(f"action_space must be {allowed}, got {space}: {flatten}")
    if isinstance(space, spaces.Box) and not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
        rescale = "gymnasium.wrappers.RescaleAction, or bounds that the env clips to, give it some"
        raise SpaceError(f"action_space must have a finite lower and upper bound, got {space}: {rescale}")
    if isinstance(space, spaces.MultiDiscrete | spaces.MultiBinary) and len(space.shape) != 1:
        raise SpaceError(
            f"action_space must have one dimension, got {space}. Multi-dimensional {space} action space is not "
            f"supported: {flatten}"
        )
    if 0 in (space.shape or ()):
        raise SpaceError(f"action_space must hold at least one number, got {space}")


def _check_part(space: spaces.Space[Any], name: str) -> None:
    flatten = "gymnasium.wrappers.FlattenObservation(env) makes a vector of it"
    if isinstance(space, spaces.Box):
        if space.shape == ():
            reshape = "gymnasium.wrappers.ReshapeObservation(env, (1,)) makes a vector of it"
            raise ValueError(f"{name} must have at least one dimension, got {space}: {reshape}")
        if 0 in space.shape:
            raise ValueError(f"{name} must hold at least one number, got {space}")
    elif isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim != 1:
        raise ValueError(f"{name} must be a MultiDiscrete of one dimension, got {space}: {flatten}")
    elif isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        if np.any(space.start):
            start, counted = _counted_from_0(space)
            remedy = f"subtract {start} in an ObservationWrapper, whose space is {counted} there"
            if name == "observation_space":
                made = f"lambda obs: obs - {start}, gymnasium.spaces.{counted}"
                remedy += f", e.g. gymnasium.wrappers.TransformObservation(env, {made})"
            raise ValueError(f"{name} must count from 0, got {space}: {remedy}")
    elif not isinstance(space, spaces.MultiBinary):
        raise ValueError(
            f"{name} must be a Box, Discrete, MultiDiscrete or MultiBinary space, or one Dict of these, got {space}: "
            f"{flatten}, if it has a fixed size"
        )


def _counted_from_0(space: spaces.Discrete | spaces.MultiDiscrete) -> tuple[str, str]:
    """Return Python code for a space's ``start``, and for the same space that starts at 0."""
    if isinstance(space, spaces.Discrete):
        return str(space.start), f"Discrete({space.n})"
    return f"np.array({space.start.tolist()})", f"MultiDiscrete({space.nvec.tolist()})"


def require_normalized_last(
    env: VecEnv,
    holder: str = "the replay buffer keeps",
    harmless: tuple[type[VecEnvWrapper], ...] = (ActionMaskVecEnv,),
) -> None:
    """Require that no wrapper around a VecNormalize changes the shape of its observations.

    A replay buffer stores observations before normalization, and normalizes them when it is sampled.

    :param env: the env with all its wrappers
    :param holder: what holds such observations, for the error message
    :param harmless: wrappers that may be around it. A replay buffer keeps masks beside what VecNormalize knows
    :raises ValueError: a wrapper changes the shape. The message names it, and the order of wrappers that works
    """
    wrappers = []
    while isinstance(env, VecEnvWrapper) and not isinstance(env, VecNormalize):
        if not isinstance(env, harmless):
            wrappers.append(env)
        env = env.venv
    if not isinstance(env, VecNormalize):
        return
    inner = env
    for wrapper in reversed(wrappers):
        if _shapes(wrapper.observation_space) != _shapes(inner.observation_space):
            name = type(wrapper).__name__
            raise ValueError(
                f"env must have its VecNormalize around {name}, got the opposite order: {holder} "
                f"observations of {wrapper.observation_space}, and VecNormalize knows those of "
                f"{inner.observation_space}. Wrap in this order: VecNormalize({name}(env))"
            )
        inner = wrapper  # type: ignore[assignment]


def _shapes(space: spaces.Space[Any]) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: _shapes(part) for key, part in space.spaces.items()}
    return space.shape
