"""Gradient diagnostics against numpy, and against distributions whose noise scale is known."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch as th

from sb3_pg.functional import GradientDiagnostics, gradient_diagnostics


def chunks(rows: np.ndarray, *sizes: int, order: np.ndarray | None = None) -> Iterator[tuple[th.Tensor, th.Tensor]]:
    """The rows in this order, in chunks of these sizes and a last one with the rest."""
    order = np.arange(len(rows)) if order is None else order
    for piece in np.split(order, np.cumsum(sizes)):
        yield th.from_numpy(piece), th.from_numpy(rows[piece])


def gaussian_rows(n: int, dimension: int, seed: int = 0, dtype: type = np.float64) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.3, 2.0, (n, dimension)).astype(dtype)


def assert_equal(a: GradientDiagnostics, b: GradientDiagnostics) -> None:
    assert a.n_rows == b.n_rows
    for mine, theirs in zip(a[1:], b[1:], strict=True):
        th.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [2, 3, 10, 11])
def test_against_numpy(n: int) -> None:
    rows = gaussian_rows(n, 5)
    found = gradient_diagnostics(chunks(rows))
    mean, trace = rows.mean(0), np.trace(np.cov(rows.T))
    assert found.n_rows == n
    np.testing.assert_allclose(found.mean, mean)
    np.testing.assert_allclose(found.variance, rows.var(0, ddof=1))
    np.testing.assert_allclose(found.total_variance, trace)
    np.testing.assert_allclose(found.batch_variance, trace / n)
    # eq. A.2 as it is printed, with batches of 1 and of n
    small, big = (rows**2).sum(1).mean(), (mean**2).sum()
    squared_norm, noise = (n * big - small) / (n - 1), (small - big) / (1 - 1 / n)
    np.testing.assert_allclose(found.squared_norm, squared_norm)
    np.testing.assert_allclose(found.noise_scale, noise / squared_norm)
    np.testing.assert_allclose(found.signal_to_noise, squared_norm / (noise / n))
    even, odd = rows[::2].mean(0), rows[1::2].mean(0)
    np.testing.assert_allclose(found.half_batch_cosine, even @ odd / np.sqrt((even @ even) * (odd @ odd)))


@pytest.mark.parametrize("sizes", [(1,), (1, 1, 1, 1, 1, 1), (4, 2), (0, 6)])
def test_streaming_equals_all_at_once_in_any_order(sizes: tuple[int, ...]) -> None:
    rows = gaussian_rows(7, 3)
    order = np.random.default_rng(1).permutation(7)
    assert_equal(gradient_diagnostics(chunks(rows, *sizes, order=order)), gradient_diagnostics(chunks(rows)))


def test_several_gradients_side_by_side() -> None:
    rows = gaussian_rows(9, 8).reshape(9, 2, 4)
    both = gradient_diagnostics(chunks(rows, 5))
    for k in range(2):
        alone = gradient_diagnostics(chunks(rows[:, k]))
        assert_equal(GradientDiagnostics(both.n_rows, *(tensor[k] for tensor in both[1:])), alone)
        assert float(both.noise_scale[k]) == pytest.approx(float(alone.noise_scale))


def test_known_covariance() -> None:
    """Over many batches the estimates average to tr Sigma and |G|^2, and their ratio to the noise scale."""
    rng = np.random.default_rng(0)
    gradient, std = np.array([1.0, -2.0, 0.5]), np.array([1.0, 3.0, 2.0])
    rows = gradient + std * rng.standard_normal((8, 20_000, 3))  # 20,000 batches of 8, side by side
    found = gradient_diagnostics(chunks(rows, 3))
    total, squared = found.total_variance.mean(), found.squared_norm.mean()
    assert float(total) == pytest.approx(14.0, rel=0.02)
    assert float(squared) == pytest.approx(5.25, rel=0.02)
    assert float(total / squared) == pytest.approx(14.0 / 5.25, rel=0.03)
    assert bool((found.squared_norm < 0).any())  # unbiased, so negative now and then


def test_noise_scale_of_a_large_batch() -> None:
    rows = 0.1 + gaussian_rows(100_000, 10, seed=2) - 0.3  # |G|^2 = 0.1, tr Sigma = 40
    found = gradient_diagnostics(chunks(rows, 40_000, 30_000))
    # the estimate of |G|^2 has a standard deviation of 4 %
    assert float(found.noise_scale) == pytest.approx(400.0, rel=0.12)
    assert float(found.signal_to_noise) == pytest.approx(100_000 / 400.0, rel=0.12)
    assert float(found.half_batch_cosine) == pytest.approx(1 / (1 + 400 / 50_000), abs=0.01)


def test_tiny_and_nearly_equal_gradients_keep_their_digits() -> None:
    rows = 1e-9 * gaussian_rows(6, 4)
    np.testing.assert_allclose(gradient_diagnostics(chunks(rows, 2)).variance, rows.var(0, ddof=1))
    wide = gradient_diagnostics(chunks(gaussian_rows(6, 4)))
    assert float(gradient_diagnostics(chunks(rows)).half_batch_cosine) == pytest.approx(float(wide.half_batch_cosine))
    offset = (1e4 + 1e-2 * gaussian_rows(6, 4)).astype(np.float32)
    expected = offset.astype(np.float64).var(0, ddof=1)
    np.testing.assert_allclose(gradient_diagnostics(chunks(offset, 2, 3)).variance, expected, rtol=1e-6)


def test_equal_rows_have_no_noise() -> None:
    found = gradient_diagnostics(chunks(np.ones((4, 3)), 3))
    assert float(found.total_variance) == 0.0
    assert float(found.noise_scale) == 0.0
    assert float(found.signal_to_noise) == np.inf
    assert float(found.half_batch_cosine) == pytest.approx(1.0)


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_rows(n: int) -> None:
    with pytest.raises(ValueError, match=f"at least 2 rows, got {n}"):
        gradient_diagnostics(chunks(gaussian_rows(n, 3)))
