"""OffPolicyPG: what it keeps of what it has lived, and what it makes of it."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_pg import OffPolicyPG, Reinforce
from sb3_pg.rollout import Trajectory
from tests.algorithms.off_policy_pg import envs, log_prob, make, trained, with_ratios
from tests.helpers import (
    ACTION_SPACES,
    OBSERVATION_SPACES,
    parameters,
    policy_for,
    vec,
)

#: Actor and critic in one step.
JOINT: dict[str, Any] = {"critic_learning_rate": None, "n_critic_updates": 1}


CASES: dict[str, dict[str, Any]] = {
    **{
        f"{baseline}-{returns}": {"baseline": baseline, "returns": returns, "truncation": "terminal"}
        for baseline in ("none", "mean", "leave_one_out", "time", "optimal", "linear", "value")
        for returns in ("reward_to_go", "total")
    },
    "component-wise": {"baseline": "optimal", "baseline_kwargs": {"component_wise": True}},
    **{
        f"{ratio}-{n_envs}": {"ratio": ratio, "n_envs": n_envs}
        for ratio in ("per_step", "prefix", "per_decision", "trajectory")
        for n_envs in (1, 2)
    },
    "per_decision-total": {"ratio": "per_decision", "returns": "total", "baseline": "leave_one_out"},
    "treated": {"ratio": "trajectory", "max_ratio": 1.0, "self_normalize": True, "min_ess": 0.99},
    **{actions: {"actions": actions, "n_envs": 2, "ratio": "trajectory"} for actions in ACTION_SPACES},
    "gsde": {"actions": "box", "use_sde": True, "policy_kwargs": {"net_arch": [8], "squash_output": True}},
    **{name: {"observations": name, "n_envs": 2} for name in ("double", "discrete", "dict", "image")},
    "discounted": {"state_discount": True, "gamma": 0.9, "ent_coef": 0.1, "normalize_advantage": True},
    "fitted-before": {"critic_fit": "before", "normalize_value_targets": True, "returns": "total"},
    "joint-critic": {"critic_learning_rate": None, "n_critic_updates": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_one_step_on_fresh_data_is_reinforces(case: str) -> None:
    kwargs = dict(CASES[case])
    where = {"n_envs": kwargs.pop("n_envs", 1)}
    where |= {name: kwargs.pop(name) for name in ("observations", "actions") if name in kwargs}
    policy = policy_for(OBSERVATION_SPACES[where.get("observations", "vector")])
    own: dict[str, Any] = {
        name: kwargs.pop(name) for name in ("ratio", "max_ratio", "self_normalize", "min_ess") if name in kwargs
    }
    own |= {"train_freq": (4, "episode"), "buffer_trajectories": 4, "gradient_steps": 1}
    learned = []
    for cls, form in ((Reinforce, {"n_episodes": 4}), (OffPolicyPG, own)):  # one after the other: seeds are global
        model = make(envs(**where), policy, cls, learning_rate=1e-2, **kwargs, **form)
        before = parameters(model)
        learned.append((model.learn(45 * where["n_envs"]), parameters(model)))
        assert (learned[-1][1] - before).abs().max() > 1e-2
    (a, theirs), (b, ours) = learned
    assert a._n_updates == b._n_updates >= 4
    assert a.num_timesteps == b.num_timesteps
    assert th.allclose(theirs, ours, atol=1e-5)


def test_the_critics_targets_are_v_traces() -> None:
    """Two steps by hand: rewards 1 and 2, ratios 1/2 and 4 or the like, a critic that says V."""
    for ratios in ([0.5, 4.0], [4.0, 0.5], [0.5, 0.25]):
        model = make(envs(), gamma=0.9, **JOINT)
        (episode,) = with_ratios(model, ratios)
        v, log, log_probs = one_update(model, episode)
        c = np.minimum(ratios, 1.0)
        second = v[1] + c[1] * (2 - v[1])
        first = v[0] + c[0] * (1 + 0.9 * v[1] - v[0]) + 0.9 * c[0] * (second - v[1])
        assert log["train/value_loss"] == pytest.approx(np.mean((v - [first, second]) ** 2), rel=1e-5)
        advantages = np.array([1 + 0.9 * 2 - v[0], 2 - v[1]])
        assert log["train/policy_loss"] == pytest.approx(-np.sum(ratios * log_probs * advantages), rel=1e-5)


def one_update(model: Any, episode: Trajectory) -> tuple[np.ndarray, dict[str, Any], np.ndarray]:
    """An update from one episode: V of its states, what is logged, and log-probs under the policy before it."""
    with th.no_grad():
        v = model.policy.predict_values(th.as_tensor(episode.observations)).flatten().double().numpy()
    log_probs = log_prob(model.policy, episode.observations, episode.actions)
    model.add_trajectories([episode])
    return v, trained(model), log_probs


def test_with_total_returns_the_critic_is_about_the_whole_episode() -> None:
    for ratios in ([0.5, 4.0], [4.0, 0.5], [0.5, 0.25]):
        model = make(envs(), returns="total", gamma=0.9, **JOINT)
        (episode,) = with_ratios(model, ratios)
        v, log, _ = one_update(model, episode)
        c, total = np.minimum(ratios, 1.0), 1 + 0.9 * 2
        second = v[1] + c[1] * (total - v[1])
        first = v[0] + c[0] * (v[1] - v[0]) + c[0] * (second - v[1])
        assert log["train/value_loss"] == pytest.approx(np.mean((v - [first, second]) ** 2), rel=1e-5)


def test_stale_trajectories_leave_until_the_sample_is_effective() -> None:
    model = make(envs(), min_ess=0.9)
    for seed in range(2):
        model.add_trajectories(with_ratios(model, [9, 0.1], [0.1, 9], seed=seed))
    model.add_trajectories(with_ratios(model, [1, 1], [1, 1, 1], seed=2))
    log = trained(model)
    assert [t.length for t in model.replay_buffer.trajectories] == [2, 3]
    assert log["train/n_refused"] == 2
    assert log["train/importance_ess"] > 0.99
    assert model._n_updates == 1


def test_without_an_effective_sample_no_step_is_taken() -> None:
    model = make(envs(), min_ess=0.9)
    model.add_trajectories(with_ratios(model, [9, 0.1], [1, 1]))
    before = parameters(model)
    log = trained(model, 3)
    assert th.equal(parameters(model), before)
    assert model._n_updates == 0
    assert log["train/n_refused"] == 1
    assert "train/policy_loss" not in log
    assert len(model.replay_buffer.trajectories) == 2


def test_what_is_effective_enough_stays() -> None:
    model = make(envs(), min_ess=0.5)
    model.add_trajectories(with_ratios(model, [1.5, 0.8], seed=1))
    model.add_trajectories(with_ratios(model, [1, 1]))
    assert "train/n_refused" not in trained(model)
    assert len(model.replay_buffer.trajectories) == 2


def test_own_rollouts_do_not_suffer_from_logged_ones() -> None:
    """They are of the same age, as the policy has not been updated since."""
    model = make(envs(), min_ess=0.9, train_freq=(4, "episode"), gradient_steps=1, buffer_trajectories=1000)
    model.add_trajectories(with_ratios(model, *[[9, 0.1]] * 20))
    model.learn(11)
    assert model._n_updates == 1
    assert len(model.replay_buffer.trajectories) == 4


def test_a_small_batch_takes_the_newest_and_others() -> None:
    model = make(envs(), "MlpPolicy", train_freq=(2, "episode"), batch_size=3, gradient_steps=0).learn(22)
    buffer, asked = model.replay_buffer, list[tuple[int, list[Any]]]()
    choose = buffer.choose

    def spy(n: int) -> Any:
        asked.append((n, choose(n)))
        return asked[-1][1]

    buffer.choose = spy
    for _ in range(30):
        trained(model, 1, 3)
    assert [n for n, _ in asked] == [3] * 30
    assert all(chosen[1:] == buffer.trajectories[-2:] for _, chosen in asked)
    assert len({chosen[0].start for _, chosen in asked}) == len(buffer.trajectories) - 2


class TwoSteps(gym.Env[Any, Any]):
    """Action 0 pays 1/2, action 2 pays 1, and which step it is is all there is to see."""

    def __init__(self) -> None:
        self.observation_space, self.action_space = spaces.Box(0, 1, (2,), np.float32), spaces.Discrete(3)
        self.t = 0

    def _obs(self) -> Any:
        return np.eye(2, dtype=np.float32)[min(self.t, 1)]

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        super().reset(**kwargs)
        self.t = 0
        return self._obs(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return self._obs(), (0.5, 0.0, 1.0)[int(action)], self.t == 2, False, {}


@pytest.mark.parametrize("ratio", ["per_step", "per_decision", "trajectory"])
def test_it_learns_from_what_others_do(ratio: str) -> None:
    """Of a behavior that takes action 0 with probability 0.8; without weights it would learn that."""
    rng = np.random.default_rng(0)
    p = np.array([0.8, 0.1, 0.1])

    def behavior(obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        actions = rng.choice(3, len(obs), p=p)
        return actions, np.log(p[actions])

    model = make(
        vec(*(TwoSteps() for _ in range(4))),
        behavior_policy=behavior,
        ratio=ratio,
        baseline="none",
        train_freq=(32, "episode"),
        buffer_trajectories=256,
        gradient_steps=8,
        learning_rate=3e-2,
    )
    model.learn(64 * 8)
    probabilities = model.policy.get_distribution(th.eye(2)).distribution.probs
    assert probabilities[:, 2].min() > 0.9
