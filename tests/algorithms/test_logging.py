"""What every update logs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_pg import NPG, TRPO, ActorCritic, KLPenaltyPG, Reinforce
from tests.algorithms.every_algorithm import Make
from tests.algorithms.off_policy_pg import envs, trained, with_ratios
from tests.algorithms.off_policy_pg import make as make_off_policy
from tests.algorithms.steps import history, update
from tests.algorithms.trust_region import make as make_trust_region
from tests.helpers import (
    ACTION_SPACES,
    ScriptedEnv,
    parameters,
    rollout_of,
    vec,
)

pytestmark = [pytest.mark.filterwarnings("ignore:batch_size=.* does not divide"), pytest.mark.usefixtures("one_thread")]


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


NATURAL_EXPLANATION = ("train/step_outcome", "train/cg_iterations", "train/cg_residual", "train/line_search_steps")


#: Logged by the algorithms of a class, besides.
OWN_EXPLANATION: dict[type, tuple[str, ...]] = {
    Reinforce: ("train/policy_loss",),
    ActorCritic: ("train/policy_loss",),
    NPG: NATURAL_EXPLANATION,
    TRPO: NATURAL_EXPLANATION,
    KLPenaltyPG: ("train/policy_loss", "train/kl_coef", "train/n_epochs"),
}


def test_every_update_explains_itself(make: Make) -> None:
    model = make("Pendulum-v1").learn(900, log_interval=1)
    logged = dict(model.logger.name_to_value)
    own = {name for cls, names in OWN_EXPLANATION.items() if isinstance(model, cls) for name in names}
    unknown = {"train/step_outcome"}
    if getattr(model, "n_steps", None) == model.n_envs == 1:  # one return has no variance
        unknown.add("train/explained_variance")
    for name in {*EXPLANATION, *own} - unknown:
        assert np.isfinite(logged[name]), name
    assert logged.get("train/step_outcome", "accepted") == "accepted"
    assert own <= logged.keys()
    if getattr(model, "baseline", "value") == "value":
        assert np.isfinite(logged["train/value_loss"])
    if model.critic_optimizer is not None:
        assert logged["train/critic_learning_rate"] < 1e-2


def test_explanations_do_not_change_training(make: Make) -> None:
    plain, explained = (make("CartPole-v1").learn(300, log_interval=n) for n in (None, 1))
    assert th.equal(parameters(plain), parameters(explained))
    knows_anyway = isinstance(plain, NPG | TRPO | KLPenaltyPG)
    assert ("train/joint_kl" in plain.logger.name_to_value) == knows_anyway
    assert "train/surrogate_predicted" in explained.logger.name_to_value


def test_the_updates_that_are_logged_are_those_that_explain_themselves(make: Make) -> None:
    """SB3 writes the log after collecting, so that it holds the numbers of the update before."""
    written: list[set[str]] = []
    model = make("CartPole-v1")
    dump = model.dump_logs

    def note_and_dump(*args: Any) -> Any:
        written.append(set(model.logger.name_to_value))
        return dump(*args)

    model.dump_logs = note_and_dump
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
    rollout = rollout_of(model)
    with th.no_grad():
        actions = rollout.flat_actions(model.action_space)
        _, new, _ = model.policy.evaluate_actions(rollout.flat_observations, actions)
    ratio = (new - rollout.log_probs.flatten()).double().exp()
    assert logged["train/joint_kl"] == pytest.approx(float((ratio - 1 - ratio.log()).mean()), rel=0.2)
    assert logged["train/joint_kl"] > 0
    assert logged["train/largest_ratio"] == pytest.approx(float(ratio.max()), rel=1e-5)
    share = float(ratio.sum() ** 2 / (ratio**2).sum() / 256)
    assert logged["train/effective_sample_size"] == pytest.approx(share, rel=1e-5)
    assert logged["train/surrogate_realized"] == pytest.approx(logged["train/surrogate_predicted"], rel=0.1)
    assert logged["train/surrogate_predicted"] > 0


@pytest.mark.parametrize(
    ("ratio", "weights"),
    [
        ("per_step", [2, 2, 0.5, 0.5, 0.5]),
        ("prefix", [2, 4, 0.5, 0.25, 0.125]),
        ("per_decision", [2, 4, 0.5, 0.25, 0.125]),
        ("trajectory", [4, 4, 0.125, 0.125, 0.125]),
    ],
)
@pytest.mark.parametrize("max_ratio", [None, 3.0, 1.5])
def test_weights_are_logged(ratio: str, weights: list[float], max_ratio: float | None) -> None:
    model = make_off_policy(envs(), ratio=ratio, max_ratio=max_ratio, baseline="none")
    model.add_trajectories(with_ratios(model, [2, 2], [0.5, 0.5, 0.5]))
    log = trained(model)
    w = np.minimum(weights, max_ratio or np.inf)
    cut = np.mean(w < weights)
    if ratio == "trajectory":  # one for each
        w = w[[0, 2]]
    assert log["train/importance_ess"] == pytest.approx(w.sum() ** 2 / (w**2).sum() / len(w), rel=1e-4)
    assert log["train/largest_weight"] == pytest.approx(w.max(), rel=1e-4)
    assert log["train/truncated_fraction"] == pytest.approx(cut)
    assert log["train/effective_sample_size"] > 0.99  # of the step that was taken, which was small


def test_staleness_is_counted_in_gradient_steps() -> None:
    model = make_off_policy(envs(), train_freq=(4, "episode"), gradient_steps=3).learn(22, log_interval=None)
    assert model._n_updates == 6
    assert model.logger.name_to_value["train/staleness"] == (5 + 2) / 2  # half of the trajectories are from the start
    assert trained(model)["train/staleness"] == (6 + 3) / 2


def test_the_last_step_of_an_update_explains_itself() -> None:
    """Three steps in one update log what the last of three updates with one step logs."""
    together, single = make_off_policy(envs()), make_off_policy(envs())
    for model in (together, single):
        model.add_trajectories(with_ratios(model, [1, 1], [1, 1, 1]))
    kls = [trained(single)["train/joint_kl"] for _ in range(3)]
    assert trained(together, 3)["train/joint_kl"] == kls[2]
    assert len({0.0, *kls}) == 4


def test_what_is_logged_is_complete() -> None:
    """What sb3_contrib's TRPO logs under other names, and how the step came about."""
    logs = history(make_trust_region("trpo", "box"), 4 * 64)
    names = {
        *("joint_kl", "step_outcome", "step_size", "line_search_steps", "surrogate_predicted", "surrogate_realized"),
        *("cg_iterations", "cg_residual", "grad_norm", "entropy", "std", "value_loss", "explained_variance"),
        *("largest_ratio", "effective_sample_size", "clipped_action_fraction", "learning_rate", "n_updates"),
    }
    assert len(logs) == 4
    assert all({f"train/{name}" for name in names} <= log.keys() for log in logs)
    assert all(0 < log["train/effective_sample_size"] <= 1 < log["train/largest_ratio"] for log in logs)


def test_a_rejected_step_is_told() -> None:
    model = TRPO("MlpPolicy", "CartPole-v1", n_steps=64, batch_size=64, line_search_accept_ratio=1.0, seed=0)
    model.line_search_max_iter, model.target_kl = 1, 50.0
    log = update(model).log
    assert log["train/step_outcome"] in ("kl", "no_improvement")
    assert log["train/rejected_kl"] > 0
    assert log["train/joint_kl"] == 0
