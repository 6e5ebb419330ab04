"""Noise of a gradient that is a mean of rows: variance, signal-to-noise ratio, noise scale."""

from collections.abc import Iterable
from typing import NamedTuple

import torch as th

from sb3_pg.functional.precision import precise


class GradientDiagnostics(NamedTuple):
    r"""Mean and spread of n gradients :math:`g_i`, taken as independent draws, whose mean is the batch gradient.

    A row is the gradient of an episode, of a part of one, or of a step; the caller chooses. Rows that share a baseline
    or a normalization are slightly dependent, which is not accounted for. Several gradients may be measured together:
    results have shape ``(...)``, one number per gradient; ``()`` for a single gradient.

    :param n_rows: n
    :param mean: :math:`\bar g = \frac1n \sum_i g_i`, the batch gradient, ``(..., n_parameters)``
    :param variance: :math:`s_k^2 = \frac{1}{n-1} \sum_i (g_{i,k} - \bar g_k)^2` of one row, same shape
    :param half_batch_cosine: cosine between the means of the rows with even and with odd index; near 0 where the
        batch is mostly noise, 1 without noise, NaN where a half's mean is 0
    """

    n_rows: int
    mean: th.Tensor
    variance: th.Tensor
    half_batch_cosine: th.Tensor

    @property
    def total_variance(self) -> th.Tensor:
        r"""Trace of one row's covariance, tr Sigma: :math:`\sum_k s_k^2`, unbiased."""
        return self.variance.sum(-1)

    @property
    def batch_variance(self) -> th.Tensor:
        """Total variance of the batch gradient, tr Sigma / n."""
        return self.total_variance / self.n_rows

    @property
    def squared_norm(self) -> th.Tensor:
        r"""Squared length of the true gradient, without the noise's share.

        .. math:: |G|^2 \approx |\bar g|^2 - \operatorname{tr} \Sigma / n

        Source: McCandlish et al. (2018), appendix A.1, the first of eq. A.2 with B_small = 1, B_big = n. The estimate
        is unbiased, so it may be negative where the batch is mostly noise.
        """
        return self.mean.square().sum(-1) - self.batch_variance

    @property
    def signal_to_noise(self) -> th.Tensor:
        r"""Squared signal over noise of the batch gradient; negative where :attr:`squared_norm` is.

        .. math:: |G|^2 / (\operatorname{tr} \Sigma / n)
        """
        return self.squared_norm / self.batch_variance

    @property
    def noise_scale(self) -> th.Tensor:
        r"""The number of rows at which the batch gradient's signal and noise are equal.

        .. math:: B_{simple} = \operatorname{tr} \Sigma / |G|^2

        Source: McCandlish et al. (2018), eq. 2.9. Much smaller batches are mostly noise; much larger ones add little.
        Numerator and denominator are unbiased, their ratio is not: for an accurate value, average each over several
        batches. A negative value, where :attr:`squared_norm` is negative, means too large to be measured with n rows.
        """
        return self.total_variance / self.squared_norm


def gradient_diagnostics(chunks: Iterable[tuple[th.Tensor, th.Tensor]]) -> GradientDiagnostics:
    r"""Statistics of gradients that come in chunks, as :func:`~sb3_pg.functional.episode_gradients` yields them.

    Only one chunk is in memory at a time. Sums are in double precision. The squared deviations M of two chunks, each
    from its own mean, are merged by

    .. math:: M_{ab} = M_a + M_b + \frac{n_a n_b}{n_a + n_b} (\bar g_a - \bar g_b)^2

    Source: Chan, Golub and LeVeque (1979), the pairwise update.

    :param chunks: row indices ``(n,)``, each of 0, 1, ... once in any order, and gradients ``(n, ..., n_parameters)``
    :return: on the gradients' device, double precision (single on MPS, which has no double)
    :raises ValueError: fewer than 2 rows, which have no variance
    """
    counts = [0, 0]  # rows with even and with odd index
    means: list[th.Tensor] = []
    squares = th.zeros(())
    for indices, gradients in chunks:
        rows = precise(gradients)
        if not means:
            means, squares = [rows.new_zeros(rows.shape[1:]) for _ in counts], rows.new_zeros(rows.shape[1:])
        for half in (0, 1):
            part = rows[indices % 2 == half]
            if len(part):
                before, n, mean = counts[half], len(part), part.mean(0)
                shift = mean - means[half]
                squares += (part - mean).square().sum(0) + shift.square() * (before * n / (before + n))
                means[half] += shift * (n / (before + n))
                counts[half] += n
    n_rows = sum(counts)
    if n_rows < 2:
        raise ValueError(f"the variance of a gradient needs at least 2 rows, got {n_rows}")
    even, odd = means
    squares += (even - odd).square() * (counts[0] * counts[1] / n_rows)
    return GradientDiagnostics(
        n_rows=n_rows,
        mean=(counts[0] * even + counts[1] * odd) / n_rows,
        variance=squares / (n_rows - 1),
        half_batch_cosine=(even * odd).sum(-1) / (even.norm(dim=-1) * odd.norm(dim=-1)),
    )
