"""Make a batch of a whole rollout, with one batched forward."""

from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import obs_as_tensor

from sb3_pg.functional.precision import precise
from sb3_pg.policies.observations import Observations
from sb3_pg.policies.samplers import ForwardSampler, Sampler
from sb3_pg.policies.score_actions import policy_actions, predict_values, score_in_chunks
from sb3_pg.rollout.batch import RolloutBatch
from sb3_pg.rollout.buffers import TrajectoryRolloutBuffer


def make_batch(
    policy: ActorCriticPolicy,
    buffer: TrajectoryRolloutBuffer,
    sampler: Sampler,
    *,
    with_values: bool,
    bootstrap_truncated: bool,
    n_episodes: int | None,
    value_scale: float = 1.0,
) -> RolloutBatch:
    """Score a finished buffer with the policy that filled it, and return it as tensors.

    Values and log-probs are written into the buffer too, where SB3's users look for them.

    :param policy: in eval mode
    :param buffer: finished
    :param sampler: what drew the actions; a :class:`ForwardSampler` has values and log-probs already
    :param with_values: whether to compute values
    :param bootstrap_truncated: whether to value the last states of truncated episodes
    :param n_episodes: number of complete episodes, or None
    :param value_scale: what the critic's values are multiplied by to give reward units
    """
    device = buffer.device
    # Rewards in double precision: float32 gives equal returns a spread that normalization would blow up.
    batch = RolloutBatch(
        observations=obs_as_tensor(buffer.observations, device),
        actions=th.as_tensor(buffer.actions, device=device),
        rewards=precise(th.as_tensor(buffer.rewards, device=device)),
        terminated=th.as_tensor(buffer.dones & ~buffer.truncated, device=device),
        truncated=th.as_tensor(buffer.truncated, device=device),
        timesteps=th.as_tensor(buffer.timesteps, device=device),
        mask=None if buffer.mask.all() else th.as_tensor(buffer.mask, device=device),
        n_episodes=n_episodes,
    )
    if with_values:
        batch.bootstrap_observations = _bootstrap_observations(buffer, bootstrap_truncated)
    known: tuple[th.Tensor, th.Tensor] | None = None
    if isinstance(sampler, ForwardSampler):
        log_probs, values = (buffer.in_order(th.stack(x).to(device)) for x in (sampler.log_probs, sampler.values))
        known = batch.select(log_probs), batch.select(values)
    batch.log_probs = score_batch(policy, batch, with_values=with_values, value_scale=value_scale, known=known)
    buffer.log_probs = batch.log_probs.cpu().numpy()
    if batch.bootstrap is not None and buffer.truncated.any():
        buffer.terminal_values = batch.bootstrap.where(batch.truncated, 0.0).float().cpu().numpy()
    if batch.values is not None:
        buffer.values = batch.values.float().cpu().numpy()
    return batch


def score_batch(
    policy: ActorCriticPolicy,
    batch: RolloutBatch,
    *,
    with_values: bool,
    value_scale: float = 1.0,
    known: tuple[th.Tensor, th.Tensor] | None = None,
) -> th.Tensor:
    """Score a batch's actions with a policy; set the batch's ``distributions``, and ``values`` and ``bootstrap``.

    :param policy: in eval mode
    :param batch: with ``bootstrap_observations`` where the states that follow are to be valued
    :param with_values: whether to set ``values`` and ``bootstrap``
    :param value_scale: what the critic's values are multiplied by to give reward units
    :param known: log-probs and values of the valid steps, if they need no forward
    :return: log pi(a_t|s_t), nats, ``(n_steps, n_envs)``, 0 in the padding
    """
    values: th.Tensor | None
    other_values: th.Tensor | None = None
    if known is not None:
        log_probs, values = known
    else:
        actions = policy_actions(batch.select(batch.actions), policy.action_space)
        others = batch.bootstrap_observations[0] if with_values and batch.bootstrap_observations is not None else None
        scores = score_in_chunks(policy, batch.flat_observations, actions, with_values, others)
        log_probs, values, other_values = scores.log_prob, scores.values, scores.other_values
        batch.distributions = scores.distribution
    if with_values:
        assert values is not None
        batch.values = precise(batch.restore(values))
        if value_scale != 1:
            batch.values *= value_scale
        fill_bootstrap(policy, batch, value_scale, other_values)
    return batch.restore(log_probs)


