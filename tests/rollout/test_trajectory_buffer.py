"""Trajectories: cut from rollouts, kept with the log-probs of what acted, given back as batches."""

import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer

from sb3_pg.policies import BehaviorSampler, uniform_behavior
from sb3_pg.rollout import (
    DictTrajectoryReplayBuffer,
    Pieces,
    Trajectory,
    TrajectoryReplayBuffer,
    TrajectoryRolloutBuffer,
)
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES


def samples(space: spaces.Space[Any], n: int) -> Any:
    drawn = [space.sample() for _ in range(n)]
    if isinstance(space, spaces.Dict):
        return {key: np.stack([sample[key] for sample in drawn]) for key in space.spaces}
    return np.stack(drawn)


def an_episode(
    length: int, first: int = 0, truncated: bool = False, observations: str = "vector", actions: str = "discrete"
) -> Trajectory:
    """Rewards count from ``first``, and log-probs down from minus that."""
    space = OBSERVATION_SPACES[observations]
    numbers = np.arange(first, first + length, dtype=np.float64)
    return Trajectory(
        samples(space, length),
        samples(ACTION_SPACES[actions], length),
        numbers,
        -numbers,
        not truncated,
        truncated,
        space.sample(),
    )


def a_buffer(
    size: int = 20, observations: str = "vector", actions: str = "discrete", **kwargs: Any
) -> TrajectoryReplayBuffer:
    cls = DictTrajectoryReplayBuffer if observations == "dict" else TrajectoryReplayBuffer
    return cls(size, OBSERVATION_SPACES[observations], ACTION_SPACES[actions], "cpu", **kwargs)


def filled(*lengths: int, size: int = 20, **kwargs: Any) -> TrajectoryReplayBuffer:
    """Episode number i has the rewards 10 i, 10 i + 1, ..."""
    buffer = a_buffer(size, **kwargs)
    for i, length in enumerate(lengths):
        buffer.add_trajectories([an_episode(length, 10 * i)])
    return buffer


def state(buffer: TrajectoryReplayBuffer) -> dict[str, Any]:
    return {name: x.tobytes() if isinstance(x, np.ndarray) else str(x) for name, x in vars(buffer).items()}


def rewards(buffer: TrajectoryReplayBuffer) -> list[list[float]]:
    """Of each trajectory that is kept."""
    batch = buffer.batch(buffer.trajectories, False)
    return [batch.rewards[batch.valid[:, i], i].tolist() for i in range(len(buffer.trajectories))]


def same(stored: Any, given: Any) -> bool:
    if isinstance(given, dict):
        return all(same(stored[key], given[key]) for key in given)
    return bool(np.array_equal(np.asarray(stored).reshape(np.shape(given)), given))


# ---------------------------------------------------------------- the buffer


@pytest.mark.parametrize(
    ("observations", "actions"),
    [*((o, "discrete") for o in OBSERVATION_SPACES), *(("vector", a) for a in ACTION_SPACES)],
)
def test_trajectories_come_back_as_they_were(observations: str, actions: str) -> None:
    buffer = a_buffer(7, observations, actions)
    kinds: dict[str, Any] = {"observations": observations, "actions": actions}
    given = [an_episode(3, **kinds), an_episode(2, 10, True, **kinds), an_episode(4, 20, True, **kinds)]
    for trajectory in given:
        buffer.add_trajectories([trajectory])
    given = given[1:]  # the third lies over the first, and over the end of the ring
    assert isinstance(buffer, DictReplayBuffer if observations == "dict" else ReplayBuffer)
    batch = buffer.batch(buffer.trajectories, True)
    assert batch.n_episodes == 2
    assert batch.valid.sum(0).tolist() == [2, 4]
    assert batch.timesteps.T.tolist() == [[0, 1, 2, 3]] * 2
    assert not batch.terminated.any()
    assert batch.truncated.nonzero().tolist() == [[1, 0], [3, 1]]
    assert batch.rewards.dtype == th.float64
    for i, trajectory in enumerate(given):
        rows: Any = slice(len(trajectory)), i
        stored: Any = batch.observations
        parts = {key: x[rows] for key, x in stored.items()} if isinstance(stored, dict) else stored[rows]
        assert same(parts, trajectory.observations)
        assert same(batch.actions[rows], trajectory.actions)
        assert same(batch.rewards[rows], trajectory.rewards)
        assert batch.log_probs is not None
        assert same(batch.log_probs[rows], trajectory.log_probs)
    assert batch.bootstrap_observations is not None
    followers: Any
    followers, places = batch.bootstrap_observations
    assert places.tolist() == [1 * 2 + 0, 3 * 2 + 1]
    for i, trajectory in enumerate(given):
        one = {key: x[i] for key, x in followers.items()} if isinstance(followers, dict) else followers[i]
        assert same(one, trajectory.final_observation)


