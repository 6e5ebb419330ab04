"""What SB3's A2C takes in its stride: unusual policies, and callbacks that change the model in the middle of it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import CategoricalDistribution, Distribution
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_pg import NPG, TRPO, ActorCritic, KLPenaltyPG, NonFiniteError, OffPolicyPG, Reinforce
from sb3_pg.policies import Snapshot
from tests.algorithms.steps import AtRolloutEnd
from tests.helpers import FaultyEnv, OwnForward, ScriptedEnv, vec

trust_region = pytest.mark.parametrize("cls", [NPG, TRPO, KLPenaltyPG])


def difference(
    policy: Any, env: str = "CartPole-v1", change: Callable[[Any], Any] | None = None, **kwargs: Any
) -> float:
    """Largest difference to A2C's parameters after some updates."""
    models = []
    for cls in (A2C, ActorCritic):
        model = cls(policy, make_vec_env(env, 2, seed=0), seed=0, device="cpu", **kwargs)
        callback = None if change is None else AtRolloutEnd(change)
        models.append(nn.utils.parameters_to_vector(model.learn(100, callback=callback).policy.parameters()))
    return float((models[0] - models[1]).abs().max())


@pytest.mark.parametrize("baseline", ["value", "leave_one_out"])
def test_own_forward_with_episodes_of_unequal_length(baseline: Any) -> None:
    model = Reinforce(OwnForward, make_vec_env("CartPole-v1", 4, seed=0), baseline=baseline, seed=0, device="cpu")
    model.learn(300)
    buffer: Any = model.rollout_buffer
    assert not buffer.mask.all()


def train(cls: Any, policy: Any = "MlpPolicy", change: Callable[[Any], Any] | None = None, **kwargs: Any) -> Any:
    """A model after three updates, whose last one has moved the actor and said by how much."""
    defaults = {"n_steps": 32, "batch_size": 32, "seed": 0, "device": "cpu"}
    model = cls(policy, make_vec_env("CartPole-v1", 2, seed=0), **{**defaults, **kwargs})
    model.learn(129, callback=None if change is None else AtRolloutEnd(change))
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())
    assert model._n_updates == 3
    assert model.logger.name_to_value["train/joint_kl"] > 0
    return model


@trust_region
def test_own_forward_with_unequal_episodes_under_a_limit_of_the_divergence(cls: Any) -> None:
    model = cls(OwnForward, make_vec_env("CartPole-v1", 4, seed=0), n_steps=None, n_episodes=4, seed=0, device="cpu")
    model.learn(300)
    assert not model.rollout_buffer.mask.all()
    assert model.logger.name_to_value["train/joint_kl"] > 0


class MixedPrecision(BaseFeaturesExtractor):
    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, 4)
        self.scale = nn.Parameter(th.ones(4, dtype=th.float64))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return (observations * self.scale).float()


def test_parameters_of_two_precisions() -> None:
    assert difference("MlpPolicy", policy_kwargs={"features_extractor_class": MixedPrecision}) < 1e-5
    model = ActorCritic(
        "MlpPolicy",
        vec(FaultyEnv("reward", 7, lengths=(50,), observation_space=spaces.Box(-1, 1, (4,)))),
        policy_kwargs={"features_extractor_class": MixedPrecision},
        device="cpu",
    )
    model.learn(5, log_interval=1)
    before = copy.deepcopy(model.policy.state_dict())
    with pytest.raises(NonFiniteError):
        model.learn(5, reset_num_timesteps=False)
    assert all(th.equal(before[name], value) for name, value in model.policy.state_dict().items())


@trust_region
@pytest.mark.parametrize("kwargs", [{}, {"critic_learning_rate": 1e-3, "ent_coef": 0.01}], ids=["", "own-critic"])
def test_parameters_of_two_precisions_under_a_limit_of_the_divergence(cls: Any, kwargs: dict[str, Any]) -> None:
    policy_kwargs = {"features_extractor_class": MixedPrecision}
    model = train(cls, policy_kwargs=policy_kwargs, **kwargs)
    assert not th.equal(model.policy.features_extractor.scale, th.ones(4, dtype=th.float64))


def test_a_single_parameter_is_restored_too() -> None:
    parameter = nn.Parameter(th.ones(3))
    before = Snapshot([parameter], [])
    with th.no_grad():
        parameter.add_(1)
    assert th.equal(before.values()[parameter], th.ones(3))


