"""Rollouts of envs that reset in the step that follows an episode's end: no false step reaches the buffer."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorWrapper
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecMonitor, VecNormalize

from sb3_pg import NPG, TRPO, ActorCritic, KLPenaltyPG, OffPAC, OffPolicyPG, Reinforce
from sb3_pg.envs import GymVectorAdapter
from sb3_pg.rollout import EndlessEpisodeError
from tests.helpers import OBSERVATION_SPACES, OwnForward, Rollout, ScriptedEnv, rollout_of, vec

SMALL: dict[str, Any] = {"policy_kwargs": {"net_arch": [4]}, "device": "cpu", "seed": 0}


class Counting(ScriptedEnv):
    """Observes its episode and step, so that each observation says where it is from."""

    def _obs(self) -> Any:
        return np.array([self.episode, self.t, self.reward / 100], dtype=np.float32)


def envs() -> list[Counting]:
    return [Counting((3, 1, 2), (False, True)), Counting((2, 4), (True, False, False), first_reward=50.0)]


def late() -> VecEnv:
    first, second = envs()
    # wrapped, so that the adapter leaves the mode as it is
    return GymVectorAdapter(
        VectorWrapper(SyncVectorEnv([lambda: first, lambda: second], autoreset_mode=AutoresetMode.NEXT_STEP))
    )


class Batches(BaseCallback):
    """Keeps the rollouts."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Rollout] = []
        self.dones: list[np.ndarray] = []

    def _on_step(self) -> bool:
        self.dones.append(self.locals["dones"].copy())
        return True

    def _on_rollout_end(self) -> None:
        if hasattr(self.model, "rollout_buffer"):
            self.seen.append(rollout_of(self.model))
        self.valid = self.model.logger.name_to_value["rollout/valid_fraction"]


def steps_of(batches: list[Rollout], env: int) -> dict[str, np.ndarray]:
    """One env's valid steps, in order."""
    columns: dict[str, list[th.Tensor]] = {}
    for batch in batches:
        valid = batch.valid[:, env]
        assert valid.tolist() == sorted(valid.tolist(), reverse=True)  # a prefix
        for name in ("observations", "rewards", "terminated", "truncated", "timesteps"):
            columns.setdefault(name, []).append(getattr(batch, name)[:, env][valid])
    return {name: th.cat(parts).numpy() for name, parts in columns.items()}


@pytest.mark.parametrize("kwargs", [{"n_steps": 4}, {"n_steps": 1}, {"n_steps": 7}, {"n_episodes": 4}], ids=str)
def test_steps_are_those_of_envs_that_reset_at_once(kwargs: dict[str, Any]) -> None:
    def run(env: VecEnv, **own: Any) -> list[Rollout]:
        batches = Batches()
        Reinforce("MlpPolicy", env, **SMALL, **own).learn(60, callback=batches)
        return batches.seen

    ours, theirs = run(late(), **kwargs), run(vec(*envs()), n_steps=30)
    if "n_episodes" in kwargs:
        ours = ours[:1]  # envs that wait live on between rollouts
    for env in range(2):
        seen, expected = steps_of(ours, env), steps_of(theirs, env)
        assert len(seen["rewards"]) >= (4 if len(ours) == 1 else 12)
        for name, values in expected.items():
            n = min(len(values), len(seen[name]))
            assert np.array_equal(seen[name][:n], values[:n]), (env, name)


def test_a_cut_is_valued_where_each_env_was_cut() -> None:
    batches = Batches()
    model = ActorCritic("MlpPolicy", late(), n_steps=4, truncation="terminal", learning_rate=0.0, **SMALL)
    model.learn(8, callback=batches)
    (batch,) = batches.seen
    # 3 steps and the reset; 2 steps (truncated), the reset, 1 step, cut
    assert batch.valid.T.tolist() == [[True, True, True], [True, True, True]]
    assert batch.terminated.T.tolist() == [[False, False, True], [False] * 3]
    assert batch.truncated.T.tolist() == [[False] * 3, [False, True, False]]
    assert batch.timesteps.T.tolist() == [[0, 1, 2], [0, 1, 0]]
    bootstrap = batch.bootstrap(model.gamma)
    assert (bootstrap != 0).T.tolist() == [[False] * 3, [False, False, True]]
    value = model.policy.predict_values(th.tensor([[1.0, 1.0, 0.53]]))
    assert bootstrap[2, 1].item() == pytest.approx(value.item(), rel=1e-5)


def test_columns_of_unequal_length_are_estimated_each_by_itself() -> None:
    batches = Batches()
    kwargs: dict[str, Any] = {"gae_lambda": 0.8, "gamma": 0.9, "learning_rate": 0.0, **SMALL}
    ActorCritic("MlpPolicy", late(), n_steps=9, **kwargs).learn(18, callback=batches)
    (batch,) = batches.seen
    lengths = batch.valid.sum(0).tolist()
    assert lengths[0] != lengths[1]
    for env, length in enumerate(lengths):
        alone = Batches()
        ActorCritic("MlpPolicy", vec(envs()[env]), n_steps=length, **kwargs).learn(length, callback=alone)
        assert th.allclose(batch.advantages[:length, env], alone.seen[0].advantages[:, 0], atol=1e-5)


