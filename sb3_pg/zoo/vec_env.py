"""``--vec-env vector`` and ``--vec-env envpool``: rl_zoo3's training on the vectorized envs of this package."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import gymnasium as gym
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecFrameStack, is_vecenv_wrapped

from sb3_pg.algorithms.base import PolicyGradientAlgorithm
from sb3_pg.algorithms.replaying import ReplayingAlgorithm
from sb3_pg.envs import GymVectorAdapter, has_native_vector, make_vec_env

BACKENDS: Final = ("vector", "envpool")
THEIRS: Final = ("dummy", "subproc")

# What surrounds an env anyway, and what vectorized ones do themselves.
_USUAL: Final = (OrderEnforcing, PassiveEnvChecker)


def backend_of(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Take ``--vec-env`` out of a command line of ``rl_zoo3.train`` where its value is ours.

    :param arguments: the command line, without the program's name
    :return: one of :data:`BACKENDS`, or None; the other arguments
    :raises SystemExit: the value is nobody's
    """
    parser = argparse.ArgumentParser("sb3-pg train", add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    parser.add_argument("--vec-env", choices=(*THEIRS, *BACKENDS))
    known, others = parser.parse_known_args(arguments)
    return (known.vec_env, others) if known.vec_env in BACKENDS else (None, list(arguments))


@contextmanager
def training_envs(backend: str | None) -> Iterator[None]:
    """Within it, rl_zoo3's ``ExperimentManager`` trains on envs of a backend; it evaluates on DummyVecEnv as ever.

    :param backend: one of :data:`BACKENDS`; None changes nothing
    """
    if backend is None:
        yield
        return
    original = ExperimentManager.create_envs

    def create_envs(self: Any, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        # default_vec_env_cls would serve evaluation envs too, which must reset at once
        self.vec_env_class = DummyVecEnv if eval_env else partial(_from_functions, backend)
        env: VecEnv = original(self, n_envs, eval_env, no_log)
        if getattr(env, "resets_late", False):
            stacked = is_vecenv_wrapped(env, VecFrameStack)
            if stacked or not issubclass(ALGOS[self.algo], (PolicyGradientAlgorithm, ReplayingAlgorithm)):
                env.close()
                raise ValueError(
                    f"--vec-env {backend}: the vector env of {self.env_name} resets in the step that follows an "
                    f"episode's end, which {'frame_stack' if stacked else self.algo} would take for a transition; use "
                    "--vec-env dummy, or envpool"
                )
        return env

    ExperimentManager.create_envs = create_envs  # type: ignore[method-assign]
    try:
        yield
    finally:
        ExperimentManager.create_envs = original  # type: ignore[method-assign]


def _from_functions(backend: str, env_fns: list[Callable[[], gym.Env[Any, Any]]]) -> VecEnv:
    """The vectorized env that stands for these single ones, which rl_zoo3 has described by functions.

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
