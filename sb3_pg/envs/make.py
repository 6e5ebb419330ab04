"""Makes vectorized envs of every kind."""

from collections.abc import Callable
from functools import partial
from typing import Any, Final, cast

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode
from stable_baselines3.common import env_util
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_pg.envs.action_masks import masks_in_infos, with_action_masks
from sb3_pg.envs.actors import ActorVecEnv
from sb3_pg.envs.adapter import VectorAdapter
from sb3_pg.envs.envpool_adapter import EnvPoolAdapter
from sb3_pg.envs.gym_vector import GymVectorAdapter
from sb3_pg.envs.state import subproc_vec_env, with_state
from sb3_pg.extras import extra_hints

BACKENDS: Final = ("auto", "dummy", "subproc", "vector", "envpool", "actors", "ray")

#: Backends that take functions which make one env each.
_OF_SINGLE_ENVS: Final[dict[str, Callable[..., VecEnv]]] = {
    "dummy": DummyVecEnv,
    "subproc": subproc_vec_env,
    "actors": ActorVecEnv,
    "ray": partial(ActorVecEnv, transport="ray"),
}


def make_vec_env(
    env_id: str,
    n_envs: int = 1,
    backend: str = "auto",
    seed: int | None = None,
    wrapper_class: Callable[..., Any] | None = None,
    env_kwargs: dict[str, Any] | None = None,
    backend_kwargs: dict[str, Any] | None = None,
    monitor_dir: str | None = None,
    use_action_masks: bool | None = None,
    n_actors: int | None = None,
) -> VecEnv:
    """Make vectorized envs, which report ended episodes in ``infos`` as SB3's Monitor does.

    Where the envs say which actions are allowed, observations have a key "action_mask", see
    :class:`~sb3_pg.envs.ActionMaskVecEnv`. A VecNormalize or VecFrameStack around the envs leaves it alone once an
    algorithm is given the env.

    ========= ========================================================================================================
    backend   vectorized env
    ========= ========================================================================================================
    auto      "vector" if the env has a native vector entry point and no wrapper, otherwise "dummy"
    dummy     SB3's DummyVecEnv: the envs step one after the other in this process
    subproc   SB3's SubprocVecEnv: one process per env
    vector    ``gymnasium.make_vec``: the env's native vector entry point if it has one, otherwise Gymnasium's
              SyncVectorEnv (one process per env with ``backend_kwargs={"vectorization_mode": "async"}``)
    envpool   EnvPool: the envs step in C++ threads
    actors    :class:`~sb3_pg.envs.ActorVecEnv`: processes that hold several envs and a copy of the policy, and collect
              whole rollouts
    ray       the same with processes of a `Ray <https://docs.ray.io>`_ cluster, which may be on several machines
    ========= ========================================================================================================

    :param env_id: name of a registered env
    :param n_envs: number of envs
    :param backend: see above
    :param seed: seed of the first env; env i takes seed + i if each env has its own seed
    :param wrapper_class: wrapper of each env, for backends whose envs are Python objects
    :param env_kwargs: arguments of the env
    :param backend_kwargs: arguments of the backend, e.g. ``{"num_threads": 2}`` for "envpool"
    :param monitor_dir: folder in which the results of all episodes are written, in the format of SB3's Monitor
    :param use_action_masks: None to look for masks; True to require them; False to leave them out of observations
    :param n_actors: number of processes, for "actors" and "ray"; None for one per CPU, at most one per env
    :raises ValueError: an unknown backend, arguments that the backend does not take, or masks are required and missing
    :raises MissingExtraError: an optional dependency is missing
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if n_envs < 1:
        raise ValueError(f"n_envs must be at least 1, got {n_envs}")
    if n_actors is not None and backend not in ("actors", "ray"):
        raise ValueError(f"n_actors must be None with backend={backend!r}, got {n_actors!r}")
    env_kwargs, backend_kwargs = env_kwargs or {}, backend_kwargs or {}
    if n_actors is not None:
        if "n_actors" in backend_kwargs:
            raise ValueError(f"n_actors is given twice: {n_actors}, and {backend_kwargs['n_actors']} in backend_kwargs")
        backend_kwargs = {**backend_kwargs, "n_actors": n_actors}
    with extra_hints():
        if backend == "auto":
            backend = "vector" if wrapper_class is None and has_native_vector(env_id) else "dummy"
        if backend in _OF_SINGLE_ENVS:
            made = env_util.make_vec_env(
                partial(_from_spec, gym.spec(env_id)) if backend in ("actors", "ray") else env_id,
                n_envs,
                seed,
                env_kwargs=env_kwargs,
                vec_env_cls=cast(Any, _OF_SINGLE_ENVS[backend]),
                vec_env_kwargs=backend_kwargs,
                wrapper_class=wrapper_class,
                monitor_dir=monitor_dir,
            )
            return with_action_masks(made, use_action_masks, probe=True)
        env: VectorAdapter
        if backend == "vector":
            env = GymVectorAdapter(_make_gym_vector(env_id, n_envs, wrapper_class, env_kwargs, **backend_kwargs))
        else:
            _refuse_wrapper(wrapper_class, "EnvPool's envs")
            env = EnvPoolAdapter(env_id, n_envs, **env_kwargs, **backend_kwargs)
    if monitor_dir is not None:
        env.write_results(monitor_dir, env_id)
    env.seed(seed)
    return with_action_masks(env, use_action_masks, probe=backend == "vector")


def has_native_vector(env_id: str) -> bool:
    """Whether an env has a native vector entry point.

    :param env_id: name of a registered env
    """
    spec = gym.spec(env_id)
    return spec.vector_entry_point is not None and not spec.additional_wrappers


def _from_spec(spec: EnvSpec, **env_kwargs: Any) -> gym.Env[Any, Any]:
    """Make an env in a process that may not know its name, as SB3's ``make_vec_env`` makes those that it knows."""
    try:
        return gym.make(spec, **{"render_mode": "rgb_array", **env_kwargs})
    except TypeError:  # it has no render_mode
        return gym.make(spec, **env_kwargs)


def _make_gym_vector(
    env_id: str,
    n_envs: int,
    wrapper_class: Callable[..., Any] | None,
    env_kwargs: dict[str, Any],
    vectorization_mode: str | None = None,
    **vector_kwargs: Any,
) -> Any:
    if vectorization_mode is None:
        vectorization_mode = "vector_entry_point" if has_native_vector(env_id) else "sync"
    if vectorization_mode == "vector_entry_point":
        _refuse_wrapper(wrapper_class, f"the native vector env of {env_id}")
    else:
        vector_kwargs = {"autoreset_mode": AutoresetMode.SAME_STEP, **vector_kwargs}
    wrappers = [] if wrapper_class is None else [wrapper_class]
    if vectorization_mode in ("sync", "async"):
        wrappers.append(masks_in_infos)
    if vectorization_mode == "async":
        wrappers.append(with_state)
    made = partial(gym.make_vec, env_id, n_envs, vectorization_mode, vector_kwargs, wrappers)
    try:  # as in SB3's make_vec_env: an env without render_mode raises TypeError
        return made(**{"render_mode": "rgb_array", **env_kwargs})
    except TypeError:
        return made(**env_kwargs)


def _refuse_wrapper(wrapper_class: Any, whose: str) -> None:
    if wrapper_class is not None:
        raise ValueError(f"wrapper_class must be None ({whose} cannot be wrapped one by one), got {wrapper_class!r}")
