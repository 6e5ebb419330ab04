"""Vectorized environments that SB3 does not support by itself, as SB3 ``VecEnv`` objects."""

from gymnasium.envs.registration import register, registry

from sb3_pg.envs.access_control import AccessControl
from sb3_pg.envs.action_masks import (
    ActionMaskVecEnv,
    MasksInInfos,
    NormalizationWithMasks,
    infos_have_masks,
    normalization_with_masks,
    with_action_masks,
)
from sb3_pg.envs.actors import ActorVecEnv
from sb3_pg.envs.adapter import VectorAdapter
from sb3_pg.envs.envpool_adapter import EnvPoolAdapter
from sb3_pg.envs.gym_vector import GymVectorAdapter
from sb3_pg.envs.make import BACKENDS, has_native_vector, make_vec_env
from sb3_pg.envs.masked_grid import MaskedGrid
from sb3_pg.envs.state import EnvState, get_env_state, set_env_state, subproc_vec_env

__all__ = [
    "BACKENDS",
    "AccessControl",
    "ActionMaskVecEnv",
    "ActorVecEnv",
    "EnvPoolAdapter",
    "EnvState",
    "GymVectorAdapter",
    "MaskedGrid",
    "MasksInInfos",
    "NormalizationWithMasks",
    "VectorAdapter",
    "get_env_state",
    "has_native_vector",
    "infos_have_masks",
    "make_vec_env",
    "normalization_with_masks",
    "set_env_state",
    "subproc_vec_env",
    "with_action_masks",
]

if (_GRID := "MaskedGrid-v0") not in registry:
    register(_GRID, "sb3_pg.envs.masked_grid:MaskedGrid", max_episode_steps=100)
if (_QUEUE := "AccessControl-v0") not in registry:
    register(_QUEUE, "sb3_pg.envs.access_control:AccessControl", max_episode_steps=1000)
