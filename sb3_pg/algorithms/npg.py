"""Natural policy gradient."""

from collections.abc import Mapping
from typing import Any, ClassVar

from stable_baselines3.common.type_aliases import Schedule

from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.natural_gradient import NaturalGradient

_OF_LINE_SEARCH = ("line_search_shrinking_factor", "line_search_max_iter", "line_search_accept_ratio")


class NPG(NaturalGradient):
    r"""The whole step along the natural gradient.

    .. math:: \theta \leftarrow \theta + \alpha\, (F + c I)^{-1} \nabla L(\theta), \qquad
              \alpha = \sqrt{\frac{2 \delta}{\nabla L^T (F + c I)^{-1} \nabla L}}
              \;\text{or a constant}

    Source: Kakade (2001), section 2; the length that the KL allows: Rajeswaran et al. (2017), eq. 5 (whose delta is
    2 delta here). The realized KL is near ``target_kl`` as far as the quadratic model holds; TRPO, which is NPG with a
    line search, makes sure of it.

    ``step="fixed"`` is the slides' form: alpha is then a rate, for advantages of unit size where
    ``normalize_advantage`` is on. L is the mean over steps, of complete episodes as of segments, as F is. A step after
    which KL or gain are not finite is taken back.

    :param args: see :class:`~sb3_pg.algorithms.natural_gradient.NaturalGradient`; those of sb3_contrib's TRPO
    :param step: "kl": alpha from ``target_kl``; "fixed": alpha is ``step_size``
    :param step_size: alpha of "fixed": a number, ``"lin_0.1"``, or a function of the remaining progress
    :param kwargs: likewise
    :raises ValueError: an argument out of range, or arguments that contradict each other
    :raises TypeError: an argument of the wrong type, or an unknown one
    """

    checks: ClassVar[Mapping[str, arg.Check]] = {
        **NaturalGradient.checks,
        "step": arg.choice("kl", "fixed"),
        "step_size": arg.schedule(),
    }
    tolerated: ClassVar[frozenset[str]] = NaturalGradient.tolerated | {*_OF_LINE_SEARCH, "target_kl"}

    def __init__(self, *args: Any, step: str = "kl", step_size: float | str | Schedule = 0.1, **kwargs: Any) -> None:
        self.step = step
        self.step_size = step_size
        super().__init__(*args, **kwargs)

    def _without_effect(self) -> dict[str, str]:
        unused = super()._without_effect() | dict.fromkeys(_OF_LINE_SEARCH, "NPG, which has no line search")
        if self.step == "kl":
            return unused | {"step_size": "step='kl': give step='fixed'"}
        return unused | {"target_kl": "step='fixed': give step='kl'"}

    def _step_length(self, curvature: float, gradient_norm: float) -> float:
        if self.step == "kl":
            return super()._step_length(curvature, gradient_norm)
        return self._now("step_size") * gradient_norm

    def _line_search(self) -> dict[str, Any]:
        return {"accept_ratio": None, "max_iter": 1}
