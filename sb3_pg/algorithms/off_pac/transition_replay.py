"""The template of algorithms that replay transitions: acting with known log-probs, storing them, saving."""

import inspect
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import MaybeCallback, RolloutReturn, TrainFrequencyUnit
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv
from typing_extensions import Self

from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.environments import require_normalized_last
from sb3_pg.algorithms.learning import LearningAlgorithm, LogInterval, waits_for_learning_starts
from sb3_pg.algorithms.off_pac.policies import Critic, OffPACPolicy
from sb3_pg.algorithms.signature import CHECKS, REPLAYING_CHECKS
from sb3_pg.errors import NonFiniteError
from sb3_pg.learner.optimizers import with_fewer_operations
from sb3_pg.learner.rollback import require_usable_std
from sb3_pg.policies import (
    compile_networks,
    from_env,
    has_own_predict,
    is_listened_to,
    is_patched,
    original,
    scaled,
    to_env,
    uniform_behavior,
    unvalidated_distributions,
)
from sb3_pg.rollout import (
    BehaviorReplayBuffer,
    DictBehaviorReplayBuffer,
    NormalizationGuard,
    NStepBehaviorReplayBuffer,
    keep_what_is_drawn,
    require_finite_observation,
    require_finite_policy,
    require_finite_step,
)


def _check_policy(name: str, value: Any) -> None:
    if not (isinstance(value, str) or (inspect.isclass(value) and issubclass(value, OffPACPolicy))):
        raise TypeError(f"{name} must be a name or a subclass of OffPACPolicy, got {value!r}")


