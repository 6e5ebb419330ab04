"""Gradients of a policy with memory against the enumeration of all histories of a small POMDP."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_pg import ActorCritic, Memory, OffPolicyPG, Reinforce
from sb3_pg.rollout import Trajectory, collector
from tests.oracle.harness import ASCENT, ATOL, PLAIN
from tests.oracle.mdp import Array
from tests.recurrence import ByHand

HORIZON = 3
#: Of three hidden states, the first two often look the same.
INITIAL = np.array([0.6, 0.4, 0.0])
OBSERVED = np.array([[1.0, 0.0], [0.7, 0.3], [0.0, 1.0]])
#: T[s, a, s']; the rest is the probability that the episode ends.
MOVE = np.array(
    [
        [[0.0, 0.5, 0.0], [0.0, 0.0, 1.0]],
        [[0.8, 0.0, 0.2], [0.0, 0.0, 0.0]],
        [[0.0, 1.0, 0.0], [0.4, 0.0, 0.0]],
    ]
)
REWARD = np.array([[1.3, -0.7], [0.4, 2.1], [-0.6, 1.7]])


class History(NamedTuple):
    """An episode, as it is observed."""

    observations: tuple[int, ...]
    actions: tuple[int, ...]
    rewards: tuple[float, ...]
    terminated: bool
    dynamics: float  # product of the probabilities that are the environment's


def histories() -> list[History]:
    """Every path through hidden states and observations."""
    found: list[History] = []

    def extend(s: int, seen: tuple[int, ...], done: tuple[int, ...], earned: tuple[float, ...], p: float) -> None:
        for o in np.flatnonzero(OBSERVED[s]):
            looked, p_o = (*seen, int(o)), p * float(OBSERVED[s, o])
            for a in range(2):
                taken, rewards = (*done, a), (*earned, float(REWARD[s, a]))
                p_end = 1 - float(MOVE[s, a].sum())
                if p_end > 1e-12:
                    found.append(History(looked, taken, rewards, True, p_o * p_end))
                if len(looked) == HORIZON and p_end < 1 - 1e-12:
                    found.append(History(looked, taken, rewards, False, p_o * (1 - p_end)))
                elif len(looked) < HORIZON:
                    for z in np.flatnonzero(MOVE[s, a]):
                        extend(int(z), looked, taken, rewards, p_o * float(MOVE[s, a, z]))

    for s in np.flatnonzero(INITIAL):
        extend(int(s), (), (), (), float(INITIAL[s]))
    return found


ALL = histories()


class Played(gym.Env[Any, Any]):
    """Plays a history, over and over."""

    history = ALL[0]

    def __init__(self) -> None:
        self.observation_space, self.action_space = gym.spaces.Discrete(2), gym.spaces.Discrete(2)
        self.t = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self.history.observations[0], {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        own, t = self.history, self.t
        assert action == own.actions[t]
        self.t += 1
        ends = self.t == len(own.actions)
        obs = 0 if ends else own.observations[self.t]
        return obs, own.rewards[t], ends and own.terminated, ends and not own.terminated, {}


class Told:
    """Samples the actions of the histories that are played."""

    def __init__(self, env: Any) -> None:
        self.envs: list[Played] = [one.unwrapped for one in env.envs]

    def __call__(self, obs: Any, starts: Any = None) -> np.ndarray:
        return np.array([env.history.actions[env.t] for env in self.envs])


class Form(NamedTuple):
    returns: str
    gamma: float
    state_discount: bool


#: Whose expectation is the gradient of J.
UNBIASED = [
    Form("total", 1.0, False),
    Form("total", 0.9, False),
    Form("reward_to_go", 1.0, False),
    Form("reward_to_go", 0.9, True),
]
FORMS = [*UNBIASED, Form("reward_to_go", 0.9, False)]
MEMORIES = [
    Memory("lstm", 3),
    Memory("gru", 3),
    Memory("gru", 2, n_layers=2, critic="none"),
]
memories = pytest.mark.parametrize("memory", MEMORIES, ids=lambda m: f"{m.kind}-{m.n_layers}-{m.critic}")

UPDATE: dict[str, Any] = {
    **PLAIN,
    **ASCENT,
    "policy_kwargs": {"net_arch": [], **ASCENT["policy_kwargs"]},
}
JOINT: dict[str, Any] = {"critic_learning_rate": None, "n_critic_updates": 1}


def randomized(model: Any, seed: int = 0) -> Any:
    model.set_logger(Logger(None, []))
    th.manual_seed(seed)
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.normal_(0, 0.8)
    return model


def log_probs(model: ByHand, history: History) -> th.Tensor:
    """log pi(a_t | h_t) of each step, by hand."""
    state, found = model.blank(1), []
    for o, a in zip(history.observations, history.actions, strict=True):
        step = model(th.eye(2)[o][None], state, state)
        state = step.actor
        found.append(step.outputs.log_softmax(1)[0, a])
    return th.stack(found)


def names_of_actor(model: ByHand) -> list[str]:
    return [name for name in model.w if ".actor." in name or name.startswith("action_net")]


def credit(history: History, form: Form) -> Array:
    """w_t G_t of each step, by a plain sum."""
    found = []
    for t in range(len(history.rewards)):
        first = 0 if form.returns == "total" else t
        to_go = sum(form.gamma ** (k - first) * history.rewards[k] for k in range(first, len(history.rewards)))
        found.append((form.gamma**t if form.state_discount else 1.0) * to_go)
    return np.array(found)


def gradient_of_objective(model: ByHand, gamma: float) -> dict[str, th.Tensor]:
    """grad J by autograd through the sum over all histories."""
    objective = th.zeros(()).double()
    for history in ALL:
        gained = sum(gamma**t * r for t, r in enumerate(history.rewards))
        objective = objective + history.dynamics * log_probs(model, history).sum().exp() * gained
    names = names_of_actor(model)
    return dict(zip(names, th.autograd.grad(objective, [model.w[name] for name in names]), strict=True))


def credited_gradient(model: ByHand, form: Form) -> dict[str, th.Tensor]:
    """sum_t E[w_t G_t grad log pi(a_t | h_t)], a sum over all histories."""
    total = th.zeros(()).double()
    for history in ALL:
        logs = log_probs(model, history)
        probability = history.dynamics * logs.detach().sum().exp()
        total = total + probability * (logs * th.as_tensor(credit(history, form))).sum()
    names = names_of_actor(model)
    return dict(zip(names, th.autograd.grad(total, [model.w[name] for name in names]), strict=True))


def target(model: ByHand, form: Form) -> dict[str, th.Tensor]:
    """What the estimator estimates."""
    return gradient_of_objective(model, form.gamma) if form in UNBIASED else credited_gradient(model, form)


def play(model: Any, monkeypatch: pytest.MonkeyPatch, played: list[History]) -> dict[str, th.Tensor]:
    """What theta ascends in one update from these histories, one in each env; the policy is as it was afterwards."""
    env = model.get_env()
    for one, history in zip(env.envs, played, strict=True):
        one.unwrapped.history = history
    monkeypatch.setattr(collector, "make_sampler", lambda *_: Told(env))
    before = copy.deepcopy(model.policy.state_dict())
    model.learn(1, log_interval=None)
    after = {name: p.detach() - before[name] for name, p in model.policy.named_parameters()}
    model.policy.load_state_dict(before)
    return after


def assert_same(found: dict[str, th.Tensor], expected: dict[str, th.Tensor], tolerance: float = ATOL) -> None:
    assert max(float(part.abs().max()) for part in expected.values()) > 1e-2
    for name, part in expected.items():
        assert float((found[name].double() - part).abs().max()) < tolerance * max(1.0, float(part.abs().max())), name


def expectation(gradients: Iterator[dict[str, th.Tensor]], probabilities: list[float]) -> dict[str, th.Tensor]:
    total: dict[str, th.Tensor] = {}
    for gradient, probability in zip(gradients, probabilities, strict=True):
        for name, part in gradient.items():
            total[name] = total.get(name, th.zeros_like(part).double()) + probability * part.double()
    return total


def probabilities(model: ByHand) -> list[float]:
    return [h.dynamics * float(log_probs(model, h).detach().sum().exp()) for h in ALL]


def reinforce(memory: Memory, form: Form, n_envs: int = 1, **arguments: Any) -> Reinforce:
    env = DummyVecEnv([Played for _ in range(n_envs)])
    joint = JOINT if arguments.get("baseline") == "value" else {}
    chosen = {"baseline": "none", **UPDATE, **joint, **form._asdict(), **arguments}
    model: Reinforce = randomized(Reinforce("MlpPolicy", env, n_episodes=n_envs, memory=memory, **chosen))
    return model


# ---------------------------------------------------------------- the oracle itself


def test_the_enumeration_is_complete_and_needs_memory() -> None:
    model = ByHand(reinforce(MEMORIES[0], FORMS[0]).policy)
    assert sum(probabilities(model)) == pytest.approx(1, abs=1e-12)
    assert {len(h.actions) for h in ALL} == {1, 2, 3}
    assert {h.terminated for h in ALL} == {True, False}
    seen: dict[int, set[float]] = {}
    for history in ALL:
        for o, a, log_prob in zip(history.observations, history.actions, log_probs(model, history), strict=True):
            if a == 0:
                seen.setdefault(o, set()).add(round(float(log_prob.detach()), 6))
    assert all(len(different) > 3 for different in seen.values())


@pytest.mark.parametrize("form", UNBIASED, ids=lambda form: "-".join(map(str, form)))
def test_two_derivations_of_the_target_agree(form: Form) -> None:
    model = ByHand(reinforce(MEMORIES[1], form).policy)
    assert_same(credited_gradient(model, form), gradient_of_objective(model, form.gamma), 1e-10)


# ---------------------------------------------------------------- on-policy


@pytest.mark.parametrize(
    ("memory", "form", "baseline"),
    [
        *((MEMORIES[0], form, "none") for form in FORMS),
        *((memory, FORMS[3], baseline) for memory in MEMORIES for baseline in ("none", "value")),
        (MEMORIES[1], FORMS[0], "none"),
        (MEMORIES[2], FORMS[0], "value"),
    ],
    ids=str,
)
def test_expectation(memory: Memory, form: Form, baseline: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = reinforce(memory, form, baseline=baseline)
    own = ByHand(model.policy)
    found = expectation((play(model, monkeypatch, [history]) for history in ALL), probabilities(own))
    assert_same(found, target(own, form))


@memories
def test_episodes_of_unequal_length_at_once(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Envs wait, masked, for the longest."""
    form = UNBIASED[3]
    model, single = reinforce(memory, form, len(ALL)), reinforce(memory, form)
    found = play(model, monkeypatch, ALL)
    each = (play(single, monkeypatch, [history]) for history in ALL)
    assert_same(found, expectation(each, [1 / len(ALL)] * len(ALL)))


