"""The queue of example 10.2: its dynamics by counting, its optimum by trying all thresholds."""

import itertools

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import sb3_pg  # noqa: F401 (registers the env)
from sb3_pg.envs import AccessControl


def test_it_is_a_proper_env_without_an_end() -> None:
    registered = gym.make("AccessControl-v0")
    assert registered.spec is not None
    assert registered.spec.max_episode_steps == 1000
    env = registered.unwrapped
    check_env(env)
    env.reset(seed=0)
    assert not any(any(env.step(1)[2:4]) for _ in range(3000))


def test_steps_follow_the_rules() -> None:
    env = AccessControl()
    (free, priority), _ = env.reset(seed=3)
    assert free == 10
    freed, busy, priorities = 0, 0, []
    for step in range(40_000):
        action = step % 3 != 0
        (after, following), reward, *_ = env.step(int(action))
        taken = bool(action and free)
        assert reward == (2.0**priority if taken else 0.0)
        occupied = 10 - free + taken
        freed, busy = freed + after - (free - taken), busy + occupied
        assert free - taken <= after <= 10
        free, priority = after, following
        priorities.append(int(priority))
    assert abs(freed / busy - 0.06) < 5 * np.sqrt(0.06 * 0.94 / busy)
    assert np.all(np.abs(np.bincount(priorities) / len(priorities) - 0.25) < 0.02)


def test_render() -> None:
    env = AccessControl(4, (1.0, 2.0), render_mode="ansi")
    env.reset(seed=0)
    env.step(1)
    assert env.render() in [f"{n} of 4 servers are free; the customer pays {pays}" for n in (3, 4) for pays in (1, 2)]
    image = AccessControl(4, (1.0, 2.0), render_mode="rgb_array").render()
    assert image.shape == (64, 128, 3)
    assert (image[:32] == (80, 180, 80)).all()
    assert (image[32:, :64] == (80, 120, 200)).all()
    assert (image[32:, 64:] == 255).all()


def average_of(actions: np.ndarray, n: int, payments: tuple[float, ...], p: float) -> float:
    """Average reward of a policy, from the stationary distribution of the free servers."""
    moves, paid = np.zeros((n + 1, n + 1)), np.zeros(n + 1)
    for free, priority in itertools.product(range(n + 1), range(len(payments))):
        taken = bool(actions[free, priority]) and free > 0
        paid[free] += taken * payments[priority] / len(payments)
        chances = np.ones(1)  # of how many servers become free: one coin after the other
        for _ in range(n - free + taken):
            chances = np.convolve(chances, [1 - p, p])
        moves[free, free - taken : free - taken + len(chances)] += chances / len(payments)
    equations = np.concatenate([moves.T - np.eye(n + 1), np.ones((1, n + 1))])
    stationary = np.linalg.lstsq(equations, np.append(np.zeros(n + 1), 1.0), rcond=None)[0]
    return float(stationary @ paid)


@pytest.mark.parametrize(("n", "payments", "p"), [(3, (1.0, 2.0, 4.0, 8.0), 0.06), (4, (1.0, 5.0, 6.0), 0.3)])
def test_optimum_is_that_of_the_best_thresholds(n: int, payments: tuple[float, ...], p: float) -> None:
    """A customer who pays more is accepted with fewer free servers: all policies of this form are tried."""
    best, actions = AccessControl(n, payments, p).optimum()
    assert average_of(actions, n, payments, p) == pytest.approx(best, abs=1e-8)
    tried = [
        average_of(np.arange(n + 1)[:, None] >= np.array(thresholds), n, payments, p)
        for thresholds in itertools.product(range(1, n + 2), repeat=len(payments))
    ]
    assert max(tried) == pytest.approx(best, abs=1e-8)
    assert sorted(tried)[-2] < best - 1e-6


def test_optimum_of_the_textbook() -> None:
    """The policy of figure 10.5: low priorities are turned away while few servers are free."""
    best, actions = AccessControl().optimum()
    assert best == pytest.approx(average_of(actions, 10, (1.0, 2.0, 4.0, 8.0), 0.06), abs=1e-8)
    first_accepted = [int(np.flatnonzero(np.append(column, 1))[0]) for column in actions.T]
    assert first_accepted == sorted(first_accepted, reverse=True)
    assert all(np.all(np.diff(column) >= 0) for column in actions.T)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_servers": 0}, "n_servers must be at least 1"),
        ({"payments": ()}, "payments not empty"),
        ({"p_free": 0.0}, r"p_free must lie in \(0, 1\], got 0.0"),
    ],
)
def test_refusals(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AccessControl(**arguments)  # type: ignore[arg-type]
