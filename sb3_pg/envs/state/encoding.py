"""Attributes of objects as plain data, and back.

Plain data is None, bool, int, float, str, bytes, NumPy scalars and arrays, and tuples, lists and dicts of these.
Scalars and arrays stand for themselves. Any other value becomes a tuple that begins with its kind, such as
``("list", [1, 2])`` or ``("pickled", bytes)``. Reading it executes no code, except in the caller's ``unpickle``.
"""

import copyreg
import csv
import io
import logging
import os
import pickle
import random
import time
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import lru_cache, partial
from typing import Any, Final, cast

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils import EzPickle
from gymnasium.wrappers import RecordEpisodeStatistics
from gymnasium.wrappers.vector import RecordEpisodeStatistics as VectorRecordEpisodeStatistics
from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.vec_env import VecMonitor

from sb3_pg import compat
from sb3_pg.envs.adapter import VectorAdapter
from sb3_pg.envs.state import mujoco
from sb3_pg.envs.state.bit_generators import MOST_SEEDS, require_position, set_bit_generator

#: Kind of a monitor file. Its path follows, and then its size in bytes, or the bytes themselves.
RESULTS: Final = "results"
_SCALARS: Final = frozenset({type(None), bool, int, float, str, bytes})
_LEFT_OUT: Final = ("left out",)
_LEFT_OUT_TYPES: Final = (
    *(types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType, partial, type),
    *(EnvSpec, csv.DictWriter, logging.Logger, io.IOBase),
)
#: Packages whose objects draw or write. Those of pygame that can be pickled, such as Rect, may be state.
_LEFT_OUT_PACKAGES: Final = (
    *("pygame", "pyglet", "glfw", "OpenGL", "moderngl", "matplotlib", "tkinter", "cv2", "moviepy"),
    *("_csv", "mujoco.renderer", "mujoco.viewer", "gymnasium.envs.mujoco.mujoco_rendering"),
)
_BIT_GENERATORS: Final = {
    name: getattr(np.random, name) for name in ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
}
_RANDOM_TYPES: Final = (np.random.Generator, np.random.RandomState, random.Random, spaces.Space)
#: Attributes that hold the time when an episode or a file began. What is saved is the time since then.
_CLOCKS: Final[tuple[tuple[type, str, str], ...]] = (
    (Monitor, "t_start", "time"),
    (VecMonitor, "t_start", "time"),
    (VectorAdapter, "_start", "time"),
    (RecordEpisodeStatistics, "episode_start_time", "perf_counter"),
    (VectorRecordEpisodeStatistics, "episode_start_times", "perf_counter"),
)
_NOW: Final = {"time": time.time, "perf_counter": time.perf_counter}


def _are_scalars(values: Iterable[Any]) -> bool:
    return _SCALARS.issuperset(map(type, values))


class CannotSaveError(Exception):
    """An object can be neither copied nor pickled. The message says which, and why."""


def _cannot_save(value: Any, error: Exception) -> CannotSaveError:
    return CannotSaveError(f"has a {type(value).__name__}, which can be neither copied nor pickled ({error})")


