"""``objective="average"``: what it collects, keeps, logs and refuses, and that it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import NormalizeReward
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_pg import (
    NPG,
    TRPO,
    ActorCritic,
    AsyncActorCritic,
    AverageRewardEvalCallback,
    KLPenaltyPG,
    NonFiniteError,
    OffPolicyPG,
    Reinforce,
    ResumeCallback,
)
from sb3_pg.callbacks import average_reward_of
from sb3_pg.envs import AccessControl
from sb3_pg.policies import evaluation_mode, predict_values
from tests.helpers import FaultyEnv, Interrupts, ScriptedEnv, parameters, vec

CLASSES: list[Any] = [ActorCritic, NPG, TRPO, KLPenaltyPG, AsyncActorCritic]
every_class = pytest.mark.parametrize("cls", CLASSES)


def make(cls: Any, env: Any = None, **arguments: Any) -> Any:
    """Return a model of the average reward with short segments."""
    if env is None:
        env = vec(ScriptedEnv((3,)), ScriptedEnv((4,), (True,)))
    given: dict[str, Any] = {"objective": "average", "n_steps": 8, "gae_lambda": 0.9, "seed": 0, "device": "cpu"}
    if cls in (NPG, TRPO, KLPenaltyPG):
        given["batch_size"] = 16
    return cls("MlpPolicy", env, **given | arguments)


class KeepBatches(BaseCallback):
    """Keeps what has been estimated, before the update."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[Any] = []
        self.values: list[th.Tensor] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        model: Any = self.model
        self.batches.append(model.rollout_batch)
        with evaluation_mode(model.policy), th.no_grad():
            last = model.policy.obs_to_tensor(model._last_obs)[0]
            self.values.append(predict_values(model.policy, last).double())


@every_class
@pytest.mark.parametrize("reset_cost", [0.0, 2.5])
def test_advantages_go_on_after_terminations(cls: Any, reset_cost: float) -> None:
    """Step by step: a terminated step is followed by the reset's state, in the last row too; a truncated one is not."""
    kept = KeepBatches()
    env = vec(ScriptedEnv((3, 5)), ScriptedEnv((4,), (True,)))
    lam = 1.0 if cls is AsyncActorCritic else 0.9  # V-trace's advantage has another place for lambda
    make(cls, env, reset_cost=reset_cost, value_center=0.0, gae_lambda=lam).learn(16, kept)
    (batch,) = kept.batches
    assert bool(batch.terminated[-1, 0])
    assert bool(batch.truncated[-1, 1])
    rewards = batch.rewards - reset_cost * batch.terminated.double()
    average = rewards.mean()
    assert float(batch.average_reward) == pytest.approx(float(average), abs=1e-12)
    for env_index in range(2):
        advantage = 0.0
        for t in reversed(range(8)):
            cut = bool(batch.truncated[t, env_index]) or t == 7
            following = batch.values[t + 1, env_index] if t < 7 else None
            if cut and batch.truncated[t, env_index]:
                following = batch.bootstrap[t, env_index]
                assert following != 0
            elif cut:
                following = kept.values[0][env_index]
            delta = rewards[t, env_index] - average + following - batch.values[t, env_index]
            advantage = float(delta) + (0.0 if cut else lam * advantage)
            assert float(batch.advantages[t, env_index]) == pytest.approx(advantage, abs=1e-5)
    assert batch.returns == pytest.approx(batch.advantages + batch.values, abs=1e-9)


@pytest.mark.parametrize("critic", ["own", "shared", "none"])
def test_memory_begins_anew_after_a_reset(critic: str) -> None:
    """The state after the last row is valued as the first of an episode: nothing is remembered."""
    kept = KeepBatches()
    env = vec(ScriptedEnv((4,)), ScriptedEnv((7,)))
    model = make(ActorCritic, env, memory={"kind": "gru", "hidden_size": 4, "critic": critic})
    model.learn(16, kept)
    (batch,), (alone,) = kept.batches, kept.values  # predict_values without memory remembers nothing
    assert bool(batch.terminated[-1, 0])
    assert not bool(batch.terminated[-1, 1])
    assert float(batch.bootstrap[-1, 0]) == pytest.approx(float(alone[0]), abs=1e-6)
    if critic != "none":
        assert abs(float(batch.bootstrap[-1, 1] - alone[1])) > 1e-6
    own = model._memory.get("critic")
    if own is not None:
        assert np.all(np.asarray(own[0][:, 0]) == 0)


