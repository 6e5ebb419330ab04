"""The learner by itself: a policy and batches, with neither an env nor an algorithm."""

import copy
import doctest
import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy

import sb3_pg.learner.learner
import sb3_pg.rollout.collector
from sb3_pg import NonFiniteError
from sb3_pg.baselines import ValueBaseline
from sb3_pg.functional import gae
from sb3_pg.learner import (
    Bootstrapped,
    CriticFit,
    GradientStep,
    KLPenaltyStep,
    Learner,
    LearnerState,
    MonteCarlo,
    NaturalStep,
    ReturnScale,
    Step,
    make_critic_optimizer,
)
from sb3_pg.rollout import RolloutBatch, score_batch

STEPS: dict[str, Callable[[], Step]] = {
    "gradient": GradientStep,
    "natural": NaturalStep,
    "kl_penalty": lambda: KLPenaltyStep(batch_size=8, n_epochs=2),
}


def make_policy() -> ActorCriticPolicy:
    th.manual_seed(0)
    return ActorCriticPolicy(
        spaces.Box(-1, 1, (3,)), spaces.Discrete(3), lambda _: 1e-2, net_arch=[8], optimizer_class=th.optim.SGD
    )


def made_up_batch(policy: ActorCriticPolicy) -> RolloutBatch:
    """Two envs, eight steps, random numbers."""
    th.manual_seed(1)
    ends = th.zeros(8, 2, dtype=th.bool)
    ends[3, 0] = ends[7] = True
    batch = RolloutBatch(
        observations=th.randn(8, 2, 3),
        actions=th.randint(3, (8, 2, 1)),
        rewards=th.randn(8, 2).double(),
        terminated=ends,
        truncated=th.zeros_like(ends),
        timesteps=th.arange(8)[:, None].expand(8, 2),
    )
    policy.set_training_mode(False)
    batch.log_probs = score_batch(policy, batch, with_values=True)
    return batch


def values_of(policy: ActorCriticPolicy) -> th.Tensor:
    return th.nn.utils.parameters_to_vector(policy.parameters()).detach().clone()


@pytest.mark.parametrize("name", list(STEPS))
def test_a_learner_improves_its_objective_on_the_batch(name: str) -> None:
    """After the update, the actions of large advantage are more probable."""
    policy = make_policy()
    batch = made_up_batch(policy)
    learner = Learner(policy, Bootstrapped(gae_lambda=0.9), STEPS[name](), normalize_advantage=True)
    metrics = learner.update(batch)
    assert batch.log_probs is not None
    after = score_batch(policy, batch, with_values=False)
    assert float(((after - batch.log_probs).exp() * learner.credit(batch)).mean()) > 0
    assert float(metrics["surrogate_realized"]) > 0


def test_a_gradient_step_is_that_of_the_formula() -> None:
    """theta + alpha E[grad log pi A] with A of functional.gae, and the critic's squared error, by SGD."""
    policy = make_policy()
    expected = copy.deepcopy(policy)
    batch = made_up_batch(policy)
    Learner(policy, Bootstrapped(0.9, 0.8), GradientStep(0.01, 0.25, None)).update(batch, "nothing")
    assert isinstance(batch.observations, th.Tensor)
    values, log_prob, entropy = expected.evaluate_actions(batch.observations.flatten(0, 1), batch.actions.flatten())
    assert entropy is not None
    old = values.detach().view(8, 2).double()
    advantages = gae(batch.rewards, old, batch.terminated, 0.9, 0.8)
    returns = (advantages + old).flatten().float()
    loss = -(log_prob * advantages.flatten().float()).mean() - 0.01 * entropy.mean()
    loss = loss + 0.25 * (values.flatten() - returns).square().mean()
    loss.backward()
    with th.no_grad():
        for parameter in expected.parameters():
            assert parameter.grad is not None
            parameter.sub_(1e-2 * parameter.grad)
    assert th.allclose(values_of(policy), values_of(expected), atol=1e-6)


@pytest.mark.parametrize("name", list(STEPS))
def test_a_failed_update_changes_nothing(name: str) -> None:
    policy = make_policy()
    batch = made_up_batch(policy)
    critic = CriticFit(own_steps=True, normalize_targets=True)
    learner = Learner(policy, Bootstrapped(), STEPS[name](), critic)
    critic.optimizer = make_critic_optimizer(list(learner.critic_only.values()), 1e-2)
    batch.rewards[2, 1] = np.nan
    before, state = values_of(policy), copy.deepcopy(policy.optimizer.state_dict())
    with pytest.raises(NonFiniteError):
        learner.update(batch)
    assert th.equal(values_of(policy), before)
    assert policy.optimizer.state_dict() == state
    assert learner.value_scale == 1


