"""Fragments of all actors, one by one: each actor goes on with the newest weights while the learner learns.

All is done by the learner's process between two updates, in one thread. An actor that has finished a fragment waits
until the learner has read it, and gets its next order then.
"""

import time
import warnings
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecMonitor

from sb3_pg import compat
from sb3_pg.envs.actors.host import Answer, Collected, weights_of
from sb3_pg.envs.actors.vec_env import ActorVecEnv
from sb3_pg.envs.actors.wrappers import (
    WrapperState,
    going_on,
    put_back,
    shared_state,
    states_for,
    wrappers_around,
)
from sb3_pg.errors import NonFiniteError
from sb3_pg.policies import Share, map_observations, original
from sb3_pg.rollout import (
    CollectorState,
    EnvWorkerError,
    Failure,
    Fragment,
    Order,
    Playback,
    infos_of_episodes,
    order_for,
)


class Delivery(NamedTuple):
    """A fragment as the learner gets it.

    :param env: the actor's envs, which play the fragment
    :param fragment: what the actor has collected
    :param state: of its envs before the first step
    :param version: of the weights that have acted
    """

    env: "FragmentEnv"
    fragment: Fragment
    state: CollectorState
    version: int


@dataclass
class Waits:
    """How long who has waited.

    :param learner: seconds that the learner has waited for fragments
    :param actors: seconds that actors have waited for orders, all of them together
    """

    learner: float = 0.0
    actors: float = 0.0


@dataclass
class _Flight:
    """What is known of one actor.

    :param env: its envs
    :param state: of its envs before the fragment that it collects
    :param random: state of its generator then
    :param number: of its order, among those of all actors
    :param version: of its weights
    :param sent: what its wrappers shared with the learner's then
    :param wrappers: state of its wrappers after its latest fragment; None before that
    :param is_flying: whether it has an order, and its answer has not been read
    :param answer: that was read before it was this actor's turn
    :param deadline: when it must have answered
    :param n_restarts: how often it was started again
    """

    env: "FragmentEnv"
    state: CollectorState
    random: np.ndarray
    number: int = 0
    version: int = 0
    sent: list[WrapperState] = field(default_factory=list)
    wrappers: list[WrapperState] | None = None
    is_flying: bool = False
    answer: Answer | None = None
    deadline: float | None = None
    n_restarts: int = 0

    @property
    def share(self) -> Share:
        """Which of all envs it has."""
        return self.env.share


