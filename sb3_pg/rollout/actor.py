"""Collect whole fragments elsewhere: an actor holds some of the envs and a copy of the policy.

A fragment is what one actor has collected for one rollout, as arrays. :class:`Playback` puts the fragments of all
actors side by side, and plays them to the learner's own loop step by step.
"""

import pickle
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from sb3_pg.errors import NonFiniteError
from sb3_pg.policies import ForwardSampler, Sampler, Share, State, draws_by_share, map_observations
from sb3_pg.rollout.buffers import DictTrajectoryRolloutBuffer, TrajectoryRolloutBuffer
from sb3_pg.rollout.collector import Collector, CollectorState, Order
from sb3_pg.rollout.make_batch import action_log_probs

#: Seconds after which an actor looks whether its learner still waits.
SECONDS_BETWEEN_LOOKS = 0.2


class RemoteTraceback(Exception):  # noqa: N818 (it is the cause of an error, and none by itself)
    """Where an error was raised, in another process or in the part of an actor.

    :param text: the traceback, with what is known of its place
    """

    def __str__(self) -> str:
        return "\n" + str(self.args[0])


@dataclass
class Failure:
    """An error that can be sent to another process.

    :param error: the error; a RuntimeError with its text if it cannot be pickled
    :param text: its traceback
    """

    error: Exception
    text: str

    @classmethod
    def of(cls, error: Exception, place: str) -> "Failure":
        """Return the error as it can be sent.

        :param error: being handled
        :param place: where it was raised, in words
        """
        text = f"{place}:\n" + "".join(traceback.format_exception(error))
        try:
            copied: Exception = pickle.loads(pickle.dumps(error))
        except Exception:  # noqa: BLE001 (whatever the error's own methods do)
            copied = RuntimeError(f"{type(error).__name__}: {error}")
        return cls(copied, text)

    def reraise(self, first_env: int = 0) -> NoReturn:
        """Raise the error, with its traceback as its cause.

        :param first_env: number of the actor's first env, which errors of numbers count from
        """
        error = self.error
        if isinstance(error, NonFiniteError):
            error = error.counted_from(first_env)
        raise error from RemoteTraceback(self.text)


def env_of(error: Exception) -> int | None:
    """Return the number of the env in which an error or its cause was raised; None if a DummyVecEnv raised neither.

    :param error: being handled
    """
    cause: BaseException | None = error
    while cause is not None:
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            if frame.f_code in (DummyVecEnv.step_wait.__code__, DummyVecEnv.reset.__code__):
                number: int | None = frame.f_locals.get("env_idx")
                return number
        cause = cause.__cause__
    return None


@dataclass
class Fragment:
    """What an actor has collected. Rows are steps, columns are its envs.

    :param observations: as acted upon, and in a last row those that follow, ``(n_steps + 1, n_envs, ...)``
    :param actions: as drawn, ``(n_steps, n_envs, *action_shape)``
    :param rewards: ``(n_steps, n_envs)``
    :param at_start: ``(n_steps, n_envs)``, True where the step has ended an episode
    :param infos: of each step: env -> its infos
    :param kept: values and log-probs that the policy's own ``forward`` has returned, each ``(n_steps, n_envs)``
    :param log_probs: of the actions, nats, ``(n_steps, n_envs)``, if the order is ``apart``
    :param memory: what the policy remembers after the last step, as arrays; None if it has no memory
    :param timesteps: ``(n_envs,)``, steps since each env's episode began, after the last step
    :param random: state of torch's generator after the last step; None if it was not the learner's stream
    :param failure: the error that has ended the fragment
    :param is_of_numbers: whether the error was found in the numbers that the last step has returned
    """

    observations: Any
    actions: np.ndarray
    rewards: np.ndarray
    at_start: np.ndarray
    infos: list[dict[int, dict[str, Any]]]
    kept: tuple[np.ndarray, np.ndarray] | None
    log_probs: np.ndarray | None
    memory: tuple[np.ndarray, ...] | None
    timesteps: np.ndarray
    random: np.ndarray | None
    failure: Failure | None
    is_of_numbers: bool

    def __len__(self) -> int:
        return len(self.rewards)


