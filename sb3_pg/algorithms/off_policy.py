"""The template of algorithms that replay trajectories: collect episodes, update several times from those kept."""

import time
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import (
    GymEnv,
    MaybeCallback,
    RolloutReturn,
    Schedule,
    TrainFreq,
    TrainFrequencyUnit,
)
from stable_baselines3.common.vec_env import VecEnv
from typing_extensions import Unpack

from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.learning import LogInterval
from sb3_pg.algorithms.signature import (
    CHECKS,
    REPLAYING_CHECKS,
    CommonArguments,
    CriticFitArguments,
    ReplayingArguments,
)
from sb3_pg.algorithms.update import UpdatingAlgorithm
from sb3_pg.errors import NonFiniteError
from sb3_pg.learner.rollback import require_log_probs
from sb3_pg.policies import Behavior, BehaviorPolicy, BehaviorSampler, Sampler, adopted, uniform_behavior
from sb3_pg.rollout import (
    Collector,
    DictTrajectoryReplayBuffer,
    DictTrajectoryRolloutBuffer,
    EpisodeLimit,
    OffPolicyLocals,
    Pieces,
    RolloutBatch,
    Trajectory,
    TrajectoryReplayBuffer,
    TrajectoryRolloutBuffer,
    action_log_probs,
)

#: What else there is for envs whose episodes have no end.
OTHER_ALGORITHM = "use ActorCritic, which learns from pieces of episodes too"

SelfReplaying = TypeVar("SelfReplaying", bound="ReplayingAlgorithm")


