"""Gymnasium's vector envs through the adapter, beside SB3's DummyVecEnv on the same envs."""

from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.wrappers import TimeLimit
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_pg.envs import GymVectorAdapter
from sb3_pg.envs.gym_vector import rows_of
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES, ScriptedEnv

SMALL: dict[str, Any] = {"policy_kwargs": {"net_arch": [4]}, "device": "cpu", "seed": 0}


class Informative(ScriptedEnv):
    """Says where it is in its infos."""

    def reset(self, **kwargs: Any) -> Any:
        obs, _ = super().reset(**kwargs)
        return obs, {"episode_number": self.episode, "options": str(kwargs.get("options") or None)}

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, _ = super().step(action)
        info: dict[str, Any] = {"t": self.t, "nested": {"square": float(self.t**2)}}
        return obs, reward, terminated, truncated, info | ({"end": "here"} if terminated or truncated else {})


def two(**kwargs: Any) -> list[Any]:
    """Functions that make envs whose episodes have different lengths and endings."""

    def own() -> Any:  # spaces, with random numbers of their own
        return deepcopy({"observation_space": OBSERVATION_SPACES["vector"]} | kwargs)

    return [
        lambda: Informative((3, 1, 2), (False, True), **own()),
        lambda: Informative((2, 4), (True, False, False), first_reward=100.0, **own()),
    ]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(np.array_equal(a, b))


def walk(env: VecEnv, n_steps: int) -> list[Any]:
    """Everything that an env says, with the same seed and actions."""
    env.seed(5)
    env.action_space.seed(0)
    said: list[Any] = [(env.reset(), [dict(info) for info in env.reset_infos])]
    for _ in range(n_steps):
        stepped: Any = env.step(np.stack([env.action_space.sample() for _ in range(env.num_envs)]))
        obs, rewards, dones, infos = stepped
        for info in infos:
            info.get("episode", {}).pop("t", None)
            if not info.get("TimeLimit.truncated"):
                info.pop("TimeLimit.truncated", None)  # SB3 puts False everywhere, the adapter where an episode ended
        said.append((obs.copy(), rewards, dones, infos, [dict(info) for info in env.reset_infos]))
    env.close()
    return said


def sync(mode: AutoresetMode, **kwargs: Any) -> VectorEnv[Any, Any, Any]:
    return SyncVectorEnv(two(**kwargs), autoreset_mode=mode)


VECTOR_ENVS = {
    "sync": lambda: sync(AutoresetMode.SAME_STEP),
    "sync by default": lambda: SyncVectorEnv(two()),
    "without copies": lambda: SyncVectorEnv(two(), copy=False),
    "disabled": lambda: sync(AutoresetMode.DISABLED),
    "async": lambda: AsyncVectorEnv(two(), autoreset_mode=AutoresetMode.SAME_STEP),
    "wrapped": lambda: VectorWrapper(sync(AutoresetMode.SAME_STEP)),
}


@pytest.mark.parametrize("make", VECTOR_ENVS.values(), ids=VECTOR_ENVS)
def test_says_what_dummy_vec_env_says(make: Any) -> None:
    theirs = walk(DummyVecEnv([lambda fn=fn: Monitor(fn()) for fn in two()]), 25)  # type: ignore[misc]
    ours = walk(GymVectorAdapter(make()), 25)
    for step, (expected, seen) in enumerate(zip(theirs, ours, strict=True)):
        assert len(expected) == len(seen)
        for ours_part, theirs_part in zip(seen, expected, strict=True):
            if isinstance(theirs_part, list):
                for mine, info in zip(ours_part, theirs_part, strict=True):
                    assert mine.keys() == info.keys(), step
                    assert all(same(mine[key], info[key]) for key in info), (step, mine, info)
            else:
                assert same(ours_part, theirs_part), step
                assert np.asarray(ours_part).dtype == np.asarray(theirs_part).dtype


