"""Base class of the on-policy algorithms: it collects a rollout, updates from it, and logs."""

import time
from abc import abstractmethod
from typing import Any, ClassVar, Literal, TypeVar

import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.arguments import ON_POLICY, SHARED
from sb3_pg.algorithms.callback_locals import OnPolicyListener, collecting
from sb3_pg.algorithms.learners import (
    CriticRule,
    bootstraps_truncated,
    critic_to_fit,
    refresh_learner,
    require_anchor_before_learning,
    set_up_learner,
    take_update,
    uses_critic,
    value_scale,
    warm_up_critic,
)
from sb3_pg.algorithms.objective import OBJECTIVE
from sb3_pg.algorithms.shell import Algorithm, LogInterval
from sb3_pg.algorithms.validation import SB3, EnvLike, Group
from sb3_pg.errors import NonFiniteError
from sb3_pg.learner import Anchor, Estimator, Learner, LearnerState, Report, Step
from sb3_pg.rollout import (
    Collector,
    DictTrajectoryRolloutBuffer,
    EpisodeLimit,
    RolloutBatch,
    TrajectoryRolloutBuffer,
    batch_from_filled_buffer,
    naming_env_errors,
    require_usable_policy,
)

SelfOnPolicy = TypeVar("SelfOnPolicy", bound="OnPolicyPG")
#: Complete episodes per update if neither ``n_episodes`` nor ``n_steps`` is given (rounded up to whole envs).
DEFAULT_N_EPISODES = 8


