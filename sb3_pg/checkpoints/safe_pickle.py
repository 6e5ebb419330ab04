"""Read pickles of unknown origin: nothing runs but what :mod:`sb3_pg.checkpoints.vetted` lists."""

import io
import pickle
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection
from typing import Any, BinaryIO, ClassVar, Final

from sb3_pg import compat
from sb3_pg.checkpoints.renamed_modules import current_name
from sb3_pg.checkpoints.vetted import (
    CALLS,
    CLASSES,
    CONSTANTS,
    MADE_BY_CALLS,
    RefusedError,
    brief,
    require,
    require_keys,
    resolve,
    set_state,
)
from sb3_pg.errors import DamagedFileError, UntrustedFileError

#: Opcodes that call what another opcode of this list or a table of the interpreter names.
_REFUSED: Final = (pickle.INST, pickle.OBJ, pickle.PERSID, pickle.BINPERSID, pickle.EXT1, pickle.EXT2, pickle.EXT4)


def loads(data: bytes, what: str, allow: Collection[type] = (), trusted: bool = False) -> Any:
    """Return what a pickle holds. Unless it is trusted, no code runs that the pickle names.

    :param data: the pickle
    :param what: the file, or its field, for messages
    :param allow: classes and functions of the user that the pickle may name
    :param trusted: run whatever the pickle says, as ``pickle.loads`` does
    :raises UntrustedFileError: the pickle names a class or function that is not known to be harmless
    :raises DamagedFileError: it is no pickle, or it was changed
    """
    return load(io.BytesIO(data), what, allow, trusted)


def load(file: BinaryIO, what: str, allow: Collection[type] = (), trusted: bool = False) -> Any:
    """Return what a pickle in an open file holds, as :func:`loads` does.

    :param file: the file, at the pickle's first byte
    """
    if trusted:
        return _TrustedUnpickler(file).load()
    return read_checked(lambda: _SafeUnpickler(file, what, allow).load(), what)


def read_checked(read: Callable[[], Any], what: str) -> Any:
    """Return what a reader returns. Any error in it means that the file is damaged.

    :param read: the reader
    :param what: the file, or its field
    :raises UntrustedFileError: the reader has raised it
    :raises DamagedFileError: the reader has raised another error
    """
    try:
        return read()
    except (UntrustedFileError, DamagedFileError):
        raise
    except RefusedError as error:
        raise DamagedFileError(what, f"it holds {error}") from error
    except Exception as error:
        raise DamagedFileError(what, f"{type(error).__name__}: {error}".rstrip(": ")) from error


def named(found: Any) -> str:
    """Return the ``"module:name"`` by which files name a class or function."""
    return f"{found.__module__}:{found.__qualname__}"


class Vetted:
    """What a file may name: the vetted names, and what the user allows.

    :param what: the file, or its field, for messages
    :param allow: classes and functions of the user
    """

    def __init__(self, what: str, allow: Collection[type] = ()) -> None:
        self.what = what
        self.allowed = {named(found): found for found in allow}
        #: classes and functions that were looked up -> what is called in their place
        self._callable: dict[int, Callable[..., Any]] = {}
        self._classes: set[int] = set()
        self._found: list[Any] = []  # keeps the ids valid

    def find(self, module: str, name: str) -> Any:
        """Return the class or function of this name.

        :raises UntrustedFileError: it is not listed
        """
        module, name = current_name(module, name)
        key = f"{module}:{name}"
        if key in self.allowed:
            found: Any = self.allowed[key]
            self._callable[id(found)] = found
            self._classes.add(id(found))
        elif key in CALLS:
            found = CALLS[key]
            self._callable[id(found)] = found
        elif key in CLASSES or key in CONSTANTS:
            found = resolve(key)
            if key in CLASSES:
                self._classes.add(id(found))
        else:
            raise UntrustedFileError(self.what, f"{module}.{name}")
        self._found.append(found)
        return found

    def call(self, function: Any, arguments: Any) -> Any:
        """Call a function that the file has named."""
        require(type(arguments) is tuple, "arguments that are no tuple")
        require(id(function) in self._callable, f"a call of {brief(function)}")
        return self._callable[id(function)](*arguments)

    def new(self, cls: Any, arguments: Any, keywords: Any = None) -> Any:
        """Make an empty instance of a class that the file has named."""
        require(type(arguments) is tuple and not keywords, "arguments that are no tuple")
        if id(cls) in self._callable and id(cls) not in self._classes:  # such as OrderedDict
            return self.call(cls, arguments)
        require(id(cls) in self._classes, f"an instance of {brief(cls)}")
        require(not arguments or issubclass(cls, tuple), f"an instance of {brief(cls)} with arguments")
        return cls.__new__(cls, *arguments)

    def set_state(self, instance: Any, state: Any) -> None:
        """Give a value its state."""
        kind = type(instance)
        require(id(kind) in self._classes or isinstance(instance, MADE_BY_CALLS), f"a state of {brief(kind)}")
        if id(kind) in {id(found) for found in self.allowed.values()} and hasattr(kind, "__setstate__"):
            kind.__setstate__(instance, state)  # the user's own form
        else:
            set_state(instance, state)


