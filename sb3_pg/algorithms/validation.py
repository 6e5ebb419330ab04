"""Checks of constructor arguments, and tables of arguments with their default, check and documentation.

The error of a check names the argument, its value and what is allowed. A :class:`Group` is a table of arguments. An
algorithm's constructor lists only the arguments that may be given by position or that have a default of their own. It
takes the others from its groups. :func:`documented` puts all of them into the class's signature and docstring.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from os import PathLike
from typing import Any, TypeVar, get_args, get_type_hints

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium.vector import VectorEnv
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule, TrainFrequencyUnit
from stable_baselines3.common.utils import FloatSchedule, LinearSchedule, get_device
from stable_baselines3.common.vec_env import VecEnv

from sb3_pg.algorithms.suggestions import REMOVED, suggestion

Check = Callable[[str, Any], None]
#: An env, a vectorized env (of SB3 or Gymnasium), or the id of a registered env.
EnvLike = GymEnv | VectorEnv | str
ClassT = TypeVar("ClassT", bound=type)
#: Largest number of PyTorch's single precision.
LARGEST = float(th.finfo(th.float32).max)
#: Largest number of PyTorch's integers.
LARGEST_INTEGER = th.iinfo(th.int64).max


def is_number(value: Any) -> bool:
    """Whether a value is a real number, and not True or False, which Python counts as numbers."""
    return isinstance(value, Real) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """Return numbers of NumPy, Fractions and the like as Python's int and float, also in lists, tuples and dicts.

    :param value: any value; what is no number is returned as it is. A number that is too large for its type is infinite
    """
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    if type(value) is dict:
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, np.bool_):
        return bool(value)
    if not is_number(value):
        return value
    if isinstance(value, Integral) and abs(int(value)) <= LARGEST_INTEGER:
        return int(value)
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _checked(types: type | tuple[type, ...], accepts: Callable[[Any], bool], allowed: str, optional: bool) -> Check:
    """Return a check for a value of some types.

    :param types: allowed types
    :param accepts: whether a value of these types is in range
    :param allowed: what is allowed, for the error message
    :param optional: whether None is allowed too
    """

    def check(name: str, value: Any) -> None:
        if value is None and optional:
            return
        is_bool = isinstance(value, bool) and types in (Real, Integral)  # Python counts it as a number
        if is_bool or not isinstance(value, types):
            raise TypeError(_message(name, value, allowed, optional))
        if not accepts(value):
            raise ValueError(_message(name, value, allowed, optional))

    return check


def real(low: float, high: float = math.inf, *, optional: bool = False) -> Check:
    """Return a check for a finite number in [low, high], of single precision."""
    allowed = f"a number in [{low}, {high}]" if math.isfinite(high) else f"a finite number of at least {low}"
    in_range = _checked(Real, lambda value: low <= value <= high and value < math.inf, allowed, optional)
    return _then_at_most(LARGEST, f"{LARGEST:.2g}", in_range)


def positive(*, optional: bool = False) -> Check:
    """Return a check for a finite number above 0."""
    number = real(0, optional=optional)

    def check(name: str, value: Any) -> None:
        number(name, value)
        if value == 0:
            raise ValueError(_message(name, value, "a finite number above 0", optional))

    return check


def fraction(name: str, value: Any) -> None:
    """Check that a value is a number above 0 and below 1."""
    real(0, 1)(name, value)
    if value in (0, 1):
        raise ValueError(_message(name, value, "a number in (0, 1)", False))


def integer(low: int, high: int = LARGEST_INTEGER, *, optional: bool = False) -> Check:
    """Return a check for a whole number of at least ``low``, and at most ``high``."""
    in_range = _checked(Integral, lambda value: value >= low, f"a whole number of at least {low}", optional)
    return _then_at_most(high, str(high), in_range)


def _then_at_most(high: float, text: str, check: Check) -> Check:
    """Return a check with an upper limit of its own, which is that of torch or NumPy.

    :param high: the limit
    :param text: the limit in the error message
    :param check: check of everything else, which is called first
    """

    def check_both(name: str, value: Any) -> None:
        check(name, value)
        if value is not None and value > high:
            raise ValueError(f"{name} must be at most {text}, got {value!r}")

    return check_both


def choice(*names: str, optional: bool = False) -> Check:
    """Return a check for one of these strings."""
    return _checked(str, lambda value: value in names, f"one of {list(names)}", optional)


def unless(*values: Any, check: Check) -> Check:
    """Return a check that accepts these values, and all values that another check accepts."""

    def check_others(name: str, value: Any) -> None:
        if not any(value is allowed or (isinstance(value, float) and value == allowed) for allowed in values):
            check(name, value)

    return check_others


def instance(*types: type, optional: bool = False) -> Check:
    """Return a check for an object of one of these types."""
    return _checked(types, lambda _: True, " or ".join(t.__name__ for t in types), optional)


def schedule(*, optional: bool = False, above_0: bool = False) -> Check:
    """Return a check for a schedule: a number from 0 up, ``"lin_1e-3"``, or a function of the remaining progress."""

    def check(name: str, value: Any) -> None:
        if value is None and optional:
            return
        start = to_schedule(value, name)(1.0)
        if above_0 and not start > 0:
            raise ValueError(_message(name, value, "above 0 at the start", optional))

    return check


def policy(name: str, value: Any) -> None:
    """Check that a value is a policy's name, or a subclass of SB3's ActorCriticPolicy that is not recurrent."""
    if isinstance(value, str):
        return
    if not (inspect.isclass(value) and issubclass(value, ActorCriticPolicy)):
        raise TypeError(_message(name, value, "a name or a subclass of SB3's ActorCriticPolicy", False))
    if issubclass(value, RecurrentActorCriticPolicy):
        raise ValueError(
            f"{name} must not be recurrent, got {value!r}: give memory='lstm' with policy='MlpPolicy', 'CnnPolicy' or "
            "'MultiInputPolicy' instead"
        )


def require_keywords(name: str, cls: Any, keywords: Mapping[str, Any]) -> None:
    """Require keyword arguments that a class takes.

    :param name: the argument that holds them, for the error message
    :param cls: the class; one that hands on all keywords is not checked
    :param keywords: name -> value
    :raises TypeError: the class has no argument of a name
    """
    parameters = inspect.signature(cls).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    unknown = [key for key in keywords if key not in parameters]
    if unknown:
        raise TypeError(f"{name} must have names among {list(parameters)}, got {unknown[0]!r}")


def subclass(base: type, *, optional: bool = True) -> Check:
    """Return a check for a subclass of ``base``; None is allowed if ``optional``."""

    def check(name: str, value: Any) -> None:
        if value is None and optional:
            return
        if not (inspect.isclass(value) and issubclass(value, base)):
            raise TypeError(_message(name, value, f"a subclass of {base.__name__}", optional))

    return check


def callback(name: str, value: Any) -> None:
    """Check that a value is a callback of SB3, a list of callbacks, a function of locals and globals, or None."""
    if isinstance(value, list):
        fits = all(isinstance(one, BaseCallback) for one in value)
    else:
        fits = value is None or isinstance(value, BaseCallback) or (callable(value) and not inspect.isclass(value))
    if not fits:
        allowed = "a BaseCallback, a list of BaseCallbacks, a function of (locals, globals)"
        raise TypeError(_message(name, value, allowed, True))


def log_interval(name: str, value: Any) -> None:
    """Check that a value is a whole number of at least 1, "auto", or None for no log."""
    if not (isinstance(value, str) and value == "auto"):
        _checked(Integral, lambda n: int(n) >= 1, 'a whole number of at least 1, "auto"', True)(name, value)


def nothing(reason: str) -> Check:
    """Return a check for None, whose error states why no other value is allowed."""

    def check(name: str, value: Any) -> None:
        if value is not None:
            raise ValueError(f"{name} must be None, got {value!r}: {reason}")

    return check


def train_freq(name: str, value: Any) -> None:
    """Check that a value is a number of steps per env, ``(n, "step")``, ``(n, "episode")`` or SB3's TrainFreq.

    :raises ValueError: any other value. SB3's off-policy algorithms raise ValueError for wrong types too
    """
    given = value if isinstance(value, tuple | list) else (value, "step")
    if len(given) != 2:
        raise ValueError(_message(name, value, 'n, (n, "step") or (n, "episode")', False))
    unit = given[1].value if isinstance(given[1], TrainFrequencyUnit) else given[1]
    try:
        integer(1)(f"{name}[0]", given[0])
        choice("step", "episode")(f"{name}[1]", unit)
    except TypeError as error:
        raise ValueError(str(error)) from error


def device(name: str, value: Any) -> None:
    """Check that a value is a PyTorch device of this machine, or ``"auto"``. As in SB3, "cuda" may be the CPU."""
    if not isinstance(value, str | th.device):
        raise TypeError(_message(name, value, 'a torch.device, "auto", "cpu", "cuda", ...', False))
    try:
        chosen = get_device(value)
        if chosen.type != "cpu":
            th.zeros(1, device=chosen).item()
    except Exception as error:  # its class depends on the device
        here = 'a device of this machine: "auto", "cpu", "cuda", "cuda:0", ...'
        raise ValueError(f"{_message(name, value, here, False)}: {error}") from error


def check_arguments(values: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    """Check each value that has a check.

    :raises TypeError: a value of the wrong type
    :raises ValueError: a value out of range
    """
    for name, check in checks.items():
        if name in values:
            check(name, values[name])


def require_arguments(
    cls: type, names: Iterable[str], but: Mapping[str, str] | None = None, others: bool = False
) -> None:
    """Require names of arguments of a constructor of ``cls`` or its bases.

    :param cls: the class that is constructed
    :param names: names of arguments that were given
    :param but: names of arguments that ``cls`` refuses -> why
    :param others: whether other names are allowed, unless they are close to that of an argument
    :raises TypeError: a name is not allowed. The message suggests the closest argument
    """
    but = {**REMOVED, **(but or {})}
    known = _argument_names(cls).difference(but)
    for name in names:
        if name in but:
            raise TypeError(f"{cls.__name__} has no argument {name!r}: {but[name]}")
        meant = None if name in known else suggestion(name, known)
        if name not in known and (meant or not others):
            hint = f"did you mean {meant!r}?" if meant else f"it has {sorted(known)}"
            raise TypeError(f"{cls.__name__} has no argument {name!r}; {hint}")


def _argument_names(cls: type) -> set[str]:
    return {
        name
        for init in constructors(cls)
        for name, parameter in inspect.signature(init).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) and name != "self"
    }


def constructors(cls: type) -> Iterator[Callable[..., None]]:
    """Yield the ``__init__`` of ``cls`` and of each base class, without those of SB3."""
    for base in cls.__mro__:
        if "__init__" in vars(base) and base is not object and not base.__module__.startswith("stable_baselines3."):
            yield base.__init__  # type: ignore[misc]


def check_effects(cls: type, values: Mapping[str, Any], unused: Mapping[str, str], tolerated: Collection[str]) -> None:
    """Raise an error, or warn, if an argument without effect was given. One that equals its default was not given.

    :param cls: class that was constructed
    :param values: name of each argument -> value
    :param unused: name of an argument without effect -> why
    :param tolerated: names of arguments that get a warning instead of an error
    :raises ValueError: an argument without effect was given, and it is not in ``tolerated``
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
    """Return an argument's default in each constructor that has the argument."""
    parameters = (inspect.signature(init).parameters.get(name) for init in constructors(cls))
    return [p.default for p in parameters if p is not None and p.default is not inspect.Parameter.empty]


