"""Values as JSON: what JSON has no form for is a dict with one key between colons, such as ``{":tuple:": [1, 2]}``.

Objects are written as ``pickle`` writes them: a class by its name, the state, the items. They are read by the rules of
:mod:`sb3_pg.checkpoints.vetted`, so a file can make no others.
"""

import copyreg
from base64 import b64decode, b64encode
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any, Final

import numpy as np
import torch as th

from sb3_pg.checkpoints.safe_pickle import Vetted, named
from sb3_pg.checkpoints.vetted import CALLS, CLASSES, brief, require, resolve

_WORDS: Final = {":tuple:": tuple, ":set:": set, ":frozenset:": frozenset}
_WORD_OF: Final[dict[type, str]] = {kind: word for word, kind in _WORDS.items()}
#: A value of these types may occur twice in a file. Any other value that occurs twice would become two objects.
_IMMUTABLE: Final = (tuple, frozenset, bytes, np.generic, np.dtype, Enum, th.device)


class NotJsonError(TypeError):
    """A value has no form in JSON."""


def import_path(found: Any) -> str | None:
    """Return the ``"module:name"`` from which another process can import a class or function; None if it cannot.

    :param found: the class or function
    """
    name = named(found)
    if found.__module__ == "__main__":
        return None
    try:
        return name if resolve(name) is found else None
    except (ImportError, AttributeError):
        return None


def is_named(value: Any) -> bool:
    """Return whether a value is a class or function, which has a name."""
    return isinstance(value, type | FunctionType | BuiltinFunctionType)


def encode(value: Any) -> Any:
    """Return a value in the form that :func:`decode` reads.

    :param value: the value
    :raises NotJsonError: it holds an object that :mod:`sb3_pg.checkpoints.vetted` does not list, or one object twice
    """
    return _Encoder().encode(value)


class _Encoder:
    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}

    def encode(self, value: Any) -> Any:
        if value is None or type(value) in (bool, int, float, str):
            return value
        if is_named(value):
            return {":class:": self._path(value)}
        if not isinstance(value, _IMMUTABLE):
            if id(value) in self._seen:
                raise NotJsonError(f"{value!r} is held twice")
            self._seen[id(value)] = value
        if type(value) in _ENCODERS:
            return _ENCODERS[type(value)](self, value)
        if isinstance(value, np.generic):
            return _encode_array(np.asarray(value), ":number:")
        return self._encode_object(value)

    def _dict(self, value: dict[Any, Any]) -> Any:
        if all(type(key) is str and not key.startswith(":") for key in value):
            return {key: self.encode(item) for key, item in value.items()}
        return {":dict:": self._pairs(value)}

    def _tensor(self, value: th.Tensor) -> dict[str, Any]:
        if value.requires_grad or value.device.type != "cpu":
            raise NotJsonError("a tensor that is more than its numbers")
        return _encode_array(value.numpy(), ":tensor:")

    def _all(self, values: Any) -> list[Any]:
        return [self.encode(value) for value in values]

    def _pairs(self, items: Mapping[Any, Any]) -> list[Any]:
        return [[self.encode(key), self.encode(item)] for key, item in items.items()]

    def _path(self, found: Any) -> str:
        name = import_path(found)
        if name is None:
            raise NotJsonError(f"{found!r} cannot be imported")
        return name

    def _encode_object(self, value: Any) -> dict[str, Any]:
        reduced = value.__reduce_ex__(4)
        if isinstance(reduced, str):
            raise NotJsonError(f"{value!r} is a global of its module")
        function, arguments = reduced[:2]
        state, values, items = (*reduced[2:5], None, None, None)[:3]
        is_new = function is copyreg.__newobj__  # type: ignore[attr-defined]
        if is_new:
            function, *arguments = arguments
        if named(function) not in (CLASSES if is_new else CALLS):
            raise NotJsonError(f"{named(function)} is not listed")
        parts = {
            "arguments": self._all(arguments),
            "state": self.encode(state),
            "values": self._all(values or ()),
            "items": self._pairs(dict(items or ())),
        }
        kept = {name: part for name, part in parts.items() if part not in (None, [])}
        return {":object:" if is_new else ":call:": named(function)} | kept


_ENCODERS: Final[dict[type, Callable[[_Encoder, Any], Any]]] = {
    list: _Encoder._all,
    dict: _Encoder._dict,
    **{kind: lambda encoder, value: {_WORD_OF[type(value)]: encoder._all(value)} for kind in _WORDS.values()},
    bytes: lambda _, value: {":bytes:": b64encode(value).decode()},
    np.ndarray: lambda _, value: _encode_array(value, ":array:"),
    th.Tensor: _Encoder._tensor,
}


def _encode_array(array: np.ndarray[Any, Any], word: str) -> dict[str, Any]:
    if array.dtype.kind not in "biufcUS":
        raise NotJsonError(f"an array of {array.dtype}")
    data = b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {word: data, "dtype": array.dtype.str, "shape": list(array.shape)}


def decode(value: Any, vetted: Vetted) -> Any:
    """Return the value that :func:`encode` has written.

    :param value: JSON's lists, dicts, texts and numbers
    :param vetted: what may be named
    :raises UntrustedFileError: it names a class or function that is not listed
    :raises RefusedError: it is not one that :func:`encode` writes
    """
    if isinstance(value, list):
        return [decode(item, vetted) for item in value]
    if not isinstance(value, dict):
        return value
    words = [key for key in value if key.startswith(":") and key.endswith(":")]
    if not words:
        return {key: decode(item, vetted) for key, item in value.items()}
    require(len(words) == 1, f"a dict with {words}")
    (word,) = words
    held = value[word]
    if word in _WORDS:
        return _WORDS[word](decode(held, vetted))
    if word == ":dict:":
        return {decode(key, vetted): decode(item, vetted) for key, item in held}
    if word == ":bytes:":
        return b64decode(held, validate=True)
    if word == ":class:":
        return vetted.find(*_parts(held))
    if word in (":array:", ":number:", ":tensor:"):
        return _decode_array(word, value)
    require(word in (":object:", ":call:"), f"a dict with {word}")
    return _decode_object(word, value, vetted)


def _parts(name: Any) -> tuple[str, str]:
    require(isinstance(name, str) and name.count(":") == 1, f"a class named {brief(name)}")
    module, _, path = name.partition(":")
    return module, path


def _decode_array(word: str, value: dict[str, Any]) -> Any:
    dtype = CALLS["numpy:dtype"](value["dtype"])
    array = np.frombuffer(b64decode(value[word], validate=True), dtype).reshape(value["shape"]).copy()
    if word == ":number:":
        return array[()]
    return array if word == ":array:" else th.from_numpy(array)


def _decode_object(word: str, value: dict[str, Any], vetted: Vetted) -> Any:
    found = vetted.find(*_parts(value[word]))
    arguments = tuple(decode(value.get("arguments", []), vetted))
    made = (vetted.new if word == ":object:" else vetted.call)(found, arguments)
    if value.get("values"):
        require(type(made) in (deque, list), f"values of {brief(made)}")
        made.extend(decode(value["values"], vetted))
    if value.get("items"):
        require(type(made) in (dict, OrderedDict, defaultdict), f"items of {brief(made)}")
        made.update((decode(key, vetted), decode(item, vetted)) for key, item in value["items"])
    if "state" in value:
        vetted.set_state(made, decode(value["state"], vetted))
    return made
