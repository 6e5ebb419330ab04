"""The template of all on-policy algorithms: collect a rollout, update from it, log what happened."""

import time
from typing import Any, ClassVar, TypeVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.vec_env import VecEnv
from typing_extensions import Unpack

from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.learning import LogInterval
from sb3_pg.algorithms.signature import CriticFitArguments
from sb3_pg.algorithms.update import UpdatingAlgorithm
from sb3_pg.errors import NonFiniteError
from sb3_pg.policies import takes_other_numbers
from sb3_pg.rollout import (
    Collector,
    DictTrajectoryRolloutBuffer,
    EpisodeLimit,
    RolloutBatch,
    TrajectoryRolloutBuffer,
    batch_from_filled_buffer,
    make_batch,
)

SelfPolicyGradient = TypeVar("SelfPolicyGradient", bound="PolicyGradientAlgorithm")
#: Complete episodes per update where neither ``n_episodes`` nor ``n_steps`` is given (rounded up to whole envs).
DEFAULT_N_EPISODES = 8


class PolicyGradientAlgorithm(UpdatingAlgorithm, OnPolicyAlgorithm):
    """Collects, updates and logs. A subclass adds its arguments, ``_estimate`` and ``_move_actor``.

    :param policy: see :class:`~sb3_pg.algorithms.setup.ConfiguredAlgorithm`, as for all arguments but these
    :param env: likewise
    :param learning_rate: likewise
    :param n_steps: steps per env and update: segments, cut and bootstrapped with the critic's value
    :param n_episodes: complete episodes per update, a multiple of the number of envs; exclusive with ``n_steps``.
        Neither: 8, rounded up to a multiple
    :param gae_lambda: lambda of generalized advantage estimation, in [0, 1], where an algorithm or a foreign buffer
        uses it
    :param rollout_buffer_class: buffer class; one that is not ours is filled step by step, by SB3's own contract
    :param rollout_buffer_kwargs: arguments of the buffer
    :param kwargs: arguments that all algorithms share
    :raises ValueError: an argument out of range, or arguments that contradict each other
    :raises TypeError: an argument of the wrong type, or an unknown one
    """

    n_steps: int | None  # type: ignore[assignment]  # None: complete episodes
    max_grad_norm: float | None  # type: ignore[assignment]
    _batch: RolloutBatch | None = None
    #: the buffer that ``_batch`` was collected into, and the estimates that were written there: name -> bytes
    _collected: tuple[RolloutBuffer, dict[str, bytes]] | None = None

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str | None,
        learning_rate: float | str | Schedule,
        n_steps: int | None = None,
        n_episodes: int | None = None,
        gae_lambda: float = 1.0,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        **kwargs: Unpack[CriticFitArguments],
    ) -> None:
        self.n_steps = n_steps
        self.n_episodes = n_episodes
        self.gae_lambda = gae_lambda
        self.rollout_buffer_class = rollout_buffer_class
        self.rollout_buffer_kwargs = rollout_buffer_kwargs  # type: ignore[assignment]
        super().__init__(policy, env, learning_rate, **kwargs)

    def _sb3_arguments(self) -> dict[str, Any]:
        coefficients = ("gamma", "gae_lambda", "ent_coef", "vf_coef", "max_grad_norm")
        names = ("n_steps", *coefficients, "rollout_buffer_class", "rollout_buffer_kwargs")
        return {name: getattr(self, name) for name in names} | {"_init_setup_model": False}

    # ---------------------------------------------------------------- arguments

    def _prepare(self) -> None:
        # SB3's zips name the buffer class that SB3 chose; here that means the default, not a foreign buffer.
        if self._from_sb3 and self.rollout_buffer_class in (RolloutBuffer, DictRolloutBuffer):
            self.rollout_buffer_class = None
        self._from_sb3 = False
        super()._prepare()
        self._episodes_per_env()
        if self.rollout_buffer_class is None:
            is_dict = isinstance(self.observation_space, spaces.Dict)
            self.rollout_buffer_class = DictTrajectoryRolloutBuffer if is_dict else TrajectoryRolloutBuffer

    def _check_combinations(self) -> None:
        if self.n_steps is not None and self.n_episodes is not None:
            raise ValueError(
                f"n_steps and n_episodes exclude each other, got n_steps={self.n_steps} and "
                f"n_episodes={self.n_episodes}: segments of fixed length, or complete episodes; set the other to None"
            )
        self._check_segments("n_steps", self.n_steps)
        super()._check_combinations()
        if self._has_foreign_buffer and getattr(self.env, "resets_late", False):
            raise ValueError(
                f"rollout_buffer_class={self.rollout_buffer_class} cannot leave out the steps that only reset an env, "
                "which the env has (NEXT_STEP): use another autoreset mode"
            )
        if self._has_foreign_buffer and self.n_steps is None:
            raise ValueError(
                f"rollout_buffer_class={self.rollout_buffer_class} is filled by SB3's own contract, which has segments "
                "only: give n_steps="
            )
        if self._has_foreign_buffer and (self.critic_fit == "before" or self.truncation == "terminal"):
            raise ValueError(
                f"rollout_buffer_class={self.rollout_buffer_class} computes advantages itself, once, and bootstraps "
                f"truncated episodes: it takes neither critic_fit='before' nor truncation='terminal'"
            )
        if self._has_foreign_buffer and takes_other_numbers(self.action_space):
            raise ValueError(
                f"rollout_buffer_class={self.rollout_buffer_class} is filled by SB3's own loop, which neither rounds "
                f"actions nor counts them from a start: it does not take action_space {self.action_space}"
            )
        if self._has_foreign_buffer and (self.state_discount or self.normalize_value_targets):
            raise ValueError(
                f"rollout_buffer_class={self.rollout_buffer_class} knows neither each step's index nor a scale of the "
                "critic's values: it takes neither state_discount nor normalize_value_targets"
            )

    def _check_segments(self, name: str, n_steps: int | None) -> None:
        """Require an algorithm that can learn from segments, if there are any.

        :raises ValueError: it takes complete episodes
        """
        if n_steps is not None and not self._uses_critic():
            raise ValueError(
                f"{name}={n_steps} cuts episodes, which takes a critic to value the cut: use baseline='value', "
                "or complete episodes with n_episodes="
            )

    tolerated: ClassVar[frozenset[str]] = UpdatingAlgorithm.tolerated | {"gae_lambda", "max_episode_steps"}

    def _without_effect(self) -> dict[str, str]:
        unused = super()._without_effect()
        if self.n_steps is not None:
            unused["max_episode_steps"] = f"n_steps={self.n_steps}, which cuts episodes: give n_steps=None"
        if not self._uses_gae_lambda:
            unused["gae_lambda"] = f"the returns of {type(self).__name__}: ActorCritic has generalized advantages"
        if self._has_foreign_buffer:
            unused["act_device"] = f"rollout_buffer_class={self.rollout_buffer_class}, which the policy itself fills"
        return unused

    @property
    def _uses_gae_lambda(self) -> bool:
        return self._has_foreign_buffer

    @property
    def _episode_limit(self) -> EpisodeLimit | None:
        """How long an episode may be that is waited for; None where none is."""
        if self.n_steps is not None:
            return None
        return EpisodeLimit(self.max_episode_steps, f"collect segments with {self._for_segments}")

    @property
    def _for_segments(self) -> str:
        """What collects segments, which wait for no episode's end."""
        return "n_steps="

    @property
    def _has_foreign_buffer(self) -> bool:
        cls = self.rollout_buffer_class
        return cls is not None and not issubclass(cls, TrajectoryRolloutBuffer)

    def _episodes_per_env(self) -> int | None:
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

    def _maybe_recommend_cpu(self, mlp_class_name: str = "ActorCriticPolicy") -> None:
        if self.act_device is None:  # SB3's reason is what it costs to act on the GPU
            super()._maybe_recommend_cpu(mlp_class_name)

    # ---------------------------------------------------------------- collecting

    def learn(
        self: SelfPolicyGradient,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: LogInterval = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfPolicyGradient:
        """As SB3's; the TensorBoard run is named after the class.

        ``log_interval`` counts updates. With "auto" it is about every 500 steps of each env, as often as A2C's default.

        Numbers that the update does not compute anyway are computed for the updates that are written to the log, one
        in ``log_interval``: those that tell what the step has done (``train/joint_kl`` and the like), and, without a
        callback that could read them in between, entropy and explained variance.

        :raises ValueError: an argument out of range, or a model without env
        :raises TypeError: an argument of the wrong type
        """
        return self._learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int | None
    ) -> bool:
        """Fill the buffer with one rollout of the current policy; returns are in it before ``on_rollout_end``.

        :param env: the envs
        :param callback: its hooks are called as by SB3, with SB3's names in ``locals``
        :param rollout_buffer: is reset and filled
        :param n_rollout_steps: steps per env; None for ``n_steps``, or for ``n_episodes`` complete episodes
        :return: False if the callback stopped training
        :raises NonFiniteError: a reward or an observation is not finite
        :raises ValueError: ``n_rollout_steps`` is not positive, or given to an algorithm without a critic
        """
        began, steps_before = time.perf_counter(), self.num_timesteps
        n_steps = self.n_steps if n_rollout_steps is None else n_rollout_steps
        if n_steps != self.n_steps:
            arg.integer(1)("n_rollout_steps", n_steps)
            self._check_segments("n_rollout_steps", n_steps)
        self._batch = self._collected = None
        self._iteration += 1
        self._estimate_seconds = 0.0
        if not isinstance(rollout_buffer, TrajectoryRolloutBuffer):
            assert n_steps is not None  # as _check_combinations requires
            if not super().collect_rollouts(env, callback, rollout_buffer, n_steps):
                return False
        else:
            if self._collector is None or self._collector.env is not env:
                self._collector = Collector(self, env)
            per_env = self._episodes_per_env() if n_steps is None else None
            self._collected = rollout_buffer, {}
            try:
                limit = None if per_env is None else self._episode_limit
                sampler = self._collector.collect(callback, rollout_buffer, n_steps, per_env, limit)
                if sampler is None:
                    return False
                batch = make_batch(
                    self.policy,
                    rollout_buffer,
                    sampler,
                    with_values=self._uses_critic(),
                    bootstrap_truncated=self._bootstraps_truncated,
                    n_episodes=None if per_env is None else per_env * env.num_envs,
                    value_scale=self.value_scale,
                    gradient_of=self._gradient_of(),
                    entropy=self._entropy_use(),
                )
                estimating = time.perf_counter()
                batch.returns, batch.advantages = self._estimate(batch)
                self._collected = rollout_buffer, self._publish(batch, rollout_buffer)
                self._estimate_seconds = time.perf_counter() - estimating
                self._batch = batch
            except NonFiniteError as error:
                if self.num_timesteps == steps_before:
                    raise  # skipping what takes no step would go on for ever
                self._skip_or_raise(error)
            self.logger.record("rollout/valid_fraction", rollout_buffer.valid_fraction)
            callback.on_rollout_end()
        seconds = time.perf_counter() - began - self._estimate_seconds
        self.logger.record("time/collect_seconds", seconds, self._detail)
        return True

    def dump_logs(self, iteration: int = 0) -> None:
        """As SB3's, which calls it after every rollout with ``log_interval="auto"``; some are left out then.

        :param iteration: of ``learn``; 0 for a call from elsewhere, which always writes
        """
        # No update comes before the first log, to decide about it.
        first = iteration == 1 and self.num_timesteps - self._num_timesteps_at_start >= self._log_steps
        if not iteration or not self._log_steps or first or iteration in self._logged_iterations:
            super().dump_logs(iteration)

    def _on_new_estimates(self, batch: RolloutBatch) -> None:
        self._publish(batch, self.rollout_buffer)

    @staticmethod
    def _publish(batch: RolloutBatch, buffer: RolloutBuffer) -> dict[str, bytes]:
        """Write the estimates where SB3's users look for them.

        :return: name -> what was written
        """
        for name in ("returns", "advantages"):
            setattr(buffer, name, getattr(batch, name).float().cpu().numpy())
        return {name: getattr(buffer, name).tobytes() for name in ("returns", "advantages")}

    @staticmethod
    def _take_back(batch: RolloutBatch, buffer: RolloutBuffer, written: dict[str, bytes]) -> None:
        """Use what was changed in the buffer since, by a callback for example, as SB3's algorithms do."""
        for name, before in written.items():
            ours, now = getattr(batch, name), getattr(buffer, name)
            if now.shape == ours.shape and now.tobytes() != before:
                setattr(batch, name, th.as_tensor(now).to(ours))

    def train(self) -> None:
        """One update from the rollout in ``rollout_buffer``; parameters stay as they were if it fails.

        The advantages and returns are the buffer's, whoever has computed them: :meth:`collect_rollouts`, a callback
        that has changed them since, or SB3's ``compute_returns_and_advantage`` on a buffer that was filled by hand.

        :raises NonFiniteError: a gradient or a parameter would not be finite
        :raises ValueError: the buffer is not full, or was filled by hand where the estimates are to be made anew
        """
        if not self._was_collected:
            self._check_given_estimates()
            self._batch = batch_from_filled_buffer(self.rollout_buffer)
        elif self._batch is not None:  # else the rollout was skipped
            assert self._collected is not None
            self._take_back(self._batch, *self._collected)
        if self._batch is not None:
            self._update_from(self._batch)

    @property
    def _was_collected(self) -> bool:
        """Whether ``rollout_buffer`` holds the rollout that ``_batch`` was made of."""
        buffer = self.rollout_buffer
        return (
            isinstance(buffer, TrajectoryRolloutBuffer)
            and self._collected is not None
            and self._collected[0] is buffer
            and not buffer.filled_by_hand
            and (self._batch is None or buffer.pos > 0)
        )

    def _check_given_estimates(self) -> None:
        """Require arguments under which the buffer's own advantages can be used.

        :raises ValueError: an argument that asks for estimates of another kind
        """
        if self.critic_fit == "before":
            raise ValueError(
                "critic_fit='before' estimates advantages anew with the fitted critic, which takes a rollout that "
                "collect_rollouts has put into rollout_buffer: this one was filled otherwise; use critic_fit='after'"
            )
