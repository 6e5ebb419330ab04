"""Step envs with a policy's actions, and write the steps into a buffer.

The loop over steps does nothing else. Log-probs and values come from one batched forward after the loop
(:mod:`sb3_pg.rollout.make_batch`).
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any, NamedTuple, Protocol, TypeGuard

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecFrameStack, VecMonitor, is_vecenv_wrapped

from sb3_pg.action_masks import MASK_KEY, first_without_choice, mask_starts, require_some_choice
from sb3_pg.policies import (
    ActingCopy,
    Sampler,
    Share,
    State,
    States,
    has_masks,
    has_memory,
    make_sampler,
    map_observations,
    original,
    set_training_mode,
    to_env,
    visible_changes,
)
from sb3_pg.rollout.batch import RolloutBatch
from sb3_pg.rollout.buffers import DictTrajectoryRolloutBuffer, TrajectoryRolloutBuffer
from sb3_pg.rollout.env_errors import naming_env_errors, require_form
from sb3_pg.rollout.make_batch import make_batch, set_behavior
from sb3_pg.rollout.nonfinite import (
    NormalizationGuard,
    require_finite_policy,
    require_finite_rollout,
    require_finite_step,
    require_usable_policy,
)
from sb3_pg.rollout.rollout_counter import EpisodeLimit, RolloutProgress


class RolloutListener(Protocol):
    """An object that the collector calls at every step of a rollout.

    If it has an attribute ``reads_infos`` that is False, actors may leave out the infos of steps that end no episode.
    """

    def start(self, policy: ActorCriticPolicy, sampler: Sampler) -> None:
        """Called before the first step.

        :param policy: the policy that is trained
        :param sampler: draws the actions
        """

    def step(self, obs: Any, starts: np.ndarray, names: dict[str, Any]) -> bool:
        """Called after each step of all envs.

        :param obs: the observations that the actions were drawn for
        :param starts: ``(n_envs,)``, True where ``obs`` begins an episode
        :param names: values of the step by name: n_steps (before this one), actions (as drawn), clipped_actions (as the
            env took them), new_obs, rewards, dones, infos
        :return: False to stop the rollout
        """

    def episodes_ended(self, infos: list[dict[str, Any]]) -> None:
        """Called after a step in which episodes ended, after :meth:`step`.

        :param infos: of the envs whose episode has ended
        """

    def end(self, last_obs: Any, starts: np.ndarray) -> None:
        """Called at the end of a rollout, but not of one that was stopped.

        :param last_obs: the observations that follow the last step
        :param starts: ``(n_envs,)``, True where ``last_obs`` begins an episode
        """


class _NoListener:
    """Does nothing, for rollouts without a listener."""

    reads_infos = False

    def start(self, policy: ActorCriticPolicy, sampler: Sampler) -> None: ...

    def step(self, obs: Any, starts: np.ndarray, names: dict[str, Any]) -> bool:
        return True

    def episodes_ended(self, infos: list[dict[str, Any]]) -> None: ...

    def end(self, last_obs: Any, starts: np.ndarray) -> None: ...


@dataclass
class CollectorState:
    """State of the envs between two rollouts.

    :param last_obs: the envs' latest observations; None if the envs are to be reset
    :param episode_starts: ``(n_envs,)``, True where ``last_obs`` begins an episode
    :param timesteps: ``(n_envs,)``, steps since each env's episode began
    :param memory: what the policy's actor, and its critic, remember of each env; empty for a policy without memory, and
        for one that remembers nothing yet
    """

    last_obs: Any = None
    episode_starts: np.ndarray | None = None
    timesteps: np.ndarray | None = None
    memory: States = field(default_factory=dict)


@dataclass
class Order:
    """What is to be collected by others, and where they start from.

    :param n_steps: steps per env; None for complete episodes
    :param episodes_per_env: complete episodes per env; None for segments
    :param limit: longest episode to wait for; None for no limit
    :param sde_sample_freq: steps between new gSDE noise, -1 for once per rollout
    :param with_infos: whether the infos of all steps are wanted, and not only of those that end an episode
    :param state: of the envs. Without observations, whoever collects begins with a reset
    :param apart: whether each actor's fragment is learned from by itself, perhaps by a later policy. Then random
        numbers are drawn for the actor's envs only, and the fragment has the log-probs of the policy that acted
    """

    n_steps: int | None
    episodes_per_env: int | None
    limit: EpisodeLimit | None
    sde_sample_freq: int
    with_infos: bool
    state: CollectorState
    apart: bool = False


class Recording(Protocol):
    """Steps of all envs that others have collected. They are played as if they were taken now."""

    #: gives the actions
    sampler: Sampler
    #: ``(n_envs,)``, steps since each env's episode began, after the last step
    timesteps: np.ndarray
    #: of the actions under an older policy that drew them, nats, ``(n_steps, n_envs)``; None if the policy itself did
    log_probs: np.ndarray | None

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Return the next step as ``VecEnv.step`` does, or raise the error that it has raised."""

    def check(self, step: int) -> None:
        """Raise the error that was found in the numbers of the latest step, if there was one."""

    def require_no_error(self) -> None:
        """Raise the error that came after the last step, if there was one."""