def infos_of_episodes(fragments: Sequence[Fragment]) -> Iterator[dict[str, Any]]:
    """Yield the infos of steps that have ended an episode, in the order of the steps.

    :param fragments: of actors that have collected at the same time
    """
    for row in range(max(map(len, fragments))):
        for fragment in fragments:
            if row < len(fragment):
                yield from (fragment.infos[row][i] for i in np.flatnonzero(fragment.at_start[row]).tolist())


# ---------------------------------------------------------------- the actor


class Actor:
    """Collects fragments with a policy in some of the envs.

    :param policy: a copy of its own of the learner's policy, on the CPU
    :param share: which of all envs these are
    """

    def __init__(self, policy: ActorCriticPolicy, share: Share) -> None:
        self.policy, self.share = policy, share

    def collect(
        self, env: VecEnv, order: Order, random: np.ndarray, is_orphan: Callable[[], bool] = lambda: False
    ) -> Fragment:
        """Collect one fragment.

        :param env: the envs, with wrappers in the state in which the learner's are
        :param order: what to collect. Its state is that of these envs
        :param random: state of torch's generator
        :param is_orphan: says whether the learner has stopped waiting for the fragment
        :return: the fragment. An error after the first observation is in it
        """
        policy, share = self.policy, Share.whole(self.share.n_envs) if order.apart else self.share
        th.set_rng_state(th.from_numpy(random.copy()))
        tape = _Tape(order, is_orphan)
        collector = Collector(
            policy, _TapedEnv(env, tape), replace(order.state), sde_sample_freq=order.sde_sample_freq, share=share
        )
        is_dict = isinstance(policy.observation_space, spaces.Dict)
        buffer = (DictTrajectoryRolloutBuffer if is_dict else TrajectoryRolloutBuffer)(
            order.n_steps, policy.observation_space, policy.action_space, "cpu", n_envs=share.n_envs
        )
        failure, log_probs = None, None
        try:
            sampler = collector.fill(
                buffer,
                n_steps=order.n_steps,
                episodes_per_env=order.episodes_per_env,
                limit=order.limit,
                listener=tape,
            )
            if order.apart and sampler is not None:
                log_probs = action_log_probs(policy, buffer, sampler).numpy()
        except Exception as error:
            if not tape.has_begun:
                raise
            failure = Failure.of(error, self._place(error, collector.n_steps))
        return tape.fragment(collector, share, failure, log_probs)

    def _place(self, error: Exception, step: int) -> str:
        place = f"In the actor of {self.share}, at step {step} of the rollout"
        env = env_of(error)
        return place if env is None else f"{place}, in env {self.share.first + env}"


