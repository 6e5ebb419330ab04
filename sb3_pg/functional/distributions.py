"""Action distributions: their parameters, the same distribution with other parameters, and their divergence."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch as th
from torch.distributions import Distribution, Independent, TransformedDistribution, kl_divergence

#: Chosen if a constructor takes one of several equivalent parameters: its entries are independent of each other.
_PREFERRED = ("logits", "scale_tril")


def distribution_parameters(distribution: Distribution | Sequence[Distribution]) -> list[th.Tensor]:
    """Parameters of a distribution, such as loc and scale, or logits, with their graph.

    :param distribution: a distribution of torch's whose arguments are all tensors, or one such per action dimension
    :return: tensors whose leading axes are the batch's
    :raises TypeError: the distribution's class does not list its parameters in ``arg_constraints``
    """
    return [
        getattr(part, name) for whole in _listed(distribution) for part in [_innermost(whole)] for name in _names(part)
    ]


def with_parameters(
    distribution: Distribution | Sequence[Distribution], parameters: Sequence[th.Tensor]
) -> list[Distribution]:
    """Distributions of the same kind with other parameters.

    :param distribution: a distribution of torch's whose arguments are all tensors, or one such per action dimension
    :param parameters: in the order of :func:`distribution_parameters`, of any batch size
    :return: one distribution per action dimension, or a single one
    :raises TypeError: the distribution's class does not list its parameters in ``arg_constraints``
    """
    values = iter(parameters)
    return [_made(whole, values) for whole in _listed(distribution)]


def joint_kl(old: Distribution | Sequence[Distribution], new: Distribution | Sequence[Distribution]) -> th.Tensor:
    r"""Kullback-Leibler divergence of the whole action vector, at each state.

    .. math:: D_{KL}(\pi_{old}(\cdot|s) \,\|\, \pi_{new}(\cdot|s)) = \sum_d D_{KL}(\pi_{old,d} \,\|\, \pi_{new,d})

    Source: Kullback and Leibler (1951); summed over independent action dimensions, as in Schulman et al. (2015),
    appendix C. (The slides print it with the two policies exchanged.)

    :param old: distribution of the actions, batch shape ``(n_samples,)`` or ``(n_samples, n_dimensions)``, or one such
        distribution per dimension
    :param new: same kind and shape as ``old``
    :return: nats, ``(n_samples,)``
    :raises NotImplementedError: torch has no divergence for a pair of distributions
    :raises ValueError: ``old`` and ``new`` have different numbers of distributions
    """
    parts = [kl_divergence(p, q) for p, q in zip(_listed(old), _listed(new), strict=True)]
    return th.stack([part.flatten(1).sum(1) if part.dim() > 1 else part for part in parts]).sum(0)


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
        raise TypeError(f"{type(distribution).__name__} does not list its parameters in arg_constraints")
    return known


@cache
def _constructor_names(cls: Callable[..., Distribution]) -> list[str]:
    """Return the constructor's arguments, and of several equivalent ones only the preferred one."""
    arguments = inspect.signature(cls).parameters.items()
    return [name for name, argument in arguments if argument.default is not None or name in _PREFERRED]
