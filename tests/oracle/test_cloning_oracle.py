"""Behavior cloning against the maximum likelihood in closed form, and its gradient against the policy gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_pg import ActorCritic, Demonstrations, Reinforce
from sb3_pg.functional import behavior_cloning_loss, policy_gradient_loss
from tests.helpers import two_envs
from tests.oracle.harness import ASCENT, ATOL, MDP, THETA, ascent, parameters, playing_model
from tests.oracle.mdp import Array, Trajectory

#: The demonstrated actions of each state: 3 of 7, 6 of 8 and 1 of 5 are action 1.
STATES = np.repeat([0, 1, 2], [7, 8, 5])
ACTIONS = np.array([1] * 3 + [0] * 4 + [1] * 6 + [0] * 2 + [1] + [0] * 4)
ENDS = np.isin(np.arange(20), [2, 3, 11, 19])


def counted(states: Any, actions: Any) -> Array:
    """The maximum likelihood: the share of each action in each state, (S, A)."""
    counts = np.zeros((MDP.n_states, MDP.n_actions))
    np.add.at(counts, (states, actions), 1)
    shares: Array = counts / counts.sum(axis=1, keepdims=True)
    return shares


def test_it_reaches_the_maximum_likelihood() -> None:
    """Observations are those of time steps 0 to 3, which the policy does not see."""
    times = np.arange(20) % (MDP.horizon + 1)
    demos = Demonstrations(times * MDP.n_states + STATES, ACTIONS, terminated=ENDS)
    model = playing_model(Reinforce, MDP, THETA, 1, n_episodes=1, baseline="none")
    report = model.pretrain(demos, n_epochs=300, batch_size=20, learning_rate=0.05, validation=0, seed=0)
    best = counted(STATES, ACTIONS)
    assert np.abs(MDP.policy(parameters(model)) - best).max() < 1e-3
    assert report.losses[-1] == pytest.approx(-np.log(best[STATES, ACTIONS]).mean(), abs=1e-5)
    assert report.accuracy == pytest.approx((4 + 6 + 4) / 20)  # the more frequent action of each state


def test_the_maximum_likelihood_of_a_gaussian() -> None:
    """Means of the actions of each state, and one standard deviation: the root mean square of what is left."""
    space = spaces.Box(np.array([-1, -3], np.float32), np.array([1, 1], np.float32), dtype=np.float32)
    rng = np.random.default_rng(0)
    actions = rng.uniform(space.low, space.high, (20, 2)).astype(np.float32)
    demos = Demonstrations(STATES, actions, terminated=ENDS)
    kwargs: dict[str, Any] = {"policy_kwargs": {"net_arch": []}, "device": "cpu", "seed": 0}
    model: Any = ActorCritic("MlpPolicy", two_envs(space, spaces.Discrete(3)), **kwargs)
    report = model.pretrain(
        demos, n_epochs=500, batch_size=20, learning_rate=0.02, validation=0, critic=False, min_std=0
    )
    means = np.array([actions[s == STATES].mean(axis=0) for s in range(3)])
    left = actions - means[STATES]
    std = np.sqrt((left**2).mean(axis=0))
    with th.no_grad():
        found = model.policy.get_distribution(th.arange(3)).distribution
    assert np.abs(found.mean.numpy() - means).max() < 1e-3
    assert np.abs(found.stddev.numpy() / std - 1).max() < 1e-3
    expected = np.log(std * np.sqrt(2 * np.pi)).sum() + 1.0  # two dimensions, each with a mean square of 1 over 2
    assert report.losses[-1] == pytest.approx(expected, abs=1e-4)
    assert report.mean_absolute_error == pytest.approx(np.abs(left).mean(), abs=1e-3)


# ---------------------------------------------------------------- the gradient


def scores_of(theta: th.Tensor) -> th.Tensor:
    """log pi(a | s) of each demonstrated action, with gradient."""
    n = MDP.n_states * MDP.n_actions
    logits = (theta[:n].reshape(MDP.n_actions, MDP.n_states) + theta[n:, None]).T
    return logits.log_softmax(dim=1)[STATES, ACTIONS]


@pytest.mark.parametrize("mask", [None, np.arange(20) % 3 > 0], ids=["all", "mask"])
def test_its_gradient_is_minus_the_policy_gradient_of_returns_of_one(mask: Any) -> None:
    theta = th.tensor(THETA, requires_grad=True)
    valid = None if mask is None else th.as_tensor(mask)
    cloning = th.autograd.grad(behavior_cloning_loss(scores_of(theta), valid), theta)[0]
    pseudo = policy_gradient_loss(scores_of(theta), th.ones(20, dtype=th.float64), valid)
    assert th.equal(cloning, th.autograd.grad(pseudo, theta)[0])
    counted = np.ones(20, bool) if mask is None else mask
    enumerated = MDP.scores(THETA)[STATES[counted], ACTIONS[counted]].mean(axis=0)
    assert np.abs(cloning.numpy() + enumerated).max() < 1e-12


def test_reinforce_with_a_reward_of_one_is_cloning() -> None:
    """The update of REINFORCE, per episode, against the gradient of the loss, per step."""
    trajectories = [t for t in MDP.trajectories() if len(t.states) > 1]
    shown = [Trajectory(t.states, t.actions, (1.0,) * len(t.actions), t.terminated, t.dynamics) for t in trajectories]
    chosen: dict[str, Any] = {**ASCENT, "gamma": 0.0, "baseline": "none", "n_episodes": len(shown)}
    model = playing_model(Reinforce, MDP, THETA, len(shown), **chosen)
    states, actions = (np.concatenate([getattr(t, name) for t in shown]) for name in ("states", "actions"))
    found = ascent(model, [[episode] for episode in shown])
    policy: Any = model.policy
    policy.zero_grad()
    _, log_prob, _ = policy.evaluate_actions(th.as_tensor(states), th.as_tensor(actions))
    behavior_cloning_loss(log_prob).backward()
    net = policy.action_net
    gradient = th.cat([net.weight.grad.flatten(), net.bias.grad]).numpy()
    assert np.abs(found + gradient * len(states) / len(shown)).max() < ATOL


# ---------------------------------------------------------------- the critic

#: Observations of three episodes: the first terminates, the others are cut.
SEEN, REWARDS = np.array([0, 4, 8, 1, 4, 0, 5, 1]), np.array([1.0, -2.0, 0.5, 3.0, 1.5, -1.0, 0.25, 2.0])
EPISODES = (slice(0, 3), slice(3, 5), slice(5, 8))
FINALS = np.array([2, 8, 1])


def least_squares(gamma: float, bootstraps: bool, knows_finals: bool) -> dict[int, float]:
    """V(o) = mean of G over the steps with observation o, where G holds V of the observations behind the cuts."""
    observed = sorted(set(SEEN.tolist()))
    matrix, right = np.eye(len(observed)), np.zeros(len(observed))
    rows: list[tuple[int, float, float, int | None]] = []  # observation, rewards, weight of a value, its observation
    for n, episode in enumerate(EPISODES):
        cut = bootstraps and n > 0
        last, behind = episode.stop, int(FINALS[n]) if cut else None
        if cut and not knows_finals:
            last, behind = episode.stop - 1, int(SEEN[episode.stop - 1])
        for t in range(episode.start, last):
            discounts = gamma ** np.arange(last - t)
            rows.append((int(SEEN[t]), float(discounts @ REWARDS[t:last]), gamma ** (last - t), behind))
    for i, observation in enumerate(observed):
        own = [row[1:] for row in rows if row[0] == observation]
        for known, weight, behind in own:
            right[i] += known / len(own)
            if behind is not None:
                matrix[i, observed.index(behind)] -= weight / len(own)
    return dict(zip(observed, np.linalg.solve(matrix, right).tolist(), strict=True))


@pytest.mark.parametrize("truncation", ["terminal", "bootstrap"])
@pytest.mark.parametrize("knows_finals", [False, True])
def test_the_critic_reaches_the_least_squares(truncation: Any, knows_finals: bool) -> None:
    ends = np.isin(np.arange(8), [episode.stop - 1 for episode in EPISODES])
    finals = FINALS if knows_finals else None
    demos = Demonstrations(SEEN, SEEN % 2, REWARDS, ends & (np.arange(8) < 3), ends, final_observations=finals)
    chosen: dict[str, Any] = {"n_episodes": 1, "baseline": "value", "truncation": truncation, "gamma": 0.9}
    model: Any = playing_model(Reinforce, MDP, THETA, 1, **chosen)
    report = model.pretrain(demos, n_epochs=350, batch_size=8, learning_rate=0.05, validation=0, patience=None)
    expected = least_squares(0.9, truncation == "bootstrap", knows_finals)
    with th.no_grad():
        found = model.policy.predict_values(th.tensor(list(expected)))[:, 0].numpy()
    assert np.abs(found - list(expected.values())).max() < 2e-3
    assert len(report.critic_losses) == 350
