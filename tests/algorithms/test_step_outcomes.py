"""Trust regions where there is no step to take, or hardly one."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env

from sb3_pg import NPG, TRPO
from tests.algorithms.steps import AtRolloutEnd, Update, update
from tests.algorithms.trust_region import METHODS, all_methods, make
from tests.helpers import ScriptedEnv, vec

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("one_thread")


REASONS = {"accepted", "kl", "no_improvement", "nonfinite", "curvature", "zero_gradient"}


def require_explained(step: Update) -> None:
    """Finite, and the actor has moved if and only if that is what the log says."""
    outcome = step.log["train/step_outcome"]
    assert step.is_finite
    assert outcome in REASONS
    assert bool({name for name in step.moved if "value" not in name}) == (outcome == "accepted")
    assert step.log["train/joint_kl"] > (-1e-7 if outcome == "accepted" else -1e-30)  # rounding


def scaled(scale: float, env: str) -> Any:
    return make_vec_env(lambda: gym.wrappers.TransformReward(gym.make(env), lambda r: float(r) * scale), 2, seed=0)


@all_methods
@pytest.mark.parametrize("scale", [1e-9, 0.0, 1e9])
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("normalize_advantage", [True, False])
@pytest.mark.filterwarnings("ignore:The policy has not moved")  # by a rate that has no scale of its own
def test_rewards_of_any_scale(method: str, scale: float, env: str, normalize_advantage: bool) -> None:
    cls, chosen = METHODS[method]
    kwargs = {**chosen, "n_steps": 64, "normalize_advantage": normalize_advantage}
    model = cls("MlpPolicy", scaled(scale, env), seed=0, device="cpu", **kwargs)
    for _ in range(3):
        require_explained(update(model))


@all_methods
@pytest.mark.parametrize("kwargs", [{}, {"n_steps": 2}, {"n_steps": 1}], ids=str)
def test_one_step_episodes(method: str, kwargs: dict[str, Any]) -> None:
    envs = [ScriptedEnv((1,), first_reward=r) for r in (0.0, 5.0)]
    cls, chosen = METHODS[method]
    model = cls(
        "MlpPolicy", vec(*envs), seed=0, device="cpu", **{"n_steps": 32, "batch_size": None, **chosen, **kwargs}
    )
    for _ in range(5):
        require_explained(update(model))


@all_methods
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_two_steps_of_one_env(method: str, env: str) -> None:
    cls, chosen = METHODS[method]
    model = cls("MlpPolicy", env, n_steps=2, batch_size=None, seed=0, device="cpu", **chosen)
    for _ in range(8):
        require_explained(update(model))


def test_a_single_step_has_no_normalized_advantage() -> None:
    with pytest.raises(ValueError, match="normalize_advantage=True leaves nothing of a single step's advantage"):
        TRPO("MlpPolicy", "CartPole-v1", n_steps=1, batch_size=None)
    model = TRPO("MlpPolicy", "CartPole-v1", n_steps=1, batch_size=None, normalize_advantage=False, seed=0)
    for _ in range(5):
        require_explained(update(model))


def equal_advantages(model: Any) -> None:
    model.rollout_buffer.advantages[:] = 3.0


class MostlyNothing(ScriptedEnv):
    """Shows something in one state of each episode, and nothing in the others."""

    def _obs(self) -> Any:
        return super()._obs() if self.t == 1 else np.zeros(3, np.float32)


def without_bias() -> Any:
    """A policy whose Fisher matrix at most states is zero, since it is the same whatever theta.

    With this seed the one sample in 64 is never one of the two others, where F has rank 1 and rounding decides.
    """
    env = vec(MostlyNothing((32,)), MostlyNothing((32,)))
    kwargs: dict[str, Any] = {"policy_kwargs": {"net_arch": []}, "cg_damping": 0.0, "fisher_subsample": 64}
    model = NPG("MlpPolicy", env, n_steps=32, batch_size=None, seed=1, device="cpu", **kwargs)
    model.policy.action_net.bias.requires_grad_(False)
    return model


#: reason -> model, and what a callback does before each update
FAILURES: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "kl": (lambda: make("trpo", target_kl=0.5, cg_damping=1e-4, line_search_max_iter=1), id),
    "no_improvement": (lambda: make("trpo", target_kl=10.0, cg_damping=1e-4, line_search_accept_ratio=1.0), id),
    "nonfinite": (lambda: make("npg-fixed", step_size=1e30), id),
    "curvature": (without_bias, id),
    "zero_gradient": (lambda: make("npg"), equal_advantages),
}


@pytest.mark.parametrize("reason", list(FAILURES))
def test_a_failure_has_a_name_and_leaves_the_actor_as_it_was(reason: str) -> None:
    factory, act = FAILURES[reason]
    step = update(factory(), AtRolloutEnd(act))
    assert step.log["train/step_outcome"] == reason
    assert step.moved == {name for name, _ in step.new.named_parameters() if "value" in name}  # the critic learns
    for name in ("joint_kl", "step_size", "surrogate_predicted", "surrogate_realized"):
        assert step.log[f"train/{name}"] == 0
    assert step.log["train/largest_ratio"] == 1


@pytest.mark.parametrize("reason", list(FAILURES))
def test_three_failures_in_a_row_are_warned_of_once(reason: str) -> None:
    factory, act = FAILURES[reason]
    model, callback = factory(), AtRolloutEnd(act)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert update(model, callback).log["train/step_outcome"] == reason
    with pytest.warns(UserWarning, match=f"has not moved for 3 updates in a row.*'{reason}'"):
        update(model, callback)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert update(model, callback).log["train/step_outcome"] == reason


def test_advantages_that_differ_by_rounding_are_equal() -> None:
    """Neither scaled to full size nor taken as they are."""

    def one_differs(model: Any) -> None:
        buffer = model.rollout_buffer
        equal_advantages(model)
        buffer.advantages[0, 0] += 2 * np.abs(buffer.returns).max() * np.finfo(np.float32).eps

    assert update(make("npg"), AtRolloutEnd(one_differs)).log["train/step_outcome"] == "zero_gradient"


def test_failures_with_a_success_between_them_are_not_warned_of() -> None:
    model = make()
    fail = AtRolloutEnd(equal_advantages)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for callback in (fail, fail, None, fail, fail):
            update(model, callback)
    with pytest.warns(UserWarning, match="'zero_gradient'"):
        update(model, fail)


def test_an_update_that_is_undone_is_no_success() -> None:
    model = TRPO("MlpPolicy", "CartPole-v1", learning_rate=1e30, n_steps=32, batch_size=32, on_nonfinite="skip", seed=0)
    with pytest.warns(UserWarning, match="Update skipped"):
        step = update(model)
    assert step.log["train/step_outcome"] == "nonfinite"
    assert not step.moved
