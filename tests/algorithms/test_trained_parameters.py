"""Which parameters an update moves."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import CategoricalDistribution, Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_pg import NPG, TRPO, ActorCritic, KLPenaltyPG, Reinforce
from sb3_pg.baselines import ValueBaseline
from tests.algorithms.every_algorithm import CLASSES, Make
from tests.algorithms.off_policy_pg import envs
from tests.algorithms.off_policy_pg import make as make_off_policy
from tests.algorithms.steps import own_joint_kl, update
from tests.algorithms.trust_region import all_methods
from tests.algorithms.trust_region import make as make_trust_region
from tests.helpers import (
    OBSERVATION_SPACES,
    BatchNormExtractor,
    LinearExtractor,
    parameters,
)

pytestmark = [pytest.mark.filterwarnings("ignore:batch_size=.* does not divide"), pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("cls", [Reinforce, ActorCritic, KLPenaltyPG])
def test_critic_only_parameters_are_the_critic_optimizers_business(cls: Any) -> None:
    model = cls(
        "MlpPolicy", "CartPole-v1", n_steps=32, critic_learning_rate=1e-2, learning_rate=0.0, device="cpu", seed=0
    )
    actor, critic = model.learner.parameters
    assert set(actor) | set(critic) == {name for name, _ in model.policy.named_parameters()}
    assert set(actor).isdisjoint(critic)
    before = {name: p.detach().clone() for name, p in model.policy.named_parameters()}
    model.learn(32)
    for name, p in model.policy.named_parameters():
        assert th.equal(p, before[name]) == (name in actor), name


@pytest.mark.parametrize("cls", [NPG, TRPO])
@pytest.mark.parametrize("critic_learning_rate", [None, 1e-2])
def test_the_natural_methods_leave_shared_features_to_the_actor(cls: Any, critic_learning_rate: float | None) -> None:
    def train(n_critic_updates: int) -> Any:
        policy_kwargs = {"features_extractor_class": LinearExtractor}
        kwargs = {"n_critic_updates": n_critic_updates, "critic_learning_rate": critic_learning_rate}
        return cls("MlpPolicy", "CartPole-v1", n_steps=32, policy_kwargs=policy_kwargs, device="cpu", seed=0, **kwargs)

    few, many = train(1).learn(32), train(9).learn(32)
    assert "features_extractor.net.weight" in few.learner.parameters.actor
    for name, parameter in many.policy.named_parameters():
        same = th.equal(parameter, few.policy.get_parameter(name))
        assert same == (name in few.learner.parameters.actor), name


def test_shared_features_are_trained_by_both_losses() -> None:
    """The critic's own optimizer, here with a learning rate of 0, has its head alone."""
    learned: list[th.Tensor] = []
    for vf_coef in (0.0, 0.5):
        model = Reinforce(
            "MlpPolicy",
            "CartPole-v1",
            n_steps=32,
            vf_coef=vf_coef,
            critic_learning_rate=0.0,
            device="cpu",
            seed=0,
            policy_kwargs={"features_extractor_class": LinearExtractor, "optimizer_class": th.optim.SGD},
        )
        assert model.critic_optimizer is not None
        in_critic = {id(p) for group in model.critic_optimizer.param_groups for p in group["params"]}
        policy: Any = model.policy
        shared, head = policy.features_extractor.net.weight, policy.value_net.weight
        before = shared.detach().clone(), head.detach().clone()
        assert id(shared) not in in_critic
        model.learn(32)
        assert not th.equal(before[0], shared)
        assert th.equal(before[1], head)
        learned.append(shared.detach().clone())
    assert not th.allclose(learned[0], learned[1])


def test_a_frozen_critic_or_extractor_trains_the_rest(make: Make) -> None:
    model = make("CartPole-v1")
    frozen = [p for name, p in model.policy.named_parameters() if "mlp_extractor" in name]
    for parameter in frozen:
        parameter.requires_grad_(False)
    before, head = [p.detach().clone() for p in frozen], model.policy.action_net.weight.detach().clone()
    model.learn(200)
    assert all(th.equal(a, b) for a, b in zip(before, frozen, strict=True))
    assert not th.equal(head, model.policy.action_net.weight)


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
    policy: Any = model.policy
    head = policy.action_net.requires_grad_(False).weight.clone()
    model.learn(100)
    assert th.equal(head, policy.action_net.weight)