class ReplayingAlgorithm(UpdatingAlgorithm, OffPolicyAlgorithm):
    """Keeps trajectories with the log-probs of the policies that acted. A subclass says what a gradient step takes.

    :param policy: see :class:`~sb3_pg.algorithms.setup.ConfiguredAlgorithm`, as for all arguments but these
    :param env: likewise
    :param learning_rate: likewise
    :param buffer_size: transitions that the replay buffer has room for
    :param buffer_trajectories: trajectories that are kept at most, the newest
    :param learning_starts: env steps before the first update; rollouts that begin before it draw actions uniformly
    :param batch_size: trajectories per gradient step, the newest among them; None for all that are kept
    :param train_freq: what is collected between updates: ``(n, "episode")``, complete episodes from a fresh reset, a
        multiple of the number of envs; ``(n, "step")`` or n, steps per env, whose unfinished episodes go on with the
        next policy
    :param gradient_steps: per update; -1 for as many as steps were taken
    :param replay_buffer_class: a subclass of :class:`~sb3_pg.rollout.TrajectoryReplayBuffer`
    :param replay_buffer_kwargs: its arguments
    :param optimize_memory_usage: must be False
    :param action_noise: must be None: the log-prob of a noisy action would be unknown
    :param behavior_policy: what acts instead of the policy, from the first step on: a model that knows its log-probs
        (A2C, PPO, TRPO, this package's; its policy is kept); a policy; or a callable as
        :data:`~sb3_pg.rollout.BehaviorPolicy` describes. It sees the observations that this algorithm acts on: a model
        that was trained with a VecNormalize needs one with the same statistics around this env. See also
        :class:`~sb3_pg.rollout.PolicyBehavior`
    :param kwargs: arguments that all algorithms share
    :raises ValueError: an argument out of range, or arguments that contradict each other
    :raises TypeError: an argument of the wrong type, or an unknown one
    """

    checks: ClassVar[Mapping[str, arg.Check]] = CHECKS | REPLAYING_CHECKS
    replay_buffer: TrajectoryReplayBuffer | None
    batch_size: int | None  # type: ignore[assignment]
    _pieces: Pieces | None = None
    _explains_next = False

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str | None,
        learning_rate: float | str | Schedule,
        buffer_size: int = 100_000,
        buffer_trajectories: int = 32,
        learning_starts: int = 0,
        batch_size: int | None = None,
        train_freq: int | tuple[int, str] = (8, "episode"),
        gradient_steps: int = 4,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        action_noise: ActionNoise | None = None,
        behavior_policy: Behavior | None = None,
        **kwargs: Unpack[CriticFitArguments],
    ) -> None:
        self.buffer_size = buffer_size
        self.buffer_trajectories = buffer_trajectories
        self.learning_starts = learning_starts
        self.batch_size = batch_size
        self.train_freq = train_freq
        self.gradient_steps = gradient_steps
        self.replay_buffer_class = replay_buffer_class
        self.replay_buffer_kwargs = replay_buffer_kwargs or {}
        self.optimize_memory_usage = optimize_memory_usage
        self.action_noise = action_noise
        self.behavior_policy = behavior_policy
        super().__init__(policy, env, learning_rate, **kwargs)

    def _sb3_arguments(self) -> dict[str, Any]:
        ours = {"buffer_trajectories", "behavior_policy"}
        names = ReplayingArguments.__annotations__.keys() - CommonArguments.__annotations__ - ours
        return {name: getattr(self, name) for name in names} | {"gamma": self.gamma, "support_multi_env": True}

    # ---------------------------------------------------------------- arguments

    def _check_combinations(self) -> None:
        super()._check_combinations()
        if self.learning_starts and self.behavior_policy is None:
            uniform_behavior(self.action_space, squashed=False)  # whether it has a density
        self._episodes_per_env()
        kept = self.replay_buffer_kwargs.get("max_trajectories", self.buffer_trajectories)
        if kept != self.buffer_trajectories and not self._is_kept_by_load("replay_buffer_kwargs"):
            wanted = f"buffer_trajectories={self.buffer_trajectories} or left out"
            raise ValueError(f"replay_buffer_kwargs['max_trajectories'] must be {wanted}, got {kept}")

    def _prepare(self) -> None:
        super()._prepare()
        if self.replay_buffer_class is None:
            is_dict = isinstance(self.observation_space, spaces.Dict)
            self.replay_buffer_class = DictTrajectoryReplayBuffer if is_dict else TrajectoryReplayBuffer
        self.replay_buffer_kwargs = {**self.replay_buffer_kwargs, "max_trajectories": self.buffer_trajectories}

    def _setup_model(self) -> None:
        super()._setup_model()
        self._adopt_behavior()

    def _adopt_behavior(self) -> BehaviorPolicy | None:
        self.behavior_policy, behavior = adopted(self.behavior_policy, self)
        return behavior

    def _convert_train_freq(self) -> None:
        self.train_freq = self._frequency()  # type: ignore[assignment]  # as SB3 does

    def _frequency(self) -> TrainFreq:
        given: Any = self.train_freq
        if isinstance(given, TrainFreq):
            return given
        n, unit = given if isinstance(given, tuple | list) else (given, "step")
        return TrainFreq(n, TrainFrequencyUnit(unit))

    def _episodes_per_env(self, frequency: TrainFreq | None = None) -> int | None:
        frequency = frequency or self._frequency()
        if frequency.unit == TrainFrequencyUnit.STEP:
            return None
        if frequency.frequency % self.n_envs:
            raise ValueError(
                f"train_freq=({frequency.frequency}, 'episode') must be a multiple of the number of envs, "
                f"{self.n_envs}, so that every env contributes equally many episodes"
            )
        return frequency.frequency // self.n_envs

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, variables = super()._get_torch_save_params()
        return [*state_dicts, "policy.optimizer"], variables

    # ---------------------------------------------------------------- collecting

    def learn(
        self: SelfReplaying,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: LogInterval = "auto",
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfReplaying:
        """As SB3's; ``log_interval`` counts episodes, and the TensorBoard run is named after the class.

        With ``log_interval="auto"`` it is about every 500 steps of each env, as often as A2C's default. (SB3's default
        of 4 episodes would be every update.)

        :raises ValueError: an argument out of range, or a model without env
        :raises TypeError: an argument of the wrong type
        """
        return self._learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    @property
    def _episode_limit(self) -> EpisodeLimit:
        """How long an episode may be, whether or not a rollout waits for its end."""
        return EpisodeLimit(self.max_episode_steps, OTHER_ALGORITHM)

    def add_trajectories(self, trajectories: Iterable[Trajectory]) -> None:
        """Put logged episodes into the replay buffer, as if they had just been collected.

        :param trajectories: complete, with the log-probs of what acted. Discrete and MultiDiscrete actions are numbered
            as the env numbers them; those of a Box are as sampled, before clipping or rescaling
        :raises ValueError: one is not complete, has arrays of other shapes or with numbers that are not finite, or
            actions that are not in the space; none is added then
        """
        assert self.replay_buffer is not None
        own = [trajectory.as_drawn_by(self.policy) for trajectory in trajectories]
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
        """Collect with the current policy, and keep the episodes that have ended.

        :return: steps of all envs, episodes, and whether to go on
        :raises NonFiniteError: a reward or an observation is not finite
        """
        began, steps_before = time.perf_counter(), self.num_timesteps
        if self._collector is None or self._collector.env is not env:
            self._collector, self._pieces = Collector(self, env), None
        pieces, self._pieces = self._pieces or Pieces(env.num_envs), None  # an interruption loses them
        per_env = self._episodes_per_env(train_freq)
        n_steps = train_freq.frequency if per_env is None else None
        is_dict = isinstance(self.observation_space, spaces.Dict)
        rollout = (DictTrajectoryRolloutBuffer if is_dict else TrajectoryRolloutBuffer)(
            n_steps, self.observation_space, self.action_space, self.device, n_envs=env.num_envs
        )
        found: list[Trajectory] = []
        names = {
            "self": self,
            "env": env,
            "train_freq": train_freq,
            "replay_buffer": replay_buffer,
            "action_noise": action_noise,
            "learning_starts": learning_starts,
            "log_interval": log_interval,
            "continue_training": True,
        }
        callback_locals = OffPolicyLocals(callback, names)
        try:
            sampler = self._collector.collect(
                callback,
                rollout,
                n_steps,
                per_env,
                self._episode_limit,
                self._behavior(learning_starts),
                callback_locals,
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
            if self.num_timesteps == steps_before:
                raise  # skipping what takes no step would go on for ever
            self._skip_or_raise(error)
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
        """What acts in the next rollout; None for the policy."""
        behavior, squashed = self._adopt_behavior(), self.policy.squash_output
        if behavior is None and self.num_timesteps < learning_starts:
            behavior = uniform_behavior(self.action_space, squashed)
        return None if behavior is None else BehaviorSampler(behavior, self.action_space, squashed)

    @property
    def actor(self) -> Any:  # type: ignore[override]
        """What SB3's log asks for the standard deviation under gSDE."""
        return SimpleNamespace(get_std=self.policy.log_std.exp)

    # ---------------------------------------------------------------- updating

    @abstractmethod
    def _next_batch(self, batch_size: int | None) -> RolloutBatch | None:
        """What the next gradient step is taken from, evaluated and estimated; None for no step."""

    def train(self, gradient_steps: int, batch_size: int | None) -> None:
        """Gradient steps from the trajectories that are kept; parameters stay as they were where one fails.

        :param gradient_steps: how many
        :param batch_size: trajectories per step, None for all
        :raises NonFiniteError: a gradient or a parameter would not be finite
        """
        for step in range(gradient_steps):
            self._explains_next = step == gradient_steps - 1
            try:
                batch = self._next_batch(batch_size)
            except NonFiniteError as error:
                self._skip_or_raise(error)
                return
            if batch is None:
                return
            self._update_from(batch)

    def _explains(self) -> bool:
        return self._log_interval is not None and self._explains_next