class TransitionAlgorithm(LearningAlgorithm, OffPolicyAlgorithm):
    """Acts with a stochastic actor, and keeps how probable each action was."""

    checks: ClassVar[Mapping[str, arg.Check]] = {
        **CHECKS,
        **REPLAYING_CHECKS,
        "policy": _check_policy,
        "batch_size": arg.integer(1),
        "n_steps": arg.integer(1),
        "tau": arg.real(0, 1),
        "replay_buffer_class": arg.subclass(ReplayBuffer),
    }
    policy: OffPACPolicy
    compile: bool
    _log_probs: np.ndarray | None = None
    _n_collected = 0

    def _check_combinations(self) -> None:
        """Require arguments that agree with each other and with the spaces.

        :raises ValueError: naming those that do not
        """
        space = self.action_space
        if isinstance(space, spaces.Box) and not (space.low < space.high).all():
            raise ValueError(f"actions are scaled by the bounds, which must differ, got {space}")
        self._convert_train_freq()
        frequency: Any = self.train_freq
        if self.n_envs > 1 and frequency.unit == TrainFrequencyUnit.EPISODE:
            raise ValueError(f"train_freq in episodes takes one env, got {self.n_envs} envs: give it in steps")
        self._check_n_steps()

    @classmethod
    def _check_env(cls, env: VecEnv) -> None:
        require_normalized_last(env)
        if getattr(env, "resets_late", False):
            raise ValueError(
                f"env resets in the step after an episode's end (NEXT_STEP), a transition that {cls.__name__} cannot "
                f"leave out, got a {type(env).__name__}: use another autoreset mode, or an env of "
                "sb3_pg.envs.make_vec_env(..., backend='dummy')"
            )

    def _check_n_steps(self) -> None:
        """Require that the replay buffer can sum the rewards of n steps, as the algorithm would.

        :raises ValueError: it cannot, or its arguments say otherwise
        """
        cls, kwargs = self.replay_buffer_class or ReplayBuffer, self.replay_buffer_kwargs
        n_steps = self.n_steps if self._chooses_buffer else 1
        if n_steps > 1 and isinstance(self.observation_space, spaces.Dict):
            raise ValueError(f"n_steps={n_steps} takes observations that are no Dict, got {self.observation_space}")
        if isinstance(self.observation_space, spaces.Dict) and (
            self.replay_buffer_class is ReplayBuffer or issubclass(cls, NStepReplayBuffer)
        ):
            raise ValueError(f"{cls.__name__} takes observations that are no Dict, got {self.observation_space}")
        if n_steps > 1 and self.optimize_memory_usage:
            raise ValueError(f"n_steps={n_steps} takes every next observation: optimize_memory_usage must be False")
        if self._is_kept_by_load("replay_buffer_kwargs"):
            return
        for name, ours, holds in (
            ("n_steps", n_steps, n_steps > 1),
            ("gamma", self.gamma, n_steps > 1 or issubclass(cls, NStepReplayBuffer)),
        ):
            if holds and kwargs.get(name, ours) != ours:
                raise ValueError(
                    f"replay_buffer_kwargs[{name!r}] must be {name}={ours} or left out, got {kwargs[name]}"
                )

    @property
    def _chooses_buffer(self) -> bool:
        """Whether the class of the replay buffer follows from ``n_steps`` and the observation space."""
        cls = self.replay_buffer_class
        if cls is None:
            return True
        if not self._is_loading() or self._is_given_to_load("replay_buffer_class"):
            return False
        # The class in a zip is the one that was chosen then, or the user's.
        in_steps = cls is NStepBehaviorReplayBuffer
        if not in_steps and cls not in (BehaviorReplayBuffer, DictBehaviorReplayBuffer):
            return False
        return self._is_given_to_load("n_steps") or in_steps == (self.n_steps > 1)

    def _make_n_step_buffer(self) -> None:
        if self.replay_buffer is None:
            self.replay_buffer = NStepBehaviorReplayBuffer(
                self.buffer_size,
                self.observation_space,
                self.action_space,
                device=self.device,
                n_envs=self.n_envs,
                **{**self.replay_buffer_kwargs, "n_steps": self.n_steps, "gamma": self.gamma},
            )

    def _discount_replay(self) -> None:
        """Let the replay buffer discount rewards as the algorithm does."""
        if isinstance(self.replay_buffer, NStepReplayBuffer):
            self.replay_buffer.gamma = self.gamma

    def _setup_model(self) -> None:
        self._check_again()
        self._check_combinations()
        self._check_effects()
        in_steps = self._chooses_buffer and self.n_steps > 1
        if in_steps:
            # SB3 says that n_steps is ignored beside a class: it is to find no class, and the buffer made already.
            self.replay_buffer_class = None
            self._make_n_step_buffer()
        elif self._chooses_buffer:
            if self.replay_buffer_class is NStepBehaviorReplayBuffer:  # saved with more steps
                kept = self.replay_buffer_kwargs.items()
                self.replay_buffer_kwargs = {name: value for name, value in kept if name not in ("n_steps", "gamma")}
            is_dict = isinstance(self.observation_space, spaces.Dict)
            self.replay_buffer_class = DictBehaviorReplayBuffer if is_dict else BehaviorReplayBuffer
        super()._setup_model()
        assert self.replay_buffer is not None
        keep_what_is_drawn(self.replay_buffer)  # one of the user's own, too
        if in_steps:
            self.replay_buffer_class = NStepBehaviorReplayBuffer
        self._discount_replay()
        require_usable_std(self.policy.actor, self.policy_kwargs, self.use_sde)
        for module in (self.policy.actor, self.policy.critic):
            module.optimizer = with_fewer_operations(module.optimizer)
        if self.compile:
            compile_networks(self.policy)

    def _setup_lr_schedule(self) -> None:
        self.lr_schedule = arg.to_schedule(self.learning_rate)

    @property
    def actor(self) -> Any:  # type: ignore[override]
        """The policy's actor."""
        return self.policy.actor

    @property
    def critic(self) -> Critic:
        """The policy's critic."""
        return self.policy.critic

    @property
    def critic_target(self) -> Critic:
        """What follows the critic slowly."""
        return self.policy.critic_target

    def _why_no_update(self) -> str:
        waits = self.gradient_steps != 0 and self.num_timesteps <= self.learning_starts
        return waits_for_learning_starts(self) if waits else ""

    # ---------------------------------------------------------------- saving

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_log_probs", "_n_collected"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "actor.optimizer", "critic.optimizer"], []

    # ---------------------------------------------------------------- acting

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw actions, and keep their log-probs.

        :return: actions for the env, and as they are stored
        :raises NonFiniteError: naming the observation, or the policy's parameter, that makes it impossible
        """
        if self.num_timesteps < learning_starts:
            actions, self._log_probs = uniform_behavior(self.action_space, squashed=True)(self._last_obs)
            actions = from_env(actions, self.action_space)
        else:
            actions, self._log_probs = self._draw()
            actions = actions.reshape(n_envs, *(self.action_space.shape or ()))
        return to_env(self.policy)(actions), actions

    def _draw(self) -> tuple[np.ndarray, np.ndarray]:
        obs: Any = self._last_obs
        cause: Exception | None = None
        try:
            with th.no_grad(), unvalidated_distributions():
                obs_tensor = obs_as_tensor(obs, self.device)
                distribution = self.actor.distribution(obs_tensor)
                drawn = self._predicted(obs, obs_tensor) if self._acts_by_calls() else distribution.sample()
                actions, log_probs = drawn.cpu().numpy(), distribution.log_prob(drawn).cpu().numpy()
            if np.isfinite(log_probs).all():
                return actions, log_probs
        except RuntimeError as error:  # what torch says of probabilities that are none
            cause = error
        require_finite_step("observation", obs, self._n_collected, cause=cause)
        require_finite_policy(self.policy, cause)
        raise cause or NonFiniteError("log_prob", math.nan, step=self._n_collected)

    def _acts_by_calls(self) -> bool:
        """Whether it matters that SB3 acts by ``predict``, which calls the actor: there are hooks, or own methods."""
        policy = original(self.policy)
        actor = policy.actor
        own = "_predict" in vars(policy) or type(policy)._predict is not OffPACPolicy._predict
        return own or has_own_predict(policy) or is_listened_to((actor,)) or is_patched(actor)

    def _predicted(self, obs: Any, obs_tensor: Any) -> th.Tensor:
        """Actions as SB3 draws them, those of a Box in [-1, 1]."""
        if not has_own_predict(self.policy):
            drawn: th.Tensor = self.policy._predict(obs_tensor)
            return drawn
        chosen, _ = self.policy.predict(obs)
        if isinstance(self.action_space, spaces.Box):
            chosen = scaled(chosen, self.action_space).astype(np.float32)
        return th.as_tensor(chosen, device=self.device)

    # ---------------------------------------------------------------- collecting

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: Any,
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        step, hint = self._n_collected, f"The env returned it, at time step {self.num_timesteps}."
        assert self.env is not None
        NormalizationGuard(self.env).check(step)
        require_finite_step("reward", reward, step, hint)
        require_finite_step("observation", new_obs, step, hint)
        for env in np.flatnonzero(dones):
            final = infos[env].get("terminal_observation")
            require_finite_observation("observation at the end", final, int(env), step, hint)
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
        self._n_collected = 0
        auto = self._log_steps > 0 and kwargs.get("log_interval") is not None
        if auto:
            kwargs["log_interval"] = None  # of episodes
        try:
            with NormalizationGuard(self.env).statistics_kept():
                result = super().collect_rollouts(*args, **kwargs)
        except BaseException:
            self._last_obs = None  # the env is in an unknown state: it is reset before the next rollout
            raise
        if auto and self._is_time_to_log():
            self.dump_logs()
        return result

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: LogInterval = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """As SB3's; ``log_interval`` counts episodes, and the TensorBoard run is named after the class.

        With ``log_interval="auto"`` it is about every 500 steps of each env, as often as A2C's default.

        :raises ValueError: an argument out of range, or a model without env
        :raises TypeError: an argument of the wrong type
        """
        return self._learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