def test_log_probs_given_while_acting_stay_with_their_steps() -> None:
    batches = Batches()
    model = ActorCritic(OwnForward, late(), n_steps=9, learning_rate=0.0, **SMALL)
    model.learn(18, callback=batches)
    (batch,) = batches.seen
    actions = batch.flat_actions(model.action_space)
    values, log_probs, _ = model.policy.evaluate_actions(batch.flat_observations, actions)
    assert th.allclose(batch.select(batch.log_probs), log_probs, atol=1e-6)
    assert th.allclose(batch.select(batch.values).float(), values.flatten(), atol=1e-6)


ALGORITHMS: dict[str, Any] = {
    "reinforce": lambda env, **kw: Reinforce("MlpPolicy", env, n_episodes=2 * env.num_envs, **kw),
    "reinforce segments": lambda env, **kw: Reinforce("MlpPolicy", env, n_steps=16, **kw),
    "online": lambda env, **kw: ActorCritic("MlpPolicy", env, n_steps=1, advantage="td", **kw),
    "npg": lambda env, **kw: NPG("MlpPolicy", env, n_steps=32, batch_size=32, **kw),
    "trpo": lambda env, **kw: TRPO("MlpPolicy", env, n_steps=32, batch_size=32, **kw),
    "kl_penalty_pg": lambda env, **kw: KLPenaltyPG("MlpPolicy", env, n_steps=32, batch_size=32, **kw),
    "off_policy_pg": lambda env, **kw: OffPolicyPG("MlpPolicy", env, train_freq=(env.num_envs, "episode"), **kw),
    "off_policy_pg steps": lambda env, **kw: OffPolicyPG("MlpPolicy", env, train_freq=30, **kw),
}


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_native_vector_envs_serve_every_collecting_algorithm(name: str, n_envs: int) -> None:
    env = VecNormalize(GymVectorAdapter(gym.make_vec("CartPole-v1", n_envs, "vector_entry_point")))
    model = ALGORITHMS[name](env, **SMALL)
    seen = Batches()
    model.learn(300, callback=seen)
    assert model.num_timesteps >= 300
    assert len(model.ep_info_buffer) == np.sum(seen.dones)
    lengths = [info["l"] for info in model.ep_info_buffer]
    assert min(lengths) >= 7  # CartPole cannot fall sooner; a false step would be an episode of 1


def test_those_that_collect_as_sb3_does_are_refused() -> None:
    def native() -> VecEnv:
        return GymVectorAdapter(gym.make_vec("CartPole-v1", 2, "vector_entry_point"))

    with pytest.raises(ValueError, match="NEXT_STEP"):
        OffPAC("MlpPolicy", native(), learning_starts=5, **SMALL)
    with pytest.raises(ValueError, match="NEXT_STEP"):
        ActorCritic("MlpPolicy", native(), n_steps=4, rollout_buffer_class=RolloutBuffer, **SMALL)


@pytest.mark.parametrize("wrap", [lambda env: VecFrameStack(env, 2), VecMonitor], ids=["frames", "monitor"])
def test_wrappers_that_false_steps_deceive_are_refused(wrap: Any) -> None:
    model = Reinforce("MlpPolicy", wrap(late()), n_steps=4, **SMALL)
    with pytest.raises(ValueError, match=r"VecFrameStack|VecMonitor"):
        model.learn(8)


@pytest.mark.parametrize("n_envs", [1, 2])
def test_the_longest_episode_is_measured_without_the_reset(n_envs: int) -> None:
    fns = [lambda: Counting((5,))] * n_envs
    env = GymVectorAdapter(VectorWrapper(SyncVectorEnv(fns)))
    kwargs: dict[str, Any] = {"n_episodes": 2 * n_envs, "baseline": "mean", **SMALL}
    assert Reinforce("MlpPolicy", env, max_episode_steps=5, **kwargs).learn(60).num_timesteps >= 60
    with pytest.raises(EndlessEpisodeError):
        Reinforce("MlpPolicy", env, max_episode_steps=4, **kwargs).learn(60)


@pytest.mark.parametrize("kwargs", [{"n_steps": 16}, {"n_episodes": 4}])
def test_the_share_of_valid_steps_counts_resets(kwargs: dict[str, Any]) -> None:
    model = Reinforce("MlpPolicy", late(), **SMALL, **kwargs)
    batches = Batches()
    model.learn(1, callback=batches)
    expected = int(batches.seen[0].valid.sum()) / model.num_timesteps
    assert 0 < expected < 1
    assert batches.valid == pytest.approx(expected)


def test_observation_spaces_with_keys() -> None:
    first, second = (ScriptedEnv((3, 1), observation_space=OBSERVATION_SPACES["dict"]) for _ in range(2))
    env = GymVectorAdapter(VectorWrapper(SyncVectorEnv([lambda: first, lambda: second])))
    batches = Batches()
    ActorCritic("MultiInputPolicy", env, n_steps=8, **SMALL).learn(32, callback=batches)
    assert batches.seen[0].rewards[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert {key: len(x) for key, x in batches.seen[0].flat_observations.items()} == {"vec": 16, "class": 16}
