"""Envs receive actions of their space; buffers and log-probs belong to what the policy drew."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.utils import obs_as_tensor

from sb3_pg import NPG, TRPO, ActorCritic, KLPenaltyPG, NonFiniteError, OffPAC, OffPolicyPG, Reinforce
from sb3_pg.policies import policy_actions, uniform_behavior
from sb3_pg.rollout import BehaviorReplayBuffer, Trajectory
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES, ScriptedEnv, policy_for, vec

Make = Callable[..., Any]
CLASSES = (Reinforce, ActorCritic, NPG, TRPO, KLPenaltyPG, OffPolicyPG, OffPAC)
SMALL: dict[type, dict[str, Any]] = {
    Reinforce: {"n_episodes": 6},
    ActorCritic: {"n_steps": 12},
    NPG: {"n_steps": 12, "batch_size": 12},
    TRPO: {"n_steps": 12, "batch_size": 12},
    KLPenaltyPG: {"n_steps": 12, "batch_size": 12},
    OffPolicyPG: {"train_freq": (6, "episode"), "gradient_steps": 0},
    OffPAC: {"learning_starts": 0, "gradient_steps": 0, "buffer_size": 200, "batch_size": 8},
}
BIG = 2**63 - 2  # the highest bound that Gymnasium takes
#: name -> space, and the policy's initial log standard deviation that reaches both of its bounds
INTEGERS: dict[str, tuple[spaces.Box, float]] = {
    "int8": (spaces.Box(-128, 127, (2,), np.int8), 5.5),
    "uint8": (spaces.Box(0, 255, (2,), np.uint8), 6.0),
    "int16": (spaces.Box(-(2**15), 2**15 - 1, (2,), np.int16), 11.0),
    "uint16": (spaces.Box(0, 2**16 - 1, (2,), np.uint16), 11.0),
    "int32": (spaces.Box(-(2**31), 2**31 - 1, (2,), np.int32), 22.0),
    "uint32": (spaces.Box(0, 2**32 - 1, (2,), np.uint32), 22.0),
    "int64": (spaces.Box(-5, 5, (2,), np.int64), 2.0),
    "int64-wide": (spaces.Box(-(2**63), BIG, (2,), np.int64), 42.0),
    "uint64-wide": (spaces.Box(0, BIG, (2,), np.uint64), 42.0),
    "matrix": (spaces.Box(np.array([[-3, 0], [5, -1]]), np.array([[3, 1], [7, 9]]), dtype=np.int32), 2.0),
    "bool": (spaces.Box(0, 1, (2,), cast(Any, np.bool_)), 0.0),
}
FEW = ("int8", "uint8", "int64", "int64-wide", "matrix")
COUNTED: dict[str, spaces.Space[Any]] = {
    "discrete": spaces.Discrete(3, start=2),
    "discrete-negative": spaces.Discrete(3, start=-1),
    "multi_discrete": spaces.MultiDiscrete([2, 3], start=[5, -1]),
    "multi_discrete-int32": spaces.MultiDiscrete([2, 3], dtype=np.int32),
}


def make(cls: type, env: Any, **kwargs: Any) -> Any:
    policy = policy_for(env.observation_space)
    policy_kwargs = {"net_arch": [8], **kwargs.pop("policy_kwargs", {})}
    log_std = kwargs.pop("log_std", None)
    model: Any = cls(policy, env, **{"seed": 0, "device": "cpu", **SMALL[cls], **kwargs}, policy_kwargs=policy_kwargs)
    if log_std is not None:  # larger ones than log_std_init takes
        with th.no_grad():
            model.policy.log_std.fill_(log_std)
    return model


def an_env(space: spaces.Space[Any], observations: str = "vector") -> ScriptedEnv:
    return ScriptedEnv((2, 3), action_space=space, observation_space=OBSERVATION_SPACES[observations])


def spread(cls: type, log_std: float) -> dict[str, Any]:
    """Arguments that make the policy reach the bounds; the squashed one of OffPAC does anyway."""
    return {} if cls is OffPAC else {"log_std": log_std}


def log_prob(model: Any, observations: Any, actions: np.ndarray) -> np.ndarray:
    """Of stored actions, by the policy as it is now."""
    taken = policy_actions(th.as_tensor(actions), model.action_space)
    policy, obs = model.policy, obs_as_tensor(observations, model.device)
    with th.no_grad():
        if isinstance(model, OffPAC):
            return policy.actor.distribution(obs).log_prob(taken).numpy()  # type: ignore[no-any-return]
        return policy.evaluate_actions(obs, taken)[1].numpy()  # type: ignore[no-any-return]


class Recorder(BaseCallback):
    """What callbacks see of the actions and, at an on-policy rollout's end, the log-probs beside the policy's."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[np.ndarray] = []
        self.received: list[np.ndarray] = []
        self.log_probs: list[tuple[np.ndarray, np.ndarray]] = []
        self.stored: list[np.ndarray] = []

    def _on_step(self) -> bool:
        names = (
            ("buffer_actions", "actions")
            if isinstance(self.model, OffPolicyAlgorithm)
            else ("actions", "clipped_actions")
        )
        self.drawn.append(self.locals[names[0]].copy())
        self.received.append(self.locals[names[1]].copy())
        return True

    def _on_rollout_end(self) -> None:
        buffer: Any = getattr(self.model, "rollout_buffer", None)
        if buffer is not None:
            observations: Any = buffer.observations
            if isinstance(observations, dict):
                flat: Any = {key: x.reshape(-1, *x.shape[2:]) for key, x in observations.items()}
            else:
                flat = observations.reshape(-1, *observations.shape[2:])
            actions = buffer.actions.reshape(-1, *buffer.actions.shape[2:])
            self.log_probs.append((buffer.log_probs.flatten(), log_prob(self.model, flat, actions)))
            self.stored.append(actions)


