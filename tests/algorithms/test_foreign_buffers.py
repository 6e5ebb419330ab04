"""Policies with a forward of their own, and buffers that are not ours: SB3's contract, step by step."""

from typing import Any

import pytest
import torch as th
from stable_baselines3 import A2C
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_pg import AsyncActorCritic, Reinforce
from tests.algorithms.every_algorithm import CLASSES, JOINT
from tests.helpers import (
    ActingPolicy,
    parameters,
    rollout_of,
)

pytestmark = pytest.mark.filterwarnings("ignore:batch_size=.* does not divide")


@pytest.mark.parametrize("cls", CLASSES)
def test_a_policys_own_forward_is_called_at_every_step(cls: Any) -> None:
    ActingPolicy.calls = 0
    model = cls(ActingPolicy, "CartPole-v1", n_steps=16, device="cpu").learn(32)
    assert ActingPolicy.calls == 32
    rollout = rollout_of(model)
    assert rollout.values.all()
    assert (rollout.log_probs < 0).all()


class CountingBuffer(RolloutBuffer):
    added = 0

    def add(self, *args: Any, **kwargs: Any) -> None:
        type(self).added += 1
        super().add(*args, **kwargs)


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls is not AsyncActorCritic])  # which refuses them
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
