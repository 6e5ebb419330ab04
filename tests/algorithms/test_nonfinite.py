"""Numbers that are not finite: they are named, and change nothing."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_pg import TRPO, NonFiniteError, Reinforce
from tests.algorithms.every_algorithm import CLASSES, Make
from tests.algorithms.off_policy_pg import consecutive, envs, rows, trained, with_ratios
from tests.algorithms.off_policy_pg import make as make_off_policy
from tests.algorithms.steps import plant, update
from tests.algorithms.trust_region import all_methods
from tests.algorithms.trust_region import make as make_trust_region
from tests.helpers import (
    BatchNormExtractor,
    FaultyEnv,
    parameters,
    vec,
)

pytestmark = [pytest.mark.filterwarnings("ignore:batch_size=.* does not divide"), pytest.mark.usefixtures("one_thread")]


def test_a_nonfinite_gradient_changes_nothing(make: Make) -> None:
    model = make("CartPole-v1").learn(100)
    with th.no_grad():
        model.policy.action_net.weight[0, 0] = th.inf
    before = parameters(model)
    with pytest.raises(FloatingPointError):
        model.learn(100)
    assert th.equal(parameters(model), before)


def test_a_step_that_overflows_is_undone() -> None:
    kwargs: dict[str, Any] = {"policy_kwargs": {"optimizer_class": th.optim.SGD}, "device": "cpu", "seed": 0}
    model = Reinforce("MlpPolicy", "CartPole-v1", learning_rate=1e38, max_grad_norm=None, baseline="none", **kwargs)
    before = parameters(model)
    with pytest.raises(FloatingPointError, match=r"parameter .* finite before the step.*smaller learning rate"):
        model.learn(100)
    assert th.equal(parameters(model), before)


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


def test_a_weight_that_no_number_can_hold_is_explained_and_changes_nothing() -> None:
    model = make_off_policy(envs(), ratio="trajectory")
    model.add_trajectories(with_ratios(model, [1e30] * 11))
    before = parameters(model)
    with pytest.raises(NonFiniteError, match=r"importance weight is inf.*max_ratio"):
        trained(model)
    assert th.equal(parameters(model), before)
    model.max_ratio = 2.0
    assert trained(model)["train/largest_weight"] == pytest.approx(2)


@pytest.mark.parametrize(("fault", "step"), [("reward", 1), ("observation", 2)])
def test_a_fault_raises_and_leaves_everything_as_it_was(fault: str, step: int) -> None:
    model = make_off_policy(vec(FaultyEnv(fault, at=20, lengths=(3,))), train_freq=(2, "episode")).learn(18)
    before, kept = parameters(model), copy.deepcopy(vars(model.replay_buffer))
    with pytest.raises(NonFiniteError, match=f"{fault} is nan in env 0 at step {step} "):
        model.learn(6, reset_num_timesteps=False)
    assert th.equal(parameters(model), before)
    for name, value in vars(model.replay_buffer).items():
        assert np.array_equal(value, kept[name]) if isinstance(value, np.ndarray) else value == kept[name], name
    model.learn(6, reset_num_timesteps=False)
    assert not th.equal(parameters(model), before)


@pytest.mark.parametrize("train_freq", [(2, "episode"), 4])
def test_a_fault_can_be_skipped(train_freq: Any) -> None:
    env = vec(FaultyEnv("reward", at=20, lengths=(6,)))
    model = make_off_policy(env, train_freq=train_freq, gradient_steps=1, on_nonfinite="skip", baseline="none")
    with pytest.warns(UserWarning, match="reward is nan in env 0"):
        model.learn(48, log_interval=None)
    assert consecutive(model, 6)
    assert model.logger.name_to_value["train/n_skipped"] == 1
    rewards = set(rows(model, "rewards"))
    assert max(rewards) > 40
    assert 20 not in rewards


def test_a_policy_that_says_nothing_of_an_action_is_an_error() -> None:
    model = make_off_policy(envs(), train_freq=4).learn(8)
    with th.no_grad():
        model.policy.action_net.weight[0, 0] = th.nan
    before = parameters(model)
    with pytest.raises(NonFiniteError, match=r"action_net\.weight"):
        trained(model)
    model.on_nonfinite = "skip"
    with pytest.warns(UserWarning, match=r"Update skipped.*action_net\.weight"):
        assert trained(model, 3)["train/n_skipped"] == 1
    assert th.equal(parameters(model).nan_to_num(), before.nan_to_num())


@all_methods
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_nan_in_the_advantages_is_named(method: str, bad: float) -> None:
    model = make_trust_region(method)
    before = copy.deepcopy(model.policy.state_dict())
    with pytest.raises(NonFiniteError, match=r"advantage.*env.*0.*step.*0"):
        update(model, plant(bad))
    assert all(th.equal(before[name], value) for name, value in model.policy.state_dict().items())
    assert model.logger.name_to_value["train/step_outcome"] == "nonfinite"
    assert update(model).log["train/step_outcome"] == "accepted"


@all_methods
@pytest.mark.filterwarnings("ignore:The policy has not moved")
def test_a_nan_in_the_advantages_is_skipped(method: str) -> None:
    model, callback = make_trust_region(method, on_nonfinite="skip"), plant(np.nan)
    for n in (1, 2, 3):
        with pytest.warns(UserWarning, match="Update skipped") as caught:
            step = update(model, callback)
        assert step.moved == set()
        assert step.log["train/step_outcome"] == "nonfinite"
        assert step.log["train/n_skipped"] == n
        named = [w for w in caught if "3 updates in a row" in str(w.message)]
        assert len(named) == (n == 3)
    assert update(model).log["train/step_outcome"] == "accepted"


@pytest.mark.parametrize("bad", [-0.01, float("nan")])
def test_a_schedule_that_goes_wrong_is_named(bad: float) -> None:
    model = TRPO("MlpPolicy", "CartPole-v1", n_steps=32, batch_size=32, target_kl=lambda p: 0.01 if p == 1 else bad)
    before = copy.deepcopy(model.policy.state_dict())
    with pytest.raises(ValueError, match="target_kl must be"):
        model.learn(32)
    assert all(th.equal(value, before[name]) for name, value in model.policy.state_dict().items())