def test_terminated_trajectories_bootstrap_nothing() -> None:
    buffer = filled(2, 3)
    assert buffer.batch(buffer.trajectories, True).bootstrap_observations is None
    buffer.add_trajectories([an_episode(2, truncated=True)])
    assert buffer.batch(buffer.trajectories, False).bootstrap_observations is None
    batch = buffer.batch(buffer.trajectories, True)
    assert batch.terminated.nonzero().tolist() == [[1, 0], [2, 1]]
    assert batch.truncated.nonzero().tolist() == [[1, 2]]
    assert batch.bootstrap_observations is not None
    assert batch.bootstrap_observations[1].tolist() == [1 * 3 + 2]


def test_a_batch_without_padding_has_no_mask() -> None:
    buffer = filled(2, 3, 2)
    assert buffer.batch(buffer.trajectories[::2], False).mask is None
    assert buffer.batch(buffer.trajectories, False).mask is not None


def test_what_the_ring_has_partly_overwritten_is_forgotten() -> None:
    buffer = filled(3, 2, 2, size=7)
    assert rewards(buffer) == [[0, 1, 2], [10, 11], [20, 21]]
    assert (buffer.pos, buffer.full) == (0, True)
    buffer.add_trajectories([an_episode(1, 30)])
    assert rewards(buffer) == [[10, 11], [20, 21], [30]]
    assert (buffer.pos, buffer.full) == (1, True)
    buffer.add_trajectories([an_episode(5, 40)])
    assert rewards(buffer) == [[30], [40, 41, 42, 43, 44]]
    buffer.add_trajectories([an_episode(7, 50)])
    assert rewards(buffer) == [[50, 51, 52, 53, 54, 55, 56]]


def test_the_newest_are_kept() -> None:
    assert rewards(filled(1, 2, 1, max_trajectories=2)) == [[10, 11], [20]]


def test_those_collected_last_are_among_the_chosen() -> None:
    buffer = filled(1, 1, 1, 1)
    buffer.add_trajectories([an_episode(1), an_episode(1)])
    newest = buffer.trajectories[-2:]
    assert buffer.choose(None) == buffer.choose(6) == buffer.choose(99) == buffer.trajectories
    drawn = [buffer.choose(4) for _ in range(30)]
    assert all(chosen[2:] == newest and chosen[0].start < chosen[1].start < newest[0].start for chosen in drawn)
    assert {chosen[i].start for chosen in drawn for i in (0, 1)} == {0, 1, 2, 3}
    assert buffer.choose(2) == newest
    assert buffer.choose(1) == newest[1:]


def test_the_oldest_leave_together_but_never_the_newest() -> None:
    buffer = a_buffer()
    for numbers in ((3, 4), (5,), (), (7, 8)):
        buffer.add_trajectories(an_episode(1, number) for number in numbers)
    assert buffer.drop_oldest()
    assert rewards(buffer) == [[5], [7], [8]]
    assert buffer.drop_oldest()
    assert rewards(buffer) == [[7], [8]]
    assert not buffer.drop_oldest()
    assert rewards(buffer) == [[7], [8]]


def test_reset_and_pickle() -> None:
    buffer = filled(3, 2)
    again = pickle.loads(pickle.dumps(buffer))
    assert rewards(again) == rewards(buffer) == [[0, 1, 2], [10, 11]]
    again.add_trajectories([an_episode(1, 20)])
    assert rewards(again) == [[0, 1, 2], [10, 11], [20]]
    buffer.reset()
    assert buffer.trajectories == []
    assert buffer.size() == 0
    buffer.add_trajectories([an_episode(2, 5)])
    assert rewards(buffer) == [[5, 6]]