class FragmentStream:
    """Lets the actors of an :class:`~sb3_pg.envs.ActorVecEnv` collect without end, and gives their fragments in turn.

    An actor that dies, hangs, or whose env raises an error is started again, with other seeds. Its fragment is lost.

    :param env: the envs with all wrappers, whose actors can collect with this policy
    :param policy: whose weights the actors take
    :param order: of each fragment. Its state is that of all envs
    :param queue_size: fragments that wait in this process at most
    :param in_turn: whether fragments come in the order of the actors, one of each, whichever are finished first
    :param timeout: seconds after which an actor without an answer hangs; None for never
    :param max_restarts: restarts of actors, all together, after which the next fault is an error
    :param seed: of the random generators of all actors
    """

    def __init__(
        self,
        env: VecEnv,
        policy: ActorCriticPolicy,
        order: Order,
        *,
        queue_size: int,
        in_turn: bool,
        timeout: float | None,
        max_restarts: int,
        seed: int,
    ) -> None:
        envs: Any = env.unwrapped
        self._envs: ActorVecEnv = envs
        self._env, self._policy, self._order = env, policy, order
        self._queue_size, self._in_turn, self._timeout = queue_size, in_turn, timeout
        self._max_restarts, self._seed = max_restarts, seed
        self._queue: deque[Delivery] = deque()
        self._n_orders = self._turn = 0
        #: of the weights that actors get
        self.version = 0
        #: how often actors were started again
        self.n_restarts = 0
        self.waits = Waits()
        self._flights = []
        for number, share in enumerate(self._envs.shares):
            known = order.state.last_obs is not None
            state = order_for(order, share).state if known else CollectorState()
            self._flights.append(_Flight(FragmentEnv(env, number, share), state, self._random(number, 0)))
        self._envs.stream = self

    def close(self) -> None:
        """Leave the actors to the env. What they collect is dropped when it gives them something else to do."""
        self._envs.stream = None

    # ---------------------------------------------------------------- the learner's side

    def next(self) -> Delivery:
        """Wait for a fragment, and return it. The actors whose fragments were read go on.

        :raises EnvWorkerError: an actor has died or hangs, after too many restarts
        :raises Exception: what an env has raised, after too many restarts
        """
        self._send_idle()
        if self._in_turn:
            delivery = None
            while delivery is None:
                if self._turn in self._wait([self._turn]):
                    delivery = self._taken(self._turn)
            self._turn = (self._turn + 1) % len(self._flights)
        else:
            self._read(block=False)
            while not self._queue:
                self._read(block=True)
            delivery = self._queue.popleft()
            self._read(block=False)
        delivery.env.fragment = delivery.fragment
        return delivery

    @property
    def n_queued(self) -> int:
        """Number of fragments that wait in this process."""
        return len(self._queue) + sum(flight.answer is not None for flight in self._flights)

    def settle(self) -> None:
        """Wait until no actor is busy. The answers are kept until it is their turn."""
        for number, flight in enumerate(self._flights):
            while flight.is_flying:
                try:
                    if number in self._wait([number]):
                        flight.answer = self._envs.worker(number).receive()
                        flight.is_flying = False
                except EnvWorkerError as error:
                    self._replace(number, error)

    # ---------------------------------------------------------------- reading

    def _read(self, block: bool) -> None:
        """Read fragments that are finished, the oldest orders first, as long as there is room for them.

        :param block: whether to wait for one
        """
        if len(self._queue) >= self._queue_size:
            return
        ready = self._wait(range(len(self._flights)), None if block else 0.0)
        for number in sorted(ready, key=lambda i: self._flights[i].number):
            if len(self._queue) < self._queue_size and (delivery := self._taken(number)) is not None:
                self._queue.append(delivery)

    def _wait(self, numbers: Iterable[int], seconds: float | None = None) -> list[int]:
        """Wait until one of some actors has answered, or hangs, and return those that have answered.

        :param numbers: of the actors
        :param seconds: to wait at most; None for as long as it takes
        """
        flights = {number: self._flights[number] for number in numbers}
        answered = [number for number, flight in flights.items() if not flight.is_flying]
        waiting = [number for number, flight in flights.items() if flight.is_flying]
        if not waiting:
            return answered
        if answered:
            seconds = 0.0
        began = time.monotonic()
        deadlines = [deadline for number in waiting if (deadline := flights[number].deadline) is not None]
        if deadlines:
            left = max(0.0, min(deadlines) - began)
            seconds = left if seconds is None else min(left, seconds)
        found = self._envs.wait_for(waiting, seconds)
        now = time.monotonic()
        self.waits.learner += now - began
        for number in waiting:
            deadline = flights[number].deadline
            if number not in found and deadline is not None and deadline <= now:
                self._envs.worker(number).kill()
                self._restart(number, EnvWorkerError(f"{self._name(number)} has not answered for {self._timeout} s."))
        return answered + found

    def _taken(self, number: int) -> Delivery | None:
        """Read an actor's answer, and let the actor go on. Return None if there is none: it was started again.

        :param number: of the actor
        """
        flight = self._flights[number]
        answer, flight.answer = flight.answer, None
        if answer is None:
            if not flight.is_flying:
                self._send(number)
                return None
            try:
                answer = self._envs.worker(number).receive()
            except EnvWorkerError as error:
                self._restart(number, error)
                return None
        flight.is_flying = False
        failure = answer.failure or answer.value.fragment.failure
        if failure is not None and not isinstance(failure.error, NonFiniteError):
            self._restart(number, failure)
            return None
        if answer.failure is not None:  # the first observation is not finite
            answer.failure.reraise(flight.share.first)
        delivery = self._delivery(flight, answer.value)
        self._send(number)
        return delivery

    def _delivery(self, flight: _Flight, collected: Collected) -> Delivery:
        """Bring what is known of an actor up to date."""
        fragment = collected.fragment
        self._envs.show(collected.warned)
        if flight.version > 0:  # what came before the first update is not waiting
            self.waits.actors += collected.waited
        begun = flight.state
        if begun.last_obs is None:
            first = map_observations(itemgetter(0), fragment.observations)
            n = flight.share.n_envs
            begun = CollectorState(first, np.ones(n, dtype=bool), np.zeros(n, dtype=np.int64))
        if fragment.random is not None:
            flight.random = fragment.random
        if fragment.failure is None:
            put_back(self._env, flight.sent, collected.wrappers)
            for wrapper in wrappers_around(self._env):
                if isinstance(wrapper, VecMonitor) and wrapper.results_writer:
                    for info in infos_of_episodes([fragment]):
                        wrapper.results_writer.write_row(info["episode"])
            flight.wrappers = collected.wrappers
            memory = {} if fragment.memory is None else {"actor": tuple(map(th.from_numpy, fragment.memory))}
            last = map_observations(itemgetter(-1), fragment.observations)
            flight.state = CollectorState(last, fragment.at_start[-1], fragment.timesteps, memory)
        else:
            flight.state = CollectorState()
        device = self._policy.device
        remembered = {name: tuple(part.to(device) for part in parts) for name, parts in begun.memory.items()}
        return Delivery(flight.env, fragment, replace(begun, memory=remembered), flight.version)

    # ---------------------------------------------------------------- sending

    def _send_idle(self) -> None:
        for number, flight in enumerate(self._flights):
            if not flight.is_flying and flight.answer is None:
                self._send(number)

    def _send(self, number: int) -> None:
        """Let an actor collect its next fragment, with the weights as they are now.

        :param number: of the actor
        """
        flight = self._flights[number]
        while not flight.is_flying:
            self._envs.require_record(self._env, self._policy)
            states = states_for(self._env, flight.share)
            if flight.wrappers is not None:
                states = going_on(states, flight.wrappers)
            flight.sent = shared_state(states)
            order, weights = replace(self._order, state=flight.state), weights_of(original(self._policy))
            random = th.get_rng_state()
            try:
                self._envs.worker(number).send("collect", order, weights, flight.random, states)
            except EnvWorkerError as error:
                self._replace(number, error)
                continue
            finally:
                th.set_rng_state(random)  # an actor in this process has drawn from the same generator
            flight.version, flight.is_flying = self.version, True
            flight.number, self._n_orders = self._n_orders, self._n_orders + 1
            flight.deadline = None if self._timeout is None else time.monotonic() + self._timeout

    # ---------------------------------------------------------------- faults

    def _name(self, number: int) -> str:
        return f"The actor of {self._flights[number].share}"

    def _restart(self, number: int, why: EnvWorkerError | Failure) -> None:
        self._replace(number, why)
        self._send(number)

    def _replace(self, number: int, why: EnvWorkerError | Failure) -> None:
        """Start an actor again, with other seeds.

        :param number: of the actor
        :param why: what has gone wrong
        :raises EnvWorkerError: it has died or hangs, and may not be started again
        :raises Exception: an env has raised it, and the actor may not be started again
        """
        flight = self._flights[number]
        flight.is_flying = False
        while True:
            if self.n_restarts >= self._max_restarts:
                if isinstance(why, Failure):
                    why.reraise()
                raise EnvWorkerError(f"{why} max_restarts={self._max_restarts} is reached.") from why
            self.n_restarts += 1
            flight.n_restarts += 1
            warnings.warn(f"{self._name(number)} is started again: {_in_short(why)}", stacklevel=2)
            flight.state, flight.random = CollectorState(), self._random(number, flight.n_restarts)
            seeds = self._entropy(number, flight.n_restarts).generate_state(flight.share.n_envs)
            try:
                failure = self._envs.replace_worker(number, [int(seed) for seed in seeds], self._timeout)
            except EnvWorkerError as error:
                why = error
                continue
            if failure is None:
                return
            why = failure

    def _entropy(self, number: int, n_restarts: int) -> np.random.SeedSequence:
        return np.random.SeedSequence([self._seed, number, n_restarts])

    def _random(self, number: int, n_restarts: int) -> np.ndarray:
        """Return the first state of an actor's random generator."""
        drawn = int(self._entropy(number, n_restarts).spawn(1)[0].generate_state(1)[0])
        state: np.ndarray = th.Generator().manual_seed(drawn).get_state().numpy()
        return state