def test_dict_observations_and_their_ends() -> None:
    space = {"observation_space": OBSERVATION_SPACES["dict"]}
    env = GymVectorAdapter(sync(AutoresetMode.SAME_STEP, **space))
    obs = env.reset()
    assert {key: value.shape for key, value in obs.items()} == {"vec": (2, 2), "class": (2,)}
    for _ in range(2):
        obs, _, dones, infos = env.step(np.zeros(2, dtype=int))
    assert dones.tolist() == [False, True]
    final = infos[1]["terminal_observation"]
    assert final.keys() == obs.keys()
    assert not np.array_equal(final["vec"], obs["vec"][1])


@pytest.mark.parametrize("name", ACTION_SPACES)
def test_every_action_space(name: str) -> None:
    env = GymVectorAdapter(SyncVectorEnv(two(action_space=ACTION_SPACES[name])))
    A2C("MlpPolicy", env, n_steps=4, **SMALL).learn(16)
    taken = env.get_attr("actions")[0]
    assert all(ACTION_SPACES[name].contains(np.asarray(action)) for action in taken)


def native(n_envs: int = 3) -> GymVectorAdapter:
    return GymVectorAdapter(gym.make_vec("CartPole-v1", n_envs, "vector_entry_point"))


def test_native_cartpole_steps_as_the_scalar_one() -> None:
    vector: Any = native(4)
    scalar: Any = gym.make("CartPole-v1").unwrapped
    rng = np.random.default_rng(0)
    vector.seed(0)
    states = vector.reset()
    with vector.skip_reset_steps() as resetting:
        assert resetting is not None
        for _ in range(200):
            actions = rng.integers(0, 2, 4)
            resets_next = resetting.copy()
            following, rewards, dones, infos = vector.step(actions)
            for i in np.flatnonzero(~resets_next):
                scalar.reset()
                scalar.state = states[i].astype(np.float64)
                expected, reward, terminated, _, _ = scalar.step(int(actions[i]))
                assert np.allclose(following[i], expected, atol=1e-6)
                assert (rewards[i], dones[i]) == (reward, terminated)
                if dones[i]:
                    assert np.array_equal(infos[i]["terminal_observation"], following[i])
            assert np.abs(following[resets_next]).max(initial=0) <= 0.05  # where CartPole begins
            assert not rewards[resets_next].any()
            states = following


def test_late_resets_are_no_steps_of_an_episode() -> None:
    env = GymVectorAdapter(VectorWrapper(sync(AutoresetMode.NEXT_STEP)))
    env.reset()
    episodes, resets = [], []
    with env.skip_reset_steps() as resets_next:
        assert resets_next is not None
        for _ in range(12):
            resetting = resets_next.copy()
            _, rewards, dones, infos = env.step(np.zeros(2, dtype=int))
            assert not (resetting & dones).any()
            assert not rewards[resetting].any()
            episodes += [(i, info["episode"]["r"], info["episode"]["l"]) for i, info in enumerate(infos) if dones[i]]
            assert all(infos[i] == {} for i in np.flatnonzero(resetting))
            resets += [(i, env.reset_infos[i]["episode_number"]) for i in np.flatnonzero(resetting)]
    first = [(r, n) for i, r, n in episodes if i == 0]
    assert first == [(1 + 2 + 3, 3), (4, 1), (5 + 6, 2), (7 + 8 + 9, 3)][: len(first)]
    assert len(first) >= 3
    assert [n for i, n in resets if i == 0][:3] == [1, 2, 3]


