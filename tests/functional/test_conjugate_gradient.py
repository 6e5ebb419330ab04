"""Against a direct solver, and against systems whose course is known."""

import math
from collections.abc import Callable

import pytest
import torch as th

from sb3_pg.functional import conjugate_gradient

INF, NAN = math.inf, math.nan


def positive_definite(eigenvalues: th.Tensor) -> th.Tensor:
    basis, _ = th.linalg.qr(th.randn(len(eigenvalues), len(eigenvalues), dtype=eigenvalues.dtype))
    matrix: th.Tensor = basis @ eigenvalues.diag() @ basis.T
    return matrix


def product_with(matrix: th.Tensor) -> Callable[[th.Tensor], th.Tensor]:
    return lambda vector: matrix @ vector


class NanFrom:
    """Products with a matrix, of which those from a number on are NaN."""

    def __init__(self, matrix: th.Tensor, first: int) -> None:
        self.matrix, self.left = matrix, first

    def __call__(self, vector: th.Tensor) -> th.Tensor:
        self.left -= 1
        return self.matrix @ vector if self.left > 0 else th.full_like(vector, NAN)


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_equals_a_direct_solver(n: int) -> None:
    th.manual_seed(n)
    matrix, b = positive_definite(th.rand(n, dtype=th.float64) + 0.1), th.randn(n, dtype=th.float64)
    found = conjugate_gradient(product_with(matrix), b, 2 * n, 1e-12)
    assert (found.stop_reason, found.failed) == ("converged", False)
    th.testing.assert_close(found.x, th.linalg.solve(matrix, b), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30, 1e38])
