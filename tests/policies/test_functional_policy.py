"""The policy as a function of its parameters."""

from typing import Any, cast

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_pg.policies.functional_policy import functional_log_prob


class LearnedFlatten(nn.Module):
    """Shared by actor and critic, hence registered in the policy under three names."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__()
        self.features_dim = 3
        self.linear = nn.Linear(observation_space.shape[0], 3)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features: th.Tensor = self.linear(observations)
        return features


def make_policy() -> ActorCriticPolicy:
    extractor = cast(Any, LearnedFlatten)
    return ActorCriticPolicy(
        spaces.Box(-1, 1, (4,)), spaces.Discrete(2), lambda _: 1e-3, features_extractor_class=extractor
    )


def test_shared_modules_keep_their_parameters() -> None:
    policy = make_policy()
    before = {name: id(parameter) for name, parameter in policy.named_parameters()}
    other = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    with functional_log_prob(policy) as log_prob:
        log_prob(other, th.ones(1, 4), th.zeros(1))
    assert {name: id(parameter) for name, parameter in policy.named_parameters()} == before


def test_tied_parameters_are_replaced_everywhere() -> None:
    policy = make_policy()
    policy.mlp_extractor.policy_net[2].weight = policy.mlp_extractor.value_net[2].weight
    other = {name: parameter.detach() + 0.1 for name, parameter in policy.named_parameters()}
    observation, action = th.ones(1, 4), th.zeros(1)
    with functional_log_prob(policy) as log_prob:
        found = log_prob(other, observation, action)
    policy.load_state_dict({name: value + 0.1 for name, value in policy.state_dict().items()})
    assert th.allclose(found, policy.get_distribution(observation).log_prob(action))