class RecordingEnv(Protocol):
    """A VecEnv without wrappers that can collect by itself, such as :class:`sb3_pg.envs.ActorVecEnv`."""

    def can_record(self, env: VecEnv, policy: ActorCriticPolicy) -> bool:
        """Whether it can collect with this policy, and with the wrappers that are around it."""

    def record(self, env: VecEnv, policy: ActorCriticPolicy, order: Order) -> Recording:
        """Collect. Torch's generator is then where the policy's draws have left it.

        :param env: this one with all wrappers, whose state is brought up to date too
        :param policy: in eval mode
        :param order: what to collect
        """


class _Play(NamedTuple):
    """Where the steps of a rollout come from: the policy and the envs, or a recording."""

    sampler: Sampler
    step: Callable[[np.ndarray], Any]
    check: Callable[[int], None]
    sde_sample_freq: int


class Collector:
    """Collects segments of ``n_steps``, or complete episodes, with a policy and a VecEnv.

    With complete episodes, every env contributes the same number of them, from a fresh reset. Envs that have finished
    theirs wait for the others, and their waiting steps are masked. Dropping unfinished episodes instead would
    over-sample short ones. A VecNormalize around the envs sees waiting steps too. The finished buffer leaves out steps
    that only reset an env (:mod:`sb3_pg.envs`).

    If the env is a :class:`RecordingEnv`, it is asked for a whole rollout, whose steps are then played to the listener.

    >>> from stable_baselines3.common.env_util import make_vec_env
    >>> from stable_baselines3.common.policies import ActorCriticPolicy
    >>> from sb3_pg.rollout import Collector
    >>> env = make_vec_env("CartPole-v1", 2)
    >>> policy = ActorCriticPolicy(env.observation_space, env.action_space, lambda _: 3e-4)
    >>> batch = Collector(policy, env).collect(n_steps=8)
    >>> print(batch.rewards.shape)
    torch.Size([8, 2])

    :param policy: the policy; the attribute may be replaced between rollouts
    :param env: the environments
    :param state: where the previous rollout has left the envs; None to reset them
    :param act_device: device to compute actions on, with a copy of the policy; None for the policy's own
    :param sde_sample_freq: steps between new gSDE noise, -1 for once per rollout
    :param share: which envs these are, if the policy acts in others at the same time; None if they are all
    :raises ValueError: ``act_device`` is no CPU, and the env's actors act on the CPU
    """

    def __init__(
        self,
        policy: ActorCriticPolicy,
        env: VecEnv,
        state: CollectorState | None = None,
        *,
        act_device: th.device | str | None = None,
        sde_sample_freq: int = -1,
        share: Share | None = None,
    ) -> None:
        self.policy, self.env, self.sde_sample_freq = policy, env, sde_sample_freq
        self._share = Share.whole(env.num_envs) if share is None else share
        self.state = CollectorState() if state is None else state
        self._normalization = NormalizationGuard(env)
        self._copy: ActingCopy | None = None
        self._actors: RecordingEnv | None = env.unwrapped if _can_record(env.unwrapped) else None
        if self._actors is not None and act_device is not None and get_device(act_device).type != "cpu":
            raise ValueError(f"act_device must be None or 'cpu': actors act on the CPU, got {str(act_device)!r}")
        if act_device is not None and (device := get_device(act_device)) != policy.device:
            self._copy = ActingCopy(device)
        #: the policy or the copy of it that acts
        self.acting = policy
        #: of each step: where it begins an episode
        self._starts: list[np.ndarray] = []
        #: env steps per env in the latest rollout, also if it was stopped or has failed
        self.n_steps = 0
        #: log-probs of the older policy that has taken the latest rollout's steps; None if ``policy`` has
        self._behavior_log_probs: np.ndarray | None = None

    def collect(
        self,
        *,
        n_steps: int | None = None,
        episodes_per_env: int | None = None,
        limit: EpisodeLimit | None = None,
        buffer: TrajectoryRolloutBuffer | None = None,
        listener: RolloutListener | None = None,
        with_values: bool = True,
        bootstrap_truncated: bool = True,
        value_scale: float = 1.0,
        keep_graph: bool = False,
        continues: bool = False,
    ) -> RolloutBatch | None:
        """Collect one rollout and score it: :meth:`fill`, then :func:`~sb3_pg.rollout.make_batch`.

        Exactly one of ``n_steps`` and ``episodes_per_env`` is given.

        :param n_steps: steps per env
        :param episodes_per_env: complete episodes per env
        :param limit: longest episode to wait for; None for no limit
        :param buffer: an empty buffer to fill; None for a new one
        :param listener: is called at every step
        :param with_values: whether to compute values
        :param bootstrap_truncated: whether to value the last states of truncated episodes
        :param value_scale: what the critic's values are multiplied by to give reward units
        :param keep_graph: whether to set ``batch.kept_scores``, which saves an update that follows at once a forward
        :param continues: whether the task goes on after a termination, in the state that the reset gives; this state is
            then valued where the last step is a termination
        :return: the batch, or None if the listener stopped the rollout
        :raises ValueError: both or neither of ``n_steps`` and ``episodes_per_env``
        :raises EndlessEpisodeError: an episode exceeds the limit
        :raises NonFiniteError: a reward or an observation is not finite
        """
        policy, n_envs = self.policy, self.env.num_envs
        if buffer is None:
            is_dict = isinstance(policy.observation_space, spaces.Dict)
            buffer = (DictTrajectoryRolloutBuffer if is_dict else TrajectoryRolloutBuffer)(
                n_steps, policy.observation_space, policy.action_space, policy.device, n_envs=n_envs
            )
        sampler = self.fill(buffer, n_steps=n_steps, episodes_per_env=episodes_per_env, limit=limit, listener=listener)
        if sampler is None:
            if with_values:
                self._remember_stopped(buffer)
            return None
        batch = make_batch(
            policy,
            buffer,
            sampler,
            with_values=with_values,
            bootstrap_truncated=bootstrap_truncated,
            n_episodes=None if episodes_per_env is None else episodes_per_env * n_envs,
            value_scale=value_scale,
            keep_graph=keep_graph,
            last_obs=self.state.last_obs if continues else None,
        )
        if self._behavior_log_probs is not None:
            set_behavior(batch, buffer, self._behavior_log_probs)
        if batch.critic_state is not None:
            self.state.memory = {**self.state.memory, "critic": _of_envs(batch.critic_state, batch)}
        return batch

    def fill(
        self,
        buffer: TrajectoryRolloutBuffer,
        *,
        n_steps: int | None = None,
        episodes_per_env: int | None = None,
        limit: EpisodeLimit | None = None,
        sampler: Sampler | None = None,
        listener: RolloutListener | None = None,
    ) -> Sampler | None:
        """Fill and close a buffer. If this raises, ``state.last_obs`` is None: the next rollout resets the envs.

        :param buffer: an empty buffer
        :param n_steps: as in :meth:`collect`
        :param episodes_per_env: as in :meth:`collect`
        :param limit: as in :meth:`collect`
        :param sampler: draws the actions; None to draw them from the policy
        :param listener: as in :meth:`collect`
        :return: the sampler that was used, or None if the listener stopped the rollout
        :raises ValueError: both or neither of ``n_steps`` and ``episodes_per_env``
        :raises EndlessEpisodeError: an episode exceeds the limit
        :raises NonFiniteError: a reward, an observation or a parameter of the policy is not finite
        :raises EnvWorkerError: a worker of a SubprocVecEnv, or an actor, has died
        """
        if (n_steps is None) == (episodes_per_env is None):
            raise ValueError(
                f"exactly one of n_steps and episodes_per_env must be given, got n_steps={n_steps} and "
                f"episodes_per_env={episodes_per_env}"
            )
        policy, state = self.policy, self.state
        self.acting, self.n_steps, self._behavior_log_probs = policy, 0, None
        set_training_mode(policy, False)
        before = visible_changes(policy)
        recorder = self._actors if sampler is None else None
        if recorder is not None and not recorder.can_record(self.env, policy):
            recorder = None
        recording: Recording | None = None
        try:
            require_usable_policy(policy)
            listener = listener or _NoListener()
            play = None if recorder else self._live(sampler)
            if play is not None:
                listener.start(policy, play.sampler)
            progress = RolloutProgress(self.env.num_envs, n_steps, episodes_per_env, limit)
            named, kept = naming_env_errors(self.env), self._normalization.statistics_kept()
            with named, kept, skip_reset_steps(self.env) as resetting:
                self._reset_if_needed(complete=episodes_per_env is not None)
                remembered = self._remembered()
                buffer.memory = state.memory
                if play is None:
                    assert recorder is not None
                    reads_infos = getattr(listener, "reads_infos", True)
                    now = replace(state, memory={} if remembered is None else {"actor": remembered})
                    order = Order(n_steps, episodes_per_env, limit, self.sde_sample_freq, reads_infos, now)
                    recording = recorder.record(self.env, policy, order)
                    play = _Play(recording.sampler, recording.step, recording.check, -1)
                    self._behavior_log_probs = recording.log_probs
                    listener.start(policy, play.sampler)
                finished = self._loop(buffer, play, listener, progress, resetting)
                if recording is not None and finished:
                    recording.require_no_error()
        except BaseException:
            state.last_obs = None  # the envs are in an unknown state
            raise
        after: State | None = getattr(play.sampler, "state", None)
        state.memory = {} if after is None else {"actor": after}  # that of the critic follows, if it is computed
        if recording is not None:
            state.timesteps = recording.timesteps
            if not finished:  # the envs have gone on
                state.last_obs = None
        if visible_changes(policy) != before:
            warnings.warn(
                "The policy's methods or hooks were changed within a rollout. Actions follow the change from the next "
                "rollout on, while this rollout's log-probs may be those of the changed policy already. Make such "
                "changes in on_rollout_start or on_rollout_end.",
                stacklevel=2,
            )
        return play.sampler if finished else None

    def _live(self, sampler: Sampler | None) -> _Play:
        """Let the policy act in the envs, now.

        :param sampler: draws the actions; None to draw them from the policy
        """
        policy = self.policy
        self.acting, device = (policy, policy.device) if self._copy is None else self._copy.of(policy)
        if policy.use_sde:
            self._share.reset_noise(self.acting)
        if sampler is None:
            sampler = make_sampler(self.acting, device, self._share, self._remembered())
        return _Play(sampler, self.env.step, self._normalization.check, self.sde_sample_freq)

    def _remember_stopped(self, buffer: TrajectoryRolloutBuffer) -> None:
        """Keep what a critic with a memory of its own remembers after a rollout that was stopped."""
        policy: Any = original(self.policy)
        if has_memory(policy) and policy.memory.critic == "own":
            observations = map_observations(lambda x: x[: self.n_steps], buffer.observations)
            after = policy.memory_after(observations, np.stack(self._starts), buffer.memory)
            self.state.memory = {**self.state.memory, "critic": after["critic"]}

    def _remembered(self) -> State | None:
        """Return what the actor remembers of each env; None if it remembers nothing, or is not for these envs."""
        state = self.state.memory.get("actor")
        if state is not None and state[0].shape[1] != self.env.num_envs:
            self.state.memory, state = {}, None
        return state

    def _reset_if_needed(self, complete: bool) -> None:
        """Reset the envs if no observation is known, or if a rollout of complete episodes would start within one."""
        state, n_envs = self.state, self.env.num_envs
        if state.timesteps is None or len(state.timesteps) != n_envs:
            state.timesteps = np.zeros(n_envs, dtype=np.int64)
        if state.last_obs is None or (complete and not np.all(state.episode_starts)):
            state.last_obs = self.env.reset()
            state.episode_starts = np.ones(n_envs, dtype=bool)
            self._normalization.check_reset(state.last_obs)

    def _loop(
        self,
        buffer: TrajectoryRolloutBuffer,
        play: _Play,
        listener: RolloutListener,
        progress: RolloutProgress,
        resets_next: np.ndarray | None,
    ) -> bool:
        """Step until the rollout is complete; return False if the listener stopped it."""
        state, in_env, (sampler, step, check, sde_sample_freq) = self.state, to_env(self.policy), play
        sde_sample_freq = sde_sample_freq if self.policy.use_sde else -1
        obs, first_starts = state.last_obs, np.array(state.episode_starts, dtype=bool)
        assert state.timesteps is not None
        timesteps = np.where(first_starts, 0, state.timesteps)
        progress.start(timesteps)
        complete, go_on, starts = False, True, first_starts
        dimensions = mask_starts(self.policy.action_space) if has_masks(self.policy) else None
        self._starts = []
        while not complete and go_on:
            self._starts.append(starts.copy())
            if sde_sample_freq > 0 and progress.n_steps % sde_sample_freq == 0:
                self._share.reset_noise(self.acting)
            resetting = None if resets_next is None else resets_next.copy()
            if dimensions is not None:
                obs = _with_choices(obs, dimensions, progress.n_steps, resetting)
            try:
                actions = sampler(obs, starts)
                clipped_actions = in_env(actions)
                new_obs, rewards, at_start, infos = step(clipped_actions)
            except Exception as error:
                require_finite_step("observation", obs, progress.n_steps, cause=error)
                require_finite_policy(self.policy, error)
                raise
            self.n_steps += 1
            check(progress.n_steps)
            active = progress.active
            if resetting is not None:
                active = ~resetting if active is None else active & ~resetting
            dones = at_start if active is None else at_start & active
            names = {
                "n_steps": progress.n_steps,
                "actions": actions,
                "clipped_actions": clipped_actions,
                "new_obs": new_obs,
                "rewards": rewards,
                "dones": dones,
                "infos": infos,
            }
            go_on = listener.step(obs, starts, names)
            progress.n_steps += 1
            buffer.append(obs, actions, rewards, dones, active)
            if dones.any():
                ended = np.flatnonzero(dones)
                listener.episodes_ended([infos[i] for i in ended])
                _keep_endings(buffer, ended, infos)
                progress.record(dones)
            if resetting is not None:
                progress.record_resets(resetting)
                at_start = at_start | resetting
            obs, starts = new_obs, at_start
            complete = go_on and progress.is_complete()
        if complete:
            listener.end(obs, starts)
            buffer.finish(first_starts, timesteps, gaps=resets_next is not None)
            if progress.active is None:
                _keep_cut_observations(buffer, obs)
            require_finite_rollout(buffer)
        state.last_obs, state.episode_starts = obs, starts
        state.timesteps = np.where(progress.began > 0, progress.n_steps - progress.began, timesteps + progress.n_steps)
        return complete