@pytest.mark.parametrize("algorithm", [PPO, A2C, DQN])
def test_late_resets_are_refused_by_sb3s_own(algorithm: Any) -> None:
    with pytest.raises(RuntimeError, match=r"NEXT_STEP.*make_vec_env"):
        algorithm("MlpPolicy", native(), **SMALL).learn(10)
    model = algorithm("MlpPolicy", "CartPole-v1", **SMALL)
    with pytest.raises(RuntimeError, match="NEXT_STEP"):
        evaluate_policy(model, native(), n_eval_episodes=1)


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_sb3s_own_learn_on_the_others(algorithm: Any, mode: AutoresetMode) -> None:
    def make() -> list[Any]:
        return [lambda: TimeLimit(gym.make("CartPole-v1").unwrapped, 30)] * 2

    def monitored(fn: Any) -> Any:
        return lambda: Monitor(fn())

    kwargs: Any = {**SMALL, "n_steps": 64} | ({"batch_size": 64} if algorithm is PPO else {})
    ours = algorithm("MlpPolicy", GymVectorAdapter(SyncVectorEnv(make(), autoreset_mode=mode)), **kwargs).learn(256)
    theirs = algorithm("MlpPolicy", DummyVecEnv([monitored(fn) for fn in make()]), **kwargs).learn(256)
    assert [(e["r"], e["l"]) for e in ours.ep_info_buffer] == [(e["r"], e["l"]) for e in theirs.ep_info_buffer]
    for name, value in theirs.policy.state_dict().items():
        assert np.array_equal(ours.policy.state_dict()[name], value), name


def test_seeds_make_the_same_episodes() -> None:
    def episode(env: VecEnv, seed: int | None) -> Any:
        env.seed(seed)
        return env.reset()

    env = native()
    assert np.array_equal(episode(env, 3), episode(env, 3))
    assert not np.array_equal(episode(env, 3), episode(env, 4))
    assert not np.array_equal(episode(env, 3), env.reset())  # seeds count once


def test_options_reach_the_envs_once() -> None:
    env = GymVectorAdapter(SyncVectorEnv(two()))
    env.set_options({"size": 2})
    env.reset()
    assert [info["options"] for info in env.reset_infos] == ["{'size': 2}"] * 2
    env.reset()
    assert [info["options"] for info in env.reset_infos] == ["None"] * 2
    env.set_options([{"size": 2}, {"size": 3}])
    with pytest.raises(ValueError, match="options must be the same for all envs"):
        env.reset()


def test_attributes_and_methods_of_single_envs() -> None:
    env = GymVectorAdapter(SyncVectorEnv([lambda fn=fn: TimeLimit(fn(), 9) for fn in two()]))  # type: ignore[misc]
    env.reset()
    assert env.get_attr("resets") == [1, 1]
    assert env.get_attr("lengths", 1) == [(2, 4)]
    env.set_attr("t", 7)
    assert env.get_attr("t") == [7, 7]
    env.set_attr("t", [1], indices=[1])
    assert env.get_attr("t") == [7, [1]]
    assert env.env_method("get_wrapper_attr", "resets", indices=[0]) == [1]
    assert env.env_is_wrapped(TimeLimit) == [True, True]
    assert env.env_is_wrapped(Monitor, [0]) == [True]  # episodes are reported
    assert env.env_is_wrapped(gym.wrappers.ClipReward) == [False, False]
    assert not env.has_attr("nothing")


def test_attributes_and_methods_of_processes() -> None:
    env = GymVectorAdapter(AsyncVectorEnv(two(), autoreset_mode=AutoresetMode.SAME_STEP))
    env.reset()
    env.set_attr("t", 7, indices=1)
    assert env.get_attr("t") == [0, 7]
    assert env.env_method("_obs")[1].shape == (3,)
    with pytest.raises(ValueError, match="indices must be None"):
        env.env_method("_obs", indices=[0])
    env.close()


def test_attributes_of_an_env_without_single_ones() -> None:
    env = native()
    assert env.get_attr("gravity") == [9.8] * 3
    env.set_attr("gravity", 1.6)
    assert env.get_attr("gravity", [2]) == [1.6]
    with pytest.raises(ValueError, match="indices must be None"):
        env.set_attr("gravity", 9.8, indices=[0])
    assert env.render_mode is None
    assert env.get_images() == [None] * 3


def test_frames() -> None:
    pytest.importorskip("pygame")
    vector = gym.make_vec("CartPole-v1", 2, "vector_entry_point", render_mode="rgb_array")
    env = GymVectorAdapter(vector)
    env.reset()
    assert env.render_mode == "rgb_array"
    assert [frame.shape for frame in env.get_images() if frame is not None] == [(400, 600, 3)] * 2
    tiled = env.render()
    assert tiled is not None
    assert tiled.shape == (800, 600, 3)
    env.close()