def replayed(model: Any) -> tuple[Any, np.ndarray, np.ndarray]:
    """Observations, actions and log-probs of a replay buffer, of one env."""
    buffer = model.replay_buffer
    assert not buffer.full
    observations: Any = buffer.observations
    n = buffer.pos
    if isinstance(observations, dict):
        obs: Any = {key: x[:n, 0] for key, x in observations.items()}
    else:
        obs = observations[:n, 0]
    return obs, buffer.actions[:n, 0], buffer.log_probs[:n, 0]


def learned(cls: type, env: ScriptedEnv, n_steps: int = 24, **kwargs: Any) -> tuple[Any, Recorder]:
    recorder = Recorder()
    model = make(cls, vec(env), **kwargs).learn(n_steps, callback=recorder)
    return model, recorder


def stored_with_log_probs(model: Any, recorder: Recorder) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stored actions, stored log-probs, and what the policy said of those actions."""
    if recorder.log_probs:
        stored, expected = (np.concatenate(parts) for parts in zip(*recorder.log_probs, strict=True))
        return np.concatenate(recorder.stored), stored, expected
    observations, actions, stored = replayed(model)
    return actions, stored, log_prob(model, observations, actions)


# ---------------------------------------------------------------- integers of a Box


def check_integers(model: Any, recorder: Recorder, env: ScriptedEnv) -> None:
    space = env.action_space
    assert isinstance(space, spaces.Box)
    assert env.actions
    assert all(space.contains(action) for action in env.actions)
    assert np.array_equal(np.concatenate(recorder.received), np.stack(env.actions))
    actions, stored, expected = stored_with_log_probs(model, recorder)
    assert actions.dtype == np.float32
    assert (actions != actions.round()).any() or abs(actions).max() > 2**22  # where all numbers are integers
    drawn = np.concatenate(recorder.drawn).reshape(-1, actions.shape[1])
    assert np.array_equal(drawn[: len(actions)], actions)
    assert stored == pytest.approx(expected, rel=1e-4, abs=1e-4)


def as_integers(drawn: np.ndarray, space: spaces.Box, squashed: bool) -> np.ndarray:
    """By Python's own numbers, one after the other."""
    result = []
    for number, low, high in zip(drawn.flat, space.low.flat, space.high.flat, strict=True):
        x, lowest, highest = float(number), int(low), int(high)
        if squashed:
            x = lowest + 0.5 * (x + 1) * (highest - lowest)
        result.append(min(max(round(x), lowest), highest))
    return np.array(result, dtype=space.dtype).reshape(space.shape)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", FEW)