def to_schedule(value: Any, name: str = "learning_rate") -> Schedule:
    """Return a learning rate as a function of the remaining progress, 1 to 0.

    :param value: a number, ``"lin_1e-3"`` (falls linearly to 0), or a function
    :param name: the argument's name, for errors
    :raises TypeError: ``value`` is none of these
    :raises ValueError: a number is negative or not finite, or a string has another form
    """
    allowed = 'a number of at least 0, "lin_<number>", or a function of the remaining progress (1 to 0)'
    if callable(value):
        return CheckedSchedule(name, value)
    value = plain(value)
    if isinstance(value, str):
        kind, _, start = value.partition("_")
        try:
            rate = float(start)
        except ValueError:
            rate = math.nan
        if kind != "lin" or not 0 <= rate <= LARGEST:
            raise ValueError(_message(name, value, allowed, False))
        return LinearSchedule(rate, 0.0, 1.0)
    if not is_number(value):
        raise TypeError(_message(name, value, allowed, False))
    if not 0 <= value <= LARGEST:
        raise ValueError(_message(name, value, allowed, False))
    return FloatSchedule(float(value))


class CheckedSchedule:
    """A schedule that checks what the user's function returns.

    :param name: the argument's name, for errors
    :param function: function of the remaining progress, 1 to 0
    :raises TypeError: the function cannot be called with one value
    """

    def __init__(self, name: str, function: Callable[[float], Any]) -> None:
        self.name, self.function = name, function
        try:
            inspect.signature(function).bind(1.0)
        except TypeError as error:
            raise TypeError(_message(name, function, "a function of the remaining progress (1 to 0)", False)) from error
        except ValueError:  # a function of C has no signature
            pass

    def __call__(self, progress_remaining: float) -> float:
        """Return the function's value.

        :raises ValueError: it is negative or not finite
        :raises TypeError: it is no number, or the function does not take one
        """
        try:
            value = plain(self.function(progress_remaining))
        except TypeError as error:
            allowed = f"a function of the remaining progress (1 to 0), which raises no {error!r}"
            raise TypeError(_message(self.name, self.function, allowed, False)) from error
        if isinstance(value, th.Tensor | np.ndarray) and math.prod(value.shape) == 1:
            value = value.item()
        allowed = f"a function whose values are numbers of at least 0 and at most {LARGEST:.2g}"
        message = f"{self.name} must be {allowed}, got {value!r} at the remaining progress {progress_remaining:g}"
        if not is_number(value):
            raise TypeError(message)
        if not 0 <= value <= LARGEST:
            raise ValueError(message)
        return float(value)

    def __repr__(self) -> str:
        return f"CheckedSchedule({self.name}={self.function!r})"


