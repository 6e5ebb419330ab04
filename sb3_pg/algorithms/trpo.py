"""Trust region policy optimization."""

from typing import Any

from sb3_pg.algorithms.natural_gradient import NaturalGradient


class TRPO(NaturalGradient):
    r"""The natural gradient's step, shortened until it keeps to the trust region and to its promise.

    .. math:: \theta \leftarrow \theta + \beta^k s, \qquad \bar D_{KL}(\pi_{old} \,\|\, \pi_\theta) \le \delta, \quad
              L(\theta) - L(\theta_{old}) \ge \eta\, \beta^k\, \nabla L^T s

    Source: Schulman et al. (2015), eq. 14 and appendix C. Direction and whole step s are those of
    :class:`~sb3_pg.algorithms.natural_gradient.NaturalGradient`, from which NPG differs by the line search alone.
    If no step is accepted, theta stays as it was, to the bit, and ``train/step_outcome`` says why.

    A drop-in for :class:`sb3_contrib.TRPO`: every argument in its place, and its zips load. ``target_kl`` is the joint
    KL, of the whole action vector: with d dimensions of a Box or MultiBinary space, sb3_contrib's
    ``target_kl=t, cg_damping=c`` is ``target_kl=d * t, cg_damping=d * c`` here.

    Arguments: :class:`~sb3_pg.algorithms.natural_gradient.NaturalGradient`; beta is ``line_search_shrinking_factor``, k
    less than ``line_search_max_iter``, eta ``line_search_accept_ratio`` (sb3_contrib takes any gain, which is 0).

    :raises ValueError: an argument out of range, or arguments that contradict each other
    :raises TypeError: an argument of the wrong type, or an unknown one
    """

    def _line_search(self) -> dict[str, Any]:
        return {
            "max_kl": self._now("target_kl"),
            "accept_ratio": self.line_search_accept_ratio,
            "shrinking_factor": self.line_search_shrinking_factor,
            "max_iter": self.line_search_max_iter,
        }