def test_the_env_receives_integers_and_the_buffer_keeps_what_was_drawn(cls: type, name: str) -> None:
    space, log_std = INTEGERS[name]
    env = an_env(space)
    model, recorder = learned(cls, env, **spread(cls, log_std))
    check_integers(model, recorder, env)
    drawn = np.concatenate(recorder.drawn)
    for action, number in zip(env.actions, drawn, strict=True):
        assert np.array_equal(action, as_integers(number, space, squashed=cls is OffPAC))


@pytest.mark.parametrize("name", [name for name in INTEGERS if name not in FEW])
@pytest.mark.parametrize("cls", [ActorCritic, OffPolicyPG, OffPAC])
def test_every_dtype_is_received(cls: type, name: str) -> None:
    space, log_std = INTEGERS[name]
    env = an_env(space)
    model, recorder = learned(cls, env, **spread(cls, log_std))
    check_integers(model, recorder, env)
    for action, number in zip(env.actions, np.concatenate(recorder.drawn), strict=True):
        assert np.array_equal(action, as_integers(number, space, squashed=cls is OffPAC))


@pytest.mark.parametrize("name", [name for name in INTEGERS if name not in ("matrix", "bool")])
def test_what_lies_beyond_the_bounds_is_received_as_the_bound(name: str) -> None:
    """Exactly, though 2^63 - 2 is no number that a double can hold."""
    space, _ = INTEGERS[name]
    env = an_env(space)
    model = make(OffPolicyPG, vec(env), behavior_policy=lambda _: (np.array([[-1e30, 1e30]]), np.array([-1.0])))
    model.learn(12)
    assert {tuple(action.tolist()) for action in env.actions} == {(int(space.low[0]), int(space.high[0]))}
    assert replayed(model)[1].tolist()[0] == pytest.approx([-1e30, 1e30])


@pytest.mark.parametrize("cls", [Reinforce, OffPolicyPG])
@pytest.mark.parametrize("name", ["int8", "int32", "int64-wide"])
def test_a_squashed_policy_reaches_both_bounds(cls: type, name: str) -> None:
    space, _ = INTEGERS[name]
    env = an_env(space)
    squash = {"squash_output": True, "log_std_init": 3.0}
    model, recorder = learned(cls, env, n_steps=60, use_sde=True, sde_sample_freq=1, policy_kwargs=squash)
    received = np.stack(env.actions)
    assert all(space.contains(action) for action in env.actions)
    for bound in (space.low, space.high):
        assert (abs(received.astype(float) - bound.astype(float)) <= (space.high.astype(float) - space.low) / 50).any()
    assert np.concatenate(recorder.drawn).dtype == np.float32
    actions, _, _ = stored_with_log_probs(model, recorder)
    assert (actions != actions.round()).any()
    for deterministic in (False, True):
        action, _ = model.predict(model.observation_space.sample(), deterministic=deterministic)
        assert space.contains(action)


@pytest.mark.parametrize("cls", [ActorCritic, OffPolicyPG, OffPAC])
@pytest.mark.parametrize("observations", ["dict", "discrete"])
def test_buffers_of_other_observations_keep_what_was_drawn(cls: type, observations: str) -> None:
    env = an_env(INTEGERS["int64"][0], observations)
    check_integers(*learned(cls, env, **spread(cls, 2.0)), env)


@pytest.mark.parametrize("cls", [ActorCritic, OffPolicyPG, OffPAC])
def test_half_precision_is_received_and_not_stored(cls: type) -> None:
    space = spaces.Box(-3000, 3000, (2,), np.float16)
    env = an_env(space)
    model, recorder = learned(cls, env, **spread(cls, 8.0))
    assert all(space.contains(action) for action in env.actions)
    actions, stored, expected = stored_with_log_probs(model, recorder)
    assert actions.dtype == np.float32
    assert (actions != actions.astype(np.float16)).any()
    assert stored == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert space.contains(model.predict(env.observation_space.sample())[0])


