"""The state of a training run between two updates: everything that the next update depends on.

:func:`capture` copies it, which is quick, and :class:`RunState` turns the copy into files later. The parts are:

========== ======================================================================================================
part       content
========== ======================================================================================================
model      what ``model.save`` writes: arguments, counters, parameters, optimizers, the learner's state
attributes what it leaves out or resets: the latest observations, episode statistics, where ``learn`` stands
env        :func:`sb3_pg.envs.get_env_state` of the training envs
random     states of the generators of torch, CUDA, NumPy, Python and of the action space
callbacks  attributes of the callbacks, and the state of their own envs
logger     values that wait for the next log, and what is in the log files
buffer     the replay buffer
========== ======================================================================================================
"""

import copy
import inspect
import io
import os
import pickle
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.vec_env import VecEnv
from typing_extensions import Self

from sb3_pg.checkpoints.log_files import LoggerState
from sb3_pg.checkpoints.model_file import write_model
from sb3_pg.checkpoints.vetted import brief
from sb3_pg.envs import EnvState, get_env_state, set_env_state
from sb3_pg.envs.state.bit_generators import require_position
from sb3_pg.envs.state.encoding import CannotSaveError, Decoder, Encoder, with_results

#: Loads what could only be stored as a pickle.
Unpickle = Callable[[bytes], Any]
#: Attributes of a model that belong to the run. ``save`` leaves some of them out, and ``learn`` sets others anew.
RUN_ATTRIBUTES: Final = (
    *("num_timesteps", "_total_timesteps", "_num_timesteps_at_start", "_episode_num", "_n_updates", "_n_calls"),
    *("_current_progress_remaining", "ep_info_buffer", "ep_success_buffer"),
    *("_last_obs", "_last_original_obs", "_last_episode_starts", "_timesteps", "_memory"),
    *("_iteration", "_logged_at", "_decided_in", "_next_is_logged", "_n_skipped", "_n_refused", "_n_collected"),
)
#: Those of them that the model's file need not hold.
_IN_ATTRIBUTES: Final = ("ep_info_buffer", "ep_success_buffer", "_last_obs", "_last_original_obs")
#: Attributes of a callback that are not its own state.
_NOT_STATE: Final = frozenset({"model", "parent", "locals", "globals", "verbose", "logger"})
_NOT_STATE_TYPES: Final = (BaseCallback, BaseAlgorithm, VecEnv, KVWriter, Logger)


def frozen(value: Any) -> Any:
    """Copy a value so that later changes of the model do not reach it. Modules, classes and functions are shared."""
    if isinstance(value, th.Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict) and type(value).__name__ in ("dict", "OrderedDict"):
        return type(value)((key, frozen(item)) for key, item in value.items())
    if type(value) in (list, tuple, set):
        return type(value)(frozen(item) for item in value)
    if isinstance(value, deque):
        return copy.copy(value)  # SB3 does not change the items
    if isinstance(value, th.nn.Module | spaces.Space | type) or callable(value) or not hasattr(value, "__dict__"):
        return value
    return copy.deepcopy(value)


def to_plain(value: Any) -> Any:
    """Return a value as plain data, see :mod:`sb3_pg.envs.state.encoding`.

    :raises CannotSaveError: it can be neither copied nor pickled
    """
    return Encoder([], with_models=False).encode(value)


def require_tree(item: Any, most: int) -> None:
    """Require plain data that is no larger than its file. A pickle may hold a list in itself, or twice in each other.

    :param item: plain data
    :param most: bytes of the file
    :raises ValueError: it is larger
    """
    pending, most = [item], 1000 + 8 * most  # an honest pickle may hold a small tuple twice
    while pending:
        value = pending.pop()
        if isinstance(value, dict | list | tuple):
            most -= 1 + len(value)
            if most < 0:
                raise ValueError("it holds more values than its size allows")
            pending += [inner for inner in (value.values() if isinstance(value, dict) else value) if inner is not None]


def from_plain(item: Any, unpickle: Unpickle, old: Any = None) -> Any:
    """Return the value of plain data.

    :param old: the value that it replaces
    """
    return Decoder([], unpickle).decode(item, old)


def require_run_attributes(model: Any, values: dict[str, Any]) -> None:
    """Require values that :data:`RUN_ATTRIBUTES` can have.

    :param model: the algorithm
    :param values: name -> value
    :raises ValueError: naming the attribute
    """
    for name, value in values.items():
        if name not in RUN_ATTRIBUTES or not _KINDS.get(name, _is_like)(value, model, getattr(model, name, None)):
            raise ValueError(f"the attribute {name} is {brief(value)}")