def test_a_critic_is_trained_alone_while_it_warms_up() -> None:
    policy = make_policy()
    batch = made_up_batch(policy)
    learner = Learner(policy, MonteCarlo(0.9, baseline=ValueBaseline()), GradientStep(), CriticFit(warmup_updates=1))
    for warms_up in (True, False):
        before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
        learner.update(batch)
        assert learner.state.n_warmed_up == 1
        moved = {name for name, parameter in policy.named_parameters() if not th.equal(parameter, before[name])}
        assert learner.critic_only.keys() <= moved
        assert learner.actor.keys().isdisjoint(moved) is warms_up


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file of tensors and plain numbers, which executes nothing."""
    file = io.BytesIO()
    th.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = th.load(file, weights_only=True)
    return loaded


def test_a_learners_state_survives_saving() -> None:
    scale = ReturnScale().updated(th.randn(7).double()).updated(3 * th.randn(5).double())
    state = LearnerState(scale, n_warmed_up=3, n_failures=2)
    restored = LearnerState()
    restored.load_state_dict(saved_and_loaded(state.state_dict()))
    assert restored.state_dict() == state.state_dict()
    assert restored.return_scale.value == scale.value
    assert (restored.n_warmed_up, restored.n_failures) == (3, 2)
    state.load_state_dict(LearnerState().state_dict())
    assert state.return_scale.value == 1


@pytest.mark.parametrize("name", list(STEPS))
def test_training_goes_on_from_a_saved_state_as_if_it_had_not_stopped(name: str) -> None:
    critic = CriticFit(own_steps=True, warmup_updates=2, normalize_targets=True)
    batches = [made_up_batch(make_policy()) for _ in range(4)]
    for n, batch in enumerate(batches):
        batch.rewards = batch.rewards * (n + 1)

    def trained(learner: Learner, on: list[RolloutBatch]) -> Learner:
        th.manual_seed(2)
        for batch in on:
            learner.update(copy.deepcopy(batch))
        return learner

    def learner_of(policy: ActorCriticPolicy) -> Learner:
        return Learner(policy, MonteCarlo(0.9, baseline=ValueBaseline()), STEPS[name](), critic)

    whole = trained(learner_of(make_policy()), batches[:1])
    saved = saved_and_loaded({"policy": whole.policy.state_dict(), "learner": whole.state.state_dict()})
    trained(whole, batches[1:])
    restored, without_state = learner_of(make_policy()), learner_of(make_policy())
    restored.state.load_state_dict(saved["learner"])
    for learner in (restored, without_state):
        learner.policy.load_state_dict(saved["policy"])
        trained(learner, batches[1:])
    assert th.equal(values_of(restored.policy), values_of(whole.policy))
    assert restored.state.state_dict() == whole.state.state_dict()
    assert not th.equal(values_of(without_state.policy), values_of(whole.policy))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_warmed_up": None}, r"^state must have the keys .*: missing \['n_warmed_up'\], unknown \[\]$"),
        ({"kl_coef": 1.0}, r"^state must have .* unknown \['kl_coef'\]$"),
        ({"return_scale": {"mean": 0.0, "std": 1.0}}, r"^state\['return_scale'\] .*missing \['count', 'var'\]"),
    ],
)
def test_a_state_with_other_keys_is_refused(change: dict[str, Any], message: str) -> None:
    state = LearnerState(n_warmed_up=3)
    before = state.state_dict()
    wrong = {name: value for name, value in (before | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        state.load_state_dict(wrong)
    assert state.state_dict() == before


@pytest.mark.parametrize("module", [sb3_pg.learner.learner, sb3_pg.rollout.collector], ids=lambda m: m.__name__)
def test_the_examples_of_the_docstrings_run(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted > 0
    assert result.failed == 0


def test_learner_and_collector_import_no_algorithm() -> None:
    """Nor SB3's: they serve where there is none, as in an actor's process."""
    script = (
        "import sys, types, importlib.machinery, pathlib\n"
        f"root = pathlib.Path({str(sb3_pg.learner.learner.__file__)!r}).parents[1]\n"
        "package = types.ModuleType('sb3_pg')\n"  # without sb3_pg/__init__.py, which imports the algorithms
        "package.__path__ = [str(root)]\n"
        "sys.modules['sb3_pg'] = package\n"
        "import sb3_pg.learner, sb3_pg.rollout\n"
        "print([name for name in sys.modules if name.startswith('sb3_pg.algorithms')])\n"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
