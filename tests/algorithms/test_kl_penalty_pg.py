"""KLPenaltyPG: both steps of dual gradient descent by hand, the constraint over a training, and what may go wrong."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env

from sb3_pg import KLPenaltyPG, NonFiniteError
from tests.algorithms.steps import AtRolloutEnd, history, mean_joint_kl, own_joint_kl, plant, update
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES, ScriptedEnv, two_envs, vec

if TYPE_CHECKING:
    from pathlib import Path

#: Actor and critic in one step, as in PPO; and a critic with an optimizer of its own.
CRITICS: dict[str, dict[str, Any]] = {
    "joint": {"critic_learning_rate": None, "n_critic_updates": 1},
    "separate": {"critic_learning_rate": 1e-3, "n_critic_updates": 2},
}
pytestmark = pytest.mark.usefixtures("one_thread")
both_critics = pytest.mark.parametrize("critic", list(CRITICS))


def make(actions: Any = "discrete", policy: Any = "MlpPolicy", **kwargs: Any) -> KLPenaltyPG:
    """A model on two envs whose rewards grow with time, and episodes of which every other one is truncated."""
    space = ACTION_SPACES[actions] if isinstance(actions, str) else actions
    observations = kwargs.pop("observations", OBSERVATION_SPACES["vector"])
    return KLPenaltyPG(policy, two_envs(space, observations), **{"n_steps": 32, "seed": 0, "device": "cpu", **kwargs})


# --- step 2: lambda ---


@pytest.mark.parametrize(
    "kwargs",
    [
        {"learning_rate": 3e-3, "target_kl": 0.002},
        {"target_kl": 0.02, "dual_learning_rate": 30.0},
        {"learning_rate": 3e-3, "dual_learning_rate": 5.0, "kl_coef": 0.0, "target_kl": 1e-3},
    ],
    ids=["rises", "falls to 0", "rises from 0"],
)
def test_lambda_climbs_the_dual_and_stays_above_zero(kwargs: dict[str, Any]) -> None:
    """lambda + alpha (KL - epsilon), projected."""
    model = make(**kwargs)
    logs = history(model, 6 * 64)
    used = [log["train/kl_coef"] for log in logs]
    assert used[0] == kwargs.get("kl_coef", 1.0)
    for log, before, after in zip(logs, used, [*used[1:], model.kl_coef], strict=True):
        move = model.dual_learning_rate * (log["train/joint_kl"] - model.target_kl)
        assert after == pytest.approx(max(0.0, before + move), rel=1e-5)
    assert (model.kl_coef == 0) == (kwargs["target_kl"] == 0.02)


@pytest.mark.parametrize(("epsilons", "factor"), [(1 / 1.6, 2.0), (1 / 1.4, 1.0), (1.0, 1.0), (1.4, 1.0), (1.6, 0.5)])
def test_the_multiplicative_rule_doubles_and_halves(epsilons: float, factor: float) -> None:
    """Above 1.5 epsilon, and below epsilon / 1.5."""
    kwargs: dict[str, Any] = {"dual_update": "multiplicative", "max_kl_ratio": None, "kl_coef": 0.7}
    kl = update(make(**kwargs)).log["train/joint_kl"]
    model = make(target_kl=epsilons * kl, **kwargs)
    assert update(model).log["train/joint_kl"] == pytest.approx(kl, rel=1e-3)  # of which epsilon is no part
    assert model.kl_coef == 0.7 * factor


def test_the_divergence_is_that_of_the_whole_action_vector() -> None:
    for actions in ("discrete", "multi_discrete", "multi_binary", spaces.Box(-1, 1, (17,))):
        step = update(make(actions, learning_rate=1e-3))
        kl = own_joint_kl(step.old, step.new, step.batch.flat_observations)
        assert step.log["train/joint_kl"] == pytest.approx(kl, rel=1e-3)
        assert kl > 0


# --- step 1: theta ---


def own_step(model: Any, old: Any, batch: Any, n_epochs: int) -> Any:
    """Gradient ascent on the Lagrangian, written down a second time; the policy that it leads to."""
    policy = copy.deepcopy(old)
    parameters = [parameter for name, parameter in policy.named_parameters() if "value" not in name]
    observations, actions = batch.flat_observations, batch.select(batch.actions)
    actions = actions.flatten().long() if isinstance(model.action_space, spaces.Discrete) else actions.float()
    credit = batch.select(batch.advantages)
    credit = (credit - credit.mean()) / credit.std()
    behavior = old.evaluate_actions(observations, actions)[1].detach()
    for _ in range(n_epochs):
        _, log_prob, entropy = policy.evaluate_actions(observations, actions)
        kl = mean_joint_kl(old, policy, observations)
        gain = ((log_prob - behavior).exp() * credit).mean() + model.ent_coef * entropy.mean()
        gradients = th.autograd.grad(gain - model.kl_coef * (kl - model.target_kl), parameters)
        with th.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.add_(gradient, alpha=model.learning_rate)
    return policy


@pytest.mark.parametrize("ent_coef", [0.0, 0.1])
@pytest.mark.parametrize("actions", ["discrete", "box", "multi_binary"])
@pytest.mark.parametrize("kl_coef", [0.0, 4.0])
def test_theta_climbs_the_lagrangian(actions: str, kl_coef: float, ent_coef: float) -> None:
    """Three steps on the whole batch: in the first the divergence has no gradient yet."""
    model = make(
        actions,
        learning_rate=0.1,
        kl_coef=kl_coef,
        ent_coef=ent_coef,
        batch_size=64,
        n_epochs=3,
        max_grad_norm=None,
        max_kl_ratio=None,
        policy_kwargs={"net_arch": [4], "optimizer_class": th.optim.SGD},
    )
    before = copy.copy(model)  # kl_coef as it is in the step
    step = update(model)
    expected = own_step(before, step.old, step.batch, 3)
    for (name, ours), own in zip(step.new.named_parameters(), expected.parameters(), strict=True):
        if "value" not in name:
            assert th.allclose(ours, own, atol=1e-5), name


def test_the_penalty_holds_the_policy_back() -> None:
    kwargs: dict[str, Any] = {"learning_rate": 3e-3, "max_kl_ratio": None}
    free, held = (update(make(kl_coef=kl_coef, **kwargs)).log["train/joint_kl"] for kl_coef in (0.0, 30.0))
    assert held < 0.3 * free


def test_passes_end_where_the_divergence_is_too_large() -> None:
    kwargs: dict[str, Any] = {"learning_rate": 1e-2, "target_kl": 0.005, "kl_coef": 0.0, "n_epochs": 8}
    stopped, free = (update(make(max_kl_ratio=ratio, **kwargs)).log for ratio in (2.0, None))
    assert stopped["train/n_epochs"] < free["train/n_epochs"] == 8
    assert stopped["train/joint_kl"] < free["train/joint_kl"]


# --- over a training ---


@pytest.mark.parametrize(
    ("env", "critic"),
    [("CartPole-v1", CRITICS["separate"]), ("Pendulum-v1", {**CRITICS["joint"], "normalize_value_targets": True})],
    ids=["CartPole-v1", "Pendulum-v1"],
)
def test_the_constraint_holds_over_a_training(env: str, critic: dict[str, Any]) -> None:
    """KL = epsilon where lambda > 0, and below it where lambda = 0."""
    kwargs: dict[str, Any] = {"n_steps": 128, "batch_size": 256, "n_epochs": 5, "learning_rate": 1e-3, **critic}
    model = KLPenaltyPG("MlpPolicy", make_vec_env(env, 8, seed=0), seed=0, device="cpu", **kwargs)
    logs = history(model, 60 * 8 * 128)[30:]
    kl, coefficient = (np.array([log[f"train/{name}"] for log in logs]) for name in ("joint_kl", "kl_coef"))
    assert kl.mean() <= 1.5 * model.target_kl
    assert (coefficient > 0).sum() >= 15
    assert kl[coefficient > 0].mean() >= model.target_kl / 1.5


def test_lambda_is_saved_loaded_and_resumed(tmp_path: Path) -> None:
    model = make(learning_rate=1e-3).learn(3 * 64)
    assert model.kl_coef not in (0.0, 1.0)
    model.save(tmp_path / "model")
    loaded = KLPenaltyPG.load(tmp_path / "model", env=model.get_env(), device="cpu")
    assert loaded.kl_coef == model.kl_coef
    assert update(loaded).log["train/kl_coef"] == pytest.approx(model.kl_coef)
    assert loaded.kl_coef != model.kl_coef
    assert KLPenaltyPG.load(tmp_path / "model", kl_coef=3.0).kl_coef == 3.0


def test_learning_goes_on_with_lambda() -> None:
    model = make(learning_rate=1e-3).learn(2 * 64)
    lambda_ = model.kl_coef
    model.learn(64)  # begins anew with the counting, not with lambda
    assert model.logger.name_to_value["train/kl_coef"] == pytest.approx(lambda_)


# --- the critic ---


@both_critics
@pytest.mark.parametrize("observations", ["vector", "image"])
def test_both_learn(critic: str, observations: str) -> None:
    """Features that actor and critic share are trained by the sum of their losses, whoever fits the critic's head."""
    policy = "CnnPolicy" if observations == "image" else "MlpPolicy"
    kwargs: dict[str, Any] = {"n_steps": 8, "n_epochs": 2, **CRITICS[critic]}
    step = update(make(policy=policy, observations=OBSERVATION_SPACES[observations], **kwargs))
    assert step.moved == {name for name, _ in step.new.named_parameters()}
    assert step.log["train/value_loss"] > 0


