"""``--vec-env vector`` and ``--vec-env envpool``: rl_zoo3's training on the vectorized envs of this package."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import gymnasium as gym
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, is_vecenv_wrapped

from sb3_pg.envs import GymVectorAdapter, has_native_vector, make_vec_env

# What surrounds an env anyway, and what vectorized ones do themselves.
_USUAL: Final = (OrderEnforcing, PassiveEnvChecker)


def refuse_late_resets(env: VecEnv, backend: str, algo: str | None) -> None:
    """Close training envs that reset in the step that follows an episode's end, if something takes it for a transition.

    :param env: as rl_zoo3 wraps them
    :param backend: as ``--vec-env`` has it
    :param algo: algorithm that cannot leave that step out; None for one that can
    :raises ValueError: naming the algorithm, or stacked frames
    """
    stacked = is_vecenv_wrapped(env, VecFrameStack)
    if getattr(env, "resets_late", False) and (stacked or algo is not None):
        env.close()
        raise ValueError(
            f"--vec-env {backend}: these vector envs reset in the step that follows an episode's end, which "
            f"{'frame_stack' if stacked else algo} would take for a transition; use --vec-env dummy, or envpool"
        )


def from_functions(backend: str, env_fns: list[Callable[[], gym.Env[Any, Any]]]) -> VecEnv:
    """The vectorized env that stands for these single ones, which rl_zoo3 has described by functions.

    :param backend: "vector" or "envpool"
    :param env_fns: one function for each env
    :raises ValueError: something wraps each of them that has no place in it
    """
    env = env_fns[0]()
    spec, monitor, foreign, limits = env.spec, None, [], []
    while isinstance(env, gym.Wrapper):
        if isinstance(env, Monitor):
            monitor = env.results_writer
            foreign += [f"Monitor(info_keywords={env.info_keywords})"] if env.info_keywords else []
        elif isinstance(env, TimeLimit):
            limits.append(env._max_episode_steps)
        elif not isinstance(env, _USUAL):
            foreign.append(type(env).__name__)
        env = env.env
    env.close()
    assert spec is not None
    if backend == "vector" and not has_native_vector(spec.id):
        return GymVectorAdapter(SyncVectorEnv(env_fns, autoreset_mode=AutoresetMode.SAME_STEP))
    if foreign:
        raise ValueError(
            f"--vec-env {backend}: the envs of {spec.id} step together, and cannot be wrapped each in "
            f"{', '.join(foreign)}"
        )
    folder = None
    if monitor is not None:
        monitor.close()
        folder = str(Path(monitor.file_handler.name).parent)
    registered = gym.spec(spec.id).kwargs  # which a native env knows, and EnvPool has under the same name
    env_kwargs = {
        name: value for name, value in spec.kwargs.items() if value is not None and registered.get(name) != value
    }
    if limits:
        env_kwargs["max_episode_steps"] = min(limits)
    return make_vec_env(spec.id, len(env_fns), backend, env_kwargs=env_kwargs, monitor_dir=folder)
