"""``train()`` uses what the rollout buffer holds, whoever has filled it, as SB3's algorithms do."""

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import configure_logger, obs_as_tensor

from sb3_pg import NPG, TRPO, ActorCritic, KLPenaltyPG, Reinforce
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES, ScriptedEnv, parameters, policy_for, ready_to_collect, vec

CLASSES = (Reinforce, ActorCritic, NPG, TRPO, KLPenaltyPG)
pytestmark = pytest.mark.filterwarnings("ignore:batch_size=.* does not divide")


def make(cls: Any, n_envs: int = 2, **kwargs: Any) -> Any:
    env = make_vec_env("CartPole-v1", n_envs, seed=0)
    model = cls("MlpPolicy", env, seed=0, device="cpu", **{"n_steps": 16, **kwargs})
    model.set_logger(configure_logger())
    return model


def fill(model: Any, seed: int = 0, n_steps: int = 16) -> None:
    """Fill the model's buffer with made-up steps."""
    generator = np.random.default_rng(seed)
    buffer, n_envs = model.rollout_buffer, model.n_envs
    buffer.reset()
    starts = np.ones(n_envs, dtype=bool)
    for _ in range(n_steps):
        obs: Any = example(model.observation_space, generator, n_envs)
        with th.no_grad():
            tensor = obs_as_tensor(obs, model.device)
            distribution = model.policy.get_distribution(tensor)
            actions = distribution.mode()
            values, log_probs = model.policy.predict_values(tensor), distribution.log_prob(actions)
        buffer.add(obs, actions.numpy(), generator.normal(size=n_envs), starts, values, log_probs)
        starts = generator.random(n_envs) < 0.2
    buffer.compute_returns_and_advantage(th.as_tensor(generator.normal(size=(n_envs, 1)), dtype=th.float32), starts)


def example(space: spaces.Space[Any], generator: np.random.Generator, n_envs: int) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: example(part, generator, n_envs) for key, part in space.spaces.items()}
    space.seed(int(generator.integers(1000)))
    return np.stack([space.sample() for _ in range(n_envs)])


@pytest.mark.parametrize("after", ["nothing", "learn", "an update by hand"])
@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("normalize_advantage", [False, True])
def test_actor_critic_moves_as_a2c(after: str, n_envs: int, normalize_advantage: bool) -> None:
    results = []
    for cls in (A2C, ActorCritic):
        model = make(cls, n_envs, normalize_advantage=normalize_advantage, ent_coef=0.01)
        if after == "learn":
            model.learn(64)
        elif after == "an update by hand":
            fill(model, seed=1)
            model.train()
        before = parameters(model)
        fill(model)
        model.train()
        results.append(parameters(model))
        assert (results[-1] - before).abs().max() > 1e-3
    assert (results[0] - results[1]).abs().max() < 1e-5


@pytest.mark.parametrize("observation_space", ["image", "dict", "discrete"])
@pytest.mark.parametrize("action_space", ACTION_SPACES)
def test_actor_critic_moves_as_a2c_in_all_spaces(observation_space: str, action_space: str) -> None:
    policy = policy_for(OBSERVATION_SPACES[observation_space])
    results = []
    for cls in (A2C, ActorCritic):
        env = ScriptedEnv(
            observation_space=OBSERVATION_SPACES[observation_space], action_space=ACTION_SPACES[action_space]
        )
        model: Any = cls(policy, vec(env), n_steps=16, seed=0, device="cpu")
        model.set_logger(configure_logger())
        before = parameters(model)
        fill(model)
        model.train()
        results.append(parameters(model))
        assert (results[-1] - before).abs().max() > 1e-4
    assert (results[0] - results[1]).abs().max() < 1e-5


