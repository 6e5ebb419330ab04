"""The buffers as SB3's own, and what they add."""

import numpy as np
import pytest
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer

from sb3_pg.rollout import DictTrajectoryRolloutBuffer, TrajectoryRolloutBuffer
from sb3_pg.rollout.buffers import INITIAL_CAPACITY
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES


def fill(buffer: TrajectoryRolloutBuffer, n_steps: int, waiting_from: int | None = None) -> None:
    space = buffer.observation_space
    space.seed(0)
    for t in range(n_steps):
        samples = [space.sample() for _ in range(buffer.n_envs)]
        obs = (
            {key: np.stack([s[key] for s in samples]) for key in samples[0]}
            if isinstance(samples[0], dict)
            else np.stack(samples)
        )
        active = None if waiting_from is None else np.array([t < waiting_from, True])
        n_envs = buffer.n_envs
        buffer.append(obs, np.full((n_envs, 1), t % 3), np.full(n_envs, t), np.full(n_envs, t % 4 == 3), active)
    buffer.finish(np.ones(buffer.n_envs, dtype=bool), np.zeros(buffer.n_envs, dtype=np.int64))


@pytest.mark.parametrize(
    ("cls", "parent"), [(TrajectoryRolloutBuffer, RolloutBuffer), (DictTrajectoryRolloutBuffer, DictRolloutBuffer)]
)
def test_they_are_sb3s_and_serve_its_minibatches(cls: type[TrajectoryRolloutBuffer], parent: type) -> None:
    observations = OBSERVATION_SPACES["dict" if parent is DictRolloutBuffer else "vector"]
    buffer = cls(6, observations, ACTION_SPACES["discrete"], "cpu", n_envs=2)
    assert isinstance(buffer, parent)
    for _ in range(2):
        buffer.reset()
        fill(buffer, 6)
        samples = list(buffer.get(batch_size=5))
        assert [len(s.actions) for s in samples] == [5, 5, 2]


def test_a_buffer_without_size_grows_and_keeps_what_it_has() -> None:
    buffer = TrajectoryRolloutBuffer(None, OBSERVATION_SPACES["vector"], ACTION_SPACES["discrete"], "cpu", n_envs=2)
    n_steps = 2 * INITIAL_CAPACITY + 1
    fill(buffer, n_steps)
    assert buffer.rewards[:, 0].tolist() == list(range(n_steps))
    assert len(buffer.observations) == buffer.buffer_size == n_steps
    assert buffer.mask.all()
    buffer.reset()
    fill(buffer, 5)
    assert buffer.rewards.shape == (5, 2)


def test_minibatches_leave_waiting_steps_out() -> None:
    buffer = TrajectoryRolloutBuffer(None, OBSERVATION_SPACES["vector"], ACTION_SPACES["discrete"], "cpu", n_envs=2)
    fill(buffer, 8, waiting_from=3)
    buffer.returns = buffer.rewards.copy()
    (samples,) = buffer.get()
    assert sorted(samples.returns.tolist()) == sorted([0, 1, 2, *range(8)])


def test_timesteps_follow_from_the_endings() -> None:
    buffer = TrajectoryRolloutBuffer(6, OBSERVATION_SPACES["vector"], ACTION_SPACES["discrete"], "cpu", n_envs=2)
    fill(buffer, 6)
    buffer.episode_starts[0] = [1, 0]
    buffer.first_timesteps = np.array([0, 10])
    assert buffer.timesteps.T.tolist() == [[0, 1, 2, 3, 0, 1], [10, 11, 12, 13, 0, 1]]