class _Bounded:
    """A file that refuses to read more bytes than it has, before it makes room for them.

    :param file: the file
    """

    def __init__(self, file: BinaryIO) -> None:
        begin = file.tell()
        self._left = file.seek(0, io.SEEK_END) - begin
        file.seek(begin)
        self._file = file

    def read(self, n_bytes: int) -> bytes:
        """Return the next bytes."""
        require(n_bytes <= self._left, "a length above its size")
        self._left -= n_bytes
        return self._file.read(n_bytes)

    def readline(self) -> bytes:
        """Return the next line."""
        line = self._file.readline(self._left)
        self._left -= len(line)
        return line


class _SafeUnpickler(compat.PythonUnpickler):  # type: ignore[misc]  # a private class, see compat
    """An unpickler that checks each name, each call and each state."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(compat.PythonUnpickler.dispatch)

    def __init__(self, file: BinaryIO, what: str, allow: Collection[type]) -> None:
        super().__init__(_Bounded(file))
        self._vetted = Vetted(what, allow)

    def find_class(self, module: str, name: str) -> Any:
        return self._vetted.find(module, name)

    def _refuse(self) -> None:
        raise RefusedError("an opcode that no honest file has")

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._vetted.call(self.stack[-1], arguments)

    def _new(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._vetted.new(self.stack[-1], arguments)

    def _new_with_keywords(self) -> None:
        keywords, arguments = self.stack.pop(), self.stack.pop()
        self.stack[-1] = self._vetted.new(self.stack[-1], arguments, keywords)

    def _build(self) -> None:
        state = self.stack.pop()
        self._vetted.set_state(self.stack[-1], state)

    def _append(self) -> None:
        value = self.stack.pop()
        require(type(self.stack[-1]) in (list, deque), "an append to something else than a list")
        self.stack[-1].append(value)

    def _extend(self) -> None:
        values = self.pop_mark()
        require(type(self.stack[-1]) in (list, deque), "an append to something else than a list")
        self.stack[-1].extend(values)

    def _set_items(self) -> None:
        values = self.pop_mark()
        require(type(self.stack[-1]) in (dict, OrderedDict, defaultdict), "an item of something else than a dict")
        require_keys(values[::2])
        self.stack[-1].update(zip(values[::2], values[1::2], strict=True))

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        require(type(self.stack[-1]) in (dict, OrderedDict, defaultdict), "an item of something else than a dict")
        require_keys([key])
        self.stack[-1][key] = value

    def _add_items(self) -> None:
        values = self.pop_mark()
        require(type(self.stack[-1]) is set, "an element of something else than a set")
        require_keys(values)
        self.stack[-1].update(values)

    def _frozen_set(self) -> None:
        values = self.pop_mark()
        require_keys(values)
        self.append(frozenset(values))

    def _dict(self) -> None:
        values = self.pop_mark()
        require_keys(values[::2])
        self.append(dict(zip(values[::2], values[1::2], strict=True)))

    def _byte_array(self) -> None:
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))  # read before it is allocated

    for _opcode in _REFUSED:
        dispatch[_opcode[0]] = _refuse
    dispatch[pickle.REDUCE[0]] = _reduce
    dispatch[pickle.NEWOBJ[0]] = _new
    dispatch[pickle.NEWOBJ_EX[0]] = _new_with_keywords
    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.APPEND[0]] = _append
    dispatch[pickle.APPENDS[0]] = _extend
    dispatch[pickle.SETITEM[0]] = _set_item
    dispatch[pickle.SETITEMS[0]] = _set_items
    dispatch[pickle.ADDITEMS[0]] = _add_items
    dispatch[pickle.FROZENSET[0]] = _frozen_set
    dispatch[pickle.DICT[0]] = _dict
    dispatch[pickle.BYTEARRAY8[0]] = _byte_array


class _TrustedUnpickler(pickle.Unpickler):
    """Python's unpickler, which finds classes of this package under the names that they had."""

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(*current_name(module, name))
