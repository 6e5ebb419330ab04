"""Whether envs that take over a saved state go on as the saved ones do."""

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from sb3_pg.envs import EnvState, VectorAdapter, get_env_state, set_env_state


class PlainUnpickler(pickle.Unpickler):
    """Reads NumPy's arrays and scalars, and what needs no import."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("numpy") and name in {"ndarray", "dtype", "scalar", "_reconstruct", "_frombuffer"}:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not plain data")


def through_a_file(state: EnvState) -> EnvState:
    return EnvState(*PlainUnpickler(io.BytesIO(pickle.dumps(tuple(state)))).load())


def refuse(pickled: bytes) -> Any:
    raise AssertionError(f"{pickle.loads(pickled)} is not plain data")


def comparable(value: Any) -> Any:
    """Nested lists without times and NumPy's arrays, which ``==`` compares exactly."""
    if isinstance(value, np.ndarray):
        return [str(value.dtype), value.shape, value.tobytes()]
    if isinstance(value, np.generic):
        return [str(value.dtype), value.tobytes()]
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items() if key not in ("t", "episode_times", "time_queue")}
    if isinstance(value, (list, tuple)):
        is_time = len(value) > 0 and isinstance(value[0], str) and value[0] == "clock"
        return ["a time"] if is_time else [comparable(item) for item in value]
    return value


class Actions:
    """Random actions of all envs, which no env's random state influences."""

    def __init__(self, env: VecEnv) -> None:
        self._space = copy.deepcopy(env.action_space)
        self._space.seed(7)
        self._n_envs = env.num_envs

    def __call__(self) -> np.ndarray:
        return np.stack([np.asarray(self._space.sample()) for _ in range(self._n_envs)])


def assert_continues(
    make: Callable[[], VecEnv], n_before: int = 37, n_after: int = 120, unpickle: Callable[[bytes], Any] = refuse
) -> int:
    """Step an env, give its state to a fresh one, step both, and compare all that they return and what they hold.

    :return: number of episodes that have ended while both were stepped
    """
    env, fresh = make(), make()
    actions, n_ended = Actions(env), 0
    with ExitStack() as stack:
        for each in (env, fresh):
            stack.callback(each.close)
            if isinstance(each, VectorAdapter):
                stack.enter_context(each.skip_reset_steps())
        env.reset()
        for _ in range(n_before):
            env.step(actions())
        state = get_env_state(env)
        assert state.inexact == ""
        saved = pickle.dumps(tuple(state))
        set_env_state(fresh, through_a_file(state), unpickle)
        assert comparable(get_env_state(fresh).members) == comparable(state.members)
        for step in range(n_after):
            action = actions()
            expected, got = env.step(action), fresh.step(action)
            assert comparable(got) == comparable(expected), f"step {step}"
            n_ended += int(expected[2].sum())
        assert comparable(get_env_state(fresh).members) == comparable(get_env_state(env).members)
        assert pickle.dumps(tuple(state)) == saved  # a copy, which steps do not change
    return n_ended
