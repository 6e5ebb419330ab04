"""Make a batch of a rollout, and score it with one batched forward."""

from operator import itemgetter
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import obs_as_tensor

from sb3_pg.functional.importance import log_importance_ratio
from sb3_pg.functional.precision import precise
from sb3_pg.policies import (
    ForwardSampler,
    Observations,
    Sampler,
    Sequences,
    has_memory,
    map_observations,
    policy_actions,
    predict_all_values,
    predict_values,
    score_and_keep,
    score_in_chunks,
)
from sb3_pg.rollout.batch import RolloutBatch
from sb3_pg.rollout.buffers import TrajectoryRolloutBuffer
from sb3_pg.rollout.nonfinite import require_finite_observation


def make_batch(
    policy: ActorCriticPolicy,
    buffer: TrajectoryRolloutBuffer,
    sampler: Sampler,
    *,
    with_values: bool,
    bootstrap_truncated: bool,
    n_episodes: int | None,
    value_scale: float = 1.0,
    keep_graph: bool = False,
    last_obs: Any = None,
) -> RolloutBatch:
    """Return a finished buffer as tensors, with the log-probs and values of the policy that filled it.

    Log-probs and values are written into the buffer too, where users of SB3 look for them.

    :param policy: in eval mode
    :param buffer: finished
    :param sampler: drew the actions; a :class:`ForwardSampler` has kept their log-probs and values
    :param with_values: whether to compute values
    :param bootstrap_truncated: whether to value the last states of truncated episodes
    :param n_episodes: number of complete episodes, or None
    :param value_scale: what the critic's values are multiplied by to give reward units
    :param keep_graph: whether to set ``batch.kept_scores``, where that is possible
    :param last_obs: of all envs, after the last row. If given, the first state of an episode is valued too that begins
        after the last row, because the last row has terminated the episode before it
    :raises NonFiniteError: such a state is not finite
    """
    batch = _env_steps(buffer)
    batch.n_episodes = n_episodes
    if has_memory(policy):
        batch.sequences = _sequences(buffer)
    if with_values:
        batch.bootstrap_observations = _bootstrap_observations(buffer, bootstrap_truncated, last_obs)
    if isinstance(sampler, ForwardSampler):
        batch.log_probs = batch.restore(batch.select(_kept(sampler.log_probs, buffer)))
        if with_values:
            _fill_values(policy, batch, batch.select(_kept(sampler.values, buffer)), None, value_scale)
    else:
        batch.log_probs = score_batch(
            policy, batch, with_values=with_values, value_scale=value_scale, keep_graph=keep_graph
        )
    buffer.log_probs = batch.log_probs.cpu().numpy()
    if batch.bootstrap is not None and buffer.truncated.any():
        buffer.terminal_values = batch.bootstrap.where(batch.truncated, 0.0).float().cpu().numpy()
    if batch.values is not None:
        buffer.values = batch.values.float().cpu().numpy()
    return batch


def _env_steps(buffer: TrajectoryRolloutBuffer) -> RolloutBatch:
    """Return the env steps of a finished buffer as tensors, without values and log-probs."""
    device = buffer.device
    # Rewards in double precision: float32 gives equal returns a spread that normalization would blow up.
    return RolloutBatch(
        observations=obs_as_tensor(buffer.observations, device),
        actions=th.as_tensor(buffer.actions, device=device),
        rewards=precise(th.as_tensor(buffer.rewards, device=device)),
        terminated=th.as_tensor(buffer.dones & ~buffer.truncated, device=device),
        truncated=th.as_tensor(buffer.truncated, device=device),
        timesteps=th.as_tensor(buffer.timesteps, device=device),
        mask=None if buffer.mask.all() else th.as_tensor(buffer.mask, device=device),
    )


def _sequences(buffer: TrajectoryRolloutBuffer) -> Sequences:
    """Return the sequences of a finished buffer's steps. They begin with the memory that the buffer holds."""
    continued = (buffer.episode_starts[0] == 0) & buffer.mask[0]
    return Sequences.of_rollout(buffer.dones, buffer.mask, buffer.device, continued, buffer.memory)


def _kept(numbers: list[th.Tensor], buffer: TrajectoryRolloutBuffer) -> th.Tensor:
    """Stack the numbers that a sampler has kept of each step, in the order of a finished buffer's rows."""
    return buffer.in_order(th.stack(numbers).to(buffer.device))


