"""Natural gradients: Fisher products, the linear systems they make, and the search along their solution."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch as th
from torch.distributions import Distribution

from sb3_pg.functional.distributions import distribution_parameters, joint_kl, with_parameters

Distributions = Distribution | Sequence[Distribution]

_REASONS = ("max_steps", "converged", "curvature", "nonfinite")
_MAX_STEPS, _CONVERGED, _CURVATURE, _NONFINITE = range(4)


class Solution(NamedTuple):
    """Result of :func:`conjugate_gradient`.

    :param x: the solution, shape of the right-hand side
    :param n_iterations: number of iterations that have changed x
    :param relative_residual: ||b - A x|| / ||b||
    :param stop_reason: "converged", "max_steps", "curvature" (p^T A p <= 0 for a direction p: the matrix is not
        positive definite, or rounding errors dominate) or "nonfinite"; in the last two cases x is from the iteration
        before
    """

    x: th.Tensor
    n_iterations: int
    relative_residual: float
    stop_reason: str

    @property
    def failed(self) -> bool:
        """Whether it stopped because of curvature or numbers that are not finite."""
        return self.stop_reason in ("curvature", "nonfinite")


def conjugate_gradient(
    matvec: Callable[[th.Tensor], th.Tensor], b: th.Tensor, max_steps: int = 15, tolerance: float = 1e-5
) -> Solution:
    r"""Solve A x = b, from x = 0.

    .. math:: \alpha = \frac{r^T r}{p^T A p}, \quad x \leftarrow x + \alpha p, \quad r \leftarrow r - \alpha A p,
              \quad p \leftarrow r + \frac{r^T r}{r_{old}^T r_{old}}\, p

    Source: Hestenes and Stiefel (1952), eq. 3:1. The system is solved for b / ||b||, so that large and small
    right-hand sides neither overflow nor underflow. On a GPU, no number is read back before the end: iterations after
    the stop change nothing.

    :param matvec: v -> A v
    :param b: right-hand side, ``(n,)``, floating
    :param max_steps: largest number of products with A
    :param tolerance: relative residual at which it stops, at least the rounding error of the dtype
    :return: the solution, and why it stopped
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
    solution = th.where(x == 0, 0.0, x * norm * largest)  # also 0 where the norm is not finite
    return Solution(solution, int(n), residual, _REASONS[int(code)])


class FisherVectorProduct:
    r"""The Fisher information matrix of a policy, averaged over states, as a function of a vector.

    .. math:: F v = \frac1N \sum_i J_i^T M_i J_i v + c\, v, \qquad
              M_i = \nabla_z^2 D_{KL}(\pi_{z_i} \,\|\, \pi_z)\big|_{z = z_i}

    z_i are the few parameters of the action distribution at state i, J_i their Jacobian in theta. Since the divergence
    has gradient 0 at z_i, this is its Hessian in theta, and equals
    :math:`E[\nabla\log\pi\, \nabla\log\pi^T]`. Source: Kakade (2001), section 2; Schulman et al. (2015), appendix C.1;
    Martens (2020), section 8 (the generalized Gauss-Newton form).

    A product is two reverse passes: J v is the derivative of the linear function u -> J^T u, whose graph is kept;
    the network is never differentiated twice. Autograd finds no curvature in the location of a Laplace distribution,
    whose divergence torch writes with an absolute value.

    :param distributions: one function per chunk of states, which returns the actions' distributions there, with graph.
        The graph of a single chunk is kept; several chunks are computed anew for every product, so that only one is in
        memory
    :param parameters: theta; the product is 0 for parameters that the distributions do not depend on
    :param damping: c
    :raises ValueError: no chunk, or distributions that depend on none of the parameters
    :raises TypeError: a distribution whose class does not list its parameters in ``arg_constraints``
    :raises NotImplementedError: a distribution whose divergence torch does not know
    """

    def __init__(
        self,
        distributions: Sequence[Callable[[], Distributions]],
        parameters: Sequence[th.Tensor],
        damping: float = 0.0,
    ) -> None:
        if not distributions:
            raise ValueError("distributions must have at least one chunk, got none")
        self._distributions, self._parameters, self._damping = distributions, list(parameters), damping
        self._sizes = [parameter.numel() for parameter in parameters]
        self._kept = _Linearized(distributions[0], self._parameters) if len(distributions) == 1 else None

    def __call__(self, vector: th.Tensor) -> th.Tensor:
        """F v.

        :param vector: v, ``(n_parameters,)``
        :return: same shape
        """
        parts = [
            part.view_as(parameter) for part, parameter in zip(vector.split(self._sizes), self._parameters, strict=True)
        ]
        if self._kept is not None:
            product, n_samples = _flat(self._kept.product(parts)), self._kept.n_samples
        else:
            product, n_samples = th.zeros_like(vector), 0
            for distribution in self._distributions:
                chunk = _Linearized(distribution, self._parameters)
                product += _flat(chunk.product(parts))
                n_samples += chunk.n_samples
        return product.div_(n_samples).add_(vector, alpha=self._damping)


