"""Hosts of envs in actors of Ray, which may be on other machines. Only Ray's core is used.

Commands and answers are pickled here, so that arrays arrive writable and no memory of Ray's object store stays in use.
"""

import os
import pickle
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch as th

from sb3_pg.envs.actors.host import Answer, Broadcast, Host
from sb3_pg.extras import extra_hints
from sb3_pg.policies import Share
from sb3_pg.rollout import EnvWorkerError, Failure

#: Bytes of the object store of a local Ray, which takes a third of the machine's memory otherwise. What does not fit
#: goes to the disk.
OBJECT_STORE: Final = 2**30
#: Environment variables of a local Ray, unless they are set. Its processes have the priority of this one, and do not
#: warn that a later release will no longer hide GPUs from actors that ask for none.
_OF_LOCAL: Final = {"RAY_worker_niceness": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
#: Nodes of local Rays that :func:`connected` has started.
_LOCAL: Final[list[str]] = []
#: Seconds between two lines that say how many actors have started.
_BETWEEN_LINES: Final = 5.0


def cpu_count() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def connected() -> Any:
    """Return the module ``ray``, connected to a cluster.

    If ``ray.init`` was not called yet, it is the cluster in the environment variable RAY_ADDRESS, or else a local Ray
    without dashboard, which ends with this process.

    :raises MissingExtraError: Ray is not installed
    """
    with extra_hints():
        import ray  # noqa: PLC0415 (it is optional, and takes a second)
    if ray.is_initialized():
        return ray
    if "RAY_ADDRESS" in os.environ:
        ray.init()
        return ray
    for name, value in _OF_LOCAL.items():
        os.environ.setdefault(name, value)
    ray.init("local", num_cpus=cpu_count(), include_dashboard=False, object_store_memory=OBJECT_STORE)
    _LOCAL.append(ray.get_runtime_context().get_node_id())
    return ray


class RayHost:
    """A host in an actor of Ray.

    :param share: which of all envs it has
    :param folder: the learner's working directory, which it changes to where there is one of this name
    """

    def __init__(self, share: Share, folder: str) -> None:
        with suppress(OSError):
            os.chdir(folder)
        th.set_num_threads(1)
        self._host = Host(share, is_process=True)
        self._orphaned = 0
        self._answered_at = time.perf_counter()

    def answer(self, number: int, command: str, *packed: bytes) -> bytes:
        """Run a command, and return its pickled answer.

        :param number: of the command, which grows
        :param command: name of a method of the host
        :param packed: its pickled arguments
        """
        self._host.waited = time.perf_counter() - self._answered_at
        try:
            is_orphan = [lambda: self._orphaned >= number] if command == "collect" else []
            answer = self._host.answer(command, *map(pickle.loads, packed), *is_orphan)
            return pickle.dumps(answer, 5)
        except Exception as error:  # noqa: BLE001 (arguments or answer cannot be pickled here)
            return pickle.dumps(Answer(None, Failure.of(error, f"In the actor of env {self._host.share.first}")))
        finally:
            self._answered_at = time.perf_counter()

    def drop(self, number: int) -> None:
        """End a fragment whose answer nobody reads. Ray calls this while the fragment is being collected.

        :param number: of the command that collects it
        """
        self._orphaned = number

    def close(self) -> None:
        """Close the envs."""
        self._host.close()


class RayWorker:
    """A host in an actor of Ray. It takes one CPU of a cluster, and none of a local Ray, which may have fewer.

    :param share: which of all envs it has
    :raises MissingExtraError: Ray is not installed
    """

    def __init__(self, share: Share) -> None:
        self._ray, self._share = connected(), share
        self._is_local = self._ray.get_runtime_context().get_node_id() in _LOCAL
        options = {
            "num_cpus": int(not self._is_local),
            "scheduling_strategy": "SPREAD",
            "concurrency_groups": {"beside": 1},
        }
        self._actor = self._ray.remote(**options)(RayHost).remote(share, str(Path.cwd()))
        self._sent = 0
        #: of the answer that was not read yet
        self._answer: Any = None
        self._closed: Any = None

    @staticmethod
    def n_cpus() -> int:
        """Connect to the cluster, and return the number of its CPUs."""
        return int(connected().cluster_resources().get("CPU", 1))

    @staticmethod
    def wait(workers: "Sequence[RayWorker]", seconds: float | None) -> "list[RayWorker]":
        """Wait until one of these has answered. Return those that have.

        :param workers: to which a command was sent
        :param seconds: to wait at most; None for as long as it takes
        """
        of_answers = {worker._answer: worker for worker in workers}
        ray = workers[0]._ray
        if ray.wait(list(of_answers), timeout=seconds)[0]:
            found, _ = ray.wait(list(of_answers), num_returns=len(of_answers), timeout=0)
            return [of_answers[answer] for answer in found]
        return []

    @staticmethod
    def await_start(workers: "Sequence[RayWorker]") -> None:
        """Wait until each of these has answered the first command, and tell the user on stderr how many have.

        :param workers: to which a command was sent
        """
        ray, began = workers[0]._ray, time.monotonic()
        waiting, n_workers = [worker._answer for worker in workers], len(workers)
        while waiting:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=_BETWEEN_LINES)
            seconds = time.monotonic() - began
            line = f"{n_workers - len(waiting)} of {n_workers} actors have started on Ray, {seconds:.0f} s"
            if waiting and not workers[0]._is_local:
                n_cpus, free = (read().get("CPU", 0) for read in (ray.cluster_resources, ray.available_resources))
                line += f". Each actor takes one CPU. The cluster has {n_cpus:.0f}, and {free:.0f} of them are free"
            print(line, file=sys.stderr, flush=True)

    def send(self, command: str, *args: Any) -> None:
        """Send a command. If the wait for the answer before was interrupted, that is dropped first."""
        if self._answer is not None:
            self._drop()
            self.receive()
        self._sent += 1
        packed = [self._packed(arg) for arg in args]
        self._answer = self._actor.answer.remote(self._sent, command, *packed)

    def receive(self) -> Answer:
        """Wait for the answer to the latest command."""
        try:
            packed = self._ray.get(self._answer)
        except self._ray.exceptions.RayError as error:
            self._answer = None
            raise EnvWorkerError(
                f"The actor of {self._share} on Ray has died. Make new envs and call set_env(env) to go on."
            ) from error
        self._answer = None
        answer: Answer = pickle.loads(packed)
        return answer

    def hang_up(self) -> None:
        """Let the host close its envs as soon as it can."""
        if self._ray.is_initialized():
            if self._answer is not None:
                self._drop()
            self._closed = self._actor.close.remote()

    def close(self, seconds: float) -> None:
        """Wait for the end of the host, then kill it."""
        if self._closed is None:
            self.hang_up()
        if self._ray.is_initialized():
            self._ray.wait([self._closed], timeout=seconds)
            self.kill()

    def kill(self) -> None:
        """Kill the process."""
        self._ray.kill(self._actor)

    def _drop(self) -> None:
        self._actor.drop.options(concurrency_group="beside").remote(self._sent)

    def _packed(self, arg: Any) -> Any:
        """Return an argument as it is sent: pickled, and in the object store if several hosts get it."""
        if not isinstance(arg, Broadcast):
            return pickle.dumps(arg, 5)
        if arg.packed is None:
            arg.packed = self._ray.put(pickle.dumps(arg.value, 5))
        return arg.packed
