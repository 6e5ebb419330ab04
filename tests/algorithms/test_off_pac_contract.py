"""OffPAC: what it owes to SB3, and what it does with bad input and NaN."""

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.sac.policies import SACPolicy

from sb3_pg import NonFiniteError, OffPAC
from sb3_pg.algorithms.off_pac.losses import ACTOR_LOSSES
from tests.algorithms.off_pac import (
    EVERY_GRADIENT,
    GRADIENTS,
    INF,
    NAN,
    envs,
    filled,
    make,
    stored,
)
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES, BatchNormExtractor, FaultyEnv, ScriptedEnv, parameters, vec

# -------------------------------------------------------------------- what it owes to SB3


def test_the_same_seed_gives_the_same_weights() -> None:
    a, b, other = (parameters(make(envs("box", 2), seed=seed).learn(40).policy) for seed in (3, 3, 4))
    assert th.equal(a, b)
    assert not th.equal(a, other)


def test_evaluation_does_not_change_training() -> None:
    evaluate = EvalCallback(make_vec_env("CartPole-v1"), eval_freq=5, n_eval_episodes=1, verbose=0)
    one, other = (make(gym.make("CartPole-v1")).learn(30, callback=callback) for callback in (evaluate, None))
    assert th.equal(parameters(one.policy), parameters(other.policy))


@pytest.mark.parametrize("action_space", ["discrete", "box"])
def test_save_load_and_resume(action_space: str, tmp_path: Path) -> None:
    env = envs(action_space, 2)
    model = make(env, critic_learning_rate="lin_1e-2").learn(40)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = OffPAC.load(tmp_path / "model", env=env, device="cpu")
    before, after = model.get_parameters(), loaded.get_parameters()
    assert before.keys() == after.keys() == {"policy", "actor.optimizer", "critic.optimizer"}
    assert after["critic.optimizer"]["state"][0]["step"] == 16
    assert all(str(before[name]) == str(after[name]) for name in before)
    loaded.load_replay_buffer(tmp_path / "buffer")
    ours, theirs = (stored(m, 20) for m in (model, loaded))
    assert all(th.equal(x, y) for x, y in zip(ours, theirs, strict=True))
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded.num_timesteps == 60
    assert loaded._n_updates == 26
    assert not th.equal(parameters(model.policy), parameters(loaded.policy))


def test_resuming_is_going_on(tmp_path: Path) -> None:
    model = make(envs("box")).learn(20)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = OffPAC.load(tmp_path / "model", env=model.get_env(), device="cpu")
    loaded.load_replay_buffer(tmp_path / "buffer")
    loaded.set_logger(model.logger)
    for each in (model, loaded):
        th.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        each.train(3, 8)
    assert th.equal(parameters(model.policy), parameters(loaded.policy))


def test_a_model_without_env_predicts(tmp_path: Path) -> None:
    model = make(envs("discrete"))
    model.save(tmp_path / "model")
    loaded = OffPAC.load(tmp_path / "model")
    obs = model.observation_space.sample()
    assert np.array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
    with pytest.raises(ValueError, match="set_env"):
        loaded.learn(10)


def test_a_model_can_be_loaded_with_other_envs_and_arguments(tmp_path: Path) -> None:
    model = make(envs("box"), train_freq=(2, "episode")).learn(30)
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"train_freq must be in steps .* and 3 envs"):
        OffPAC.load(tmp_path / "model", env=envs("box", 3))
    loaded = OffPAC.load(tmp_path / "model", env=envs("box", 3), train_freq=2, actor_gradient="score", gamma=0.5)
    assert (loaded.n_envs, loaded.gamma, loaded.actor_gradient) == (3, 0.5, "score")
    loaded.learn(30)
    make(gym.make("CartPole-v1")).save(tmp_path / "cartpole")
    OffPAC.load(tmp_path / "cartpole", env="CartPole-v1").learn(10)
    with pytest.raises(TypeError, match=r"has no argument 'gama'; did you mean 'gamma'"):
        OffPAC.load(tmp_path / "model", gama=0.3)
    with pytest.raises(ValueError, match=r"actor_gradient='expected' sums over the actions of a Discrete"):
        OffPAC.load(tmp_path / "model", actor_gradient="expected")