def test_the_entropy_of_a_certain_choice_has_a_gradient() -> None:
    model = ActorCritic("MlpPolicy", "CartPole-v1", ent_coef=0.01, device="cpu")
    head: Any = model.policy.action_net
    with th.no_grad():
        head.bias.copy_(th.tensor([0.0, -150.0]))
    model.learn(50)
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())


@pytest.mark.parametrize("kwargs", [{}, {"n_critic_updates": 2}], ids=["joint", "separate"])
def test_a_frozen_actor(kwargs: dict[str, Any]) -> None:
    model = ActorCritic("MlpPolicy", "CartPole-v1", seed=0, device="cpu", **kwargs)
    for parameter in model.learner.parameters.actor.values():
        parameter.requires_grad_(False)
    before = copy.deepcopy(model.policy.state_dict())
    model.learn(20, log_interval=1)
    moved = {name for name, value in model.policy.state_dict().items() if not th.equal(value, before[name])}
    assert moved == {name for name in before if "value" in name}


@trust_region
@pytest.mark.parametrize("kwargs", [{}, {"critic_learning_rate": None, "n_critic_updates": 1}], ids=["", "joint"])
def test_a_frozen_actor_under_a_limit_of_the_divergence(cls: Any, kwargs: dict[str, Any]) -> None:
    model = cls("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=32, seed=0, device="cpu", **kwargs)
    for parameter in model.learner.parameters.actor.values():
        parameter.requires_grad_(False)
    before = copy.deepcopy(model.policy.state_dict())
    model.learn(64)
    moved = {name for name, value in model.policy.state_dict().items() if not th.equal(value, before[name])}
    assert moved == {name for name in before if "value" in name}
    assert model.logger.name_to_value["train/joint_kl"] == pytest.approx(0, abs=1e-6)


class OwnDistribution(CategoricalDistribution):
    """Holds its logits itself, and shows no distribution of torch's."""

    def proba_distribution(self, action_logits: th.Tensor) -> "OwnDistribution":
        self.inner = th.distributions.Categorical(logits=action_logits)
        self.distribution: Any = None
        return self

    def log_prob(self, actions: th.Tensor) -> Any:
        return self.inner.log_prob(actions)

    def entropy(self) -> Any:
        return self.inner.entropy()

    def sample(self) -> Any:
        return self.inner.sample()

    def mode(self) -> th.Tensor:
        return self.inner.probs.argmax(1)


class OwnDistributionPolicy(ActorCriticPolicy):
    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        assert isinstance(self.action_space, spaces.Discrete)
        self.action_dist = OwnDistribution(int(self.action_space.n))


def test_a_distribution_of_the_users_own() -> None:
    assert difference(OwnDistributionPolicy) < 1e-5
    model = ActorCritic(OwnDistributionPolicy, "CartPole-v1", device="cpu").learn(50, log_interval=1)
    assert model.logger.name_to_value["train/joint_kl"] > 0


class Normalized(ActorCriticPolicy):
    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        nn.utils.parametrizations.spectral_norm(self.mlp_extractor.policy_net[2])
        optimizer_class: Any = self.optimizer_class
        self.optimizer = optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)


class ModeDependentHead(ActorCriticPolicy):
    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Distribution:
        return super()._get_action_dist_from_latent(latent_pi * (0.5 if self.training else 1.0))


class ValueOfHundred(ActorCriticPolicy):
    def predict_values(self, obs: Any) -> th.Tensor:
        return super().predict_values(obs) * 0 + 100


class Groups(ActorCriticPolicy):
    """Weight decay for the actor's head alone, and somebody who listens to steps."""

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        rest = [parameter for name, parameter in self.named_parameters() if "action_net" not in name]
        groups = [{"params": list(self.action_net.parameters()), "weight_decay": 0.5}, {"params": rest}]
        optimizer_class: Any = self.optimizer_class
        self.optimizer = optimizer_class(groups, lr=lr_schedule(1), **self.optimizer_kwargs)
        self.n_steps_taken = 0
        self.optimizer.register_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.n_steps_taken += 1


@pytest.mark.parametrize("policy", [Normalized, ModeDependentHead, ValueOfHundred, Groups])
@pytest.mark.parametrize("use_rms_prop", [True, False])
def test_unusual_policies_learn_as_under_a2c(policy: Any, use_rms_prop: bool) -> None:
    assert difference(policy, use_rms_prop=use_rms_prop) < 1e-5


@trust_region
@pytest.mark.parametrize("policy", [Normalized, ModeDependentHead, ValueOfHundred, Groups])
def test_unusual_policies_learn_under_a_limit_of_the_divergence(cls: Any, policy: Any) -> None:
    train(cls, policy)