def test_discounted_batches_value_no_reset() -> None:
    kept = KeepBatches()
    ActorCritic("MlpPolicy", vec(ScriptedEnv((4,))), n_steps=8, seed=0).learn(8, kept)
    assert float(kept.batches[0].bootstrap[-1, 0]) == 0
    assert kept.batches[0].average_reward is None


@every_class
def test_center_of_the_values(cls: Any) -> None:
    """Targets lose a share of the mean value, and advantages do not change."""
    kept = [KeepBatches(), KeepBatches()]
    for center, callback in zip((0.0, 0.5), kept, strict=True):
        make(cls, value_center=center).learn(16, callback)
    plain, centered = kept[0].batches[0], kept[1].batches[0]
    assert centered.advantages.equal(plain.advantages)
    lost = 0.5 * plain.values.mean()
    assert th.allclose(centered.returns, plain.returns - lost, atol=1e-9)


@every_class
def test_step_of_the_average(cls: Any) -> None:
    """It begins with the mean of the first batch, and then moves by the mean TD error."""
    kept = KeepBatches()
    model = make(cls, average_reward_step_size=0.25, reset_cost=1.0)
    model.learn(48, kept)
    known = None
    for batch in kept.batches:
        rewards = batch.rewards - batch.terminated.double()
        if known is None:
            known = float(rewards.mean())
        assert float(batch.average_reward) == pytest.approx(known, abs=1e-9)
        following = th.cat([batch.values[1:], th.zeros(1, 2, dtype=th.float64)])
        following = th.where(batch.truncated, 0.0, following) + batch.bootstrap
        known += 0.25 * float((rewards - known + following - batch.values).mean())
    assert model.learner_state.average_reward == pytest.approx(known, abs=1e-5)


@every_class
def test_logged(cls: Any) -> None:
    model = make(cls)
    model.learn(32, log_interval=1)
    logged = model.logger.name_to_value
    batch = model.rollout_batch
    assert logged["train/average_reward"] == pytest.approx(float(batch.average_reward))
    assert logged["train/value_mean"] == pytest.approx(float(batch.values.mean()))
    discounted = cls("MlpPolicy", ScriptedEnv((3,)), n_steps=8, seed=0).learn(16, log_interval=1)
    assert not any("average_reward" in name for name in discounted.logger.name_to_value)


@every_class
def test_average_is_saved(cls: Any, tmp_path: Path) -> None:
    model = make(cls, average_reward_step_size=0.1)
    model.learn(32)
    known = model.learner_state.average_reward
    model.save(tmp_path / "model")
    loaded = cls.load(tmp_path / "model", env=vec(ScriptedEnv((3,)), ScriptedEnv((4,), (True,))))
    assert loaded.objective == "average"
    assert loaded.learner_state.average_reward == known is not None


@pytest.mark.parametrize("cls", [ActorCritic, TRPO, KLPenaltyPG])
def test_resumption_is_exact(cls: Any, tmp_path: Path) -> None:
    def fresh() -> Any:
        return make(cls, make_vec_env("CartPole-v1", 2), average_reward_step_size=0.1, reset_cost=5.0, n_steps=16)

    whole = fresh().learn(320)
    with pytest.raises(KeyboardInterrupt):
        fresh().learn(320, [ResumeCallback(tmp_path, every=64), Interrupts(200)])
    resumed = cls.resume(tmp_path, make_vec_env("CartPole-v1", 2))
    resumed.learn(320)
    assert parameters(resumed.policy).equal(parameters(whole.policy))
    assert resumed.learner_state.average_reward == whole.learner_state.average_reward


def test_failed_update_leaves_the_average() -> None:
    model = make(ActorCritic, average_reward_step_size=0.1)
    model.learn(32)
    known = model.learner_state.average_reward
    model.set_env(vec(FaultyEnv("reward", at=3), FaultyEnv("reward", at=99)))
    with pytest.raises(NonFiniteError):
        model.learn(32)
    assert model.learner_state.average_reward == known


