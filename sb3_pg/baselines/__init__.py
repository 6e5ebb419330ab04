"""What is subtracted from a return: a better one has a smaller variance, an honest one leaves the mean alone.

Unbiased: ``none``, ``leave_one_out``, and ``linear`` or ``value`` fitted before this batch. Biased by O(1/N):
``mean`` (a mere factor 1 - 1/N with total returns), ``time``, ``optimal``, and anything that is fitted to
the batch it corrects.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from gymnasium import spaces

from sb3_pg.baselines.averages import LeaveOneOutBaseline, MeanBaseline, NoBaseline, TimeBaseline
from sb3_pg.baselines.base import Baseline
from sb3_pg.baselines.linear import LinearBaseline
from sb3_pg.baselines.optimal import OptimalBaseline
from sb3_pg.baselines.value import ValueBaseline

BASELINES: dict[str, Callable[..., Baseline]] = {
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
    """A baseline from its name, or the user's own object.

    :param spec: a name of ``BASELINES``, or an object with ``fit`` and ``predict``
    :param kwargs: arguments of the named baseline's constructor
    :param per_episode: whether a return is one number per episode (total returns)
    :param observation_space: of the environment, for baselines that see the state
    :raises ValueError: unknown name, arguments that the baseline does not have, or arguments for an object
    :raises TypeError: an object without ``fit`` and ``predict``
    """
    kwargs = dict(kwargs or {})
    message = f"baseline must be one of {list(BASELINES)} or an object with fit and predict, got {spec!r}"
    if not isinstance(spec, str):
        if not isinstance(spec, Baseline) or inspect.isclass(spec):
            raise TypeError(message)
        if kwargs:
            raise ValueError(f"baseline_kwargs are for named baselines; {spec!r} is built already")
        return spec
    if spec not in BASELINES:
        raise ValueError(message)
    factory = BASELINES[spec]
    known = inspect.signature(factory).parameters
    from_the_algorithm = {"per_episode": per_episode, "observation_space": observation_space}
    allowed = [name for name in known if name not in (*from_the_algorithm, "args", "kwargs")]
    unknown = [name for name in kwargs if name not in allowed]
    if unknown:
        raise ValueError(f"baseline_kwargs of {spec!r} must be among {allowed}, got {unknown}")
    return factory(**kwargs, **{name: value for name, value in from_the_algorithm.items() if name in known})


__all__ = [
    "BASELINES",
    "Baseline",
    "LeaveOneOutBaseline",
    "LinearBaseline",
    "MeanBaseline",
    "NoBaseline",
    "OptimalBaseline",
    "TimeBaseline",
    "ValueBaseline",
    "make_baseline",
]