@pytest.mark.parametrize("baseline", ["mean", "optimal"])
def test_only_the_update_trains_batch_norm(baseline: Literal["mean", "optimal"]) -> None:
    model = Reinforce(
        "MlpPolicy",
        "CartPole-v1",
        baseline=baseline,
        device="cpu",
        policy_kwargs={"features_extractor_class": BatchNormExtractor},
    )
    model.learn(1)
    assert model._n_updates == 1
    extractor: Any = model.policy.features_extractor
    assert extractor.norm.num_batches_tracked == 1


def test_a_ready_made_value_baseline_is_the_critic() -> None:
    model = Reinforce("MlpPolicy", "CartPole-v1", baseline=ValueBaseline(), n_steps=16, device="cpu").learn(32)
    assert model.critic_optimizer is not None


def test_only_gradient_steps_train_batch_norm() -> None:
    policy_kwargs = {"features_extractor_class": BatchNormExtractor}
    own: dict[str, Any] = {"train_freq": (4, "episode"), "gradient_steps": 2, "baseline": "none"}
    model = make_off_policy(envs(), policy_kwargs=policy_kwargs, **own).learn(22)
    assert model.policy.features_extractor.norm.num_batches_tracked == model._n_updates == 4


IMAGE = OBSERVATION_SPACES["image"]


class OwnNames(ActorCriticPolicy):
    """Names that say the opposite of what they are."""

    optimizer_class: Any

    def _build(self, lr_schedule: Any) -> None:
        self.value_like_actor, self.action_net_of_critic = nn.Linear(3, 3), nn.Linear(3, 1)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def get_distribution(self, obs: Any) -> Distribution:
        return CategoricalDistribution(3).proba_distribution(self.value_like_actor(obs))

    def predict_values(self, obs: Any) -> th.Tensor:
        values: th.Tensor = self.action_net_of_critic(obs)
        return values

    def forward(self, obs: Any, deterministic: bool = False) -> Any:
        distribution = self.get_distribution(obs)
        actions = distribution.get_actions(deterministic)
        return actions, self.predict_values(obs), distribution.log_prob(actions)

    def evaluate_actions(self, obs: Any, actions: th.Tensor) -> Any:
        distribution = self.get_distribution(obs)
        return self.predict_values(obs), distribution.log_prob(actions), distribution.entropy()


class WithValueMap(spaces.Dict):
    def __init__(self) -> None:
        super().__init__({"value_map": spaces.Box(0, 255, (36, 36, 1), np.uint8), "vec": spaces.Box(-1, 1, (2,))})


#: (arguments, the beginnings of the actor's names)
SETS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "mlp": ({}, ("mlp_extractor.policy_net.", "action_net.")),
    "log_std": ({"actions": "box"}, ("mlp_extractor.policy_net.", "action_net.", "log_std")),
    "gsde": ({"actions": "box", "use_sde": True}, ("mlp_extractor.policy_net.", "action_net.", "log_std")),
    "shared-layers": (
        {"policy_kwargs": {"net_arch": [8]}, "observations": IMAGE, "policy": "CnnPolicy"},
        ("features_extractor.", "mlp_extractor.policy_net.", "action_net."),
    ),
    "value_map": (
        {"observations": WithValueMap(), "policy": "MultiInputPolicy"},
        ("features_extractor.extractors.value_map.", "mlp_extractor.policy_net.", "action_net."),
    ),
    "shared-cnn": ({"observations": IMAGE, "policy": "CnnPolicy"}, ("features_extractor.", "action_net.")),
    "separate-cnns": (
        {
            "observations": IMAGE,
            "policy": "CnnPolicy",
            "policy_kwargs": {"share_features_extractor": False},
        },
        ("features_extractor.", "pi_features_extractor.", "action_net."),
    ),
    "own-names": ({"policy": OwnNames}, ("value_like_actor.",)),
}


