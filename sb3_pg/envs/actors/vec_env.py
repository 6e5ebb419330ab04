"""A vectorized env whose envs are shared out to actors, which can collect whole rollouts by themselves."""

import time
import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol

import cloudpickle  # type: ignore[import-untyped]
import numpy as np
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import CloudpickleWrapper, VecEnv, VecMonitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from sb3_pg import compat
from sb3_pg.envs.actors.host import Broadcast, Collected, EnvMaker, Warned, weights_of
from sb3_pg.envs.actors.transports import SECONDS_TO_END, SECONDS_TO_START, TRANSPORTS, Worker
from sb3_pg.envs.actors.wrappers import put_together, states_for, why_not_rebuilt, wrappers_around
from sb3_pg.policies import (
    CopiedFrom,
    Share,
    can_be_copied,
    copy_without_optimizer,
    map_observations,
    original,
    set_training_mode,
)
from sb3_pg.rollout import EnvWorkerError, Failure, Order, Playback, infos_of_episodes, order_for


class ActorVecEnv(VecEnv):
    """Envs that are shared out to actors, each in a process of its own.

    For the on-policy classes and OffPolicyPG, an actor also has a copy of the policy, on the CPU. It collects a whole
    rollout in its envs by itself, with VecNormalize, VecFrameStack, VecMonitor, VecTransposeImage, VecCheckNan and
    :class:`~sb3_pg.envs.ActionMaskVecEnv` around them. Everything else sees an ordinary VecEnv, which is stepped. The
    envs are also stepped where another wrapper is around them, where a behavior policy acts, or where a copy of the
    policy would not act as the policy does.

    One actor gives what SB3's DummyVecEnv gives, to the bit. With several actors, the forward passes have other batch
    sizes and are rounded otherwise. Each actor's VecNormalize goes on with its own copy of the statistics until the
    rollout ends. Where the policy's own methods draw the actions (images, dicts, methods of your own), each actor but
    the first has a random stream of its own. All of it is reproducible, and the same with every transport.

    Callbacks are called when all actors have finished. One that stops the rollout cannot undo its other steps: the next
    rollout begins with a reset. Attributes of the envs, and VecNormalize's latest observations and rewards, are those
    of the rollout's end. With complete episodes, an actor whose episodes have all ended does nothing until the next
    rollout, where DummyVecEnv steps waiting envs; ``num_timesteps`` counts these steps in any case. Envs that draw from
    NumPy's or Python's global random generator draw from that of their process, which is seeded with its first env.

    :param env_fns: functions that make one env each
    :param n_actors: number of actors; None for one per CPU (of the cluster), at most one per env
    :param transport: "processes"; "ray" for processes of a Ray cluster; or "serial" for
        actors in this process, one after the other
    :param start_method: of processes: "forkserver" or "spawn"; None for "forkserver" where there is one
    :raises ValueError: an argument is out of range
    :raises TypeError: ``n_actors`` is no whole number
    :raises EnvWorkerError: an actor has died
    :raises MissingExtraError: Ray is not installed
    """

    def __init__(
        self,
        env_fns: Sequence[EnvMaker],
        n_actors: int | None = None,
        transport: Literal["processes", "serial", "ray"] = "processes",
        start_method: Literal["forkserver", "spawn"] | None = None,
    ) -> None:
        n_envs = len(env_fns)
        if isinstance(n_actors, bool) or not isinstance(n_actors, int | np.integer | None):
            raise TypeError(f"n_actors must be a whole number or None, got {n_actors!r}")
        if not n_envs:
            raise ValueError("env_fns must have at least one function, got none")
        if n_actors is not None and not 1 <= n_actors <= n_envs:
            raise ValueError(f"n_actors must be from 1 to the number of envs, {n_envs}, or None, got {n_actors}")
        if transport not in TRANSPORTS:
            raise ValueError(f"transport must be one of {list(TRANSPORTS)}, got {transport!r}")
        if start_method is not None and transport != "processes":
            raise ValueError(f"start_method must be None with transport={transport!r}, got {start_method!r}")
        self._transport = TRANSPORTS[transport]
        if n_actors is None:
            n_actors = min(n_envs, self._transport.n_cpus())
        self._worker_options = {} if start_method is None else {"start_method": start_method}
        self._env_fns = list(env_fns)
        #: whether actors are in this process, one after the other
        self.is_serial = transport == "serial"
        parts = np.array_split(np.arange(n_envs), n_actors)
        #: which envs each actor has
        self.shares = [Share(int(part[0]), len(part), n_envs) for part in parts]
        self._workers: list[Worker] = []
        self._finalizer = weakref.finalize(self, _close, self._workers)
        #: what the actors' policies are copies of
        self._copied: CopiedFrom | None = None
        self._pickled_policy = b""
        #: which the actors collect for, if each goes on by itself
        self.stream: Stream | None = None
        self._has_warned: set[str] = set()
        #: in which the warnings of actors are found that were shown already
        self._warnings: dict[str | tuple[str, type[Warning], int], int] = {}
        self._actions: np.ndarray | None = None
        try:
            for share in self.shares:
                self._workers.append(self._transport(share, **self._worker_options))
            for worker, share in zip(self._workers, self.shares, strict=True):
                worker.send("make", *self._to_make(share))
            self._transport.await_start(self._workers)
            made = self._answers(self._workers)
            observation_space, action_space, metadata = made[0]
            super().__init__(n_envs, observation_space, action_space)
        except BaseException:
            self.close()
            raise
        self.metadata = metadata

    def _to_make(self, share: Share) -> tuple[CloudpickleWrapper]:
        return (CloudpickleWrapper(self._env_fns[share.rows]),)

    def _ask(self, command: str, args: Sequence[tuple[Any, ...]], of: Sequence[int] | None = None) -> list[Any]:
        """Let workers run a command at the same time, and return what it returns.

        If the actors collect by themselves, this waits until each has finished its fragment.

        :param command: name of a method of the host
        :param args: its arguments, of each worker
        :param of: numbers of the workers, None for all
        """
        workers = self._workers if of is None else [self._workers[i] for i in of]
        if not workers:
            raise ValueError("the envs are closed")
        if self.stream is not None:
            if command in ("reset", "step"):
                raise ValueError(f"{command} must wait for the end of learn(): the actors collect by themselves")
            self.stream.settle()
            workers = self._workers if of is None else [self._workers[i] for i in of]
        for worker, given in zip(workers, args, strict=True):
            worker.send(command, *given)
        return self._answers(workers)

    @staticmethod
    def _answers(workers: Sequence[Worker]) -> list[Any]:
        answers = [worker.receive() for worker in workers]
        for answer in answers:
            if answer.failure is not None:
                answer.failure.reraise()
        return [answer.value for answer in answers]

    # ---------------------------------------------------------------- VecEnv

    def reset(self) -> Any:
        """Reset all envs, with the seeds and options that were set since the last reset.

        :return: observations
        """
        seeds, options = compat.seeds_and_options(self)
        answers = self._ask("reset", [(seeds[share.rows], options[share.rows]) for share in self.shares])
        observations, infos = zip(*answers, strict=True)
        self.reset_infos = [info for part in infos for info in part]
        compat.clear_seeds_and_options(self)
        return _beside(observations)

    def step_async(self, actions: np.ndarray) -> None:
        """Store the actions for :meth:`step_wait`.

        :param actions: one per env
        """
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Step all envs with the stored actions.

        :return: observations, rewards, True where an episode has ended, infos
        """
        actions = self._actions
        assert actions is not None
        answers = self._ask("step", [(actions[share.rows],) for share in self.shares])
        observations, rewards, dones, infos, reset_infos = zip(*answers, strict=True)
        self.reset_infos = [info for part in reset_infos for info in part]
        return (
            _beside(observations),
            np.concatenate(rewards),
            np.concatenate(dones),
            [info for part in infos for info in part],
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be copied or pickled: a copy would use, and close, the same actors.

        :raises TypeError: always
        """
        raise TypeError(
            "ActorVecEnv can be neither copied nor pickled, since its envs are in actors. Make another one with the "
            "same env_fns."
        )

    def close(self) -> None:
        """Close the envs, and end the actors. It may be called again."""
        self._finalizer()

    def _of_envs(self, indices: VecEnvIndices, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Call a method of the actors' VecEnvs that takes ``indices``, and return what it returns for each of them."""
        wanted = [range(self.num_envs)[i] for i in compat.env_indices(self, indices)]
        calls: dict[int, list[int]] = {}
        for i in wanted:
            number = next(n for n, share in enumerate(self.shares) if i < share.first + share.n_envs)
            calls.setdefault(number, []).append(i)
        first = [self.shares[number].first for number in calls]
        arguments = [
            (method, args, {**kwargs, "indices": [i - start for i in own]})
            for start, own in zip(first, calls.values(), strict=True)
        ]
        results: dict[int, Any] = {}
        for own, returned in zip(calls.values(), self._ask("on_env", arguments, list(calls)), strict=True):
            results.update(zip(own, returned or [None] * len(own), strict=True))
        return [results[i] for i in wanted]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Return an attribute of each env.

        :param attr_name: name of the attribute
        :param indices: the envs, None for all
        :raises AttributeError: the envs have no such attribute
        """
        return self._of_envs(indices, "get_attr", attr_name)

    def has_attr(self, attr_name: str) -> bool:
        """Whether all envs have an attribute.

        :param attr_name: name of the attribute
        """
        return all(self._ask("on_env", [("has_attr", (attr_name,), {})] * len(self.shares)))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of each env.

        :param attr_name: name of the attribute
        :param value: its value
        :param indices: the envs, None for all
        """
        self._of_envs(indices, "set_attr", attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """Call a method of each env, and return what it returns.

        :param method_name: name of the method
        :param indices: the envs, None for all
        """
        return self._of_envs(indices, "env_method", method_name, *args, **kwargs)

    def env_is_wrapped(self, wrapper_class: Any, indices: VecEnvIndices = None) -> list[bool]:
        """Whether envs are wrapped in a class.

        :param wrapper_class: class of the wrapper
        :param indices: the envs, None for all
        """
        return self._of_envs(indices, "env_is_wrapped", wrapper_class)

    def get_images(self) -> Sequence[Any]:
        """Return a picture of each env."""
        pictures = self._ask("on_env", [("get_images", (), {})] * len(self.shares))
        return [picture for part in pictures for picture in part]

    def ask_workers(self, what: str, contents: list[Any] | None = None) -> list[Any]:
        """Get or set the exact state of the envs, see :func:`~sb3_pg.envs.get_env_state`.

        :param what: "layout", "get" or "set"
        :param contents: for "set": what each actor is to set
        """
        return self._ask("state", [(what, content) for content in contents or [None] * len(self.shares)])

    def workers_attributes(self) -> frozenset[str]:
        """Return the names of attributes that are not part of the envs' state."""
        return frozenset({"shares", "_workers", "_finalizer", "_copied", "_has_warned", "_warnings", "_actions"}) | {
            *("_worker_options", "_transport", "_env_fns", "_pickled_policy", "is_serial", "stream")
        }

    # ---------------------------------------------------------------- whole rollouts

    def can_record(self, env: VecEnv, policy: ActorCriticPolicy) -> bool:
        """Whether actors can collect with this policy, and with the wrappers that are around the envs.

        If not, the first call says why in a warning.

        :param env: this one with all wrappers
        :param policy: in eval mode
        """
        unknown = [name for wrapper in wrappers_around(env) if (name := why_not_rebuilt(wrapper))]
        if unknown:
            return self._step_instead(f"actors cannot have {' and '.join(unknown)} around their envs")
        module = original(policy)
        set_training_mode(module, False)  # brings its cache up to date
        if not can_be_copied(module):
            return self._step_instead("the policy has hooks or replaced methods, which actors' copies would not share")
        if self._copied is None or not self._copied.is_current(module):
            self._copied = None
            try:
                pickled = cloudpickle.dumps(copy_without_optimizer(module).to("cpu"))
            except Exception as error:  # noqa: BLE001 (whatever the policy's own parts raise)
                return self._step_instead(f"the policy cannot be copied to actors ({error})")
            self._ask("policy", [(Broadcast(pickled),)] * len(self.shares))
            self._copied, self._pickled_policy = CopiedFrom(module), pickled
        return True

    def _step_instead(self, reason: str) -> bool:
        if reason not in self._has_warned:
            self._has_warned.add(reason)
            warnings.warn(
                f"The learner steps these envs, which takes longer than if actors collected: {reason}", stacklevel=5
            )
        return False

    def record(self, env: VecEnv, policy: ActorCriticPolicy, order: Order) -> Playback:
        """Let all actors collect. See :class:`~sb3_pg.rollout.RecordingEnv`.

        :param env: this one with all wrappers, as for :meth:`can_record`, which comes before
        :param policy: as for :meth:`can_record`
        :param order: what to collect
        """
        weights, random = Broadcast(weights_of(original(policy))), th.get_rng_state().numpy()
        if policy.use_sde:  # for those who call predict() later: the noise with which the actors begin
            policy.reset_noise(self.num_envs)
        collected: list[Collected] = self._ask(
            "collect", [(order_for(order, share), weights, random, states_for(env, share)) for share in self.shares]
        )
        for one in collected:
            self.show(one.warned)
        fragments = [one.fragment for one in collected]
        playback = Playback(fragments, policy)
        th.set_rng_state(th.from_numpy(playback.random))
        if not playback.has_failed:
            put_together(env, [one.wrappers for one in collected])
            self.reset_infos = [info for one in collected for info in one.reset_infos]
            for wrapper in wrappers_around(env):
                if isinstance(wrapper, VecMonitor) and wrapper.results_writer:
                    for info in infos_of_episodes(fragments):
                        wrapper.results_writer.write_row(info["episode"])
        return playback

    # ---------------------------------------------------------------- for a stream of fragments

    def worker(self, number: int) -> Worker:
        """Return an actor.

        :param number: its number
        """
        return self._workers[number]

    def wait_for(self, numbers: Sequence[int], seconds: float | None) -> list[int]:
        """Wait until one of some actors has answered, and return those that have.

        :param numbers: of actors to which a command was sent
        :param seconds: to wait at most; None for as long as it takes
        """
        workers = {self._workers[number]: number for number in numbers}
        return [workers[worker] for worker in self._transport.wait(list(workers), seconds)]

    def show(self, warned: Iterable[Warned]) -> None:
        """Show warnings of an actor, unless they were shown already.

        :param warned: the warnings
        """
        for warning in warned:
            warnings.warn_explicit(*warning, registry=self._warnings)

    def require_record(self, env: VecEnv, policy: ActorCriticPolicy) -> None:
        """Require what :meth:`can_record` tells, in the middle of a stream.

        :param env: as in :meth:`can_record`
        :param policy: as in :meth:`can_record`
        :raises ValueError: the policy or the wrappers have become such that actors cannot have them
        """
        if not self.can_record(env, policy):
            raise ValueError("policy and wrappers must be such that actors can have them: they were changed in learn()")

    def replace_worker(self, number: int, seeds: list[int], timeout: float | None) -> Failure | None:
        """End an actor and start another one in its place, with envs and policy.

        :param number: of the actor
        :param seeds: of its envs, for their first reset
        :param timeout: seconds that each command may take, besides the start; None for no limit
        :return: the error that the env has raised; None if there was none
        :raises EnvWorkerError: it has died, or takes too long
        """
        self._workers[number].kill()
        share = self.shares[number]
        worker = self._workers[number] = self._transport(share, **self._worker_options)
        commands: dict[str, tuple[Any, ...]] = {
            "make": self._to_make(share),
            "policy": (self._pickled_policy,),
            "seed": (seeds, [{} for _ in seeds]),
        }
        for command, args in commands.items():
            worker.send(command, *args)
            limit = None if timeout is None else timeout + (SECONDS_TO_START if command == "make" else 0)
            if not self._transport.wait([worker], limit):
                worker.kill()
                raise EnvWorkerError(f"An actor that was started again has not answered {command!r} in {limit} s.")
            if (failure := worker.receive().failure) is not None:
                return failure
        return None


class Stream(Protocol):
    """Lets each actor go on by itself, see :class:`~sb3_pg.envs.actors.stream.FragmentStream`."""

    def settle(self) -> None:
        """Wait until no actor is busy."""


def _beside(observations: Sequence[Any]) -> Any:
    return map_observations(lambda *parts: np.concatenate(parts), *observations)


def _close(workers: list[Worker]) -> None:
    for worker in workers:
        worker.hang_up()
    end = time.monotonic() + SECONDS_TO_END
    while workers:
        workers.pop().close(max(0.0, end - time.monotonic()))
