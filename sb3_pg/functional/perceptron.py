"""Derivatives of a multilayer perceptron by its weights, layer by layer, without autograd."""

from collections.abc import Callable, Sequence
from typing import Final

import torch as th
from torch import nn

#: Activation -> its derivative, from its value.
SLOPES: Final[dict[type[nn.Module], Callable[[th.Tensor], th.Tensor]]] = {
    nn.Tanh: lambda h: 1 - h * h,
    nn.ReLU: lambda h: (h > 0).to(h.dtype),
}


class PerceptronJacobian:
    r"""J, the Jacobian of the outputs at all samples in the weights W_l and biases b_l, as a linear function.

    .. math:: z_l = h_{l-1} W_l^T + b_l, \qquad h_l = \phi(z_l), \qquad
              \dot z_l = \dot h_{l-1} W_l^T + h_{l-1} \dot W_l^T + \dot b_l, \qquad \dot h_l = \phi'(z_l)\, \dot z_l

    Its transpose is backpropagation. Source: Pearlmutter (1994), the R-operator; Martens (2020), section 4.

    :param layers: linear ones with a bias, and activations of ``SLOPES`` between them
    :param inputs: h_0, ``(n_samples, n_inputs)``
    :raises TypeError: another kind of layer
    """

    def __init__(self, layers: Sequence[nn.Module], inputs: th.Tensor) -> None:
        self._steps: list[tuple[nn.Linear | None, th.Tensor]] = []  # a linear layer and its input, or a slope
        with th.no_grad():
            h = inputs
            for layer in layers:
                if type(layer) is nn.Linear and layer.bias is not None:
                    self._steps.append((layer, h))
                    h = layer(h)
                elif type(layer) in SLOPES:
                    h = layer(h)
                    self._steps.append((None, SLOPES[type(layer)](h)))
                else:
                    known = [cls.__name__ for cls in SLOPES]
                    raise TypeError(f"layers must be linear, with a bias, or one of {known}, got {layer}")
        #: the outputs, ``(n_samples, n_outputs)``
        self.outputs = h
        #: W_1, b_1, W_2, ...
        self.parameters = [p for layer, _ in self._steps if layer is not None for p in (layer.weight, layer.bias)]
        self._versions = [parameter._version for parameter in self.parameters]

    def _require_unchanged(self) -> None:
        if self._versions != [parameter._version for parameter in self.parameters]:
            raise RuntimeError("parameters have been changed since the Jacobian was taken")

    @th.no_grad()
    def __call__(self, parts: Sequence[th.Tensor | None]) -> th.Tensor:
        """J v.

        :param parts: v, in the shapes of ``parameters``; None where it is 0
        :return: ``(n_samples, n_outputs)``
        :raises RuntimeError: the parameters are others than they were
        """
        self._require_unchanged()
        remaining = iter(parts)
        tangent: th.Tensor | None = None
        for layer, kept in self._steps:
            if layer is None:
                tangent = None if tangent is None else tangent * kept
                continue
            weight, bias = next(remaining), next(remaining)
            before, tangent = tangent, None if bias is None else bias.expand(len(kept), -1)
            for x, factor in ((kept, weight), (before, layer.weight)):
                if x is not None and factor is not None:
                    tangent = x @ factor.T if tangent is None else th.addmm(tangent, x, factor.T)
        return th.zeros_like(self.outputs) if tangent is None else tangent

    @th.no_grad()
    def transposed(self, cotangent: th.Tensor) -> list[th.Tensor]:
        """J^T u.

        :param cotangent: u, ``(n_samples, n_outputs)``
        :return: in the shapes of ``parameters``
        :raises RuntimeError: the parameters are others than they were
        """
        self._require_unchanged()
        parts: list[th.Tensor] = []
        for i, (layer, kept) in reversed(list(enumerate(self._steps))):
            if layer is None:
                cotangent = cotangent * kept
            else:
                parts += [cotangent.sum(0), cotangent.T @ kept]
                cotangent = cotangent @ layer.weight if i else cotangent
        return parts[::-1]
