"""State of every kind of vectorized env: after it is restored, all goes on to the bit."""

import pickle
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import (
    DelayObservation,
    FrameStackObservation,
    MaxAndSkipObservation,
    NormalizeObservation,
    NormalizeReward,
    RecordEpisodeStatistics,
    StickyAction,
    TimeAwareObservation,
    TimeLimit,
    common,
    vector,
)
from rl_zoo3.gym_patches import PatchedTimeLimit
from rl_zoo3.wrappers import (
    ActionNoiseWrapper,
    ActionSmoothingWrapper,
    DelayedRewardWrapper,
    FrameSkip,
    HistoryWrapper,
    MaskVelocityWrapper,
)
from sb3_contrib.common.wrappers import TimeFeatureWrapper
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)

from sb3_pg.envs import EnvPoolAdapter, GymVectorAdapter, get_env_state, make_vec_env, set_env_state, subproc_vec_env
from tests.envs.state.exactness import Actions, assert_continues, comparable, refuse, through_a_file
from tests.helpers import OBSERVATION_SPACES, ScriptedEnv

CLASSIC = ["CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0"]
TOY_TEXT = ["FrozenLake-v1", "Taxi-v3", "Blackjack-v1", "CliffWalking-v1"]
SHORT = {"max_episode_steps": 30}


BOTH = (common.TimeLimit.__mro__[1], PatchedTimeLimit)
FORK = {"start_method": "fork"}  # starts at once, and has the classes of this module


def cart_pole(n_envs: int = 2, **kwargs: Any) -> VecEnv:
    return make_vec_env("CartPole-v1", n_envs, "dummy", 3, **kwargs)


@pytest.mark.parametrize("env_id", CLASSIC + TOY_TEXT)
def test_envs_in_this_process(env_id: str) -> None:
    registered = [name for name in gym.registry if name.rpartition("-v")[0] == env_id.rpartition("-v")[0]]
    name = env_id if env_id in registered else registered[-1]
    assert assert_continues(partial(make_vec_env, name, 3, "dummy", 3, env_kwargs=SHORT)) > 2


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_single_envs_of_gymnasium(env_id: str, mode: str) -> None:
    backend = {"vectorization_mode": mode}
    make = partial(make_vec_env, env_id, 2, "vector", 3, env_kwargs=SHORT, backend_kwargs=backend)
    assert assert_continues(make) > 2


@pytest.mark.parametrize("n_before", range(15, 25))  # of which some are steps that only reset
def test_native_vector_env(n_before: int) -> None:
    assert assert_continues(partial(make_vec_env, "CartPole-v1", 3, "vector", 3), n_before) > 2


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "InvertedPendulum-v5"])
def test_envs_in_processes(env_id: str) -> None:
    make = partial(make_vec_env, env_id, 2, "subproc", 3, env_kwargs=SHORT, backend_kwargs=FORK)
    assert assert_continues(lambda: VecNormalize(make())) > 2


def stacked(n_envs: int) -> VecEnv:
    return VecCheckNan(VecFrameStack(VecNormalize(VecMonitor(cart_pole(n_envs)), gamma=0.9), 3))


def of_scripted(key: str) -> VecEnv:
    return DummyVecEnv(
        [lambda: ScriptedEnv((3, 5), (False, True), observation_space=deepcopy(OBSERVATION_SPACES[key]))] * 2
    )


