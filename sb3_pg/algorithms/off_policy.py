"""Base class of algorithms that replay trajectories: it collects episodes, and takes several updates from a buffer."""

import math
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback, RolloutReturn, TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.vec_env import VecEnv

from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.arguments import SHARED, CommonArguments
from sb3_pg.algorithms.callback_locals import OffPolicyListener, collecting
from sb3_pg.algorithms.learners import (
    CriticRule,
    bootstraps_truncated,
    critic_to_fit,
    refresh_learner,
    require_anchor_before_learning,
    set_up_learner,
    take_update,
    value_scale,
    warm_up_critic,
)
from sb3_pg.algorithms.logged_data import to_trajectories
from sb3_pg.algorithms.saved_files import load_replay_buffer, save_replay_buffer
from sb3_pg.algorithms.shell import Algorithm, LogInterval, waits_for_learning_starts
from sb3_pg.algorithms.validation import SB3, EnvLike, Group
from sb3_pg.demonstrations import Demonstrations
from sb3_pg.errors import NonFiniteError
from sb3_pg.learner import Anchor, ImportanceSampled, Learner, LearnerState, Report, Step
from sb3_pg.learner.rollback import require_log_probs
from sb3_pg.policies import (
    Behavior,
    BehaviorPolicy,
    BehaviorSampler,
    Sampler,
    adopted,
    behavior_source,
    evaluation_mode,
    masked_uniform_behavior,
    uniform_behavior,
)
from sb3_pg.rollout import (
    Collector,
    DictTrajectoryReplayBuffer,
    DictTrajectoryRolloutBuffer,
    EpisodeLimit,
    Pieces,
    RolloutBatch,
    Trajectory,
    TrajectoryReplayBuffer,
    TrajectoryRolloutBuffer,
    action_log_probs,
    score_batch,
)
from sb3_pg.rollout.trajectory_buffer import Stored

#: Advice for envs whose episodes have no end.
OTHER_ALGORITHM = "use ActorCritic, which learns from pieces of episodes too"
SelfOffPolicy = TypeVar("SelfOffPolicy", bound="OffPolicyShell")
#: Sum of the absolute rewards of a trajectory, above which the squares of a gradient may overflow single precision.
_HUGE_REWARDS = 1e12


@contextmanager
def _overflow_named() -> Iterator[None]:
    """Turn the error of an importance weight that is too large for a number into a NonFiniteError."""
    try:
        yield
    except OverflowError as error:
        raise NonFiniteError("importance weight", math.inf, hint=str(error)) from error


class ReplayArguments(CommonArguments, total=False):
    """Keyword arguments of algorithms that replay trajectories, without those of the critic's training."""

    buffer_size: int
    buffer_trajectories: int
    learning_starts: int
    batch_size: int | None
    train_freq: int | tuple[int, str]
    gradient_steps: int
    replay_buffer_class: type[ReplayBuffer] | None
    replay_buffer_kwargs: dict[str, Any] | None
    optimize_memory_usage: bool
    action_noise: ActionNoise | None
    behavior_policy: Behavior | None


def _check_behavior(_name: str, value: Any) -> None:
    if value is not None:
        behavior_source(value)


def _check(model: Any) -> None:
    if model.learning_starts and model.behavior_policy is None:
        uniform_behavior(model.action_space, squashed=False)  # raises if the space has no uniform density
    _ = model.episodes_per_env
    kept = model.replay_buffer_kwargs.get("max_trajectories", model.buffer_trajectories)
    if kept != model.buffer_trajectories and not model._is_kept_by_load("replay_buffer_kwargs"):
        wanted = f"buffer_trajectories={model.buffer_trajectories} or left out"
        raise ValueError(f"replay_buffer_kwargs['max_trajectories'] must be {wanted}, got {kept}")