class Encoder:
    """Turns objects into plain data. An object that is met twice stays one object.

    :param members: envs and wrappers, which the saved attributes may refer to
    :param with_models: whether numbers in MuJoCo's models are saved
    """

    def __init__(self, members: list[Any], with_models: bool) -> None:
        self._index = {id(member): i for i, member in enumerate(members)}
        self._alive: list[Any] = []
        self._with_models = with_models

    def attributes(self, owner: Any, excluded: Iterable[str]) -> dict[str, Any]:
        """Return the attributes of an env or a wrapper.

        :param owner: the env or wrapper
        :param excluded: names of attributes that are not saved
        :raises CannotSaveError: an attribute can be neither copied nor pickled
        """
        kind: Any = type(owner)
        (clock, now), encoded, name = _clock(kind), {}, ""
        with self._all_or_nothing():
            try:
                for name, value in vars(owner).items():
                    if name not in excluded:
                        encoded[name] = ("clock", now, _NOW[now]() - value) if name == clock else self.encode(value)
            except CannotSaveError as error:
                raise CannotSaveError(f"{kind.__name__}.{name} {error}") from error
            except RecursionError as error:
                raise CannotSaveError(f"{kind.__name__}.{name} has too many objects inside each other") from error
        return encoded

    def own_state(self, state: Any) -> Any:
        """Return as plain data what an env's ``get_state()`` has returned.

        :raises CannotSaveError: it can be neither copied nor pickled
        """
        self._alive.append(state)  # an id belongs to one object only as long as it lives
        with self._all_or_nothing():
            return self.encode(state)

    def random_states(self, owner: Any) -> dict[str, Any]:
        """Return the attributes of an env or a wrapper that are random generators or spaces.

        :param owner: the env or wrapper
        """
        return {name: self.encode(value) for name, value in vars(owner).items() if isinstance(value, _RANDOM_TYPES)}

    def encode(self, value: Any) -> Any:
        """Return a value as plain data, which shares no memory with it.

        :param value: of any type
        :raises CannotSaveError: it can be neither copied nor pickled
        """
        kind: Any = type(value)
        if kind in _SCALARS:
            return value
        index = self._index.get(id(value))
        if index is not None:
            return ("same", index)
        encoder = _ENCODERS.get(kind) or _encoder(kind)
        return encoder(self, value)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Context that forgets the objects that the encoder has met in it, if there is an error."""
        known = dict(self._index)
        try:
            yield
        except BaseException:
            self._index = known
            raise

    def _register(self, value: Any) -> None:
        self._index[id(value)] = len(self._index)

    # ---------------------------------------------------------------- one method a kind of value

    def _left_out(self, value: Any) -> Any:
        return _LEFT_OUT

    def _scalar(self, value: Any) -> Any:
        return value

    def _array(self, value: np.ndarray) -> Any:
        memory: Any = value
        while isinstance(memory.base, np.ndarray):
            memory = memory.base
        if memory.dtype.hasobject:
            return self._pickled(value)
        encoded: Any
        if memory.base is not None:  # the memory of another library, such as MuJoCo
            encoded = ("foreign", value.copy(order="K"))
        elif memory is value:
            encoded = value.copy(order="K")
        else:
            whole = self.encode(memory)
            offset = value.__array_interface__["data"][0] - memory.__array_interface__["data"][0]
            encoded = ("view", whole, value.dtype, offset, value.shape, value.strides)
        self._register(value)
        return encoded

    def _items(self, values: Iterable[Any]) -> list[Any]:
        values = list(values)
        return values if _are_scalars(values) else [self.encode(value) for value in values]

    def _list(self, value: list[Any]) -> Any:
        self._register(value)
        return ("list", self._items(value))

    def _tuple(self, value: tuple[Any, ...]) -> Any:
        return ("tuple", self._items(value))

    def _set(self, value: set[Any]) -> Any:
        self._register(value)
        return ("set", self._items(value))

    def _frozenset(self, value: frozenset[Any]) -> Any:
        return ("frozenset", self._items(value))

    def _deque(self, value: deque[Any]) -> Any:
        self._register(value)
        return ("deque", value.maxlen, self._items(value))

    def _dict(self, value: dict[Any, Any]) -> Any:
        self._register(value)
        return (type(value).__name__, self._items(value), self._items(value.values()))

    def _generator(self, value: np.random.Generator) -> Any:
        bits: Any = value.bit_generator
        if type(bits).__name__ not in _BIT_GENERATORS:
            return self._pickled(value)
        self._register(value)
        seeds = bits.seed_seq
        known = None
        if type(seeds) is np.random.SeedSequence and isinstance(seeds.entropy, int):
            known = {
                "entropy": seeds.entropy,
                "spawn_key": tuple(map(int, seeds.spawn_key)),
                "pool_size": seeds.pool_size,
                "n_children_spawned": seeds.n_children_spawned,
            }
        return ("generator", bits.state, known)

    def _random_state(self, value: np.random.RandomState) -> Any:
        self._register(value)
        return ("random_state", value.get_state(legacy=False))

    def _random(self, value: random.Random) -> Any:
        self._register(value)
        return ("random", value.getstate())

    def _space(self, value: spaces.Space[Any]) -> Any:
        self._register(value)
        return ("space", [self.encode(compat.generator_of_space(space)) for space in _with_subspaces(value)])

    def _enum(self, value: Enum) -> Any:
        if type(value).__members__.get(value.name) is not value:  # several flags at once
            return self._pickled(value)
        return ("enum", *_reference(cast(Any, type(value))), value.name)

    def _results(self, value: ResultsWriter) -> Any:
        file = value.file_handler
        return _LEFT_OUT if file.closed else (RESULTS, os.path.realpath(file.name), os.fstat(file.fileno()).st_size)

    def _mujoco_data(self, value: Any) -> Any:
        self._register(value)
        refusal = mujoco.why_not_saved(value)
        if refusal:
            raise CannotSaveError(refusal)
        return ("mujoco_data", *mujoco.get_data(value))

    def _mujoco_model(self, value: Any) -> Any:
        self._register(value)
        return ("mujoco_model", mujoco.get_model(value) if self._with_models else {})

    def _object(self, value: Any) -> Any:
        attributes = _plain_attributes(value)
        if attributes is None:
            return self._pickled(value)
        self._register(value)
        self._alive.append(attributes)  # __getstate__ may have made the dict for this call
        encoded = {name: self.encode(item) for name, item in attributes.items()}
        return ("object", *_reference(cast(Any, type(value))), encoded)

    def _drawing(self, value: Any) -> Any:
        try:
            return self._pickled(value)
        except CannotSaveError:
            return _LEFT_OUT

    def _pickled(self, value: Any) -> Any:
        buffer = io.BytesIO()
        try:
            _Pickler(buffer, self._index).dump(value)
        except CannotSaveError:
            raise
        except Exception as error:
            raise _cannot_save(value, error) from error
        self._register(value)
        return ("pickled", buffer.getvalue())


class _Pickler(pickle.Pickler):
    """Refuses an object inside a pickle that another attribute refers to: the copies would be two objects."""

    def __init__(self, buffer: io.BytesIO, known: dict[int, int]) -> None:
        super().__init__(buffer)
        self._known = known

    def persistent_id(self, obj: Any) -> None:
        if isinstance(obj, gym.Env) or id(obj) in self._known:
            raise CannotSaveError(f"can only be pickled, and shares a {type(obj).__name__} with other attributes")


_ENCODERS: Final[dict[type, Callable[[Encoder, Any], Any]]] = {
    np.ndarray: Encoder._array,
    list: Encoder._list,
    tuple: Encoder._tuple,
    dict: Encoder._dict,
    OrderedDict: Encoder._dict,
    set: Encoder._set,
    frozenset: Encoder._frozenset,
    deque: Encoder._deque,
    np.random.Generator: Encoder._generator,
    np.random.RandomState: Encoder._random_state,
    random.Random: Encoder._random,
}


@lru_cache(maxsize=1024)
def _encoder(kind: Any) -> Callable[[Encoder, Any], Any]:
    """Return the method that encodes values of a type that is not in ``_ENCODERS``."""
    if issubclass(kind, (io.StringIO, io.BytesIO)):
        return Encoder._pickled
    if issubclass(kind, _LEFT_OUT_TYPES):
        return Encoder._left_out
    module = str(getattr(kind, "__module__", ""))  # some types of C have none
    package = next((name for name in _LEFT_OUT_PACKAGES if f"{module}.".startswith(f"{name}.")), None)
    if package is not None:
        return Encoder._drawing if package == "pygame" else Encoder._left_out
    if issubclass(kind, spaces.Space):
        return Encoder._space
    if issubclass(kind, Enum):
        return Encoder._enum
    if issubclass(kind, ResultsWriter):
        return Encoder._results
    if issubclass(kind, np.dtype):  # arrays have one too
        return Encoder._scalar
    if issubclass(kind, np.generic):
        return Encoder._pickled if issubclass(kind, (np.void, np.object_)) else Encoder._scalar
    of_mujoco = {"MjData": Encoder._mujoco_data, "MjModel": Encoder._mujoco_model}
    if module.startswith("mujoco.") and kind.__name__ in of_mujoco:
        return of_mujoco[kind.__name__]
    return Encoder._object


@lru_cache(maxsize=1024)
def _clock(kind: Any) -> tuple[str, str]:
    """Return the attribute that holds a start time, and the name of the clock; both are empty if there is none."""
    return next(((name, now) for base, name, now in _CLOCKS if issubclass(kind, base)), ("", ""))


@lru_cache(maxsize=1024)
def _reference(kind: Any) -> tuple[str, bytes]:
    """Return a class's name and its pickle, which is empty if a class cannot be imported by its name."""
    try:
        pickled = pickle.dumps(kind)
    except (pickle.PicklingError, AttributeError):
        pickled = b""
    return f"{kind.__module__}.{kind.__qualname__}", pickled