@both_critics
@pytest.mark.parametrize("observations", ["vector", "image"])
def test_warm_up_moves_neither_actor_nor_lambda(critic: str, observations: str) -> None:
    policy = "CnnPolicy" if observations == "image" else "MlpPolicy"
    kwargs: dict[str, Any] = {"n_steps": 8, "n_epochs": 2, "critic_warmup_updates": 2, **CRITICS[critic]}
    model = make(policy=policy, observations=OBSERVATION_SPACES[observations], **kwargs)
    critics = {*model.learner.parameters.critic} - {*model.learner.parameters.actor}
    for _ in range(2):
        step = update(model)
        assert step.moved == critics
        assert "train/joint_kl" not in step.log
        assert model.kl_coef == 1.0
    step = update(model)
    assert not step.moved <= critics
    assert model.kl_coef != 1.0


# --- what may go wrong ---


@both_critics
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_failed_update_changes_neither_theta_nor_lambda(critic: str, bad: float) -> None:
    model = make(**CRITICS[critic])
    update(model)
    before, lambda_ = copy.deepcopy(model.policy.state_dict()), model.kl_coef
    with pytest.raises(NonFiniteError, match=r"advantage.*env.*0.*step.*0"):
        update(model, plant(bad))
    assert all(th.equal(before[name], value) for name, value in model.policy.state_dict().items())
    assert model.kl_coef == lambda_
    model.on_nonfinite = "skip"
    with pytest.warns(UserWarning, match="Update skipped"):
        step = update(model, plant(bad))
    assert step.moved == set()
    assert model.kl_coef == lambda_
    step = update(model)
    assert step.is_finite
    assert step.log["train/joint_kl"] > 0
    assert model.kl_coef != lambda_


