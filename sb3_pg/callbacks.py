"""Callbacks for SB3's ``learn``."""

from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, EventCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, sync_envs_normalization, unwrap_vec_normalize

from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.on_policy import OnPolicyPG
from sb3_pg.functional import GradientDiagnostics, episode_gradients, gradient_diagnostics, normalize
from sb3_pg.learner import GradientStep
from sb3_pg.policies import (
    functional_log_prob,
    has_memory,
    has_own_forward,
    original,
    policy_actions,
    reachable_parameters,
    unvalidated_distributions,
)
from sb3_pg.rollout import RolloutBatch

UNITS = ("auto", "episode", "sample")


class GradientDiagnosticsCallback(BaseCallback):
    r"""Log the noise of the policy gradient, for our on-policy algorithms and SB3's.

    The batch gradient :math:`\bar g` is the mean of n rows :math:`g_i`. A row is the gradient of an episode (its part
    in the rollout, if the rollout cuts it) or of a step, at the policy that has collected the rollout. It is the
    gradient of the policy's objective without entropy bonus and critic, before clipping. Logged under ``diagnostics/``:

    ====================== ======================================================================================
    gradient_variance      tr Sigma / n, the total variance of the batch gradient
    gradient_variance_max  the largest of its coordinates' variances
    gradient_snr           signal-to-noise ratio of the batch gradient, (\|g\|^2 - tr Sigma / n) / (tr Sigma / n)
    gradient_noise_scale   the n at which that ratio would be 1: McCandlish et al. (2018), eq. 2.9
    half_batch_cosine      cosine between the gradients of the rows with even and with odd number
    n_units                n
    ====================== ======================================================================================

    See :class:`~sb3_pg.functional.GradientDiagnostics`. Where noise dominates, the ratio and the noise scale may be
    negative. Rows are assumed to be independent. Normalized advantages and baselines fitted to the batch make them
    slightly dependent; steps of one episode (``unit="sample"``) are strongly dependent. For PPO it is the gradient of
    the update's first step, with advantages normalized over the rollout instead of a minibatch.

    The callback does not change training: the weights are the same to the bit.

    :param every: rollouts per measurement
    :param unit: meaning of a row: "episode", "sample" (a step, not with memory), or "auto", which is "episode"
    :param verbose: 1 prints a message the first time that a rollout has too few rows
    :raises TypeError: an argument of the wrong type; when training starts, an algorithm that is not on-policy
    :raises ValueError: an argument out of range; when training starts, a model whose gradient is not a sum of weighted
        scores, or whose policy computes log-probs in its own way
    """

    #: the last measurement, None before the first
    diagnostics: GradientDiagnostics | None = None

    def __init__(self, every: int = 1, unit: str = "auto", verbose: int = 0) -> None:
        arg.integer(1)("every", every)
        arg.choice(*UNITS)("unit", unit)
        arg.integer(0)("verbose", verbose)
        super().__init__(verbose)
        self.every = every
        self.unit = unit
        self._n_rollouts = 0
        self._has_warned = False

    def _on_training_start(self) -> None:
        model = self.model
        name = f"{type(self).__name__} cannot measure {type(model).__name__}"
        if not isinstance(model, OnPolicyAlgorithm):
            raise TypeError(f"{name}: it is not an on-policy algorithm")
        self._require_known_log_prob()
        if self.unit == "sample" and has_memory(model.policy):
            raise ValueError(f"{name} with unit='sample' and memory, through which steps depend on each other")
        if getattr(getattr(model, "fitted_baseline", None), "per_parameter", False):
            raise ValueError(f"{name} with a component-wise baseline, which has no single advantage per step")

    def _require_known_log_prob(self) -> None:
        policy = original(self.model.policy)
        if not isinstance(policy, ActorCriticPolicy) or has_own_forward(policy):
            raise ValueError(
                f"{type(self).__name__} cannot measure {type(self.model).__name__} with {type(policy).__name__}: it "
                "uses the log-probs of SB3's get_distribution, and this policy replaces forward, evaluate_actions or "
                "get_distribution"
            )

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._n_rollouts += 1
        if self._n_rollouts % self.every:
            return
        self._require_known_log_prob()  # a method may have been replaced since
        weighted = _weighted_batch(self.model)
        if weighted is None:
            return
        batch, weights = weighted
        by_sample = self.unit == "sample"
        rows = batch.select(batch.episodes)
        rows = th.arange(len(rows), device=rows.device) if by_sample else rows
        n_rows = int(rows.max()) + 1
        if n_rows < 2:
            if self.verbose >= 1 and not self._has_warned:
                by_step = not by_sample and not has_memory(self.model.policy)
                advice = "use unit='sample'" if by_step else "collect from more envs, or more steps or episodes"
                print(f"{type(self).__name__}: the variance needs 2 rows, this rollout has {n_rows}; {advice}")
            self._has_warned = True
            return
        self.diagnostics = _measure(self.model, batch, weights, rows, n_rows)
        self._record(self.diagnostics)

    def _record(self, diagnostics: GradientDiagnostics) -> None:
        values = {
            "gradient_variance": diagnostics.batch_variance,
            "gradient_variance_max": diagnostics.variance.amax() / diagnostics.n_rows,
            "gradient_snr": diagnostics.signal_to_noise,
            "gradient_noise_scale": diagnostics.noise_scale,
            "half_batch_cosine": diagnostics.half_batch_cosine,
        }
        for name, value in zip(values, th.stack(list(values.values())).tolist(), strict=True):
            self.logger.record(f"diagnostics/{name}", value)
        self.logger.record("diagnostics/n_units", diagnostics.n_rows)


