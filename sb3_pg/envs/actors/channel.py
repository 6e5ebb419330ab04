"""Send objects between two processes: arrays in memory that both share, the rest through a pipe.

The memory has no name in any file system, so that nothing is left behind however the processes end.
"""

import mmap
import os
import pickle
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import reduction
from typing import Any, Final

#: Bytes of an array from which it goes through the shared memory.
LEAST_SHARED = 1024
#: Signals whose handlers may raise an exception: of ctrl-C, of a system that ends processes, of timers and of users.
_SIGNALS: Final = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGBREAK")
    if hasattr(signal, name)
)
#: Arrays begin at multiples of this number of bytes.
_ALIGNMENT = 64


class Channel:
    """One end of a pipe, and the memory of what it sends and receives.

    The two ends take turns: a message is read before the other end sends the next one.

    :param pipe: the end of the pipe, a ``multiprocessing.connection.Connection``
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        #: number of the latest message received
        self.number = 0
        self._is_within_message = False
        self._mine: mmap.mmap | None = None
        self._theirs: mmap.mmap | None = None

    def send(self, message: Any, number: int) -> None:
        """Send a message.

        :param message: anything that can be pickled
        :param number: of the message. It arrives even if the message cannot be unpickled
        :raises OSError: the other process has ended, or an earlier message was interrupted
        """
        large: list[memoryview] = []

        def stays_in_pickle(buffer: pickle.PickleBuffer) -> bool:
            if (raw := buffer.raw()).nbytes < LEAST_SHARED:
                return True
            large.append(raw)
            return False

        small = pickle.dumps(message, 5, buffer_callback=stays_in_pickle)
        places, end = [], 0
        for raw in large:
            places.append(slice(end, end + raw.nbytes))
            end += -(-raw.nbytes // _ALIGNMENT) * _ALIGNMENT
        memory, size, handle = self._mine, len(self._mine or ()), None
        if end > size:
            size = max(end, 2 * size)
            memory, handle = _new_memory(size)
        for raw, place in zip(large, places, strict=True):
            assert memory is not None
            memory[place] = raw
        with self._whole_message():
            self.pipe.send((number, small, places, None if handle is None else (size, handle)))
            if handle is not None:
                _give(self.pipe, handle)
            self._mine = memory  # not before: an interrupt may come between new memory and its message

    def receive(self) -> Any:
        """Wait for a message, and return it.

        :raises EOFError: the other process has ended
        :raises OSError: the same, or an earlier message was interrupted
        """
        self.pipe.poll(None)  # an interrupt of the wait does no harm
        with self._whole_message():
            self.number, small, places, new = self.pipe.recv()
            if new is not None:
                self._theirs = _taken(self.pipe, *new)
        memory = memoryview(self._theirs or b"")
        return pickle.loads(small, buffers=[bytearray(memory[place]) for place in places])

    @contextmanager
    def _whole_message(self) -> Iterator[None]:
        """Let signals, such as that of ctrl-C, wait until a message was sent or read.

        :raises ConnectionError: a part of an earlier message was sent or read
        """
        if self._is_within_message:
            raise ConnectionError("an earlier message was cut off")
        with _signals_wait():
            self._is_within_message = True
            yield
            self._is_within_message = False


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Call the handlers of signals afterwards. A mask would not do: the system gives the signal to another thread."""
    if threading.current_thread() is not threading.main_thread():  # handlers run in the main thread
        yield
        return
    handlers: dict[int, Any] = {}
    arrived: list[tuple[int, Any]] = []
    try:
        for number in _SIGNALS:
            if callable(handler := signal.getsignal(number)):
                handlers[number] = handler
                signal.signal(number, lambda *signal_and_frame: arrived.append(signal_and_frame))
        yield
    finally:
        _put_back(dict(handlers))
    for number, frame in arrived:
        handlers[number](number, frame)


def _put_back(handlers: dict[int, Any]) -> None:
    """Put back the handlers of signals, all of them even if one of them is called and raises."""
    try:
        while handlers:
            number = next(iter(handlers))
            signal.signal(number, handlers[number])
            del handlers[number]
    finally:
        if handlers:
            _put_back(handlers)


if sys.platform == "win32":

    def _new_memory(size: int) -> tuple[mmap.mmap, str]:
        name = f"sb3_pg-{uuid.uuid4().hex}"
        return mmap.mmap(-1, size, tagname=name), name

    def _give(pipe: Any, handle: str) -> None:
        del pipe, handle  # the name is in the message

    def _taken(pipe: Any, size: int, handle: str) -> mmap.mmap:
        del pipe
        return mmap.mmap(-1, size, tagname=handle)

else:

    def _new_memory(size: int) -> tuple[mmap.mmap, int]:
        """Make memory, and return the descriptor of its file, which has no name."""
        if hasattr(os, "memfd_create"):
            file = os.memfd_create("sb3_pg")
        else:
            with tempfile.TemporaryFile() as opened:
                file = os.dup(opened.fileno())
        os.ftruncate(file, size)
        return mmap.mmap(file, size), file

    def _give(pipe: Any, handle: int) -> None:
        try:
            reduction.send_handle(pipe, handle, None)
        finally:
            os.close(handle)

    def _taken(pipe: Any, size: int, handle: int) -> mmap.mmap:
        del handle  # its number in the other process
        file = reduction.recv_handle(pipe)
        try:
            return mmap.mmap(file, size)
        finally:
            os.close(file)
