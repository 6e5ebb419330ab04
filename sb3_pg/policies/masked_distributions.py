"""Distributions over the actions that a mask allows.

They give no number that depends on a masked action: its probability is 0, and its log-prob, which is -inf, is left out
of every sum, so that entropies, divergences and their first and second derivatives are finite.
"""

from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    MultiCategoricalDistribution,
)
from stable_baselines3.common.distributions import Distribution as SB3Distribution
from torch.distributions import Distribution, constraints, kl_divergence, register_kl


class MaskedCategorical(Distribution):
    r"""Categorical distribution over the choices that a mask m allows.

    .. math:: \pi(a) = \frac{m_a\, e^{z_a}}{\sum_b m_b\, e^{z_b}}, \qquad
              H = -\sum_{a: m_a = 1} \pi(a) \log \pi(a)

    Source: Huang and Ontanon (2022), "A Closer Look at Invalid Action Masking in Policy Gradient Algorithms". (They
    replace masked logits by -1e8, which leaves them in sums.)

    :param logits: z, ``(..., n)``
    :param mask: m, bool, the same shape; at least one True per row
    :param validate_args: whether torch checks the arguments; None for its default
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "logits": constraints.real_vector,
        "mask": constraints.independent(constraints.boolean, 1),
    }

    def __init__(self, logits: th.Tensor, mask: th.Tensor, validate_args: bool | None = None) -> None:
        self.logits, self.mask = logits, mask
        #: log pi(a), -inf where it is masked
        self.log_probs = logits.masked_fill(~mask, -th.inf).log_softmax(-1)
        super().__init__(logits.shape[:-1], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Any:
        """The choices."""
        return constraints.integer_interval(0, self.logits.shape[-1] - 1)

    @property
    def probs(self) -> th.Tensor:
        """pi(a), 0 where it is masked."""
        return self.log_probs.exp()

    @property
    def finite_log_probs(self) -> th.Tensor:
        """Log pi(a), 0 where it is masked."""
        return self.log_probs.masked_fill(~self.mask, 0.0)

    @property
    def mode(self) -> th.Tensor:
        """The most likely choice."""
        return self.log_probs.argmax(-1)

    def sample(self, sample_shape: Any = ()) -> th.Tensor:
        """Draw choices.

        :param sample_shape: number of draws per row
        """
        shape = th.Size(sample_shape)
        with th.no_grad():
            rows = self.probs.reshape(-1, self.logits.shape[-1])
            drawn = th.multinomial(rows, shape.numel(), replacement=True)
            return drawn.T.reshape(shape + self.batch_shape)

    def log_prob(self, value: th.Tensor) -> th.Tensor:
        """Return log pi(value), nats; -inf if it is masked."""
        pair: tuple[th.Tensor, ...] = th.broadcast_tensors(value.long().unsqueeze(-1), self.log_probs)
        chosen, log_probs = pair
        return log_probs.gather(-1, chosen[..., :1]).squeeze(-1)

    def entropy(self) -> th.Tensor:
        """H, nats."""
        return -(self.probs * self.finite_log_probs).sum(-1)


class MaskedBernoulli(Distribution):
    r"""Bits. A mask may forbid one of the two values of each.

    A bit whose both values are allowed is 1 with probability :math:`\sigma(l)`.

    :param logits: l, ``(..., n)``
    :param mask: bool, ``(..., n, 2)``: of each bit whether 0, and whether 1 is allowed; at least one of both
    :param validate_args: whether torch checks the arguments; None for its default
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "logits": constraints.real,
        "mask": constraints.independent(constraints.boolean, 1),
    }
    support = constraints.boolean

    def __init__(self, logits: th.Tensor, mask: th.Tensor, validate_args: bool | None = None) -> None:
        self.logits, self.mask = logits, mask
        both = th.stack((th.zeros_like(logits), logits), -1)
        #: the same distribution, with the choices 0 and 1
        self.choices = MaskedCategorical(both, mask, validate_args=False)
        super().__init__(logits.shape, validate_args=validate_args)

    @property
    def probs(self) -> th.Tensor:
        """Probability of 1."""
        return self.choices.probs[..., 1]

    @property
    def mode(self) -> th.Tensor:
        """The more likely value of each bit."""
        return self.choices.mode.to(self.logits.dtype)

    def sample(self, sample_shape: Any = ()) -> th.Tensor:
        """Draw bits.

        :param sample_shape: number of draws per row
        """
        return self.choices.sample(sample_shape).to(self.logits.dtype)

    def log_prob(self, value: th.Tensor) -> th.Tensor:
        """Log-prob of each bit, nats; -inf if it is masked."""
        return self.choices.log_prob(value)

    def entropy(self) -> th.Tensor:
        """Entropy of each bit, nats."""
        return self.choices.entropy()


def _kl_masked_categorical(p: MaskedCategorical, q: MaskedCategorical) -> th.Tensor:
    """Sum over the choices that p allows; infinite if q does not allow all of them."""
    terms = p.probs * (p.finite_log_probs - q.finite_log_probs)
    return terms.masked_fill(p.mask & ~q.mask, th.inf).sum(-1)


def _kl_masked_bernoulli(p: MaskedBernoulli, q: MaskedBernoulli) -> th.Tensor:
    return kl_divergence(p.choices, q.choices)


_register_kl: Any = register_kl  # it has no types
_register_kl(MaskedCategorical, MaskedCategorical)(_kl_masked_categorical)
_register_kl(MaskedBernoulli, MaskedBernoulli)(_kl_masked_bernoulli)


def mask_distribution(distribution: SB3Distribution, mask: th.Tensor, nothing_is_all: bool = False) -> SB3Distribution:
    """Restrict an action distribution of SB3's, in place, to the actions that a mask allows.

    Its log-probs, entropy, mode and samples are then those of the masked distribution.

    :param distribution: as the policy has just made it
    :param mask: ``(n_samples, n_masks)``, other than 0 where a choice is allowed; see :mod:`sb3_pg.action_masks`
    :param nothing_is_all: whether a mask that allows no choice in some dimension allows all of it, instead of giving
        NaN. Masks of last states may be such
    :return: the same object
    :raises ValueError: actions of this distribution have no masks
    """
    held: Any = getattr(distribution, "distribution", None)
    allowed = mask.bool().flatten(1)
    masked: Any

    def usable(part: th.Tensor) -> th.Tensor:
        return part | ~part.any(-1, keepdim=True) if nothing_is_all else part

    if isinstance(distribution, MultiCategoricalDistribution):
        parts = allowed.split([int(n) for n in distribution.action_dims], 1)
        masked = [MaskedCategorical(one.logits, usable(part)) for one, part in zip(held, parts, strict=True)]
    elif isinstance(distribution, CategoricalDistribution):
        masked = MaskedCategorical(held.logits, usable(allowed))
    elif isinstance(distribution, BernoulliDistribution):
        masked = MaskedBernoulli(held.logits, usable(allowed.unflatten(1, (-1, 2))))
    else:
        raise ValueError(f"masks are for Discrete, MultiDiscrete and MultiBinary, got {type(distribution).__name__}")
    distribution.distribution = masked
    return distribution