@pytest.mark.parametrize("after_learn", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_trains_on_what_was_filled_in(cls: Any, after_learn: bool) -> None:
    """Two different fillings move the policy differently, the same one alike."""

    def moved(seed: int) -> th.Tensor:
        model = make(cls)
        if after_learn:
            model.learn(64)
        before = parameters(model)
        fill(model, seed)
        th.manual_seed(0)
        model.train()
        return parameters(model) - before

    assert th.equal(moved(1), moved(1))
    assert moved(1).abs().max() > 0
    assert (moved(1) - moved(2)).abs().max() > 1e-6


@pytest.mark.parametrize("cls", CLASSES)
def test_complete_episode_mode_takes_any_number_of_steps(cls: Any) -> None:
    model = make(cls, n_steps=None, n_episodes=2)
    before = parameters(model)
    fill(model, n_steps=16)
    model.train()
    assert not th.equal(parameters(model), before)
    model.learn(10)  # complete episodes again
    assert model.rollout_buffer.dones.sum() == 2


def test_the_same_rollout_collected_and_added_by_hand_trains_alike() -> None:
    kwargs: dict[str, Any] = {"n_steps": 40, "learning_rate": 1e-3}
    collected, copied = make(ActorCritic, **kwargs), make(ActorCritic, **kwargs)
    collected.learn(80)
    source, target = collected.rollout_buffer, copied.rollout_buffer
    assert source.dones.sum() > 0
    target.reset()
    for t in range(40):
        values, log_probs = (th.as_tensor(array[t]) for array in (source.values, source.log_probs))
        starts = source.episode_starts[t]
        target.add(source.observations[t], source.actions[t], source.rewards[t], starts, values, log_probs)
    with th.no_grad():
        last = make(ActorCritic).policy.predict_values(th.as_tensor(collected._last_obs))
    target.compute_returns_and_advantage(last, source.dones[-1])
    assert np.allclose(target.advantages, source.advantages, atol=1e-5)
    copied.train()
    assert (parameters(copied) - parameters(collected)).abs().max() < 1e-5


@pytest.mark.parametrize("n_steps", [7, 16, 64])
@pytest.mark.parametrize("cls", CLASSES)
def test_collect_rollouts_collects_as_many_steps_as_it_is_told(cls: Any, n_steps: int) -> None:
    model = make(cls)
    callback = ready_to_collect(model)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, n_steps)
    buffer = model.rollout_buffer
    assert model.num_timesteps == 2 * n_steps
    assert buffer.full
    assert buffer.rewards.shape == buffer.advantages.shape == (n_steps, 2)
    before = parameters(model)
    model.train()
    assert not th.equal(parameters(model), before)
    model.learn(32)  # n_steps of the constructor again
    assert model.num_timesteps == 32
    assert buffer.rewards.shape == (16, 2)
    fill(model)  # which takes as many as the constructor has said, too
    assert buffer.full


@pytest.mark.parametrize("cls", CLASSES)
def test_segments_may_be_collected_in_complete_episode_mode(cls: Any) -> None:
    model = make(cls, n_steps=None, n_episodes=2)
    callback = ready_to_collect(model)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 64)
    assert model.num_timesteps == 128
    before = parameters(model)
    model.train()
    assert not th.equal(parameters(model), before)


@pytest.mark.parametrize("n_steps", [0, -1])
def test_a_number_of_steps_that_is_none_is_refused(n_steps: int) -> None:
    model = make(ActorCritic)
    callback = ready_to_collect(model)
    with pytest.raises(ValueError, match="n_rollout_steps"):
        model.collect_rollouts(model.env, callback, model.rollout_buffer, n_steps)


def test_segments_take_a_critic() -> None:
    model = make(Reinforce, n_steps=None, n_episodes=2, baseline="leave_one_out")
    callback = ready_to_collect(model)
    with pytest.raises(ValueError, match=r"n_rollout_steps=64 .*critic"):
        model.collect_rollouts(model.env, callback, model.rollout_buffer, 64)
    assert model.num_timesteps == 0


@pytest.mark.parametrize("how", ["new", "reset", "half full", "foreign"])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_buffer_without_a_rollout_is_refused(cls: Any, how: str) -> None:
    """And not the rollout before it used once more."""
    kwargs: dict[str, Any] = {"rollout_buffer_class": RolloutBuffer} if how == "foreign" else {}
    model = make(cls, **kwargs)
    if how in ("reset", "half full"):
        model.learn(32)
        model.rollout_buffer.reset()
    if how == "half full":
        buffer, obs = model.rollout_buffer, model.env.reset()
        for _ in range(5):
            buffer.add(obs, np.zeros(2), np.ones(2), np.zeros(2), th.zeros(2), th.zeros(2))
    before = parameters(model)
    held = {"half full": "holds 5 of 16 steps", "foreign": "not full"}.get(how, "holds 0")
    with pytest.raises(ValueError, match=f"rollout_buffer .*{held}"):
        model.train()
    assert th.equal(parameters(model), before)