def test_what_is_no_vector_env_is_refused() -> None:
    with pytest.raises(TypeError, match=r"must be a gymnasium\.vector\.VectorEnv"):
        GymVectorAdapter(gym.make("CartPole-v1"))  # type: ignore[arg-type]
    silent = SyncVectorEnv(two())
    del silent.metadata["autoreset_mode"]
    with pytest.raises(ValueError, match="autoreset_mode"):
        GymVectorAdapter(silent)


def test_an_env_that_resets_more_than_it_was_asked_to_is_found_out() -> None:
    class Deaf(VectorWrapper):
        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            return super().reset(seed=seed)

    env = GymVectorAdapter(Deaf(sync(AutoresetMode.DISABLED)))
    env.reset()
    env.step(np.zeros(2, dtype=int))
    with pytest.raises(RuntimeError, match="resets all its envs"):
        env.step(np.zeros(2, dtype=int))


def test_infos_are_taken_apart() -> None:
    infos = {
        "x": np.array([1.5, 0.0]),
        "_x": np.array([True, False]),
        "all": np.array([1, 2]),
        "deep": {"y": np.array([0, 4]), "_y": np.array([False, True])},
        "_deep": np.array([False, True]),
        "_own": np.array([7, 8]),
        "same": 0.5,
        "text": "for all",
    }
    same: dict[str, Any] = {"same": 0.5, "text": "for all"}
    expected: list[dict[str, Any]] = [{"x": 1.5, "all": 1, "_own": 7}, {"all": 2, "deep": {"y": 4}, "_own": 8}]
    assert rows_of(infos, 2) == [row | same for row in expected]


class Reusing(VectorWrapper):
    """Hands out the same array at every step."""

    def reset(self, **kwargs: Any) -> Any:
        self.array, infos = super().reset(**kwargs)
        return self.array, infos

    def step(self, actions: Any) -> Any:
        self.array[:], *others = super().step(actions)
        return self.array, *others


def test_observations_of_a_step_outlive_the_next() -> None:
    env = GymVectorAdapter(Reusing(sync(AutoresetMode.SAME_STEP)))
    first = env.reset()
    before = first.copy()
    env.step(np.zeros(2, dtype=int))
    assert np.array_equal(first, before)


def test_asking_for_what_is_not_there_does_no_harm() -> None:
    for vector in (sync(AutoresetMode.SAME_STEP), AsyncVectorEnv(two(), autoreset_mode=AutoresetMode.SAME_STEP)):
        env = GymVectorAdapter(vector)
        env.reset()
        assert not env.has_attr("action_masks")
        with pytest.raises(AttributeError, match="have no attribute 'action_masks'"):
            env.get_attr("action_masks")
        assert len(env.step(np.zeros(2, dtype=int))[0]) == 2
        env.set_attr("mine", 3)
        assert env.get_attr("mine") == [3, 3]
        env.close()


def test_attributes_behind_a_wrapper_of_a_vector_env() -> None:
    env: Any = GymVectorAdapter(VectorWrapper(gym.make_vec("CartPole-v1", 2, "vector_entry_point")))
    assert env.get_attr("gravity") == [9.8, 9.8]
    env.set_attr("gravity", 1.0)
    assert env.get_attr("gravity") == [1.0, 1.0]
    assert env.metadata["render_fps"] == 50


def test_an_episode_without_its_final_observation_is_an_error() -> None:
    class Silent(VectorWrapper):
        def step(self, actions: Any) -> Any:
            *others, infos = super().step(actions)
            return *others, {key: value for key, value in infos.items() if key != "final_obs"}

    env = GymVectorAdapter(Silent(sync(AutoresetMode.SAME_STEP)))
    env.reset()
    env.step(np.zeros(2, dtype=int))
    with pytest.raises(RuntimeError, match="no 'final_obs'"):
        env.step(np.zeros(2, dtype=int))