@pytest.mark.filterwarnings("ignore:The environment is already wrapped")
@pytest.mark.parametrize(
    "make",
    [
        lambda: VecNormalize(cart_pole()),
        partial(stacked, 3),
        lambda: VecTransposeImage(VecFrameStack(of_scripted("image"), 2)),
        lambda: VecNormalize(of_scripted("dict"), norm_obs_keys=["vec"]),
        lambda: of_scripted("multi_discrete"),
    ],
)
def test_wrappers_of_vectorized_envs(make: Callable[[], VecEnv]) -> None:
    assert assert_continues(make) > 2


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "frame stack": partial(FrameStackObservation, stack_size=3),
    "normalize": lambda env: NormalizeReward(NormalizeObservation(env)),
    "statistics": RecordEpisodeStatistics,
    "delay": partial(DelayObservation, delay=2),
    "sticky": partial(StickyAction, repeat_action_probability=0.4),
    "time": TimeAwareObservation,
    "skip": partial(MaxAndSkipObservation, skip=2),
    "time limit": partial(TimeLimit, max_episode_steps=9),
    "smoothing": partial(ActionSmoothingWrapper, smoothing_coef=0.5),
    "delayed reward": partial(DelayedRewardWrapper, delay=3),
    "frame skip": partial(FrameSkip, skip=2),
    "history": partial(HistoryWrapper, horizon=3),
    "mask": MaskVelocityWrapper,
    "time feature": TimeFeatureWrapper,
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_of_single_envs(name: str) -> None:
    def wrapped(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
        return TimeLimit(WRAPPERS[name](env), 25)

    assert assert_continues(partial(make_vec_env, "Pendulum-v1", 2, "dummy", 3, wrapper_class=wrapped)) > 2


def test_global_random_generators_of_processes() -> None:
    kwargs: dict[str, Any] = {"wrapper_class": ActionNoiseWrapper, "env_kwargs": SHORT, "backend_kwargs": FORK}
    assert assert_continues(partial(make_vec_env, "Pendulum-v1", 2, "subproc", 3, **kwargs)) > 2


def test_reset_after_restoring_and_pending_seeds() -> None:
    envs: list[Any] = [cart_pole(), cart_pole()]
    env, fresh = envs
    env.reset()
    for seeded in (False, True):
        if seeded:
            env.seed(11)
        set_env_state(fresh, get_env_state(env), refuse)
        assert np.array_equal(fresh.reset(), env.reset())


def test_saving_does_not_disturb() -> None:
    envs = [VecNormalize(cart_pole()) for _ in range(2)]
    actions = Actions(envs[0])
    for env in envs:
        env.reset()
    for _ in range(60):
        action = actions()
        first, second = (env.step(action) for env in envs)
        assert comparable(first) == comparable(second)
        get_env_state(envs[0])


def test_a_monitors_times_go_on() -> None:
    env, fresh = cart_pole(1), cart_pole(1)
    env.envs[0].t_start -= 1000  # type: ignore[attr-defined]
    env.reset()
    set_env_state(fresh, get_env_state(env), refuse)
    assert abs(fresh.get_attr("t_start")[0] - env.get_attr("t_start")[0]) < 10


def test_rl_zoo3_may_have_been_imported_in_one_of_two_processes() -> None:
    env, fresh = (DummyVecEnv([lambda kind=kind: kind(gym.make("Pendulum-v1"), 9)]) for kind in BOTH)  # type: ignore[misc]
    env.reset()
    for _ in range(5):
        env.step(np.zeros((1, 1)))
    set_env_state(fresh, get_env_state(env), refuse)
    assert vars(fresh.envs[0])["_elapsed_steps"] == 5


# ---------------------------------------------------------------- envs that save themselves


class Own(gym.Env[Any, Any]):
    """Its state is a number that no attribute of an object of Python shows."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self) -> None:
        self.hidden: Any = iter(range(10**6))
        self.count = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.count = next(self.hidden)
        return np.zeros(1, np.float32), float(self.count), self.count % 7 == 6, False, {}

    def get_state(self) -> Any:
        return {"count": self.count, "array": np.arange(self.count)}

    def set_state(self, state: Any) -> None:
        self.count = state["count"]
        self.hidden = iter(range(self.count + 1, 10**6))


class Covering(gym.Wrapper[Any, Any, Any, Any]):
    """Saves the env inside itself, whose own attributes cannot be saved."""

    def get_state(self) -> Any:
        return [self.unwrapped.count]  # type: ignore[attr-defined]

    def set_state(self, state: Any) -> None:
        self.unwrapped.count = state[0]  # type: ignore[attr-defined]
        self.unwrapped.hidden = iter(range(state[0] + 1, 10**6))  # type: ignore[attr-defined]


class Silent(Own):
    get_state = None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.hidden = (number for number in range(10**6))


class OfMujoco(Own):
    """MuJoCo's method of the same name, and one that belongs to something else."""

    def set_state(self, qpos: Any, qvel: Any) -> None:  # type: ignore[override]
        raise AssertionError

    def get_state(self) -> Any:
        raise AssertionError


@pytest.mark.parametrize("make", [Own, lambda: Monitor(Own()), lambda: Monitor(Covering(Silent()))])
def test_envs_and_wrappers_that_save_themselves(make: Callable[[], Any]) -> None:
    assert assert_continues(lambda: DummyVecEnv([make, make])) > 2


def test_set_state_of_mujoco_is_not_the_protocol() -> None:
    env = DummyVecEnv([OfMujoco])
    env.reset()
    assert "'own'" not in str(get_env_state(env).members)


# ---------------------------------------------------------------- what cannot be saved


def test_an_env_whose_attribute_cannot_be_saved() -> None:
    env, fresh = (
        VecNormalize(DummyVecEnv([lambda: Monitor(Silent())])),
        VecNormalize(DummyVecEnv([lambda: Monitor(Silent(), allow_early_resets=False)])),
    )
    env.reset()
    for _ in range(20):
        env.step(np.zeros(1, int))
    state = get_env_state(env)
    assert state.inexact.startswith("Silent.hidden has a generator, which can be neither copied nor pickled")
    set_env_state(fresh, through_a_file(state), refuse)
    assert comparable(vars(fresh.obs_rms)) == comparable(vars(env.obs_rms))
    assert fresh.get_attr("total_steps") == [20]
    assert len(fresh.get_attr("episode_returns")[0]) == 2
    assert fresh.get_attr("count") == [0]  # not half of an env's state
    fresh.reset()
    fresh.step(np.zeros(1, int))


@pytest.mark.parametrize("env_id", ["LunarLander-v3", "BipedalWalker-v3"])
def test_box2d(env_id: str) -> None:
    env, fresh = (VecNormalize(make_vec_env(env_id, 2, "dummy", 3)) for _ in range(2))
    env.reset()
    actions = Actions(env)
    for _ in range(5):
        env.step(actions())
    state = get_env_state(env)
    assert state.inexact.startswith(f"{env_id.partition('-')[0]}.")
    set_env_state(fresh, through_a_file(state), refuse)
    assert comparable(fresh.reset()) == comparable(env.reset())  # statistics, and each env's random generator
    action = actions()
    assert comparable(fresh.step(action)) == comparable(env.step(action))


def test_processes_made_elsewhere() -> None:
    env, fresh = (VecNormalize(SubprocVecEnv([lambda: gym.make("CartPole-v1")] * 2, "fork")) for _ in range(2))
    ours = VecNormalize(make_vec_env("CartPole-v1", 2, "subproc", backend_kwargs=FORK))
    env.reset()
    env.step(np.array([0, 1]))
    state = get_env_state(env)
    assert state.inexact == (
        "the processes of this SubprocVecEnv do not give the state of their envs; make it with sb3_pg.envs.make_vec_env"
    )
    set_env_state(fresh, through_a_file(state), refuse)
    assert comparable(vars(fresh.obs_rms)) == comparable(vars(env.obs_rms))
    with pytest.raises(ValueError, match="its workers or those of the saved one were made without"):
        set_env_state(fresh, get_env_state(ours), refuse)
    for each in (env, fresh, ours):
        each.close()


def test_envpool() -> None:
    pytest.importorskip("envpool")
    env, fresh = (VecNormalize(EnvPoolAdapter("CartPole-v1", 2)) for _ in range(2))
    env.reset()
    env.step(np.array([0, 1]))
    state = get_env_state(env)
    assert state.inexact == "EnvPool does not give the state of its envs"
    set_env_state(fresh, through_a_file(state), refuse)
    assert comparable(vars(fresh.obs_rms)) == comparable(vars(env.obs_rms))
    fresh.reset()
    fresh.step(np.array([0, 1]))


def test_async_envs_that_reset_in_the_next_step() -> None:
    fns = [lambda: gym.make("CartPole-v1")] * 2
    env = GymVectorAdapter(AsyncVectorEnv(fns))
    assert "make it with sb3_pg" in get_env_state(env).inexact
    env.close()
    mode = {"vectorization_mode": "async", "autoreset_mode": AutoresetMode.NEXT_STEP}
    env = make_vec_env("CartPole-v1", 2, "vector", backend_kwargs=mode)  # type: ignore[assignment]
    assert "NEXT_STEP do not say which envs reset next" in get_env_state(env).inexact
    env.close()


# ---------------------------------------------------------------- envs that differ


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cart_pole(3), "n_envs is 3, the saved one's is 2"),
        (lambda: make_vec_env("Acrobot-v1", 2, "dummy"), "observation_space is Box.* the saved one's is Box"),
        (
            lambda: VecNormalize(cart_pole()),
            "from outside to inside it is VecNormalize > DummyVecEnv > Monitor > .*, the saved one is DummyVecEnv > M",
        ),
        (
            lambda: cart_pole(wrapper_class=partial(TimeLimit, max_episode_steps=9)),
            "from .* it is DummyVecEnv > TimeLimit > M",
        ),
        (
            lambda: make_vec_env("CartPole-v1", 2, "vector"),
            "from .* it is GymVectorAdapter > CartPoleVectorEnv, the saved",
        ),
    ],
)
def test_an_env_that_differs_stays_as_it_was(make: Callable[[], VecEnv], message: str) -> None:
    saved, env = cart_pole(), make()
    saved.reset()
    env.reset()
    before = comparable(get_env_state(env).members)
    with pytest.raises(ValueError, match=f"env must be made as the saved one: {message}"):
        set_env_state(env, get_env_state(saved), refuse)
    assert comparable(get_env_state(env).members) == before