def _weighted_batch(model: Any) -> tuple[RolloutBatch, th.Tensor] | None:
    """Return the rollout that has just ended, and the weight of each log-prob, ``(n_steps, n_envs)``.

    :return: None if the rollout was skipped because of numbers that are not finite
    """
    if isinstance(model, OnPolicyPG) and not model.has_foreign_buffer:
        own = model.rollout_batch
        return None if own is None else (own, model.learner.credit(own))
    batch = _batch_from_buffer(model)
    assert batch.advantages is not None
    advantages = batch.advantages
    return batch, normalize(advantages) if getattr(model, "normalize_advantage", False) else advantages


def _batch_from_buffer(model: Any) -> RolloutBatch:
    """Return SB3's rollout buffer as a batch, before SB3 flattens its two axes (steps and envs)."""
    buffer = model.rollout_buffer
    advantages = th.as_tensor(buffer.advantages, device=model.device)
    ends = th.ones_like(advantages, dtype=th.bool)
    ends[:-1] = th.as_tensor(buffer.episode_starts[1:], device=model.device).bool()
    return RolloutBatch(
        observations=obs_as_tensor(buffer.observations, model.device),
        actions=th.as_tensor(buffer.actions, device=model.device),
        rewards=th.as_tensor(buffer.rewards, device=model.device),
        terminated=ends,
        truncated=th.zeros_like(ends),
        timesteps=th.zeros_like(ends, dtype=th.long),
        advantages=advantages,
    )


