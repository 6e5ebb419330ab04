"""OffPAC: what it learns, and the log-probs that it keeps."""

import copy
import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecNormalize

from sb3_pg.rollout import BehaviorReplayBuffer, DictBehaviorReplayBuffer
from tests.algorithms.off_pac import EVERY_GRADIENT, envs, make, sample, stored
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES, ScriptedEnv, parameters, vec

# -------------------------------------------------------------------- learning, in every space


@pytest.mark.parametrize("observation_space", ["vector", "image", "dict"])
@pytest.mark.parametrize(("action_space", "gradient"), EVERY_GRADIENT)
def test_it_learns_in_every_space(action_space: str, gradient: str, observation_space: str) -> None:
    model = make(envs(action_space, 2, observation_space), actor_gradient=gradient, batch_size=4, train_freq=2)
    before = [parameters(module) for module in (model.actor, model.critic, model.critic_target)]
    model.learn(16)
    for was, module in zip(before, (model.actor, model.critic, model.critic_target), strict=True):
        assert not th.equal(was, parameters(module))
    logged = model.logger.name_to_value
    names = {"critic_loss", "q_value", "actor_loss", "entropy", "ent_coef", "learning_rate", "n_updates"}
    if gradient == "importance":
        names |= {"largest_weight", "importance_ess", "truncated_fraction"}
    assert {name for name in logged if name.startswith("train/")} == {f"train/{name}" for name in names}
    assert all(np.isfinite(value) for value in logged.values())
    for deterministic in (False, True):
        action = model.predict(model.observation_space.sample(), deterministic=deterministic)[0]
        assert model.action_space.contains(action.astype(model.action_space.dtype))


@pytest.mark.parametrize("observation_space", OBSERVATION_SPACES)
def test_it_takes_every_observation_space(observation_space: str) -> None:
    model = make(envs("multi_discrete", 2, observation_space), batch_size=4)
    before = parameters(model.actor)
    model.learn(14)
    assert not th.equal(before, parameters(model.actor))


@pytest.mark.parametrize(
    ("action_space", "default"),
    [
        ("discrete", "expected"),
        ("box", "reparameterized"),
        ("multi_discrete", "score"),
        ("multi_binary", "score"),
    ],
)
def test_the_default_is_what_has_the_least_variance(action_space: str, default: str) -> None:
    plain, named = (make(envs(action_space), **k).learn(14) for k in ({}, {"actor_gradient": default}))
    assert th.equal(parameters(plain.policy), parameters(named.policy))


class Corridor(gym.Env[Any, Any]):
    """Two steps: what pays in the second depends on what was done in the first, which pays nothing."""

    observation_space = spaces.Box(-1, 1, (3,), np.float32)

    def __init__(self, action_space: spaces.Space[Any]) -> None:
        self.action_space = action_space
        self.state = 0

    def _obs(self) -> Any:
        return np.eye(3, dtype=np.float32)[self.state]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.state = 0
        return self._obs(), {}

    def step(self, action: Any) -> Any:
        high = bool(np.ravel(action)[-1] > 0.5)
        if self.state == 0:
            self.state = 2 if high else 1
            return self._obs(), 0.0, False, False, {}
        reward = float(not high) if self.state == 2 else 0.3
        return self._obs(), reward, True, False, {}


@pytest.mark.parametrize(("action_space", "gradient"), [pair for pair in EVERY_GRADIENT if pair[0] != "matrix"])
def test_it_solves_two_steps(action_space: str, gradient: str) -> None:
    env = vec(*(Corridor(ACTION_SPACES[action_space]) for _ in range(8)))
    model = make(
        env,
        actor_gradient=gradient,
        learning_rate=1e-2,
        learning_starts=64,
        batch_size=64,
        tau=0.05,
        ent_coef=0.01,
        gradient_steps=1,
        max_ratio=2.0,
        buffer_size=4000,
        policy_kwargs={"net_arch": [16]},
    ).learn(3200)
    states = np.eye(3, dtype=np.float32)[[0, 2]]
    first, second = (action.ravel()[-1] > 0.5 for action in model.predict(states, deterministic=True)[0])
    assert (first, second) == (True, False)


# -------------------------------------------------------------------- behavior log-probs


