"""Gradients of single episodes, for the optimal baseline and gradient diagnostics."""

from collections.abc import Callable, Iterator
from typing import Any

import torch as th
from torch.func import vjp, vmap

#: log_prob(parameters, observations, actions) -> log pi(a|s), shape (n_samples,)
LogProb = Callable[[dict[str, th.Tensor], Any, th.Tensor], th.Tensor]


def episode_gradients(
    log_prob: LogProb,
    parameters: dict[str, th.Tensor],
    observations: Any,
    actions: th.Tensor,
    weights: th.Tensor,
    episodes: th.Tensor,
    max_floats: int = 2**24,
) -> Iterator[tuple[th.Tensor, th.Tensor]]:
    r"""Weighted sums of scores, one per episode.

    .. math:: g_{i,k} = \nabla_\theta \sum_{t \in i} w_{k,t} \log \pi_\theta(a_t | s_t)

    Episodes of similar length are padded to one length and differentiated together (``torch.func.vmap``). Modules
    that vmap does not support are differentiated in a loop over episodes.

    :param log_prob: the policy as a function of its parameters
    :param parameters: theta, name -> tensor
    :param observations: one row per sample, ``(n_samples, ...)``, or a dict of those. Observations of another type are
        indexed by rows ``(n_episodes, longest)``, then by an episode, and differentiated in a loop
    :param actions: one row per sample
    :param weights: w_{k,t}, shape ``(n_weights, n_samples)``
    :param episodes: the episode each sample belongs to, long, 0 to n_episodes - 1, shape ``(n_samples,)``
    :param max_floats: approximate limit on the size of a chunk: of its gradients, and of its samples
    :return: iterator over chunks: episode indices ``(n,)`` and gradients ``(n, n_weights, n_parameters)``, the
        parameters flattened and concatenated in their order
    """
    index, lengths = _pad(episodes)
    n_parameters = sum(parameter.numel() for parameter in parameters.values())
    seeds = th.eye(len(weights), dtype=weights.dtype, device=weights.device)

    def gradients_of_one(observation: Any, action: th.Tensor, weight: th.Tensor) -> th.Tensor:
        pull_back = vjp(lambda p: weight @ log_prob(p, observation, action), parameters)[1]
        (gradients,) = vmap(pull_back)(seeds)
        return th.cat([gradient.flatten(1) for gradient in gradients.values()], dim=1)

    # Long episodes first, so that a chunk's padding is small.
    order = lengths.argsort(descending=True)
    sorted_lengths = lengths[order].tolist()
    start, vectorized = 0, isinstance(observations, th.Tensor | dict)
    while start < len(order):
        longest = sorted_lengths[start]
        size = max(1, min(max_floats // max(1, len(weights) * n_parameters), max_floats // (64 * longest)))
        chunk = order[start : start + size]
        rows = index[chunk, :longest]
        padding = th.arange(longest, device=rows.device) >= lengths[chunk, None]
        chunk_weights = weights[:, rows].masked_fill(padding, 0.0).transpose(0, 1)
        inputs = _take(observations, rows), actions[rows], chunk_weights
        if vectorized:
            try:
                gradients = vmap(gradients_of_one, randomness="different")(*inputs)
            except RuntimeError:
                vectorized = False
        if not vectorized:
            gradients = th.stack(
                [
                    _loop_gradients(log_prob, parameters, _take(inputs[0], i), inputs[1][i], inputs[2][i])
                    for i in range(len(chunk))
                ]
            )
        yield chunk, gradients.detach()
        start += size


def _pad(episodes: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """Return the positions of each episode's samples, padded with 0, ``(n_episodes, longest)``, and the lengths."""
    order = episodes.argsort(stable=True)
    lengths = th.bincount(episodes)
    first = lengths.cumsum(0) - lengths
    ranks = th.arange(len(episodes), device=episodes.device) - first[episodes[order]]
    index = th.zeros((len(lengths), int(lengths.max())), dtype=th.long, device=episodes.device)
    index[episodes[order], ranks] = order
    return index, lengths


def _take(x: Any, rows: Any) -> Any:
    return {key: value[rows] for key, value in x.items()} if isinstance(x, dict) else x[rows]


def _loop_gradients(
    log_prob: LogProb, parameters: dict[str, th.Tensor], observation: Any, action: th.Tensor, weights: th.Tensor
) -> th.Tensor:
    leaves = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}
    with th.enable_grad():
        sums = weights @ log_prob(leaves, observation, action)
        rows = [th.autograd.grad(s, list(leaves.values()), retain_graph=True, materialize_grads=True) for s in sums]
    return th.stack([th.cat([gradient.flatten() for gradient in row]) for row in rows])
