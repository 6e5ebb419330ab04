"""Products of the Fisher information matrix with vectors, without the matrix."""

from collections.abc import Callable, Sequence

import torch as th
from torch.distributions import Distribution

from sb3_pg.functional.distributions import distribution_parameters, with_parameters
from sb3_pg.functional.divergence import joint_kl

Distributions = Distribution | Sequence[Distribution]


class FisherVectorProduct:
    r"""The Fisher information matrix of a policy, averaged over states, as a function of a vector.

    .. math:: F v = \frac1N \sum_i J_i^T M_i J_i v + c\, v, \qquad
              M_i = \nabla_z^2 D_{KL}(\pi_{z_i} \,\|\, \pi_z)\big|_{z = z_i}

    z_i are the few parameters of the action distribution at state i, J_i their Jacobian in theta. Since the divergence
    has gradient 0 at z_i, this is its Hessian in theta, and equals
    :math:`E[\nabla\log\pi\, \nabla\log\pi^T]`. Source: Kakade (2001), section 2; Schulman et al. (2015), appendix C.1;
    Martens (2020), section 8 (the generalized Gauss-Newton form).

    A product is two reverse passes: J v is the derivative of the linear function u -> J^T u, whose graph is kept;
    the network is never differentiated twice. (In the location of a Laplace distribution autograd finds no curvature:
    torch writes that divergence with an absolute value.)

    :param distributions: what gives the actions' distributions of each chunk of states, with graph. Of a single chunk
        the graph is kept; of several it is made anew for every product, so that memory is that of one chunk
    :param parameters: theta; what the distributions do not depend on has zeros in the product
    :param damping: c
    :raises ValueError: no chunk, or distributions that depend on none of the parameters
    :raises TypeError: a distribution whose class does not say what it is made from
    :raises NotImplementedError: a distribution that torch knows no divergence of
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
            product, n_samples = self._kept.product(parts), self._kept.n_samples
        else:
            product, n_samples = th.zeros_like(vector), 0
            for distribution in self._distributions:
                chunk = _Linearized(distribution, self._parameters)
                product += chunk.product(parts)
                n_samples += chunk.n_samples
        return product.div_(n_samples).add_(vector, alpha=self._damping)


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

    def product(self, vector: list[th.Tensor]) -> th.Tensor:
        """J^T M J v, summed over the samples."""
        dependent = [(p, v) for p, v in zip(self._pullback, vector, strict=True) if p.requires_grad]
        pullback, parts = zip(*dependent, strict=True)
        tangents = th.autograd.grad(pullback, self._cotangents, parts, retain_graph=True, materialize_grads=True)
        curved = th.autograd.grad(self._slope, self._leaves, tangents, retain_graph=True, materialize_grads=True)
        return th.cat([part.flatten() for part in self._transposed(curved)])
