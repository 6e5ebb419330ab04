"""Env steps into a buffer: the loop that samples, steps and writes, and does nothing else.

Values, log-probabilities and returns come from one batched forward after it (:mod:`sb3_pg.rollout.make_batch`).
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecFrameStack, VecMonitor, is_vecenv_wrapped

from sb3_pg.policies.acting_copy import ActingCopy
from sb3_pg.policies.actions import to_env
from sb3_pg.policies.policy_cache import set_training_mode, visible_changes
from sb3_pg.policies.samplers import Sampler, make_sampler
from sb3_pg.rollout.buffers import TrajectoryRolloutBuffer
from sb3_pg.rollout.callback_locals import OffPolicyLocals, OnPolicyLocals, StepOutputs
from sb3_pg.rollout.nonfinite import (
    NormalizationGuard,
    require_finite_policy,
    require_finite_rollout,
    require_finite_step,
)
from sb3_pg.rollout.rollout_counter import EpisodeLimit, RolloutProgress


class Collector:
    """Fills a buffer with segments of ``n_steps``, or with complete episodes.

    With complete episodes every env contributes the same number, from a fresh reset, and the envs that are done wait
    for the others, masked: dropping unfinished episodes instead would over-sample short ones. Every step of every
    env counts in ``num_timesteps``, waiting included; a VecNormalize around the envs sees waiting steps too. The steps
    that only reset an env (:mod:`sb3_pg.envs`) are counted and seen likewise; the buffer closes over them.

    :param model: the algorithm, of which SB3's bookkeeping is kept (``_last_obs``, ``num_timesteps``, ...)
    :param env: its environments
    """

    def __init__(self, model: BaseAlgorithm, env: VecEnv) -> None:
        self.model, self.env = model, env
        self.normalization = NormalizationGuard(env)
        self.to_env = _action_transform(model)
        device = get_device(getattr(model, "act_device", None) or model.device)
        self._copy = None if device == model.device else ActingCopy(device)
        self._outputs = StepOutputs()
        #: the policy, or its copy
        self.acting = self._policy
        #: steps since each env's episode began; kept with the model, whose ``_last_obs`` may be one of an old episode
        kept: np.ndarray = getattr(model, "_timesteps", np.zeros(0, dtype=np.int64))
        self.timesteps = kept.copy() if len(kept) == env.num_envs else np.zeros(env.num_envs, dtype=np.int64)

    @property
    def _policy(self) -> ActorCriticPolicy:
        return cast(ActorCriticPolicy, self.model.policy)

    def collect(
        self,
        callback: BaseCallback,
        buffer: TrajectoryRolloutBuffer,
        n_steps: int | None,
        episodes_per_env: int | None,
        limit: EpisodeLimit | None,
        sampler: Sampler | None = None,
        callback_locals: OnPolicyLocals | OffPolicyLocals | None = None,
    ) -> Sampler | None:
        """Collect one rollout.

        Exactly one of ``n_steps`` and ``episodes_per_env`` is given.

        :param callback: its hooks are called as by SB3, with SB3's names in ``locals``
        :param buffer: is reset, filled and closed
        :param n_steps: steps per env
        :param episodes_per_env: complete episodes per env
        :param limit: of the episodes that are waited for; None where none is
        :param sampler: what acts; None for the policy
        :param callback_locals: what the callbacks find in ``locals``; None for what SB3's on-policy loop has there
        :return: the sampler that was used, or None if the callback stopped training
        :raises EndlessEpisodeError: an episode exceeds the limit
        :raises NonFiniteError: a reward or an observation is not finite
        """
        model = self.model
        buffer.reset()
        callback.on_rollout_start()
        set_training_mode(self._policy, False)
        before = visible_changes(self._policy)
        self.acting, device = (self._policy, model.device) if self._copy is None else self._copy.of(self._policy)
        if model.use_sde:
            self.acting.reset_noise(self.env.num_envs)
        try:
            if sampler is None:
                sampler = make_sampler(self.acting, device, self.env.num_envs)
            if callback_locals is None:
                names = {"self": model, "env": self.env, "rollout_buffer": buffer, "n_rollout_steps": n_steps}
                self._outputs.begin(self._policy, sampler, getattr(model, "value_scale", 1.0))
                callback_locals = OnPolicyLocals(callback, self._outputs, names)
            progress = RolloutProgress(self.env.num_envs, n_steps, episodes_per_env, limit)
            with self.normalization.statistics_kept(), false_steps_masked(self.env) as resetting:
                self._reset_if_needed(complete=episodes_per_env is not None)
                finished = self._loop(callback, callback_locals, buffer, sampler, progress, resetting)
        except BaseException:
            model._last_obs = None  # the env is in an unknown state: it is reset before the next rollout
            raise
        if visible_changes(self._policy) != before:
            warnings.warn(
                "The policy's methods or hooks were changed within a rollout. Actions follow the change from the next "
                "rollout on, while this rollout's log-probs may be those of the changed policy already. Make such "
                "changes in on_rollout_start or on_rollout_end.",
                stacklevel=2,
            )
        return sampler if finished else None

    def _reset_if_needed(self, complete: bool) -> None:
        """Complete episodes begin with a reset, unless that is where all envs are anyway."""
        model = self.model
        if model._last_obs is None or (complete and not np.all(model._last_episode_starts)):
            model._last_obs = self.env.reset()  # type: ignore[assignment]
            model._last_episode_starts = np.ones(self.env.num_envs, dtype=bool)
            self.normalization.check_reset()

    def _loop(
        self,
        callback: BaseCallback,
        callback_locals: OnPolicyLocals | OffPolicyLocals,
        rollout_buffer: TrajectoryRolloutBuffer,
        sampler: Sampler,
        progress: RolloutProgress,
        resets_next: np.ndarray | None,
    ) -> bool:
        model, env, to_env = self.model, self.env, self.to_env
        n_envs = env.num_envs
        obs: Any = model._last_obs
        first_starts = np.asarray(model._last_episode_starts, dtype=bool)
        self.timesteps[first_starts] = 0
        progress.start(self.timesteps)
        complete = False
        while not complete:
            if model.use_sde and model.sde_sample_freq > 0 and progress.n_steps % model.sde_sample_freq == 0:
                self.acting.reset_noise(n_envs)
            resetting = None if resets_next is None else resets_next.copy()
            try:
                actions = sampler(obs)
                clipped_actions = to_env(actions)
                new_obs, rewards, at_start, infos = env.step(clipped_actions)
            except Exception as error:
                require_finite_step("observation", obs, progress.n_steps, cause=error)
                require_finite_policy(self._policy, error)
                raise
            model.num_timesteps += n_envs
            self.normalization.check(progress.n_steps)
            active = progress.active
            if resetting is not None:
                active = ~resetting if active is None else active & ~resetting
            dones = at_start if active is None else at_start & active
            callback_locals.step(
                obs,
                {
                    "n_steps": progress.n_steps,
                    "actions": actions,
                    "clipped_actions": clipped_actions,
                    "new_obs": new_obs,
                    "rewards": rewards,
                    "dones": dones,
                    "infos": infos,
                },
            )
            go_on = callback.on_step()
            progress.n_steps += 1
            rollout_buffer.append(obs, actions, rewards, dones, active)
            if dones.any():
                self._record_endings(rollout_buffer, dones, infos)
                progress.record(dones)
            if resetting is not None:
                progress.record_resets(resetting)
                at_start = at_start | resetting
            model._last_obs = obs = new_obs  # type: ignore[assignment]
            model._last_episode_starts = at_start
            if not go_on:
                self._carry_over(progress)
                return False
            complete = progress.is_complete()
        callback_locals.end(obs)
        rollout_buffer.finish(first_starts, self.timesteps.copy(), gaps=resets_next is not None)
        self._carry_over(progress)
        if progress.active is None:
            self._keep_cut_observations(rollout_buffer, obs)
        require_finite_rollout(rollout_buffer)
        return True

    def _carry_over(self, progress: RolloutProgress) -> None:
        """Carry each env's step count over to the next rollout."""
        self.timesteps += progress.n_steps
        if progress.began.any():
            self.timesteps = np.where(progress.began > 0, progress.n_steps - progress.began, self.timesteps)
        self.model._timesteps = self.timesteps.copy()  # type: ignore[attr-defined]

    def _record_endings(self, buffer: TrajectoryRolloutBuffer, dones: np.ndarray, infos: list[dict[str, Any]]) -> None:
        """Scan the infos of the envs whose episode ended, and of no others."""
        ended, row = dones.nonzero()[0], buffer.pos - 1
        self.model._update_info_buffer([infos[i] for i in ended], np.ones(len(ended), dtype=bool))
        for i in ended:
            info = infos[i]
            if info.get("TimeLimit.truncated", False):
                buffer.truncated[row, i] = True
                if info.get("terminal_observation") is not None:
                    buffer.final_observations[row, int(i)] = info["terminal_observation"]

    @staticmethod
    def _keep_cut_observations(buffer: TrajectoryRolloutBuffer, obs: Any) -> None:
        """A segment that ends in the middle of an episode is cut there; its value stands for the rest."""
        last, envs = buffer.mask.sum(0) - 1, np.arange(buffer.n_envs)
        for i in np.flatnonzero((last >= 0) & ~buffer.dones[last, envs]):
            cut = {key: value[i] for key, value in obs.items()} if isinstance(obs, dict) else obs[i]
            buffer.final_observations[int(last[i]), int(i)] = cut