def _is_like(value: Any, _model: Any, old: Any) -> bool:
    """Whether a value is a number, and none below -1 if the old one is a count."""
    if value is None or isinstance(value, bool):
        return type(value) is type(old) or type(old) is type(None)
    return isinstance(value, int | float | np.number) and bool(-1 <= value < 1 << 62)


def _is_progress(value: Any, _model: Any, _old: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _is_episodes(value: Any, _model: Any, _old: Any) -> bool:
    if value is None or (isinstance(value, deque) and all(type(one) in (bool, int, float) for one in value)):
        return True
    numbers = (episode.get(name) for episode in value for name in ("r", "l")) if isinstance(value, deque) else [None]
    return all(isinstance(number, int | float | np.number) for number in numbers)


def _is_observation(value: Any, model: Any, _old: Any) -> bool:
    if isinstance(value, dict):
        return value.keys() == getattr(model.observation_space, "spaces", {}).keys() and all(
            _is_of_envs(array, model, None) for array in value.values()
        )
    return _is_of_envs(value, model, None) and not isinstance(model.observation_space, spaces.Dict)


def _is_original_observation(value: Any, model: Any, _old: Any) -> bool:
    """Whether a value is None, or observations as they were before a VecNormalize, which has no action masks."""
    if isinstance(value, dict):
        known = getattr(model.observation_space, "spaces", {}).keys()
        return value.keys() <= known and all(_is_of_envs(array, model, None) for array in value.values())
    is_part = value is None or getattr(model, "uses_masks", False)
    return _is_of_envs(value, model, None) and (is_part or not isinstance(model.observation_space, spaces.Dict))


def _is_latest_observation(value: Any, model: Any, _old: Any) -> bool:
    space = model.observation_space
    pairs = [(value[key], space[key]) for key in value] if isinstance(value, dict) else [(value, space)]
    return _is_observation(value, model, None) and all(
        array is None or array.shape == (model.n_envs, *inner.shape) for array, inner in pairs
    )


def _is_of_envs(value: Any, model: Any, _old: Any) -> bool:
    return value is None or (
        isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.shape[:1] == (model.n_envs,)
    )


def _is_memory(value: Any, model: Any, _old: Any) -> bool:
    if value is None or value == {}:
        return True
    memory = getattr(model, "memory", None)
    if memory is None or not (isinstance(value, dict) and value.keys() <= {"actor", "critic"}):
        return False
    shape = (memory.n_layers, model.n_envs, memory.hidden_size)
    return all(
        isinstance(state, tuple)
        and len(state) == memory.n_parts
        and all(isinstance(part, th.Tensor) and part.is_floating_point() and part.shape == shape for part in state)
        for state in value.values()
    )


_KINDS: Final[dict[str, Callable[[Any, Any, Any], bool]]] = {
    "_current_progress_remaining": _is_progress,
    "ep_info_buffer": _is_episodes,
    "ep_success_buffer": _is_episodes,
    "_last_obs": _is_latest_observation,
    "_last_original_obs": _is_original_observation,
    "_last_episode_starts": _is_of_envs,
    "_timesteps": _is_of_envs,
    "_memory": _is_memory,
}


# ---------------------------------------------------------------- random numbers


def random_states(model: Any) -> dict[str, Any]:
    """Return the states of all generators that training draws from, but for those inside the envs."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 (the generator that SB3 seeds)
        "torch": th.get_rng_state().numpy().copy(),
        "cuda": [state.numpy() for state in th.cuda.get_rng_state_all()] if model.device.type == "cuda" else [],
        "action_space": to_plain(model.action_space),
    }


def set_random_states(model: Any, states: dict[str, Any], unpickle: Unpickle) -> None:
    """Set all generators to states that :func:`random_states` has returned."""
    require_position(states["numpy"])
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    th.set_rng_state(th.as_tensor(states["torch"]))
    if model.device.type == "cuda" and len(states["cuda"]) == th.cuda.device_count():
        th.cuda.set_rng_state_all([th.as_tensor(state) for state in states["cuda"]])
    from_plain(states["action_space"], unpickle, model.action_space)


# ---------------------------------------------------------------- callbacks


def names_of(callbacks: Iterable[BaseCallback]) -> Iterator[tuple[str, BaseCallback]]:
    """Yield each callback with a name: its class, and its position among the callbacks of that class."""
    counts: dict[str, int] = {}
    for callback in callbacks:
        name = f"{type(callback).__module__}.{type(callback).__qualname__}"
        counts[name] = counts.get(name, -1) + 1
        yield f"{name} {counts[name]}", callback


def callback_attributes(callback: BaseCallback) -> dict[str, bytes]:
    """Return a callback's own attributes, each as a pickle of plain data, without those that cannot be stored."""
    attributes = {}
    for name, value in vars(callback).items():
        if name not in _NOT_STATE and not _holds(value, _NOT_STATE_TYPES):
            with suppress(CannotSaveError):
                attributes[name] = pickle.dumps(to_plain(value), protocol=5)
    return attributes


def callback_state(callback: BaseCallback, before: dict[str, bytes]) -> dict[str, Any]:
    """Return what has changed in a callback since training began, and the states of its envs.

    :param callback: the callback
    :param before: its :func:`callback_attributes` when training began
    """
    now = callback_attributes(callback)
    changed = {name: value for name, value in now.items() if value != before.get(name)}
    envs = {name: tuple(get_env_state(value)) for name, value in vars(callback).items() if isinstance(value, VecEnv)}
    return {"attributes": changed, "envs": envs}


def has_state(state: dict[str, Any]) -> bool:
    """Return whether a :func:`callback_state` has more than the counts that every callback has."""
    return bool(state["envs"] or state["attributes"].keys() - {"n_calls", "num_timesteps"})


def set_callback_state(callback: BaseCallback, state: dict[str, Any], unpickle: Unpickle) -> None:
    """Give a callback the attributes that :func:`callback_state` has returned.

    Attributes that lead to the model or to other callbacks stay, and so do paths among the constructor's arguments.
    """
    constructors = [vars(cls)["__init__"] for cls in type(callback).__mro__ if "__init__" in vars(cls)]
    arguments = {name for constructor in constructors for name in inspect.signature(constructor).parameters}
    plain = {}
    for name, value in state["attributes"].items():
        old = vars(callback).get(name)
        if name not in _NOT_STATE and not _holds(old, _NOT_STATE_TYPES):
            new = unpickle(value)
            require_tree(new, len(value))
            if not (name in arguments and (_is_path(old) or _is_path(new))):
                plain[name] = new
    for name, item in plain.items():  # each was encoded by itself
        Decoder([], unpickle).set_attributes(callback, {name: item})
    for name, env in state["envs"].items():
        if isinstance(vars(callback).get(name), VecEnv):
            set_env_state(vars(callback)[name], EnvState(*env), unpickle)


def _is_path(value: Any) -> bool:
    if isinstance(value, str):
        return value.startswith(".") or "/" in value or os.sep in value
    return isinstance(value, os.PathLike)


def _holds(value: Any, kinds: Any) -> bool:
    return any(isinstance(item, kinds) for item in (value if isinstance(value, list) else [value]))


# ---------------------------------------------------------------- replay buffers

#: Attributes of a replay buffer that follow from the arguments of its constructor.
_CONSTANTS: Final = (
    *("buffer_size", "obs_shape", "action_dim", "n_envs", "optimize_memory_usage", "handle_timeout_termination"),
)


@dataclass
class BufferState:
    """A replay buffer as it was: its arrays are the live ones.

    :param place: where the next row goes, and whether the buffer is full
    :param attributes: everything but the arrays
    :param arrays: name -> the rows that are in use, as views
    """

    place: tuple[int, bool]
    attributes: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @classmethod
    def of(cls, buffer: ReplayBuffer) -> Self:
        """Describe a replay buffer."""
        size = buffer.buffer_size
        n_used = min(buffer.size() + 1, size)  # with optimize_memory_usage one more row is in use
        arrays: dict[str, np.ndarray] = {}
        attributes: dict[str, Any] = {}
        for name, value in vars(buffer).items():
            if isinstance(value, VecEnv | spaces.Space | th.device):
                continue
            rows = {f"{name}/{key}": array for key, array in _rows(value, size)}
            if rows:
                arrays |= {key: array[:n_used] for key, array in rows.items()}
            else:
                attributes[name] = to_plain(value)
        return cls((buffer.pos, buffer.full), attributes, arrays)

    def is_intact(self, buffer: ReplayBuffer) -> bool:
        """Return whether the rows are still what they were.

        :param buffer: the buffer that this was made from
        """
        return self.place == (buffer.pos, buffer.full) or not (buffer.full or buffer.optimize_memory_usage)


def set_buffer_state(
    buffer: ReplayBuffer, attributes: dict[str, Any], arrays: dict[str, np.ndarray], unpickle: Unpickle
) -> None:
    """Fill a fresh replay buffer.

    :raises ValueError: the buffer has another size or other arrays; it stays as it was then
    """
    size = from_plain(attributes["buffer_size"], unpickle)
    own = {
        f"{name}/{key}": array
        for name, value in vars(buffer).items()
        for key, array in _rows(value, buffer.buffer_size)
    }
    shapes = {name: (array.dtype.str, array.shape[1:]) for name, array in own.items()}
    stored = {name: (array.dtype.str, array.shape[1:]) for name, array in arrays.items()}
    if shapes != stored or size != buffer.buffer_size:
        raise ValueError(
            f"the replay buffer must have the arrays {stored} with {size} rows, as the "
            f"checkpoint's, got {shapes} with {buffer.buffer_size} rows"
        )
    pos, full = from_plain(attributes["pos"], unpickle), from_plain(attributes["full"], unpickle)
    if not (type(full) is bool and all((size if full else pos) <= len(array) <= size for array in arrays.values())):
        raise ValueError(f"the replay buffer must have the rows that pos={pos!r} and full={full!r} ask for")
    changed = {name for name in _CONSTANTS if from_plain(attributes[name], unpickle) != getattr(buffer, name)}
    if changed or attributes.keys() - vars(buffer).keys() or not 0 <= pos <= size:
        raise ValueError(f"the replay buffer has other attributes than the checkpoint's: {sorted(changed)}")
    for name, array in arrays.items():
        own[name][: len(array)] = array
    for name, item in attributes.items():  # each was encoded by itself
        Decoder([], unpickle).set_attributes(buffer, {name: item})


def _rows(value: Any, size: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the arrays in an attribute of a replay buffer that have one row per transition."""
    for key, array in value.items() if isinstance(value, dict) else [("", value)]:
        if isinstance(array, np.ndarray) and array.ndim and len(array) == size:
            yield key, array


# ---------------------------------------------------------------- the whole run


@dataclass
class RunState:
    """A copy of a run's state.

    :param num_timesteps: env steps taken
    :param model: what ``model.save`` writes
    :param parts: the other parts, by name
    :param logger: what has been logged
    :param buffer: the replay buffer, if there is one
    """

    num_timesteps: int
    model: tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
    parts: dict[str, Any]
    logger: LoggerState
    buffer: BufferState | None

    @classmethod
    def capture(cls, model: Any, callbacks: Sequence[tuple[BaseCallback, dict[str, bytes]]]) -> Self:
        """Copy the state of a run. It neither draws random numbers nor changes the model or the envs.

        :param model: the algorithm, between two updates
        :param callbacks: each callback of the run, and its :func:`callback_attributes` when training began
        """
        befores = {id(callback): before for callback, before in callbacks}
        buffer = getattr(model, "replay_buffer", None)
        parts = {
            "attributes": {name: to_plain(getattr(model, name)) for name in RUN_ATTRIBUTES if hasattr(model, name)},
            "pieces": None if getattr(model, "_pieces", None) is None else model._pieces.state_dict(),
            "frozen": [name for name, parameter in model.policy.named_parameters() if not parameter.requires_grad],
            "env": tuple(get_env_state(model.env)),
            "random": random_states(model),
            "callbacks": {
                name: callback_state(callback, befores[id(callback)])
                for name, callback in names_of(callback for callback, _ in callbacks)
            },
            "seconds": (time.time_ns() - model.start_time) / 1e9,
        }
        return cls(
            model.num_timesteps,
            frozen(model.saved_parts(exclude=_IN_ATTRIBUTES)),
            parts,
            LoggerState.of(model.logger),
            None if buffer is None else BufferState.of(buffer),
        )

    def is_intact(self, model: Any) -> bool:
        """Return whether the parts that are not copied, which are rows of the replay buffer, are still the same."""
        return self.buffer is None or self.buffer.is_intact(model.replay_buffer)

    def to_files(self) -> tuple[dict[str, bytes], dict[str, np.ndarray]]:
        """Return the content of the checkpoint's files, and the large arrays, by name."""
        arrays = {f"log/{name}": text for name, text in self.logger.texts.items()}
        parts = self.parts | {"logger": self.logger.plain()}
        if self.buffer is not None:
            parts["buffer"] = self.buffer.attributes
            arrays |= {f"buffer/{name}": array for name, array in self.buffer.arrays.items()}
        results: dict[str, np.ndarray] = {}

        def keep_results(path: str, n_bytes: int) -> str:
            with Path(path).open("rb") as file:
                results[path] = np.frombuffer(file.read(n_bytes), dtype=np.uint8)
            return path

        parts["env"] = with_results(parts["env"], keep_results)
        arrays |= {f"results/{path}": content for path, content in results.items()}
        model = io.BytesIO()
        write_model(model, *self.model)
        return {"model.zip": model.getvalue(), "state": pickle.dumps(parts, protocol=5)}, arrays