class _Tape:
    """Keeps what the steps of a rollout have returned, as the collector's listener.

    :param order: what is collected
    :param is_orphan: see :meth:`Actor.collect`
    """

    reads_infos = True

    def __init__(self, order: Order, is_orphan: Callable[[], bool]) -> None:
        self._with_infos, self._is_orphan = order.with_infos, is_orphan
        self._observations = [] if order.state.last_obs is None else [order.state.last_obs]
        self._actions: list[np.ndarray] = []
        self._rewards: list[np.ndarray] = []
        self._at_start: list[np.ndarray] = []
        self._infos: list[dict[int, dict[str, Any]]] = []
        self._sampler: Sampler | None = None
        self._next_look = 0.0

    @property
    def has_begun(self) -> bool:
        """Whether the first observations are known."""
        return bool(self._observations)

    def began(self, obs: Any) -> None:
        """Keep what a reset has returned before the first step."""
        self._observations.append(obs)

    def returned(self, obs: Any, rewards: np.ndarray, at_start: np.ndarray, infos: Sequence[dict[str, Any]]) -> None:
        """Keep what a step of the envs has returned."""
        self._observations.append(obs)
        self._rewards.append(rewards)
        self._at_start.append(at_start)
        wanted = range(len(infos)) if self._with_infos else np.flatnonzero(at_start).tolist()
        self._infos.append({i: infos[i] for i in wanted})

    def start(self, policy: ActorCriticPolicy, sampler: Sampler) -> None:
        """Note the sampler."""
        del policy
        self._sampler = sampler

    def step(self, obs: Any, starts: np.ndarray, names: dict[str, Any]) -> bool:
        """Keep the actions."""
        del obs, starts
        self._actions.append(names["actions"])
        now = time.monotonic()
        if now < self._next_look:
            return True
        self._next_look = now + SECONDS_BETWEEN_LOOKS
        return not self._is_orphan()

    def episodes_ended(self, infos: list[dict[str, Any]]) -> None:
        """Do nothing."""

    def end(self, last_obs: Any, starts: np.ndarray) -> None:
        """Do nothing."""

    def fragment(
        self, collector: Collector, share: Share, failure: Failure | None, log_probs: np.ndarray | None
    ) -> Fragment:
        """Return what was kept as arrays.

        :param collector: after its rollout
        :param share: which of all envs these are
        :param failure: the error that has ended the rollout
        :param log_probs: of the actions, if they are wanted
        """
        n, sampler, space = len(self._actions), self._sampler, collector.policy.action_space
        kept = None
        if isinstance(sampler, ForwardSampler):
            kept = _stacked(sampler.values[:n], share), _stacked(sampler.log_probs[:n], share)
        memory: State | None = getattr(sampler, "state", None)
        is_streams = share.first == 0 or sampler is None or not draws_by_share(sampler)
        blank = np.zeros((0, share.n_envs))
        timesteps = collector.state.timesteps
        assert timesteps is not None
        return Fragment(
            map_observations(lambda *rows: np.stack(rows), *self._observations[: n + 1]),
            np.stack(self._actions) if n else np.zeros((*blank.shape, *(space.shape or ()))),
            np.stack(self._rewards[:n]) if n else blank,
            np.stack(self._at_start[:n]) if n else blank.astype(bool),
            self._infos[:n],
            kept if log_probs is None else None,
            log_probs,
            None if memory is None else tuple(part.numpy() for part in memory),
            timesteps,
            th.get_rng_state().numpy() if is_streams else None,
            failure,
            collector.n_steps > n,
        )


def _stacked(rows: list[th.Tensor], share: Share) -> np.ndarray:
    return th.stack(rows).numpy() if rows else np.zeros((0, share.n_envs), np.float32)


class _TapedEnv(VecEnvWrapper):
    """Puts what each step returns on a tape.

    :param venv: the envs
    :param tape: the tape
    """

    def __init__(self, venv: VecEnv, tape: _Tape) -> None:
        super().__init__(venv)
        self._tape = tape

    def reset(self) -> Any:
        """Reset the envs."""
        obs = self.venv.reset()
        self._tape.began(obs)
        return obs

    def step_wait(self) -> VecEnvStepReturn:
        """Step the envs."""
        returned = self.venv.step_wait()
        self._tape.returned(*returned)
        return returned


# ---------------------------------------------------------------- the learner's side


def order_for(order: Order, share: Share) -> Order:
    """Return the part of an order that is for one actor.

    :param order: for all envs
    :param share: which envs the actor has
    """
    state, rows = order.state, share.rows
    assert state.episode_starts is not None
    assert state.timesteps is not None
    memory = {name: tuple(part[:, rows].cpu() for part in parts) for name, parts in state.memory.items()}
    obs = map_observations(lambda x: x[rows], state.last_obs)
    return replace(order, state=CollectorState(obs, state.episode_starts[rows], state.timesteps[rows], memory))


