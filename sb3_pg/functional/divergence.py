"""Distance between two policies."""

from collections.abc import Sequence

import torch as th
from torch.distributions import Distribution, kl_divergence


def joint_kl(old: Distribution | Sequence[Distribution], new: Distribution | Sequence[Distribution]) -> th.Tensor:
    r"""Kullback-Leibler divergence of the whole action vector, at each state.

    .. math:: D_{KL}(\pi_{old}(\cdot|s) \,\|\, \pi_{new}(\cdot|s)) = \sum_d D_{KL}(\pi_{old,d} \,\|\, \pi_{new,d})

    Source: Kullback and Leibler (1951); summed over independent action dimensions, as in Schulman et al. (2015),
    appendix C. (The slides print it with the two policies exchanged.)

    :param old: distribution of the actions, batch shape ``(n_samples,)`` or ``(n_samples, n_dimensions)``, or one such
        distribution per dimension
    :param new: likewise
    :return: nats, ``(n_samples,)``
    :raises NotImplementedError: a pair of distributions that torch knows no divergence of
    :raises ValueError: another number of distributions
    """
    olds = [old] if isinstance(old, Distribution) else list(old)
    news = [new] if isinstance(new, Distribution) else list(new)
    parts = [kl_divergence(p, q) for p, q in zip(olds, news, strict=True)]
    return th.stack([part.flatten(1).sum(1) if part.dim() > 1 else part for part in parts]).sum(0)