REPLAY = Group(
    """
    :param buffer_size: transitions that the replay buffer can hold, over all envs
    :param buffer_trajectories: largest number of trajectories that are kept; the newest stay
    :param learning_starts: env steps before the first update. Rollouts that begin earlier draw actions uniformly
    :param batch_size: trajectories per gradient step, which include the newest; None for all that are kept
    :param train_freq: what is collected between two updates. ``(n, "episode")``: n complete episodes from a reset, a
        multiple of the number of envs. ``(n, "step")`` or n: n steps of each env; unfinished episodes continue with the
        next policy
    :param gradient_steps: gradient steps per update; -1 for as many as env steps were taken since the last update
    :param replay_buffer_class: a subclass of :class:`~sb3_pg.rollout.TrajectoryReplayBuffer`
    :param replay_buffer_kwargs: further arguments of the replay buffer
    :param optimize_memory_usage: must be False
    :param action_noise: must be None, because the log-prob of a noisy action would be unknown
    :param behavior_policy: acts instead of the policy, from the first step on. It is a model that knows its log-probs
        (A2C, PPO, TRPO, or one of this package; only its policy is kept), a policy, or a callable as described in
        :data:`~sb3_pg.policies.BehaviorPolicy`. It gets the observations of this algorithm's env. If it was trained
        with a VecNormalize, this env needs one with the same statistics. See also
        :class:`~sb3_pg.policies.PolicyBehavior`
    """,
    {
        "buffer_size": (100_000, arg.integer(1)),
        "buffer_trajectories": (32, arg.integer(1)),
        "learning_starts": (0, arg.integer(0)),
        "batch_size": (None, arg.integer(1, optional=True)),
        "train_freq": ((8, "episode"), arg.train_freq),
        "gradient_steps": (4, arg.integer(-1)),
        "replay_buffer_class": (None, arg.subclass(TrajectoryReplayBuffer)),
        "replay_buffer_kwargs": (None, arg.instance(dict, optional=True)),
        "optimize_memory_usage": (False, arg.instance(bool)),
        "action_noise": (None, arg.nothing("the log-prob of a noisy action would be unknown")),
        "behavior_policy": (None, _check_behavior),
    },
    check=_check,
)