class Playback:
    """The fragments of all actors, which are played step by step.

    Actors whose episodes have all ended have shorter fragments. Their envs do nothing then: they return their last
    observation again, and the reward 0.

    :param fragments: one per actor, in the order of the envs
    :param policy: the learner's policy
    """

    def __init__(self, fragments: Sequence[Fragment], policy: ActorCriticPolicy) -> None:
        failed = [fragment for fragment in fragments if fragment.failure is not None]
        #: the fragment whose error comes first
        self._failed = min(failed, key=len, default=None)
        n = max(map(len, fragments)) if self._failed is None else len(self._failed)
        self._first_env = 0
        for fragment in fragments:
            if fragment is self._failed:
                break
            self._first_env += fragment.rewards.shape[1]

        def beside(*parts: np.ndarray, n_rows: int = n, axis: int = 1) -> np.ndarray:
            return np.concatenate([_padded(part, n_rows) for part in parts], axis=axis)

        self._observations = map_observations(
            lambda *parts: beside(*parts, n_rows=n + 1), *(one.observations for one in fragments)
        )
        self._rewards = np.concatenate([_padded(one.rewards, n, 0.0) for one in fragments], axis=1)
        self._actions = beside(*(one.actions for one in fragments))
        self._at_start = beside(*(one.at_start for one in fragments))
        self._fragments = fragments
        self.timesteps = np.concatenate([fragment.timesteps for fragment in fragments])
        #: state of torch's generator after the fragment that has drawn most
        self.random = max((len(one), -i, one.random) for i, one in enumerate(fragments) if one.random is not None)[2]
        known = [one.log_probs for one in fragments if one.log_probs is not None]
        self.log_probs = beside(*known) if len(known) == len(fragments) else None
        self._row, self._acted, self._policy = -1, -1, policy

    @property
    def has_failed(self) -> bool:
        """Whether an actor has met with an error."""
        return self._failed is not None

    @property
    def sampler(self) -> Sampler:
        """Gives the actions. It is made anew: kept, it would hold what holds it, and memory would be freed late."""
        fragments, policy, n = self._fragments, self._policy, len(self._rewards)
        kept = [fragment.kept for fragment in fragments]
        if kept[0] is not None:
            columns = zip(*(one for one in kept if one is not None), strict=True)
            values, log_probs = (
                th.as_tensor(np.concatenate([_padded(part, n) for part in parts], axis=1), device=policy.device)
                for parts in columns
            )

            def forward(_: Any) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
                actions = th.from_numpy(self._next_actions(None))
                return actions, values[self._acted], log_probs[self._acted]

            player: Any = forward
            return ForwardSampler(player, policy.device)
        memories = [one.memory for one in fragments if one.memory is not None]
        if not memories:
            return self._next_actions
        parts = (
            th.from_numpy(np.concatenate(parts, axis=1)).to(policy.device) for parts in zip(*memories, strict=True)
        )
        return _Remembering(self._next_actions, tuple(parts))

    def _next_actions(self, obs: Any, starts: np.ndarray | None = None) -> np.ndarray:
        del obs, starts
        self._acted += 1
        if self._acted >= len(self._actions):  # those of the step that has failed are not known
            return np.zeros_like(self._actions, shape=self._actions.shape[1:])
        actions: np.ndarray = self._actions[self._acted]
        return actions

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Return the next step, or raise the error in it."""
        del actions
        self._row += 1
        row = self._row
        if row == len(self._rewards):
            failed = self._failed
            if failed is None or not failed.is_of_numbers:
                self.require_no_error()
            obs = map_observations(lambda x: x[row], self._observations)
            n_envs = self._rewards.shape[1]
            return obs, np.zeros(n_envs, np.float32), np.zeros(n_envs, dtype=bool), [{} for _ in range(n_envs)]
        infos: list[dict[str, Any]] = []
        for fragment in self._fragments:
            known = fragment.infos[row] if row < len(fragment) else {}
            infos += [known.get(i) or {} for i in range(fragment.rewards.shape[1])]
        obs = map_observations(lambda x: x[row + 1], self._observations)
        return obs, self._rewards[row], self._at_start[row], infos

    def check(self, step: int) -> None:
        """Raise the error that was found in the numbers of the latest step, if there was one."""
        if step == len(self._rewards):
            self.require_no_error()

    def require_no_error(self) -> None:
        """Raise the error that came after the last step, if there was one."""
        if self._failed is not None and self._failed.failure is not None:
            self._failed.failure.reraise(self._first_env)


@dataclass
class _Remembering:
    """Gives recorded actions.

    :param draw: gives the actions
    :param state: what the policy remembers after the last one
    """

    draw: Sampler
    state: State

    def __call__(self, obs: Any, starts: np.ndarray | None = None) -> np.ndarray:
        """Return the next actions."""
        return self.draw(obs, starts)


def _padded(rows: np.ndarray, n: int, value: float | None = None) -> np.ndarray:
    """Cut rows to a number, or fill them up with a value, or with the last row."""
    if len(rows) >= n:
        return rows[:n]
    last = rows[-1:] if value is None else np.full_like(rows[-1:], value)
    return np.concatenate([rows, np.repeat(last, n - len(rows), axis=0)])
