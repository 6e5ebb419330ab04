"""What an expert does is kept as its env has shown it, in complete episodes whose number follows from nothing else."""

import copy
import random
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import stable_baselines3
import torch as th
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

from sb3_pg import ActorCritic, Demonstrations, OffPAC, Reinforce
from sb3_pg.action_masks import MASK_KEY
from sb3_pg.envs import make_vec_env as make_masked
from sb3_pg.rollout import EndlessEpisodeError
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES, ScriptedEnv, policy_for, vec


def normalized(env: Any) -> VecNormalize:
    """The envs, with statistics that are not those of a new wrapper."""
    wrapped = VecNormalize(env)
    wrapped.reset()
    for _ in range(40):
        wrapped.step(np.array([wrapped.action_space.sample() for _ in range(wrapped.num_envs)]))
    return wrapped


def expert(env: Any = "CartPole-v1", cls: Any = Reinforce, **kwargs: Any) -> Any:
    return cls("MlpPolicy", env, seed=0, device="cpu", **kwargs)


def run_alone(model: Any, env: gym.Env[Any, Any], n_episodes: int, seed: int, see: Callable[[Any], Any]) -> list[Any]:
    """Episodes of one env without SB3's vectorized envs: observations, actions, rewards, final one, truncated."""
    episodes = []
    obs, _ = env.reset(seed=seed)
    for _ in range(n_episodes):
        rows: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
        state, ended, truncated = None, False, False
        while not ended:
            action, state = model.predict(see(obs), state, np.array([not rows[0]]), deterministic=True)
            rows[0].append(obs)
            rows[1].append(action)
            obs, reward, terminated, truncated, _ = env.step(action)
            rows[2].append(reward)
            ended = terminated or truncated
        episodes.append((*map(np.array, rows), obs, truncated))
        obs, _ = env.reset()
    return episodes


