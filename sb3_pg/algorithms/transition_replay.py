"""The template of algorithms that replay transitions: acting with known log-probs, storing them, saving."""

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import MaybeCallback, RolloutReturn
from stable_baselines3.common.utils import obs_as_tensor
from typing_extensions import Self

from sb3_pg.algorithms import arguments as arg
from sb3_pg.algorithms.q_policies import OffPACPolicy
from sb3_pg.extras import extra_hints
from sb3_pg.rollout import (
    BehaviorReplayBuffer,
    NormalizationGuard,
    require_finite_step,
    uniform_behavior,
    unvalidated_distributions,
)


class TransitionAlgorithm(OffPolicyAlgorithm):
    """Acts with a stochastic actor, and keeps how probable each action was."""

    policy: OffPACPolicy
    _log_probs: np.ndarray | None = None
    _n_collected = 0
    _guard: NormalizationGuard | None = None

    def _setup_lr_schedule(self) -> None:
        self.lr_schedule = arg.to_schedule(self.learning_rate)

    @property
    def actor(self) -> Any:  # type: ignore[override]
        """The policy's actor."""
        return self.policy.actor

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.actor.optimizer", "policy.critic.optimizer"], []

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw actions, and keep their log-probs.

        :return: actions for the env, and as they are stored
        """
        if self.num_timesteps < learning_starts:
            actions, self._log_probs = uniform_behavior(self.action_space, squashed=True)(self._last_obs)
        else:
            with th.no_grad(), unvalidated_distributions():
                obs: Any = self._last_obs
                distribution = self.policy.actor.distribution(obs_as_tensor(obs, self.device))
                drawn = distribution.sample()
                self._log_probs = distribution.log_prob(drawn).cpu().numpy()
            actions = drawn.cpu().numpy().reshape(n_envs, *(self.action_space.shape or ()))
        if isinstance(self.action_space, spaces.Box):
            return self.policy.unscale_action(actions), actions
        return actions, actions

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: Any,
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        if self._guard is not None:
            self._guard.check(self._n_collected)
        require_finite_step("reward", reward, self._n_collected)
        require_finite_step("observation", new_obs, self._n_collected)
        self._n_collected += 1
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        if isinstance(replay_buffer, BehaviorReplayBuffer):
            assert self._log_probs is not None
            replay_buffer.record_log_probs(self._log_probs)

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> RolloutReturn:
        """As SB3's.

        :raises NonFiniteError: a reward or an observation is not finite
        """
        assert self.env is not None
        self._n_collected, self._guard = 0, NormalizationGuard(self.env)
        with self._guard.statistics_kept():
            return super().collect_rollouts(*args, **kwargs)

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """As SB3's; the TensorBoard run is named after the class.

        :raises ValueError: negative ``total_timesteps``, or a model without env
        :raises TypeError: ``total_timesteps`` is not a number
        """
        arg.real(0)("total_timesteps", total_timesteps)
        if self.env is None:
            raise ValueError("learn() needs an environment: call set_env(env), or load(path, env=env)")
        name = tb_log_name or type(self).__name__
        with extra_hints():
            return super().learn(total_timesteps, callback, log_interval, name, reset_num_timesteps, progress_bar)  # type: ignore[arg-type]