class OnPolicyPG(Algorithm, OnPolicyAlgorithm):
    """Base class of the on-policy algorithms. A subclass defines its arguments, its estimator and its step.

    :param policy: see :data:`~sb3_pg.algorithms.validation.ALWAYS`
    :param env: see :data:`~sb3_pg.algorithms.validation.ALWAYS`
    :param arguments: arguments of the class's ``groups``
    :raises ValueError: an argument is out of range, or arguments contradict each other
    :raises TypeError: an argument is of the wrong type, or unknown
    """

    groups: ClassVar[tuple[Group, ...]] = (SHARED, SB3, ON_POLICY)
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = A2C.policy_aliases
    critic_rule: ClassVar[CriticRule] = CriticRule()
    value_scale = property(value_scale)
    warm_up_critic = warm_up_critic
    _critic_to_fit = critic_to_fit
    policy: ActorCriticPolicy
    n_steps: int | None  # type: ignore[assignment]  # None: complete episodes
    n_episodes: int | None
    max_grad_norm: float | None  # type: ignore[assignment]
    truncation: Literal["bootstrap", "terminal"] | None
    critic_fit: Literal["after", "before"]
    max_episode_steps: int
    act_device: th.device | str | None
    anchor: Anchor | None = None
    learner: Learner
    learner_state: LearnerState
    #: the latest rollout; None before the first rollout, and after a rollout with numbers that were not finite
    rollout_batch: RolloutBatch | None = None
    #: the buffer that holds ``rollout_batch``, and the estimates that were written into it: name -> bytes
    _collected: tuple[RolloutBuffer, dict[str, bytes]] | None = None
    _collector: Collector | None = None
    _estimate_seconds = 0.0
    _log_interval: int | None = 1
    _has_callbacks = False
    _iteration = 0
    #: whether ``load`` has been given a zip of SB3 or sb3_contrib
    _from_sb3 = False
    #: with ``log_interval="auto"``: whether the next iteration is logged, and the iteration in which that was decided
    _decided_in = -1
    _next_is_logged = False

    def __init__(self, policy: str | type[ActorCriticPolicy], env: EnvLike | None, **arguments: Any) -> None:
        of_sb3 = ("gamma", "ent_coef", "vf_coef", "max_grad_norm", *ON_POLICY.arguments.keys() - {"n_episodes"})
        self._from_sb3 = self._is_loading()  # loading a zip of this package sets it back to False
        self._construct({"policy": policy, "env": env, **arguments}, of_sb3, _init_setup_model=False)

    # ---------------------------------------------------------------- the algorithm

    @abstractmethod
    def make_estimator(self) -> Estimator:
        """Make the estimator of returns and advantages from the present arguments."""

    @abstractmethod
    def make_step(self) -> Step:
        """Make the step that updates the actor from the present arguments."""

    @property
    def has_foreign_buffer(self) -> bool:
        """Whether ``rollout_buffer_class`` is a class of SB3 or of the user."""
        cls = self.rollout_buffer_class
        return cls is not None and not issubclass(cls, TrajectoryRolloutBuffer)

    @property
    def n_episodes_at_least(self) -> int:
        """Smallest number of episodes, or pieces of episodes, in a batch."""
        return self.n_envs * (self.episodes_per_env or 1)

    @property
    def episodes_per_env(self) -> int | None:
        """Complete episodes per env and update; None with ``n_steps``.

        :raises ValueError: ``n_episodes`` is not a multiple of the number of envs
        """
        if self.n_steps is not None:
            return None
        if self.n_episodes is None:
            return -(-DEFAULT_N_EPISODES // self.n_envs)
        if self.n_episodes % self.n_envs:
            raise ValueError(
                f"n_episodes must be a multiple of the number of envs, {self.n_envs}, so that every env contributes "
                f"equally many episodes; got {self.n_episodes}"
            )
        return self.n_episodes // self.n_envs

    #: arguments with which the algorithm collects segments instead of complete episodes, for an error message
    segments_by = "n_steps="

    def check_segments(self, name: str, n_steps: int | None) -> None:
        """Require that the algorithm can learn from segments, if they are asked for.

        :param name: argument that asks for segments
        :param n_steps: its value, None for complete episodes
        :raises ValueError: the algorithm needs complete episodes
        """
        if n_steps is not None and not uses_critic(self):
            raise ValueError(
                f"{name}={n_steps} cuts episodes, which takes a critic to value the cut: use baseline='value', "
                "or complete episodes with n_episodes="
            )

    # ---------------------------------------------------------------- setting up

    def _prepare(self) -> None:
        """Check the arguments against each other and choose the buffer's class, before buffer and policy are made.

        :raises ValueError: arguments contradict each other
        """
        # A zip of SB3 names the buffer class that SB3 chose. It stands for the default here, not for a foreign buffer.
        if self._from_sb3 and self.rollout_buffer_class in (RolloutBuffer, DictRolloutBuffer):
            self.rollout_buffer_class = None
        self._from_sb3 = False
        self._check_combinations()
        _ = self.episodes_per_env
        if self.rollout_buffer_class is None:
            is_dict = isinstance(self.observation_space, spaces.Dict)
            self.rollout_buffer_class = DictTrajectoryRolloutBuffer if is_dict else TrajectoryRolloutBuffer
        arg.require_keywords("rollout_buffer_kwargs", self.rollout_buffer_class, self.rollout_buffer_kwargs or {})

    def _setup_model(self) -> None:
        self._check_again()
        self._prepare()
        with self._extended_policy():
            super()._setup_model()
        set_up_learner(self)
        self._check_effects()

    def _maybe_recommend_cpu(self, mlp_class_name: str = "ActorCriticPolicy") -> None:
        if self.act_device is None:  # SB3 recommends the CPU because acting on the GPU is slow
            super()._maybe_recommend_cpu(mlp_class_name)

    # ---------------------------------------------------------------- learning

    def learn(
        self: SelfOnPolicy,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: LogInterval = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfOnPolicy:
        """Train for a number of env steps. The arguments are those of SB3's ``learn``, with these differences.

        Some metrics cost extra time. They are computed only for updates that are logged. These are the metrics that
        describe the step, such as ``train/joint_kl``, and without a callback also entropy and explained variance.

        :param log_interval: updates between two logs; "auto" logs about every 500 steps of each env, as often as A2C
        :param tb_log_name: name of the TensorBoard run, None for the name of the class
        :raises ValueError: an argument is out of range, or the model has no env
        :raises TypeError: an argument is of the wrong type
        """
        self._log_interval = 1 if log_interval == "auto" else log_interval
        self._iteration, self._has_callbacks = 0, bool(callback)
        self._decided_in, self._next_is_logged = -1, False
        return self._learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def _run(
        self,
        total_timesteps: int,
        callback: MaybeCallback,
        log_interval: int | None,
        tb_log_name: str,
        reset_num_timesteps: bool,
        progress_bar: bool,
    ) -> None:
        """Collect, log and update in turn, as SB3's ``learn``, but with a count of iterations that can be resumed."""
        require_anchor_before_learning(self)
        if OBJECTIVE in self.groups:
            OBJECTIVE.check(self)  # users set attributes and envs
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        iteration = self._iteration
        callback.on_training_start(locals(), globals())
        assert self.env is not None
        while self.num_timesteps < total_timesteps:
            if not self.collect_rollouts(self.env, callback, self.rollout_buffer, self.n_steps):
                break
            iteration = self._iteration
            self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
            if log_interval is not None and iteration % log_interval == 0:
                self.dump_logs(iteration)
            self.train()
        callback.on_training_end()

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int | None
    ) -> bool:
        """Fill the buffer with one rollout of the current policy, and with returns before ``on_rollout_end``.

        :param env: the envs
        :param callback: callback whose hooks are called as in SB3, with SB3's names in ``locals``
        :param rollout_buffer: buffer to reset and fill
        :param n_rollout_steps: steps per env; None for ``n_steps``, or for ``n_episodes`` complete episodes
        :return: False if the callback stopped training
        :raises NonFiniteError: a reward or an observation is not finite
        :raises ValueError: ``n_rollout_steps`` is not positive, or the algorithm has no critic
        """
        if self._ends_here():
            return False
        self._at_boundary()
        began = time.perf_counter()
        n_steps = self.n_steps if n_rollout_steps is None else n_rollout_steps
        if n_steps != self.n_steps:
            arg.integer(1)("n_rollout_steps", n_steps)
            self.check_segments("n_rollout_steps", n_steps)
        self.rollout_batch = self._collected = None
        _ = self._is_followed_by_log  # decides now, if the train of a subclass has not done it
        self._iteration += 1
        self._estimate_seconds = 0.0
        if isinstance(rollout_buffer, TrajectoryRolloutBuffer):
            go_on = self._collect(env, callback, rollout_buffer, n_steps)
        else:
            assert n_steps is not None  # the check of rollout_buffer_class requires it
            require_usable_policy(self.policy)
            with naming_env_errors(env):
                go_on = super().collect_rollouts(env, callback, rollout_buffer, n_steps)
        if go_on:
            seconds = time.perf_counter() - began - self._estimate_seconds
            self.logger.record("time/collect_seconds", seconds, self._detail)
        return go_on

    def _collect(
        self, env: VecEnv, callback: BaseCallback, buffer: TrajectoryRolloutBuffer, n_steps: int | None
    ) -> bool:
        """Collect a rollout into one of our buffers, and estimate returns and advantages.

        :return: False if the callback stopped training
        """
        steps_before = self.num_timesteps
        per_env = self.episodes_per_env if n_steps is None else None
        limit = (
            None
            if per_env is None
            else EpisodeLimit(self.max_episode_steps, f"collect segments with {self.segments_by}")
        )
        self._collected = buffer, {}
        buffer.reset()
        callback.on_rollout_start()
        learner = refresh_learner(self)
        names = {"self": self, "env": env, "rollout_buffer": buffer, "n_rollout_steps": n_steps}
        try:
            with collecting(self, env) as collector:
                batch = collector.collect(
                    n_steps=n_steps,
                    episodes_per_env=per_env,
                    limit=limit,
                    buffer=buffer,
                    listener=OnPolicyListener(self, callback, names),
                    with_values=learner.estimator.requires_critic,
                    bootstrap_truncated=bootstraps_truncated(self),
                    value_scale=learner.value_scale,
                    keep_graph=learner.reuses_scores,
                    continues=learner.estimator.continues,
                )
            if batch is None:
                return False
            estimating = time.perf_counter()
            learner = refresh_learner(self)  # a callback may have changed an argument
            learner.estimate(batch)
            self._collected = buffer, _publish(batch, buffer)
            self._estimate_seconds = time.perf_counter() - estimating
            self.rollout_batch = batch
        except NonFiniteError as error:
            self._skip_or_raise(error, has_stepped=self.num_timesteps > steps_before)
        self.logger.record("rollout/valid_fraction", buffer.valid_fraction)
        callback.on_rollout_end()
        return True

    def train(self) -> None:
        """Take one update from the rollout in ``rollout_buffer``. If it fails, parameters stay as they were.

        The advantages and returns are those in the buffer. They may come from :meth:`collect_rollouts`, a callback
        that has changed them since, or SB3's ``compute_returns_and_advantage`` on a buffer that was filled by hand.

        :raises NonFiniteError: a gradient or a parameter would not be finite
        :raises ValueError: the buffer is not full, or it was filled by hand and an argument asks for new estimates
        """
        if not self._was_collected:
            self.check_given_estimates()
            self.rollout_batch = batch_from_filled_buffer(self.rollout_buffer, self.policy)
        elif self.rollout_batch is not None:  # None: the rollout was skipped
            assert self._collected is not None
            _take_back(self.rollout_batch, *self._collected)
        if (batch := self.rollout_batch) is None:
            return
        if take_update(self, batch, self._report, self._estimate_seconds) and self.critic_fit == "before":
            _publish(batch, self.rollout_buffer)

    @property
    def _report(self) -> Report:
        """Which metrics of an update are wanted."""
        return "step" if self._is_followed_by_log else "batch" if self._has_callbacks else "nothing"

    @property
    def _was_collected(self) -> bool:
        """Whether ``rollout_buffer`` holds the rollout that ``rollout_batch`` was made from."""
        buffer = self.rollout_buffer
        return (
            isinstance(buffer, TrajectoryRolloutBuffer)
            and self._collected is not None
            and self._collected[0] is buffer
            and not buffer.filled_by_hand
            and (self.rollout_batch is None or buffer.pos > 0)
        )

    def check_given_estimates(self) -> None:
        """Require arguments with which the update can use the advantages in the buffer.

        :raises ValueError: an argument asks for new estimates
        """
        for name, why, other in (("critic_fit", "before", "after"), ("recompute_advantage", True, False)):
            if getattr(self, name, None) == why:
                raise ValueError(
                    f"{name}={why!r} estimates advantages anew, which takes a rollout that collect_rollouts has put "
                    f"into rollout_buffer: this one was filled otherwise; set {name}={other!r}"
                )

    # ---------------------------------------------------------------- log

    @property
    def _is_followed_by_log(self) -> bool:
        """Whether the update's metrics are logged. SB3 collects the next rollout before it writes the log."""
        if not self._log_steps:
            return self._log_interval is not None and (self._iteration + 1) % self._log_interval == 0
        if self._decided_in != self._iteration:
            self._decided_in, self._next_is_logged = self._iteration, self._is_time_to_log()
        return self._next_is_logged

    def dump_logs(self, iteration: int = 0) -> None:
        """Write the log as SB3's method does. ``learn`` with ``log_interval="auto"`` leaves out most iterations.

        :param iteration: iteration of ``learn``; 0 for a call from elsewhere, which always writes
        """
        # The first log has no update before it that could decide about it.
        first = iteration == 1 and self.num_timesteps - self._num_timesteps_at_start >= self._log_steps
        decided = self._next_is_logged and self._decided_in == iteration - 1
        if not iteration or not self._log_steps or first or decided:
            super().dump_logs(iteration)


def _publish(batch: RolloutBatch, buffer: RolloutBuffer) -> dict[str, bytes]:
    """Write returns and advantages into the buffer, where users of SB3 look for them.

    :return: name -> the bytes that were written
    """
    for name in ("returns", "advantages"):
        setattr(buffer, name, getattr(batch, name).float().cpu().numpy())
    return {name: getattr(buffer, name).tobytes() for name in ("returns", "advantages")}


def _take_back(batch: RolloutBatch, buffer: RolloutBuffer, written: dict[str, bytes]) -> None:
    """Copy returns and advantages that were changed in the buffer, e.g. by a callback, back into the batch."""
    for name, before in written.items():
        ours, now = getattr(batch, name), getattr(buffer, name)
        if now.shape == ours.shape and now.tobytes() != before:
            setattr(batch, name, th.as_tensor(now).to(ours))