def _flat(parts: Sequence[th.Tensor]) -> th.Tensor:
    return th.cat([part.flatten() for part in parts])


class _Linearized:
    """J and M at one chunk of states."""

    def __init__(self, make: Callable[[], Distributions], parameters: list[th.Tensor]) -> None:
        with th.enable_grad():
            distribution = make()
            outputs = distribution_parameters(distribution)
            self.n_samples = len(outputs[0])
            self._parameters = parameters
            if not any(output.requires_grad for output in outputs):
                raise ValueError("distributions must depend on at least one of the parameters, with gradient")
            leaves = [output.detach().requires_grad_(output.requires_grad) for output in outputs]
            self._outputs = [output for output in outputs if output.requires_grad]
            self._leaves = [leaf for leaf in leaves if leaf.requires_grad]
            old = with_parameters(distribution, [output.detach() for output in outputs])
            divergence = joint_kl(old, with_parameters(distribution, leaves)).sum()
            self._slope = th.autograd.grad(divergence, self._leaves, create_graph=True)
            self._cotangents = [th.zeros_like(output, requires_grad=True) for output in self._outputs]
            self._pullback = self._transposed(self._cotangents, create_graph=True)

    def _transposed(self, cotangents: Sequence[th.Tensor], create_graph: bool = False) -> tuple[th.Tensor, ...]:
        """J^T u."""
        return th.autograd.grad(
            self._outputs,
            self._parameters,
            cotangents,
            retain_graph=True,
            create_graph=create_graph,
            materialize_grads=True,
        )

    def product(self, vector: list[th.Tensor]) -> Sequence[th.Tensor]:
        """J^T M J v, summed over the samples."""
        dependent = [(p, v) for p, v in zip(self._pullback, vector, strict=True) if p.requires_grad]
        pullback, parts = zip(*dependent, strict=True)
        tangents = th.autograd.grad(pullback, self._cotangents, parts, retain_graph=True, materialize_grads=True)
        curved = th.autograd.grad(self._slope, self._leaves, tangents, retain_graph=True, materialize_grads=True)
        return self._transposed(curved)


class LineSearch(NamedTuple):
    """Result of :func:`line_search`.

    :param fraction: beta^k of the step that was taken; 0 if none was
    :param n_steps: steps that were tried
    :param reason: "accepted", or why the last step was rejected: "nonfinite" (divergence or gain), "kl" (above the
        limit), or "no_improvement" (the gain is too small compared with the predicted one)
    """

    fraction: float
    n_steps: int
    reason: str


def line_search(
    parameters: Sequence[th.Tensor],
    step: Sequence[th.Tensor],
    measure: Callable[[], th.Tensor],
    predicted_gain: float,
    max_kl: float = math.inf,
    accept_ratio: float | None = 0.0,
    shrinking_factor: float = 0.8,
    max_iter: int = 10,
) -> LineSearch:
    r"""Take the longest step :math:`\beta^k s` that stays in the trust region and improves the objective enough.

    .. math:: \bar D_{KL} \le \delta \quad\text{and}\quad
              L(\theta + \beta^k s) - L(\theta) \ge \eta\, \beta^k\, g^T s, \qquad k = 0, 1, \dots

    The gain must be positive for every eta. Source: Schulman et al. (2015), appendix C; the second condition is
    Armijo's (1966).

    :param parameters: theta, changed in place; restored to the bit if no step is accepted or an error is raised
    :param step: s, one tensor per parameter
    :param measure: returns joint KL(old || now) in nats and the gain L(theta) - L(theta_old) of the current theta, as
        one tensor ``(2,)``
    :param predicted_gain: g^T s, the gain of the full step to first order
    :param max_kl: delta, nats
    :param accept_ratio: eta, at least 0; None to drop the condition on the gain
    :param shrinking_factor: beta, in (0, 1)
    :param max_iter: largest number of steps that are tried
    :return: the step that was taken, and why
    :raises ValueError: shrinking_factor or max_iter out of range
    """
    if not 0 < shrinking_factor < 1:
        raise ValueError(f"shrinking_factor must lie in (0, 1), got {shrinking_factor}")
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")
    parameters, step = list(parameters), list(step)
    fraction, reason, accepted = 1.0, "", False
    with th.no_grad():
        before = [parameter.clone() for parameter in parameters]
        try:
            for n in range(1, max_iter + 1):
                for parameter, old, part in zip(parameters, before, step, strict=True):
                    parameter.copy_(th.add(old, part, alpha=fraction))
                kl, gain = measure().tolist()
                if not (math.isfinite(kl) and math.isfinite(gain)):
                    reason = "nonfinite"
                elif kl > max_kl:
                    reason = "kl"
                elif accept_ratio is not None and not (gain > 0 and gain >= accept_ratio * fraction * predicted_gain):
                    reason = "no_improvement"
                else:
                    accepted = True
                    return LineSearch(fraction, n, "accepted")
                fraction *= shrinking_factor
        finally:
            if not accepted:
                for parameter, old in zip(parameters, before, strict=True):
                    parameter.copy_(old)
    return LineSearch(0.0, max_iter, reason)