def _message(name: str, value: Any, allowed: str, optional: bool) -> str:
    return f"{name} must be {allowed}{' or None' if optional else ''}, got {value!r}"


def given(names: Mapping[str, Any]) -> dict[str, Any]:
    """Return a constructor's arguments from its ``locals()``, including those in ``**kwargs`` or ``**unknown``.

    NumPy's numbers become Python's own, see :func:`plain`.

    :param names: ``locals()`` at the constructor's first line
    """
    catch_all = ("kwargs", "unknown")
    arguments = {name: value for name, value in names.items() if name not in ("self", "__class__", *catch_all)}
    for name in catch_all:
        arguments |= names.get(name, {})
    return {name: plain(value) for name, value in arguments.items()}


# -------------------------------------------------------------------- tables of arguments


def split_doc(doc: str) -> tuple[list[str], dict[str, str], list[str]]:
    """Return the lines before the arguments, the ``:param`` blocks by name, and the lines after them."""
    lines = doc.split("\n")
    first = next((i for i, line in enumerate(lines) if line.startswith((":param ", ":raises "))), len(lines))
    blocks: dict[str, str] = {}
    name = ""
    for i in range(first, len(lines)):
        line = lines[i]
        if line.startswith(":param "):
            name = line.removeprefix(":param ").split(":")[0]
            blocks[name] = line
        elif line.startswith("    ") and name:
            blocks[name] += "\n" + line
        else:
            return lines[:first], blocks, lines[i:]
    return lines[:first], blocks, []


