"""Statistics of several actors are those of all that they have seen."""

import copy

import numpy as np
import pytest
from stable_baselines3.common.running_mean_std import RunningMeanStd

from sb3_pg.envs.actors.wrappers import merge_statistics


def moments(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of data after the one of weight 1e-4, mean 0 and variance 1 that SB3's statistics begin with."""
    weights = np.concatenate([[1e-4], np.ones(len(data))])
    rows = np.concatenate([np.zeros((1, data.shape[1])), data])
    mean = np.average(rows, axis=0, weights=weights)
    squares = np.average((rows - mean) ** 2, axis=0, weights=weights)
    return mean, squares + 1e-4 / weights.sum()


@pytest.mark.parametrize("n_before", [0, 1, 1000])
@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_merged_statistics_are_those_of_all_data(n_before: int, shift: float) -> None:
    random = np.random.default_rng(0)
    base = RunningMeanStd(shape=(3,))
    known = [shift + random.normal(size=(n_before, 3))]
    if n_before:
        base.update(known[0])
    parts = []
    for n in (1, 400, 0, 30):  # one of the actors has seen nothing
        part = copy.deepcopy(base)
        for row in shift + (1 + n) * random.normal(size=(n, 1, 3)):
            part.update(row)
            known.append(row)
        parts.append(part)
    merged = copy.deepcopy(base)
    merge_statistics(merged, parts)
    mean, variance = moments(np.concatenate(known))
    np.testing.assert_allclose(merged.mean, mean, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(merged.var, variance, rtol=1e-7)
    assert merged.count == pytest.approx(1e-4 + n_before + 431)


def test_the_statistics_of_one_actor_are_taken_as_they_are() -> None:
    base = RunningMeanStd(shape=())
    part = base.copy()
    part.update(np.arange(3.0))
    merge_statistics(base, [part])
    assert (base.mean, base.var, base.count) == (part.mean, part.var, part.count)


def test_constant_numbers_keep_a_variance_of_at_least_0() -> None:
    base = RunningMeanStd(shape=())
    base.update(np.full(10**6, 0.1))
    parts = [base.copy() for _ in range(3)]
    for part in parts:
        for _ in range(100):
            part.update(np.full(7, 0.1))
    merge_statistics(base, parts)
    assert base.var >= 0
    assert base.mean == pytest.approx(0.1)
