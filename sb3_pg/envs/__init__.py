"""Vectorized environments that SB3 does not support by itself, as SB3 ``VecEnv`` objects."""

from sb3_pg.envs.adapter import VectorAdapter
from sb3_pg.envs.envpool_adapter import EnvPoolAdapter
from sb3_pg.envs.gym_vector import GymVectorAdapter
from sb3_pg.envs.make import BACKENDS, has_native_vector, make_vec_env
from sb3_pg.envs.state import EnvState, get_env_state, set_env_state, subproc_vec_env

__all__ = [
    "BACKENDS",
    "EnvPoolAdapter",
    "EnvState",
    "GymVectorAdapter",
    "VectorAdapter",
    "get_env_state",
    "has_native_vector",
    "make_vec_env",
    "set_env_state",
    "subproc_vec_env",
]
