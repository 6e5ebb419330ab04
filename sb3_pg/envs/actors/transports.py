"""Carry commands to the hosts of envs, and their answers back.

A transport is a class of workers. Each worker has one :class:`~sb3_pg.envs.actors.host.Host`. Another one is added to
``TRANSPORTS``.
"""

import multiprocessing as mp
import os
import signal
import time
import weakref
from collections.abc import Sequence
from multiprocessing.connection import wait
from typing import Any, Final, Protocol

import torch as th

from sb3_pg.envs.actors.channel import Channel
from sb3_pg.envs.actors.host import Answer, Broadcast, Host
from sb3_pg.envs.actors.on_ray import RayWorker, cpu_count
from sb3_pg.policies import Share
from sb3_pg.rollout import EnvWorkerError, Failure

#: Seconds that actors have to end after their pipes were closed. An env may be in a long step.
SECONDS_TO_END: Final = 5.0
#: Seconds that an actor may take to start, in addition to the limit for its first answer.
SECONDS_TO_START: Final = 30.0
#: Module that the fork server imports.
_PRELOADED: Final = "sb3_pg.envs.actors.preloaded"
#: This process's ends of the pipes to actors.
_PIPES: Final[weakref.WeakSet[Any]] = weakref.WeakSet()
#: Errors of a pipe to a dead process.
_OF_PIPES = (EOFError, ConnectionError)


class Worker(Protocol):
    """One host, here or elsewhere. Each command is answered before the next one is sent.

    :param share: which of all envs it has
    :param options: of this transport
    """

    def __init__(self, share: Share, **options: Any) -> None: ...

    @staticmethod
    def n_cpus() -> int:
        """Return the number of CPUs that there are for workers."""

    @staticmethod
    def wait(workers: Sequence[Any], seconds: float | None) -> list[Any]:
        """Wait until one of these has answered. Return those that have.

        :param workers: of this class, to which a command was sent
        :param seconds: to wait at most; None for as long as it takes
        """

    @staticmethod
    def await_start(workers: Sequence[Any]) -> None:
        """Wait until all have started, if that takes long enough to tell the user how far it is.

        :param workers: of this class, to which the first command was sent
        """

    def send(self, command: str, *args: Any) -> None:
        """Send a command.

        :param command: name of a method of the host
        :param args: its arguments
        :raises EnvWorkerError: the host is gone
        """

    def receive(self) -> Answer:
        """Wait for the answer.

        :raises EnvWorkerError: the host is gone
        """

    def hang_up(self) -> None:
        """Tell the host that it is to end, without waiting for it."""

    def close(self, seconds: float) -> None:
        """End the host.

        :param seconds: how long to wait until it ends by itself
        """

    def kill(self) -> None:
        """End the host at once, whatever it does."""


class _LocalWorker:
    """What workers on this machine have in common."""

    @staticmethod
    def n_cpus() -> int:
        """Return the number of CPUs that this process may use."""
        return cpu_count()

    @staticmethod
    def await_start(workers: Sequence[Any]) -> None:
        """Do nothing: they start within a second."""


class SerialWorker(_LocalWorker):
    """A host in this process.

    :param share: which of all envs it has
    """

    def __init__(self, share: Share) -> None:
        self._host = Host(share, is_process=False)
        self._answer = Answer(None)

    @staticmethod
    def wait(workers: "Sequence[SerialWorker]", seconds: float | None) -> "list[SerialWorker]":
        """Return all: :meth:`send` has waited."""
        del seconds
        return list(workers)

    def send(self, command: str, *args: Any) -> None:
        """Run the command."""
        self._answer = self._host.answer(command, *map(_value, args))

    def receive(self) -> Answer:
        """Return what it has returned."""
        return self._answer

    def hang_up(self) -> None:
        """Do nothing: :meth:`close` does not take long."""

    def close(self, seconds: float) -> None:
        """Close the envs."""
        del seconds
        self._host.close()

    def kill(self) -> None:
        """Close the envs."""
        self.close(0.0)


