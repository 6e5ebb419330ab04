"""Demonstrations: complete episodes of observations and actions, with rewards if they are known."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any, Final

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from typing_extensions import Self

from sb3_pg.checkpoints.model_file import write_whole
from sb3_pg.demonstrations.checks import check_actions, check_observations, chunks, require_count
from sb3_pg.demonstrations.files import HDF5, read_arrays, write_npz
from sb3_pg.demonstrations.minari_data import read_dataset, space_of, write_dataset
from sb3_pg.demonstrations.record import EnvLike, record
from sb3_pg.errors import NonFiniteError
from sb3_pg.policies import from_env, map_observations, scaled, stored_dtype

#: An array, or a dict of arrays, with one row per step or per episode.
Rows = np.ndarray | dict[str, np.ndarray]
PathOrStr = str | PathLike[str]
#: Names of the arrays, here and in files.
_NAMES: Final = ("observations", "actions", "rewards", "terminated", "truncated", "final_observations")
#: Other names of the arrays in files, those of D4RL's datasets.
_OTHER_NAMES: Final = {"terminals": "terminated", "timeouts": "truncated"}
#: Largest size of an action that a squashed policy learns, where 1 is the bound. It draws the bound with probability 0.
MOST_SQUASHED: Final = 0.999


class Demonstrations:
    """Complete episodes of observations and actions, one after the other, with rewards if they are known.

    A step t is what the env showed (``observations[t]``), what was done (``actions[t]``), and what came of it
    (``rewards[t]``, ``terminated[t]``, ``truncated[t]``). Everything is checked here, and must not be changed after.

    The last step always ends an episode: if no flag says so, it counts as truncated, since nothing is known of what
    followed. Where both flags of a step are True, it counts as terminated.

    :param observations: as the env returned them, not normalized, ``(n_steps, *obs_shape)``, or a dict of those
    :param actions: as ``env.step`` took them, ``(n_steps, *action_shape)``. They may be outside of the bounds of a Box:
        see :meth:`check_spaces`
    :param rewards: r_t, reward units, not normalized, ``(n_steps,)``; None if unknown
    :param terminated: whether step t ended its episode in a terminal state, ``(n_steps,)``; None for never
    :param truncated: whether step t was the last before a time limit or an interruption, ``(n_steps,)``; None for
        never. If both are None, all steps are one episode
    :param final_observations: what the env returned after the last step of each episode, ``(n_episodes, *obs_shape)``,
        or a dict of those; None if unknown
    :raises TypeError: an array holds other things than numbers
    :raises ValueError: there is no step, lengths or shapes do not fit, or a flag is neither 0 nor 1
    :raises NonFiniteError: a number is NaN or infinite; the message names the array and the step
    """

    observations: Rows
    actions: np.ndarray
    rewards: np.ndarray | None
    terminated: np.ndarray
    truncated: np.ndarray
    final_observations: Rows | None

    def __init__(
        self,
        observations: Any,
        actions: Any,
        rewards: Any = None,
        terminated: Any = None,
        truncated: Any = None,
        *,
        final_observations: Any = None,
    ) -> None:
        self.observations = _checked_rows("observations", observations)
        self.actions = _checked("actions", actions)
        n_steps = self.n_steps
        if not n_steps:
            raise ValueError("actions must have at least one step, got an empty array")
        for name, array in _named_arrays("observations", self.observations):
            _require_length(name, array, n_steps, "step of actions")
        self.rewards = None if rewards is None else _checked("rewards", rewards, n_steps)
        if self.rewards is not None and self.rewards.dtype.kind != "f":
            self.rewards = self.rewards.astype(np.float64)
        self.terminated = _flags("terminated", terminated, n_steps)
        self.truncated = _flags("truncated", truncated, n_steps)
        self.truncated[-1] = True  # unless it has terminated
        self.truncated &= ~self.terminated
        self.final_observations = None
        if final_observations is not None:
            self.final_observations = _checked_rows("final_observations", final_observations, "episode")
            self._require_like_observations(self.final_observations)

    @classmethod
    def from_arrays(
        cls,
        observations: Any,
        actions: Any = None,
        rewards: Any = None,
        terminated: Any = None,
        truncated: Any = None,
        *,
        final_observations: Any = None,
    ) -> Self:
        """Return demonstrations made of arrays, or of the arrays in a file. See the class for the arguments.

        :param observations: an array or a dict of arrays; or the path of a file, which :meth:`load` reads
        """
        if not isinstance(observations, str | PathLike):
            return cls(observations, actions, rewards, terminated, truncated, final_observations=final_observations)
        others = {
            "actions": actions,
            "rewards": rewards,
            "terminated": terminated,
            "truncated": truncated,
            "final_observations": final_observations,
        }
        if given := [name for name, value in others.items() if value is not None]:
            raise ValueError(f"{given[0]} must be left out, since {observations!r} is a file with all arrays")
        return cls.load(observations)

    @classmethod
    def from_model(
        cls,
        model: BaseAlgorithm,
        env: EnvLike,
        n_episodes: int = 20,
        *,
        deterministic: bool = True,
        seed: int | None = 0,
        n_envs: int | None = None,
        max_episode_steps: int = 100_000,
    ) -> Self:
        """Run an expert for some complete episodes.

        The expert sees what it was trained on: a VecNormalize of its own, or else of ``env``, normalizes its
        observations, with statistics that do not change. Observations and rewards are stored as they were before. An
        expert that was trained with action masks gets those of the env, and observations have them under the key
        "action_mask", where the classes of this package look for them.

        Each env contributes the same number of episodes, or one more, fixed before. So short episodes are not more
        likely to be kept. The first episode of each env comes first, then the second, and so on.

        :param model: a model of SB3, sb3-contrib or this package; recurrent ones too
        :param env: id of a registered env, an env, or a VecEnv. It must show what the model was trained on: give a
            VecEnv with the same wrappers where there were some. The model's own env is refused
        :param n_episodes: how many
        :param deterministic: whether to take the most likely action instead of a sample
        :param seed: seed of the envs (env i takes seed + i) and of samples; None for one that differs each time. The
            global random generators stay as they were
        :param n_envs: how many envs to make of an id; None for 8, or one for each episode if there are fewer
        :param max_episode_steps: longest episode that is waited for
        :raises TypeError: ``model`` or ``env`` is something else
        :raises ValueError: the env does not fit the model, or a number is below 1
        :raises EndlessEpisodeError: an episode is longer than ``max_episode_steps``
        :raises MissingExtraError: the env needs an optional dependency
        """
        return cls(**record(model, env, n_episodes, deterministic, seed, n_envs, max_episode_steps))

    @classmethod
    def from_minari(cls, dataset_id: str, download: bool = False) -> Self:
        """Read a dataset of `Minari <https://minari.farama.org>`_. All of it comes into the memory.

        :param dataset_id: such as ``"mujoco/hopper/expert-v0"``. Datasets are in the folder that the environment
            variable ``MINARI_DATASETS_PATH`` names by its absolute path, or else in ``~/.minari/datasets``
        :param download: whether to download it if the folder does not have it
        :raises FileNotFoundError: the folder does not have it
        :raises ValueError: its observations are a Tuple, it has no episode, or the class refuses its arrays
        :raises MissingExtraError: Minari is not installed
        """
        return cls(**read_dataset(dataset_id, download))

    def to_minari(
        self,
        dataset_id: str,
        env: str | gym.Env[Any, Any] | EnvSpec | None = None,
        *,
        observation_space: spaces.Space[Any] | None = None,
        action_space: spaces.Space[Any] | None = None,
        **metadata: Any,
    ) -> None:
        """Write everything as a dataset of Minari, whole or not at all. Images are not compressed, so nothing is lost.

        :param dataset_id: a new one, such as ``"my/hopper-expert-v0"``; see :meth:`from_minari`
        :param env: where the episodes come from; those who read the dataset can make it
        :param observation_space: None for that of ``env``, or else one that follows from the numbers
        :param action_space: None for that of ``env``, or else one that follows from the numbers: Discrete actions then
            have as many choices as were taken
        :param metadata: other arguments of ``minari.create_dataset_from_buffers``, such as ``author``
        :raises ValueError: the dataset exists, the id is malformed, rewards or final observations are unknown, or
            the arrays do not fit the spaces
        :raises MissingExtraError: Minari is not installed
        """
        for name in ("rewards", "final_observations"):
            if getattr(self, name) is None:
                raise ValueError(f"{name} must be known, since Minari's datasets have them, got None")
        if env is not None and (observation_space is None or action_space is None):
            with nullcontext(env) if isinstance(env, gym.Env) else gym.make(env) as made:
                observation_space = made.observation_space if observation_space is None else observation_space
                action_space = made.action_space if action_space is None else action_space
        observation_space = space_of(self.observations) if observation_space is None else observation_space
        action_space = space_of(self.actions) if action_space is None else action_space
        self.check_spaces(observation_space, action_space)
        write_dataset(dataset_id, list(self._buffers()), env, observation_space, action_space, metadata)

    def _buffers(self) -> Iterator[dict[str, Any]]:
        """Yield the arguments of Minari's ``EpisodeBuffer``, for each episode."""
        for i, steps in enumerate(self.episodes):

            def with_final(rows: np.ndarray, finals: np.ndarray, i: int = i, steps: slice = steps) -> np.ndarray:
                return np.concatenate((rows[steps], finals[i : i + 1]))

            yield {
                "observations": map_observations(with_final, self.observations, self.final_observations),
                "actions": self.actions[steps],
                "rewards": None if self.rewards is None else self.rewards[steps],
                "terminations": self.terminated[steps],
                "truncations": self.truncated[steps],
            }

    @classmethod
    def load(cls, path: PathOrStr, mmap: bool = False) -> Self:
        """Read a file that :meth:`save` has written, or a file with the names of D4RL's arrays.

        The arrays are named as the attributes are; those of a dict ``observations/key``. D4RL's names ``terminals`` and
        ``timeouts`` stand for ``terminated`` and ``truncated``, and ``next_observations`` has the final observations.
        The file's other arrays are ignored. Nothing in the file is run.

        :param path: an ``.npz``, which is added if it is left out, or HDF5 (``.hdf5``, ``.h5``; extra ``minari``)
        :param mmap: whether observations and actions stay on the disk, where a row is read when it is used. Choose it
            for images that do not fit into the memory. Numbers with a fraction are read once, to check that they
            are finite. The file's checksums are not compared, so that a number that was changed or damaged on the disk
            is not noticed; without ``mmap``, it is refused
        :raises OSError: there is no such file
        :raises DamagedFileError: the file cannot be read
        :raises ValueError: it has no observations or actions, the class refuses its arrays, or ``mmap`` is True for a
            file that is compressed, or HDF5
        :raises MissingExtraError: HDF5 needs an optional dependency
        """
        path = _with_suffix(path, (".npz", *HDF5))
        return cls._from_named(read_arrays(path, {*_NAMES, *_OTHER_NAMES, "next_observations"}, mmap), str(path))

    @classmethod
    def _from_named(cls, arrays: Mapping[str, np.ndarray], source: str) -> Self:
        """Return demonstrations made of the arrays of a file.

        :param arrays: name -> array
        :param source: name of the file, for the error message
        """
        arrays = {_OTHER_NAMES.get(name, name): array for name, array in arrays.items()}

        def rows(name: str) -> Any:
            parts = {key.removeprefix(f"{name}/"): arrays[key] for key in arrays if key.startswith(f"{name}/")}
            return arrays.get(name, parts or None)

        observations, following = rows("observations"), rows("next_observations")
        for name, found in (("observations", observations), ("actions", rows("actions"))):
            if found is None:
                raise ValueError(f"{source} must have an array {name!r}, got {', '.join(sorted(arrays)) or 'none'}")
        made = cls(
            observations,
            arrays["actions"],
            *(arrays.get(name) for name in ("rewards", "terminated", "truncated")),
            final_observations=rows("final_observations"),
        )
        if following is not None and made.final_observations is None:
            for name, array in _named_arrays("next_observations", following):
                _require_length(name, array, made.n_steps, "step of actions")
            finals = _checked_rows(
                "final_observations", map_observations(lambda array: np.asarray(array[made._ends]), following)
            )
            made._require_like_observations(finals)
            made.final_observations = finals
        return made

    def save(self, path: PathOrStr) -> Path:
        """Write everything to one file, whole or not at all, as ``numpy.savez`` does. See :meth:`load`.

        :param path: the file; ``.npz`` is added if it does not end so
        :return: path of the file
        :raises OSError: the disk is full, or the file cannot be written. An old file stays as it was
        """
        named = {
            name: array
            for attribute in _NAMES
            for name, array in _named_arrays(attribute, getattr(self, attribute), "{}/{}")
        }
        path = _with_suffix(path, (".npz",))
        write_whole(path, lambda file: write_npz(file, named), "npz")
        return path

    @property
    def n_steps(self) -> int:
        """Number of steps of all episodes."""
        return len(self.actions)

    @property
    def n_episodes(self) -> int:
        """Number of episodes."""
        return len(self._ends)

    @cached_property
    def _ends(self) -> np.ndarray:
        """Last step of each episode, ``(n_episodes,)``."""
        return np.flatnonzero(self.terminated | self.truncated)

    @cached_property
    def episodes(self) -> list[slice]:
        """The steps of each episode, in order."""
        bounds = [0, *(int(end) + 1 for end in self._ends)]
        return [slice(first, last) for first, last in pairwise(bounds)]

    @cached_property
    def returns(self) -> np.ndarray | None:
        """Undiscounted return of each episode, reward units, ``(n_episodes,)``; None if rewards are unknown."""
        if self.rewards is None:
            return None
        return np.array([self.rewards[steps].sum(dtype=np.float64) for steps in self.episodes])

    def subset(self, n_episodes: int) -> "Demonstrations":
        """Return the first episodes. The arrays are shared.

        :param n_episodes: how many
        :raises ValueError: it is below 1, or there are fewer
        """
        require_count("n_episodes", n_episodes, self.n_episodes)
        return self._select(range(n_episodes))

    def split(self, validation: float, seed: int | None = None) -> "tuple[Demonstrations, Demonstrations | None]":
        """Return the episodes to learn from, and episodes that are held out, drawn at random, each in order.

        The arrays are copied, memory-mapped ones into the memory: see :meth:`held_out_steps` for large ones.

        :param validation: fraction of the episodes to hold out, in [0, 1). If it is positive, at least one of several
            episodes is held out, and at least one is not. A single episode is not held out
        :param seed: seed of the draw; None for one that differs each time
        :return: the second is None if no episode is held out
        :raises ValueError: ``validation`` is not in [0, 1)
        """
        held_out = self._held_out(validation, seed)
        if not held_out.any():
            return self, None
        return self._select(np.flatnonzero(~held_out)), self._select(np.flatnonzero(held_out))

    def held_out_steps(self, validation: float, seed: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps of the episodes that :meth:`split` would return, without a copy of the arrays.

        :param validation: see :meth:`split`
        :param seed: see :meth:`split`
        :return: numbers of the steps to learn from, and of those held out, each in order; the second may be empty
        :raises ValueError: ``validation`` is not in [0, 1)
        """
        lengths = np.diff(self._ends, prepend=-1)
        is_held_out = np.repeat(self._held_out(validation, seed), lengths)
        return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)

    def check_spaces(
        self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any], *, squashed: bool = False
    ) -> None:
        """Require observations and actions that a model with these spaces can learn from.

        Shapes must be equal; an image may have its channels first or last, whichever the space has. Integers must fit
        a space of integers, and be in its range. Fractions do not fit it: they are images that were divided by 255, for
        instance. Numbers of any kind fit a space of fractions. Observations outside of its bounds are a warning: many
        envs break their own bounds, and SB3 does not clip them.

        Actions outside of the bounds of a Box depend on the policy. SB3 clips the actions of a Gaussian policy before
        ``env.step``, and the log-probability is that of the action before. So an action on the bound is fine, and one
        outside is kept as it is, with a warning, since it may be in other units. A squashed policy draws actions
        strictly inside of the bounds: those outside are an error, and :meth:`actions_for` moves those on the bound
        inside.

        :param observation_space: a model's observation space
        :param action_space: a model's action space
        :param squashed: whether the policy squashes its actions (``policy.squash_output``)
        :raises ValueError: something does not fit; the message names the array, and the step if there is one
        """
        check_observations("observations", self.observations, observation_space, "step")
        if self.final_observations is not None:
            check_observations("final_observations", self.final_observations, observation_space, "episode")
        check_actions(self.actions, action_space, squashed)

    def actions_for(self, policy: BasePolicy) -> np.ndarray:
        """Return the actions as a policy draws them, before they are converted to the env's.

        Those of Discrete and MultiDiscrete count from 0. Those of a squashed policy are rescaled to [-1, 1], and those
        beyond :data:`MOST_SQUASHED` are moved there: the density of an action on the bound is infinite or 0.

        :param policy: the policy that learns
        :return: ``(n_steps, *action_shape)``, in the dtype that buffers store them with
        """
        space = policy.action_space
        if isinstance(space, spaces.Box) and policy.squash_output:
            actions = scaled(self.actions, space).clip(-MOST_SQUASHED, MOST_SQUASHED)
        else:
            actions = from_env(self.actions, space)
        return np.asarray(actions, stored_dtype(space))

    def summary(self) -> str:
        """Return a short text: numbers of episodes and steps, returns, shapes and types."""
        lengths = np.diff(self._ends, prepend=-1)
        endings = f"{int(self.terminated.sum())} terminated, {int(self.truncated.sum())} truncated"
        returns = "unknown, there are no rewards" if self.returns is None else _range(self.returns, ".2f")
        lines = {
            "episodes": f"{self.n_episodes} ({endings})",
            "steps": f"{self.n_steps} ({_range(lengths, '.6g')} an episode)",
            "returns": returns,
            "observations": _form(self.observations),
            "actions": _form(self.actions),
            "final observations": "unknown" if self.final_observations is None else "known",
        }
        width = max(map(len, lines)) + 1
        return "\n".join(f"{name + ':':{width}} {text}" for name, text in lines.items())

    def __len__(self) -> int:
        """Return the number of steps."""
        return self.n_steps

    def __repr__(self) -> str:
        """Return numbers of episodes and steps, shapes, types and the mean return."""
        mean = "" if self.returns is None else f", mean_return={self.returns.mean():.6g}"
        forms = f"observations={_form(self.observations)}, actions={_form(self.actions)}"
        return f"{type(self).__name__}(n_episodes={self.n_episodes}, n_steps={self.n_steps}, {forms}{mean})"

    def _held_out(self, validation: Any, seed: int | None) -> np.ndarray:
        """Return whether each episode is held out, ``(n_episodes,)``."""
        if not isinstance(validation, int | float) or not 0 <= validation < 1:
            raise ValueError(f"validation must be in [0, 1), got {validation!r}")
        n = min(max(round(validation * self.n_episodes), validation > 0), self.n_episodes - 1)
        held_out = np.zeros(self.n_episodes, bool)
        held_out[np.random.default_rng(seed).permutation(self.n_episodes)[:n]] = True
        return held_out

    def _select(self, episodes: Sequence[int] | np.ndarray) -> "Demonstrations":
        """Return some episodes, in the order given. The arrays are shared if the episodes follow each other."""
        numbers = np.asarray(episodes)
        is_run = len(numbers) == numbers[-1] - numbers[0] + 1 and bool((np.diff(numbers) == 1).all())
        if is_run:
            steps: Any = slice(self.episodes[numbers[0]].start, self.episodes[numbers[-1]].stop)
            chosen: Any = slice(int(numbers[0]), int(numbers[-1]) + 1)
        else:
            steps = np.concatenate([np.arange(s.start, s.stop) for s in (self.episodes[n] for n in numbers)])
            chosen = numbers
        selected = object.__new__(Demonstrations)  # its arrays were checked
        selected.observations = map_observations(lambda array: array[steps], self.observations)
        selected.actions, selected.rewards = self.actions[steps], None if self.rewards is None else self.rewards[steps]
        selected.terminated, selected.truncated = self.terminated[steps], self.truncated[steps]
        selected.final_observations = None
        if self.final_observations is not None:
            selected.final_observations = map_observations(lambda array: array[chosen], self.final_observations)
        return selected

    def _require_like_observations(self, finals: Rows) -> None:
        """Require one final observation per episode, of the same shapes as the observations."""
        given = dict(_named_arrays("final_observations", finals))
        wanted = dict(_named_arrays("final_observations", self.observations))
        if given.keys() != wanted.keys():
            raise ValueError(f"final_observations must be {list(wanted)}, as observations are, got {list(given)}")
        for name, array in given.items():
            _require_length(name, array, self.n_episodes, "episode")
            if array.shape[1:] != wanted[name].shape[1:]:
                raise ValueError(f"{name} must have shape {wanted[name].shape[1:]} an episode, got {array.shape[1:]}")


def _named_arrays(name: str, rows: Rows | None, form: str = "{}[{!r}]") -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and array, or those of each key of a dict; nothing for None."""
    if isinstance(rows, dict):
        yield from ((form.format(name, key), array) for key, array in rows.items())
    elif rows is not None:
        yield name, rows


def _checked(name: str, values: Any, n_steps: int | None = None, row: str = "step") -> np.ndarray:
    """Return finite numbers as an array with one row per step.

    :param name: name of the array, for the error message
    :param values: what was given
    :param n_steps: number of steps, each of which has one number; None for any shape
    :param row: what a row is, for the error message
    """
    try:
        array = np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"{name} must be one array with a row per {row}: {error}") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must hold numbers, got {array.dtype}")
    if not array.ndim:
        raise ValueError(f"{name} must have a row per {row}, got the single number {array}")
    if n_steps is not None:
        _require_length(name, array, n_steps, "step of actions")
        if array.ndim > 1:
            raise ValueError(f"{name} must have one number per {row}, got shape {array.shape}")
    for first, piece in chunks(array) if array.dtype.kind == "f" else ():
        bad = np.argwhere(~np.isfinite(piece))
        if len(bad):
            value = float(piece[tuple(bad[0])])
            raise NonFiniteError(f"{name} at {row} {first + bad[0][0]} of the demonstrations", value)
    return array