def test_a_zip_holds_no_state_of_a_rollout(tmp_path: Path) -> None:
    model = make(VecNormalize(envs("box", 2)))
    model.save(tmp_path / "new")
    model.learn(20).save(tmp_path / "trained")
    new, trained = (load_from_zip_file(tmp_path / name)[0] for name in ("new", "trained"))
    assert new is not None
    assert trained is not None
    added = trained.keys() - new.keys() - vars(SAC("MlpPolicy", envs("box"), buffer_size=10).learn(1)).keys()
    assert all(isinstance(trained[name], int) for name in added)  # counters, and no arrays
    assert "replay_buffer" not in trained


@pytest.mark.parametrize("use_sde", [False, True])
def test_the_policy_alone_can_be_saved(use_sde: bool, tmp_path: Path) -> None:
    for action_space in ["box"] if use_sde else ["discrete", "box"]:
        policy = make(envs(action_space), use_sde=use_sde).learn(20).policy
        policy.save(str(tmp_path / "policy"))
        loaded = type(policy).load(str(tmp_path / "policy"), device="cpu")
        obs = policy.observation_space.sample()
        assert np.array_equal(policy.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])


def test_pickle_and_deepcopy() -> None:
    model = make(envs("box")).learn(20)
    assert th.equal(parameters(copy.deepcopy(model.policy)), parameters(model.policy))
    again = pickle.loads(cloudpickle.dumps(model))
    assert th.equal(parameters(model.policy), parameters(again.policy))
    assert again.learn(20).num_timesteps == 20


def test_set_env_and_continue() -> None:
    model = make(envs("discrete")).learn(20)
    model.set_env(envs("discrete"))
    assert model.learn(20, reset_num_timesteps=False).num_timesteps == 40
    assert model.learn(10).num_timesteps == 10


def test_setting_up_again_is_fine() -> None:
    model = make(envs("discrete")).learn(20)
    model._setup_model()
    model.learn(20)


@pytest.mark.parametrize(
    ("train_freq", "gradient_steps", "n_updates"), [(4, 1, 4), ((2, "step"), -1, 16), ((1, "episode"), 3, 21)]
)
def test_train_freq(train_freq: Any, gradient_steps: int, n_updates: int) -> None:
    model = make(envs("discrete"), train_freq=train_freq, gradient_steps=gradient_steps, learning_starts=8).learn(24)
    assert model._n_updates == n_updates


def test_as_many_gradient_steps_as_env_steps_with_several_envs() -> None:
    model = make(envs("discrete", 3), train_freq=2, gradient_steps=-1, learning_starts=0).learn(6)
    assert model._n_updates == 6


def test_normalized_envs() -> None:
    env = VecNormalize(envs("box", 2))
    model = make(env, gradient_steps=2).learn(60)
    assert model.get_vec_normalize_env() is env
    samples = model.replay_buffer.sample(8, env=env)  # type: ignore[union-attr]
    assert samples.rewards.abs().max() <= 10
    assert model.replay_buffer.rewards.max() > 1000  # type: ignore[union-attr]


def test_truncated_episodes_are_bootstrapped_and_terminated_ones_are_not() -> None:
    model = make(envs("discrete"), gradient_steps=0).learn(24)
    buffer: Any = model.replay_buffer
    ends = [2, 4, 7, 9, 12, 14, 17, 19, 22]  # episodes of 3 and 2 steps
    assert np.flatnonzero(buffer.dones[:24, 0]).tolist() == ends
    assert np.flatnonzero(buffer.timeouts[:24, 0]).tolist() == ends[2::3]
    samples = buffer._get_samples(np.arange(24))
    assert samples.dones.flatten().nonzero().flatten().tolist() == [e for i, e in enumerate(ends) if i % 3 != 2]


def test_schedules_of_actor_and_critic() -> None:
    """Never below 0, though the last rollout overshoots."""
    model = make(envs("discrete", 3), learning_rate="lin_1e-2", critic_learning_rate="lin_1e-1", train_freq=4)
    model.learn(31)
    rates = [o.param_groups[0]["lr"] for o in (model.actor.optimizer, model.critic.optimizer)]
    assert rates == [0.0, 0.0]
    model = make(envs("discrete"), learning_rate=lambda left: 0.1 + left, critic_learning_rate=0.2).learn(20)
    logged = model.logger.name_to_value
    assert logged["train/learning_rate"] == model.actor.optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    assert logged["train/critic_learning_rate"] == model.critic.optimizer.param_groups[0]["lr"] == 0.2