class ProcessWorker(_LocalWorker):
    """A host in a process of its own.

    :param share: which of all envs it has
    :param start_method: "forkserver", which has imported this package beforehand, or "spawn"; None for "forkserver"
        where there is one
    :raises ValueError: there is no such start method, or it is "fork", which copies locks that are held
    """

    def __init__(self, share: Share, start_method: str | None = None) -> None:
        context: Any = mp.get_context(_checked(start_method))
        if context.get_start_method() == "forkserver":
            context.set_forkserver_preload(["__main__", _PRELOADED])
        pipe, other = context.Pipe()
        self.pipe, self._channel, self._share = pipe, Channel(pipe), share
        #: numbers of the latest command, and of the latest answer
        self._sent = self._answered = 0
        name = f"actor of env {share.first}"
        _PIPES.add(pipe)
        self._process = context.Process(target=_serve, args=(other, share), daemon=True, name=name)
        self._process.start()
        other.close()

    @staticmethod
    def wait(workers: "Sequence[ProcessWorker]", seconds: float | None) -> "list[ProcessWorker]":
        """Wait until one of these has answered, or has died. Return those that have."""
        of_pipes = {worker.pipe: worker for worker in workers}
        return [of_pipes[pipe] for pipe in wait(list(of_pipes), seconds)]

    def send(self, command: str, *args: Any) -> None:
        """Send a command. If the wait for the answer before was interrupted, that is dropped first."""
        if self._answered < self._sent:
            self._send("hurry")
            self.receive()
        self._send(command, *map(_value, args))

    def _send(self, command: str, *args: Any) -> None:
        self._sent += 1
        try:
            self._channel.send((command, args), self._sent)
        except _OF_PIPES as error:
            raise self._death() from error

    def receive(self) -> Answer:
        """Wait for the answer to the latest command."""
        while True:
            try:
                answer: Answer = self._channel.receive()
            except (EOFError, OSError) as error:  # an OSError: the process has died while it was sending
                raise self._death() from error
            finally:
                self._answered = self._channel.number
            if self._answered == self._sent:
                return answer

    def _death(self) -> EnvWorkerError:
        self._process.join(1.0)
        who, advice = f"The actor of {self._share}", "Make new envs and call set_env(env) to go on."
        if self._process.exitcode is None:
            return EnvWorkerError(f"{who} can no longer be reached: a message was interrupted. {advice}")
        what = f"{who} has died, exit code {self._process.exitcode}."
        if self._answered:
            return EnvWorkerError(f"{what} {advice}")
        return EnvWorkerError(
            f"{what} If the traceback on stderr is about bootstrapping: a script that makes envs in processes does so "
            "under `if __name__ == '__main__':`, since each process imports it."
        )

    def hang_up(self) -> None:
        """Close the pipe, which ends the process."""
        self.pipe.close()

    def close(self, seconds: float) -> None:
        """Wait for the end of the process, then end it."""
        self.hang_up()
        self._process.join(seconds)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(1.0)
        if self._process.is_alive():  # the env ignores the signal
            self.kill()

    def kill(self) -> None:
        """Kill the process."""
        self.hang_up()
        self._process.kill()
        self._process.join()


def _close_pipes() -> None:
    """Close a forked process's copies of the pipes. Otherwise actors would not notice the end of their learner."""
    for pipe in tuple(_PIPES):
        pipe.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_pipes)

TRANSPORTS: Final[dict[str, type[Worker]]] = {"processes": ProcessWorker, "serial": SerialWorker, "ray": RayWorker}


def _value(arg: Any) -> Any:
    return arg.value if isinstance(arg, Broadcast) else arg


def _checked(start_method: str | None) -> str:
    known = [name for name in mp.get_all_start_methods() if name != "fork"]
    if start_method is None:
        return "forkserver" if "forkserver" in known else "spawn"
    if start_method not in known:
        raise ValueError(f"start_method must be one of {known} or None, got {start_method!r}")
    return start_method


def _serve(pipe: Any, share: Share) -> None:
    """Serve commands until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches all processes; the learner decides
    th.set_num_threads(1)
    channel, host = Channel(pipe), Host(share, is_process=True)
    try:
        while True:
            _serve_once(channel, host)
    except _OF_PIPES:
        host.close()


def _serve_once(channel: Channel, host: Host) -> None:
    """Read a command, run it, and send the answer."""
    try:
        began = time.perf_counter()
        command, args = channel.receive()
        host.waited = time.perf_counter() - began
        # While a fragment is collected, nothing comes through the pipe but its end, or "hurry".
        answer = host.answer(command, *args, *([channel.pipe.poll] if command == "collect" else []))
        channel.send(answer, channel.number)
    except _OF_PIPES:
        raise
    except Exception as error:  # noqa: BLE001 (what was sent, or the answer, cannot be pickled here)
        failure = Failure.of(error, f"In the actor of env {host.share.first}")
        channel.send(Answer(None, failure), channel.number)
