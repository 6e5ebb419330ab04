"""Read and write datasets of Minari (https://minari.farama.org), which is optional: extra ``minari``.

Minari's DataCollector, which needs jax, is not used.
"""

import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from sb3_pg.extras import extra_hints
from sb3_pg.policies import map_observations, n_rows


def read_dataset(dataset_id: str, download: bool) -> dict[str, Any]:
    """Read a dataset. See ``Demonstrations.from_minari`` for the arguments and errors.

    :return: arguments of ``Demonstrations``
    """
    with _minari() as minari:
        dataset = minari.load_dataset(dataset_id, download=download)
        if isinstance(dataset.observation_space, spaces.Tuple):
            raise ValueError(
                f"observations must be an array or a dict, got {dataset.observation_space} in {dataset_id!r}"
            )
        episodes = list(dataset.iterate_episodes())
    if not episodes:
        raise ValueError(f"dataset {dataset_id!r} must have at least one episode, got none")
    lengths = [len(episode.rewards) for episode in episodes]
    truncated = [np.asarray(episode.truncations, bool) for episode in episodes]
    for flags, episode in zip(truncated, episodes, strict=True):
        flags[-1] |= not episode.terminations[-1]  # it ends here, whether or not the flags say so
    observations = [episode.observations for episode in episodes]
    has_finals = all(n_rows(rows) == n + 1 for rows, n in zip(observations, lengths, strict=True))
    return {
        "observations": _joined([_cut(rows, slice(n)) for rows, n in zip(observations, lengths, strict=True)]),
        "actions": np.concatenate([episode.actions for episode in episodes]),
        "rewards": np.concatenate([episode.rewards for episode in episodes]),
        "terminated": np.concatenate([episode.terminations for episode in episodes]),
        "truncated": np.concatenate(truncated),
        "final_observations": _joined([_cut(rows, slice(-1, None)) for rows in observations]) if has_finals else None,
    }


def write_dataset(
    dataset_id: str,
    episodes: Sequence[dict[str, Any]],
    env: str | gym.Env[Any, Any] | EnvSpec | None,
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
    metadata: dict[str, Any],
) -> None:
    """Write a dataset whole or not at all. See ``Demonstrations.to_minari`` for the arguments and errors.

    :param episodes: names of ``EpisodeBuffer`` -> arrays; ``observations`` have one more row than the others
    """
    with _minari() as minari:
        from minari.data_collector import EpisodeBuffer  # type: ignore[import-untyped]  # noqa: PLC0415 (as below)
        from minari.dataset.minari_dataset import parse_dataset_id  # type: ignore[import-untyped]  # noqa: PLC0415
        from minari.storage.datasets_root_dir import get_dataset_path  # type: ignore[import-untyped]  # noqa: PLC0415

        parse_dataset_id(dataset_id)
        path = get_dataset_path(dataset_id)
        if path.exists():
            raise ValueError(f"dataset_id must be a new one, got {dataset_id!r}, which is in {path}")
        buffers = [EpisodeBuffer(id=i, **episode) for i, episode in enumerate(episodes)]
        try:
            minari.create_dataset_from_buffers(
                dataset_id,
                buffers,
                env,
                observation_space=observation_space,
                action_space=action_space,
                jpeg_encoding=False,  # it would change images
                **metadata,
            )
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise


def space_of(rows: Any) -> spaces.Space[Any]:
    """Return a space that the rows are in, as far as their numbers tell.

    :param rows: one row per step, or a dict of those
    """
    if isinstance(rows, dict):
        return spaces.Dict(map_observations(space_of, rows))
    shape, dtype = rows.shape[1:], rows.dtype
    if dtype.kind == "b":
        return spaces.MultiBinary(shape)
    if dtype.kind == "f":
        return spaces.Box(-np.inf, np.inf, shape, dtype.type)
    if shape:
        return spaces.Box(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype.type)
    start = min(0, int(rows.min()))
    return spaces.Discrete(int(rows.max()) - start + 1, start=start)


@contextmanager
def _minari() -> Iterator[Any]:
    """Context that yields the module. What it lacks is reported with the extra that brings it."""
    with extra_hints():
        import minari  # type: ignore[import-untyped]  # noqa: PLC0415 (it is optional)

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="minari")  # recommends metadata
            yield minari


def _cut(observations: Any, rows: slice) -> Any:
    return map_observations(lambda array: array[rows], observations)


def _joined(parts: list[Any]) -> Any:
    """Join observations of several episodes."""
    if isinstance(parts[0], dict):
        return {key: _joined([part[key] for part in parts]) for key in parts[0]}
    return np.concatenate(parts)
