"""Rollouts of policies with memory: log-probs, values and bootstraps are those of single steps by hand."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorWrapper
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.vec_env import VecEnv

from sb3_pg import Memory
from sb3_pg.envs import GymVectorAdapter
from sb3_pg.policies import extended
from sb3_pg.rollout import (
    Collector,
    RolloutBatch,
    Trajectory,
    TrajectoryReplayBuffer,
    TrajectoryRolloutBuffer,
    make_batch,
    score_batch,
    value_again,
)
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES, ScriptedEnv, vec
from tests.recurrence import ByHand, Layers, masked

SIZE = 4
DISCRETE = ACTION_SPACES["discrete"]
critics = pytest.mark.parametrize("critic", ["own", "shared", "none"])
kinds = pytest.mark.parametrize("kind", ["lstm", "gru"])


def scripted(action_space: spaces.Space[Any] = DISCRETE) -> list[ScriptedEnv]:
    """Episodes of unequal length, every other one truncated."""
    made = [
        ScriptedEnv(lengths, (False, True), action_space=action_space, observation_space=space)
        for lengths, space in (
            ((3, 5, 9), spaces.Box(-2, 2, (3,), np.float32)),
            ((2, 1, 4), spaces.Box(-2, 2, (3,), np.float32)),
            ((30, 2), spaces.Box(-2, 2, (3,), np.float32)),
        )
    ]
    for seed, env in enumerate(made):
        env.observation_space.seed(seed)
    return made


def at_once() -> VecEnv:
    return vec(*scripted())


def late() -> VecEnv:
    """Envs that reset in the step after an episode's end."""
    envs = scripted()
    return GymVectorAdapter(
        VectorWrapper(
            SyncVectorEnv(
                [lambda env=env: env for env in envs],  # type: ignore[misc]
                autoreset_mode=AutoresetMode.NEXT_STEP,
            )
        )
    )


def make_policy(memory: Memory, action_space: spaces.Space[Any] = DISCRETE, **kwargs: Any) -> Any:
    th.manual_seed(0)
    space = kwargs.pop("observation_space", spaces.Box(-10, 10, (3,), np.float32))
    policy = extended(ActorCriticPolicy)(space, action_space, lambda _: 1e-3, memory=memory, net_arch=[5], **kwargs)
    with th.no_grad():
        for parameter in policy.parameters():
            parameter.normal_(0, 0.4)
    return policy


class Walk:
    """Follows the envs through their rollouts, one step at a time."""

    def __init__(self, policy: Any, n_envs: int) -> None:
        self.policy, self.n_envs = policy, n_envs
        self.model = ByHand(policy)
        self.actor: list[Layers] = [self.model.blank(1) for _ in range(n_envs)]
        self.critic: list[Layers] = [self.model.blank(1) for _ in range(n_envs)]

    def log_prob(self, outputs: th.Tensor, action: th.Tensor) -> float:
        if isinstance(self.policy.action_space, spaces.Discrete):
            return float(outputs.log_softmax(1)[0, int(action)])
        std = self.policy.log_std.detach().double().exp()
        return float(th.distributions.Normal(outputs[0], std).log_prob(action.double().flatten()).sum())

    @th.no_grad()
    def check(self, batch: RolloutBatch, with_values: bool = True) -> int:
        """Compare log-probs, values and bootstraps. Return the number of bootstraps that were compared."""
        finals = {}
        if batch.bootstrap_observations is not None:
            observations, places = batch.bootstrap_observations
            finals = dict(zip(places.tolist(), observations, strict=True))
        observed: Any = batch.observations
        assert batch.log_probs is not None
        starts = batch.timesteps == 0
        n_compared = 0
        for env in range(self.n_envs):
            for t in range(len(batch.rewards)):
                if not batch.valid[t, env]:
                    continue
                begins = starts[t, env][None]
                actor, critic = masked(self.actor[env], begins), masked(self.critic[env], begins)
                step = self.model(observed[t, env][None], actor, critic)
                self.actor[env], self.critic[env] = step.actor, step.critic
                expected = self.log_prob(step.outputs, batch.actions[t, env])
                assert float(batch.log_probs[t, env]) == pytest.approx(expected, abs=2e-6), (t, env)
                if not with_values:
                    continue
                assert batch.values is not None
                assert batch.bootstrap is not None
                assert float(batch.values[t, env]) == pytest.approx(float(step.values), abs=2e-6), (t, env)
                final = finals.get(t * self.n_envs + env)
                bootstrap = 0.0
                if final is not None:
                    bootstrap = float(self.model(final[None], step.actor, step.critic).values)
                    n_compared += 1
                assert float(batch.bootstrap[t, env]) == pytest.approx(bootstrap, abs=2e-6), (t, env)
        return n_compared


