"""Vectorized envs whose parts collect whole rollouts by themselves, in processes or in this one.

``vec_env.py`` is the env that a learner sees. ``host.py`` is what holds a part of the envs and the policy's copy, on
the other side. ``transports.py`` carries commands from the one to the other, and ``channel.py`` the arrays.
``wrappers.py`` rebuilds the wrappers around the envs in every part.
"""

from sb3_pg.envs.actors.vec_env import ActorVecEnv

__all__ = ["ActorVecEnv"]
