"""Arguments that are given and have no effect: an error or a warning, never silence."""

import inspect
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from sb3_pg.algorithms.validation import constructors


def check_effects(cls: type, values: Mapping[str, Any], unused: Mapping[str, str], tolerated: Collection[str]) -> None:
    """Look for arguments that are given and have no effect. One that equals a default counts as not given.

    :param cls: class that was constructed
    :param values: name -> value
    :param unused: name of an argument without effect -> why
    :param tolerated: names of those that get a warning only
    :raises ValueError: one that is not tolerated is given
    """
    for name, why in unused.items():
        value = values[name]
        if any(value is default or value == default for default in _defaults(cls, name)):
            continue
        message = f"{name}={value!r} has no effect with {why}"
        if name not in tolerated:
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)


def _defaults(cls: type, name: str) -> list[Any]:
    """What an argument is where it is not given, in each constructor that has it."""
    parameters = (inspect.signature(init).parameters.get(name) for init in constructors(cls))
    return [p.default for p in parameters if p is not None and p.default is not inspect.Parameter.empty]
