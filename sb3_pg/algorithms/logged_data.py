"""Demonstrations as trajectories of a behavior policy, for algorithms that replay them."""

import warnings
from typing import Any

import numpy as np
import torch as th

from sb3_pg.algorithms.pretraining import steps_for
from sb3_pg.demonstrations import Demonstrations
from sb3_pg.demonstrations.steps import DemonstratedSteps
from sb3_pg.policies import CHUNK_SIZE, evaluation_mode, map_observations, score_in_chunks
from sb3_pg.rollout import Trajectory


def to_trajectories(model: Any, demos: Demonstrations, log_prob: Any) -> list[Trajectory]:
    """Return the episodes of demonstrations as the model's env would have shown them.

    Observations and rewards are normalized with the present statistics of a VecNormalize. A truncated episode whose
    final observation is unknown counts as terminated, as there is no state to value.

    :param model: an algorithm with a replay buffer
    :param demos: with rewards
    :param log_prob: log-probs of the policy that acted, nats, ``(n_steps,)``, or "cloned"
    :raises ValueError: there are no rewards, the demonstrations do not fit the model, or ``log_prob`` is something else
    """
    if demos.rewards is None:
        raise ValueError("trajectories must have rewards, got Demonstrations without")
    steps = steps_for(model, demos)
    log_probs = _log_probs(steps, log_prob)
    rewards, normalization = demos.rewards, model.get_vec_normalize_env()
    if normalization is not None:
        rewards = normalization.normalize_reward(rewards)
    actions, finals = demos.actions_for(model.policy), demos.final_observations
    found = []
    for n, episode in enumerate(demos.episodes):
        final = None if finals is None else map_observations(lambda rows, n=n: np.asarray(rows[n : n + 1]), finals)
        truncated = bool(demos.truncated[episode.stop - 1]) and final is not None
        found.append(
            Trajectory(
                map_observations(_array, steps.observations(episode)),
                actions[episode],
                rewards[episode],
                log_probs[episode],
                not truncated,
                truncated,
                None if final is None else map_observations(lambda rows: _array(rows)[0], steps.seen(final)),
            )
        )
    return found


def _array(rows: th.Tensor) -> np.ndarray:
    return rows.cpu().numpy()


def _log_probs(steps: DemonstratedSteps, given: Any) -> np.ndarray:
    """Return the log-probs of the policy that acted, nats, ``(n_steps,)``."""
    if not isinstance(given, str):
        known = np.asarray(given, dtype=np.float64) if given is not None else np.zeros(0)
        if known.shape != (len(steps),):
            got = given if given is None else f"shape {known.shape}"
            raise ValueError(
                f"log_prob must be the log-probs of the policy that acted, of shape ({len(steps)},), or 'cloned' where "
                f"they are unknown, got {got}"
            )
        return known
    if given != "cloned":
        raise ValueError(f"log_prob must be an array or 'cloned', got {given!r}")
    policy: Any = steps.policy
    log_probs = th.zeros(len(steps), device=policy.device)
    with evaluation_mode(policy):
        for batch in steps.minibatches(np.arange(len(steps)), CHUNK_SIZE):
            log_probs[batch.steps] = score_in_chunks(policy, batch.observations, batch.actions).log_prob
    warnings.warn(
        "log_prob='cloned' takes the present policy for the one that acted: importance ratios are relative to it, and "
        "its error biases all estimates. Pretrain the model on the demonstrations first, and give the log-probs "
        "themselves where they are known",
        stacklevel=4,
    )
    return _array(log_probs)
