"""One batched forward over a whole rollout, and the batch it makes."""

from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import obs_as_tensor

from sb3_pg.functional.precision import precise
from sb3_pg.policies.compiled import compiled
from sb3_pg.policies.policy_cache import structure_of
from sb3_pg.policies.samplers import ForwardSampler, Sampler
from sb3_pg.policies.score_actions import (
    CHUNK_SIZE,
    EntropyUse,
    evaluate,
    policy_actions,
    predict_log_probs,
    predict_values,
)
from sb3_pg.rollout.batch import Observations, RolloutBatch
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
    gradient_of: str | None = None,
    entropy: EntropyUse = "gradient",
) -> RolloutBatch:
    """Evaluate a finished buffer with the policy that filled it, and hand it over as tensors.

    Values and log-probs are written back into the buffer, where SB3's users look for them.

    :param policy: in eval mode
    :param buffer: finished
    :param sampler: what drew the actions; a :class:`ForwardSampler` has values and log-probs already
    :param with_values: whether the critic is in use
    :param bootstrap_truncated: whether the value of a truncated episode's last state counts
    :param n_episodes: number of complete episodes, or None
    :param value_scale: what the critic's values are multiplied by to give reward units
    :param gradient_of: "actor" or "both" keeps the graph of the forward, of the actor's part or of the critic's too, so
        that the gradient needs no second one; None keeps none, and so does a rollout of more than ``CHUNK_SIZE`` steps
    :param entropy: what the entropy is needed for, in that forward
    """
    device = buffer.device
    # Double, since float32 gives equal returns at different steps a spread that normalizing would blow up.
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
    batch.log_probs = evaluate_batch(
        policy,
        batch,
        with_values=with_values,
        value_scale=value_scale,
        gradient_of=gradient_of,
        entropy=entropy,
        known=known,
    )
    buffer.log_probs = batch.log_probs.cpu().numpy()
    if batch.bootstrap is not None and buffer.truncated.any():
        buffer.terminal_values = batch.bootstrap.where(batch.truncated, 0.0).float().cpu().numpy()
    if batch.values is not None:
        buffer.values = batch.values.float().cpu().numpy()
    return batch


@compiled()
def evaluate_batch(
    policy: ActorCriticPolicy,
    batch: RolloutBatch,
    *,
    with_values: bool,
    value_scale: float = 1.0,
    gradient_of: str | None = None,
    entropy: EntropyUse = "gradient",
    known: tuple[th.Tensor, th.Tensor] | None = None,
) -> th.Tensor:
    """Evaluate a batch with a policy: its log-probs, and into the batch values, ``bootstrap`` and what is kept of them.

    :param policy: in eval mode
    :param batch: with ``bootstrap_observations`` where the states that follow are to be valued
    :param with_values: as in :func:`make_batch`, like the three that follow
    :param value_scale: likewise
    :param gradient_of: likewise
    :param entropy: likewise
    :param known: log-probs and values, where they need no forward
    :return: log pi(a_t|s_t), nats, ``(n_steps, n_envs)``, 0 in the padding
    """
    observations = batch.flat_observations
    actions = policy_actions(batch.select(batch.actions), policy.action_space)
    values: th.Tensor | None = None
    other_values: th.Tensor | None = None
    if known is not None:
        log_probs, values = known
    elif gradient_of is not None and len(actions) <= CHUNK_SIZE:
        others = batch.bootstrap_observations[0] if batch.bootstrap_observations is not None else None
        batch.evaluation = evaluate(policy, observations, actions, gradient_of == "both", entropy, others)
        batch.evaluation = batch.evaluation._replace(parameters=structure_of(policy).snapshot())
        log_probs, values = batch.evaluation.log_prob.detach(), batch.evaluation.values
        other_values, batch.distributions = batch.evaluation.other_values, [batch.evaluation.distribution]
    else:
        log_probs, batch.distributions = predict_log_probs(policy, observations, actions)
    if with_values:
        values = predict_values(policy, observations) if values is None else values.detach()
        batch.values = precise(batch.restore(values))
        if value_scale != 1:
            batch.values *= value_scale
        fill_bootstrap(policy, batch, value_scale, other_values)
    return batch.restore(log_probs)


def action_log_probs(policy: ActorCriticPolicy, buffer: TrajectoryRolloutBuffer, sampler: Sampler) -> th.Tensor:
    """Log-probs of the actions in a finished buffer, of what drew them.

    :param policy: in eval mode
    :param buffer: finished
    :param sampler: what drew the actions; one that has log-probs already, or one that draws from the policy
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
    log_probs, _ = predict_log_probs(policy, flat, policy_actions(actions, buffer.action_space))
    return log_probs.view(buffer.rewards.shape)


def fill_bootstrap(
    policy: ActorCriticPolicy, batch: RolloutBatch, value_scale: float = 1.0, values: th.Tensor | None = None
) -> None:
    """Value the states that follow truncated and cut-off steps with the critic as it is now.

    :param policy: the policy
    :param batch: its ``bootstrap`` is replaced
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
    """The states that follow truncated (where their values count) and cut-off steps, and their places."""
    kept = {
        row * buffer.n_envs + env: obs
        for (row, env), obs in buffer.final_observations.items()
        if of_truncated or not buffer.truncated[row, env]
    }
    return (_stack(list(kept.values()), buffer), th.tensor(list(kept), device=buffer.device)) if kept else None


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


def batch_from_filled_buffer(buffer: RolloutBuffer) -> RolloutBatch:
    """A batch from what a buffer holds: its own advantages, returns, values and log-probs, as SB3's algorithms use it.

    :param buffer: filled by the user or by SB3's collector; its ``get`` is called unless it is one of ours
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
    """One column of samples, in the order of the buffer's ``get``."""
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
