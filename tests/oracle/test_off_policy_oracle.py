"""OffPolicyPG's loss against the enumeration of a tabular MDP in which another policy acts."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
from stable_baselines3.common.logger import Logger

from sb3_pg import OffPolicyPG
from sb3_pg.rollout import Trajectory
from tests.oracle.harness import ASCENT, ATOL, BEHAVIOR, CRITIC_TABLE, MDP, PLAIN, THETA, parameters, set_parameters
from tests.oracle.mdp import Array, Enumeration, Spaces, TabularMDP, graph_mdp


class Form(NamedTuple):
    ratio: str
    returns: str
    gamma: float
    state_discount: bool


#: What each form is the gradient of: of the policy's own states and rewards, or of what the behavior makes of them.
UNBIASED = [
    Form(ratio, *form)
    for ratio in ("per_decision", "trajectory")
    for form in (
        ("total", 1.0, False),
        ("total", 0.9, False),
        ("reward_to_go", 1.0, False),
        ("reward_to_go", 0.9, False),
        ("reward_to_go", 0.9, True),
    )
]
BIASED = [
    Form(ratio, "reward_to_go", 0.9, state_discount)
    for ratio in ("per_step", "prefix")
    for state_discount in (False, True)
]
FORMS = UNBIASED + BIASED
BASELINES = {"none": 1, "value": 1, "leave_one_out": 2}  # and how many episodes it takes


def named(form: Form) -> str:
    return "-".join(map(str, form))


@cache
def enumeration(form: Form) -> Enumeration:
    return Enumeration(MDP, THETA, *form[1:], behavior=BEHAVIOR)


def make(form: Form, **arguments: Any) -> OffPolicyPG:
    chosen: dict[str, Any] = {
        **PLAIN,
        **ASCENT,
        "policy_kwargs": {"net_arch": [], **ASCENT["policy_kwargs"]},
        "gradient_steps": 1,
        "buffer_trajectories": 99,
        "critic_learning_rate": None,
        "n_critic_updates": 1,
        **form._asdict(),
        **arguments,
    }
    model = OffPolicyPG("MlpPolicy", Spaces(MDP.n_states, MDP.n_actions), **chosen)
    model.set_logger(Logger(None, []))
    return model


def stored(mdp: TabularMDP) -> list[Trajectory]:
    """Every trajectory as a user would hand it in, with the log-probs of the behavior."""
    acting = np.log(mdp.policy(BEHAVIOR))
    return [
        Trajectory(
            np.array(tau.states),
            np.array(tau.actions),
            np.array(tau.rewards),
            acting[list(tau.states), list(tau.actions)],
            tau.terminated,
            not tau.terminated,
            np.int64(tau.last_state),
        )
        for tau in mdp.trajectories()
    ]


def ascent(model: OffPolicyPG, trajectories: list[Trajectory]) -> Array:
    """The gradient that theta ascends with these trajectories alone in the buffer."""
    assert model.replay_buffer is not None
    set_parameters(model, THETA)
    before = parameters(model)
    model.replay_buffer.reset()
    model.add_trajectories(trajectories)
    model.train(1, None)
    return parameters(model) - before


def estimates(form: Form, baseline: str, mdp: TabularMDP = MDP, **arguments: Any) -> tuple[Array, Array]:
    """What the update makes of every batch of the behavior's episodes, (B, P), and how probable each is, (B,)."""
    model, trajectories = make(form, baseline=baseline, **arguments), stored(mdp)
    oracle = Enumeration(mdp, THETA, *form[1:], behavior=BEHAVIOR)
    index, probability = oracle.batches(BASELINES[baseline])
    return np.stack([ascent(model, [trajectories[i] for i in chosen]) for chosen in index]), probability


def target(form: Form) -> Array:
    """The policy's own gradient; where they are not weighted, of the behavior's states and of what it does later."""
    values = MDP.q_values(THETA if form in UNBIASED else BEHAVIOR, form.gamma)
    states = MDP.occupancy(BEHAVIOR if form.ratio == "per_step" else THETA)
    discount = form.gamma if form.state_discount or form.returns == "total" else 1.0
    return MDP.credited_gradient(THETA, values, discount, states)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("form", FORMS, ids=named)
def test_expectation(form: Form, baseline: str) -> None:
    found, probability = estimates(form, baseline)
    assert np.abs(probability @ found - target(form)).max() < ATOL


@pytest.mark.parametrize("form", BIASED, ids=named)
def test_what_is_called_biased_is_biased(form: Form) -> None:
    true = MDP.policy_gradient(THETA, form.gamma, form.state_discount)
    assert np.abs(target(form) - true).max() > 1e-2


@pytest.mark.parametrize("form", FORMS, ids=named)
def test_stored_and_replayed_they_give_the_same(form: Form) -> None:
    """All trajectories at once."""
    found, _ = estimates(form, "none")
    assert np.abs(ascent(make(form, baseline="none"), stored(MDP)) - found.mean(0)).max() < ATOL


@pytest.mark.parametrize("form", [f for f in UNBIASED if f.returns == "reward_to_go"], ids=named)
def test_a_critic_that_values_what_the_time_limit_cuts_off(form: Form) -> None:
    """The expectation is of the rewards seen and that value, by backward induction."""
    mdp, _ = graph_mdp(continues=True)
    found, probability = estimates(form, "value", mdp, truncation="bootstrap")
    values = np.tile(CRITIC_TABLE[:1], (mdp.horizon + 1, 1))
    credit = mdp.n_step_q(THETA, form.gamma, values, mdp.horizon)
    true = mdp.credited_gradient(THETA, credit, form.gamma if form.state_discount else 1.0)
    assert np.abs(probability @ found - true).max() < ATOL


@pytest.mark.parametrize("ratio", ["per_step", "prefix", "trajectory"])
def test_weights_are_truncated_then_normalized(ratio: str) -> None:
    """Every pair of episodes, by a plain loop."""
    form = Form(ratio, "reward_to_go", 0.9, True)
    found, _ = estimates(form, "leave_one_out", max_ratio=1.2, self_normalize=True)
    oracle = enumeration(form)
    rho = (MDP.policy(THETA) / MDP.policy(BEHAVIOR))[oracle.state, oracle.action]
    index, _ = oracle.batches(2)
    lengths = oracle.mask.sum(1).astype(int)
    expected = np.zeros_like(found)
    for k, pair in enumerate(index):
        weights = []
        for i in pair:
            steps = rho[i, : lengths[i]]
            products = {"per_step": steps, "prefix": steps.cumprod(), "trajectory": np.full_like(steps, steps.prod())}
            weights.append(np.minimum(products[ratio], 1.2))
        for n, i in enumerate(pair):
            other = pair[1 - n]
            baseline = oracle.G[other, : lengths[other]].mean()
            for t in range(lengths[i]):
                mean = np.mean([w[min(t, len(w) - 1)] for w in weights])
                expected[k] += oracle.U[i, t] * weights[n][t] / mean * (oracle.G[i, t] - baseline) / 2
    assert np.abs(found - expected).max() < ATOL
