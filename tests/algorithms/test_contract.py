"""What every algorithm here owes to SB3: one table of algorithms, shared tests."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import A2C
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.vec_env import VecNormalize

from sb3_pg import NPG, TRPO, ActorCritic, KLPenaltyPG, OffPolicyPG, Reinforce
from sb3_pg.algorithms.natural_gradient import NaturalGradient
from sb3_pg.baselines import ValueBaseline
from sb3_pg.policies import evaluate, policy_actions
from tests.helpers import ACTION_SPACES, ScriptedEnv, vec

pytestmark = pytest.mark.filterwarnings("ignore:batch_size=.* does not divide")  # rollouts are small here
#: Actor and critic in one step, as in A2C.
JOINT: dict[str, Any] = {"critic_learning_rate": None, "n_critic_updates": 1}
Make = Callable[..., Any]
CLASSES = (Reinforce, ActorCritic, NPG, TRPO, KLPenaltyPG)
#: name -> model on an env; later algorithms add their line.
ALGORITHMS: dict[str, Make] = {
    "reinforce": lambda env, **k: Reinforce("MlpPolicy", env, **{"n_episodes": 4, "baseline": "leave_one_out", **k}),
    "reinforce-value": lambda env, **k: Reinforce("MlpPolicy", env, **{"n_steps": 16, **JOINT, **k}),
    "reinforce-own-critic": lambda env, **k: Reinforce(
        "MlpPolicy", env, **{"n_steps": 16, "critic_learning_rate": "lin_1e-2", "n_critic_updates": 2, **k}
    ),
    "reinforce-linear": lambda env, **k: Reinforce("MlpPolicy", env, **{"n_episodes": 4, "baseline": "linear", **k}),
    "actor-critic": lambda env, **k: ActorCritic("MlpPolicy", env, **k),
    "actor-critic-batch": lambda env, **k: ActorCritic(
        "MlpPolicy",
        env,
        **{
            "n_steps": 16,
            "advantage": "td",
            "critic_fit": "before",
            "critic_learning_rate": "lin_1e-2",
            "n_critic_updates": 2,
            "normalize_value_targets": True,
            "recompute_advantage": True,
            **k,
        },
    ),
    "actor-critic-episodes": lambda env, **k: ActorCritic(
        "MlpPolicy", env, **{"n_steps": None, "n_episodes": 4, "advantage": "n_step", "state_discount": True, **k}
    ),
    "npg": lambda env, **k: NPG("MlpPolicy", env, **{"n_steps": 32, "batch_size": 32, "n_critic_updates": 2, **k}),
    "npg-fixed": lambda env, **k: NPG(
        "MlpPolicy",
        env,
        **{"n_steps": 32, "batch_size": None, "step": "fixed", "step_size": 1e-2, "n_critic_updates": 2, **k},
    ),
    "trpo": lambda env, **k: TRPO("MlpPolicy", env, **{"n_steps": 32, "batch_size": 16, "n_critic_updates": 2, **k}),
    "trpo-episodes": lambda env, **k: TRPO(
        "MlpPolicy", env, **{"n_steps": None, "n_episodes": 4, "n_critic_updates": 2, "state_discount": True, **k}
    ),
    "trpo-own-critic": lambda env, **k: TRPO(
        "MlpPolicy",
        env,
        **{
            "n_steps": 32,
            "ent_coef": 1e-3,
            "critic_learning_rate": "lin_1e-2",
            "critic_fit": "before",
            "n_critic_updates": 2,
            "normalize_value_targets": True,
            "critic_batch_size": 12,
            "cg_max_steps": 3,
            "fisher_subsample": 2,
            "fisher_chunk_size": 7,
            **k,
        },
    ),
    "kl-penalty": lambda env, **k: KLPenaltyPG(
        "MlpPolicy",
        env,
        **{"n_steps": 32, "n_epochs": 2, "critic_learning_rate": "lin_1e-2", "n_critic_updates": 2, **k},
    ),
    "kl-penalty-joint": lambda env, **k: KLPenaltyPG(
        "MlpPolicy",
        env,
        **{"n_steps": 32, "batch_size": 12, "n_epochs": 2, "dual_update": "multiplicative", **JOINT, **k},
    ),
    "off-policy": lambda env, **k: OffPolicyPG(
        "MlpPolicy", env, **{"train_freq": (4, "episode"), "buffer_trajectories": 8, "gradient_steps": 2, **k}
    ),
    "off-policy-steps": lambda env, **k: OffPolicyPG(
        "MlpPolicy",
        env,
        **{
            "train_freq": 16,
            "batch_size": 3,
            "gradient_steps": 2,
            "ratio": "per_decision",
            "max_ratio": 2.0,
            "self_normalize": True,
            "min_ess": 0.1,
            **JOINT,
            **k,
        },
    ),
}


@pytest.fixture(params=list(ALGORITHMS))
def make(request: pytest.FixtureRequest) -> Make:
    return lambda env, **k: ALGORITHMS[request.param](env, **{"device": "cpu", "seed": 0, **k})


def parameters(model: Any) -> th.Tensor:
    return th.nn.utils.parameters_to_vector(model.policy.parameters()).detach().clone()


def test_the_same_seed_gives_the_same_weights(make: Make) -> None:
    a, b, other = (make("CartPole-v1", seed=seed).learn(300) for seed in (3, 3, 4))
    assert th.equal(parameters(a), parameters(b))
    assert not th.equal(parameters(a), parameters(other))


def test_deterministic_prediction_is_a_function_of_the_observation(make: Make) -> None:
    model = make("Pendulum-v1", max_episode_steps=200)
    obs = model.get_env().reset()
    first, second = (model.predict(obs, deterministic=True)[0] for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(*(model.predict(obs)[0] for _ in range(2)))


def test_save_and_load_are_exact(make: Make, tmp_path: Path) -> None:
    env = make_vec_env("CartPole-v1", 2, seed=0)
    model = make(env).learn(300)
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", env=env)
    assert th.equal(parameters(model), parameters(loaded))
    before, after = model.get_parameters(), loaded.get_parameters()
    assert before.keys() == after.keys()
    assert ("critic_optimizer" in before) == (model.critic_optimizer is not None)
    for name in before:
        assert str(before[name]) == str(after[name])
    assert loaded.num_timesteps == model.num_timesteps
    assert loaded.learn(100, reset_num_timesteps=False).num_timesteps > model.num_timesteps


def test_a_model_without_env_predicts(make: Make, tmp_path: Path) -> None:
    model = make("CartPole-v1")
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model")
    obs = model.get_env().reset()
    assert np.array_equal(model.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])


def test_a_model_can_be_loaded_on_another_number_of_envs(make: Make, tmp_path: Path) -> None:
    make("CartPole-v1").save(tmp_path / "model")
    env = make_vec_env("CartPole-v1", 4)
    model = type(make("CartPole-v1")).load(tmp_path / "model", env=env)
    assert model.learn(200).n_envs == 4


def test_arguments_given_as_dicts_stay_as_they_were(make: Make) -> None:
    policy_kwargs: dict[str, Any] = {"net_arch": [4]}
    make(vec(ScriptedEnv()), policy_kwargs=policy_kwargs, device="cpu")
    assert policy_kwargs == {"net_arch": [4]}  # SB3's off-policy classes write into it


def test_set_env_and_continue(make: Make) -> None:
    model = make("CartPole-v1").learn(100)
    seen = model.num_timesteps
    model.set_env(gym.make("CartPole-v1"))
    model.learn(100, reset_num_timesteps=False)
    assert model.num_timesteps >= seen + 100
    seen = model.num_timesteps
    model.learn(1)
    assert model.num_timesteps < seen


def test_continued_learning_does_not_reset_the_env_of_segments() -> None:
    env = ScriptedEnv(lengths=(1000,))
    model = Reinforce("MlpPolicy", vec(env), n_steps=8, device="cpu").learn(8)
    model.learn(8, reset_num_timesteps=False)
    assert env.resets == 1
    assert model._batch is not None
    assert model._batch.timesteps.flatten().tolist() == list(range(8, 16))


def test_evaluation_and_checkpoints(make: Make, tmp_path: Path) -> None:
    callbacks = [
        EvalCallback(gym.make("CartPole-v1"), eval_freq=100, n_eval_episodes=2, log_path=str(tmp_path), verbose=0),
        CheckpointCallback(save_freq=100, save_path=str(tmp_path)),
    ]
    model = make("CartPole-v1").learn(300, callback=callbacks)
    assert len(np.load(tmp_path / "evaluations.npz")["timesteps"]) >= 3
    type(model).load(tmp_path / "rl_model_100_steps", env=gym.make("CartPole-v1")).learn(50)


def test_a_reward_threshold_stops_training(make: Make) -> None:
    stop = StopTrainingOnRewardThreshold(reward_threshold=1.0)
    evaluate = EvalCallback(gym.make("CartPole-v1"), stop, eval_freq=50, n_eval_episodes=1, verbose=0)
    assert make("CartPole-v1").learn(100_000, callback=evaluate).num_timesteps == 50


def test_evaluation_does_not_change_training(make: Make) -> None:
    evaluate = EvalCallback(gym.make("CartPole-v1"), eval_freq=20, n_eval_episodes=1, verbose=0)
    assert th.equal(
        parameters(make("CartPole-v1").learn(200, callback=evaluate)), parameters(make("CartPole-v1").learn(200))
    )


def test_the_progress_bar_counts_every_step(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    model = make("CartPole-v1").learn(100, progress_bar=True)
    assert f"{model.num_timesteps:,}/100" in capsys.readouterr().out


def test_normalized_envs(make: Make) -> None:
    env = VecNormalize(make_vec_env("Pendulum-v1", 2), gamma=0.99)
    model = make(env).learn(900)
    assert model.get_vec_normalize_env() is env
    assert env.obs_rms.count > 400


#: Logged by every algorithm, with every update that is written to the log.
EXPLANATION = (
    "train/entropy",
    "train/entropy_loss",
    "train/grad_norm",
    "train/step_size",
    "train/joint_kl",
    "train/surrogate_predicted",
    "train/surrogate_realized",
    "train/largest_ratio",
    "train/effective_sample_size",
    "train/explained_variance",
    "train/std",
    "train/clipped_action_fraction",
    "train/learning_rate",
    "time/update_seconds",
)
#: Likewise; the log is written, and emptied, between them and the update.
COLLECTED = {"rollout/valid_fraction", "time/collect_seconds"}
#: Logged by the algorithms of a class, besides.
OWN_EXPLANATION: dict[type, tuple[str, ...]] = {
    Reinforce: ("train/policy_loss",),
    ActorCritic: ("train/policy_loss",),
    NaturalGradient: ("train/step_outcome", "train/cg_iterations", "train/cg_residual", "train/line_search_steps"),
    KLPenaltyPG: ("train/policy_loss", "train/kl_coef", "train/n_epochs"),
}


def test_every_update_explains_itself(make: Make) -> None:
    model = make("Pendulum-v1").learn(900, log_interval=1)
    logged = dict(model.logger.name_to_value)
    own = {name for cls, names in OWN_EXPLANATION.items() if isinstance(model, cls) for name in names}
    for name in {*EXPLANATION, *own} - {"train/step_outcome"}:
        assert np.isfinite(logged[name]), name
    assert logged.get("train/step_outcome", "accepted") == "accepted"
    documented = (Path(__file__).parents[2] / "README.md").read_text()
    ours = {name for name in logged if name.startswith(("train/", "diagnostics/"))} - {"train/n_updates"}
    assert own <= ours
    assert [name for name in {*ours, *EXPLANATION, *COLLECTED} if f"`{name}`" not in documented] == []
    if model._uses_critic():
        assert np.isfinite(logged["train/value_loss"])
    if model.critic_optimizer is not None:
        assert logged["train/critic_learning_rate"] < 1e-2


def test_explanations_do_not_change_training(make: Make) -> None:
    plain, explained = (make("CartPole-v1").learn(300, log_interval=n) for n in (None, 1))
    assert th.equal(parameters(plain), parameters(explained))
    knows_anyway = isinstance(plain, NaturalGradient | KLPenaltyPG)
    assert ("train/joint_kl" in plain.logger.name_to_value) == knows_anyway
    assert "train/surrogate_predicted" in explained.logger.name_to_value


def test_the_updates_that_are_logged_are_those_that_explain_themselves(make: Make) -> None:
    """SB3 writes the log after collecting, so that it holds the numbers of the update before."""
    written: list[set[str]] = []
    model = make("CartPole-v1")
    model._setup_learn(1)
    dump = model.dump_logs
    model.dump_logs = lambda *args: (written.append(set(model.logger.name_to_value)), dump(*args))[1]
    model.learn(1200, log_interval=3)
    written = [names for names in written if "train/learning_rate" in names]  # after the first update
    assert len(written) > 1
    assert all({*EXPLANATION, *COLLECTED} - {"train/std"} <= names for names in written)


SMALL_STEPS: dict[str, Make] = {
    "actor-critic": lambda env, **k: ActorCritic("MlpPolicy", env, 1e-4, max_grad_norm=None, **k),
    "npg": lambda env, **k: NPG("MlpPolicy", env, target_kl=1e-5, **k),
    "trpo": lambda env, **k: TRPO("MlpPolicy", env, target_kl=1e-5, **k),
    "kl-penalty": lambda env, **k: KLPenaltyPG("MlpPolicy", env, 1e-4, n_epochs=1, batch_size=256, **k),
}


@pytest.mark.parametrize("action_space", ACTION_SPACES)
@pytest.mark.parametrize("name", SMALL_STEPS)
def test_explanations_of_a_small_step_agree(name: str, action_space: str) -> None:
    """KL is a quadratic form of the step, its estimate agrees with it, and the surrogate gains what was predicted."""
    env = ScriptedEnv(lengths=(7,), action_space=ACTION_SPACES[action_space])
    model = SMALL_STEPS[name](vec(env), n_steps=256, seed=0, device="cpu")
    model.learn(256, log_interval=1)
    logged = model.logger.name_to_value
    old = model._batch.log_probs
    new = evaluate(
        model.policy,
        model._batch.flat_observations,
        policy_actions(model._batch.select(model._batch.actions), model.action_space),
        False,
    ).log_prob.detach()
    ratio = (new - old.flatten()).double().exp()
    assert logged["train/joint_kl"] == pytest.approx(float((ratio - 1 - ratio.log()).mean()), rel=0.2)
    assert logged["train/joint_kl"] > 0
    assert logged["train/largest_ratio"] == pytest.approx(float(ratio.max()), rel=1e-5)
    share = float(ratio.sum() ** 2 / (ratio**2).sum() / 256)
    assert logged["train/effective_sample_size"] == pytest.approx(share, rel=1e-5)
    assert logged["train/surrogate_realized"] == pytest.approx(logged["train/surrogate_predicted"], rel=0.1)
    assert logged["train/surrogate_predicted"] > 0


@pytest.mark.parametrize("schedule", ["lin_1e-2", lambda progress: 1e-2 * progress])
def test_learning_rate_schedules(make: Make, schedule: Any) -> None:
    model = make("CartPole-v1", learning_rate=schedule).learn(1000)
    assert 0 <= model.policy.optimizer.param_groups[0]["lr"] < 5e-3


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if not name.startswith(("npg", "trpo"))])
def test_gradients_are_clipped_to_the_norm_or_not_at_all(name: str) -> None:
    kwargs = {"learning_rate": 1.0, "policy_kwargs": {"optimizer_class": th.optim.SGD}, "device": "cpu", "seed": 0}
    if name.startswith("kl-penalty"):
        kwargs |= {"batch_size": 32, "n_epochs": 1}  # a single step
    for norm in (None, 1e-3):
        model = ALGORITHMS[name]("CartPole-v1", max_grad_norm=norm, **kwargs)
        actor = list(model.parameter_sets.actor.values())
        before = th.nn.utils.parameters_to_vector(actor).detach().clone()
        callback = model._setup_learn(1000)[1]
        if isinstance(model, OffPolicyPG):
            model.collect_rollouts(model.env, callback, TrainFreq(4, TrainFrequencyUnit.EPISODE), model.replay_buffer)
            model.train(1, None)
        else:
            model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
            model.train()
        step = (th.nn.utils.parameters_to_vector(actor) - before).norm().item()
        assert step > 1e-2 if norm is None else step <= 1e-3 * (1 + 1e-3)


def test_a_nonfinite_gradient_changes_nothing(make: Make) -> None:
    model = make("CartPole-v1").learn(100)
    with th.no_grad():
        model.policy.action_net.weight[0, 0] = th.inf
    before = parameters(model)
    with pytest.raises(FloatingPointError):
        model.learn(100)
    assert th.equal(parameters(model), before)


def test_a_step_that_overflows_is_undone() -> None:
    kwargs = {"policy_kwargs": {"optimizer_class": th.optim.SGD}, "device": "cpu", "seed": 0}
    model = Reinforce("MlpPolicy", "CartPole-v1", learning_rate=1e38, max_grad_norm=None, baseline="none", **kwargs)
    before = parameters(model)
    with pytest.raises(FloatingPointError, match=r"parameter .* finite before the step.*smaller learning rate"):
        model.learn(100)
    assert th.equal(parameters(model), before)


class OwnForward(ActorCriticPolicy):
    calls = 0

    def forward(self, obs: Any, deterministic: bool = False) -> Any:
        type(self).calls += 1
        return super().forward(obs, deterministic)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_policys_own_forward_is_called_at_every_step(cls: Any) -> None:
    OwnForward.calls = 0
    model = cls(OwnForward, "CartPole-v1", n_steps=16, device="cpu").learn(32)
    assert OwnForward.calls == 32
    batch = model._batch
    assert batch is not None
    assert batch.values is not None
    assert batch.log_probs is not None
    assert th.isfinite(batch.log_probs).all()


class CountingBuffer(RolloutBuffer):
    added = 0

    def add(self, *args: Any, **kwargs: Any) -> None:
        type(self).added += 1
        super().add(*args, **kwargs)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_foreign_buffer_is_filled_step_by_step(cls: Any) -> None:
    CountingBuffer.added = 0
    model = cls("MlpPolicy", "CartPole-v1", n_steps=16, rollout_buffer_class=CountingBuffer, device="cpu")
    before = parameters(model)
    model.learn(32, log_interval=1)
    assert CountingBuffer.added == 32
    assert model._n_updates == 2
    assert model.logger.name_to_value["train/joint_kl"] > 0
    assert not th.equal(parameters(model), before)


def test_with_a_foreign_buffer_one_update_is_a2cs() -> None:
    """The buffer's advantages, one joint step: A2C's own formula, to float tolerance."""
    kwargs: dict[str, Any] = {
        "n_steps": 64,
        "learning_rate": 1e-3,
        "seed": 1,
        "device": "cpu",
        "ent_coef": 0.01,
        "gamma": 0.9,
    }
    ours = Reinforce("MlpPolicy", "CartPole-v1", rollout_buffer_class=RolloutBuffer, **JOINT, **kwargs)
    before = parameters(ours)
    ours.learn(64)
    theirs = A2C("MlpPolicy", "CartPole-v1", use_rms_prop=False, **kwargs)
    assert th.equal(parameters(theirs), before)
    theirs.learn(64)
    assert th.allclose(parameters(ours), parameters(theirs), atol=1e-6)


@pytest.mark.parametrize("cls", [Reinforce, ActorCritic, KLPenaltyPG])
def test_critic_only_parameters_are_the_critic_optimizers_business(cls: Any) -> None:
    model = cls(
        "MlpPolicy", "CartPole-v1", n_steps=32, critic_learning_rate=1e-2, learning_rate=0.0, device="cpu", seed=0
    )
    actor, critic = model.parameter_sets
    assert set(actor) | set(critic) == {name for name, _ in model.policy.named_parameters()}
    assert set(actor).isdisjoint(critic)
    before = {name: p.detach().clone() for name, p in model.policy.named_parameters()}
    model.learn(32)
    for name, p in model.policy.named_parameters():
        assert th.equal(p, before[name]) == (name in actor), name


class LinearExtractor(BaseFeaturesExtractor):
    def __init__(self, space: Any) -> None:
        super().__init__(space, 4)
        self.net = th.nn.Linear(4, 4)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.net(x)


@pytest.mark.parametrize("cls", [NPG, TRPO])
@pytest.mark.parametrize("critic_learning_rate", [None, 1e-2])
def test_the_natural_methods_leave_shared_features_to_the_actor(cls: Any, critic_learning_rate: float | None) -> None:
    def train(n_critic_updates: int) -> Any:
        policy_kwargs = {"features_extractor_class": LinearExtractor}
        kwargs = {"n_critic_updates": n_critic_updates, "critic_learning_rate": critic_learning_rate}
        return cls("MlpPolicy", "CartPole-v1", n_steps=32, policy_kwargs=policy_kwargs, device="cpu", seed=0, **kwargs)

    few, many = train(1).learn(32), train(9).learn(32)
    assert few._shares_features
    assert set(few._critic_only()).isdisjoint(few.parameter_sets.actor)
    for name, parameter in many.policy.named_parameters():
        same = th.equal(parameter, few.policy.get_parameter(name))
        assert same == (name in few.parameter_sets.actor), name


def test_shared_features_are_trained_by_both_losses() -> None:
    model = Reinforce(
        "MlpPolicy",
        "CartPole-v1",
        n_steps=32,
        critic_learning_rate=1e-2,
        device="cpu",
        seed=0,
        policy_kwargs={"features_extractor_class": LinearExtractor},
    )
    assert model._shares_features
    assert model.critic_optimizer is not None
    in_critic = {id(p) for group in model.critic_optimizer.param_groups for p in group["params"]}
    shared = model.policy.features_extractor.net.weight
    assert id(shared) not in in_critic
    model.learn(32)
    batch = model._batch
    assert batch is not None
    gradients = []
    for vf_coef in (0.0, 0.5):
        model.vf_coef = vf_coef
        batch.advantages = None
        model._accumulate_gradient(batch)
        assert shared.grad is not None
        gradients.append(shared.grad.clone())
        assert model.policy.value_net.weight.grad is None
    assert not th.allclose(*gradients)


@pytest.mark.cuda
@pytest.mark.skipif(not th.cuda.is_available(), reason="no CUDA device")
def test_trains_on_cuda(make: Make) -> None:
    model = make("CartPole-v1", device="cuda").learn(300)
    assert model.policy.device.type == "cuda"


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("first", [{}, {"critic_learning_rate": 1e-3}])
@pytest.mark.parametrize("then", [{}, {"critic_learning_rate": 1e-3}])
def test_a_model_can_be_loaded_with_or_without_a_critics_own_optimizer(
    cls: Any, first: dict[str, float], then: dict[str, float], tmp_path: Path
) -> None:
    model = cls("MlpPolicy", "CartPole-v1", n_steps=16, device="cpu", **{**JOINT, **first}).learn(32)
    model.save(tmp_path / "model")
    loaded = cls.load(tmp_path / "model", env=model.get_env(), **{**JOINT, **then})
    assert (loaded.critic_optimizer is not None) == bool(then)
    assert th.equal(parameters(model), parameters(loaded))
    loaded.learn(32)


def test_pickle_and_deepcopy(make: Make) -> None:
    fresh = make("CartPole-v1")
    copy.deepcopy(fresh.policy)
    model = fresh.learn(200)
    again = pickle.loads(cloudpickle.dumps(model))  # as SB3 does: envs are made by local functions
    assert th.equal(parameters(model), parameters(again))
    assert again.learn(100).num_timesteps >= 100


def test_setting_up_again_is_fine(make: Make) -> None:
    model = make("CartPole-v1").learn(50)
    model._setup_model()
    model.learn(50)


def test_a_frozen_critic_or_extractor_trains_the_rest(make: Make) -> None:
    model = make("CartPole-v1")
    frozen = [p for name, p in model.policy.named_parameters() if "mlp_extractor" in name]
    for parameter in frozen:
        parameter.requires_grad_(False)
    before, head = [p.detach().clone() for p in frozen], model.policy.action_net.weight.detach().clone()
    model.learn(200)
    assert all(th.equal(a, b) for a, b in zip(before, frozen, strict=True))
    assert not th.equal(head, model.policy.action_net.weight)


class BatchNormExtractor(BaseFeaturesExtractor):
    def __init__(self, space: Any) -> None:
        super().__init__(space, 4)
        self.norm = th.nn.BatchNorm1d(4)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.norm(x)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_critic_frozen_before_or_after_does_not_stop_the_actor(cls: Any) -> None:
    class FrozenCritic(ActorCriticPolicy):
        def _build(self, lr_schedule: Any) -> None:
            super()._build(lr_schedule)
            for parameter in (*self.value_net.parameters(), *self.mlp_extractor.value_net.parameters()):
                parameter.requires_grad_(False)

    model = cls(FrozenCritic, "CartPole-v1", n_steps=50, device="cpu", seed=0)
    assert all(not p.requires_grad for p in model.policy.value_net.parameters())
    before = parameters(model)
    model.learn(100)
    assert not th.equal(before, parameters(model))


def test_a_frozen_head_under_the_component_wise_baseline() -> None:
    model = Reinforce(
        "MlpPolicy", "CartPole-v1", baseline="optimal", baseline_kwargs={"component_wise": True}, device="cpu"
    ).learn(100)
    head = model.policy.action_net.requires_grad_(False).weight.clone()
    model.learn(100)
    assert th.equal(head, model.policy.action_net.weight)


@pytest.mark.parametrize("cls", CLASSES)
def test_what_a_callback_writes_into_the_buffer_is_used(cls: Any) -> None:
    class NoAdvantage(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            self.model.rollout_buffer.advantages[:] = 0.0

    model = cls("MlpPolicy", "CartPole-v1", n_steps=16, device="cpu", seed=0)
    actor = list(model.parameter_sets.actor.values())
    before = th.nn.utils.parameters_to_vector(actor).detach().clone()
    model.learn(32, callback=NoAdvantage())
    moved = (th.nn.utils.parameters_to_vector(actor) - before).abs().max()
    assert moved <= (1e-4 if cls is KLPenaltyPG else 0)  # the divergence's gradient is 0 but for rounding


def test_rounding_of_a_fitted_critic_is_not_normalized_to_full_size() -> None:
    class Constant(ScriptedEnv):
        def _obs(self) -> Any:
            return np.ones(3, np.float32)

        def step(self, action: Any) -> Any:
            obs, _, *rest = super().step(action)
            return obs, 100.0, *rest

    model = Reinforce(
        "MlpPolicy",
        vec(Constant(), Constant()),
        gamma=0.0,
        n_steps=32,
        normalize_advantage=True,
        critic_learning_rate=3e-2,
        device="cpu",
        seed=0,
    )
    model.learn(32 * 2 * 60)
    batch = model._batch
    assert batch is not None
    assert batch.advantages is not None
    assert batch.advantages.abs().max() < 20  # the critic has learned what there is
    batch.advantages = (batch.returns - 100.0) + 3e-6 * th.randn_like(batch.rewards)
    policy_loss = model._accumulate_gradient(batch)["policy_loss"]
    assert abs(float(policy_loss)) < 1e-4


def test_a_fitted_baseline_is_loaded_unless_another_is_asked_for(tmp_path: Path) -> None:
    model = ALGORITHMS["reinforce-linear"]("CartPole-v1", device="cpu", seed=0).learn(100)
    model.save(tmp_path / "model")
    same = Reinforce.load(tmp_path / "model", env="CartPole-v1", device="cpu")
    assert np.array_equal(same._baseline.weights, model._baseline.weights)
    other = Reinforce.load(tmp_path / "model", env="CartPole-v1", device="cpu", baseline_kwargs={"regularization": 1.0})
    assert other._baseline.weights is None


def test_load_takes_attributes_too(tmp_path: Path) -> None:
    Reinforce("MlpPolicy", "CartPole-v1", device="cpu").save(tmp_path / "model")
    assert Reinforce.load(tmp_path / "model", num_timesteps=7).num_timesteps == 7


@pytest.mark.parametrize("baseline", ["mean", "optimal"])
def test_only_the_update_trains_batch_norm(baseline: str) -> None:
    model = Reinforce(
        "MlpPolicy",
        "CartPole-v1",
        baseline=baseline,
        device="cpu",
        policy_kwargs={"features_extractor_class": BatchNormExtractor},
    )
    model.learn(1)
    assert model._n_updates == 1
    assert model.policy.features_extractor.norm.num_batches_tracked == 1


@pytest.mark.parametrize("cls", CLASSES)
def test_a_failed_update_restores_buffers_too(cls: Any) -> None:
    policy_kwargs = {"features_extractor_class": BatchNormExtractor}
    model = cls("MlpPolicy", "CartPole-v1", n_steps=32, device="cpu", policy_kwargs=policy_kwargs).learn(1)
    before = copy.deepcopy(model.policy.state_dict())
    with th.no_grad():
        model.policy.action_net.weight[0, 0] = th.inf
    with pytest.raises(FloatingPointError):
        model.learn(100)
    after = model.policy.state_dict()
    assert all(th.equal(before[k], after[k]) for k in before if k != "action_net.weight")


@pytest.mark.parametrize(
    "kwargs",
    [{"baseline": "time"}, *({"baseline": b, "returns": "total"} for b in ("mean", "leave_one_out", "optimal"))],
    ids=lambda kwargs: "-".join(kwargs.values()),
)
def test_equal_episodes_teach_nothing_even_normalized(kwargs: dict[str, Any]) -> None:
    """Rounding must not become a spread: a solved task would walk away from its solution."""

    class Same(ScriptedEnv):
        def step(self, action: Any) -> Any:
            obs, _, *rest = super().step(action)
            return obs, 1.0, *rest

    model = Reinforce(
        "MlpPolicy",
        vec(*(Same(lengths=(501,)) for _ in range(8))),
        normalize_advantage=True,
        n_episodes=8,
        device="cpu",
        seed=0,
        **kwargs,
    )
    before = parameters(model)
    model.learn(1)
    assert model._n_updates == 1
    assert (parameters(model) - before).abs().max() < 1e-3  # Adam's full step is 7e-3


def test_learning_without_an_env_or_a_number_is_explained(make: Make, tmp_path: Path) -> None:
    model = make("CartPole-v1")
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="set_env"):
        type(model).load(tmp_path / "model").learn(10)
    with pytest.raises(TypeError, match=r"total_timesteps.*'100'"):
        model.learn("100")
    with pytest.raises(TypeError, match="has no argument 'gama'; did you mean 'gamma'"):
        type(model).load(tmp_path / "model", gama=0.3)


@pytest.mark.parametrize("cls", CLASSES)
def test_set_parameters_still_wants_all_of_them(cls: Any) -> None:
    model = cls("MlpPolicy", "CartPole-v1", n_steps=16, critic_learning_rate=1e-3, device="cpu")
    params = model.get_parameters()
    del params["critic_optimizer"]
    with pytest.raises(ValueError, match="critic_optimizer"):
        model.set_parameters(params, exact_match=True)


def test_a_ready_made_value_baseline_is_the_critic() -> None:
    model = Reinforce("MlpPolicy", "CartPole-v1", baseline=ValueBaseline(), n_steps=16, device="cpu").learn(32)
    assert model.critic_optimizer is not None
