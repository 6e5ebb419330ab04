"""What is sent arrives, whatever its size."""

import multiprocessing as mp
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sb3_pg.envs.actors import channel
from sb3_pg.envs.actors.channel import LEAST_SHARED, Channel


@pytest.fixture
def ends() -> Any:
    first, second = mp.Pipe()
    yield Channel(first), Channel(second)
    first.close()
    second.close()


def test_messages_of_all_sizes(ends: Any) -> None:
    one, other = ends
    kept = []
    for size in (0, 1, LEAST_SHARED // 8, LEAST_SHARED, 10, 5 * LEAST_SHARED, 1):
        sent = {"a": np.arange(size), "b": [np.full((2, size), 0.5, np.float32), "text"], "c": np.ones(size, bool)[::2]}
        for sender, receiver in ((one, other), (other, one)):
            sender.send(sent, size)
            kept.append((sent, receiver.receive()))
            assert receiver.number == size
    for sent, received in kept:  # later messages have not changed earlier ones
        np.testing.assert_equal(received, sent)
        received["a"] += 1  # they may be written


def test_the_pipe_carries_no_large_arrays(ends: Any) -> None:
    one, other = ends
    one.send(np.zeros(10**7), 1)  # would block
    assert other.receive().shape == (10**7,)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="it counts open files")
def test_no_file_stays_open(ends: Any) -> None:
    one, other = ends
    before = len(list(Path("/proc/self/fd").iterdir()))
    for size in (10**3, 10**4, 10**5, 10**6):
        one.send(np.zeros(size), 1)
        other.receive()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2  # mmap keeps one for each end


def test_the_end_is_noticed(ends: Any) -> None:
    one, other = ends
    other.pipe.close()
    with pytest.raises(EOFError):
        one.receive()
    with pytest.raises(OSError, match=r"pipe|reset|closed|cut off"):
        one.send(os.getpid(), 1)


class Interrupted:
    """A pipe whose message is interrupted after its first half."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    def poll(self, timeout: float | None) -> bool:
        return bool(self._pipe.poll(timeout))

    def recv(self) -> Any:
        self._pipe.recv()
        raise KeyboardInterrupt

    def send(self, message: Any) -> None:
        raise KeyboardInterrupt


def test_after_an_interrupted_message_nothing_is_misread(ends: Any) -> None:
    one, other = ends
    other.send("first", 1)
    other.send("second", 2)
    one.pipe = Interrupted(pipe := one.pipe)
    with pytest.raises(KeyboardInterrupt):
        one.receive()
    one.pipe = pipe
    with pytest.raises(ConnectionError, match="an earlier message was cut off"):
        one.receive()
    other.pipe = Interrupted(pipe := other.pipe)
    with pytest.raises(KeyboardInterrupt):
        other.send("third", 3)
    other.pipe = pipe
    with pytest.raises(ConnectionError, match="an earlier message was cut off"):
        other.send("fourth", 4)


def load_error() -> Any:
    raise ImportError("no such module here")


class CannotBeLoaded:
    def __reduce__(self) -> Any:
        return load_error, ()


def test_the_number_of_a_message_that_cannot_be_loaded_arrives(ends: Any) -> None:
    one, other = ends
    one.send(CannotBeLoaded(), 7)
    with pytest.raises(ImportError, match="no such module here"):
        other.receive()
    assert other.number == 7
    one.send("next", 8)
    assert other.receive() == "next"


class NotWritten:
    """Memory whose first write is interrupted."""

    def __setitem__(self, place: Any, raw: Any) -> None:
        raise KeyboardInterrupt


def test_memory_that_was_never_given_is_not_used(ends: Any) -> None:
    one, other = ends
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channel, "_new_memory", lambda _: (NotWritten(), None))
        with pytest.raises(KeyboardInterrupt):
            one.send(np.ones(LEAST_SHARED), 1)
    one.send(np.ones(LEAST_SHARED), 2)
    np.testing.assert_array_equal(other.receive(), np.ones(LEAST_SHARED))


class Signalled(Exception):  # noqa: N818 (as KeyboardInterrupt)
    """What the handler of a signal raises."""


class PipeWithSignals:
    """Gets a signal after each part of a message."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def __getattr__(self, name: str) -> Any:
        def called(*args: Any) -> Any:
            result = getattr(self.pipe, name)(*args)
            if name in ("send", "recv"):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.05)  # the handler is called here, unless it waits
            return result

        return called


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends the process")
def test_signals_wait_for_the_end_of_a_message(ends: Any) -> None:
    """Also where the system gives the signal to a thread of another library."""
    _, other = ends

    def interrupt(*_: Any) -> None:
        raise Signalled

    one = Channel(PipeWithSignals(ends[0].pipe))
    end = threading.Event()
    threading.Thread(target=end.wait, daemon=True).start()
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        for number in (1, 2):
            with pytest.raises(Signalled):
                one.send("text", number)
            assert other.receive() == "text"
            assert signal.getsignal(signal.SIGTERM) is interrupt
            other.send("answer", number)
            with pytest.raises(Signalled):
                one.receive()
            assert one.number == number
    finally:
        signal.signal(signal.SIGTERM, previous)
        end.set()
