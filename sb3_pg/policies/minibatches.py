"""Split the samples of a batch into chunks or minibatches."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch as th

from sb3_pg.policies.memory import History
from sb3_pg.policies.observations import n_rows, split_observations


def minibatches(
    observations: Any, columns: Sequence[th.Tensor], size: int, shuffle: bool
) -> Iterator[tuple[Any, list[th.Tensor]]]:
    """Yield minibatches of a batch's samples.

    :param observations: one row per sample, or their history
    :param columns: further numbers of the samples, one row per sample
    :param size: rows per minibatch. Minibatches of a history hold whole sequences, and so may have more
    :param shuffle: whether to draw the samples, or sequences, in random order
    :return: observations and columns of each minibatch
    """
    if isinstance(observations, History):
        if size >= len(observations.sequences):
            yield observations, list(columns)
            return
        for rows in observations.sequences.minibatches(size, shuffle):
            index = th.as_tensor(rows, device=observations.sequences.device)
            yield observations.of_rows(rows), [column[index] for column in columns]
        return
    if not shuffle and size >= n_rows(observations):
        yield observations, list(columns)
        return
    # one gather per pass; minibatches are views
    order = _random_order(observations) if shuffle else None
    parts = split_observations(observations, size, order)
    split = [(column if order is None else column[order]).split(size) for column in columns]
    for part, *rows_of in zip(parts, *split, strict=True):
        yield part, rows_of


def one_in(k: int, observations: Any) -> Any:
    """Return the observations of one sample in k at random, or of one sequence in k.

    :param k: at least 1
    :param observations: one row per sample, or their history
    """
    if isinstance(observations, History):
        size = -(-len(observations.sequences) // k)
        rows: Any = next(observations.sequences.minibatches(size, shuffle=True))
        return observations.of_rows(rows)
    order = _random_order(observations)
    size = -(-len(order) // k)
    return split_observations(observations, size, order[:size])[0]


def _random_order(observations: Any) -> th.Tensor:
    rows = next(iter(observations.values())) if isinstance(observations, dict) else observations
    return th.randperm(len(rows), device=rows.device)