def test_generalized_advantages_of_a_critic_with_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """lambda 1: returns less the value of the history, which does not change the expectation."""
    form, memory = Form("reward_to_go", 0.9, True), MEMORIES[0]
    env = DummyVecEnv([Played])
    arguments = {**UPDATE, "n_steps": None, "n_episodes": 1, "gamma": 0.9, "gae_lambda": 1.0, "state_discount": True}
    model = randomized(ActorCritic("MlpPolicy", env, memory=memory, **arguments))
    own = ByHand(model.policy)
    found = expectation((play(model, monkeypatch, [history]) for history in ALL), probabilities(own))
    assert_same(found, target(own, form))


# ---------------------------------------------------------------- off-policy


def behaviors(policy: Any) -> dict[str, Any]:
    """log mu(a_t | h_t) of the uniform policy, and of one with a memory of another kind."""
    other = randomized(Reinforce("MlpPolicy", DummyVecEnv([Played]), memory=Memory("gru", 4), n_episodes=1), seed=9)
    with th.no_grad():
        for parameter in other.policy.parameters():
            parameter.mul_(0.4)
    own = ByHand(other.policy)
    return {
        "uniform": lambda history: np.full(len(history.actions), np.log(0.5)),
        "memory": lambda history: log_probs(own, history).detach().numpy(),
        "itself": lambda history: log_probs(ByHand(policy), history).detach().numpy(),
    }