def _checked_rows(name: str, rows: Any, row: str = "step") -> Rows:
    """Return observations as an array, or as a dict of arrays, of finite numbers."""
    if not isinstance(rows, Mapping):
        return _checked(name, rows, row=row)
    if not rows:
        raise ValueError(f"{name} must have at least one key, got an empty dict")
    return {str(key): _checked(f"{name}[{key!r}]", part, row=row) for key, part in rows.items()}


def _require_length(name: str, array: np.ndarray, n_rows: int, row: str) -> None:
    if len(array) != n_rows:
        raise ValueError(f"{name} must have {n_rows} rows, one for each {row}, got {len(array)}")


def _flags(name: str, values: Any, n_steps: int) -> np.ndarray:
    """Return a new array of bool, False where nothing is given."""
    if values is None:
        return np.zeros(n_steps, bool)
    array = _checked(name, values, n_steps)
    bad = np.flatnonzero((array != 0) & (array != 1))
    if len(bad):
        raise ValueError(f"{name} must be True or False, got {array[bad[0]]} at step {bad[0]}")
    return array.astype(bool)  # a copy, also if it is memory-mapped


def _with_suffix(path: PathOrStr, suffixes: tuple[str, ...]) -> Path:
    """Return a path that ends with one of the suffixes; the first is added if it does not."""
    path = Path(path)
    return path if path.suffix in suffixes else path.with_name(f"{path.name}{suffixes[0]}")


def _form(rows: Rows) -> str:
    """Return type and shape of one row: "float32(4,)"."""
    if isinstance(rows, dict):
        return "{" + ", ".join(f"{key}: {_form(array)}" for key, array in rows.items()) + "}"
    return f"{rows.dtype}{rows.shape[1:]}"


def _range(numbers: np.ndarray, form: str) -> str:
    return f"mean {numbers.mean():{form}}, min {numbers.min():{form}}, max {numbers.max():{form}}"