def test_a_scaled_right_hand_side_scales_the_solution(scale: float) -> None:
    """At the largest, the norm of b, unlike its entries, is above what float32 holds; the smallest are subnormal."""
    th.manual_seed(0)
    n = 20
    matrix = positive_definite(th.linspace(1, 10, n))
    b = th.ones(n) * th.tensor([1.0, -1.0]).repeat(n // 2)
    scaled = th.tensor(scale) * b
    expected, found = conjugate_gradient(product_with(matrix), b), conjugate_gradient(product_with(matrix), scaled)
    assert (found.n_iterations, found.stop_reason) == (expected.n_iterations, "converged")
    assert found.relative_residual == pytest.approx(expected.relative_residual, rel=1e-2)
    # in double, since rounding to subnormals is coarse
    ratio = float(scaled[0].double())
    th.testing.assert_close(found.x.double(), expected.x.double() * ratio, rtol=1e-5, atol=1e-45)


def test_nothing_to_solve() -> None:
    calls: list[th.Tensor] = []

    def product(v: th.Tensor) -> th.Tensor:
        calls.append(v)
        return v

    found = conjugate_gradient(product, th.zeros(3))
    assert found.x.tolist() == [0, 0, 0]
    assert found[1:] == (0, 0.0, "converged")
    assert not calls


@pytest.mark.parametrize("n_distinct", [1, 2, 3, 5])
def test_needs_no_more_products_than_there_are_distinct_eigenvalues(n_distinct: int) -> None:
    th.manual_seed(0)
    matrix = positive_definite(th.arange(1, n_distinct + 1, dtype=th.float64).repeat(5))
    found = conjugate_gradient(product_with(matrix), th.randn(5 * n_distinct, dtype=th.float64), 50, 1e-10)
    assert found.stop_reason == "converged"
    assert found.n_iterations <= n_distinct


@pytest.mark.parametrize("max_steps", [1, 2, 5, 9])
def test_max_steps_are_done_and_the_residual_is_that_of_the_solution(max_steps: int) -> None:
    th.manual_seed(0)
    matrix, b = positive_definite(th.logspace(-2, 2, 30, dtype=th.float64)), th.randn(30, dtype=th.float64)
    found = conjugate_gradient(product_with(matrix), b, max_steps)
    assert (found.n_iterations, found.stop_reason, found.failed) == (max_steps, "max_steps", False)
    assert found.relative_residual == pytest.approx(float((b - matrix @ found.x).norm() / b.norm()), rel=1e-9)


@pytest.mark.parametrize("tolerance", [0.3, 1e-2, 1e-5])
def test_stops_once_the_residual_is_small_in_relation_to_b(tolerance: float) -> None:
    th.manual_seed(0)
    matrix, b = positive_definite(th.linspace(1, 10, 30)), 1e-6 * th.randn(30)
    found = conjugate_gradient(product_with(matrix), b, 50, tolerance)
    before = conjugate_gradient(product_with(matrix), b, found.n_iterations - 1, tolerance)
    assert (found.stop_reason, before.stop_reason) == ("converged", "max_steps")
    assert found.relative_residual <= tolerance < before.relative_residual
    assert found.relative_residual == pytest.approx(float((b - matrix @ found.x).norm() / b.norm()), abs=1e-6)


@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
def test_a_solved_system_is_no_failure_when_its_residual_vanishes(damping: float) -> None:
    """With tolerance 0, float32's squares of what is left underflow; a curvature of 0 then says nothing."""
    th.manual_seed(0)
    matrix = positive_definite(damping * (1 + 0.01 * th.rand(50)))
    b = th.randn(50)
    found = conjugate_gradient(product_with(matrix), b, 15, 0.0)
    assert (found.stop_reason, found.failed) == ("converged", False)
    th.testing.assert_close(found.x, th.linalg.solve(matrix, b), rtol=1e-4, atol=1e-6)


def test_an_indefinite_matrix_leaves_the_iteration_before() -> None:
    matrix, b = th.tensor([5.0, 4.0, 3.0, -1.0]).double().diag(), th.tensor([1.0, 2.0, -1.0, 0.5]).double()
    found = conjugate_gradient(product_with(matrix), b, 10)
    assert (found.stop_reason, found.failed) == ("curvature", True)
    assert found.n_iterations > 0
    before = conjugate_gradient(product_with(matrix), b, found.n_iterations)
    assert before.stop_reason == "max_steps"
    assert th.equal(found.x, before.x)
    assert found.relative_residual == before.relative_residual


@pytest.mark.parametrize(
    ("factor", "reason"),
    # the last two: 1 / curvature, and curvature, above what float32 holds
    [(-1.0, "curvature"), (0.0, "curvature"), (1e-44, "curvature"), (INF, "nonfinite"), (NAN, "nonfinite")],
)
def test_a_failure_at_once_leaves_zeros(factor: float, reason: str) -> None:
    found = conjugate_gradient(lambda v: factor * v, th.tensor([3.0, 4.0]))
    assert found.x.tolist() == [0, 0]
    assert (found.n_iterations, found.stop_reason, found.failed) == (0, reason, True)
    assert found.relative_residual == pytest.approx(1)


@pytest.mark.parametrize("first", [1, 2, 4])
def test_a_product_that_is_not_finite_leaves_the_iteration_before(first: int) -> None:
    th.manual_seed(0)
    matrix, b = positive_definite(th.linspace(1, 10, 20)), th.randn(20)
    found = conjugate_gradient(NanFrom(matrix, first), b, 10)
    assert (found.n_iterations, found.stop_reason, found.failed) == (first - 1, "nonfinite", True)
    if first > 1:
        before = conjugate_gradient(product_with(matrix), b, first - 1)
        assert th.equal(found.x, before.x)
        assert found.relative_residual == before.relative_residual


@pytest.mark.parametrize("b", [[1.0, NAN], [1.0, INF], [-INF, INF], [NAN, NAN]])
def test_a_right_hand_side_that_is_not_finite_has_no_solution(b: list[float]) -> None:
    found = conjugate_gradient(lambda v: v, th.tensor(b))
    assert found.x.tolist() == [0, 0]
    assert (found.n_iterations, found.stop_reason, found.failed) == (0, "nonfinite", True)
    assert not math.isfinite(found.relative_residual)


def test_arguments_out_of_range() -> None:
    b = th.ones(2)
    with pytest.raises(ValueError, match="max_steps must be at least 1, got 0"):
        conjugate_gradient(lambda v: v, b, 0)
    for tolerance in (-1e-9, NAN):
        with pytest.raises(ValueError, match="tolerance must be at least 0"):
            conjugate_gradient(lambda v: v, b, 1, tolerance)


@pytest.mark.cuda
@pytest.mark.skipif(not th.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("reason", ["converged", "max_steps", "curvature", "nonfinite"])
def test_cuda_equals_cpu(reason: str) -> None:
    """There it goes on to the last step, whenever it ended."""
    th.manual_seed(0)
    eigenvalues = th.tensor([5.0, 4.0, 3.0, -1.0 if reason == "curvature" else 1.0]).double()
    matrix, b = eigenvalues.diag(), th.tensor([1.0, 2.0, -1.0, 0.5]).double()
    steps = 2 if reason == "max_steps" else 10
    found, expected = (
        conjugate_gradient(NanFrom(matrix.to(device), 3 if reason == "nonfinite" else 99), b.to(device), steps)
        for device in ("cuda", "cpu")
    )
    assert (found.n_iterations, found.stop_reason) == (expected.n_iterations, reason)
    th.testing.assert_close(found.x.cpu(), expected.x)
    assert found.relative_residual == pytest.approx(expected.relative_residual, abs=1e-12)
    nothing = conjugate_gradient(lambda v: v, th.zeros(2, device="cuda"))
    assert (nothing.x.tolist(), nothing.stop_reason) == ([0, 0], "converged")