@pytest.mark.parametrize("cls", [ActorCritic, OffPolicyPG])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floating_spaces_receive_what_they_did(cls: type, dtype: type) -> None:
    space = spaces.Box(-1, 2, (2,), dtype)
    env = an_env(space)
    model, recorder = learned(cls, env)
    drawn = np.concatenate(recorder.drawn)
    assert np.array_equal(np.stack(env.actions), np.clip(drawn, space.low, space.high))
    assert stored_with_log_probs(model, recorder)[0].dtype == (np.float32 if cls is OffPolicyPG else dtype)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", ["int8", "int64", "matrix", "uint64-wide"])
def test_predict_returns_what_the_env_receives(cls: type, name: str) -> None:
    space, log_std = INTEGERS[name]
    model = make(cls, vec(an_env(space)), **spread(cls, log_std))
    observations = np.stack([model.observation_space.sample() for _ in range(3)])
    for deterministic in (True, False):
        several, state = model.predict(observations, deterministic=deterministic)
        assert state is None
        assert several.shape == (3, *space.shape)
        assert all(space.contains(action) for action in several)
        one, state = model.predict(observations[1], ("memory",), np.ones(1), deterministic)
        assert state == ("memory",)
        assert space.contains(one)
        if deterministic:
            assert one.astype(float) == pytest.approx(several[1].astype(float), rel=1e-5)  # a matrix product of one row
            with th.no_grad():
                obs = th.as_tensor(observations)
                mode = (
                    model.policy.actor(obs, deterministic=True)
                    if cls is OffPAC
                    else model.policy.get_distribution(obs).mode()
                )
            expected = [as_integers(x, space, squashed=cls is OffPAC) for x in mode.numpy()]
            assert np.array_equal(several, np.stack(expected))


@pytest.mark.parametrize("cls", CLASSES)
def test_sb3_evaluates_on_spaces_of_integers_and_with_a_start(cls: type) -> None:
    for space in (INTEGERS["int8"][0], COUNTED["discrete"], COUNTED["multi_discrete"]):
        env = an_env(space)
        model = make(cls, vec(an_env(space)))
        evaluate_policy(model, vec(env), n_eval_episodes=3, deterministic=False)
        assert len(env.actions) == 2 + 3 + 2
        assert all(space.contains(action) for action in env.actions)


@pytest.mark.parametrize("cls", [OffPolicyPG, OffPAC])
@pytest.mark.parametrize("name", ["int64", "int8", "int64-wide"])
def test_the_uniform_warm_up_has_a_density_between_integers(cls: type, name: str) -> None:
    space, _ = INTEGERS[name]
    env = an_env(space)
    model = make(cls, vec(env), learning_starts=1000).learn(60)
    assert all(space.contains(action) for action in env.actions)
    _, actions, log_probs = replayed(model)
    low, high = int(space.low.flat[0]), int(space.high.flat[0])
    width = 2.0 if cls is OffPAC else float(high - low)
    lowest, highest = (-1, 1) if cls is OffPAC else (low, high)
    assert log_probs == pytest.approx(-2 * math.log(width))
    assert (actions != actions.round()).any() or width > 2**30
    assert actions.min() == pytest.approx(lowest, abs=0.1 * width)
    assert actions.max() == pytest.approx(highest, abs=0.1 * width)
    for action, number in zip(env.actions, actions, strict=False):
        off = np.abs(action.astype(float) - as_integers(number, space, squashed=cls is OffPAC).astype(float))
        assert (off <= 1e-6 * (high - low)).all()  # stored in single precision


@pytest.mark.parametrize("name", ACTION_SPACES)
@pytest.mark.parametrize("squashed", [False, True])
def test_the_warm_up_of_ordinary_spaces_takes_the_random_numbers_that_sb3_takes(name: str, squashed: bool) -> None:
    space = ACTION_SPACES[name]
    space.seed(3)
    expected = np.stack([space.sample() for _ in range(4)])
    if squashed and isinstance(space, spaces.Box):
        expected = 2 * ((expected - space.low) / (space.high - space.low)) - 1
    space.seed(3)
    assert np.array_equal(uniform_behavior(space, squashed)(np.zeros((4, 3)))[0], expected)


