"""One batched forward over a whole rollout, and the batch it makes."""

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import obs_as_tensor

from sb3_pg.rollout.batch import Observations, RolloutBatch
from sb3_pg.rollout.buffers import TrajectoryRolloutBuffer
from sb3_pg.rollout.samplers import ForwardSampler, Sampler, unvalidated_distributions

#: Samples per forward; bounds the memory of image policies.
CHUNK_SIZE = 4096


def policy_actions(actions: th.Tensor, space: spaces.Space[Any]) -> th.Tensor:
    """Stored actions as the policy's distribution expects them: long for Discrete, floating otherwise."""
    return actions.long().flatten() if isinstance(space, spaces.Discrete) else actions.float()


def _chunks(observations: Observations, chunk_size: int) -> list[Any]:
    if isinstance(observations, dict):
        pieces = {key: value.split(chunk_size) for key, value in observations.items()}
        return [dict(zip(pieces, piece, strict=True)) for piece in zip(*pieces.values(), strict=True)]
    return list(observations.split(chunk_size))


def predict_values(policy: ActorCriticPolicy, observations: Observations) -> th.Tensor:
    """V(s) of the policy's critic, in chunks.

    :param policy: the policy
    :param observations: one row per sample
    :return: shape ``(n_samples,)``
    """
    with th.inference_mode():
        values = [policy.predict_values(chunk).flatten() for chunk in _chunks(observations, CHUNK_SIZE)]
    return th.cat(values)  # concatenated outside, so that autograd may use the result as a constant


def predict_log_probs(policy: ActorCriticPolicy, observations: Observations, actions: th.Tensor) -> th.Tensor:
    """Score actions, log pi(a|s), in chunks, without the critic.

    :param policy: the policy
    :param observations: one row per sample
    :param actions: as the policy's distribution expects them
    :return: nats, shape ``(n_samples,)``
    """
    with th.inference_mode(), unvalidated_distributions():
        log_probs = [
            policy.get_distribution(chunk).log_prob(action)
            for chunk, action in zip(_chunks(observations, CHUNK_SIZE), actions.split(CHUNK_SIZE), strict=True)
        ]
    return th.cat(log_probs)


def make_batch(
    policy: ActorCriticPolicy,
    buffer: TrajectoryRolloutBuffer,
    sampler: Sampler,
    *,
    with_values: bool,
    bootstrap_truncated: bool,
    n_episodes: int | None,
) -> RolloutBatch:
    """Evaluate a finished buffer with the policy that filled it, and hand it over as tensors.

    Values and log-probs are written back into the buffer, where SB3's users look for them.

    :param policy: in eval mode
    :param buffer: finished
    :param sampler: what drew the actions; a :class:`ForwardSampler` has values and log-probs already
    :param with_values: whether the critic is in use
    :param bootstrap_truncated: whether the value of a truncated episode's last state counts
    :param n_episodes: number of complete episodes, or None
    """
    device = buffer.device
    # Double, since float32 gives equal returns at different steps a spread that normalizing would blow up.
    precision = th.float32 if device.type == "mps" else th.float64
    waited = not buffer.mask.all()
    batch = RolloutBatch(
        observations=obs_as_tensor(buffer.observations, device),
        actions=th.as_tensor(buffer.actions, device=device),
        rewards=th.as_tensor(buffer.rewards, device=device).to(precision),
        terminated=th.as_tensor(buffer.dones & ~buffer.truncated, device=device),
        truncated=th.as_tensor(buffer.truncated, device=device),
        timesteps=th.as_tensor(buffer.timesteps, device=device),
        mask=th.as_tensor(buffer.mask, device=device) if waited else None,
        n_episodes=n_episodes,
    )
    observations = batch.flat_observations
    actions = policy_actions(batch.select(batch.actions), buffer.action_space)
    if isinstance(sampler, ForwardSampler):
        batch.log_probs, batch.values = th.stack(sampler.log_probs), th.stack(sampler.values).to(precision)
    else:
        batch.log_probs = batch.restore(predict_log_probs(policy, observations, actions))
        if with_values:
            batch.values = batch.restore(predict_values(policy, observations)).to(precision)
    buffer.log_probs = batch.log_probs.cpu().numpy()
    if not with_values:
        return batch
    assert batch.values is not None
    buffer.values = batch.values.float().cpu().numpy()
    kept = {
        (row, env): obs
        for (row, env), obs in buffer.final_observations.items()
        if bootstrap_truncated or not buffer.truncated[row, env]
    }
    if kept:
        batch.bootstrap_observations = _stack(list(kept.values()), buffer), th.tensor(list(kept), device=device)
    fill_bootstrap(policy, batch)
    return batch


def fill_bootstrap(policy: ActorCriticPolicy, batch: RolloutBatch) -> None:
    """Value the states that follow truncated and cut-off steps with the critic as it is now.

    :param policy: the policy
    :param batch: its ``bootstrap`` is replaced
    """
    bootstrap = th.zeros_like(batch.rewards)
    if batch.bootstrap_observations is not None:
        observations, where = batch.bootstrap_observations
        bootstrap[where[:, 0], where[:, 1]] = predict_values(policy, observations).to(bootstrap.dtype)
    batch.bootstrap = bootstrap


def _stack(observations: list[Any], buffer: TrajectoryRolloutBuffer) -> Any:
    """Single observations as rows, in the shape that the buffer stores them."""
    shapes: Any = buffer.obs_shape
    if isinstance(shapes, dict):
        stacked: Any = {
            key: np.stack([np.asarray(obs[key]).reshape(shape) for obs in observations])
            for key, shape in shapes.items()
        }
    else:
        stacked = np.stack([np.asarray(obs).reshape(shapes) for obs in observations])
    return obs_as_tensor(stacked, buffer.device)


def batch_from_foreign_buffer(buffer: RolloutBuffer) -> RolloutBatch:
    """A batch from a buffer that is not ours, with the advantages and returns that it computed.

    :param buffer: full; its samples are read by ``get``, all at once, in its own order
    """
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
