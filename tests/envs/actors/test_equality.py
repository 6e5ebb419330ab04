"""Actors give what DummyVecEnv gives, however many there are and wherever they are."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecCheckNan,
    VecEnv,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)

from sb3_pg import ActorCritic, Memory, OffPolicyPG, Reinforce
from sb3_pg.envs import ActorVecEnv
from tests.helpers import (
    ACTION_SPACES,
    OBSERVATION_SPACES,
    OwnForward,
    ScriptedEnv,
    parameters,
    policy_for,
    the_others_slow,
)

N_ENVS = 5
BOXES = spaces.Dict({"a": spaces.Box(-1, 1, (2,), np.float32), "b": spaces.Box(-1, 1, (3,), np.float32)})
SPACES = {**OBSERVATION_SPACES, "boxes": BOXES}
pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    actions: str = "box"
    observations: str = "vector"
    cls: Any = ActorCritic
    arguments: dict[str, Any] = field(default_factory=lambda: {"n_steps": 7})
    wrap: Callable[[VecEnv], VecEnv] = lambda env: env
    env: Callable[[int], gym.Env[Any, Any]] | None = None
    #: whether all actors draw from one stream
    one_stream: bool = True
    #: whether each actor has statistics of its own within a rollout
    own_statistics: bool = False

    def env_fns(self) -> list[Callable[[], gym.Env[Any, Any]]]:
        def make(i: int) -> gym.Env[Any, Any]:
            if self.env is not None:
                return Monitor(self.env(i))
            spaces_: Any = copy.deepcopy((SPACES[self.observations], ACTION_SPACES[self.actions]))
            return Monitor(ScriptedEnv((3 + i, 2, 6), (False, True), float(i), *spaces_))

        return [lambda i=i: make(i) for i in range(N_ENVS)]  # type: ignore[misc]


def complete(n: int) -> dict[str, Any]:
    return {"n_episodes": n * N_ENVS, "max_episode_steps": 100}


def everything(env: VecEnv) -> VecEnv:
    return VecNormalize(VecMonitor(VecCheckNan(VecFrameStack(env, 2))), gamma=0.9)


SDE = {"n_steps": 7, "use_sde": True}
CASES = [
    *(Case(name, actions=name) for name in ACTION_SPACES),
    Case("discrete observations", "discrete", "discrete"),
    Case("episodes", cls=Reinforce, arguments=complete(2)),
    Case("episodes, critic", "discrete", cls=Reinforce, arguments={**complete(1), "baseline": "value"}),
    Case("sde", arguments=SDE),
    Case("sde, often", arguments={**SDE, "sde_sample_freq": 3}),
    Case("gru", arguments={"n_steps": 7, "memory": Memory("gru", 8)}),
    Case("lstm, episodes", "discrete", cls=Reinforce, arguments={**complete(2), "memory": Memory("lstm", 8)}),
    Case("masks", env=lambda _: gym.make("MaskedGrid-v0").unwrapped, arguments={"n_steps": 9}),
    Case(
        "masks, normalized",
        env=lambda _: gym.make("MaskedGrid-v0").unwrapped,
        arguments={"n_steps": 9},
        wrap=VecNormalize,
        own_statistics=True,
    ),
    Case("off-policy", "discrete", cls=OffPolicyPG, arguments={"train_freq": (9, "step"), "learning_starts": 20}),
    Case("off-policy episodes", "discrete", cls=OffPolicyPG, arguments={"train_freq": (N_ENVS, "episode")}),
    Case("dict", observations="dict", one_stream=False),
    Case("image", "discrete", "image", one_stream=False, arguments={"n_steps": 3}),
    Case("memory in torch", "multi_discrete", arguments={"n_steps": 7, "memory": Memory("lstm", 8)}, one_stream=False),
    Case("own forward", arguments={"n_steps": 7, "policy": OwnForward}, one_stream=False),
    Case("stacked", wrap=lambda env: VecFrameStack(env, 3)),
    Case("stacked dict", observations="boxes", wrap=lambda env: VecFrameStack(VecMonitor(env), 2), one_stream=False),
    Case("normalized", wrap=VecNormalize, own_statistics=True),
    Case("all wrappers", wrap=everything, own_statistics=True),
    Case("normalized episodes", cls=Reinforce, arguments=complete(2), wrap=VecNormalize, own_statistics=True),
]


@dataclass
class Result:
    """What training has left behind."""

    parameters: th.Tensor
    first: dict[str, Any]
    random: th.Tensor
    episodes: list[Any]
    n_timesteps: int
    last: Any
    statistics: list[Any]


def train(case: Case, env: VecEnv) -> Result:
    env.seed(3)
    inner, env = env, case.wrap(env)
    space: Any = env.observation_space
    policy = case.arguments.get("policy", policy_for(space))
    arguments = {name: value for name, value in case.arguments.items() if name != "policy"}
    arguments |= {} if "image" not in case.observations else {"policy_kwargs": {"net_arch": [8]}}
    model = case.cls(policy, env, seed=0, device="cpu", **arguments)
    first: dict[str, Any] = {}
    original: Any = model.train

    def keep_first(*args: Any, **kwargs: Any) -> None:
        buffer = getattr(model, "rollout_buffer", None)
        if buffer is not None and not first:
            first.update(
                {name: copy.deepcopy(getattr(buffer, name)) for name in ("actions", "rewards", "mask", "log_probs")}
            )
        original(*args, **kwargs)

    model.train = keep_first
    model.learn(3 * 7 * N_ENVS)
    normalized = env if isinstance(env, VecNormalize) else None
    statistics = [] if normalized is None else [vars(normalized.obs_rms), vars(normalized.ret_rms), normalized.returns]
    result = Result(
        parameters(model),
        first,
        th.get_rng_state(),
        [(info["r"], info["l"]) for info in model.ep_info_buffer],
        model.num_timesteps,
        model._last_obs,
        copy.deepcopy(statistics),
    )
    inner.close()
    return result


def require_same(one: Result, other: Result) -> None:
    assert th.equal(one.parameters, other.parameters)
    assert th.equal(one.random, other.random)
    assert (one.episodes, one.n_timesteps) == (other.episodes, other.n_timesteps)
    np.testing.assert_equal(one.last, other.last)
    np.testing.assert_equal(one.statistics, other.statistics)
    np.testing.assert_equal(one.first, other.first)


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.mark.slow
def test_spawned_processes() -> None:
    case = next(case for case in CASES if case.name == "all wrappers")
    spawned = train(case, ActorVecEnv(case.env_fns(), 2, start_method="spawn"))
    require_same(spawned, train(case, ActorVecEnv(case.env_fns(), 2, "serial")))


ON_RAY = ("box", "lstm, episodes", "masks, normalized", "off-policy", "sde, often", "dict", "all wrappers")


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore:The environment is already wrapped with a `Monitor`")
@pytest.mark.parametrize("name", the_others_slow([case.name for case in CASES], ON_RAY))
def test_ray_gives_what_serial_actors_give_to_the_bit(name: str) -> None:
    (case,) = (case for case in CASES if case.name == name)
    require_same(
        train(case, ActorVecEnv(case.env_fns(), 2, "ray")), train(case, ActorVecEnv(case.env_fns(), 2, "serial"))
    )


@pytest.mark.cuda
@pytest.mark.skipif(not th.cuda.is_available(), reason="no CUDA device")
def test_a_policy_on_the_gpu() -> None:
    """Actors act on the CPU, as with ``act_device="cpu"``."""
    trained = []
    for env in (DummyVecEnv(CASES[1].env_fns()), ActorVecEnv(CASES[1].env_fns(), 2)):
        env.seed(3)
        arguments: dict[str, Any] = {"act_device": "cpu"} if isinstance(env, DummyVecEnv) else {}
        model = ActorCritic("MlpPolicy", env, n_steps=7, seed=0, device="cuda", **arguments)
        model.learn(7 * N_ENVS)
        trained.append(model.rollout_buffer.actions.copy())
        env.close()
    np.testing.assert_allclose(trained[0], trained[1], atol=1e-5)


@pytest.mark.filterwarnings("ignore:The environment is already wrapped with a `Monitor`")
def test_one_actor_is_dummy_to_the_bit(case: Case) -> None:
    dummy = train(case, DummyVecEnv(case.env_fns()))
    require_same(dummy, train(case, ActorVecEnv(case.env_fns(), 1, "serial")))


@pytest.mark.filterwarnings("ignore:The environment is already wrapped with a `Monitor`")
def test_processes_are_the_serial_actors_to_the_bit(case: Case) -> None:
    serial = train(case, ActorVecEnv(case.env_fns(), 3, "serial"))
    require_same(serial, train(case, ActorVecEnv(case.env_fns(), 3)))
    dummy = train(case, DummyVecEnv(case.env_fns()))
    assert serial.n_timesteps == dummy.n_timesteps
    if case.one_stream and not case.own_statistics and dummy.first:
        valid = dummy.first["mask"]
        assert np.array_equal(serial.first["mask"], valid)
        for name in ("actions", "rewards", "log_probs"):
            np.testing.assert_allclose(serial.first[name][valid], dummy.first[name][valid], atol=1e-5, err_msg=name)