def stored(history: History, logs: Array) -> Trajectory:
    return Trajectory(
        np.array(history.observations),
        np.array(history.actions),
        np.array(history.rewards),
        logs,
        history.terminated,
        not history.terminated,
        np.int64(0),
    )


def ascent(model: OffPolicyPG, trajectories: list[Trajectory]) -> dict[str, th.Tensor]:
    """What theta ascends with these trajectories alone in the buffer."""
    assert model.replay_buffer is not None
    before = copy.deepcopy(model.policy.state_dict())
    model.replay_buffer.reset()
    model.add_trajectories(trajectories)
    model.train(1, None)
    after = {name: p.detach() - before[name] for name, p in model.policy.named_parameters()}
    model.policy.load_state_dict(before)
    return after


def off_policy(memory: Memory, form: Form, **arguments: Any) -> OffPolicyPG:
    joint = JOINT if arguments.get("baseline") == "value" else {}
    chosen = {**UPDATE, **joint, **form._asdict(), "gradient_steps": 1, "buffer_trajectories": 999, "baseline": "none"}
    model: OffPolicyPG = randomized(OffPolicyPG("MlpPolicy", Played(), memory=memory, **{**chosen, **arguments}))
    return model


@pytest.mark.parametrize(
    ("memory", "form", "ratio", "behavior"),
    [
        *((memory, FORMS[3], ratio, "memory") for memory in MEMORIES for ratio in ("per_decision", "trajectory")),
        *((MEMORIES[0], FORMS[1], ratio, "uniform") for ratio in ("per_decision", "trajectory")),
        (MEMORIES[1], FORMS[3], "trajectory", "uniform"),
        (MEMORIES[1], FORMS[1], "per_decision", "itself"),
    ],
    ids=str,
)
def test_expectation_off_policy(memory: Memory, form: Form, ratio: str, behavior: str) -> None:
    model = off_policy(memory, form, ratio=ratio)
    acting = behaviors(model.policy)[behavior]
    logs = [acting(history) for history in ALL]
    weights = [history.dynamics * float(np.exp(one.sum())) for history, one in zip(ALL, logs, strict=True)]
    assert sum(weights) == pytest.approx(1, abs=1e-9)
    found = expectation((ascent(model, [stored(*one)]) for one in zip(ALL, logs, strict=True)), weights)
    assert_same(found, gradient_of_objective(ByHand(model.policy), form.gamma))


@pytest.mark.parametrize("baseline", ["none", "value"])
def test_stored_together_they_give_the_mean(baseline: str) -> None:
    form = UNBIASED[3]
    model = off_policy(MEMORIES[0], form, ratio="per_decision", baseline=baseline)
    acting = behaviors(model.policy)["memory"]
    trajectories = [stored(history, acting(history)) for history in ALL]
    each = expectation((ascent(model, [one]) for one in trajectories), [1 / len(ALL)] * len(ALL))
    actor = {name: each[name] for name in names_of_actor(ByHand(model.policy))}
    assert_same(ascent(model, trajectories), actor)