def test_an_update_logs_the_mean_of_its_steps() -> None:
    model = filled("discrete", actor_gradient="importance")
    alone = copy.deepcopy(model)
    alone.set_logger(Logger(None, []))
    logged = []
    np.random.seed(0)  # noqa: NPY002  # SB3's buffers draw from it
    for _ in range(3):
        alone.train(1, 8)
        logged.append(dict(alone.logger.name_to_value))
    np.random.seed(0)  # noqa: NPY002
    model.train(3, 8)
    for name in ("critic_loss", "q_value", "actor_loss", "entropy", "importance_ess", "truncated_fraction"):
        wanted = np.mean([each[f"train/{name}"] for each in logged])
        assert model.logger.name_to_value[f"train/{name}"] == pytest.approx(wanted, rel=1e-5)
    largest = [each["train/largest_weight"] for each in logged]
    assert len(set(largest)) == 3
    assert model.logger.name_to_value["train/largest_weight"] == pytest.approx(max(largest), rel=1e-5)


def test_hindsight_replay() -> None:
    env = make_vec_env(lambda: BitFlippingEnv(n_bits=3, continuous=True), 1)
    model = OffPAC(
        "MultiInputPolicy",
        env,
        replay_buffer_class=HerReplayBuffer,
        buffer_size=200,
        learning_starts=20,
        batch_size=8,
        policy_kwargs={"net_arch": [8]},
        device="cpu",
    ).learn(40)
    assert model._n_updates == 20


def test_optimize_memory_usage_is_sb3s() -> None:
    with pytest.raises(ValueError, match="handle_timeout_termination"):
        make(envs("discrete"), optimize_memory_usage=True)
    kwargs = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
    model = make(envs("discrete"), **kwargs).learn(20)
    with pytest.warns(UserWarning, match="last trajectory in the replay buffer will be truncated"):
        model.learn(20)


def test_a_callback_stops_training() -> None:
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.num_timesteps < 10

    assert make(envs("discrete")).learn(100, callback=Stop()).num_timesteps == 10


@pytest.mark.cuda
@pytest.mark.skipif(not th.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("action_space", "gradient"), EVERY_GRADIENT)
def test_trains_on_cuda(action_space: str, gradient: str) -> None:
    model = make(envs(action_space, 2), actor_gradient=gradient, device="cuda").learn(30)
    assert model.policy.device.type == "cuda"