def test_step_hooks_run_once() -> None:
    model = ActorCritic("MlpPolicy", "CartPole-v1", device="cpu")
    calls: list[int] = []
    model.policy.optimizer.register_step_post_hook(lambda *_: calls.append(1))
    model.learn(25)
    assert len(calls) == model._n_updates == 5


def halve(model: Any) -> None:
    model.policy.load_from_vector(model.policy.parameters_to_vector() * 0.5)


def halve_in_place(model: Any) -> None:
    for parameter in model.policy.parameters():
        parameter.data.mul_(0.5)


def replace_the_head(model: Any) -> None:
    if not hasattr(model, "replaced"):
        model.replaced = True
        head = nn.Linear(64, 2)
        nn.init.constant_(head.weight, 0.01)
        nn.init.constant_(head.bias, 0.5)
        model.policy.action_net = head


def unfreeze(model: Any) -> None:
    for parameter in model.policy.value_net.parameters():
        parameter.requires_grad_(model.num_timesteps > 30)


def ask_for_entropy(model: Any) -> None:
    model.ent_coef = 0.5


@pytest.mark.parametrize("change", [halve, halve_in_place, replace_the_head, unfreeze, ask_for_entropy, copy.deepcopy])
def test_callbacks_may_change_the_model_as_under_a2c(change: Callable[[Any], Any]) -> None:
    # without clipping: A2C counts the gradients of modules that its optimizer does not know, which nobody sets to zero
    assert difference("MlpPolicy", change=change, max_grad_norm=float("inf")) < 1e-5


@trust_region
@pytest.mark.parametrize("change", [halve, halve_in_place, replace_the_head, unfreeze, ask_for_entropy, copy.deepcopy])
def test_callbacks_may_change_the_model_under_a_limit_of_the_divergence(cls: Any, change: Callable[[Any], Any]) -> None:
    head = getattr(train(cls, change=change), "replaced", None)
    assert head is (True if change is replace_the_head else None)


@trust_region
def test_copying_the_model_changes_nothing(cls: Any) -> None:
    copied, plain = (train(cls, change=change) for change in (copy.deepcopy, None))
    assert th.equal(*(nn.utils.parameters_to_vector(model.policy.parameters()) for model in (copied, plain)))


def test_a_model_with_box_actions_may_be_copied_at_any_time() -> None:
    assert difference("MlpPolicy", "Pendulum-v1", change=copy.deepcopy) < 1e-5


def test_a_replaced_head_is_explained() -> None:
    model = ActorCritic("MlpPolicy", "CartPole-v1", device="cpu").learn(10, log_interval=1)
    model.policy.action_net = nn.Linear(64, 2)
    model.learn(10, log_interval=1)


def test_steps_of_an_episode_are_counted_across_saving(tmp_path: Path) -> None:
    """The factor gamma^t of the next steps is that of the episode as it goes on, 11 and 15 steps in."""

    def go_on(saved: bool) -> th.Tensor:
        env = vec(ScriptedEnv(lengths=(12,)), ScriptedEnv(lengths=(20,)))
        env.seed(0)
        sgd = {"net_arch": [8], "optimizer_class": th.optim.SGD}
        model = ActorCritic(
            "MlpPolicy",
            env,
            n_steps=7,
            gamma=0.9,
            state_discount=True,
            learning_rate=1e-4,
            max_grad_norm=None,
            use_rms_prop=False,
            policy_kwargs=sgd,
            seed=0,
            device="cpu",
        ).learn(70)
        if saved:
            model.save(tmp_path / "model")
            model = ActorCritic.load(tmp_path / "model", env=model.get_env(), force_reset=False, device="cpu")
        before = nn.utils.parameters_to_vector(model.policy.action_net.parameters()).detach()
        th.manual_seed(1)
        model.learn(14, reset_num_timesteps=False)
        return nn.utils.parameters_to_vector(model.policy.action_net.parameters()).detach() - before

    kept, restored = go_on(saved=False), go_on(saved=True)
    assert kept.abs().max() > 1e-4
    assert th.equal(kept, restored)


def test_warm_up_begins_with_the_model_that_is_loaded(tmp_path: Path) -> None:
    A2C("MlpPolicy", "CartPole-v1", device="cpu").learn(50).save(tmp_path / "a2c")
    model = ActorCritic.load(tmp_path / "a2c", env=gym.make("CartPole-v1"), critic_warmup_updates=3)
    head: Any = model.policy.action_net
    before = copy.deepcopy(head.weight)
    model.learn(15, reset_num_timesteps=False)
    assert th.equal(before, head.weight)
    model.learn(5, reset_num_timesteps=False)
    assert not th.equal(before, head.weight)