def _can_record(env: VecEnv) -> TypeGuard[RecordingEnv]:
    return callable(getattr(env, "record", None)) and callable(getattr(env, "can_record", None))


def _with_choices(obs: Any, dimensions: np.ndarray, step: int, ignored: np.ndarray | None) -> Any:
    """Return observations whose masks allow an action. A mask whose action the env ignores is made to allow all.

    :param obs: a dict with masks
    :param dimensions: from :func:`~sb3_pg.action_masks.mask_starts`
    :param step: time step within the rollout
    :param ignored: ``(n_envs,)``, True where the next step only resets the env; None for nowhere
    :raises ValueError: naming the first env whose mask allows nothing
    """
    bad = first_without_choice(obs[MASK_KEY], dimensions)
    if bad is not None and ignored is not None:
        masks = obs[MASK_KEY].copy()
        masks[ignored] = 1
        obs = {**obs, MASK_KEY: masks}
    if bad is not None:
        require_some_choice(obs[MASK_KEY], dimensions, f"at step {step} of the rollout")
    return obs


def _of_envs(state: State, batch: RolloutBatch) -> State:
    """Return what is remembered of each env whose episode goes on, 0 for the others.

    :param state: what is remembered before each of ``batch.bootstrap_observations``
    :param batch: the rollout
    """
    assert batch.bootstrap_observations is not None
    places, n_envs = batch.bootstrap_observations[1], batch.rewards.shape[1]
    goes_on = ~batch.ends.reshape(-1)[places]
    envs = places[goes_on] % n_envs
    blank = (part.new_zeros(len(part), n_envs, part.shape[2]) for part in state)
    return tuple(zeros.index_copy_(1, envs, part[:, goes_on]) for zeros, part in zip(blank, state, strict=True))