# -------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        *[("policy", v, TypeError) for v in (3, None, dict, ActorCriticPolicy, SACPolicy)],
        ("env", 3, TypeError),
        ("env", None, ValueError),
        *[("learning_rate", v, ValueError) for v in (-1e-3, NAN, "fast")],
        ("learning_rate", None, TypeError),
        *[("critic_learning_rate", v, ValueError) for v in (-1e-3, "lin_")],
        *[("actor_gradient", v, ValueError) for v in ("ddpg", "")],
        ("actor_gradient", 1, TypeError),
        *[("n_actions", v, ValueError) for v in (1, 0)],
        ("n_actions", 2.5, TypeError),
        *[("max_ratio", v, ValueError) for v in (0, -1.0, NAN)],
        *[("ent_coef", v, ValueError) for v in (-0.1, INF)],
        ("ent_coef", "auto", ValueError),
        ("ent_coef", True, TypeError),
        *[("buffer_size", v, ValueError) for v in (0, -1)],
        ("buffer_size", 1e6, TypeError),
        ("learning_starts", -1, ValueError),
        *[("batch_size", v, ValueError) for v in (0, -1)],
        ("batch_size", None, TypeError),
        *[("tau", v, ValueError) for v in (-0.1, 1.1, NAN)],
        *[("gamma", v, ValueError) for v in (-0.1, 1.01)],
        *[("train_freq", v, ValueError) for v in (0, "4", ("1", "episode"), (1, "close"), (1, 2, 3), None)],
        *[("gradient_steps", v, ValueError) for v in (-2,)],
        ("gradient_steps", 1.0, TypeError),
        ("replay_buffer_class", dict, TypeError),
        ("replay_buffer_kwargs", 3, TypeError),
        ("optimize_memory_usage", 1, TypeError),
        ("action_noise", NormalActionNoise(np.zeros(1), np.ones(1)), ValueError),
        ("use_sde", 1, TypeError),
        ("sde_sample_freq", -2, ValueError),
        ("stats_window_size", 0, ValueError),
        ("policy_kwargs", "dict()", TypeError),
        ("seed", -1, ValueError),
        ("device", "gpu", ValueError),
    ],
)
def test_an_argument_is_named_with_its_value(argument: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        OffPAC(**{"policy": "MlpPolicy", "env": envs("discrete"), "device": "cpu", argument: value})
    assert type(caught.value) is error
    assert argument in str(caught.value)


def test_every_argument_is_documented() -> None:
    arguments = inspect.signature(OffPAC).parameters
    assert "unknown" in arguments
    assert OffPAC.__doc__ is not None
    assert [name for name in arguments if name != "unknown" and f"\n:param {name}: " not in OffPAC.__doc__] == []


def test_an_unknown_argument_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"actor_gradints.*did you mean .actor_gradient"):
        OffPAC("MlpPolicy", envs("discrete"), actor_gradints="score")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="n_critic"):
        make(envs("discrete"), policy_kwargs={"n_critic": 1})
    with pytest.raises(ValueError, match="LstmPolicy"):
        OffPAC("LstmPolicy", envs("discrete"))


@pytest.mark.parametrize("action_space", ACTION_SPACES)
@pytest.mark.parametrize("gradient", ACTOR_LOSSES)
def test_what_an_action_space_cannot_have_is_refused(action_space: str, gradient: str) -> None:
    if gradient in GRADIENTS[action_space]:
        make(envs(action_space), actor_gradient=gradient)
    else:
        with pytest.raises(ValueError, match=f"actor_gradient='{gradient}'"):
            make(envs(action_space), actor_gradient=gradient)


def test_arguments_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match=r"must be None or a subclass of BehaviorReplayBuffer.*, got ReplayBuffer"):
        make(envs("discrete"), actor_gradient="importance", replay_buffer_class=ReplayBuffer)
    make(envs("discrete"), replay_buffer_class=ReplayBuffer).learn(14)
    with pytest.raises(ValueError, match=r"train_freq must be in steps .* and 2 envs"):
        make(envs("discrete", 2), train_freq=(1, "episode"))
    with pytest.raises(ValueError, match="continuous actions"):
        make(envs("discrete"), use_sde=True)
    with pytest.raises(ValueError, match=r"action_space must have a lower bound below"):
        make(vec(ScriptedEnv(action_space=spaces.Box(0.0, 0.0, (2,)))))


def test_a_replay_buffer_without_log_probs_has_no_importance(tmp_path: Path) -> None:
    make(envs("discrete"), replay_buffer_class=ReplayBuffer).learn(14).save_replay_buffer(tmp_path / "buffer")
    model = make(envs("discrete"), actor_gradient="importance")
    model.load_replay_buffer(tmp_path / "buffer")
    with pytest.raises(ValueError, match="needs samples of a BehaviorReplayBuffer"):
        model.learn(14)


def test_learning_without_a_number_is_explained() -> None:
    model = make(envs("discrete"))
    with pytest.raises(TypeError, match=r"total_timesteps.*'100'"):
        model.learn("100")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"total_timesteps.*-5"):
        model.learn(-5)


