"""The template of all on-policy algorithms: collect a rollout, update from it, log what happened."""

import time
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import update_learning_rate
from stable_baselines3.common.vec_env import VecEnv

from sb3_pg.algorithms import arguments as arg
from sb3_pg.algorithms.critic import fit_critic
from sb3_pg.algorithms.guards import nonfinite_gradient, require_finite_parameters, unchanged_on_error
from sb3_pg.algorithms.setup import ConfiguredAlgorithm
from sb3_pg.errors import NonFiniteError
from sb3_pg.extras import extra_hints
from sb3_pg.rollout import (
    Collector,
    NormalizationGuard,
    RolloutBatch,
    TrajectoryRolloutBuffer,
    batch_from_foreign_buffer,
    make_batch,
    unvalidated_distributions,
)

Metrics = dict[str, th.Tensor | float]
#: Attributes that belong to a rollout, and are neither saved nor copied.
_PASSING = ("_batch", "_collector")
SelfPolicyGradient = TypeVar("SelfPolicyGradient", bound="PolicyGradientAlgorithm")


class PolicyGradientAlgorithm(ConfiguredAlgorithm):
    """Collects, updates and logs. A subclass adds its arguments, ``_estimate`` and ``_update``.

    Its arguments are those of :class:`~sb3_pg.algorithms.setup.ConfiguredAlgorithm`.
    """

    _batch: RolloutBatch | None = None
    _collector: Collector | None = None
    _n_skipped = 0
    _estimate_seconds = 0.0

    @abstractmethod
    def _estimate(self, batch: RolloutBatch) -> tuple[th.Tensor, th.Tensor]:
        """Returns, which critic or baseline are fitted to, and advantages, which actions are credited with.

        :param batch: evaluated with the policy, which is in eval mode
        :return: both ``(n_steps, n_envs)``, reward units
        """

    @abstractmethod
    def _update(self, batch: RolloutBatch) -> Metrics:
        """Move theta, and explain the step: name -> number to log."""

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and copy take: all but the last rollout and the loop that collected it."""
        return {name: value for name, value in vars(self).items() if name not in _PASSING}

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *_PASSING]

    # ---------------------------------------------------------------- collecting

    def learn(
        self: SelfPolicyGradient,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfPolicyGradient:
        """As SB3's; the TensorBoard run is named after the class.

        :raises ValueError: negative ``total_timesteps``, or a model without env
        :raises TypeError: ``total_timesteps`` is not a number
        """
        arg.real(0)("total_timesteps", total_timesteps)
        if self.env is None:
            raise ValueError("learn() needs an environment: call set_env(env), or load(path, env=env)")
        with extra_hints():
            return super().learn(
                total_timesteps,
                callback,
                log_interval,
                tb_log_name or type(self).__name__,
                reset_num_timesteps,
                progress_bar,
            )

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        """As SB3's, which resets the env; a NaN in it must not get into a VecNormalize's statistics."""
        assert self.env is not None
        guard = NormalizationGuard(self.env)
        with guard.statistics_kept():
            result = super()._setup_learn(*args, **kwargs)
            try:
                guard.check_reset()
            except NonFiniteError:
                self._last_obs = None
                raise
        return result

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Fill the buffer with one rollout of the current policy; returns are in it before ``on_rollout_end``.

        :return: False if the callback stopped training
        :raises NonFiniteError: a reward or an observation is not finite
        """
        began, steps_before = time.perf_counter(), self.num_timesteps
        self._batch = None
        self._estimate_seconds = 0.0
        if not isinstance(rollout_buffer, TrajectoryRolloutBuffer):
            if not super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps):
                return False
            self._batch = batch_from_foreign_buffer(rollout_buffer)
        else:
            if self._collector is None or self._collector.env is not env:
                self._collector = Collector(self, env)
            per_env = self._episodes_per_env()
            try:
                sampler = self._collector.collect(
                    callback, rollout_buffer, self.n_steps, per_env, self.max_episode_steps
                )
                if sampler is None:
                    return False
                batch = make_batch(
                    self.policy,
                    rollout_buffer,
                    sampler,
                    with_values=self._uses_critic(),
                    bootstrap_truncated=self._bootstraps_truncated,
                    n_episodes=None if per_env is None else per_env * env.num_envs,
                )
                self._estimate_seconds = -time.perf_counter()
                batch.returns, batch.advantages = self._estimate(batch)
                self._publish(batch, rollout_buffer)
                self._estimate_seconds += time.perf_counter()
                self._batch = batch
            except NonFiniteError as error:
                if self.num_timesteps == steps_before:
                    raise  # skipping what takes no step would go on for ever
                self._skip_or_raise(error)
            self.logger.record("rollout/valid_fraction", float(np.mean(rollout_buffer.mask)))
            callback.on_rollout_end()
            if self._batch is not None:
                self._take_back(self._batch, rollout_buffer)
        self.logger.record("time/collect_seconds", time.perf_counter() - began - self._estimate_seconds)
        return True

    @staticmethod
    def _publish(batch: RolloutBatch, buffer: RolloutBuffer) -> None:
        """Write the estimates where SB3's users look for them."""
        for name in ("returns", "advantages"):
            setattr(buffer, name, getattr(batch, name).float().cpu().numpy())

    @staticmethod
    def _take_back(batch: RolloutBatch, buffer: RolloutBuffer) -> None:
        """Use what a callback has changed at the end of the rollout, as SB3's algorithms do."""
        for name in ("returns", "advantages"):
            ours, now = getattr(batch, name), getattr(buffer, name)
            written = ours.float().cpu().numpy()
            if now.shape == written.shape and not np.array_equal(now, written, equal_nan=True):
                setattr(batch, name, th.as_tensor(now).to(ours))

    # ---------------------------------------------------------------- updating

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        """As SB3's, but never below 0: the last rollout may overshoot, and a linear schedule would turn negative."""
        super()._update_current_progress_remaining(min(num_timesteps, total_timesteps), total_timesteps)

    def train(self) -> None:
        """One update from the rollout that was collected last; parameters stay as they were if it fails.

        :raises NonFiniteError: a gradient or a parameter would not be finite
        """
        if self._batch is None:
            return
        began = time.perf_counter()
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        if self.critic_optimizer is not None:
            rate = self.critic_lr_schedule(self._current_progress_remaining)
            update_learning_rate(self.critic_optimizer, rate)
            self.logger.record("train/critic_learning_rate", rate)
        try:
            with unchanged_on_error(self.policy), unvalidated_distributions():
                metrics = self._update(self._batch)
                require_finite_parameters(self.policy)
        except NonFiniteError as error:
            self._skip_or_raise(error)
            return
        self._n_updates += 1
        metrics["clipped_action_fraction"] = self._clipped_action_fraction(self._batch)
        self._record(metrics)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("time/update_seconds", time.perf_counter() - began + self._estimate_seconds)

    def _fit_critic(self, batch: RolloutBatch, targets: th.Tensor) -> Metrics:
        """Train the critic by its own optimizer."""
        assert self.critic_optimizer is not None
        loss = fit_critic(
            self.policy,
            self.critic_optimizer,
            batch.flat_observations,
            batch.select(targets).float(),
            self.n_critic_updates,
            self.critic_batch_size,
        )
        return {"value_loss": loss}

    def _gradient_step(self, batch: RolloutBatch) -> th.Tensor:
        """Clip the gradient that was accumulated, and take a step of ``policy.optimizer``.

        :return: the gradient's norm before clipping
        :raises NonFiniteError: the gradient is not finite
        """
        norm = th.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm or th.inf)
        if not th.isfinite(norm):
            raise nonfinite_gradient(self.policy, batch)
        self.policy.optimizer.step()
        return norm

    def _skip_or_raise(self, error: NonFiniteError) -> None:
        if self.on_nonfinite == "raise":
            raise error
        self._n_skipped += 1
        warnings.warn(f"Update skipped: {error}", stacklevel=2)
        self.logger.record("train/n_skipped", self._n_skipped)

    # ---------------------------------------------------------------- logging

    def _clipped_action_fraction(self, batch: RolloutBatch) -> th.Tensor | float:
        """Share of action components outside the env's bounds, where they are clipped."""
        if not isinstance(self.action_space, spaces.Box) or self.policy.squash_output:
            return 0.0
        actions: th.Tensor = batch.select(batch.actions)
        low, high = (
            th.as_tensor(bound.reshape(-1), device=actions.device)
            for bound in (self.action_space.low, self.action_space.high)
        )
        flat = actions.reshape(len(actions), -1)
        return ((flat < low) | (flat > high)).float().mean()

    def _record(self, metrics: Mapping[str, th.Tensor | float]) -> None:
        """Log numbers under ``train/``, with one transfer from the device."""
        values = th.stack([th.as_tensor(v, device=self.device).detach().float() for v in metrics.values()]).tolist()
        for name, value in zip(metrics, values, strict=True):
            self.logger.record(f"train/{name}", value)