class OffPolicyShell(Algorithm, OffPolicyAlgorithm):
    """Base class of algorithms that replay trajectories. A subclass defines its arguments, its estimator and its step.

    The replay buffer keeps each trajectory with the log-probs of the policy that acted.

    :param policy: see :data:`~sb3_pg.algorithms.validation.ALWAYS`
    :param env: see :data:`~sb3_pg.algorithms.validation.ALWAYS`
    :param arguments: arguments of the class's ``groups``
    :raises ValueError: an argument is out of range, or arguments contradict each other
    :raises TypeError: an argument is of the wrong type, or unknown
    """

    groups: ClassVar[tuple[Group, ...]] = (SHARED, SB3, REPLAY)
    critic_rule: ClassVar[CriticRule] = CriticRule()
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = A2C.policy_aliases
    load_replay_buffer = load_replay_buffer
    save_replay_buffer = save_replay_buffer
    value_scale = property(value_scale)
    warm_up_critic = warm_up_critic
    _critic_to_fit = critic_to_fit
    policy: ActorCriticPolicy
    replay_buffer: TrajectoryReplayBuffer | None
    batch_size: int | None  # type: ignore[assignment]
    ent_coef: float
    vf_coef: float
    max_grad_norm: float | None
    truncation: Literal["bootstrap", "terminal"] | None
    critic_fit: Literal["after", "before"]
    max_episode_steps: int
    buffer_trajectories: int
    behavior_policy: Behavior | None
    min_ess: float
    anchor: Anchor | None = None
    learner: Learner
    learner_state: LearnerState
    _collector: Collector | None = None
    _pieces: Pieces | None = None
    _log_interval: int | None = 1
    _has_callbacks = False
    _n_refused = 0

    def __init__(self, policy: str | type[ActorCriticPolicy], env: EnvLike | None, **arguments: Any) -> None:
        of_sb3 = ("gamma", *REPLAY.arguments.keys() - {"buffer_trajectories", "behavior_policy"})
        self._construct({"policy": policy, "env": env, **arguments}, of_sb3, support_multi_env=True)

    # ---------------------------------------------------------------- the algorithm

    @abstractmethod
    def make_estimator(self) -> ImportanceSampled:
        """Make the estimator of returns, advantages and importance weights from the present arguments."""

    @abstractmethod
    def make_step(self) -> Step:
        """Make the step that updates the actor from the present arguments."""

    @property
    def n_episodes_at_least(self) -> int:
        """Smallest number of episodes in a batch."""
        collected = self.n_envs * (self.episodes_per_env or 0)
        return max(1, min(collected, self.batch_size or collected, self.buffer_trajectories))

    @property
    def episodes_per_env(self) -> int | None:
        """Complete episodes per env and rollout; None if ``train_freq`` is in steps.

        :raises ValueError: ``train_freq`` is not a multiple of the number of envs
        """
        return self._episodes_per_env(self._frequency())

    def _episodes_per_env(self, frequency: TrainFreq) -> int | None:
        if frequency.unit == TrainFrequencyUnit.STEP:
            return None
        if frequency.frequency % self.n_envs:
            raise ValueError(
                f"train_freq=({frequency.frequency}, 'episode') must be a multiple of the number of envs, "
                f"{self.n_envs}, so that every env contributes equally many episodes"
            )
        return frequency.frequency // self.n_envs

    # ---------------------------------------------------------------- setting up

    def _setup_model(self) -> None:
        self._check_again()
        self._check_combinations()
        if self.replay_buffer_class is None:
            is_dict = isinstance(self.observation_space, spaces.Dict)
            self.replay_buffer_class = DictTrajectoryReplayBuffer if is_dict else TrajectoryReplayBuffer
        arg.require_keywords("replay_buffer_kwargs", self.replay_buffer_class, self.replay_buffer_kwargs)
        self.replay_buffer_kwargs = {**self.replay_buffer_kwargs, "max_trajectories": self.buffer_trajectories}
        with self._extended_policy():
            super()._setup_model()
        set_up_learner(self)
        self._adopt_behavior()
        self._check_effects()

    def _adopt_behavior(self) -> BehaviorPolicy | None:
        self.behavior_policy, behavior = adopted(self.behavior_policy, self.policy, self.env)
        return behavior

    def _convert_train_freq(self) -> None:
        self.train_freq = self._frequency()  # type: ignore[assignment]  # as SB3 does

    def _frequency(self) -> TrainFreq:
        given: Any = self.train_freq
        if isinstance(given, TrainFreq):
            return given
        n, unit = given if isinstance(given, tuple | list) else (given, "step")
        return TrainFreq(n, TrainFrequencyUnit(unit))

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, variables = super()._get_torch_save_params()
        return [*state_dicts, "policy.optimizer"], variables

    # ---------------------------------------------------------------- collecting

    def learn(
        self: SelfOffPolicy,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: LogInterval = "auto",
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfOffPolicy:
        """Train for a number of env steps. The arguments are those of SB3's ``learn``, with these differences.

        :param log_interval: episodes between two logs; "auto" logs about every 500 steps of each env, as often as A2C.
            (SB3's default of 4 episodes would log every update)
        :param tb_log_name: name of the TensorBoard run, None for the name of the class
        :raises ValueError: an argument is out of range, or the model has no env
        :raises TypeError: an argument is of the wrong type
        """
        self._log_interval, self._has_callbacks = (1 if log_interval == "auto" else log_interval), bool(callback)
        return self._learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def _run(self, *arguments: Any) -> None:
        require_anchor_before_learning(self)
        super()._run(*arguments)

    def _why_no_update(self) -> str:
        assert self.replay_buffer is not None
        if self.gradient_steps == 0 or self._n_skipped:  # a skipped update has given a warning already
            return ""
        if self.num_timesteps <= self.learning_starts:
            return waits_for_learning_starts(self)
        if not self.replay_buffer.trajectories:
            return (
                f"no episode has ended in {self.num_timesteps} steps, and updates take complete episodes. Give more "
                f"total_timesteps, give the env a time limit (gymnasium.wrappers.TimeLimit), or {OTHER_ALGORITHM}."
            )
        if self._n_refused:
            return f"the effective sample size has stayed under min_ess={self.min_ess}. Give a smaller one."
        return ""

    def add_trajectories(
        self,
        trajectories: Iterable[Trajectory] | Demonstrations,
        log_prob: np.ndarray | Literal["cloned"] | None = None,
    ) -> None:
        """Put logged episodes into the replay buffer, as if they had just been collected.

        :param trajectories: complete episodes, with the log-probs of the policy that acted. Discrete and MultiDiscrete
            actions are numbered as the env numbers them. Actions of a Box are as sampled, before clipping or rescaling.
            Or demonstrations with rewards, which the present statistics of a VecNormalize normalize; truncated episodes
            without final observations count as terminated
        :param log_prob: of demonstrations: the log-probs of the policy that acted, nats, ``(n_steps,)``; or "cloned",
            where they are unknown, for those of the present policy, which should be a clone of the one that acted, see
            ``pretrain``. Ratios are relative to the clone then, and its error is a bias: there is a warning
        :raises ValueError: an episode is not complete, has arrays of other shapes, numbers that are not finite, or
            actions outside the space; or ``log_prob`` is missing, or is of something else than demonstrations. No
            episode is added then
        """
        assert self.replay_buffer is not None
        if isinstance(trajectories, Demonstrations):
            own = to_trajectories(self, trajectories, log_prob)
        elif log_prob is None:
            own = [trajectory.as_drawn_by(self.policy) for trajectory in trajectories]
        else:
            raise ValueError(f"log_prob must be None for trajectories, which have log-probs, got {log_prob!r}")
        self.replay_buffer.add_trajectories(own, self._n_updates)

    def collect_rollouts(  # type: ignore[override]
        self,
        env: VecEnv,
        callback: BaseCallback,
        train_freq: TrainFreq,
        replay_buffer: TrajectoryReplayBuffer,
        action_noise: ActionNoise | None = None,
        learning_starts: int = 0,
        log_interval: int | None = None,
    ) -> RolloutReturn:
        """Collect with the current policy, and put the episodes that have ended into the replay buffer.

        :return: steps of all envs, episodes, and whether to go on
        :raises NonFiniteError: a reward or an observation is not finite
        """
        if self._ends_here():
            return RolloutReturn(0, 0, continue_training=False)
        self._at_boundary()
        names = {name: value for name, value in locals().items() if name not in ("__class__", "callback")}
        began, steps_before = time.perf_counter(), self.num_timesteps
        if self._collector is not None and self._collector.env is not env:
            self._pieces = None
        pieces, self._pieces = self._pieces or Pieces(env.num_envs), None  # None if the rollout is interrupted
        per_env = self._episodes_per_env(train_freq)
        n_steps = train_freq.frequency if per_env is None else None
        is_dict = isinstance(self.observation_space, spaces.Dict)
        rollout = (DictTrajectoryRolloutBuffer if is_dict else TrajectoryRolloutBuffer)(
            n_steps, self.observation_space, self.action_space, self.device, n_envs=env.num_envs
        )
        found: list[Trajectory] = []
        callback.on_rollout_start()
        try:
            with collecting(self, env) as collector:
                sampler = collector.fill(
                    rollout,
                    n_steps=n_steps,
                    episodes_per_env=per_env,
                    limit=EpisodeLimit(self.max_episode_steps, OTHER_ALGORITHM),
                    sampler=self._behavior(learning_starts),
                    listener=OffPolicyListener(self, callback, {**names, "continue_training": True}),
                )
            if sampler is None:
                return RolloutReturn(self.num_timesteps - steps_before, 0, continue_training=False)
            log_probs = action_log_probs(self.policy, rollout, sampler)
            require_log_probs(self.policy, log_probs, th.as_tensor(rollout.mask, device=log_probs.device))
            rollout.log_probs = log_probs.cpu().numpy()
            found = pieces.complete(rollout)
            self._pieces = pieces
            replay_buffer.add_trajectories(found, self._n_updates)
        except NonFiniteError as error:
            self._skip_or_raise(error, has_stepped=self.num_timesteps > steps_before)
        self.logger.record("rollout/valid_fraction", rollout.valid_fraction)
        self._update_current_progress_remaining(self.num_timesteps, self._total_timesteps)
        callback.on_rollout_end()
        self.logger.record("time/collect_seconds", time.perf_counter() - began, self._detail)
        before, self._episode_num = self._episode_num, self._episode_num + len(found)
        if log_interval is not None and (
            self._is_time_to_log() if self._log_steps else self._episode_num // log_interval > before // log_interval
        ):
            self.dump_logs()
        return RolloutReturn(self.num_timesteps - steps_before, len(found), continue_training=True)

    def _behavior(self, learning_starts: int) -> Sampler | None:
        """Return the sampler that acts in the next rollout; None for the policy's own."""
        behavior, squashed, masks = self._adopt_behavior(), self.policy.squash_output, self.uses_masks
        if behavior is None and self.num_timesteps < learning_starts:
            space = self.action_space
            behavior = masked_uniform_behavior(space) if masks else uniform_behavior(space, squashed)
        return None if behavior is None else BehaviorSampler(behavior, self.action_space, squashed, masks)

    @property
    def actor(self) -> Any:  # type: ignore[override]
        """Object that SB3's log asks for the standard deviation with gSDE."""
        return SimpleNamespace(get_std=self.policy.log_std.exp)

    # ---------------------------------------------------------------- updating

    def train(self, gradient_steps: int, batch_size: int | None) -> None:
        """Take gradient steps from trajectories of the replay buffer. If one fails, parameters stay as they were.

        Trajectories with rewards that no step can use leave the buffer then.

        :param gradient_steps: number of steps
        :param batch_size: trajectories per step, None for all
        :raises NonFiniteError: a gradient or a parameter would not be finite
        """
        for n in range(gradient_steps):
            is_last = n == gradient_steps - 1 and self._log_interval is not None
            report: Report = "step" if is_last else "batch" if self._has_callbacks else "nothing"
            chosen: list[Stored] = []
            try:
                with _overflow_named():
                    batch = self._next_batch(batch_size, chosen)
                    if batch is None:
                        return
                    if not take_update(self, batch, report):
                        self._forget(chosen)
            except NonFiniteError as error:
                self._forget(chosen)
                self._skip_or_raise(error)
                return

    def _forget(self, failed: list[Stored]) -> None:
        """Take trajectories with huge rewards out of the buffer after a failed step, or the next ones would fail too.

        :param failed: trajectories of the step
        """
        buffer = self.replay_buffer
        assert buffer is not None
        buffer.discard(t for t in failed if buffer.size_of_rewards(t) > _HUGE_REWARDS)

    def _next_batch(self, batch_size: int | None, chosen: list[Stored]) -> RolloutBatch | None:
        """Return trajectories with weights and estimates for the present policy; None if ``min_ess`` refuses all.

        :param batch_size: number of trajectories, None for all
        :param chosen: is changed to the places of the batch's trajectories
        """
        buffer, learner = self.replay_buffer, refresh_learner(self)
        assert buffer is not None
        estimator = self.make_estimator()
        with_values = estimator.requires_critic
        while buffer.trajectories:
            chosen[:] = buffer.choose(batch_size)
            batch = buffer.batch(chosen, with_values and bootstraps_truncated(self))
            with evaluation_mode(self.policy):
                log_prob = score_batch(self.policy, batch, with_values=with_values, value_scale=learner.value_scale)
                require_log_probs(self.policy, log_prob, batch.valid)
                estimator.weigh(batch, log_prob)
                if estimator.effective_share(batch) >= self.min_ess:
                    learner.estimate(batch)
                    updates_since = [self._n_updates - trajectory.collected for trajectory in chosen]
                    self.logger.record("train/staleness", sum(updates_since) / len(updates_since), self._detail)
                    return batch
            self._n_refused += 1
            self.logger.record("train/n_refused", self._n_refused)
            if not buffer.drop_oldest():
                break
        return None