@pytest.mark.parametrize("cls", [NPG, TRPO])
def test_warm_up_begins_with_sb3_contribs_model_that_is_loaded(cls: Any, tmp_path: Path) -> None:
    theirs = sb3_contrib.TRPO("MlpPolicy", "CartPole-v1", n_steps=64, batch_size=64, device="cpu").learn(64)
    theirs.save(tmp_path / "trpo")
    model = cls.load(tmp_path / "trpo", env=gym.make("CartPole-v1"), critic_warmup_updates=2)
    before = copy.deepcopy(model.policy.action_net.weight)
    model.learn(128, reset_num_timesteps=False)
    assert th.equal(before, model.policy.action_net.weight)
    model.learn(64, reset_num_timesteps=False)
    assert not th.equal(before, model.policy.action_net.weight)


@pytest.mark.parametrize("use_rms_prop", [True, False])
def test_load_says_so_where_it_cannot_change_the_optimizer(
    use_rms_prop: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    ActorCritic("MlpPolicy", "CartPole-v1", use_rms_prop=use_rms_prop, device="cpu").save(tmp_path / "model")
    ActorCritic.load(tmp_path / "model", use_rms_prop=use_rms_prop)  # as rl_zoo3 does where a run is continued
    assert not [warning for warning in recwarn if "use_rms_prop" in str(warning.message)]
    with pytest.warns(UserWarning, match="use_rms_prop=.* has no effect"):
        ActorCritic.load(tmp_path / "model", use_rms_prop=not use_rms_prop)


def test_minibatches_of_a_critic_without_optimizer_are_refused() -> None:
    with pytest.raises(ValueError, match="critic_batch_size=4"):
        ActorCritic("MlpPolicy", "CartPole-v1", critic_batch_size=4)


def test_a_callback_reads_a2cs_numbers_after_every_update() -> None:
    seen: list[dict[str, float]] = []
    model = ActorCritic("MlpPolicy", "Pendulum-v1", seed=0, device="cpu")
    model.learn(25, callback=AtRolloutEnd(lambda m: seen.append(dict(m.logger.name_to_value))))
    names = {"train/entropy_loss", "train/explained_variance", "train/policy_loss", "train/value_loss", "train/std"}
    assert all(names <= logged.keys() for logged in seen[1:])


class IntegerEnv(gym.Env[Any, Any]):
    """Integers that are no image, as they are or in a dict."""

    action_space = spaces.Discrete(2)

    def __init__(self, in_dict: bool) -> None:
        space = spaces.Box(0, 1000, (3,), np.int64)
        self.in_dict = in_dict
        self.observation_space = spaces.Dict({"x": space}) if in_dict else space

    def _observation(self) -> Any:
        x = self.np_random.integers(0, 1000, 3)
        return {"x": x} if self.in_dict else x

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self._observation(), {}

    def step(self, _: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return self._observation(), 1.0, False, self.t == 10, {}


@pytest.mark.parametrize("in_dict", [False, True])
@pytest.mark.parametrize(
    ("cls", "arguments"), [(Reinforce, {}), (ActorCritic, {"n_steps": 16}), (OffPolicyPG, {"gradient_steps": 0})]
)
def test_normalized_integers_are_stored_as_they_were_acted_upon(
    cls: Any, arguments: dict[str, Any], in_dict: bool
) -> None:
    """VecNormalize leaves the space one of integers, and SB3's buffers cut off what follows the point."""
    env = VecNormalize(vec(IntegerEnv(in_dict), IntegerEnv(in_dict)))
    seen = []

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            obs = self.locals["new_obs"]
            seen.append(obs["x"] if in_dict else obs)
            return True

    policy = "MultiInputPolicy" if in_dict else "MlpPolicy"
    model = cls(policy, env, seed=0, device="cpu", **arguments).learn(1, callback=Watch())
    buffer = model.replay_buffer if cls is OffPolicyPG else model.rollout_buffer
    stored = buffer.observations["x"] if in_dict else buffer.observations
    if cls is OffPolicyPG:
        followed = buffer.next_observations["x"] if in_dict else buffer.next_observations
        assert np.array_equal(stored[1:10], followed[:9])
        stored = stored[:10]
    else:
        stored = stored[:10, :1]
    # what followed the first step is what the second was acted upon with
    assert stored.dtype == np.float32
    assert np.allclose(stored[1:, 0], np.stack(seen)[:9, 0])
    assert np.ptp(stored) > 0.1