@pytest.mark.parametrize("kwargs", [{"critic_fit": "before"}, {"recompute_advantage": True, "n_critic_updates": 2}])
def test_estimates_that_are_made_anew_need_a_rollout_that_was_collected(kwargs: dict[str, Any]) -> None:
    model = make(ActorCritic, **kwargs)
    fill(model)
    before = parameters(model)
    with pytest.raises(ValueError, match=f"{next(iter(kwargs))}=.*rollout_buffer"):
        model.train()
    assert th.equal(parameters(model), before)


def test_a_component_wise_baseline_needs_a_rollout_that_was_collected() -> None:
    kwargs: dict[str, Any] = {"baseline": "optimal", "baseline_kwargs": {"component_wise": True}}
    model = make(Reinforce, n_steps=None, n_episodes=4, **kwargs)
    fill(model)
    with pytest.raises(ValueError, match=r"baseline='optimal'.*rollout_buffer"):
        model.train()


def test_a_foreign_buffer_filled_by_hand_moves_as_a2c() -> None:
    results = []
    for cls in (A2C, ActorCritic):
        model = make(cls, rollout_buffer_class=RolloutBuffer)
        model.learn(64)
        fill(model)
        model.train()
        results.append(parameters(model))
    assert (results[0] - results[1]).abs().max() < 1e-5


@pytest.mark.parametrize("buffer_class", [None, RolloutBuffer])
def test_what_is_changed_between_collecting_and_training_counts(buffer_class: Any) -> None:
    """As in a loop of the user's own."""
    results = []
    for cls in (A2C, ActorCritic):
        model = make(cls, rollout_buffer_class=buffer_class)
        callback = ready_to_collect(model)
        model.collect_rollouts(model.env, callback, model.rollout_buffer, 16)
        model.rollout_buffer.advantages[:] = np.linspace(-1, 1, 32).reshape(16, 2)
        model.rollout_buffer.returns[:] = 3
        model.train()
        results.append(parameters(model))
    assert (results[0] - results[1]).abs().max() < 1e-5


@pytest.mark.parametrize("n_steps", [5, 16])
def test_a_callback_may_shape_rewards_and_compute_the_advantages_again(n_steps: int) -> None:
    """Episodes end in time limits, whose values SB3 adds to the rewards, and which count here likewise."""

    class Shapes(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            buffer = self.locals["rollout_buffer"]
            buffer.rewards += np.sin(np.arange(buffer.rewards.size)).reshape(buffer.rewards.shape)
            buffer.compute_returns_and_advantage(self.locals["values"], self.locals["dones"])

    results = []
    for cls in (A2C, ActorCritic):
        env = vec(*(ScriptedEnv(lengths=(3, 4), truncate=(True, False), first_reward=i) for i in range(2)))
        model: Any = cls("MlpPolicy", env, n_steps=n_steps, gae_lambda=0.9, seed=0, device="cpu")
        model.learn(6 * n_steps, callback=Shapes())
        results.append(parameters(model))
    assert (results[0] - results[1]).abs().max() < 1e-5


@pytest.mark.parametrize("cls", CLASSES)
def test_a_rollout_in_a_buffer_of_ones_own_is_not_trained_on(cls: Any) -> None:
    """As in SB3, ``train`` reads the model's buffer."""
    model = make(cls)
    callback = ready_to_collect(model)
    own = type(model.rollout_buffer)(16, model.observation_space, model.action_space, model.device, n_envs=2)
    fill(model, seed=1)
    model.collect_rollouts(model.env, callback, own, 16)
    assert own.full
    th.manual_seed(0)
    model.train()
    other = make(cls)
    fill(other, seed=1)
    th.manual_seed(0)
    other.train()
    assert (parameters(model) - parameters(other)).abs().max() < 1e-6


def test_a_skipped_rollout_is_not_trained_on() -> None:
    """Neither is the one before it, and there is no error."""

    class Breaks(ScriptedEnv):
        def step(self, action: Any) -> Any:
            obs, reward, terminated, truncated, info = super().step(action)
            return obs, np.nan if self.reward == 20 else reward, terminated, truncated, info

    model = ActorCritic("MlpPolicy", vec(Breaks()), n_steps=8, on_nonfinite="skip", seed=0, device="cpu")
    with pytest.warns(UserWarning, match="skipped"):
        model.learn(32)
    assert model._n_updates == 3