# -------------------------------------------------------------------- NaN never travels


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("fault", ["reward", "observation"])
@pytest.mark.parametrize("at", [14, 15])  # in an episode, and at its end
@pytest.mark.parametrize("learning_starts", [8, 100])
def test_a_nan_of_the_env_is_named(fault: str, at: int, normalized: bool, learning_starts: int) -> None:
    env: Any = vec(ScriptedEnv(lengths=(5,)), FaultyEnv(fault, at, lengths=(5,)))
    env = VecNormalize(env) if normalized else env
    model = make(env, learning_starts=learning_starts, train_freq=3)
    before: list[Any] = []

    class Keep(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            before[:] = [parameters(model.policy), copy.deepcopy(getattr(env, "obs_rms", None))]

    with pytest.raises(NonFiniteError, match=rf"{fault}.* is nan in env 1 at step {(at - 1) % 3}") as caught:
        model.learn(100, callback=Keep())
    assert (caught.value.env, caught.value.step) == (1, (at - 1) % 3)
    assert th.equal(before[0], parameters(model.policy))
    buffer: Any = model.replay_buffer
    assert all(np.isfinite(array).all() for array in (buffer.rewards, buffer.observations, buffer.next_observations))
    if normalized:
        assert np.array_equal(before[1].mean, env.obs_rms.mean)
    model.learn(20, reset_num_timesteps=False)  # the env is reset, and it was only once
    assert parameters(model.policy).isfinite().all()


def test_a_nan_at_the_end_of_an_episode_of_dicts_is_named() -> None:
    class Faulty(ScriptedEnv):
        def step(self, action: Any) -> Any:
            obs, *rest = super().step(action)
            return {**obs, "vec": obs["vec"] * NAN} if rest[1] else obs, *rest

    env = vec(Faulty(lengths=(5,), observation_space=OBSERVATION_SPACES["dict"]))
    with pytest.raises(NonFiniteError, match=r"'vec'.* is nan in env 0.*time step 5"):
        make(env).learn(20)


@pytest.mark.parametrize("normalized", [False, True])
def test_a_nan_of_a_reset_is_named(normalized: bool) -> None:
    class Faulty(ScriptedEnv):
        def reset(self, **kwargs: Any) -> Any:
            obs, info = super().reset(**kwargs)
            return obs * NAN if self.resets == 1 else obs, info

    env: Any = vec(ScriptedEnv(), Faulty())
    env = VecNormalize(env) if normalized else env
    model = make(env)
    with pytest.raises(NonFiniteError, match=r"observation is nan in env 1.*reset"):
        model.learn(20)
    assert model.learn(20).num_timesteps == 20


@pytest.mark.parametrize("action_space", ACTION_SPACES)
@pytest.mark.parametrize("name", ["actor.latent_pi.0.weight", "critic.qf0.0.weight"])
def test_a_nan_among_the_parameters_is_named(action_space: str, name: str) -> None:
    model = make(envs(action_space)).learn(20)
    with th.no_grad():
        model.policy.get_parameter(name)[0, 0] = NAN
    before = parameters(model.policy)
    with pytest.raises(NonFiniteError, match=rf"parameter {name} is nan"):
        model.learn(20)
    assert th.equal(before.nan_to_num(), parameters(model.policy).nan_to_num())


@pytest.mark.parametrize("action_space", ACTION_SPACES)
def test_a_policy_that_is_not_finite_does_not_act(action_space: str) -> None:
    env = ScriptedEnv(action_space=ACTION_SPACES[action_space])
    model = make(vec(env), learning_starts=0, gradient_steps=0)
    with th.no_grad():
        model.actor.latent_pi[0].weight[0, 0] = INF
    with pytest.raises(NonFiniteError, match=r"parameter actor.latent_pi.0.weight is inf"):
        model.learn(5)
    assert env.actions == []


@pytest.mark.parametrize("optimizer", [th.optim.SGD, th.optim.Adam])
def test_a_failed_update_changes_nothing(optimizer: Any) -> None:
    kwargs = {"optimizer_class": optimizer, "features_extractor_class": BatchNormExtractor}
    model = make(envs("box"), policy_kwargs=kwargs, gradient_steps=3).learn(20)
    model.replay_buffer.rewards[:] = INF  # type: ignore[union-attr]
    before = copy.deepcopy(model.policy.state_dict())
    with pytest.raises(NonFiniteError, match=r"finite before the step. A smaller learning rate"):
        model.train(3, 8)
    after = model.policy.state_dict()
    assert all(th.equal(before[name], after[name]) for name in before)
    model.replay_buffer.rewards[:] = 1.0  # type: ignore[union-attr]
    model.train(3, 8)
    assert parameters(model.policy).isfinite().all()