def _plain_attributes(value: Any) -> dict[str, Any] | None:
    """Return an object's attributes if they are all that it consists of, otherwise None.

    :raises CannotSaveError: it cannot be pickled
    """
    if isinstance(value, (gym.Env, EzPickle)):  # EzPickle pickles the arguments of the constructor only
        return vars(value)
    try:
        reduced = value.__reduce_ex__(2)
    except Exception as error:
        raise _cannot_save(value, error) from error
    if not isinstance(reduced, tuple) or hasattr(value, "__setstate__"):
        return None
    function, arguments, attributes = (*reduced, None)[:3]
    is_made_empty = function is type(value) and arguments == () and attributes is not None
    is_made_by_new = function is getattr(copyreg, "__newobj__") and len(arguments) == 1  # noqa: B009
    if not (is_made_empty or is_made_by_new) or any(item is not None for item in reduced[3:]):
        return None
    if attributes is None:
        return {}
    return attributes if type(attributes) is dict and hasattr(value, "__dict__") else None


def _has_plain_attributes(kind: Any) -> bool:
    """Whether :class:`Encoder` may store an object of this class as its attributes."""
    encoder = _ENCODERS.get(kind) or _encoder(kind)
    own_form = hasattr(kind, "__setstate__") and not issubclass(kind, (gym.Env, EzPickle))
    return encoder is Encoder._object and not own_form