@pytest.mark.parametrize("n_steps", [1, 4, 7])
@pytest.mark.parametrize("make_env", [at_once, late])
@critics
@kinds
def test_segments_carry_the_memory_on(kind: Any, critic: Any, make_env: Callable[[], VecEnv], n_steps: int) -> None:
    env = make_env()
    policy = make_policy(Memory(kind, SIZE, critic=critic))
    collector, walk = Collector(policy, env), Walk(policy, env.num_envs)
    n_bootstraps = 0
    for _ in range(24 // n_steps):
        batch = collector.collect(n_steps=n_steps)
        assert batch is not None
        n_bootstraps += walk.check(batch)
    assert n_bootstraps > 5


@pytest.mark.parametrize("make_env", [at_once, late])
@pytest.mark.parametrize("n_layers", [1, 2])
@critics
def test_complete_episodes_with_envs_that_wait(critic: Any, n_layers: int, make_env: Callable[[], VecEnv]) -> None:
    env = make_env()
    policy = make_policy(Memory("lstm", SIZE, n_layers, critic))
    collector, walk = Collector(policy, env), Walk(policy, env.num_envs)
    for _ in range(3):
        batch = collector.collect(episodes_per_env=2)
        assert batch is not None
        assert not batch.valid.all()
        assert walk.check(batch) >= 1


@pytest.mark.parametrize("space", ["box", "matrix"])
def test_gaussian_actions(space: str) -> None:
    env = vec(*scripted(ACTION_SPACES[space]))
    policy = make_policy(Memory("gru", SIZE), ACTION_SPACES[space])
    collector, walk = Collector(policy, env), Walk(policy, env.num_envs)
    for _ in range(3):
        batch = collector.collect(n_steps=5)
        assert batch is not None
        walk.check(batch)


@critics
def test_the_slow_sampler_leaves_the_same_memory(critic: Any) -> None:
    """Features of the user's own are not computed in NumPy."""
    policy = make_policy(Memory("lstm", SIZE, critic=critic))
    policy.action_net.register_forward_hook(lambda *_: None)
    env = at_once()
    collector, walk = Collector(policy, env), Walk(policy, env.num_envs)
    for _ in range(4):
        batch = collector.collect(n_steps=5)
        assert batch is not None
        walk.check(batch)


def test_values_are_scaled_and_terminal_states_left_out() -> None:
    policy, env = make_policy(Memory("gru", SIZE)), at_once()
    plain = Collector(policy, env).collect(episodes_per_env=2)
    assert plain is not None
    value_again(policy, plain, 1.0)
    values, bootstrap = plain.values, plain.bootstrap
    assert values is not None
    assert bootstrap is not None
    value_again(policy, plain, 3.0)
    assert plain.values is not None
    assert plain.bootstrap is not None
    assert th.allclose(plain.values, 3 * values)
    assert th.allclose(plain.bootstrap, 3 * bootstrap)
    only = Collector(policy, at_once()).collect(episodes_per_env=2, bootstrap_truncated=False)
    assert only is not None
    assert only.bootstrap is not None
    assert not only.bootstrap.any()


@critics
def test_values_are_computed_anew_from_the_same_memory(critic: Any) -> None:
    """After the critic has changed, of a segment that goes on with an episode."""
    policy, env = make_policy(Memory("lstm", SIZE, critic=critic)), at_once()
    collector, walk = Collector(policy, env), Walk(policy, env.num_envs)
    first = collector.collect(n_steps=4)
    assert first is not None
    walk.check(first)
    second = collector.collect(n_steps=6)
    assert second is not None
    before = None if second.values is None else second.values.clone()
    with th.no_grad():
        policy.value_net.weight.mul_(2)
        policy.value_net.bias.add_(1)
    value_again(policy, second)
    assert before is not None
    assert second.values is not None
    assert not th.allclose(before, second.values)
    walk.model.w = ByHand(policy).w
    walk.check(second)


def test_without_values_only_the_actors_memory_is_kept() -> None:
    policy, env = make_policy(Memory("lstm", SIZE)), at_once()
    collector, walk = Collector(policy, env), Walk(policy, env.num_envs)
    for _ in range(3):
        batch = collector.collect(n_steps=4, with_values=False)
        assert batch is not None
        assert batch.values is None
        walk.check(batch, with_values=False)
    assert collector.state.memory.keys() == {"actor"}


def test_another_number_of_envs_begins_anew() -> None:
    policy = make_policy(Memory("lstm", SIZE))
    collector = Collector(policy, at_once())
    assert collector.collect(n_steps=4) is not None
    other = vec(*scripted()[:2])
    again = Collector(policy, other, collector.state)
    again.state.last_obs = None
    batch = again.collect(n_steps=4)
    assert batch is not None
    Walk(policy, 2).check(batch)


def test_a_copy_that_acts_elsewhere_has_the_memory_too() -> None:
    """Here the copy's device has another name only."""
    policy, env = make_policy(Memory("lstm", SIZE)), at_once()
    collector, walk = Collector(policy, env, act_device="cpu:0"), Walk(policy, env.num_envs)
    for _ in range(3):
        batch = collector.collect(n_steps=4)
        assert batch is not None
        walk.check(batch)
        assert collector.acting is not policy


@pytest.mark.parametrize(
    ("name", "cls"),
    [("image", ActorCriticCnnPolicy), ("dict", MultiInputActorCriticPolicy), ("discrete", ActorCriticPolicy)],
)
def test_gsde_and_other_observations(name: str, cls: Any) -> None:
    """Log-probs against those of the policy, stepped through one observation at a time."""
    space = spaces.Box(0, 255, (1, 36, 36), np.uint8) if name == "image" else OBSERVATION_SPACES[name]
    box = ACTION_SPACES["box"]
    envs = [ScriptedEnv(lengths, (False, True), 1.0, space, box) for lengths in ((3, 5), (9, 2))]
    policy: Any = extended(cls)(space, box, lambda _: 1e-3, memory=Memory("gru", SIZE), use_sde=True)
    collector, state = Collector(policy, vec(*envs)), None
    for _ in range(3):
        batch = collector.collect(n_steps=4)
        assert batch is not None
        assert batch.log_probs is not None
        observed: Any = batch.observations
        for t in range(4):
            obs = {k: x[t] for k, x in observed.items()} if name == "dict" else observed[t]
            with th.no_grad():
                distribution, state = policy.next_distribution(obs, state, batch.timesteps[t] == 0)
            assert th.allclose(distribution.log_prob(batch.actions[t]), batch.log_probs[t], atol=1e-5)


def test_the_buffers_memory_is_that_before_its_first_row() -> None:
    """A buffer that is filled in pieces by ``fill`` may be scored later."""
    policy, env = make_policy(Memory("gru", SIZE, critic="shared")), at_once()
    collector, walk = Collector(policy, env), Walk(policy, env.num_envs)
    kept = []
    for _ in range(3):
        buffer = TrajectoryRolloutBuffer(
            4, policy.observation_space, policy.action_space, policy.device, n_envs=env.num_envs
        )
        sampler = collector.fill(buffer, n_steps=4)
        assert sampler is not None
        kept.append((buffer, sampler))
    for buffer, sampler in kept:
        batch = make_batch(policy, buffer, sampler, with_values=True, bootstrap_truncated=True, n_episodes=None)
        walk.check(batch)


@pytest.mark.parametrize("critic", ["own", "shared", "none"])
def test_replayed_trajectories_begin_with_nothing(critic: Any) -> None:
    """Of unequal length, padded to the longest; the states that follow truncated ones are valued with their memory."""
    policy = make_policy(Memory("lstm", SIZE, 2, critic))
    buffer = TrajectoryReplayBuffer(50, policy.observation_space, policy.action_space)
    rng = np.random.default_rng(0)
    for length, terminated in ((4, True), (7, False), (1, False), (3, True), (2, False)):
        observations = rng.normal(size=(length + 1, 3)).astype(np.float32)
        actions, log_probs = rng.integers(3, size=length), np.full(length, -1.0)
        buffer.add_trajectories(
            [
                Trajectory(
                    observations[:-1], actions, np.ones(length), log_probs, terminated, not terminated, observations[-1]
                )
            ]
        )
    batch = buffer.batch(buffer.trajectories, bootstrap_truncated=True)
    for _ in range(2):
        batch.log_probs = score_batch(policy, batch, with_values=True)
        assert Walk(policy, 5).check(batch) == 3
