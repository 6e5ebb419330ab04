"""The template of all on-policy algorithms: collecting, schedules, optimizers, logging, saving."""

import time
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3 import A2C
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import update_learning_rate
from stable_baselines3.common.vec_env import VecEnv

from sb3_pg.algorithms import arguments as arg
from sb3_pg.algorithms.critic import fit_critic, make_critic_optimizer
from sb3_pg.algorithms.guards import nonfinite_gradient, require_finite_parameters, unchanged_on_error
from sb3_pg.algorithms.parameters import ParameterSets, reachable_parameters
from sb3_pg.algorithms.signature import CHECKS
from sb3_pg.errors import NonFiniteError
from sb3_pg.extras import extra_hints
from sb3_pg.rollout import (
    Collector,
    DictTrajectoryRolloutBuffer,
    RolloutBatch,
    TrajectoryRolloutBuffer,
    batch_from_foreign_buffer,
    make_batch,
    unvalidated_distributions,
)

SelfPolicyGradient = TypeVar("SelfPolicyGradient", bound="PolicyGradientAlgorithm")

#: Complete episodes per update where neither ``n_episodes`` nor ``n_steps`` is given (rounded up to whole envs).
DEFAULT_N_EPISODES = 8


class PolicyGradientAlgorithm(OnPolicyAlgorithm):
    """What all on-policy algorithms share. A subclass adds its arguments, ``_returns`` and ``_update``.

    :param policy: "MlpPolicy", "CnnPolicy", "MultiInputPolicy", or a subclass of SB3's ActorCriticPolicy
    :param env: environment, vectorized environment, or the id of a registered one
    :param learning_rate: step size of ``policy.optimizer``: a number, ``"lin_1e-3"``, or a function of the remaining
        progress (1 to 0)
    :param n_steps: steps per env and update: segments, cut and bootstrapped with the critic's value
    :param n_episodes: complete episodes per update, a multiple of the number of envs; exclusive with ``n_steps``.
        Neither: 8, rounded up to a multiple
    :param gamma: discount per env step, in [0, 1]
    :param gae_lambda: lambda of generalized advantage estimation, in [0, 1]
    :param ent_coef: weight of the entropy bonus, nats
    :param vf_coef: weight of the critic's loss where actor and critic are trained by one optimizer or share features
    :param max_grad_norm: largest norm of the gradient, None for no clipping
    :param normalize_advantage: shift and scale each batch of advantages to mean 0 and standard deviation 1
    :param truncation: "bootstrap" counts the value of the last state where a time limit cuts an episode, "terminal"
        treats the time limit as part of the task. Default: bootstrap where the critic is in use
    :param critic_learning_rate: gives the critic an optimizer of its own, with this schedule
    :param n_critic_updates: passes of the critic over each batch; more than 1 gives it an optimizer of its own
    :param critic_batch_size: samples per step of the critic's own optimizer, None for the whole batch
    :param critic_fit: "after" trains the critic once the advantages are computed; "before" fits it to the batch it
        then corrects, as the slides' batch actor-critic does (biased)
    :param max_episode_steps: longest episode that complete-episode mode waits for
    :param on_nonfinite: "raise" a :class:`~sb3_pg.NonFiniteError`, or "skip" the update with a warning
    :param use_sde: generalized state-dependent exploration
    :param sde_sample_freq: steps between new gSDE noise, -1 for once per rollout
    :param rollout_buffer_class: buffer class; one that is not ours is filled step by step, by SB3's own contract
    :param rollout_buffer_kwargs: arguments of the buffer
    :param stats_window_size: episodes that the logged means are taken over
    :param tensorboard_log: folder of TensorBoard logs
    :param policy_kwargs: arguments of the policy
    :param verbose: 0 nothing, 1 info, 2 debug
    :param seed: seed of all random generators
    :param device: PyTorch device, or "auto"
    :raises ValueError: an argument out of range, or arguments that contradict each other
    :raises TypeError: an argument of the wrong type, or an unknown one
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = A2C.policy_aliases
    n_steps: int | None  # type: ignore[assignment]  # None: complete episodes
    max_grad_norm: float | None  # type: ignore[assignment]
    checks: ClassVar[Mapping[str, arg.Check]] = CHECKS

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str | None,
        learning_rate: float | str | Schedule,
        n_steps: int | None = None,
        n_episodes: int | None = None,
        gamma: float = 0.99,
        gae_lambda: float = 1.0,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float | None = 0.5,
        normalize_advantage: bool = False,
        truncation: str | None = None,
        critic_learning_rate: float | str | Schedule | None = None,
        n_critic_updates: int = 1,
        critic_batch_size: int | None = None,
        critic_fit: str = "after",
        max_episode_steps: int = 100_000,
        on_nonfinite: str = "raise",
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        arg.check_arguments({**vars(self), **locals()}, self.checks)
        if isinstance(policy, type) and not issubclass(policy, ActorCriticPolicy):
            raise TypeError(f"policy must be a name or a subclass of SB3's ActorCriticPolicy, got {policy!r}")
        if isinstance(policy, type) and issubclass(policy, RecurrentActorCriticPolicy):
            raise ValueError(f"{type(self).__name__} has no recurrent policies, got {policy!r}")
        self.n_episodes = n_episodes
        self.normalize_advantage = normalize_advantage
        self.truncation = truncation
        self.critic_learning_rate = critic_learning_rate
        self.n_critic_updates = n_critic_updates
        self.critic_batch_size = critic_batch_size
        self.critic_fit = critic_fit
        self.max_episode_steps = max_episode_steps
        self.on_nonfinite = on_nonfinite
        self.critic_optimizer: th.optim.Optimizer | None = None
        self._n_skipped = 0
        self._batch: RolloutBatch | None = None
        self._collector: Collector | None = None
        self._parameter_sets: ParameterSets | None = None
        with extra_hints():
            super().__init__(
                policy,
                env,  # type: ignore[arg-type]
                learning_rate=learning_rate,  # type: ignore[arg-type]
                n_steps=n_steps,  # type: ignore[arg-type]
                gamma=gamma,
                gae_lambda=gae_lambda,
                ent_coef=ent_coef,
                vf_coef=vf_coef,
                max_grad_norm=max_grad_norm,  # type: ignore[arg-type]
                use_sde=use_sde,
                sde_sample_freq=sde_sample_freq,
                rollout_buffer_class=rollout_buffer_class,
                rollout_buffer_kwargs=rollout_buffer_kwargs,
                stats_window_size=stats_window_size,
                tensorboard_log=tensorboard_log,
                policy_kwargs=policy_kwargs,
                verbose=verbose,
                seed=seed,
                device=device,
                supported_action_spaces=(spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
                _init_setup_model=False,
            )
        if _init_setup_model:
            self._setup_model()

    # ---------------------------------------------------------------- what a subclass says

    def _uses_critic(self) -> bool:
        """Whether values are part of the estimate."""
        return True

    def _returns(self, batch: RolloutBatch) -> th.Tensor:
        """What the critic or baseline is fitted to, ``(n_steps, n_envs)``."""
        raise NotImplementedError

    def _update(self, batch: RolloutBatch) -> dict[str, th.Tensor | float]:
        """Move theta, and explain the step: name -> number to log."""
        raise NotImplementedError

    def _check_combinations(self) -> None:
        """Require arguments that agree with each other.

        :raises ValueError: naming those that do not
        """
        if self.n_steps is not None and self.n_episodes is not None:
            raise ValueError(
                f"n_steps and n_episodes exclude each other, got n_steps={self.n_steps} and "
                f"n_episodes={self.n_episodes}: segments of fixed length, or complete episodes"
            )
        if self.n_steps is not None and not self._uses_critic():
            raise ValueError(
                f"n_steps={self.n_steps} cuts episodes, which takes a critic to value the cut: use baseline='value', "
                "or complete episodes with n_episodes="
            )
        if self.truncation == "bootstrap" and not self._uses_critic():
            raise ValueError(
                "truncation='bootstrap' takes a critic to value truncated episodes: use baseline='value', or "
                "truncation='terminal'"
            )
        if self._has_foreign_buffer and self.n_steps is None:
            raise ValueError(
                f"rollout_buffer_class={self.rollout_buffer_class} is filled by SB3's own contract, which has segments "
                "only: give n_steps="
            )

    # ---------------------------------------------------------------- what follows from the arguments

    @property
    def _has_foreign_buffer(self) -> bool:
        cls = self.rollout_buffer_class
        return cls is not None and not issubclass(cls, TrajectoryRolloutBuffer)

    @property
    def _bootstraps_truncated(self) -> bool:
        return self._uses_critic() if self.truncation is None else self.truncation == "bootstrap"

    @property
    def _critic_is_separate(self) -> bool:
        """Whether the critic has an optimizer of its own, rather than a share in the policy's."""
        alone = self.critic_learning_rate is not None or self.n_critic_updates > 1 or self.critic_fit == "before"
        return alone and self._uses_critic()

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

    # ---------------------------------------------------------------- setting up, saving

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        if policy_name in self.policy_aliases:
            return self.policy_aliases[policy_name]
        hint = ""
        if "lstm" in policy_name.lower() or "recurrent" in policy_name.lower():
            hint = f"; {type(self).__name__} has no recurrent policies"
        raise ValueError(f"policy must be one of {list(self.policy_aliases)} or a class, got {policy_name!r}{hint}")

    def _setup_lr_schedule(self) -> None:
        self.lr_schedule = arg.to_schedule(self.learning_rate)

    def _setup_model(self) -> None:
        if not hasattr(self, "observation_space"):
            raise ValueError("env must be an environment or the id of a registered one, got None")
        # Again, since load() replaces attributes after the constructor.
        arg.check_arguments(vars(self), self.checks)
        self._check_combinations()
        self._episodes_per_env()
        if self.rollout_buffer_class is None:
            is_dict = isinstance(self.observation_space, spaces.Dict)
            self.rollout_buffer_class = DictTrajectoryRolloutBuffer if is_dict else TrajectoryRolloutBuffer
        super()._setup_model()
        self._parameter_sets = None
        self.critic_optimizer = None
        if self._critic_is_separate:
            rate = self.critic_lr_schedule(1.0)
            self.critic_optimizer = make_critic_optimizer(list(self._critic_only().values()), rate)

    @property
    def critic_lr_schedule(self) -> Schedule:
        """Step size of the critic's own optimizer; the policy's where none is given."""
        rate = self.critic_learning_rate
        return self.lr_schedule if rate is None else arg.to_schedule(rate, "critic_learning_rate")

    @property
    def parameter_sets(self) -> ParameterSets:
        """The actor's and the critic's parameters."""
        if self._parameter_sets is None:
            self._parameter_sets = reachable_parameters(self.policy)
        return self._parameter_sets

    def _critic_only(self) -> dict[str, th.nn.Parameter]:
        actor, critic = self.parameter_sets
        return {name: parameter for name, parameter in critic.items() if name not in actor}

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_batch", "_collector", "_parameter_sets"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, variables = super()._get_torch_save_params()
        return state_dicts + (["critic_optimizer"] if self._critic_is_separate else []), variables

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
        """As SB3's; the TensorBoard run is named after the class."""
        with extra_hints():
            return super().learn(
                total_timesteps,
                callback,
                log_interval,
                tb_log_name or type(self).__name__,
                reset_num_timesteps,
                progress_bar,
            )

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Fill the buffer with one rollout of the current policy; returns are in it before ``on_rollout_end``.

        :return: False if the callback stopped training
        :raises NonFiniteError: a reward or an observation is not finite
        """
        began = time.perf_counter()
        self._batch = None
        if not isinstance(rollout_buffer, TrajectoryRolloutBuffer):
            if not super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps):
                return False
            self._batch = batch_from_foreign_buffer(rollout_buffer)
        else:
            if self._collector is None or self._collector.env is not env:
                self._collector = Collector(self, env, self.max_episode_steps)
            per_env = self._episodes_per_env()
            try:
                sampler = self._collector.collect(callback, rollout_buffer, self.n_steps, per_env)
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
                batch.returns = self._returns(batch)
                rollout_buffer.returns = batch.returns.cpu().numpy()
                self._batch = batch
            except NonFiniteError as error:
                self._skip_or_raise(error)
            self.logger.record("rollout/valid_fraction", float(np.mean(rollout_buffer.mask)))
            callback.on_rollout_end()
        self.logger.record("time/collect_seconds", time.perf_counter() - began)
        return True

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
            with unchanged_on_error(self.policy.parameters()), unvalidated_distributions():
                metrics = self._update(self._batch)
                require_finite_parameters(self.policy)
        except NonFiniteError as error:
            self._skip_or_raise(error)
            return
        self._n_updates += 1
        metrics["clipped_action_fraction"] = self._clipped_action_fraction(self._batch)
        self._record(metrics)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("time/update_seconds", time.perf_counter() - began)

    def _fit_critic(self, batch: RolloutBatch, targets: th.Tensor) -> dict[str, th.Tensor | float]:
        """Train the critic by its own optimizer."""
        assert self.critic_optimizer is not None
        loss = fit_critic(
            self.policy,
            self.critic_optimizer,
            batch.select(batch.observations),
            batch.select(targets),
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