def test_an_env_in_a_process_that_differs() -> None:
    saved, env = (
        make_vec_env("CartPole-v1", 2, "subproc", wrapper_class=wrapper, backend_kwargs=FORK)
        for wrapper in (None, WRAPPERS["statistics"])
    )
    with pytest.raises(ValueError, match="env 0: from outside to inside it is RecordEpisodeStatistics > Monitor > "):
        set_env_state(env, get_env_state(saved), refuse)
    saved.close()
    env.close()


class Phase:
    """What only its own class can pickle."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> Any:
        return Phase, (self.name,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Phase) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)


class Tool:
    """An object with attributes, which an env makes in its first step."""


class Phased(ScriptedEnv):
    phase = Phase("new")
    tool: Tool | None = None

    def step(self, action: Any) -> Any:
        self.phase, self.tool = Phase(f"step {self.t}"), self.tool or Tool()
        return super().step(action)


def of_phased(backend: str) -> VecEnv:
    made: list[Any] = [Phased, Phased]
    return DummyVecEnv(made) if backend == "dummy" else subproc_vec_env(made, **FORK)


@pytest.mark.parametrize("backend", ["dummy", "subproc"])
def test_pickled_values_are_loaded_by_the_caller_only(backend: str) -> None:
    env, fresh = of_phased(backend), of_phased(backend)
    env.reset()
    env.step(np.zeros(2, int))
    state, before = get_env_state(env), comparable(get_env_state(fresh).members)

    def refusing(_: bytes) -> Any:
        raise pickle.UnpicklingError("refused")

    def without_tools(pickled: bytes) -> Any:
        if b"Tool" in pickled:
            raise pickle.UnpicklingError("no tools")
        return pickle.loads(pickled)

    with pytest.raises(pickle.UnpicklingError, match="refused"):
        set_env_state(fresh, through_a_file(state), refusing)
    assert comparable(get_env_state(fresh).members) == before
    with pytest.raises((pickle.UnpicklingError, ValueError), match=r"no tools|env 0: .* `unpickle` refuses"):
        set_env_state(fresh, through_a_file(state), without_tools)
    set_env_state(fresh, through_a_file(state), pickle.loads)
    assert fresh.get_attr("phase") == env.get_attr("phase") != [Phase("new")] * 2
    env.close()
    fresh.close()


# ---------------------------------------------------------------- processes look as before


def test_envs_in_processes_are_as_those_of_sb3() -> None:
    ours = make_vec_env("CartPole-v1", 2, "subproc", 3, backend_kwargs=FORK)
    theirs = SubprocVecEnv([lambda: Monitor(gym.make("CartPole-v1", render_mode="rgb_array"))] * 2, "fork")
    theirs.seed(3)
    for kind in (Monitor, RecordEpisodeStatistics):
        assert ours.env_is_wrapped(kind) == theirs.env_is_wrapped(kind)
    assert comparable(ours.reset()) == comparable(theirs.reset())
    assert comparable(ours.get_images()) == comparable(theirs.get_images())
    for env in (ours, theirs):
        env.set_attr("allow_early_resets", False)  # of the Monitor, which is outermost
        with pytest.raises(EOFError):
            env.reset()


def test_a_process_that_imports_all_by_itself() -> None:
    env = make_vec_env("CartPole-v1", 1, "subproc")
    assert get_env_state(env).inexact == ""
    assert env.get_attr("class_name")[0]() == "Monitor"
    env.close()


def test_a_sync_vector_env_of_ones_own() -> None:
    fns = [partial(gym.make, "CartPole-v1")] * 2
    assert assert_continues(lambda: GymVectorAdapter(SyncVectorEnv(fns))) > 2


def test_wrappers_of_vector_envs() -> None:
    def make() -> VecEnv:
        fns = [partial(gym.make, "Pendulum-v1", max_episode_steps=20)] * 2
        env = vector.RecordEpisodeStatistics(SyncVectorEnv(fns, autoreset_mode=AutoresetMode.NEXT_STEP))
        return GymVectorAdapter(vector.NormalizeObservation(env))

    assert assert_continues(make) > 2
