"""The parameters that an action distribution is made from, and the same distribution made from others."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch as th
from torch.distributions import Distribution, Independent, TransformedDistribution

#: Of parameters that say the same, the one that is taken: it needs no constraint that sums over others.
_TAKEN = ("logits", "scale_tril")


def distribution_parameters(distribution: Distribution | Sequence[Distribution]) -> list[th.Tensor]:
    """What a distribution is made from, such as loc and scale, or logits; with their graph.

    :param distribution: any of torch's that is made from tensors alone, or one per action dimension
    :return: tensors whose leading axes are the batch's
    :raises TypeError: the distribution's class does not say what it is made from
    """
    return [
        getattr(part, name) for whole in _listed(distribution) for part in [_innermost(whole)] for name in _names(part)
    ]


def with_parameters(
    distribution: Distribution | Sequence[Distribution], parameters: Sequence[th.Tensor]
) -> list[Distribution]:
    """Distributions of the same kind, made from other parameters.

    :param distribution: any of torch's that is made from tensors alone, or one per action dimension
    :param parameters: in the order of :func:`distribution_parameters`, of any batch size
    :return: one per action dimension, or the one
    :raises TypeError: the distribution's class does not say what it is made from
    """
    values = iter(parameters)
    return [_made(whole, values) for whole in _listed(distribution)]


def _listed(distribution: Distribution | Sequence[Distribution]) -> list[Distribution]:
    return [distribution] if isinstance(distribution, Distribution) else list(distribution)


def _is_wrapped(distribution: Distribution) -> bool:
    return type(distribution) in (Independent, TransformedDistribution)


def _innermost(distribution: Distribution) -> Distribution:
    while _is_wrapped(distribution):
        distribution = distribution.base_dist  # type: ignore[attr-defined]
    return distribution


def _made(distribution: Distribution, values: Iterator[th.Tensor]) -> Distribution:
    if isinstance(distribution, Independent):
        base = _made(distribution.base_dist, values)
        return Independent(base, distribution.reinterpreted_batch_ndims, validate_args=False)
    if type(distribution) is TransformedDistribution:
        base = _made(distribution.base_dist, values)
        return TransformedDistribution(base, distribution.transforms, validate_args=False)
    chosen = {name: next(values) for name in _names(distribution)}
    kind: Callable[..., Distribution] = type(distribution)
    return kind(**chosen, validate_args=False)


def _names(distribution: Distribution) -> list[str]:
    kind: Callable[..., Distribution] = type(distribution)
    names = _constructor_names(kind)
    try:
        constraints = distribution.arg_constraints
    except NotImplementedError:  # torch's default
        constraints = {}
    known = [name for name in names if name in constraints]
    if not known:
        raise TypeError(f"{type(distribution).__name__} does not say in arg_constraints what it is made from")
    return known


@cache
def _constructor_names(cls: Callable[..., Distribution]) -> list[str]:
    """The constructor's arguments, of which those that may be left out say what another one says."""
    arguments = inspect.signature(cls).parameters.items()
    return [name for name, argument in arguments if argument.default is not None or name in _TAKEN]
