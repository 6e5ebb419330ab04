"""What is found once about a policy must not outlive a change of it."""

import copy
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_pg.policies import has_own_forward, policy_actions, policy_cache, set_training_mode, value_function
from sb3_pg.policies.mlp_fast_path import mlp_fast_path
from sb3_pg.policies.score_actions import score_actions
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES


def make_policy(action_space: str = "discrete", observation_space: str = "vector", **kwargs: Any) -> ActorCriticPolicy:
    th.manual_seed(0)
    return ActorCriticPolicy(
        OBSERVATION_SPACES[observation_space], ACTION_SPACES[action_space], lambda _: 1e-3, **kwargs
    )


def test_a_structure_does_not_keep_its_policy_alive() -> None:
    policy = make_policy()
    mlp_fast_path(policy, policy_cache(policy))
    gone = weakref.ref(policy)
    del policy
    gc.collect()
    assert gone() is None


def test_a_replaced_module_is_noticed() -> None:
    policy = make_policy()
    before = value_function(policy)(th.ones(2, 3))
    policy.value_net = nn.Linear(64, 1)
    set_training_mode(policy, False)  # as every rollout begins
    after = value_function(policy)(th.ones(2, 3))
    assert not th.allclose(before, after)
    assert th.allclose(after, policy.predict_values(th.ones(2, 3)).flatten())


def test_a_replaced_parameter_is_noticed() -> None:
    policy = make_policy()
    value_function(policy)
    policy.value_net.bias = nn.Parameter(th.full((1,), 7.0))
    set_training_mode(policy, False)
    assert any(parameter is policy.value_net.bias for parameter in policy_cache(policy).parameters)
    assert th.allclose(value_function(policy)(th.ones(1, 3)), policy.predict_values(th.ones(1, 3)).flatten())


def test_an_added_module_is_noticed() -> None:
    policy = make_policy()
    assert policy_cache(policy).is_current()
    policy.mlp_extractor.value_net.append(nn.Dropout(0.5))
    assert not policy_cache(policy).is_current()
    set_training_mode(policy, False)
    assert nn.Dropout in map(type, policy_cache(policy).parts)


def test_hooks_are_served() -> None:
    policy = make_policy()
    assert mlp_fast_path(policy, policy_cache(policy)) is not None
    calls: list[int] = []
    handle = policy.value_net.register_forward_hook(lambda *_: calls.append(1))
    set_training_mode(policy, False)  # as every rollout begins
    value_function(policy)(th.ones(1, 3))
    assert calls == [1]
    handle.remove()
    set_training_mode(policy, False)
    assert mlp_fast_path(policy, policy_cache(policy)) is not None


def test_a_copied_policy_has_its_own_layers() -> None:
    policy = make_policy()
    value_function(policy)
    other: Any = copy.deepcopy(policy)
    with th.no_grad():
        other.value_net.bias += 5
    assert th.allclose(value_function(other)(th.ones(1, 3)), value_function(policy)(th.ones(1, 3)) + 5)


def test_training_mode_reaches_every_module() -> None:
    class Frozen(nn.BatchNorm1d):
        def train(self, mode: bool = True) -> "Frozen":
            return super().train(False)

    policy = make_policy()
    for mode in (True, False):
        set_training_mode(policy, mode)
        assert {module.training for module in policy.modules()} == {mode}
    policy.norm = Frozen(3)
    set_training_mode(policy, True)
    assert policy.training
    assert not policy.norm.training


@pytest.mark.parametrize("with_values", [True, False])
@pytest.mark.parametrize("action_space", ACTION_SPACES)
@pytest.mark.parametrize("kwargs", [{}, {"net_arch": []}, {"activation_fn": nn.ELU}], ids=["default", "linear", "elu"])
@pytest.mark.parametrize("observation_space", ["vector", "double", "discrete"])
def test_bare_layers_give_what_the_policy_gives(
    action_space: str, kwargs: dict[str, Any], observation_space: str, with_values: bool
) -> None:
    policy = make_policy(action_space, observation_space, **kwargs)
    policy = make_policy(action_space, observation_space, **kwargs)
    assert mlp_fast_path(policy, policy_cache(policy)) is not None
    observations = th.as_tensor(np.array([policy.observation_space.sample() for _ in range(6)]))
    sampled = np.array([policy.action_space.sample() for _ in range(6)]).reshape(6, -1)
    actions = policy_actions(th.as_tensor(sampled), policy.action_space)
    ours = score_actions(policy, observations, actions, with_values, observations[:2])
    values, log_prob, entropy = policy.evaluate_actions(observations, actions)
    our_entropy = ours.entropy()
    assert our_entropy is not None
    assert entropy is not None
    assert th.allclose(ours.log_prob, log_prob, atol=1e-6)
    assert th.allclose(our_entropy, entropy, atol=1e-6)
    if with_values:
        assert ours.values is not None
        assert ours.other_values is not None
        assert th.allclose(ours.values, values.flatten(), atol=1e-6)
        assert th.allclose(ours.other_values, values.flatten()[:2], atol=1e-6)
    parameters = [p for name, p in policy.named_parameters() if "value" not in name]
    found: Any
    expected: Any
    found, expected = (
        th.autograd.grad((x * th.arange(6.0)).sum(), parameters, allow_unused=True, retain_graph=True)
        for x in (ours.log_prob + our_entropy, log_prob + entropy)
    )
    for a, b in zip(found, expected, strict=True):
        assert (a is None and b is None) or th.allclose(a, b, atol=1e-5)


def test_the_entropy_is_differentiated_where_gradients_are_enabled() -> None:
    scores = score_actions(make_policy(), th.ones(2, 3), th.zeros(2).long(), False)
    with th.no_grad():
        entropy = scores.entropy()
    assert entropy is not None
    assert not entropy.requires_grad


def test_own_methods_are_honored() -> None:
    class Own(ActorCriticPolicy):
        def predict_values(self, obs: Any) -> th.Tensor:
            return super().predict_values(obs) + 1

    policy = Own(spaces.Box(-1, 1, (3,)), spaces.Discrete(2), lambda _: 1e-3)
    assert not has_own_forward(policy)
    obs = th.ones(1, 3)
    assert th.allclose(value_function(policy)(obs), policy.predict_values(obs).flatten())
