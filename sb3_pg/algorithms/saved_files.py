"""What ``save`` and ``load`` of the algorithms need: contents in the form that SB3's ``load`` takes, and checks."""

import io
import json
import pathlib
import zipfile
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.save_util import recursive_getattr, recursive_setattr
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_pg.checkpoints import read_buffer, write_buffer
from sb3_pg.checkpoints.model_file import Contents, name_of
from sb3_pg.checkpoints.vetted import brief
from sb3_pg.envs.state.encoding import hides_method
from sb3_pg.errors import DamagedFileError, NonFiniteError
from sb3_pg.learner import LearnerState
from sb3_pg.rollout import TrajectoryReplayBuffer

#: Attributes that must be equal in the model's replay buffer and a loaded one.
_EQUAL: Final = ("observation_space", "action_space", "n_envs")
#: Attributes that every replay buffer has.
_NEEDED: Final = {"observations", "actions", "rewards", "dones", "buffer_size", "pos", "full", *_EQUAL}
#: Largest number of episodes in the statistics of a model.
_MOST_EPISODES: Final = 10**9
#: Options of an optimizer that say how it computes, and not what.
_IMPLEMENTATIONS: Final = ("foreach", "fused")
#: Tables that belong to the class of an algorithm.
_OF_CLASSES: Final = frozenset({"policy_aliases", "checks", "groups", "critic_rule"})
#: Attributes that each process makes itself.
_NOT_IN_FILES: Final = frozenset(
    {"learner", "rollout_batch", "checkpointer", "policy", "device", "logger", "_memory", "_vec_normalize_env"}
    | {"_collected", "_collector", "_pieces", "_resumption", "_rollouts_left", "_logger", "_custom_logger"}
)
#: Attributes that no argument's check covers -> their types.
_KINDS: Final[Mapping[str, tuple[type, ...]]] = {
    "action_noise": (ActionNoise, type(None)),
    "learner_state": (LearnerState,),
    "_stats_window_size": (int,),
    **dict.fromkeys(("_from_sb3", "verbose"), (int, type(None))),
    "_timesteps": (np.ndarray, type(None)),
    **dict.fromkeys(("num_timesteps", "_total_timesteps", "_n_updates", "_episode_num", "_iteration"), (int, float)),
}


def as_zip(saved: Contents, with_variables: bool = False) -> io.BytesIO:
    """Return a zip for SB3's ``load``, which gets the attributes as ``custom_objects``: it holds only their names.

    :param saved: what the file holds
    :param with_variables: whether SB3 sets the tensors that are in no state dict
    """
    entries: dict[str, bytes] = {"data": json.dumps(dict.fromkeys(saved.data)).encode()}
    if saved.system_info is not None:
        entries["system_info.txt"] = saved.system_info
    variables = {"pytorch_variables": saved.variables} if with_variables else {}
    for name, params in (saved.params | variables).items():
        held = io.BytesIO()
        th.save(params, held)
        entries[f"{name}.pth"] = held.getvalue()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, entry in entries.items():
            archive.writestr(name, entry)
    file.seek(0)
    return file


def set_variables(model: BaseAlgorithm, variables: Mapping[str, th.Tensor], what: str) -> None:
    """Set the tensors of a model that are neither in its policy nor in an optimizer.

    :param model: the model
    :param variables: name -> tensor
    :param what: the file
    :raises DamagedFileError: the model has no such tensor
    """
    known = model._get_torch_save_params()[1]
    for name, value in variables.items():
        if name not in known:
            raise DamagedFileError(what, f"it has a tensor {name!r}, which {type(model).__name__} has not")
        if value is not None:
            recursive_setattr(model, f"{name}.data", value.data)


def why_not_loaded(error: Exception, what: str, names: Collection[str]) -> Exception:
    """Return the error for a file whose contents do not make a model. It may be the same error.

    :param error: what SB3's ``load`` has raised
    :param what: the file
    :param names: attributes that are as in the file. If there are any, ``load`` was given no others
    """
    if isinstance(error, KeyError) and isinstance(error.__context__, ValueError):
        return error.__context__  # SB3 has taken the model for a DQN
    if isinstance(error, TypeError | ValueError | OSError):
        name = str(error).split(" ", 1)[0].partition("=")[0]
        is_of_file = name in names or name == "policy" or (isinstance(error, TypeError) and name != "env")
        if isinstance(error, NonFiniteError | OSError) or not (names and is_of_file):
            return error
    return DamagedFileError(what, f"{type(error).__name__}: {error}")