@pytest.mark.parametrize("rate", ["learning_rate", "critic_learning_rate"])
@pytest.mark.parametrize("case", list(SETS))
def test_actor_and_critic_share_nothing(case: str, rate: str) -> None:
    """Features that both use are the actor's, whichever optimizer the critic is trained by."""
    kwargs, names = SETS[case]
    small: dict[str, Any] = {"n_steps": 8, "n_critic_updates": 2, rate: 1e-3, **kwargs}
    actor = update(make_trust_region(**{**small, rate: 0.0}))  # the critic stands still
    critic = update(make_trust_region(**small, critic_warmup_updates=1))  # the actor does
    everything = {name for name, _ in actor.new.named_parameters()}
    expected = {name for name in everything if name.startswith(names)}
    assert expected
    assert actor.log["train/step_outcome"] == "accepted"
    assert actor.moved == expected
    assert critic.moved == everything - expected


FROZEN = ("action_net.bias", "mlp_extractor.policy_net.0.weight", "mlp_extractor.value_net.2.bias")


@all_methods
def test_frozen_parameters_stay(method: str) -> None:
    model = make_trust_region(method, "box")
    for name, parameter in model.policy.named_parameters():
        parameter.requires_grad_(name not in FROZEN)
    step = update(model)
    assert step.log["train/step_outcome"] == "accepted"
    assert step.moved == {name for name, _ in step.new.named_parameters()} - {*FROZEN}


@all_methods
@pytest.mark.parametrize("everything", [False, True])
def test_a_frozen_actor_stays_and_the_critic_learns(method: str, everything: bool) -> None:
    model = make_trust_region(method)
    frozen = {name for name, _ in model.policy.named_parameters()} if everything else {*model.learner.parameters.actor}
    for name in frozen:
        model.policy.get_parameter(name).requires_grad_(False)
    step = update(model)
    assert step.log["train/step_outcome"] == "zero_gradient"
    assert step.log["train/joint_kl"] == 0
    assert step.moved == {name for name, _ in step.new.named_parameters()} - frozen


@all_methods
def test_only_the_width_is_trained(method: str) -> None:
    model = make_trust_region(method, "box")
    for name, parameter in model.policy.named_parameters():
        parameter.requires_grad_(name == "log_std")
    step = update(model)
    assert step.log["train/step_outcome"] == "accepted"
    assert step.moved == {"log_std"}


def test_gradients_that_somebody_has_left_behind_move_nothing() -> None:
    """The critic's steps are those of policy.optimizer, which holds the actor's parameters too."""
    clean, model = update(make_trust_region()), make_trust_region()
    for parameter in model.policy.parameters():
        parameter.grad = th.ones_like(parameter)
    left = update(model)
    assert all(th.equal(a, b) for a, b in zip(clean.new.parameters(), left.new.parameters(), strict=True))


class Normalized(BaseFeaturesExtractor):
    """Features with running statistics, which actor and critic share."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, 8)
        self.layers = nn.Sequential(nn.Linear(observation_space.shape[0], 8), nn.BatchNorm1d(8), nn.Tanh())

    def forward(self, observations: th.Tensor) -> th.Tensor:
        result: th.Tensor = self.layers(observations)
        return result


@pytest.mark.parametrize("critic_fit", ["before", "after"])
def test_the_critic_does_not_move_the_policy_by_shared_statistics(critic_fit: Literal["before", "after"]) -> None:
    kwargs = {"features_extractor_class": Normalized}
    model = TRPO("MlpPolicy", "CartPole-v1", n_steps=128, critic_fit=critic_fit, policy_kwargs=kwargs, seed=0)
    for _ in range(3):
        step = update(model)
        assert step.log["train/step_outcome"] == "accepted"
        for policy in (step.old, step.new):
            policy.set_training_mode(False)
        with th.no_grad():
            realized = own_joint_kl(step.old, step.new, step.batch.flat_observations)
        assert realized == pytest.approx(step.log["train/joint_kl"], rel=1e-3)