def _in_short(why: EnvWorkerError | Failure) -> str:
    return f"{type(why.error).__name__}: {why.error}" if isinstance(why, Failure) else str(why)


class FragmentEnv(VecEnvWrapper):
    """The envs of one actor, as the learner sees them while it learns from a fragment: it plays the fragment.

    :param env: all envs, with all wrappers
    :param actor: number of the actor
    :param share: its envs
    """

    def __init__(self, env: VecEnv, actor: int, share: Share) -> None:
        self.actor, self.share = actor, share
        super().__init__(env)
        self.num_envs = share.n_envs
        #: what is played
        self.fragment: Fragment | None = None

    @property
    def unwrapped(self) -> VecEnv:
        """Itself, which has the fragment."""
        return self

    def can_record(self, env: VecEnv, policy: ActorCriticPolicy) -> bool:
        """True."""
        del env, policy
        return True

    def record(self, env: VecEnv, policy: ActorCriticPolicy, order: Order) -> Playback:
        """Return the fragment. See :class:`~sb3_pg.rollout.RecordingEnv`."""
        del env, order
        assert self.fragment is not None
        return Playback([self.fragment], policy)

    def reset(self) -> Any:
        """Raise an error: only the actor resets its envs."""
        raise NotImplementedError("the envs of an actor are reset by the actor")

    def step_wait(self) -> Any:
        """Raise an error: only the actor steps its envs."""
        raise NotImplementedError("the envs of an actor are stepped by the actor")

    def _all(self, indices: Any) -> list[int]:
        """Return the numbers of some of these envs among all."""
        own = range(self.share.first, self.share.first + self.share.n_envs)
        return list(own) if indices is None else [own[i] for i in compat.env_indices(self, indices)]

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """As in a VecEnv."""
        return self.venv.get_attr(attr_name, self._all(indices))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """As in a VecEnv."""
        self.venv.set_attr(attr_name, value, self._all(indices))

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """As in a VecEnv."""
        return self.venv.env_method(method_name, *args, indices=self._all(indices), **kwargs)

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """As in a VecEnv."""
        return self.venv.env_is_wrapped(wrapper_class, self._all(indices))
