"""The lecture's worked examples: which actions a gradient encourages, through the shipped loss.

Source: CS 224R, lecture 3 (policy gradients): humanoids rewarded by their forward velocity, and a jacket to be folded.
The numbers are ours, chosen to have the signs and the order that the text states.

Every step of every trajectory has its own state, and the policy is uniform over two actions. With score
1[a = b] - 1/2 at the taken action's own logit, the ascent direction there is (1/N) * (1/2) * advantage.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sb3_pg import Reinforce
from tests.oracle.harness import ASCENT, playing_model
from tests.oracle.mdp import TabularMDP, Trajectory

N_STATES = 16
#: Of the task nothing but its size matters: the episodes are given.
TASK = TabularMDP(np.zeros(N_STATES), np.zeros((N_STATES, 2, N_STATES + 1)), np.zeros((N_STATES, 2)), horizon=4)
Rewards = dict[str, list[float]]
SMALL = 0.01  # of the step

# The first lesson: a bad policy.
BEGINNERS: Rewards = {
    "falls backward": [-1, -2],
    "falls forward": [1, 2],
    "stands still": [0, 0, 0],
    "small step forward, then falls backward": [1, -3],
    "large step backward, then small step forward": [-3, 1],
}
# The second: all make their way forward.
WALKERS: Rewards = {"falls forward": [1], "stumbles": [1, 1], "walks": [2, 3], "runs": [4, 4]}
# The third: 1 if neatly folded, 0 if not.
JACKETS: Rewards = {
    "does not touch it": [0, 0],
    "folds the sleeves": [0, 0, 0],
    "flattens it": [0, 0],
    "folds it": [0, 0, 1],
}


def lesson(rewards: Rewards, **arguments: Any) -> tuple[Reinforce, list[Trajectory]]:
    """A model that began with a uniform policy, after one small step from one trajectory of each kind; and these."""
    first, seen = 0, []
    for r in rewards.values():
        states = tuple(range(first, first + len(r)))
        actions = tuple(s % 2 for s in states)
        seen.append(Trajectory(states, actions, tuple(r), terminated=True, dynamics=1.0))
        first += len(r)
    model = playing_model(
        Reinforce,
        TASK,
        np.zeros(TASK.n_parameters),
        n_envs=len(rewards),
        values=np.zeros((TASK.horizon + 1, N_STATES)),
        n_episodes=len(rewards),
        gamma=1.0,
        **{**ASCENT, "learning_rate": SMALL, **arguments},
    )
    env: Any = model.get_env()
    env.play([[trajectory] for trajectory in seen])
    return model.learn(1), seen


def encouragement(rewards: Rewards, **arguments: Any) -> Rewards:
    """How much each step's action is encouraged, in reward units: 2 N times the ascent of its logit.

    Asserts that a small step along the ascent direction changes log pi(a | s) of each action with that sign. The
    bias, which all states share, is left out: only what a trajectory says of its own actions is asked here.
    """
    model, seen = lesson(rewards, **arguments)
    actor: Any = model.policy.action_net
    weight = actor.weight.detach()
    change = weight.log_softmax(dim=0) - np.log(0.5)
    found = {}
    for kind, trajectory in zip(rewards, seen, strict=True):
        taken = list(trajectory.actions), list(trajectory.states)
        found[kind] = (2 * len(rewards) / SMALL * weight[taken]).tolist()
        assert [int(np.sign(x)) for x in change[taken].tolist()] == [int(np.sign(x)) for x in found[kind]]
    return found


def signs(found: Rewards) -> dict[str, list[int]]:
    return {kind: [int(np.sign(x)) for x in steps] for kind, steps in found.items()}


def whole(rewards: Rewards, advantage: list[float]) -> Any:
    """The same advantage at all steps of a trajectory."""
    steps = zip(rewards.items(), advantage, strict=True)
    return {kind: pytest.approx([a] * len(r), abs=1e-5) for (kind, r), a in steps}


def test_total_return_encourages_only_falling_forward() -> None:
    """Sums of rewards -3, 3, 0, -2, -2: also both steps forward are discouraged, the late one for what preceded it."""
    found = encouragement(BEGINNERS, returns="total", baseline="none")
    assert signs(found) == {
        "falls backward": [-1, -1],
        "falls forward": [1, 1],
        "stands still": [0, 0, 0],
        "small step forward, then falls backward": [-1, -1],
        "large step backward, then small step forward": [-1, -1],
    }
    assert found == whole(BEGINNERS, [-3, 3, 0, -2, -2])


def test_causality_encourages_the_late_step_forward() -> None:
    """Rewards to come: (-3, -2), (3, 2), (0, 0, 0), (-2, -3), (-2, 1).

    A step forward after a large one backward is good in itself. One before a fall may have caused it: still bad.
    """
    found = encouragement(BEGINNERS, returns="reward_to_go", baseline="none")
    assert signs(found) == {
        "falls backward": [-1, -1],
        "falls forward": [1, 1],
        "stands still": [0, 0, 0],
        "small step forward, then falls backward": [-1, -1],
        "large step backward, then small step forward": [-1, 1],
    }
    to_go = [[-3, -2], [3, 2], [0, 0, 0], [-2, -3], [-2, 1]]
    assert list(found.values()) == [pytest.approx(g, abs=1e-5) for g in to_go]


@pytest.mark.parametrize("returns", ["total", "reward_to_go"])
def test_without_baseline_all_who_move_forward_are_encouraged(returns: str) -> None:
    """Stumbling and falling too, though in the order of their rewards: running most."""
    found = encouragement(WALKERS, returns=returns, baseline="none")
    assert all(step > 0 for steps in found.values() for step in steps)
    assert [steps[0] for steps in found.values()] == pytest.approx([1, 2, 5, 8], abs=1e-5)
    late = [steps[1] for steps in list(found.values())[1:]]
    assert late == pytest.approx([2, 5, 8] if returns == "total" else [1, 3, 4], abs=1e-5)


def test_mean_baseline_encourages_the_better_than_average() -> None:
    """Returns 1, 2, 5, 8, average 4."""
    found = encouragement(WALKERS, returns="total", baseline="mean")
    assert found == whole(WALKERS, [-3, -2, 1, 4])


def test_mean_baseline_removes_the_scale_of_the_reward() -> None:
    """With 10 less for everyone all are discouraged; relative to the average nothing has changed."""
    poorer = {kind: [r[0] - 10, *r[1:]] for kind, r in WALKERS.items()}
    assert encouragement(poorer, returns="total", baseline="none") == whole(WALKERS, [-9, -8, -5, -2])
    assert encouragement(poorer, returns="total", baseline="mean") == whole(WALKERS, [-3, -2, 1, 4])


def test_baseline_for_reward_to_go_must_know_the_step() -> None:
    """Rewards to come (1), (2, 1), (5, 3), (8, 4): "you'll be summing over fewer things" late in a trajectory.

    The mean over all steps is 24/7, so the walker's second step, 3, looks bad only because it is late. Step by step
    the averages are 4 and 8/3, and walking is better than average throughout.
    """
    mean = encouragement(WALKERS, returns="reward_to_go", baseline="mean")
    assert mean["walks"] == pytest.approx([5 - 24 / 7, 3 - 24 / 7], abs=1e-5)
    assert signs(mean)["walks"] == [1, -1]
    time = encouragement(WALKERS, returns="reward_to_go", baseline="time")
    assert signs(time) == {"falls forward": [-1], "stumbles": [-1, -1], "walks": [1, 1], "runs": [1, 1]}
    assert time["walks"] == pytest.approx([5 - 4, 3 - 8 / 3], abs=1e-5)


def test_sparse_reward_discourages_all_failures_alike() -> None:
    """Average 1/4: folding the sleeves is as bad as not touching the jacket, and folding it is good."""
    found = encouragement(JACKETS, returns="total", baseline="mean")
    assert found == whole(JACKETS, [-0.25, -0.25, -0.25, 0.75])


@pytest.mark.parametrize("returns", ["total", "reward_to_go"])
def test_sparse_reward_without_baseline_ignores_failures(returns: str) -> None:
    found = encouragement(JACKETS, returns=returns, baseline="none")
    assert all(step == 0 for kind in list(JACKETS)[:3] for step in found[kind])  # exactly
    assert found["folds it"] == pytest.approx([1, 1, 1], abs=1e-5)


@pytest.mark.parametrize("returns", ["total", "reward_to_go"])
@pytest.mark.parametrize("baseline", ["none", "mean", "leave_one_out", "time", "optimal"])
def test_without_a_success_the_gradient_is_exactly_zero(returns: str, baseline: str) -> None:
    failures: Rewards = {**JACKETS, "folds it": [0, 0, 0]}
    model, _ = lesson(failures, returns=returns, baseline=baseline)
    actor: Any = model.policy.action_net
    assert not actor.weight.any()
    assert not actor.bias.any()
