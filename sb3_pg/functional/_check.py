"""Argument checks that the functions of this folder share."""

import torch as th


def check_shapes(**tensors: th.Tensor | None) -> None:
    """Require equal shapes.

    :param tensors: name -> tensor; None for an optional argument that was left out
    :raises ValueError: naming the tensors whose shapes differ
    """
    if len({tensor.shape for tensor in tensors.values() if tensor is not None}) > 1:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
        raise ValueError(f"These tensors must have equal shapes: {shapes}")


def check_fraction(name: str, value: float) -> None:
    """Require ``value`` in [0, 1].

    :raises ValueError: naming the argument and its value
    """
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


def check_positive(name: str, value: float) -> None:
    """Require ``value`` > 0; infinity is allowed.

    :raises ValueError: naming the argument and its value
    """
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")
