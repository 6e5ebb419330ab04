"""Baselines, which are subtracted from returns to reduce the variance of the policy gradient.

Unbiased: ``none``, ``leave_one_out``, and ``linear`` or ``value`` if they were fitted before this batch. Biased by
O(1/N): ``mean`` (with total returns only a factor 1 - 1/N), ``time``, ``optimal``, and every baseline that is fitted to
the batch it is subtracted from.

A new baseline is a subclass of :class:`Baseline` in a file here, and a line in :data:`BASELINES`.
"""

import inspect
from collections.abc import Mapping
from typing import Any, Final

from gymnasium import spaces

from sb3_pg.baselines.averages import LeaveOneOutBaseline, MeanBaseline, NoBaseline, TimeBaseline
from sb3_pg.baselines.base import Baseline, EpisodeGradients, FitPredict, ForeignBaseline, subtract
from sb3_pg.baselines.linear import LinearBaseline
from sb3_pg.baselines.optimal import OptimalBaseline
from sb3_pg.baselines.value import ValueBaseline

#: name -> class. The algorithm gives the constructor arguments ``per_episode`` and ``observation_space``, and
#: ``baseline_kwargs`` gives all others.
BASELINES: Final[Mapping[str, type[Baseline]]] = {
    "none": NoBaseline,
    "mean": MeanBaseline,
    "leave_one_out": LeaveOneOutBaseline,
    "time": TimeBaseline,
    "optimal": OptimalBaseline,
    "linear": LinearBaseline,
    "value": ValueBaseline,
}


def make_baseline(
    spec: Any,
    kwargs: Mapping[str, Any] | None = None,
    per_episode: bool = False,
    observation_space: spaces.Space[Any] | None = None,
) -> Baseline:
    """Make a baseline from its name or from the user's own object.

    :param spec: a name of ``BASELINES``, a :class:`Baseline`, or an object with ``fit`` and ``predict``
    :param kwargs: arguments of the named baseline's constructor
    :param per_episode: whether a return is one number per episode (total returns)
    :param observation_space: space of the environment's observations, for baselines that use them
    :raises ValueError: an unknown name, an unknown argument of the baseline, or arguments for an object
    :raises TypeError: an object that is neither a baseline nor has ``fit`` and ``predict``
    """
    kwargs = dict(kwargs or {})
    message = f"baseline must be one of {list(BASELINES)} or an object with fit and predict, got {spec!r}"
    if not isinstance(spec, str):
        is_whole = isinstance(spec, Baseline) and type(spec).advantages is not Baseline.advantages
        if inspect.isclass(spec) or not (is_whole or isinstance(spec, FitPredict)):
            raise TypeError(message)
        if kwargs:
            raise ValueError(
                f"baseline_kwargs must be None for a baseline that is an object, got {kwargs} with {spec!r}"
            )
        return spec if is_whole else ForeignBaseline(spec)
    if spec not in BASELINES:
        raise ValueError(message)
    known = inspect.signature(BASELINES[spec]).parameters
    from_the_algorithm = {"per_episode": per_episode, "observation_space": observation_space}
    allowed = [name for name in known if name not in from_the_algorithm]
    unknown = [name for name in kwargs if name not in allowed]
    if unknown:
        raise ValueError(f"baseline_kwargs of {spec!r} must be among {allowed}, got {unknown}")
    return BASELINES[spec](**kwargs, **{name: value for name, value in from_the_algorithm.items() if name in known})


__all__ = [
    "BASELINES",
    "Baseline",
    "EpisodeGradients",
    "FitPredict",
    "ForeignBaseline",
    "LeaveOneOutBaseline",
    "LinearBaseline",
    "MeanBaseline",
    "NoBaseline",
    "OptimalBaseline",
    "TimeBaseline",
    "ValueBaseline",
    "make_baseline",
    "subtract",
]