def _keep_endings(buffer: TrajectoryRolloutBuffer, ended: np.ndarray, infos: list[dict[str, Any]]) -> None:
    """Write which of the episodes that ended in the latest row were truncated, and the observations that followed."""
    row = buffer.pos - 1
    for i in ended:
        info = infos[i]
        if info.get("TimeLimit.truncated", False):
            buffer.truncated[row, i] = True
            if info.get("terminal_observation") is not None:
                require_form(info["terminal_observation"], buffer.observation_space, int(i))
                buffer.final_observations[row, int(i)] = info["terminal_observation"]


def _keep_cut_observations(buffer: TrajectoryRolloutBuffer, obs: Any) -> None:
    """Keep the observation after the last step of each unfinished episode. Its value stands for the missing rewards."""
    last, envs = buffer.mask.sum(0) - 1, np.arange(buffer.n_envs)
    for i in np.flatnonzero((last >= 0) & ~buffer.dones[last, envs]):
        buffer.final_observations[int(last[i]), int(i)] = map_observations(itemgetter(i), obs)


#: Wrapper -> the harm that it would do with steps that only reset an env, for the error message.
_DECEIVED: dict[type[VecEnvWrapper], str] = {
    VecFrameStack: "stack one episode's frames on the next one's; use another backend",
    VecMonitor: "count the reset as a step of the episode; make_vec_env(monitor_dir=...) writes the same files",
}


def skip_reset_steps(env: VecEnv) -> AbstractContextManager[np.ndarray | None]:
    """Declare that the caller drops the steps of a NEXT_STEP env that only reset it.

    :param env: any VecEnv
    :return: a context that yields None if the env has no such steps. Otherwise it yields a boolean array, one entry per
        env, that the env keeps up to date: True where the next step only resets
    :raises ValueError: a wrapper would stack the frames of such steps or count them
    """
    masked: Callable[[], AbstractContextManager[np.ndarray | None]] | None = getattr(env, "skip_reset_steps", None)
    if masked is None:
        return nullcontext()
    for wrapper, harm in _DECEIVED.items():
        if getattr(env, "next_step_autoreset", False) and is_vecenv_wrapped(env, wrapper):
            raise ValueError(
                f"{wrapper.__name__} would {harm}. (This env resets in the step after an episode's end, NEXT_STEP.)"
            )
    return masked()
