"""Replay buffers that store the log-prob of each action."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer

from sb3_pg.rollout import BehaviorReplayBuffer, DictBehaviorReplayBuffer, NStepBehaviorReplayBuffer

N_ENVS, SIZE, N_ADDED = 3, 20, 30  # the oldest transitions are overwritten
VECTOR = spaces.Box(-1, 1, (2,), np.float32)
#: Our buffer, SB3's, the observation space, and further arguments.
BUFFERS: dict[str, tuple[Any, Any, spaces.Space[Any], dict[str, Any]]] = {
    "plain": (BehaviorReplayBuffer, ReplayBuffer, VECTOR, {}),
    "memory": (
        BehaviorReplayBuffer,
        ReplayBuffer,
        VECTOR,
        {"optimize_memory_usage": True, "handle_timeout_termination": False},
    ),
    "dict": (DictBehaviorReplayBuffer, DictReplayBuffer, spaces.Dict({"x": VECTOR}), {}),
    "n_steps": (NStepBehaviorReplayBuffer, NStepReplayBuffer, VECTOR, {"n_steps": 3, "gamma": 0.5}),
}
ACTIONS = {"discrete": spaces.Discrete(5), "box": spaces.Box(-1, 1, (2,), np.float32)}
each_buffer = pytest.mark.parametrize("kind", BUFFERS)


def filled(cls: Any, kind: str, actions: str = "box", seed: int = 0) -> Any:
    """A buffer whose observations tell its transitions apart."""
    space, kwargs = BUFFERS[kind][2:]
    rng = np.random.default_rng(seed)
    buffer = cls(SIZE * N_ENVS, space, ACTIONS[actions], device="cpu", n_envs=N_ENVS, **kwargs)
    for _ in range(N_ADDED):
        obs, following = (rng.random((N_ENVS, 2), dtype=np.float32) for _ in range(2))
        drawn = rng.random((N_ENVS, 2), dtype=np.float32) if actions == "box" else rng.integers(0, 5, N_ENVS)
        pair = ({"x": obs}, {"x": following}) if kind == "dict" else (obs, following)
        done = rng.random(N_ENVS) < 0.2
        buffer.add(*pair, drawn, rng.random(N_ENVS), done, [{} for _ in range(N_ENVS)])
        if isinstance(buffer, BehaviorReplayBuffer):
            buffer.record_log_probs(rng.random(N_ENVS).astype(np.float32))
        else:
            rng.random(N_ENVS)
    return buffer


def require_matching_log_probs(buffer: Any, kind: str) -> None:
    """Each sampled transition has the action and the log-prob of the place where its observation is stored."""
    samples = buffer.sample(200)
    sampled, stored = samples.observations, buffer.observations
    if kind == "dict":
        sampled, stored = sampled["x"], stored["x"]
    found = set()
    for observation, action, log_prob in zip(sampled.numpy(), samples.actions, samples.log_probs, strict=True):
        (place,) = np.argwhere((stored == observation).all(-1))
        assert np.array_equal(buffer.actions[tuple(place)], action)
        assert buffer.log_probs[tuple(place)] == log_prob.item()
        found.add(int(place[1]))
    assert found == {0, 1, 2}


@each_buffer
@pytest.mark.parametrize("actions", ACTIONS)
def test_log_probs_are_those_of_the_sampled_transitions(kind: str, actions: str) -> None:
    require_matching_log_probs(filled(BUFFERS[kind][0], kind, actions), kind)


@each_buffer
@pytest.mark.parametrize("actions", ACTIONS)
def test_the_same_seed_samples_the_same_as_in_sb3s_buffer(kind: str, actions: str) -> None:
    ours, theirs = (filled(cls, kind, actions) for cls in BUFFERS[kind][:2])
    drawn = []
    for buffer in (ours, theirs):
        np.random.seed(0)  # noqa: NPY002  # SB3's buffers draw from it
        drawn.append([buffer.sample(16)._asdict() for _ in range(2)])
    for one, other in zip(*drawn, strict=True):
        assert one.keys() == {*other, "log_probs"}
        for name, theirs in other.items():
            parts = (one[name], theirs)
            if kind == "dict" and name.endswith("observations"):
                parts = (one[name]["x"], theirs["x"])
            assert parts == (None, None) or (parts[0].dtype == parts[1].dtype and th.equal(*parts))


class DrawsOnce(ReplayBuffer):
    """Draws a random number of its own before SB3 draws the envs."""

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> Any:
        np.random.random()  # noqa: NPY002
        return super()._get_samples(batch_inds, env)


def test_log_probs_match_in_a_subclass_with_random_draws_of_its_own() -> None:
    class Mixed(BehaviorReplayBuffer, DrawsOnce):
        pass

    require_matching_log_probs(filled(Mixed, "plain"), "plain")


@each_buffer
def test_sampling_leaves_the_buffer_as_it_was(kind: str) -> None:
    buffer = filled(BUFFERS[kind][0], kind)
    before, actions = pickle.dumps(buffer), buffer.actions
    buffer.sample(8)
    assert buffer.actions is actions
    assert pickle.dumps(buffer) == before
