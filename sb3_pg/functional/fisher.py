"""Products of the Fisher information matrix with vectors, without the matrix."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch as th
from torch.distributions import Distribution

from sb3_pg.functional.distributions import distribution_parameters, with_parameters
from sb3_pg.functional.divergence import joint_kl
from sb3_pg.functional.perceptron import PerceptronJacobian

Distributions = Distribution | Sequence[Distribution]

_INDEPENDENT = "distributions must depend on at least one of the parameters, with gradient"


class OfPerceptron(NamedTuple):
    """Distributions made from a perceptron's outputs, whose Jacobian is known without autograd.

    :param distributions: with their graph, as far as ``outputs``
    :param outputs: of the perceptron, a leaf of that graph
    :param jacobian: of the outputs
    """

    distributions: Distributions
    outputs: th.Tensor
    jacobian: PerceptronJacobian


class FisherVectorProduct:
    r"""The Fisher information matrix of a policy, averaged over states, as a function of a vector.

    .. math:: F v = \frac1N \sum_i J_i^T M_i J_i v + c\, v, \qquad
              M_i = \nabla_z^2 D_{KL}(\pi_{z_i} \,\|\, \pi_z)\big|_{z = z_i}

    z_i are the few parameters of the action distribution at state i, J_i their Jacobian in theta. Since the divergence
    has gradient 0 at z_i, this is its Hessian in theta, and equals
    :math:`E[\nabla\log\pi\, \nabla\log\pi^T]`. Source: Kakade (2001), section 2; Schulman et al. (2015), appendix C.1;
    Martens (2020), section 8 (the generalized Gauss-Newton form).

    A product is two reverse passes: J v is the derivative of the linear function u -> J^T u, whose graph is kept;
    the network is never differentiated twice. A perceptron is differentiated by hand (:class:`OfPerceptron`). In the
    location of a Laplace distribution autograd finds no curvature: torch writes that divergence with an absolute value.

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
        distributions: Sequence[Callable[[], Distributions | OfPerceptron]],
        parameters: Sequence[th.Tensor],
        damping: float = 0.0,
    ) -> None:
        if not distributions:
            raise ValueError("distributions must have at least one chunk, got none")
        self._distributions, self._parameters, self._damping = distributions, list(parameters), damping
        self._sizes = [parameter.numel() for parameter in parameters]
        self._kept = _linearized(distributions[0], self._parameters) if len(distributions) == 1 else None

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
                chunk = _linearized(distribution, self._parameters)
                product += _flat(chunk.product(parts))
                n_samples += chunk.n_samples
        return product.div_(n_samples).add_(vector, alpha=self._damping)


def _flat(parts: Sequence[th.Tensor]) -> th.Tensor:
    return th.cat([part.flatten() for part in parts])


def _linearized(
    make: Callable[[], Distributions | OfPerceptron], parameters: list[th.Tensor]
) -> "_Linearized | _LinearizedPerceptron":
    with th.enable_grad():
        made = make()
    return _LinearizedPerceptron(made, parameters) if isinstance(made, OfPerceptron) else _Linearized(made, parameters)


class _Linearized:
    """J and M at one chunk of states."""

    def __init__(self, distribution: Distributions, parameters: list[th.Tensor]) -> None:
        with th.enable_grad():
            outputs = distribution_parameters(distribution)
            self.n_samples = len(outputs[0])
            self._parameters = parameters
            if not any(output.requires_grad for output in outputs):
                raise ValueError(_INDEPENDENT)
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


class _LinearizedPerceptron:
    """The same, where autograd goes no further than the perceptron's outputs: what follows them is small, and the
    divergence is differentiated twice through it.
    """

    def __init__(self, made: OfPerceptron, parameters: list[th.Tensor]) -> None:
        self._jacobian, self.n_samples = made.jacobian, len(made.outputs)
        place = {id(parameter): i for i, parameter in enumerate(parameters)}
        self._places = [place.get(id(parameter)) for parameter in made.jacobian.parameters]
        self._others = [i for i in range(len(parameters)) if i not in self._places]
        self._variables = [made.outputs, *(parameters[i] for i in self._others)]
        with th.enable_grad():
            fixed = [z.detach() for z in distribution_parameters(made.distributions)]
            divergence = joint_kl(with_parameters(made.distributions, fixed), made.distributions).sum()
            self._slope = self._differentiated([divergence], create_graph=True)
        if all(place is None for place in self._places) and not any(slope.grad_fn for slope in self._slope[1:]):
            raise ValueError(_INDEPENDENT)

    def _differentiated(
        self, of: Sequence[th.Tensor], along: Sequence[th.Tensor] | None = None, create_graph: bool = False
    ) -> Sequence[th.Tensor]:
        return th.autograd.grad(
            of, self._variables, along, retain_graph=True, create_graph=create_graph, materialize_grads=True
        )

    def product(self, vector: list[th.Tensor]) -> Sequence[th.Tensor]:
        """J^T M J v, summed over the samples."""
        tangent = self._jacobian([None if place is None else vector[place] for place in self._places])
        along = [tangent, *(vector[i] for i in self._others)]
        slopes, parts = zip(*((s, v) for s, v in zip(self._slope, along, strict=True) if s.grad_fn), strict=True)
        curved, *others = self._differentiated(slopes, parts)
        found = dict(zip(self._others, others, strict=True))
        for place, part in zip(self._places, self._jacobian.transposed(curved), strict=True):
            if place is not None:  # several layers may share their weights
                found[place] = found[place] + part if place in found else part
        return [found[i] for i in range(len(vector))]