def require_attributes(cls: type[BaseAlgorithm], data: dict[str, Any], but: Collection[str], what: str) -> None:
    """Require attributes that a model of this class can have.

    :param cls: the algorithm
    :param data: name -> value
    :param but: names of attributes that are not those of a file
    :param what: the file
    :raises DamagedFileError: an attribute takes the place of a method or of a table of the class, or is of another kind
    """
    for name in _NOT_IN_FILES.difference(but):
        data.pop(name, None)
    for name in ("observation_space", "action_space"):
        if not isinstance(data.get(name), spaces.Space):
            raise DamagedFileError(what, f"its {name} is {brief(data.get(name))}")
    for name in data.keys() - set(but):
        if name in _OF_CLASSES or hides_method(cls, name):
            raise DamagedFileError(what, f"it has a value for {cls.__name__}.{name}")
        kinds = _KINDS.get(name)
        is_wrong = isinstance(data[name], int) and name == "_stats_window_size" and not 0 < data[name] < _MOST_EPISODES
        if kinds is not None and (not isinstance(data[name], kinds) or is_wrong):
            raise DamagedFileError(what, f"its {name} is {brief(data[name])}")


def require_like_optimizers(model: BaseAlgorithm, params: Mapping[str, Any], own: Mapping[str, Any], what: str) -> None:
    """Require states of optimizers that fit the model's own optimizers.

    :param model: the model
    :param params: name of a module or optimizer -> its state dict
    :param own: the same of the model
    :param what: the file
    :raises DamagedFileError: an optimizer has an option of another kind, or a state of another shape
    """
    for name in params.keys() & own.keys():
        groups = own[name].get("param_groups")
        if not isinstance(groups, list):
            continue
        saved = params[name] if isinstance(params[name], dict) else {}
        saved_groups: Any = saved.get("param_groups")
        saved_states: Any = saved.get("state")
        is_list = isinstance(saved_groups, list) and all(isinstance(group, dict) for group in saved_groups)
        if not (is_list and len(saved_groups) == len(groups) and isinstance(saved_states, dict)):
            raise DamagedFileError(what, f"{name} has other groups of parameters")
        for ours, theirs in zip(groups, saved_groups, strict=True):
            for option in (ours.keys() & theirs.keys()) - {"params"}:
                is_any = option in _IMPLEMENTATIONS and type(theirs[option]) in (bool, type(None))
                if not (is_any or _is_like(theirs[option], ours[option])):
                    raise DamagedFileError(what, f"{option} of {name} is {brief(theirs[option])}")
        groups = recursive_getattr(model, name).param_groups
        parameters = dict(enumerate(parameter for group in groups for parameter in group["params"]))
        for index, parameter in parameters.items():
            for key, tensor in _tensors_in(saved_states.get(index, {}), ""):
                if tensor.numel() != 1 and tensor.shape != parameter.shape:
                    raise DamagedFileError(what, f"{key.strip('.')} of {name} has the shape {tuple(tensor.shape)}")


def _is_like(value: Any, own: Any) -> bool:
    """Whether an optimizer's option is of the same kind as the model's own."""
    if isinstance(own, bool) or isinstance(value, bool):
        return value is own or own is None
    if isinstance(own, tuple | list):
        return isinstance(value, tuple | list) and len(value) == len(own) and all(map(_is_like, value, own))
    if isinstance(own, int | float):
        return isinstance(value, int | float) or (isinstance(value, th.Tensor) and value.numel() == 1)
    return value is None or own is None


def require_finite_states(params: Mapping[str, Any], parameters: Collection[str], where: str) -> None:
    """Require parameters and optimizer states without NaN and infinity.

    :param params: name of a module or optimizer -> its state dict
    :param parameters: names of the policy's parameters. Its buffers may hold infinity
    :param where: addition to a tensor's name in the message, such as ``" in model.zip"``
    :raises NonFiniteError: naming the tensor
    """
    for module, state in params.items():
        for name, tensor in _tensors_in(state, module):
            is_buffer = module == "policy" and name.removeprefix("policy.") not in parameters
            wrong = tensor.isnan() if is_buffer else ~tensor.isfinite()
            if wrong.any():
                raise NonFiniteError(f"{name}{where}", float(tensor[wrong][0]))