def score_batch(
    policy: ActorCriticPolicy,
    batch: RolloutBatch,
    *,
    with_values: bool,
    value_scale: float = 1.0,
    keep_graph: bool = False,
) -> th.Tensor:
    """Return the log-probs of a batch's actions under a policy, and set ``batch.distributions``.

    If asked for, also set ``batch.values`` and ``batch.bootstrap``, of the states in ``batch.bootstrap_observations``.
    Without ``batch.sequences``, a policy with memory remembers nothing before the batch.

    :param policy: in eval mode
    :param batch: the rollout
    :param with_values: whether to set ``values`` and ``bootstrap``
    :param value_scale: what the critic's values are multiplied by to give reward units
    :param keep_graph: whether to set ``batch.kept_scores``, where that is possible
    :return: log pi(a_t|s_t), nats, ``(n_steps, n_envs)``, 0 in the padding
    """
    if batch.sequences is None and has_memory(policy):
        ends, valid = batch.ends.cpu().numpy(), batch.valid.cpu().numpy()
        batch.sequences = Sequences.of_rollout(ends, valid, batch.rewards.device)
    actions = policy_actions(batch.select(batch.actions), policy.action_space)
    inputs = policy, batch.flat_observations, actions, with_values, batch.followers if with_values else None
    batch.kept_scores = score_and_keep(*inputs) if keep_graph else None
    scores = score_in_chunks(*inputs) if batch.kept_scores is None else batch.kept_scores.detached()
    batch.distributions, batch.critic_state = scores.distribution, scores.critic_state
    if scores.values is not None:
        _fill_values(policy, batch, scores.values, scores.other_values, value_scale)
    return batch.restore(scores.log_prob)


def _fill_values(
    policy: ActorCriticPolicy,
    batch: RolloutBatch,
    values: th.Tensor,
    other_values: th.Tensor | None,
    value_scale: float,
) -> None:
    """Set ``values`` and ``bootstrap`` from the critic's values of the valid steps, and of the states that follow."""
    batch.values = precise(batch.restore(values))
    if value_scale != 1:
        batch.values *= value_scale
    bootstrap = th.zeros_like(batch.rewards)
    if batch.bootstrap_observations is not None:
        observations, places = batch.bootstrap_observations
        others = predict_values(policy, observations) if other_values is None else other_values
        bootstrap.view(-1).index_copy_(0, places, others.to(bootstrap.dtype) * value_scale)
    batch.bootstrap = bootstrap


def set_behavior(batch: RolloutBatch, buffer: TrajectoryRolloutBuffer, log_probs: np.ndarray) -> None:
    """Say that an older policy has taken the steps of a batch.

    :param batch: scored by the present policy
    :param buffer: that the batch was made from; users of SB3 look for the log-probs there
    :param log_probs: of the older policy, nats, ``(n_steps, n_envs)``
    """
    assert batch.log_probs is not None
    behavior = th.as_tensor(log_probs, device=batch.log_probs.device)
    batch.log_ratio = log_importance_ratio(batch.log_probs, behavior, batch.mask)
    batch.log_probs, buffer.log_probs = behavior, log_probs


def score_again(policy: ActorCriticPolicy, batch: RolloutBatch, value_scale: float = 1.0) -> None:
    """Set the values and the importance ratios of a batch to those of the policy as it is now.

    :param policy: in eval mode
    :param batch: with the log-probs of the policy that collected it
    :param value_scale: what the critic's values are multiplied by to give reward units
    """
    assert batch.log_probs is not None
    log_probs = score_batch(policy, batch, with_values=True, value_scale=value_scale)
    batch.log_ratio = log_importance_ratio(log_probs, batch.log_probs, batch.mask)


def value_again(policy: ActorCriticPolicy, batch: RolloutBatch, value_scale: float = 1.0) -> None:
    """Set ``values`` and ``bootstrap`` to those of the critic as it is now.

    :param policy: in eval mode
    :param batch: the rollout
    :param value_scale: what the critic's values are multiplied by to give reward units
    """
    _fill_values(policy, batch, *predict_all_values(policy, batch.flat_observations, batch.followers), value_scale)