def action_log_probs(policy: ActorCriticPolicy, buffer: TrajectoryRolloutBuffer, sampler: Sampler) -> th.Tensor:
    """Return the log-probs of a finished buffer's actions under what drew them.

    :param policy: in eval mode
    :param buffer: finished
    :param sampler: what drew the actions: it has kept log-probs, or has drawn from the policy
    :return: nats, ``(n_steps, n_envs)``
    """
    known = getattr(sampler, "log_probs", None)
    if known is not None:
        return buffer.in_order(th.stack(known).to(buffer.device))
    observations: Any = buffer.observations
    parts = observations if isinstance(observations, dict) else {"": observations}
    rows = {key: array.reshape(-1, *array.shape[2:]) for key, array in parts.items()}
    actions = th.as_tensor(buffer.actions.reshape(-1, *buffer.actions.shape[2:]), device=buffer.device)
    flat = obs_as_tensor(rows if isinstance(observations, dict) else rows[""], buffer.device)
    scores = score_in_chunks(policy, flat, policy_actions(actions, buffer.action_space))
    return scores.log_prob.view(buffer.rewards.shape)


def fill_bootstrap(
    policy: ActorCriticPolicy, batch: RolloutBatch, value_scale: float = 1.0, values: th.Tensor | None = None
) -> None:
    """Value the states that follow truncated and cut-off steps with the present critic.

    :param policy: the policy
    :param batch: its ``bootstrap`` is set
    :param value_scale: what the critic's values are multiplied by to give reward units
    :param values: the critic's values of those states, if they are known
    """
    bootstrap = th.zeros_like(batch.rewards)
    if batch.bootstrap_observations is not None:
        observations, places = batch.bootstrap_observations
        values = predict_values(policy, observations) if values is None else values
        bootstrap.view(-1).index_copy_(0, places, values.to(bootstrap.dtype) * value_scale)
    batch.bootstrap = bootstrap


def _bootstrap_observations(
    buffer: TrajectoryRolloutBuffer, of_truncated: bool
) -> tuple[Observations, th.Tensor] | None:
    """Return the states that follow truncated and cut-off steps, and their places; None if there are none."""
    kept = {
        row * buffer.n_envs + env: obs
        for (row, env), obs in buffer.final_observations.items()
        if of_truncated or not buffer.truncated[row, env]
    }
    return (_stack(list(kept.values()), buffer), th.tensor(list(kept), device=buffer.device)) if kept else None


def _stack(observations: list[Any], buffer: TrajectoryRolloutBuffer) -> Any:
    """Stack single observations in the shape that the buffer stores them in."""
    shapes: Any = buffer.obs_shape
    if isinstance(shapes, dict):
        stacked: Any = {
            key: np.stack([np.asarray(obs[key]).reshape(shape) for obs in observations])
            for key, shape in shapes.items()
        }
    else:
        stacked = np.stack([np.asarray(obs).reshape(shapes) for obs in observations])
    return obs_as_tensor(stacked, buffer.device)


def batch_from_filled_buffer(buffer: RolloutBuffer) -> RolloutBatch:
    """Make a batch of a buffer with its advantages, returns, values and log-probs, as SB3's algorithms use it.

    :param buffer: filled by the user or by SB3's collector; a foreign one is read through its ``get``
    :raises ValueError: it is not full
    """
    if not buffer.full:
        kind = type(buffer).__name__
        raise ValueError(
            f"rollout_buffer ({kind}) is not full: it holds {buffer.pos} of {buffer.buffer_size} steps. Call "
            "collect_rollouts before train, or fill it by add and compute_returns_and_advantage"
        )
    if isinstance(buffer, TrajectoryRolloutBuffer) and not buffer.generator_ready:
        return _batch_of_rows(buffer)
    return _batch_of_samples(buffer)


def _batch_of_rows(buffer: TrajectoryRolloutBuffer) -> RolloutBatch:
    def tensor(array: np.ndarray) -> th.Tensor:
        return th.as_tensor(array, device=buffer.device)

    return RolloutBatch(
        observations=obs_as_tensor(buffer.observations, buffer.device),
        actions=tensor(buffer.actions),
        rewards=precise(tensor(buffer.rewards)),
        terminated=tensor(buffer.dones & ~buffer.truncated),
        truncated=tensor(buffer.truncated),
        timesteps=tensor(buffer.timesteps),
        mask=None if buffer.mask.all() else tensor(buffer.mask),
        values=precise(tensor(buffer.values)),
        log_probs=tensor(buffer.log_probs),
        advantages=precise(tensor(buffer.advantages)),
        returns=precise(tensor(buffer.returns)),
    )


def _batch_of_samples(buffer: RolloutBuffer) -> RolloutBatch:
    """Make a batch of one column, in the order of the buffer's ``get``."""
    (data,) = buffer.get(batch_size=None)

    def one_env(x: th.Tensor) -> th.Tensor:
        return x[:, None]

    observations: Any = data.observations
    if isinstance(observations, dict):
        observations = {key: one_env(value) for key, value in observations.items()}
    else:
        observations = one_env(observations)
    nothing = th.zeros_like(one_env(data.returns))
    return RolloutBatch(
        observations=observations,
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
