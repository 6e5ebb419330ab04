"""The exact state of vectorized envs: how it is saved, and given to envs that are made the same way.

``members.py`` finds all wrappers and envs. ``encoding.py`` turns their attributes into plain data, ``mujoco.py`` does
so with simulations.
"""

from sb3_pg.envs.state.members import EnvState, get_env_state, set_env_state, subproc_vec_env, with_state

__all__ = ["EnvState", "get_env_state", "set_env_state", "subproc_vec_env", "with_state"]