def hides_method(kind: type, name: Any) -> bool:
    """Return whether an attribute of an object would take the place of something that its class has.

    :param kind: the object's class
    :param name: name of the attribute
    """
    is_special = type(name) is not str or (name.startswith("__") and name.endswith("__"))
    return is_special or callable(getattr(kind, name, None))


def _with_subspaces(space: spaces.Space[Any]) -> Iterator[spaces.Space[Any]]:
    """Yield a space and all spaces inside it."""
    yield space
    for value in vars(space).values():
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        for subspace in inside:
            if isinstance(subspace, spaces.Space):
                yield from _with_subspaces(subspace)


class Decoder:
    """Turns plain data of :class:`Encoder` into objects.

    :param members: envs and wrappers, in the order that the encoder had them in
    :param unpickle: loads what could only be pickled
    """

    def __init__(self, members: list[Any], unpickle: Callable[[bytes], Any]) -> None:
        self._objects = list(members)
        self._filled: set[int] = set()
        self._unpickle = unpickle

    def set_attributes(self, owner: Any, encoded: dict[str, Any]) -> None:
        """Replace attributes by saved ones.

        :param owner: the object
        :param encoded: as :meth:`Encoder.attributes` returns them
        :raises ValueError: one would take the place of a method
        """
        attributes = vars(owner)
        for name, item in encoded.items():
            if type(item) is not tuple or item[0] != "left out":
                if name not in attributes and hides_method(type(owner), name):
                    raise ValueError(f"a saved attribute must not take the place of {type(owner).__name__}.{name}")
                attributes[name] = self.decode(item, attributes.get(name))

    def decode(self, item: Any, old: Any = None) -> Any:
        """Return the value of plain data.

        :param item: as :meth:`Encoder.encode` returns it
        :param old: the value that it replaces. Objects, spaces and memory of other libraries are changed in place
        """
        kind = type(item)
        if kind in _SCALARS:
            return item
        if kind is tuple:
            return _DECODERS[item[0]](self, old, *item[1:])
        if kind is np.ndarray:
            return self._new(item.copy(order="K"))
        return item

    def _new(self, value: Any) -> Any:
        self._objects.append(value)
        return value

    def _items(self, items: list[Any], old: Any = None) -> list[Any]:
        if _are_scalars(items):
            return list(items)
        olds = old if isinstance(old, (list, tuple)) and len(old) == len(items) else [None] * len(items)
        return [self.decode(item, before) for item, before in zip(items, olds, strict=True)]

    # ---------------------------------------------------------------- one method a kind of value

    def _left_out(self, old: Any) -> Any:
        return old

    def _same(self, old: Any, index: int) -> Any:
        return self._objects[index]

    def _clock(self, old: Any, now: str, elapsed: Any) -> Any:
        return _NOW[now]() - elapsed

    def _foreign(self, old: Any, array: np.ndarray) -> Any:
        in_place = type(old) is np.ndarray and old.base is not None and old.flags.writeable
        if in_place and (old.shape, old.dtype) == (array.shape, array.dtype):
            old[...] = array
            return self._new(old)
        return self._new(array.copy(order="K"))

    def _view(
        self, old: Any, memory: Any, dtype: Any, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> Any:
        whole = self.decode(memory)
        if np.dtype(dtype).hasobject or type(whole) is not np.ndarray or whole.dtype.hasobject:
            raise ValueError(f"dtype of a saved array must not be {dtype}")
        return self._new(np.ndarray(shape, dtype, whole, offset, strides))

    def _list(self, old: Any, items: list[Any]) -> Any:
        new: list[Any] = self._new([])
        new += self._items(items, old)
        return new

    def _tuple(self, old: Any, items: list[Any]) -> Any:
        return tuple(self._items(items, old))

    def _set(self, old: Any, items: list[Any]) -> Any:
        new: set[Any] = self._new(set())
        new.update(self._items(items))
        return new

    def _frozenset(self, old: Any, items: list[Any]) -> Any:
        return frozenset(self._items(items))

    def _deque(self, old: Any, maxlen: int | None, items: list[Any]) -> Any:
        new: deque[Any] = self._new(deque(maxlen=maxlen))
        new.extend(self._items(items, list(old) if isinstance(old, deque) else None))
        return new

    def _dict(self, old: Any, keys: list[Any], values: list[Any], kind: type[dict[Any, Any]] = dict) -> Any:
        new = self._new(kind())
        keys, before = self._items(keys), old if isinstance(old, dict) else {}
        new.update(zip(keys, self._items(values, [before.get(key) for key in keys]), strict=True))
        return new

    def _generator(self, old: Any, state: dict[str, Any], seeds: dict[str, Any] | None) -> Any:
        if seeds is not None and not 0 < seeds["pool_size"] <= MOST_SEEDS:
            raise ValueError(f"pool_size must be in [1, {MOST_SEEDS}], got {seeds['pool_size']}")
        bits = _BIT_GENERATORS[state["bit_generator"]](0 if seeds is None else np.random.SeedSequence(**seeds))
        set_bit_generator(bits, state)
        return self._new(np.random.Generator(bits))

    def _random_state(self, old: Any, state: dict[str, Any]) -> Any:
        new = np.random.RandomState(_BIT_GENERATORS[state["bit_generator"]]())
        require_position(state)
        new.set_state(state)
        return self._new(new)

    def _random(self, old: Any, state: Any) -> Any:
        new = random.Random()
        new.setstate(state)
        return self._new(new)

    def _space(self, old: Any, generators: list[Any]) -> Any:
        self._new(old)
        known = list(_with_subspaces(old)) if isinstance(old, spaces.Space) else [None] * len(generators)
        for space, generator in zip(known, generators, strict=True):
            decoded = self.decode(generator)
            if space is not None:
                compat.set_generator_of_space(space, decoded)
        return old

    def _class(self, old: Any, name: str, pickled: bytes) -> Any:
        if _reference(cast(Any, type(old)))[0] == name:
            return type(old)
        if not pickled:
            raise ValueError(f"the saved env has an object of class {name}, which cannot be imported by this name")
        kind = self._unpickle(pickled)
        if not isinstance(kind, type):
            raise ValueError(f"{name} must be a class, got {kind!r}")
        return kind

    def _enum(self, old: Any, name: str, pickled: bytes, member: str) -> Any:
        kind = self._class(old, name, pickled)
        if not issubclass(kind, Enum):
            raise ValueError(f"{name} must be an Enum")
        return kind[member]

    def _object(self, old: Any, name: str, pickled: bytes, attributes: dict[str, Any]) -> Any:
        kind = self._class(old, name, pickled)
        if not _has_plain_attributes(kind):
            raise ValueError(f"attributes of a {name} must not be saved one by one")
        new = old if type(old) is kind and id(old) not in self._filled else kind.__new__(kind)
        self._filled.add(id(new))
        self._new(new)
        self.set_attributes(new, attributes)
        return new

    def _results(self, old: Any, path: str, content: Any) -> Any:
        if isinstance(old, ResultsWriter) and isinstance(content, bytes):
            file = old.file_handler
            file.seek(0)
            file.truncate()
            file.write(content.decode())
            file.flush()
        return old

    def _mujoco_data(self, old: Any, integration: np.ndarray, names: tuple[str, ...], derived: np.ndarray) -> Any:
        mujoco.set_data(old, integration, names, derived)
        return self._new(old)

    def _mujoco_model(self, old: Any, numbers: dict[str, Any]) -> Any:
        mujoco.set_model(old, numbers)
        return self._new(old)

    def _pickled(self, old: Any, pickled: bytes) -> Any:
        return self._new(self._unpickle(pickled))


_DECODERS: Final[dict[str, Callable[..., Any]]] = {
    "left out": Decoder._left_out,
    "same": Decoder._same,
    "clock": Decoder._clock,
    "foreign": Decoder._foreign,
    "view": Decoder._view,
    "list": Decoder._list,
    "tuple": Decoder._tuple,
    "set": Decoder._set,
    "frozenset": Decoder._frozenset,
    "deque": Decoder._deque,
    "dict": Decoder._dict,
    "OrderedDict": partial(Decoder._dict, kind=OrderedDict),
    "generator": Decoder._generator,
    "random_state": Decoder._random_state,
    "random": Decoder._random,
    "space": Decoder._space,
    "enum": Decoder._enum,
    "object": Decoder._object,
    RESULTS: Decoder._results,
    "mujoco_data": Decoder._mujoco_data,
    "mujoco_model": Decoder._mujoco_model,
    "pickled": Decoder._pickled,
}


def pickles_in(item: Any) -> Iterator[tuple[bytes, bool]]:
    """Yield each pickle in plain data, and True if it is a value, False if it is a class, which may not be needed.

    :param item: as :meth:`Encoder.encode` returns it
    """
    if isinstance(item, dict):
        for value in item.values():
            yield from pickles_in(value)
    elif isinstance(item, (list, tuple)):
        if type(item) is tuple and item[:1] == ("pickled",):
            yield item[1], True
        elif type(item) is tuple and item[:1] in (("object",), ("enum",)) and item[2]:
            yield item[2], False
        for value in item:
            if type(value) not in _SCALARS:
                yield from pickles_in(value)


def with_results(item: Any, replace: Callable[[str, Any], Any]) -> Any:
    """Return plain data in which the content of monitor files is replaced.

    The result of :func:`get_env_state` holds the sizes of the files. If the bytes themselves take their place,
    :func:`set_env_state` writes them into the files of the new env.

    :param item: as :meth:`Encoder.encode` returns it
    :param replace: function of a file's path and of its size or bytes; returns what takes the place of these
    """
    if isinstance(item, dict):
        return {key: with_results(value, replace) for key, value in item.items()}
    if isinstance(item, list):
        return item if _are_scalars(item) else [with_results(value, replace) for value in item]
    if not isinstance(item, tuple):
        return item
    if item[:1] == (RESULTS,) and len(item) == 3:
        return (RESULTS, item[1], replace(item[1], item[2]))
    return item if _are_scalars(item) else tuple(with_results(value, replace) for value in item)