class Witness(BaseCallback):
    """Keeps the observations that were acted upon."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def _on_step(self) -> bool:
        self.seen.append(copy.deepcopy(self.model._last_obs))
        return True


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(
    ("action_space", "use_sde"), [*((name, False) for name in ACTION_SPACES), ("box", True), ("matrix", True)]
)
def test_stored_log_probs_are_those_of_the_stored_actions(action_space: str, use_sde: bool, normalized: bool) -> None:
    env = envs(action_space, 3)
    env = VecNormalize(env) if normalized else env
    model = make(env, learning_starts=0, gradient_steps=0, use_sde=use_sde, sde_sample_freq=2, train_freq=3)
    witness = Witness()
    model.learn(27, callback=witness)
    actions, log_probs = stored(model, 9)
    for obs, action, log_prob in zip(witness.seen, actions, log_probs, strict=True):
        as_drawn = action.flatten() if action_space == "discrete" else action.float()
        wanted = model.actor.distribution(th.as_tensor(obs).float()).log_prob(as_drawn)
        assert th.allclose(log_prob, wanted, atol=1e-5)
    assert len(log_probs.unique()) > 3


def test_the_log_probs_are_those_of_the_policy_that_acted_not_of_the_last_one() -> None:
    model = make(envs("box", 2), learning_starts=0, learning_rate=1e-1)
    current: list[Any] = []

    class Ask(Witness):
        def _on_step(self) -> bool:
            obs = th.as_tensor(self.model._last_obs)
            actions = th.as_tensor(self.locals["buffer_actions"])
            current.append(model.actor.distribution(obs).log_prob(actions).detach())
            return True

    model.learn(20, callback=Ask())
    assert th.allclose(stored(model, 10)[1], th.stack(current), atol=1e-4)


@pytest.mark.parametrize(
    ("action_space", "log_prob"),
    [
        ("discrete", -math.log(3)),
        ("box", -2 * math.log(2)),  # of the policy's own actions, in [-1, 1]
        ("matrix", -4 * math.log(2)),
        ("multi_discrete", -math.log(6)),
        ("multi_binary", -3 * math.log(2)),
    ],
)
def test_the_first_actions_are_uniform(action_space: str, log_prob: float) -> None:
    model = make(envs(action_space, 2), learning_starts=40)
    model.learn(40)
    actions, log_probs = stored(model, 20)
    assert np.allclose(log_probs, log_prob)
    if isinstance(model.action_space, spaces.Box):
        assert actions.min() < -0.7
        assert actions.max() > 0.7
        assert actions.abs().max() <= 1


@pytest.mark.parametrize("learning_starts", [0, 100])
@pytest.mark.parametrize("action_space", ACTION_SPACES)
def test_the_env_gets_the_stored_action_in_its_own_units(action_space: str, learning_starts: int) -> None:
    env = ScriptedEnv(action_space=ACTION_SPACES[action_space])
    model = make(vec(env), learning_starts=learning_starts, gradient_steps=0).learn(10)
    space = model.action_space
    actions = stored(model, 10)[0][:, 0].numpy()
    for sent, action in zip(env.actions, actions, strict=True):
        wanted = action.reshape(space.shape or ())
        if isinstance(space, spaces.Box):
            wanted = space.low + (wanted + 1) / 2 * (space.high - space.low)
        assert np.allclose(sent, wanted, atol=1e-6)
        assert space.contains(np.asarray(sent).astype(space.dtype))


def test_integers_are_stored_as_the_policy_sees_them() -> None:
    model = make(vec(ScriptedEnv(action_space=spaces.Box(0, 255, (2,), np.uint8))), learning_starts=30).learn(40)
    actions = stored(model, 40)[0]
    assert actions[:30].min() < -0.7
    assert actions[:30].max() > 0.7
    assert len(actions[30:].unique()) == 20


@pytest.mark.parametrize(
    ("observation_space", "optimize_memory_usage"), [("vector", False), ("vector", True), ("dict", False)]
)
def test_replayed_log_probs_belong_to_their_transitions(observation_space: str, optimize_memory_usage: bool) -> None:
    model = make(
        envs("box", 3, observation_space),
        gradient_steps=0,
        buffer_size=60,  # is written over
        optimize_memory_usage=optimize_memory_usage,
        replay_buffer_kwargs={"handle_timeout_termination": not optimize_memory_usage},
    ).learn(99)
    buffer: Any = model.replay_buffer
    assert buffer.full
    samples = buffer.sample(200)
    found = []
    for reward, action, log_prob in zip(samples.rewards, samples.actions, samples.log_probs, strict=True):
        (place,) = np.argwhere(buffer.rewards == reward.item())
        assert np.array_equal(buffer.actions[tuple(place)], action)
        assert buffer.log_probs[tuple(place)] == log_prob.item()
        found.append(int(place[1]))
    assert set(found) == {0, 1, 2}


@pytest.mark.parametrize(("space", "cls"), [("vector", BehaviorReplayBuffer), ("dict", DictBehaviorReplayBuffer)])
def test_what_is_replayed_is_what_sb3_would_replay(space: str, cls: type[ReplayBuffer]) -> None:
    drawn = []
    for replay_buffer_class in (cls, cls.__mro__[2] if space == "dict" else ReplayBuffer):
        model = make(envs("box", 3, space), gradient_steps=0, replay_buffer_class=replay_buffer_class).learn(60)
        np.random.seed(0)  # noqa: NPY002
        drawn.append([sample(model).rewards for _ in range(2)])
    assert all(th.equal(ours, theirs) for ours, theirs in zip(*drawn, strict=True))