def _tensors_in(value: Any, name: str) -> Iterator[tuple[str, th.Tensor]]:
    if isinstance(value, th.Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors_in(item, f"{name}.{key}")


def save_replay_buffer(self: Any, path: str | pathlib.Path | io.BufferedIOBase) -> None:
    """Save the replay buffer as a pickle, whole or not at all.

    :param path: path, to which ``.pkl`` is added if it has no suffix, or an open file
    :raises OSError: the disk is full, or the path cannot be written. The old file stays
    """
    write_buffer(path, self.replay_buffer, self.verbose)


def load_replay_buffer(
    self: Any,
    path: str | pathlib.Path | io.BufferedIOBase,
    truncate_last_traj: bool = True,
    trusted: bool = False,
    allow: Collection[Any] = (),
) -> None:
    """Load a replay buffer as SB3's method does. If it does not fit, the model keeps the one that it has.

    :param path: path, without ``.pkl`` too, or an open file
    :param truncate_last_traj: for a HerReplayBuffer, whether its unfinished episode ends where it was saved
    :param trusted: run the code in the file, as SB3 does
    :param allow: further classes and functions that the file may name, such as a buffer class of your own
    :raises UntrustedFileError: the file asks for code that is not known to be harmless
    :raises DamagedFileError: the file is no replay buffer, or it was changed
    :raises ValueError: the buffer is of other spaces, another number of envs, or another kind
    """
    buffer, what = read_buffer(path, trusted, allow, self.verbose), name_of(path)
    _require_fitting_buffer(buffer, self.replay_buffer, what)
    if not hasattr(buffer, "handle_timeout_termination"):  # those of SB3 before 2.1
        buffer.handle_timeout_termination = False
        buffer.timeouts = np.zeros_like(buffer.dones)
    if isinstance(buffer, HerReplayBuffer):
        if self.env is None:
            raise ValueError("a HerReplayBuffer needs an environment: call set_env(env), or load(path, env=env)")
        buffer.set_env(self.env)
        if truncate_last_traj:
            buffer.truncate_last_trajectory()
    buffer.device = self.device
    self.replay_buffer = buffer


def _require_fitting_buffer(buffer: Any, own: ReplayBuffer, what: str) -> None:
    """Require a replay buffer that the model can take in place of its own.

    :param buffer: what the file holds
    :param own: the model's buffer
    :param what: the file
    :raises ValueError: naming what differs
    """
    if not isinstance(buffer, ReplayBuffer):
        raise DamagedFileError(what, f"it is no ReplayBuffer, but {type(buffer).__name__}")
    kinds = [isinstance(one, TrajectoryReplayBuffer) for one in (buffer, own)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{what} must hold a {type(own).__name__}, got a {type(buffer).__name__}")
    if missing := sorted(_NEEDED - vars(buffer).keys()):
        raise DamagedFileError(what, f"the buffer has no {missing}")
    for name in _EQUAL:
        theirs, ours = getattr(buffer, name), getattr(own, name)
        if theirs != ours:
            raise ValueError(f"{what} must hold a buffer with {name}={ours}, as the model, got {theirs}")
    size = buffer.buffer_size
    if not (_is_count(size) and _is_count(buffer.pos) and buffer.pos <= size):
        raise DamagedFileError(what, f"the buffer has buffer_size={size!r} and pos={buffer.pos!r}")
    found = _arrays_of(buffer)
    for name, array in _arrays_of(own).items():
        theirs, wanted = found.get(name), (size, *array.shape[1:])
        if name.partition(".")[0] in vars(buffer) and (theirs is None or theirs.shape != wanted):
            raise DamagedFileError(what, f"{name} must have the shape {wanted}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and bool(value >= 0)


def _arrays_of(buffer: ReplayBuffer) -> dict[str, np.ndarray[Any, Any]]:
    """Return a buffer's arrays of one row a step; those of Dict observations have the names ``observations.KEY``."""
    arrays = {}
    for name, value in vars(buffer).items():
        for key, array in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(array, np.ndarray) and len(array.shape) and len(array) == buffer.buffer_size:
                arrays[f"{name}.{key}".rstrip(".")] = array
    return arrays