@pytest.mark.parametrize(("mean", "fraction"), [(300.0, 1.0), (100.0, 0.0), (-3.0, 1.0)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
def test_clipped_actions_are_counted(mean: float, fraction: float, dtype: type) -> None:
    model = make(ActorCritic, vec(an_env(spaces.Box(0, 255, (2,), dtype))), policy_kwargs={"log_std_init": -3.0})
    with th.no_grad():
        model.policy.action_net.bias.fill_(mean)
    model.learn(12, log_interval=1)
    assert model.logger.name_to_value["train/clipped_action_fraction"] == fraction


@pytest.mark.parametrize(
    ("means", "fraction"),
    [
        ((0.0, 0.0), 0.0),
        ((9.0, 0.0), 0.5),
        ((-9.0, 0.0), 0.5),
        ((0.0, 9.0), 0.5),
        ((0.0, -9.0), 0.5),
        ((9.0, -9.0), 1.0),
    ],
)
def test_clipped_components_are_counted_at_either_bound(means: tuple[float, float], fraction: float) -> None:
    env = vec(an_env(spaces.Box(np.array([-1, -3]), np.array([2, 1]), dtype=np.float32)))
    model = make(ActorCritic, env, policy_kwargs={"log_std_init": -3.0})
    with th.no_grad():
        model.policy.action_net.bias.copy_(th.tensor(means))
    model.learn(12, log_interval=1)
    assert model.logger.name_to_value["train/clipped_action_fraction"] == fraction


@pytest.mark.parametrize("cls", [ActorCritic, OffPAC])
def test_no_integer_stands_for_nan(cls: type) -> None:
    model = make(cls, vec(an_env(INTEGERS["int64"][0])))
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.fill_(th.nan)
    with pytest.raises(NonFiniteError, match="parameter"):
        model.learn(12)


class Target(gym.Env[Any, Any]):
    """One step; the reward is the negative squared distance of the received action from 0.4."""

    def __init__(self, dtype: type) -> None:
        self.observation_space, self.action_space = spaces.Box(-1, 1, (1,), np.float32), spaces.Box(-5, 5, (1,), dtype)

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        super().reset(**kwargs)
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        return np.zeros(1, np.float32), -float((action[0] - 0.4) ** 2), True, False, {}


@pytest.mark.parametrize("dtype", [np.int64, np.float32])
@pytest.mark.parametrize("cls", [ActorCritic, OffPolicyPG, Reinforce])
def test_it_learns_the_number_that_pays(cls: type, dtype: type) -> None:
    """Of integers, 0 pays most, so that all means that are rounded to it are as good."""
    arguments: dict[Any, dict[str, Any]] = {
        ActorCritic: {"n_steps": 16, "learning_rate": 2e-2},
        OffPolicyPG: {"train_freq": (64, "episode"), "buffer_trajectories": 64, "gradient_steps": 2},
        Reinforce: {"n_episodes": 32},
    }
    env = vec(*(Target(dtype) for _ in range(4)))
    model = make(cls, env, **{"learning_rate": 3e-2, "normalize_advantage": True, **arguments[cls]})
    with th.no_grad():
        model.policy.action_net.bias.fill_(-2.0)
    model.learn(3000)
    obs = np.zeros(1, np.float32)
    if dtype is np.int64:
        assert model.predict(obs, deterministic=True)[0].tolist() == [0]
    with th.no_grad():
        mean = model.policy.get_distribution(th.zeros(1, 1)).mode().item()
    assert mean == pytest.approx(0.0 if dtype is np.int64 else 0.4, abs=0.5)


# ---------------------------------------------------------------- counted from a start


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", COUNTED)
def test_the_env_receives_numbers_from_the_start_and_the_buffer_counts_from_0(cls: type, name: str) -> None:
    space: Any = COUNTED[name]
    env = an_env(space)
    model, recorder = learned(cls, env, n_steps=48)
    assert all(space.contains(action) for action in env.actions)
    received, start = np.stack(env.actions), getattr(space, "start", 0)
    n_choices = space.n if isinstance(space, spaces.Discrete) else space.nvec
    assert np.array_equal(received.min(0), start)
    assert np.array_equal(received.max(0), start + n_choices - 1)
    assert np.array_equal(np.concatenate(recorder.received), received)
    assert np.array_equal(np.concatenate(recorder.drawn), received - start)
    actions, stored, expected = stored_with_log_probs(model, recorder)
    assert np.array_equal(actions.reshape(-1, *space.shape), (received - start)[: len(actions)])
    assert stored == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", COUNTED)
def test_predict_counts_from_the_start(cls: type, name: str) -> None:
    space: Any = COUNTED[name]
    model = make(cls, vec(an_env(space)))
    observations = np.stack([model.observation_space.sample() for _ in range(30)])
    several, _ = model.predict(observations)
    assert several.shape == (30, *space.shape)
    assert all(space.contains(action) for action in several)
    assert np.array_equal(several.min(0), getattr(space, "start", 0))
    one, state = model.predict(observations[0], ("memory",), deterministic=True)
    assert state == ("memory",)
    assert isinstance(one, np.ndarray)
    assert space.contains(one)
    assert np.array_equal(one, model.predict(observations, deterministic=True)[0][0])


@pytest.mark.parametrize("cls", [OffPolicyPG, OffPAC])
@pytest.mark.parametrize("name", COUNTED)
def test_the_uniform_warm_up_counts_from_the_start(cls: type, name: str) -> None:
    space: Any = COUNTED[name]
    env = an_env(space)
    model = make(cls, vec(env), learning_starts=1000).learn(40)
    assert all(space.contains(action) for action in env.actions)
    _, actions, log_probs = replayed(model)
    start = np.asarray(getattr(space, "start", 0))
    assert np.array_equal(actions.reshape(-1, *space.shape), (np.stack(env.actions) - start)[: len(actions)])
    assert log_probs == pytest.approx(-math.log(3 if space.shape == () else 6))


def a_trajectory(actions: Any) -> Trajectory:
    n = len(actions)
    return Trajectory(np.zeros((n, 3), np.float32), np.asarray(actions), np.ones(n), np.full(n, -1.0), terminated=True)


@pytest.mark.parametrize(
    ("name", "actions", "stored"),
    [
        ("discrete", [2, 4, 3], [[0], [2], [1]]),
        ("discrete", [[2], [4], [3]], [[0], [2], [1]]),
        ("discrete-negative", np.array([1, -1], np.int8), [[2], [0]]),
        ("discrete", [2.0, 4.0], [[0], [2]]),
        ("multi_discrete", [[5, -1], [6, 1]], [[0, 0], [1, 2]]),
        ("multi_discrete-int32", [[0, 2]], [[0, 2]]),
    ],
)
def test_logged_actions_are_numbered_as_the_env_numbers_them(name: str, actions: Any, stored: Any) -> None:
    model = make(OffPolicyPG, vec(an_env(COUNTED[name])))
    model.add_trajectories([a_trajectory(actions)])
    assert replayed(model)[1].tolist() == stored


@pytest.mark.parametrize(
    ("name", "actions", "message"),
    [
        ("discrete", [3, 0], r"actions must be in Discrete\(3, start=2\), got 0 at step 1"),
        ("discrete", [5], r"got 5 at step 0"),
        ("discrete", [2.5], r"got 2\.5 at step 0"),
        ("discrete-negative", [-2], r"got -2 at step 0"),
        ("multi_discrete", [[5, 0], [0, 0]], r"actions must be in MultiDiscrete.*got 0 at step 1"),
        ("multi_discrete", [[5, 2]], r"got 2 at step 0"),
        ("multi_discrete", [5], r"actions must have the shape \(1, 2\), got \(1,\)"),
    ],
)
def test_logged_actions_that_the_env_does_not_know_are_refused(name: str, actions: Any, message: str) -> None:
    model = make(OffPolicyPG, vec(an_env(COUNTED[name])))
    with pytest.raises(ValueError, match=message):
        model.add_trajectories([a_trajectory(actions)])
    assert model.replay_buffer.trajectories == []


def test_logged_actions_of_a_box_of_integers_are_floating() -> None:
    model = make(OffPolicyPG, vec(an_env(INTEGERS["int64"][0])))
    model.add_trajectories([a_trajectory([[0.7, -9.25], [3, 4]])])
    assert replayed(model)[1] == pytest.approx(np.array([[0.7, -9.25], [3, 4]]))


def test_a_squashed_policy_refuses_logged_actions_that_it_cannot_draw() -> None:
    model = make(OffPolicyPG, vec(an_env(ACTION_SPACES["box"])), use_sde=True, policy_kwargs={"squash_output": True})
    with pytest.raises(ValueError, match=r"actions of a squashed policy must be in \[-1, 1\], got -2\.5 at step 1"):
        model.add_trajectories([a_trajectory([[0.5, 1.0], [0.0, -2.5]])])


class Choice(gym.Env[Any, Any]):
    """One step; the last action of the space pays 1."""

    def __init__(self, space: spaces.Discrete) -> None:
        self.observation_space, self.action_space = spaces.Box(-1, 1, (1,), np.float32), space

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        super().reset(**kwargs)
        return np.ones(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        space: Any = self.action_space
        return np.ones(1, np.float32), float(action == space.start + space.n - 1), True, False, {}


@pytest.mark.parametrize("actor_gradient", ["expected", "score", "importance"])
def test_off_pac_learns_which_of_the_envs_numbers_pays(actor_gradient: str) -> None:
    model = make(
        OffPAC,
        vec(Choice(spaces.Discrete(3, start=2))),
        actor_gradient=actor_gradient,
        learning_starts=50,
        learning_rate=1e-2,
        gradient_steps=1,
        batch_size=32,
        buffer_size=1000,
    ).learn(350)
    assert model.predict(np.ones(1, np.float32), deterministic=True)[0] == 4
    q_values = model.critic.all_q_values(th.ones(1, 1)).mean(0)[0]
    assert q_values.argmax() == 2
    assert q_values.tolist() == pytest.approx([0, 0, 1], abs=0.2)


@pytest.mark.parametrize("cls", [OffPolicyPG, OffPAC])
@pytest.mark.parametrize("space", [COUNTED["discrete"], INTEGERS["int8"][0]], ids=["start", "int8"])
def test_models_and_buffers_are_saved_and_loaded(cls: type, space: spaces.Space[Any], tmp_path: Path) -> None:
    model = make(cls, vec(an_env(space)), gradient_steps=1, learning_starts=4).learn(20)
    before = replayed(model)[1].copy()
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    env = an_env(space)
    loaded = cls.load(tmp_path / "model", env=vec(env))  # type: ignore[attr-defined]
    loaded.load_replay_buffer(tmp_path / "buffer")
    obs = np.stack([model.observation_space.sample() for _ in range(5)])
    assert np.array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
    loaded.learn(20, reset_num_timesteps=False)
    assert all(space.contains(action) for action in env.actions)
    after = replayed(loaded)[1]
    assert np.array_equal(after[: len(before)], before)
    assert len(after) > len(before)
    assert after.dtype == before.dtype


# ---------------------------------------------------------------- buffers of SB3's own


@pytest.mark.parametrize("cls", [Reinforce, ActorCritic, NPG, TRPO, KLPenaltyPG])
@pytest.mark.parametrize("space", [INTEGERS["int64"][0], COUNTED["discrete"], COUNTED["multi_discrete"]], ids=str)
def test_a_rollout_buffer_that_sb3_fills_is_refused(cls: type, space: spaces.Space[Any]) -> None:
    arguments = {"n_steps": 12, "rollout_buffer_class": RolloutBuffer}
    if cls is Reinforce:
        arguments |= {"baseline": "value", "n_episodes": None}
    with pytest.raises(ValueError, match=r"rollout_buffer_class=.*RolloutBuffer.*action_space"):
        make(cls, vec(an_env(space)), **arguments)
    make(cls, vec(an_env(spaces.Discrete(3))), **arguments).learn(12)


@pytest.mark.parametrize("buffer", [ReplayBuffer, BehaviorReplayBuffer])
def test_a_replay_buffer_of_sb3_keeps_what_was_drawn(buffer: type) -> None:
    env = an_env(INTEGERS["int8"][0])
    model, recorder = learned(OffPAC, env, replay_buffer_class=buffer, gradient_steps=1, learning_starts=8)
    drawn = np.concatenate(recorder.drawn)
    assert np.array_equal(model.replay_buffer.actions[: len(drawn), 0], drawn.astype(np.float32))
    assert all(env.action_space.contains(action) for action in env.actions)