def _measure(model: Any, batch: RolloutBatch, weights: th.Tensor, rows: th.Tensor, n_rows: int) -> GradientDiagnostics:
    """Return statistics of the rows whose mean is the batch gradient, and leave the model unchanged.

    :param weights: weights of the steps, ``(n_steps, n_envs)``
    :param rows: number of the row that each valid sample belongs to
    """
    policy = model.policy
    training = policy.training
    devices = [model.device] if model.device.type == "cuda" else []
    with th.random.fork_rng(devices), unvalidated_distributions(), functional_log_prob(policy) as log_prob:
        policy.set_training_mode(False)
        try:
            actor = reachable_parameters(policy).actor
            parameters = {name: parameter.detach() for name, parameter in actor.items() if parameter.requires_grad}
            # The loss divides by the number of episodes or samples, the mean over rows by the number of rows.
            step = model.learner.step if isinstance(model, OnPolicyPG) else None
            n_episodes = batch.n_episodes if isinstance(step, GradientStep) else None
            scale = n_rows / (n_episodes or len(rows))
            gradients = episode_gradients(
                log_prob,
                parameters,
                batch.flat_observations,
                policy_actions(batch.select(batch.actions), model.action_space),
                batch.select(weights * scale).to(next(iter(parameters.values())).dtype)[None],
                rows,
            )
            return gradient_diagnostics((indices, chunk[:, 0]) for indices, chunk in gradients)
        finally:
            policy.set_training_mode(training)


# ---------------------------------------------------------------- average reward


class AverageReward(NamedTuple):
    """Average rewards of a long rollout.

    :param rewards: reward units per step, one number per env
    :param n_terminated: number of episodes that ended in a terminal state, of all envs
    """

    rewards: np.ndarray
    n_terminated: int


def average_reward_of(
    model: BaseAlgorithm, env: VecEnv, horizon: int = 10_000, deterministic: bool = True, reset_cost: float = 0.0
) -> AverageReward:
    r"""Play ``horizon`` steps in each env, whatever episodes end, and return the average reward.

    .. math:: \frac{1}{T} \sum_{t=0}^{T-1} (r_t - c\, e_t)

    with e_t = 1 where the episode ended in a terminal state, and c = ``reset_cost``. A time limit ends an episode
    without a cost. To measure one long rollout, make the env without a time limit:
    ``gymnasium.make(env_id, max_episode_steps=horizon)``.

    :param model: with SB3's ``predict``
    :param env: the envs. Rewards count as they were before a VecNormalize has scaled them
    :param horizon: T, steps of each env
    :param deterministic: whether to take the most probable actions
    :param reset_cost: c, reward units
    :raises ValueError: ``horizon`` is less than 1, or ``reset_cost`` is negative
    :raises TypeError: an argument is of the wrong type
    """
    arg.integer(1)("horizon", horizon)
    arg.real(0)("reset_cost", reset_cost)
    normalization = unwrap_vec_normalize(env)
    total, n_terminated = np.zeros(env.num_envs), 0
    obs, state, starts = env.reset(), None, np.ones(env.num_envs, dtype=bool)
    for _ in range(horizon):
        actions, state = model.predict(obs, state, starts, deterministic)  # type: ignore[arg-type]
        obs, rewards, starts, infos = env.step(actions)
        total += rewards if normalization is None else normalization.get_original_reward()
        for i in np.flatnonzero(starts):
            terminated = not infos[i].get("TimeLimit.truncated", False)
            total[i] -= reset_cost * terminated
            n_terminated += terminated
    return AverageReward(total / horizon, n_terminated)