#: Wrapper -> what it would do with steps that only reset an env.
_DECEIVED: dict[type[VecEnvWrapper], str] = {
    VecFrameStack: "stack one episode's frames on the next one's; use another backend",
    VecMonitor: "count the reset as a step of the episode; make_vec_env(monitor_dir=...) writes the same files",
}


def false_steps_masked(env: VecEnv) -> AbstractContextManager[np.ndarray | None]:
    """Take over what an env asks of those who step it: to leave out the transitions that are none.

    :param env: any VecEnv
    :return: within it, None, or where the next step will only reset an env, kept up to date by it
    :raises ValueError: a wrapper that would take such steps for others: frames are stacked, or episodes counted
    """
    masked: Callable[[], AbstractContextManager[np.ndarray | None]] | None = getattr(env, "false_steps_masked", None)
    if masked is None:
        return nullcontext()
    for wrapper, harm in _DECEIVED.items():
        if getattr(env, "resets_late", False) and is_vecenv_wrapped(env, wrapper):
            raise ValueError(
                f"{wrapper.__name__} would {harm}. (This env resets in the step after an episode's end, NEXT_STEP.)"
            )
    return masked()


def _action_transform(model: BaseAlgorithm) -> Callable[[np.ndarray], np.ndarray]:
    """From the policy's actions to the env's."""
    return to_env(model.policy)