def require_episodes(demos: Demonstrations, expected: list[Any]) -> None:
    assert demos.n_episodes == len(expected)
    assert demos.rewards is not None
    assert demos.final_observations is not None
    for n, (steps, (observations, actions, rewards, final, truncated)) in enumerate(
        zip(demos.episodes, expected, strict=True)
    ):
        assert isinstance(demos.observations, np.ndarray)
        assert isinstance(demos.final_observations, np.ndarray)
        np.testing.assert_allclose(demos.observations[steps], observations, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(demos.actions[steps], actions, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(demos.rewards[steps], rewards, rtol=1e-5)
        np.testing.assert_allclose(demos.final_observations[n], final, rtol=1e-5, atol=1e-6)
        assert demos.truncated[steps.stop - 1] == truncated
        assert demos.terminated[steps.stop - 1] == (not truncated)


@pytest.mark.parametrize("given", ["id", "env with other statistics"])
def test_the_expert_sees_its_own_normalization_and_what_the_env_showed_is_kept(given: str) -> None:
    own = normalized(make_vec_env("CartPole-v1", 1, seed=1))
    model = expert(own)
    env: Any = "CartPole-v1"
    if given != "id":
        env = normalized(make_vec_env("CartPole-v1", 2, seed=9))
    before = copy.deepcopy((own.obs_rms, own.ret_rms))
    demos = Demonstrations.from_model(model, env, 5, seed=7, n_envs=2 if given == "id" else None)
    see = own.normalize_obs
    alone = [run_alone(model, gym.make("CartPole-v1"), n, 7 + i, see) for i, n in enumerate((3, 2))]
    require_episodes(demos, [alone[i][n] for n in range(3) for i in range(2) if n < len(alone[i])])
    for mine, was in zip((own.obs_rms, own.ret_rms), before, strict=True):
        for name, value in vars(was).items():
            np.testing.assert_array_equal(vars(mine)[name], value)


def test_normalization_of_the_given_env_is_used_where_the_model_has_none_and_left_as_it_was() -> None:
    own = normalized(make_vec_env("Pendulum-v1", 1, seed=1))
    model = expert(own, max_episode_steps=200)
    loaded = copy.copy(model)
    loaded._vec_normalize_env = None
    loaded.env = None
    env = normalized(make_vec_env("Pendulum-v1", 2, seed=9))
    env.obs_rms = own.obs_rms
    flags = env.training, env.norm_obs, env.norm_reward
    demos = Demonstrations.from_model(loaded, env, 2, seed=3)
    alone = [run_alone(model, gym.make("Pendulum-v1"), 1, 3 + i, own.normalize_obs)[0] for i in range(2)]
    require_episodes(demos, alone)
    assert demos.truncated.sum() == 2
    assert (env.training, env.norm_obs, env.norm_reward) == flags


def test_no_episode_is_more_likely_because_it_is_short() -> None:
    envs = vec(ScriptedEnv((2,), (True,)), ScriptedEnv((9,), (False,), 100.0), ScriptedEnv((4,), (False, True), 50.0))
    demos = Demonstrations.from_model(expert(ScriptedEnv()), envs, 5)
    lengths = [steps.stop - steps.start for steps in demos.episodes]
    assert lengths == [2, 9, 4, 2, 9]
    assert demos.rewards is not None
    assert demos.rewards[[0, 2, 11, 15, 17]].tolist() == [1, 100, 50, 3, 109]
    assert demos.truncated[[1, 10, 14, 16, 25]].tolist() == [True, False, False, True, False]


@pytest.mark.parametrize(("observed", "acted"), [("dict", "box"), ("image", "multi_discrete"), ("discrete", "matrix")])
def test_spaces(observed: str, acted: str) -> None:
    space = OBSERVATION_SPACES[observed]

    def env() -> gym.Env[Any, Any]:
        return ScriptedEnv((3, 5), observation_space=copy.deepcopy(space), action_space=ACTION_SPACES[acted])

    model = Reinforce(policy_for(space), env(), seed=0, device="cpu")
    demos = Demonstrations.from_model(model, env(), 2, deterministic=False)
    demos.check_spaces(model.observation_space, model.action_space)
    demos.check_spaces(space, ACTION_SPACES[acted])
    assert demos.n_steps == 8


def _draws(seed: int | None = 0) -> tuple[float, ...]:
    """A number of each global generator."""
    if seed is not None:
        set_random_seed(seed)
    return random.random(), np.random.rand(), float(th.rand(1))  # noqa: NPY002 (SB3 seeds it)


def test_samples_follow_from_the_seed_and_other_draws_do_not_notice() -> None:
    model = expert()
    draws = _draws()
    set_random_seed(0)
    first = Demonstrations.from_model(model, "CartPole-v1", 3, deterministic=False, seed=5)
    assert _draws(seed=None) == draws
    again = Demonstrations.from_model(model, "CartPole-v1", 3, deterministic=False, seed=5)
    other = Demonstrations.from_model(model, "CartPole-v1", 3, deterministic=False, seed=6)
    np.testing.assert_array_equal(first.observations, again.observations)
    assert first.actions.tolist() == again.actions.tolist() != other.actions.tolist()


def test_random_actions_of_dqn_follow_from_the_seed() -> None:
    model = expert(cls=stable_baselines3.DQN)
    model.exploration_rate = 0.5
    drawn = [
        Demonstrations.from_model(model, "CartPole-v1", 3, deterministic=False, seed=seed).actions.tolist()
        for seed in (5, 5, 6)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("kind", ["gru", "RecurrentPPO"])
def test_an_expert_with_memory(kind: str) -> None:
    model: Any
    if kind == "gru":
        model = expert(memory="gru")
    else:
        model = sb3_contrib.RecurrentPPO("MlpLstmPolicy", "CartPole-v1", seed=0, device="cpu")
    demos = Demonstrations.from_model(model, "CartPole-v1", 4, seed=1, n_envs=2)
    alone = [run_alone(model, gym.make("CartPole-v1"), 2, 1 + i, lambda obs: obs) for i in range(2)]
    require_episodes(demos, [alone[i][n] for n in range(2) for i in range(2)])


@pytest.mark.parametrize(
    "cls", [stable_baselines3.A2C, stable_baselines3.DQN, OffPAC], ids=lambda cls: str(cls.__name__)
)
def test_other_experts(cls: Any) -> None:
    model = expert(cls=cls)
    demos = Demonstrations.from_model(model, "CartPole-v1", 1, seed=1)
    require_episodes(demos, run_alone(model, gym.make("CartPole-v1"), 1, 1, lambda obs: obs))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("cls", [ActorCritic, sb3_contrib.MaskablePPO], ids=["ours", "MaskablePPO"])
def test_masks_are_kept_with_the_observations(cls: Any, normalize: bool) -> None:
    made = make_masked("MaskedGrid-v0", 2, "dummy", use_action_masks=cls is ActorCritic)
    policy = "MultiInputPolicy" if cls is ActorCritic else "MlpPolicy"
    model = cls(policy, normalized(made) if normalize else made, seed=0, device="cpu")
    demos = Demonstrations.from_model(model, "MaskedGrid-v0", 4, deterministic=False, max_episode_steps=100)
    assert isinstance(demos.observations, dict)
    masks = demos.observations[MASK_KEY]
    assert masks.dtype == np.int8
    assert masks[np.arange(len(demos)), demos.actions].all()
    assert not masks.all()
    student = ActorCritic("MultiInputPolicy", "MaskedGrid-v0", seed=0, device="cpu")
    demos.check_spaces(student.observation_space, student.action_space)


def test_steps_that_only_reset_an_env_are_left_out() -> None:
    class NextStep(SyncVectorEnv):
        """A subclass keeps its NEXT_STEP mode."""

    envs = NextStep([lambda: ScriptedEnv((2, 3)), lambda: ScriptedEnv((4,), first_reward=50.0)])
    assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    demos = Demonstrations.from_model(expert(ScriptedEnv()), envs, 4)
    assert [steps.stop - steps.start for steps in demos.episodes] == [2, 4, 3, 4]
    assert demos.rewards is not None
    assert demos.rewards.tolist() == [1, 2, 50, 51, 52, 53, 3, 4, 5, 54, 55, 56, 57]


@pytest.mark.filterwarnings("ignore:.*observations should be in")  # SB3's bounds of stacked frames are in other order
def test_an_expert_of_stacked_frames_takes_the_same_wrapper() -> None:
    model = expert(VecFrameStack(make_vec_env("CartPole-v1", 1), 2))
    with pytest.raises(
        ValueError, match=r"must have shape \(8,\) a row, .*, got \(4,\). Give a VecEnv with the wrappers"
    ):
        Demonstrations.from_model(model, "CartPole-v1")
    demos = Demonstrations.from_model(model, VecFrameStack(make_vec_env("CartPole-v1", 2), 2), 2)
    demos.check_spaces(model.observation_space, model.action_space)
    inside = expert(VecFrameStack(normalized(make_vec_env("CartPole-v1", 1)), 2))
    with pytest.raises(ValueError, match="env must have its VecNormalize around all wrappers that change a shape"):
        Demonstrations.from_model(inside, VecFrameStack(make_vec_env("CartPole-v1", 2), 2))


def test_refused_arguments() -> None:
    model = expert()
    calls: list[tuple[Any, ...]] = [
        (model.policy, "CartPole-v1", {}, TypeError, "model must be a model of Stable-Baselines3.*, got "),
        (model, None, {}, TypeError, "env must be the id of a registered env, an env or a VecEnv, got None"),
        (model, model.get_env(), {}, ValueError, "env must not be the model's own"),
        (model, "Pendulum-v1", {}, ValueError, r"env must have the model's actions, Discrete\(2\), got Box"),
        (model, "NoSuchEnv-v0", {}, gym.error.NameNotFound, "NoSuchEnv"),
        (model, "CartPole-v1", {"n_episodes": 0}, ValueError, "n_episodes must be at least 1, got 0"),
        (model, "CartPole-v1", {"n_episodes": 2.5}, TypeError, "n_episodes must be an integer at least 1, got 2.5"),
        (model, "CartPole-v1", {"n_envs": 0}, ValueError, "n_envs must be at least 1, got 0"),
        (model, gym.make("CartPole-v1"), {"n_envs": 2}, ValueError, "n_envs must be None, since env is not the id"),
        (model, "CartPole-v1", {"max_episode_steps": 0}, ValueError, "max_episode_steps must be at least 1, got 0"),
        (
            expert(ScriptedEnv(), max_episode_steps=9),
            ScriptedEnv((1000,)),
            {"max_episode_steps": 20},
            EndlessEpisodeError,
            "The episode of env 0 has not ended after max_episode_steps=20 steps",
        ),
        (
            ActorCritic("MultiInputPolicy", "MaskedGrid-v0"),
            "CartPole-v1",
            {},
            ValueError,
            "env must have the model's actions|use_action_masks=True takes an env with",
        ),
    ]
    for of_model, env, kwargs, error, message in calls:
        with pytest.raises(error, match=message):
            Demonstrations.from_model(of_model, env, **kwargs)


def test_an_error_of_the_env_is_the_envs() -> None:
    class Broken(ScriptedEnv):
        def step(self, action: Any) -> Any:
            raise RuntimeError("the simulator crashed")

    env = VecNormalize(DummyVecEnv([lambda: Broken(action_space=spaces.Discrete(3))]))
    with pytest.raises(RuntimeError, match="the simulator crashed"):
        Demonstrations.from_model(expert(ScriptedEnv()), env, 1)
    assert env.training
    assert env.norm_obs
