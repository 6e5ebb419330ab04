"""Scores without gradient, in chunks: the numbers of the policy's own methods."""

import sys
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy

from sb3_pg.policies import policy_actions, score_actions, score_in_chunks
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES

IMAGE = spaces.Box(0, 255, (1, 36, 36), np.uint8)


class OwnValues(ActorCriticPolicy):
    def predict_values(self, obs: Any) -> th.Tensor:
        return super().predict_values(obs) + 7


class OwnScores(ActorCriticPolicy):
    def evaluate_actions(self, obs: Any, actions: th.Tensor) -> Any:
        values, log_prob, entropy = super().evaluate_actions(obs, actions)
        return values, log_prob * 2, entropy


def hooked(*args: Any) -> ActorCriticPolicy:
    policy = ActorCriticPolicy(*args)
    policy.action_net.register_forward_hook(lambda _, __, output: output * 2)
    return policy


def samples(policy: ActorCriticPolicy, n: int) -> tuple[th.Tensor, th.Tensor]:
    policy.observation_space.seed(0)
    policy.action_space.seed(0)
    observations = th.as_tensor(np.stack([policy.observation_space.sample() for _ in range(n)]))
    drawn = np.array([policy.action_space.sample() for _ in range(n)]).reshape(n, -1)
    return observations, policy_actions(th.as_tensor(drawn), policy.action_space)


@pytest.mark.parametrize("chunk_size", [4, 100])
@pytest.mark.parametrize("with_values", [False, True])
@pytest.mark.parametrize("action_space", ACTION_SPACES)
@pytest.mark.parametrize("make", [ActorCriticPolicy, ActorCriticCnnPolicy, OwnValues, OwnScores, hooked])
def test_chunks_give_what_the_policy_gives(
    make: Any, action_space: str, with_values: bool, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[score_in_chunks.__module__], "CHUNK_SIZE", chunk_size)
    th.manual_seed(0)
    space = IMAGE if make is ActorCriticCnnPolicy else OBSERVATION_SPACES["vector"]
    policy = make(space, ACTION_SPACES[action_space], lambda _: 1e-3)
    policy.set_training_mode(False)
    observations, actions = samples(policy, 10)
    others = observations[:3] if with_values else None
    scores = score_in_chunks(policy, observations, actions, with_values, others)
    _, log_prob, _ = policy.evaluate_actions(observations, actions)
    assert th.allclose(scores.log_prob, log_prob, atol=1e-5)
    assert not scores.log_prob.requires_grad
    assert scores.entropy() is None
    assert len(scores.distribution) == (3 if chunk_size == 4 else 1)
    assert all((make is OwnScores) == (distribution is None) for distribution in scores.distribution)
    if with_values:
        assert scores.values is not None
        assert scores.other_values is not None
        values = policy.predict_values(observations).flatten()
        assert th.allclose(scores.values, values, atol=1e-5)
        assert th.allclose(scores.other_values, values[:3], atol=1e-5)
        weight = th.ones((), requires_grad=True)
        ((scores.values + scores.log_prob).sum() + scores.other_values.sum()).mul(weight).square().backward()
    else:
        assert scores.values is None
        assert scores.other_values is None


@pytest.mark.parametrize("with_values", [False, True])
def test_shared_features_are_extracted_once(with_values: bool) -> None:
    policy: Any = ActorCriticCnnPolicy(IMAGE, ACTION_SPACES["discrete"], lambda _: 1e-3)
    calls: list[int] = []
    policy.features_extractor.cnn[0].register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    hooks, policy.features_extractor.cnn[0]._forward_hooks = policy.features_extractor.cnn[0]._forward_hooks, {}
    score_in_chunks(policy, *samples(policy, 5), with_values)  # looks at the policy while it has no hooks
    policy.features_extractor.cnn[0]._forward_hooks = hooks
    score_in_chunks(policy, *samples(policy, 5), with_values)
    assert calls == [5]


def test_scores_of_the_two_functions_agree() -> None:
    policy = ActorCriticPolicy(OBSERVATION_SPACES["vector"], ACTION_SPACES["box"], lambda _: 1e-3)
    observations, actions = samples(policy, 10)
    with_gradient = score_actions(policy, observations, actions, True)
    without = score_in_chunks(policy, observations, actions, True)
    assert th.equal(with_gradient.log_prob, without.log_prob)
    assert with_gradient.values is not None
    assert without.values is not None
    assert th.equal(with_gradient.values, without.values)
    assert with_gradient.log_prob.requires_grad