def action_log_probs(policy: ActorCriticPolicy, buffer: TrajectoryRolloutBuffer, sampler: Sampler) -> th.Tensor:
    """Return the log-probs of a finished buffer's actions under the policy or behavior that drew them.

    :param policy: in eval mode
    :param buffer: finished
    :param sampler: drew the actions, and has kept their log-probs if it did not draw from ``policy``
    :return: nats, ``(n_steps, n_envs)``
    """
    known = getattr(sampler, "log_probs", None)
    if known is not None:
        return _kept(known, buffer)
    batch = _env_steps(buffer)
    if has_memory(policy):
        batch.sequences = _sequences(buffer)
    actions = policy_actions(batch.select(batch.actions), buffer.action_space)
    return batch.restore(score_in_chunks(policy, batch.flat_observations, actions).log_prob)


def _bootstrap_observations(
    buffer: TrajectoryRolloutBuffer, of_truncated: bool, last_obs: Any
) -> tuple[Observations, th.Tensor] | None:
    """Return the states that follow truncated and cut-off steps, and their places; None if there are none.

    With ``last_obs`` there are also those that follow a reset after the last row.
    """
    kept = {
        row * buffer.n_envs + env: obs
        for (row, env), obs in buffer.final_observations.items()
        if of_truncated or not buffer.truncated[row, env]
    }
    if last_obs is not None:
        last = buffer.buffer_size - 1
        for env in map(int, np.flatnonzero(buffer.dones[last] & ~buffer.truncated[last])):
            obs = kept[last * buffer.n_envs + env] = map_observations(itemgetter(env), last_obs)
            require_finite_observation("observation after the reset", obs, env, last)
    if not kept:
        return None

    def stacked(shape: tuple[int, ...], *arrays: Any) -> np.ndarray:
        return np.stack([np.reshape(array, shape) for array in arrays])  # in the shape that the buffer stores

    observations = map_observations(stacked, buffer.obs_shape, *kept.values())
    return obs_as_tensor(observations, buffer.device), th.tensor(list(kept), device=buffer.device)


def batch_from_filled_buffer(buffer: RolloutBuffer, policy: ActorCriticPolicy) -> RolloutBatch:
    """Make a batch of a buffer that has advantages, returns, values and log-probs already, as SB3's algorithms do.

    :param buffer: filled by the user or by SB3's collector; a buffer of another class is read through its ``get``
    :param policy: if it has memory, it remembers ``buffer.memory`` before the first row
    :raises ValueError: it is not full, or its ``get`` has lost the order of the steps, which a policy with memory needs
    """
    if not buffer.full:
        kind = type(buffer).__name__
        raise ValueError(
            f"rollout_buffer ({kind}) is not full: it holds {buffer.pos} of {buffer.buffer_size} steps. Call "
            "collect_rollouts before train, or fill it by add and compute_returns_and_advantage"
        )
    if isinstance(buffer, TrajectoryRolloutBuffer) and not buffer.generator_ready:
        batch = _env_steps(buffer)
        if has_memory(policy):
            batch.sequences = _sequences(buffer)
        batch.log_probs = th.as_tensor(buffer.log_probs, device=buffer.device)
        batch.values, batch.advantages, batch.returns = (
            precise(th.as_tensor(array, device=buffer.device))
            for array in (buffer.values, buffer.advantages, buffer.returns)
        )
        return batch
    if has_memory(policy):
        raise ValueError(
            f"rollout_buffer ({type(buffer).__name__}) has been read by its get, which loses the order of the steps. A "
            "policy with memory needs it: fill the buffer anew"
        )
    return _batch_of_samples(buffer)


def _batch_of_samples(buffer: RolloutBuffer) -> RolloutBatch:
    """Make a batch of one column, in the order of the buffer's ``get``."""
    (data,) = buffer.get(batch_size=None)

    def one_env(x: th.Tensor) -> th.Tensor:
        return x[:, None]

    nothing = th.zeros_like(one_env(data.returns))
    return RolloutBatch(
        observations=map_observations(one_env, data.observations),
        actions=one_env(data.actions),
        rewards=nothing,
        terminated=nothing.bool(),
        truncated=nothing.bool(),
        timesteps=nothing.long(),
        values=one_env(data.old_values),
        log_probs=one_env(data.old_log_prob),
        advantages=one_env(data.advantages),
        returns=one_env(data.returns),
    )