def test_a_step_out_of_all_bounds_is_taken_back() -> None:
    model = make("box", learning_rate=1e30, max_grad_norm=None)
    before = copy.deepcopy(model.policy.state_dict())
    with pytest.raises(NonFiniteError):
        model.learn(64)
    assert all(th.equal(before[name], value) for name, value in model.policy.state_dict().items())
    assert model.kl_coef == 1.0


@both_critics
@pytest.mark.parametrize("scale", [1e-9, 0.0, 1e9])
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("normalize_advantage", [True, False])
def test_rewards_of_any_scale(critic: str, scale: float, env: str, normalize_advantage: bool) -> None:
    envs = make_vec_env(lambda: gym.wrappers.TransformReward(gym.make(env), lambda r: float(r) * scale), 2, seed=0)
    kwargs = {"n_steps": 64, "n_epochs": 3, "normalize_advantage": normalize_advantage, **CRITICS[critic]}
    model = KLPenaltyPG("MlpPolicy", envs, seed=0, device="cpu", **kwargs)
    for _ in range(3):
        step = update(model)
        assert step.is_finite
        assert np.isfinite(model.kl_coef)
        assert step.log["train/joint_kl"] > -1e-7  # rounding


def test_no_advantage_moves_the_policy_by_no_more_than_rounding() -> None:
    """Which Adam makes more of than it is; the penalty keeps it small."""

    def nothing(model: Any) -> None:
        model.rollout_buffer.advantages[:] = 0.0

    step = update(make(), AtRolloutEnd(nothing))
    assert step.log["train/joint_kl"] == pytest.approx(0, abs=1e-5)