def test_sb3s_samples_are_transitions() -> None:
    buffer = a_buffer(5)
    for _ in range(5):
        buffer.add_trajectories([an_episode(1)])  # of which nothing is to be left
    first, second = an_episode(2), an_episode(3, 2, truncated=True)
    buffer.add_trajectories([first])
    buffer.add_trajectories([second])
    observations = np.concatenate((first.observations, second.observations))
    following = np.concatenate(
        (
            first.observations[1:],
            first.final_observation[None],
            second.observations[1:],
            second.final_observation[None],
        )
    )
    normalization: Any = object()  # which nobody asks
    drawn = buffer.sample(50, normalization)
    rows = drawn.rewards.flatten().long()
    assert rows.unique().tolist() == [0, 1, 2, 3, 4]
    assert same(drawn.observations, observations[rows])
    assert same(drawn.next_observations, following[rows])
    assert same(drawn.dones.flatten(), (rows == 1).float())  # a time limit is no end


def wrong(**changes: Any) -> Callable[[Trajectory], Trajectory]:
    return lambda trajectory: replace(trajectory, **changes)


NAN = float("nan")
BAD: dict[str, tuple[Callable[[Trajectory], Trajectory], str]] = {
    "empty": (lambda _: replace(an_episode(1), rewards=np.zeros(0)), "1 to buffer_size=20 steps, got 0"),
    "too long": (lambda _: an_episode(21), "1 to buffer_size=20 steps, got 21"),
    "not complete": (wrong(terminated=False), "whole episode.*terminated=False, truncated=False"),
    "two endings": (wrong(truncated=True), "terminated=True, truncated=True"),
    "few observations": (wrong(observations=np.zeros((2, 3))), r"observations .*\(3, 3\), got \(2, 3\)"),
    "other observations": (wrong(observations=np.zeros((3, 4))), r"observations .*\(3, 3\), got \(3, 4\)"),
    "other final observation": (wrong(final_observation=np.zeros(4)), r"final_observation .*\(3,\), got \(4,\)"),
    "many actions": (wrong(actions=np.zeros(4)), r"actions .*\(3,\), got \(4,\)"),
    "wide actions": (wrong(actions=np.zeros((3, 2))), r"actions .*\(3,\), got \(3, 2\)"),
    "an action there is not": (wrong(actions=np.array([0, 3, 1])), r"actions .*Discrete\(3\), got 3 at step 1"),
    "half an action": (wrong(actions=np.array([0.5, 1, 1])), r"actions .*Discrete\(3\), got 0.5 at step 0"),
    "wide rewards": (wrong(rewards=np.zeros((3, 1))), r"rewards .*\(3,\), got \(3, 1\)"),
    "wide log-probs": (wrong(log_probs=np.zeros((3, 1))), r"log_probs .*\(3,\), got \(3, 1\)"),
    "impossible": (wrong(log_probs=np.array([-1, -np.inf, -1])), r"log_probs.*-inf at \[1\].*probability 0"),
    "unknown": (wrong(log_probs=np.array([NAN, -1, -1])), r"log_probs.*nan at \[0\]"),
    "rewards that are none": (wrong(rewards=np.array([0, 1, NAN])), r"rewards.*nan at \[2\]"),
    "observations that are none": (wrong(observations=np.full((3, 3), np.inf)), r"observations.*inf at \[0, 0\]"),
    "no final observation": (
        wrong(terminated=False, truncated=True, final_observation=None),
        "final_observation.*truncated",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_trajectory_is_refused_and_changes_nothing(name: str) -> None:
    spoil, message = BAD[name]
    buffer = filled(10, 9)
    before = state(buffer)
    with pytest.raises(ValueError, match=message):
        buffer.add_trajectories([an_episode(2), spoil(an_episode(3))])
    assert state(buffer) == before


def test_dicts_of_observations_have_all_their_keys() -> None:
    episode = an_episode(2, observations="dict")
    buffer = a_buffer(observations="dict")
    with pytest.raises(ValueError, match=r"observations.*\['class', 'vec'\], got \['vec'\]"):
        buffer.add_trajectories([replace(episode, observations={"vec": episode.observations["vec"]})])
    with pytest.raises(ValueError, match=r"observations\['vec'\].*\(2, 2\), got \(1, 2\)"):
        buffer.add_trajectories([replace(episode, observations={**episode.observations, "vec": np.zeros((1, 2))})])


def test_a_terminated_trajectory_needs_no_final_observation() -> None:
    for observations in ("vector", "dict"):
        buffer = a_buffer(observations=observations)
        buffer.add_trajectories([replace(an_episode(2, observations=observations), final_observation=None)])
        assert rewards(buffer) == [[0, 1]]


def test_what_a_replay_buffer_of_trajectories_cannot_do() -> None:
    with pytest.raises(ValueError, match="optimize_memory_usage=True"):
        a_buffer(optimize_memory_usage=True)
    with pytest.raises(ValueError, match="handle_timeout_termination=False"):
        a_buffer(handle_timeout_termination=False)
    with pytest.raises(TypeError, match="add_trajectories"):
        a_buffer().add(np.zeros(3), np.zeros(3), np.zeros(1), np.zeros(1), np.zeros(1), [{}])


# ---------------------------------------------------------------- pieces of episodes


def a_rollout(
    dones: list[str], first_timesteps: list[int], start: int = 0, waiting: dict[int, int] | None = None
) -> TrajectoryRolloutBuffer:
    """A finished rollout; rewards are 100 times the env plus the step's number, log-probs minus that.

    :param dones: per env, one character per step: "." goes on, "t" terminated, "c" cut by a time limit
    :param first_timesteps: per env
    :param start: number of the first step
    :param waiting: env -> the step from which it waits
    """
    n_envs, n_steps = len(dones), len(dones[0])
    buffer = TrajectoryRolloutBuffer(
        n_steps, OBSERVATION_SPACES["vector"], ACTION_SPACES["discrete"], "cpu", n_envs=n_envs
    )
    for t in range(n_steps):
        numbers = np.array([100.0 * env + start + t for env in range(n_envs)])
        observations, actions = np.tile(numbers[:, None], 3), np.zeros(n_envs)
        active = np.array([t < (waiting or {}).get(env, n_steps) for env in range(n_envs)])
        ends = np.array([column[t] != "." for column in dones])
        buffer.append(observations, actions, numbers, ends & active, active)
        for env in range(n_envs):
            if dones[env][t] == "c":
                buffer.truncated[t, env] = True
                buffer.final_observations[t, env] = np.full(3, numbers[env] + 0.5)
    buffer.finish(np.array(first_timesteps) == 0, np.array(first_timesteps))
    buffer.log_probs = -buffer.rewards
    return buffer


def found(pieces: Pieces, *args: Any, **kwargs: Any) -> list[list[float]]:
    """Rewards of the episodes that a rollout completes; what else they are made of goes with them."""
    complete = pieces.complete(a_rollout(*args, **kwargs))
    for trajectory in complete:
        assert np.array_equal(trajectory.observations, np.tile(trajectory.rewards[:, None], 3))
        assert np.array_equal(trajectory.log_probs, -trajectory.rewards)
        assert len(trajectory.actions) == len(trajectory)
        assert trajectory.is_complete
    return [trajectory.rewards.tolist() for trajectory in complete]


def test_a_rollout_is_cut_where_its_episodes_end() -> None:
    assert found(Pieces(2), [".t..t", "t..t."], [0, 0], waiting={1: 4}) == [
        [100],
        [0, 1],
        [101, 102, 103],
        [2, 3, 4],
    ]


def test_episodes_that_span_rollouts_are_put_together() -> None:
    pieces = Pieces(2)
    assert found(pieces, [".t.", "..."], [0, 0]) == [[0, 1]]
    assert found(pieces, ["...", "..."], [1, 3], 3) == []
    assert found(pieces, ["t..", ".t."], [4, 6], 6) == [[2, 3, 4, 5, 6], [100, 101, 102, 103, 104, 105, 106, 107]]
    assert found(pieces, ["..t", "t.t"], [2, 1], 9) == [[108, 109], [7, 8, 9, 10, 11], [110, 111]]


def test_endings_are_told_apart() -> None:
    terminated, truncated = Pieces(1).complete(a_rollout(["..t.c"], [0]))
    assert terminated.terminated
    assert not terminated.truncated
    assert not truncated.terminated
    assert truncated.truncated
    assert truncated.final_observation.tolist() == [4.5] * 3
    pieces = Pieces(1)
    assert pieces.complete(a_rollout(["..."], [0])) == []
    (joined,) = pieces.complete(a_rollout([".c"], [3], 3))
    assert joined.truncated
    assert joined.final_observation.tolist() == [4.5] * 3


def test_a_truncation_that_nothing_follows_counts_as_the_end() -> None:
    """As in a rollout's batch, which bootstraps it with nothing."""
    rollout = a_rollout(["..c"], [0])
    rollout.final_observations.clear()
    (trajectory,) = Pieces(1).complete(rollout)
    assert trajectory.terminated
    assert not trajectory.truncated


def test_an_episode_whose_beginning_is_missing_is_left_out() -> None:
    pieces = Pieces(2)
    assert found(pieces, ["..t.t", "....."], [4, 0]) == [[3, 4]]
    assert found(pieces, ["....t", "t.t.."], [0, 8], 5) == [[106, 107], [5, 6, 7, 8, 9]]


def test_what_an_env_does_while_it_waits_is_no_episode() -> None:
    pieces = Pieces(2)
    assert found(pieces, ["..t", "t.."], [0, 0], waiting={1: 1}) == [[100], [0, 1, 2]]
    assert found(pieces, ["t", "t"], [0, 2], 3) == [[3]]


def test_a_reset_begins_new_episodes() -> None:
    pieces = Pieces(2)
    assert found(pieces, ["...", ".t."], [0, 0]) == [[100, 101]]
    assert found(pieces, [".t.", "..t"], [0, 0], 10) == [[10, 11], [110, 111, 112]]


def test_pieces_are_copies() -> None:
    pieces, rollout = Pieces(1), a_rollout(["..t..."], [0])
    (trajectory,) = pieces.complete(rollout)
    rollout.rewards[:] = -1
    rollout.observations[:] = -1
    (second,) = pieces.complete(a_rollout(["t"], [3], 6))
    assert trajectory.rewards.tolist() == [0, 1, 2]
    assert second.observations[:, 0].tolist() == [3, 4, 5, 6]


# ---------------------------------------------------------------- behavior


@pytest.mark.parametrize("name", ACTION_SPACES)
def test_the_uniform_density_is_the_inverse_of_the_number_of_actions(name: str) -> None:
    sizes = {"discrete": 3, "box": 2 * 4, "matrix": 2**4, "multi_discrete": 6, "multi_binary": 8}
    space = ACTION_SPACES[name]
    actions, log_probs = uniform_behavior(space, squashed=False)(np.zeros((5, 3)))
    assert all(space.contains(action) for action in actions)
    assert log_probs == pytest.approx(np.full(5, -math.log(sizes[name])))


def test_uniform_actions_of_a_squashed_policy_fill_its_own_range() -> None:
    actions, log_probs = uniform_behavior(ACTION_SPACES["box"], squashed=True)(np.zeros((2000, 3)))
    assert log_probs == pytest.approx(np.full(2000, -2 * math.log(2)))
    assert actions.min(0) == pytest.approx([-1, -1], abs=0.02)
    assert actions.max(0) == pytest.approx([1, 1], abs=0.02)
    assert actions.mean(0) == pytest.approx([0, 0], abs=0.06)


@pytest.mark.parametrize(
    ("low", "high"), [(-np.inf, np.inf), (0, np.inf), (np.array([-1, 2]), np.array([1, 2]))], ids=str
)
def test_a_box_without_volume_has_no_uniform_density(low: Any, high: Any) -> None:
    with pytest.raises(ValueError, match=r"learning_starts > 0.*Box"):
        uniform_behavior(spaces.Box(low, high, (2,), np.float32), squashed=False)


def test_a_behavior_may_return_tensors_and_see_dicts() -> None:
    sampler = BehaviorSampler(lambda _: (th.ones(2, 3), th.full((2,), -0.5)), ACTION_SPACES["multi_binary"])
    actions = sampler({"vec": np.zeros((2, 2)), "class": np.zeros(2)})
    assert actions.dtype == ACTION_SPACES["multi_binary"].dtype
    assert actions.tolist() == [[1, 1, 1]] * 2
    assert th.stack(sampler.log_probs).tolist() == [[-0.5, -0.5]]


@pytest.mark.parametrize(
    ("actions", "log_probs", "message"),
    [
        (np.zeros((2, 1)), np.zeros(2), r"actions of shape \(2,\).*got \(2, 1\)"),
        (np.zeros(3), np.zeros(3), r"actions of shape \(2,\).*got \(3,\)"),
        (np.zeros(2), np.zeros((2, 1)), r"log-probs of shape \(2,\), got \(2,\) and \(2, 1\)"),
        (np.zeros(2), -0.5, r"log-probs of shape \(2,\), got \(2,\) and \(\)"),
        (np.zeros(2), np.array([-1, -np.inf]), "must return finite log-probs, got -inf for env 1"),
        (np.zeros(2), np.array([NAN, -1]), "must return finite log-probs, got nan for env 0"),
    ],
)
def test_what_a_behavior_returns_is_checked(actions: Any, log_probs: Any, message: str) -> None:
    sampler = BehaviorSampler(lambda _: (actions, log_probs), ACTION_SPACES["discrete"])
    with pytest.raises(ValueError, match=message):
        sampler(np.zeros((2, 3)))