class AverageRewardEvalCallback(EventCallback):
    """Evaluate the average reward in long rollouts, as SB3's EvalCallback evaluates the return of episodes.

    It logs ``eval/average_reward``, the mean over the envs; with several envs ``eval/average_reward_std``; and
    ``eval/n_terminated``, the number of terminal states in a rollout of all envs. See :func:`average_reward_of`.

    :param eval_env: env of the evaluation, made without a time limit, or a VecEnv. Statistics of a VecNormalize around
        the training env are copied to one around it
    :param horizon: steps of each env in an evaluation
    :param eval_freq: calls of the callback between two evaluations: steps of each training env
    :param deterministic: whether to take the most probable actions
    :param reset_cost: is subtracted where an episode ends in a terminal state, reward units: that of the algorithm
    :param callback_on_new_best: is called after an evaluation that is better than all before
    :param best_model_save_path: folder for ``best_model.zip``, None to save no model
    :param log_path: folder for ``average_rewards.npz`` with the arrays ``timesteps`` and ``results``, a row per
        evaluation; None for no file
    :param verbose: 1 prints each evaluation
    :raises ValueError: an argument is out of range, or the training env has a VecNormalize and ``eval_env`` has none
    :raises TypeError: an argument is of the wrong type
    """

    def __init__(
        self,
        eval_env: gym.Env[Any, Any] | VecEnv,
        horizon: int = 10_000,
        eval_freq: int = 10_000,
        deterministic: bool = True,
        reset_cost: float = 0.0,
        callback_on_new_best: BaseCallback | None = None,
        best_model_save_path: str | PathLike[str] | None = None,
        log_path: str | PathLike[str] | None = None,
        verbose: int = 1,
    ) -> None:
        arg.instance(gym.Env, VecEnv)("eval_env", eval_env)
        arg.integer(1)("horizon", horizon)
        arg.integer(1)("eval_freq", eval_freq)
        arg.instance(bool)("deterministic", deterministic)
        arg.real(0)("reset_cost", reset_cost)
        arg.instance(BaseCallback, optional=True)("callback_on_new_best", callback_on_new_best)
        arg.instance(str, PathLike, optional=True)("best_model_save_path", best_model_save_path)
        arg.instance(str, PathLike, optional=True)("log_path", log_path)
        arg.integer(0)("verbose", verbose)
        super().__init__(callback_on_new_best, verbose)
        self.eval_env = eval_env if isinstance(eval_env, VecEnv) else DummyVecEnv([lambda: eval_env])
        self.horizon, self.eval_freq, self.deterministic, self.reset_cost = (
            horizon,
            eval_freq,
            deterministic,
            reset_cost,
        )
        self.best_model_save_path = None if best_model_save_path is None else Path(best_model_save_path)
        self.log_path = None if log_path is None else Path(log_path)
        #: mean over the envs, of the latest evaluation and of the best; reward units per step
        self.last_average_reward = self.best_average_reward = -np.inf
        self._timesteps: list[int] = []
        self._results: list[np.ndarray] = []

    def _init_callback(self) -> None:
        super()._init_callback()
        normalized = [unwrap_vec_normalize(env) is not None for env in (self.training_env, self.eval_env)]
        if normalized == [True, False]:
            raise ValueError(
                "eval_env must have a VecNormalize, as the training env has, got none: the policy knows normalized "
                "observations alone. Use VecNormalize(eval_env, training=False, norm_reward=False)"
            )

    def _on_step(self) -> bool:
        if self.n_calls % self.eval_freq:
            return True
        if unwrap_vec_normalize(self.eval_env) is not None:
            sync_envs_normalization(self.training_env, self.eval_env)
        found = average_reward_of(self.model, self.eval_env, self.horizon, self.deterministic, self.reset_cost)
        mean, std = float(found.rewards.mean()), float(found.rewards.std())
        self.last_average_reward = mean
        self._timesteps.append(self.num_timesteps)
        self._results.append(found.rewards)
        if self.log_path is not None:
            self.log_path.mkdir(parents=True, exist_ok=True)
            np.savez(self.log_path / "average_rewards.npz", timesteps=self._timesteps, results=np.stack(self._results))
        self.logger.record("eval/average_reward", mean)
        if self.eval_env.num_envs > 1:
            self.logger.record("eval/average_reward_std", std)
        self.logger.record("eval/n_terminated", found.n_terminated)
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(self.num_timesteps)
        if self.verbose >= 1:
            print(f"num_timesteps={self.num_timesteps}: average reward {mean:.4g} +- {std:.2g} per step")
        if mean <= self.best_average_reward:
            return True
        self.best_average_reward = mean
        if self.best_model_save_path is not None:
            self.best_model_save_path.mkdir(parents=True, exist_ok=True)
            self.model.save(self.best_model_save_path / "best_model")
        return self.callback is None or self._on_event()