@both_critics
@pytest.mark.parametrize("n_steps", [1, 2, 32])
def test_one_step_episodes(critic: str, n_steps: int) -> None:
    envs = [ScriptedEnv((1,), first_reward=r) for r in (0.0, 5.0)]
    model = KLPenaltyPG("MlpPolicy", vec(*envs), n_steps=n_steps, seed=0, device="cpu", **CRITICS[critic])
    for _ in range(3):
        assert update(model).is_finite


@both_critics
def test_two_steps_of_one_env(critic: str) -> None:
    model = KLPenaltyPG("MlpPolicy", "Pendulum-v1", n_steps=2, seed=0, device="cpu", **CRITICS[critic])
    for _ in range(10):
        assert update(model).is_finite


@both_critics
@pytest.mark.parametrize("everything", [False, True])
def test_a_frozen_actor_stays_and_the_critic_learns(critic: str, everything: bool) -> None:
    model = make(**CRITICS[critic])
    frozen = {name for name, _ in model.policy.named_parameters()} if everything else {*model.learner.parameters.actor}
    for name in frozen:
        model.policy.get_parameter(name).requires_grad_(False)
    step = update(model)
    assert step.moved == {name for name, _ in step.new.named_parameters()} - frozen
    assert step.log["train/joint_kl"] == pytest.approx(0, abs=1e-7)
    assert step.log["train/step_size"] == 0


def test_episodes_of_unequal_length() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = make("box", n_steps=None, n_episodes=4, state_discount=True, gamma=0.9, advantage="monte_carlo")
        step = update(model)
    assert not step.batch.valid.all()
    kl = own_joint_kl(step.old, step.new, step.batch.flat_observations)
    assert step.log["train/joint_kl"] == pytest.approx(kl, rel=1e-3)


@pytest.mark.parametrize(
    ("kl_coef", "arguments"),
    [(1e-8, {"learning_rate": 0.0}), (1e8, {"learning_rate": 1e-2, "target_kl": 1e-12, "max_kl_ratio": None})],
    ids=["halved", "doubled"],
)
def test_a_multiplier_stays_away_from_0_and_infinity(kl_coef: float, arguments: dict[str, Any]) -> None:
    """However often it was halved or doubled: from these limits it goes no further."""
    model = make(dual_update="multiplicative", kl_coef=kl_coef, **arguments)
    kl = update(model).log["train/joint_kl"]
    assert kl < model.target_kl / 1.5 if kl_coef < 1 else kl > 1.5 * model.target_kl
    assert model.kl_coef == kl_coef