# --- refusals ---


def normalized(norm_reward: bool, training: bool = True) -> VecEnv:
    return VecNormalize(make_vec_env("CartPole-v1", 2), training=training, norm_reward=norm_reward)


@every_class
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": 0.9}, r"gamma=0.9 has no effect with objective='average', which has no discount"),
        ({"state_discount": True}, "objective='average' has no discount, got state_discount=True"),
        ({"truncation": "terminal"}, "no time limit ends, got truncation='terminal': use 'bootstrap'"),
        ({"average_reward_step_size": 0.0}, r"average_reward_step_size must be a number in \(0, 1\), got 0"),
        ({"average_reward_step_size": 1.5}, "average_reward_step_size must be a number in"),
        ({"value_center": 1.5}, r"value_center must be a number in \[0, 1\], got 1.5"),
        ({"reset_cost": -1.0}, "reset_cost must be a finite number of at least 0, got -1.0"),
        ({"objective": "mean"}, r"objective must be one of \['discounted', 'average'\], got 'mean'"),
    ],
)
def test_refused_arguments(cls: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(cls, **arguments)


@pytest.mark.parametrize("cls", [ActorCritic, NPG, TRPO, KLPenaltyPG])
def test_refused_collecting(cls: Any) -> None:
    with pytest.raises(ValueError, match="objective='average' takes segments of n_steps=, got n_steps=None"):
        make(cls, n_steps=None)
    with pytest.raises(ValueError, match="objective='average' takes a rollout buffer of this package"):
        make(cls, rollout_buffer_class=RolloutBuffer)


@pytest.mark.parametrize("name", ["average_reward_step_size", "reset_cost", "value_center"])
def test_arguments_of_the_average_alone(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0.5 has no effect with objective='discounted'"):
        make(ActorCritic, objective="discounted", **{name: 0.5})


def test_single_steps_take_a_step_size() -> None:
    with pytest.raises(ValueError, match=r"set average_reward_step_size, e\.g\. to 0\.01"):
        make(ActorCritic, ScriptedEnv(), n_steps=1)
    make(ActorCritic, ScriptedEnv(), n_steps=1, average_reward_step_size=0.01).learn(8)


@every_class
def test_scaled_rewards_are_refused(cls: Any) -> None:
    message = r"VecNormalize\(norm_reward=True\).*set norm_reward=False, and use normalize_value_targets=True"
    with pytest.raises(ValueError, match=message):
        make(cls, normalized(norm_reward=True))
    model = make(cls, normalized(norm_reward=False)).learn(16)
    before = parameters(model.policy)
    model.set_env(normalized(norm_reward=True))
    with pytest.raises(ValueError, match=message):
        model.learn(16)
    assert parameters(model.policy).equal(before)
    scaled = DummyVecEnv([lambda: NormalizeReward(gym.make("CartPole-v1"))])
    with pytest.raises(ValueError, match=r"gymnasium's NormalizeReward.*leave it out, and use normalize_value_targets"):
        make(cls, scaled)


def test_resets_that_come_one_step_later_are_refused() -> None:
    native = gym.make_vec("CartPole-v1", 2, vectorization_mode="vector_entry_point")
    assert native.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    with pytest.raises(ValueError, match=r"AutoresetMode.NEXT_STEP\): use AutoresetMode.SAME_STEP"):
        make(ActorCritic, native)
    make(ActorCritic, SyncVectorEnv([lambda: gym.make("CartPole-v1")] * 2)).learn(16)


@pytest.mark.parametrize("cls", [Reinforce, OffPolicyPG])
def test_other_classes_have_no_average_reward(cls: Any) -> None:
    with pytest.raises(TypeError, match="has no argument 'objective'"):
        cls("MlpPolicy", "CartPole-v1", objective="average")


# --- evaluation ---


class Steady:
    """A model whose actions do not matter."""

    def predict(self, obs: Any, state: Any, starts: Any, deterministic: bool) -> tuple[np.ndarray, None]:
        return np.zeros(len(starts), dtype=np.int64), None


def test_average_reward_of_known_rewards() -> None:
    """Rewards 1, 2, 3, ...; episodes of 4 steps end, those of 5 steps are cut."""
    env = vec(ScriptedEnv((4,)), ScriptedEnv((5,), (True,)))
    model: Any = Steady()
    found = average_reward_of(model, env, 10, reset_cost=3.0)
    assert found.rewards.tolist() == [5.5 - 0.6, 5.5]
    assert found.n_terminated == 2
    scaled = VecNormalize(vec(ScriptedEnv((4,))), training=False)
    assert average_reward_of(model, scaled, 10).rewards.tolist() == [5.5]


def test_callback(tmp_path: Path) -> None:
    best: list[int] = []

    class Note(BaseCallback):
        def _on_step(self) -> bool:
            best.append(self.num_timesteps)
            return True

    env = AccessControl()
    evaluation = AverageRewardEvalCallback(
        AccessControl(),
        horizon=200,
        eval_freq=32,
        callback_on_new_best=Note(),
        best_model_save_path=tmp_path / "best",
        log_path=tmp_path / "log",
        verbose=0,
    )
    model = ActorCritic("MlpPolicy", env, objective="average", gae_lambda=0.9, n_steps=32, seed=0)
    model.learn(96, evaluation)
    saved = np.load(tmp_path / "log" / "average_rewards.npz")
    assert saved["timesteps"].tolist() == [32, 64, 96]
    assert saved["results"].shape == (3, 1)
    means = saved["results"].mean(axis=1)
    assert evaluation.best_average_reward == means.max()
    assert evaluation.last_average_reward == means[-1]
    assert best == [32 * (i + 1) for i in range(3) if means[i] > max([-np.inf, *means[:i]])]
    assert (tmp_path / "best" / "best_model.zip").exists()


def test_callback_copies_statistics() -> None:
    training, held = normalized(False), normalized(False, training=False)
    callback = AverageRewardEvalCallback(held, horizon=5, eval_freq=8, verbose=0)
    make(ActorCritic, training).learn(16, callback)
    statistics: list[Any] = [envs.obs_rms for envs in (held, training) if isinstance(envs, VecNormalize)]
    theirs, ours = statistics
    assert np.array_equal(theirs.mean, ours.mean)


def test_callback_requires_statistics() -> None:
    """The policy knows normalized observations alone."""
    model = make(ActorCritic, normalized(False))
    callback = AverageRewardEvalCallback(make_vec_env("CartPole-v1", 2), horizon=5, eval_freq=8, verbose=0)
    with pytest.raises(ValueError, match="eval_env must have a VecNormalize, as the training env has, got none"):
        model.learn(16, callback)
    assert model.num_timesteps == 0


def test_arguments_that_are_set_later_are_checked() -> None:
    model = make(ActorCritic)
    model.n_steps = None
    with pytest.raises(ValueError, match="objective='average' takes segments of n_steps="):
        model.learn(16)
    assert model.num_timesteps == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"horizon": 0}, ValueError, "horizon must be a whole number of at least 1, got 0"),
        ({"eval_freq": 1.5}, TypeError, "eval_freq must be a whole number"),
        ({"reset_cost": -1}, ValueError, "reset_cost must be a finite number of at least 0"),
        ({"eval_env": "CartPole-v1"}, TypeError, "eval_env must be Env or VecEnv, got 'CartPole-v1'"),
    ],
)
def test_callback_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AverageRewardEvalCallback(**{"eval_env": AccessControl(), **arguments})


# --- learning ---


@pytest.mark.slow
def test_queue_is_learned() -> None:
    """Within 5 % of the optimum of dynamic programming; acting at random has half of it."""
    env = make_vec_env(AccessControl, 8, seed=0)
    model = TRPO(
        "MlpPolicy",
        env,
        objective="average",
        n_steps=256,
        gae_lambda=0.95,
        target_kl=0.03,
        normalize_value_targets=True,
        seed=0,
        device="cpu",
    )
    model.learn(60_000)
    found = average_reward_of(model, make_vec_env(AccessControl, 8, seed=1), 5000)
    assert found.rewards.mean() > 0.95 * AccessControl().optimum()[0]