@dataclass
class Group:
    """Arguments that belong together.

    :param doc: a ``:param`` text for each argument
    :param arguments: name -> default and check
    :param check: function of a model; raises ValueError if the model's arguments contradict each other
    :param without_effect: function of a model; returns the arguments that have no effect with the model's other
        arguments -> why
    :param tolerated: arguments that give a warning if they have no effect. Other arguments give an error. Scripts for
        SB3's classes, config files and comparisons of several modes set the tolerated ones
    :param refused: arguments of other groups that an algorithm with this group does not take -> their value, and why
    """

    doc: str
    arguments: dict[str, tuple[Any, Check]]
    check: Callable[[Any], None] = lambda _: None
    without_effect: Callable[[Any], dict[str, str]] = lambda _: {}
    tolerated: frozenset[str] = frozenset()
    refused: Mapping[str, tuple[Any, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.texts = split_doc(inspect.cleandoc(self.doc))[1]


#: Arguments that every constructor lists in its signature.
ALWAYS = Group(
    """
    :param policy: "MlpPolicy", "CnnPolicy", "MultiInputPolicy", or a subclass of SB3's ActorCriticPolicy
    :param env: environment, vectorized environment (SB3's or Gymnasium's), or the id of a registered one; None for a
        model that only predicts or gets its env by ``set_env``
    :param learning_rate: step size of ``policy.optimizer``: a number, ``"lin_1e-3"`` (falls linearly to 0), or a
        function of the remaining progress (1 to 0)
    """,
    {
        "policy": (inspect.Parameter.empty, policy),
        "env": (inspect.Parameter.empty, instance(str, gym.Env, VecEnv, VectorEnv, optional=True)),
        "learning_rate": (inspect.Parameter.empty, schedule()),
    },
)


#: Arguments that every algorithm of SB3 has.
SB3 = Group(
    """
    :param use_sde: whether to use generalized state-dependent exploration (gSDE), for Box only
    :param sde_sample_freq: env steps between two draws of the gSDE noise; -1 for one per rollout; needs ``use_sde``
    :param stats_window_size: number of episodes that the logged episode statistics are averaged over
    :param tensorboard_log: folder for TensorBoard logs, None for no logs
    :param policy_kwargs: arguments of the policy's constructor
    :param verbose: 0 for no output, 1 for info messages, 2 for debug messages
    :param seed: seed of the random generators, None for a random one
    :param device: PyTorch device; "auto" for a GPU if there is one
    :param _init_setup_model: whether to build policy and buffer at once
    """,
    {
        "use_sde": (False, instance(bool)),
        "sde_sample_freq": (-1, integer(-1)),
        "stats_window_size": (100, integer(1)),
        "tensorboard_log": (None, instance(str, PathLike, optional=True)),
        "policy_kwargs": (None, instance(dict, optional=True)),
        "verbose": (0, unless(True, False, check=integer(0))),
        "seed": (None, integer(0, 2**32 - 1, optional=True)),
        "device": ("auto", device),
        "_init_setup_model": (True, instance(bool)),
    },
    without_effect=lambda model: {} if model.use_sde else {"sde_sample_freq": "use_sde=False"},
    tolerated=frozenset({"sde_sample_freq"}),
)


def defaults_of(groups: Iterable[Group]) -> dict[str, Any]:
    """Return the defaults of all arguments of some groups, without the arguments that one of the groups refuses."""
    groups = tuple(groups)
    refused = {name for group in groups for name in group.refused}
    merged = {name: default for group in groups for name, (default, _) in group.arguments.items()}
    return {name: default for name, default in merged.items() if name not in refused}


def checks_of(groups: Iterable[Group]) -> dict[str, Check]:
    """Return the checks of all arguments of some groups. If two groups have an argument, the later group's counts."""
    return {name: check for group in groups for name, (_, check) in group.arguments.items()}


def documented(cls: ClassT) -> ClassT:
    """Make ``inspect.signature`` and ``help`` list every argument of an algorithm with its type, default and meaning.

    :param cls: class with ``groups``. Its ``__init__`` ends with ``**kwargs: Unpack[...]``, or lists all arguments and
        ends with ``**unknown``. A ``:param`` line of its docstring replaces the one of the tables
    """
    algorithm: Any = cls
    groups, init = (ALWAYS, *algorithm.groups), algorithm.__init__
    algorithm.checks = checks_of(groups)
    signature = inspect.signature(init)
    parameters = dict(signature.parameters)
    if "kwargs" in parameters:
        (rest,) = get_args(parameters.pop("kwargs").annotation)  # Unpack[...]
        types = get_type_hints(rest)
        for name, default in defaults_of(groups).items():
            if name not in parameters:
                keyword = inspect.Parameter.KEYWORD_ONLY
                parameters[name] = inspect.Parameter(name, keyword, default=default, annotation=types[name])
    init.__signature__ = signature.replace(parameters=list(parameters.values()))
    before, own_lines, after = split_doc(inspect.cleandoc(cls.__doc__ or ""))
    texts = {name: text for group in groups for name, text in group.texts.items()} | own_lines
    cls.__doc__ = "\n".join([*before, *(texts[name] for name in parameters if name in texts), *after])
    return cls
