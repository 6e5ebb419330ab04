"""OffPAC with action masks against enumeration.

Three states, whose masks differ, and every transition that they allow. The critic's target and each gradient of the
actor are computed a second time, in NumPy, from tables of the networks' outputs, with a softmax over allowed choices.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_pg.algorithms.off_pac import losses
from sb3_pg.algorithms.off_pac.losses import ACTOR_LOSSES, ActorLossInputs, critic_loss
from sb3_pg.algorithms.off_pac.policies import OffPACPolicy
from sb3_pg.rollout import BehaviorSamples

N_STATES, GAMMA = 3, 0.9
SIZES = {"discrete": [4], "multi_discrete": [2, 3], "multi_binary": [2, 2]}
SPACES: dict[str, spaces.Space[Any]] = {
    "discrete": spaces.Discrete(4),
    "multi_discrete": spaces.MultiDiscrete([2, 3]),
    "multi_binary": spaces.MultiBinary(2),
}
MASKS = {
    "discrete": [[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 1]],
    "multi_discrete": [[1, 1, 0, 1, 1], [1, 0, 1, 1, 1], [0, 1, 0, 1, 0]],
    "multi_binary": [[1, 1, 0, 1], [1, 1, 1, 1], [1, 0, 1, 0]],
}
kinds = pytest.mark.parametrize("kind", list(SIZES))


def make_policy(kind: str) -> Any:
    th.manual_seed(3)
    n_masks = sum(SIZES[kind])
    space = spaces.Dict({"observation": spaces.Discrete(N_STATES), "action_mask": spaces.MultiBinary(n_masks)})
    policy: Any = OffPACPolicy(space, SPACES[kind], lambda _: 0.1, net_arch=[], masks=True)
    with th.no_grad():
        for parameter in policy.parameters():
            parameter.normal_()
    return policy


# ---------------------------------------------------------------- the second computation


def probabilities(policy: Any, kind: str) -> list[np.ndarray]:
    """Of each action dimension: pi(choice | s), (S, n_choices)."""
    head = policy.actor.logits
    logits = (head.weight.T + head.bias).detach().numpy().astype(np.float64)
    if kind == "multi_binary":
        logits = np.stack([np.zeros_like(logits), logits], 2).reshape(N_STATES, -1)
    odds = np.exp(logits) * np.array(MASKS[kind])
    parts = np.split(odds, np.cumsum(SIZES[kind])[:-1], axis=1)
    return [part / part.sum(1, keepdims=True) for part in parts]


def least_q(critic: Any, kind: str, s: int, action: tuple[int, ...]) -> float:
    """The smallest Q(s, a)."""
    found = []
    for (layer,) in critic.q_networks:
        weight, bias = (x.detach().numpy().astype(np.float64) for x in (layer.weight, layer.bias))
        if kind == "discrete":
            found.append(weight[action[0], s] + bias[action[0]])
        elif kind == "multi_binary":
            found.append(weight[0, s] + weight[0, N_STATES:] @ np.array(action) + bias[0])
        else:
            found.append(weight[0, s] + weight[0, N_STATES + action[0]] + weight[0, N_STATES + 2 + action[1]] + bias[0])
    return float(min(found))


def actions_of(kind: str, s: int) -> list[tuple[int, ...]]:
    """Every action that is allowed in a state."""
    parts = np.split(np.array(MASKS[kind][s]), np.cumsum(SIZES[kind])[:-1])
    return list(itertools.product(*(np.flatnonzero(part).tolist() for part in parts)))


def joint(pi: list[np.ndarray], s: int, action: tuple[int, ...]) -> float:
    return math.prod(float(part[s, a]) for part, a in zip(pi, action, strict=True))


def value(policy: Any, critic: Any, kind: str, s: int) -> float:
    pi = probabilities(policy, kind)
    return sum(joint(pi, s, a) * least_q(critic, kind, s, a) for a in actions_of(kind, s))


def score_of(pi: list[np.ndarray], kind: str, s: int, action: tuple[int, ...]) -> np.ndarray:
    """d log pi(a|s) / d logits of the state, (n_logits,): 0 where a choice is forbidden."""
    parts = [np.eye(part.shape[1])[a] - part[s] for part, a in zip(pi, action, strict=True)]
    masks = np.split(np.array(MASKS[kind][s]), np.cumsum(SIZES[kind])[:-1])
    both = [part * mask for part, mask in zip(parts, masks, strict=True)]
    return np.array([part[1] for part in both]) if kind == "multi_binary" else np.concatenate(both)


def exact_gradient(policy: Any, kind: str, states: list[int]) -> np.ndarray:
    """Gradient of the mean over states of sum_a pi(a|s) min_i Q_i(s, a) by the logits of each state."""
    pi, table = probabilities(policy, kind), np.zeros((N_STATES, policy.actor.logits.out_features))
    for s in states:
        for a in actions_of(kind, s):
            table[s] += joint(pi, s, a) * least_q(policy.critic, kind, s, a) * score_of(pi, kind, s, a) / len(states)
    return table


# ---------------------------------------------------------------- what is shipped


def samples_of(
    kind: str, rows: list[tuple[int, tuple[int, ...], int, bool]], log_probs: Any = None, last: int = 0
) -> BehaviorSamples:
    """Transitions (s, a, s', terminal) with reward 1 + s - a. The mask of a terminal state is ``last`` everywhere."""
    states, actions, after, ends = zip(*rows, strict=True)
    n_masks = sum(SIZES[kind])
    next_masks = [[last] * n_masks if end else MASKS[kind][s] for s, end in zip(after, ends, strict=True)]

    def observations(of: Any, masks: Any) -> dict[str, th.Tensor]:
        # as DictReplayBuffer stores them
        return {"observation": th.tensor(of)[:, None], "action_mask": th.tensor(masks, dtype=th.int8)}

    return BehaviorSamples(
        observations(states, [MASKS[kind][s] for s in states]),
        th.tensor(actions),
        observations(after, next_masks),
        th.tensor(ends).float()[:, None],
        th.tensor([1.0 + s - a[0] for s, a in zip(states, actions, strict=True)])[:, None],
        None,
        th.zeros(len(rows)) if log_probs is None else log_probs,
    )


def transitions(kind: str) -> list[tuple[int, tuple[int, ...], int, bool]]:
    rows = [(s, a) for s in range(N_STATES) for a in actions_of(kind, s)]
    return [(s, a, (s + i) % N_STATES, i % 3 == 2) for i, (s, a) in enumerate(rows)]


def as_drawn(kind: str, actions: list[tuple[int, ...]]) -> th.Tensor:
    drawn = th.tensor(actions)
    return drawn[:, 0] if kind == "discrete" else drawn.float() if kind == "multi_binary" else drawn


def draws(monkeypatch: pytest.MonkeyPatch, kind: str, choices: list[list[tuple[int, ...]]]) -> None:
    """Let the losses draw these actions, one per state, one list per call."""
    it: Iterator[th.Tensor] = iter([as_drawn(kind, actions) for actions in choices])
    monkeypatch.setattr(losses, "draw", lambda _: next(it))


def gradient(policy: Any, loss: th.Tensor) -> np.ndarray:
    """By the logits of each state: those of the weights, since observations are one-hot."""
    (found,) = th.autograd.grad(loss, [policy.actor.logits.weight])
    table: np.ndarray = -found.T.numpy()
    return table


def actor_gradient(
    policy: Any, name: Any, samples: BehaviorSamples, n_actions: int = 1, max_ratio: float | None = None
) -> np.ndarray:
    distribution = policy.actor.distribution(samples.observations)
    inputs = ActorLossInputs(samples, distribution, policy.critic, n_actions, max_ratio)
    return gradient(policy, ACTOR_LOSSES[name](inputs)[0])


# ---------------------------------------------------------------- the critic


def wanted_critic_gradients(policy: Any, kind: str, rows: Any, next_values: list[float]) -> list[np.ndarray]:
    """Of half the mean squared error of each network, by its weights."""
    found = []
    for (layer,) in policy.critic.q_networks:
        weight, bias = (x.detach().numpy().astype(np.float64) for x in (layer.weight, layer.bias))
        total = np.zeros_like(weight)
        for (s, a, _, end), v in zip(rows, next_values, strict=True):
            y = 1.0 + s - a[0] + GAMMA * (not end) * v
            x = np.eye(N_STATES)[s]
            output = 0
            if kind == "discrete":
                output = a[0]
            elif kind == "multi_binary":
                x = np.concatenate([x, a])
            else:
                x = np.concatenate([x, np.eye(2)[a[0]], np.eye(3)[a[1]]])
            total[output] += (weight[output] @ x + bias[output] - y) * x / len(rows)
        found.append(total)
    return found


@pytest.mark.parametrize("last", [0, 1])
def test_the_critics_target_is_the_expectation_over_allowed_actions(last: int) -> None:
    policy, rows = make_policy("discrete"), transitions("discrete")
    samples = samples_of("discrete", rows, last=last)
    values = [value(policy, policy.critic_target, "discrete", s) for _, _, s, _ in rows]
    loss, _ = critic_loss(policy, samples, GAMMA)
    weights = [layer.weight for (layer,) in policy.critic.q_networks]
    for found, wanted in zip(
        th.autograd.grad(loss, weights), wanted_critic_gradients(policy, "discrete", rows, values), strict=True
    ):
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["multi_discrete", "multi_binary"])
def test_the_target_of_one_drawn_action_has_that_expectation(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One transition at a time, over all actions that may be drawn in the next state."""
    policy, pi = make_policy(kind), probabilities(make_policy(kind), kind)
    for row in transitions(kind):
        mean: list[Any] = [0.0, 0.0]
        for a in actions_of(kind, row[2]):
            draws(monkeypatch, kind, [[a]])
            loss, _ = critic_loss(policy, samples_of(kind, [row]), GAMMA)
            weights = [layer.weight for (layer,) in policy.critic.q_networks]
            for i, found in enumerate(th.autograd.grad(loss, weights)):
                mean[i] = mean[i] + joint(pi, row[2], a) * found.numpy()
        wanted = wanted_critic_gradients(policy, kind, [row], [value(policy, policy.critic_target, kind, row[2])])
        for ours, theirs in zip(mean, wanted, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@kinds
def test_drawn_next_actions_are_allowed_and_as_frequent_as_they_should_be(kind: str) -> None:
    policy, n = make_policy(kind), 20_000
    observations = {
        "observation": th.zeros(n, 1, dtype=th.long),
        "action_mask": th.tensor(MASKS[kind][0], dtype=th.int8).expand(n, -1),
    }
    drawn = losses.draw(policy.actor.distribution(observations)).reshape(n, -1).long()
    pi = probabilities(policy, kind)
    for dimension, part in enumerate(pi):
        shares = np.bincount(drawn[:, dimension].numpy(), minlength=part.shape[1]) / n
        assert (shares[part[0] == 0] == 0).all()
        assert np.abs(shares - part[0]).max() < 5 * 0.5 / math.sqrt(n)


@kinds
def test_terminal_states_whose_masks_allow_nothing_give_finite_targets(kind: str) -> None:
    policy, rows = make_policy(kind), transitions(kind)
    for last in (0, 1):
        th.manual_seed(0)
        loss, _ = critic_loss(policy, samples_of(kind, rows, last=last), GAMMA)
        assert bool(loss.isfinite())
    gradients = th.autograd.grad(loss, list(policy.critic.parameters()))
    assert all(bool(one.isfinite().all()) for one in gradients)


# ---------------------------------------------------------------- the actor


def test_expected() -> None:
    policy, rows = make_policy("discrete"), transitions("discrete")
    found = actor_gradient(policy, "expected", samples_of("discrete", rows))
    wanted = exact_gradient(policy, "discrete", [s for s, *_ in rows])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    assert np.abs(found[np.array(MASKS["discrete"]) == 0]).max() < 1e-6  # what rounding leaves


@kinds
def test_score_has_the_exact_gradient_as_expectation(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all pairs of actions that may be drawn."""
    policy = make_policy(kind)
    pi = probabilities(policy, kind)
    for s in range(N_STATES):
        samples, mean = samples_of(kind, [(s, actions_of(kind, s)[0], s, False)]), np.zeros(1)
        for pair in itertools.product(actions_of(kind, s), repeat=2):
            draws(monkeypatch, kind, [[a] for a in pair])
            probability = math.prod(joint(pi, s, a) for a in pair)
            mean = mean + probability * actor_gradient(policy, "score", samples, n_actions=2)
        np.testing.assert_allclose(mean, exact_gradient(policy, kind, [s]), rtol=1e-4, atol=1e-5)


@kinds
def test_importance_has_the_exact_gradient_as_expectation(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all actions of a behavior that is uniform among what is allowed, as before learning_starts."""
    policy = make_policy(kind)
    for s in range(N_STATES):
        actions = actions_of(kind, s)
        samples = samples_of(
            kind, [(s, a, s, False) for a in actions], th.full((len(actions),), -math.log(len(actions)))
        )
        draws(monkeypatch, kind, [[actions[0]] * len(actions)])  # V is a baseline: any action gives the expectation
        found = actor_gradient(policy, "importance", samples)
        np.testing.assert_allclose(found, exact_gradient(policy, kind, [s]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("limit", [0.5, 1.0])
def test_importance_truncates_ratios_of_the_masked_distribution(limit: float) -> None:
    policy, kind = make_policy("discrete"), "discrete"
    pi, rows = probabilities(policy, kind), transitions(kind)
    behavior = [1 / len(actions_of(kind, s)) for s, *_ in rows]
    wanted = np.zeros((N_STATES, 4))
    for (s, a, *_), mu in zip(rows, behavior, strict=True):
        weight = min(joint(pi, s, a) / mu, limit)
        advantage = least_q(policy.critic, kind, s, a) - value(policy, policy.critic, kind, s)
        wanted[s] += weight * advantage * score_of(pi, kind, s, a) / len(rows)
    samples = samples_of(kind, rows, th.tensor(behavior).log())
    found = actor_gradient(policy, "importance", samples, max_ratio=limit)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


@kinds
def test_the_entropy_is_that_of_the_allowed_actions(kind: str) -> None:
    policy, rows = make_policy(kind), transitions(kind)
    pi = probabilities(policy, kind)
    found = losses.entropies(policy.actor.distribution(samples_of(kind, rows).observations))
    for (s, *_), entropy in zip(rows, found.tolist(), strict=True):
        p = np.array([joint(pi, s, a) for a in actions_of(kind, s)])
        assert entropy == pytest.approx(float(-(p * np.log(p)).sum()), abs=1e-5)


@pytest.mark.parametrize("name", ["expected", "score", "importance"])
def test_nothing_depends_on_forbidden_actions(name: Any) -> None:
    """State 0 forbids the actions 2 and 3. Its logits and Q values of these change."""
    policy, kind = make_policy("discrete"), "discrete"
    rows = [(0, a, 0, False) for a in actions_of(kind, 0)]
    samples = samples_of(kind, rows, th.full((2,), -math.log(2)))

    def numbers() -> list[np.ndarray]:
        th.manual_seed(0)
        loss, _ = critic_loss(policy, samples, GAMMA)
        by_critic = th.autograd.grad(loss, [layer.weight for (layer,) in policy.critic.q_networks])
        return [actor_gradient(policy, name, samples, n_actions=3), *(one.numpy() for one in by_critic)]

    before = numbers()
    with th.no_grad():
        policy.actor.logits.weight[2:, 0] += 50
        for critic in (policy.critic, policy.critic_target):
            for (layer,) in critic.q_networks:
                layer.weight[2:, 0] -= 1000
    for was, now in zip(before, numbers(), strict=True):
        np.testing.assert_allclose(now, was, rtol=1e-4, atol=1e-6)
