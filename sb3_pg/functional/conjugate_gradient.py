"""Linear systems with a symmetric positive definite matrix that is known by its products only."""

from collections.abc import Callable
from typing import NamedTuple

import torch as th

_REASONS = ("max_steps", "converged", "curvature", "nonfinite")
_MAX_STEPS, _CONVERGED, _CURVATURE, _NONFINITE = range(4)


class Solution(NamedTuple):
    """What :func:`conjugate_gradient` found.

    :param x: the solution, shape of the right-hand side
    :param n_iterations: products that went into it
    :param relative_residual: ||b - A x|| / ||b||
    :param stop_reason: "converged", "max_steps", "curvature" (p^T A p <= 0 for a direction p: the matrix is not
        positive definite, or rounding has the upper hand) or "nonfinite"; x is then that of the iteration before
    """

    x: th.Tensor
    n_iterations: int
    relative_residual: float
    stop_reason: str

    @property
    def failed(self) -> bool:
        """Whether it ended for another reason than having converged or having done all steps."""
        return self.stop_reason in ("curvature", "nonfinite")


def conjugate_gradient(
    matvec: Callable[[th.Tensor], th.Tensor], b: th.Tensor, max_steps: int = 15, tolerance: float = 1e-5
) -> Solution:
    r"""Solve A x = b, from x = 0.

    .. math:: \alpha = \frac{r^T r}{p^T A p}, \quad x \leftarrow x + \alpha p, \quad r \leftarrow r - \alpha A p,
              \quad p \leftarrow r + \frac{r^T r}{r_{old}^T r_{old}}\, p

    Source: Hestenes and Stiefel (1952), eq. 3:1. The system is solved for b / ||b||, so that neither large nor small
    right-hand sides over- or underflow, and ends where the residual is small in relation to b. On a GPU nothing is
    read back before the end: iterations after the last one change nothing.

    :param matvec: v -> A v
    :param b: right-hand side, ``(n,)``, floating
    :param max_steps: most products with A
    :param tolerance: relative residual that is small enough; raised to the dtype's rounding error where it is below
    :return: the solution, and how it was found
    :raises ValueError: max_steps < 1, or a negative tolerance
    """
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    tolerance = max(tolerance, th.finfo(b.dtype).eps)
    largest = b.abs().amax()
    unit = b / th.where(largest > 0, largest, 1.0)
    norm = unit.norm()
    r = unit / th.where(norm > 0, norm, 1.0)
    x, p, rr = th.zeros_like(b), r, r.dot(r)
    reason = th.where(norm > 0, _MAX_STEPS, _CONVERGED)
    reason = th.where(norm.isfinite(), reason, _NONFINITE)
    n_iterations = th.zeros_like(reason)
    for _ in range(max_steps):
        if b.device.type == "cpu" and reason != _MAX_STEPS:
            break
        ap = matvec(p)
        curvature = p.dot(ap)
        alpha = rr / curvature
        wrong = th.where(curvature.isfinite(), _CURVATURE, _NONFINITE)
        usable = curvature.isfinite() & (curvature > 0) & alpha.isfinite()
        reason = th.where((reason == _MAX_STEPS) & ~usable, wrong, reason)
        goes_on = reason == _MAX_STEPS
        x = th.where(goes_on, x + alpha * p, x)
        r = th.where(goes_on, r - alpha * ap, r)
        previous, rr = rr, r.dot(r)
        p = th.where(goes_on, r + (rr / previous) * p, p)
        n_iterations = n_iterations + goes_on
        reason = th.where(goes_on & (rr.sqrt() <= tolerance), _CONVERGED, reason)
    n, code, residual = th.stack((n_iterations.to(rr), reason.to(rr), rr.sqrt())).tolist()
    solution = th.where(x == 0, 0.0, x * norm * largest)  # 0 where the norm is not finite, too
    return Solution(solution, int(n), residual, _REASONS[int(code)])
