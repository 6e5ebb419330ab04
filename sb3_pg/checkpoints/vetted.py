"""The classes and functions that a file of unknown origin may name.

The list holds exact names, never prefixes of modules. Each name was read for what it can do: with any arguments, any
state, and any of the other names as arguments, it opens no file, starts no process, imports nothing and runs no text.
"""

import math
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from importlib import import_module
from io import BytesIO
from tarfile import is_tarfile
from typing import Any, Final

import numpy as np
import torch as th
from torch import nn

from sb3_pg.envs.state.bit_generators import MOST_SEEDS, set_bit_generator
from sb3_pg.envs.state.encoding import hides_method

#: First bytes of a storage in a pickle.
_LEGACY: Final = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_BIT_GENERATORS: Final = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")
#: Module -> names of classes. A file may name them, make an empty instance, and set its attributes.
_CLASSES: Final = {
    "gymnasium.spaces.box": "Box",
    "gymnasium.spaces.dict": "Dict",
    "gymnasium.spaces.discrete": "Discrete",
    "gymnasium.spaces.multi_binary": "MultiBinary",
    "gymnasium.spaces.multi_discrete": "MultiDiscrete",
    "gymnasium.spaces.tuple": "Tuple",
    "rl_zoo3.utils": "SimpleLinearSchedule",
    "sb3_pg.algorithms.off_pac.policies": "ContinuousActor Critic DiscreteActor OffPACCnnPolicy "
    "OffPACMultiInputPolicy OffPACPolicy",
    "sb3_pg.baselines.averages": "LeaveOneOutBaseline MeanBaseline NoBaseline TimeBaseline",
    "sb3_pg.baselines.base": "ForeignBaseline",
    "sb3_pg.baselines.linear": "LinearBaseline",
    "sb3_pg.baselines.optimal": "OptimalBaseline",
    "sb3_pg.baselines.value": "ValueBaseline",
    "sb3_pg.demonstrations.anchors": "DemonstrationLoss KLAnchor",
    "sb3_pg.learner.critic": "ReturnScale",
    "sb3_pg.learner.learner": "LearnerState",
    "sb3_pg.policies.behavior": "PolicyBehavior",
    "sb3_pg.policies.memory": "Memory",
    "sb3_pg.rollout.buffers": "DictTrajectoryRolloutBuffer TrajectoryRolloutBuffer",
    "sb3_pg.rollout.trajectories": "Pieces Trajectory",
    "sb3_pg.rollout.trajectory_buffer": "DictTrajectoryReplayBuffer Stored TrajectoryReplayBuffer",
    "sb3_pg.rollout.transition_buffer": "BehaviorReplayBuffer DictBehaviorReplayBuffer NStepBehaviorReplayBuffer",
    "stable_baselines3.common.buffers": "DictReplayBuffer DictRolloutBuffer NStepReplayBuffer ReplayBuffer "
    "RolloutBuffer",
    "stable_baselines3.common.distributions": "BernoulliDistribution CategoricalDistribution "
    "DiagGaussianDistribution MultiCategoricalDistribution SquashedDiagGaussianDistribution "
    "StateDependentNoiseDistribution TanhBijector",
    "stable_baselines3.common.noise": "NormalActionNoise OrnsteinUhlenbeckActionNoise VectorizedActionNoise",
    "stable_baselines3.common.policies": "ActorCriticCnnPolicy ActorCriticPolicy ContinuousCritic "
    "MultiInputActorCriticPolicy",
    "stable_baselines3.common.running_mean_std": "RunningMeanStd",
    "stable_baselines3.common.sb2_compat.rmsprop_tf_like": "RMSpropTFLike",
    "stable_baselines3.common.torch_layers": "CombinedExtractor FlattenExtractor MlpExtractor NatureCNN",
    "stable_baselines3.common.type_aliases": "TrainFreq",
    "stable_baselines3.common.utils": "ConstantSchedule FloatSchedule LinearSchedule",
    "stable_baselines3.dqn.policies": "CnnPolicy DQNPolicy MultiInputPolicy QNetwork",
    "stable_baselines3.her.her_replay_buffer": "HerReplayBuffer",
    "stable_baselines3.sac.policies": "Actor CnnPolicy MultiInputPolicy SACPolicy",
    "stable_baselines3.td3.policies": "Actor CnnPolicy MultiInputPolicy TD3Policy",
    "torch.distributions.bernoulli": "Bernoulli",
    "torch.distributions.categorical": "Categorical",
    "torch.distributions.normal": "Normal",
    "torch.nn.modules.activation": "CELU ELU GELU GLU Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid "
    "Mish PReLU ReLU ReLU6 SELU SiLU Sigmoid Softmax Softplus Softsign Tanh",
    "torch.nn.modules.batchnorm": "BatchNorm1d BatchNorm2d",
    "torch.nn.modules.container": "ModuleDict ModuleList Sequential",
    "torch.nn.modules.conv": "Conv1d Conv2d",
    "torch.nn.modules.dropout": "Dropout",
    "torch.nn.modules.flatten": "Flatten",
    "torch.nn.modules.linear": "Identity Linear",
    "torch.nn.modules.normalization": "GroupNorm LayerNorm",
    "torch.nn.modules.pooling": "AvgPool2d MaxPool2d",
    "torch.optim.adadelta": "Adadelta",
    "torch.optim.adagrad": "Adagrad",
    "torch.optim.adam": "Adam",
    "torch.optim.adamax": "Adamax",
    "torch.optim.adamw": "AdamW",
    "torch.optim.asgd": "ASGD",
    "torch.optim.nadam": "NAdam",
    "torch.optim.radam": "RAdam",
    "torch.optim.rmsprop": "RMSprop",
    "torch.optim.rprop": "Rprop",
    "torch.optim.sgd": "SGD",
}
#: Classes whose instances a file may make and fill.
CLASSES: Final = frozenset(f"{module}:{name}" for module, names in _CLASSES.items() for name in names.split())
#: Classes and functions that a file may name only, to be used as arguments.
CONSTANTS: Final = frozenset(
    {"numpy:ndarray", "builtins:object"}
    | {f"builtins:{name}" for name in ("bool", "bytes", "complex", "dict", "float", "int", "list", "str", "tuple")}
    | {f"torch:{name}" for name in ("float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64")}
    | {"torch:uint8", "torch:bool", "numpy.random.bit_generator:SeedSequence"}
    | {f"numpy:{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
    | {f"numpy:{name}" for name in ("float16", "float32", "float64", "bool_", "bool")}
    | {f"numpy.random._{name.lower().removesuffix('dxsm')}:{name}" for name in _BIT_GENERATORS}
)
#: Kinds of numpy's dtypes that a file may hold: bool, integers, floats, complex, texts, bytes, and objects.
_KINDS: Final = frozenset("biufcUSO")


class RefusedError(Exception):
    """A file uses a vetted name in a way that no honest file does."""


def resolve(name: str) -> Any:
    """Import what a listed name stands for.

    :param name: ``"module:name"``
    """
    module, _, path = name.partition(":")
    found: Any = import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def require(condition: object, what: str) -> None:
    """Refuse a file.

    :param condition: what an honest file meets
    :param what: what is wrong otherwise
    :raises RefusedError: the condition is false
    """
    if not condition:
        raise RefusedError(what)


def brief(value: Any) -> str:
    """Return how a message calls a value of a file. The ``repr`` of an object may be endless, or fail.

    :param value: of any type
    """
    if value is None or isinstance(value, bool | float | str):
        return repr(value)[:100]
    if isinstance(value, int):
        return str(value) if abs(value) < 1 << 64 else "a huge number"
    return str(getattr(value, "__qualname__", f"a {type(value).__name__}"))[:100]


# ---------------------------------------------------------------- states of values


def set_state(instance: Any, state: Any) -> None:
    """Give a value its state, as the unpickler's BUILD does.

    :param instance: an instance of one of ``CLASSES``, or what one of ``CALLS`` has made
    :param state: what ``__getstate__`` or ``__reduce__`` returned
    :raises RefusedError: the state is not one that an honest file has
    """
    kind = type(instance)
    if kind in _STATES:
        _STATES[kind](instance, state)
    elif kind is _Seeds:
        _set_seeds(instance, state)
    elif isinstance(instance, np.random.BitGenerator):
        _set_bit_generator(instance, state)
    elif hasattr(kind, "__setstate__"):
        kind.__setstate__(instance, _checked(state, kind))
    else:
        attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
        vars(instance).update(_checked(attributes or {}, kind))
        for name, value in _checked(slots or {}, kind).items():
            object.__setattr__(instance, name, value)


def _checked(state: Any, kind: type) -> dict[str, Any]:
    require(type(state) in (dict, OrderedDict), "a state that is no dict")
    hiding = [key for key in state if hides_method(kind, key)]
    require(not hiding, f"a {kind.__name__} whose state has {str(hiding)[:200]}")
    return dict(state)


def _set_dtype(dtype: np.dtype[Any], state: Any) -> None:
    require(type(state) is tuple and len(state) >= 8 and state[1] in ("<", ">", "|", "="), "the state of a numpy dtype")
    require(state[2:5] == (None, None, None), "a numpy dtype with fields")
    sizes = (dtype.itemsize, dtype.alignment) if dtype.kind in "US" else (-1, -1)
    # Flags are the dtype's own: with those of a file, numpy would take bytes for addresses of objects.
    dtype.__setstate__((3, state[1], None, None, None, *sizes, dtype.flags))  # type: ignore[attr-defined]


def _set_array(array: np.ndarray[Any, Any], state: Any) -> None:
    require(type(state) is tuple and len(state) == 5 and array.shape == (0,), "the state of an array")
    _, shape, dtype, _, data = state
    require(isinstance(dtype, np.dtype) and dtype.kind in _KINDS and not dtype.fields, "the dtype of an array")
    require(type(shape) is tuple and all(type(n) is int and n >= 0 for n in shape), "the shape of an array")
    is_list = dtype.kind == "O"
    require(type(data) is (list if is_list else bytes), "the numbers of an array")
    require(len(data) == math.prod(shape) * (1 if is_list else dtype.itemsize), "the size of an array")
    array.__setstate__(state)


def _set_bit_generator(bits: np.random.BitGenerator, state: Any) -> None:
    state, seeds = state if type(state) is tuple and len(state) == 2 else (state, None)
    require(type(state) is dict, "the state of a random generator")
    set_bit_generator(bits, state)
    if isinstance(seeds, _Seeds) and isinstance(bits.__reduce__()[2], tuple):  # not with NumPy 1
        bits.__setstate__((bits.state, seeds.sequence))  # type: ignore[attr-defined]


def _set_generator(generator: np.random.Generator, state: Any) -> None:
    if state is not None:
        _set_bit_generator(generator.bit_generator, state)


_STATES: Final[Mapping[type, Callable[[Any, Any], None]]] = {
    **{type(np.dtype(code)): _set_dtype for code in "?bhilqBHILQefdgFDUSO"},
    np.ndarray: _set_array,
    np.random.Generator: _set_generator,
}


# ---------------------------------------------------------------- functions that make values


def _dtype(name: object, align: object = False, _copy: object = True) -> np.dtype[Any]:
    require(isinstance(name, str) and len(str(name)) <= 16, f"a numpy dtype {brief(name)}")
    dtype = np.dtype(str(name), bool(align), True)  # a copy: builtin ones are shared
    require(dtype.kind in _KINDS and not dtype.fields, f"a numpy dtype {brief(name)}")
    return dtype


def _empty_array(cls: object, shape: object, _code: object) -> np.ndarray[Any, Any]:
    require(cls is np.ndarray and shape == (0,), f"an array of type {brief(cls)}")
    return np.empty(0, np.int8)


def _array_of_buffer(buffer: Any, dtype: Any, shape: Any, order: Any, axis_order: Any = None) -> np.ndarray[Any, Any]:
    require(isinstance(dtype, np.dtype) and dtype.kind in _KINDS - {"O"}, f"an array of {brief(dtype)}")
    array = np.frombuffer(buffer, dtype).reshape(shape, order=order)
    return array if axis_order is None else array.transpose(axis_order)


def _scalar(dtype: Any, value: Any = b"") -> Any:
    require(isinstance(dtype, np.dtype) and dtype.kind in _KINDS - {"O"}, f"a number of {brief(dtype)}")
    require(isinstance(value, bytes) and len(value) == dtype.itemsize, f"a number of {brief(dtype)}")
    return np.frombuffer(value, dtype)[0]


def _bit_generator(name: object = "MT19937") -> np.random.BitGenerator:
    known = {key: getattr(np.random, key) for key in _BIT_GENERATORS}
    found = known.get(name) if isinstance(name, str) else name
    require(found in known.values(), f"a random generator {brief(name)}")
    made: np.random.BitGenerator = found(0)  # type: ignore[operator]
    return made


def _generator(bits: object = "MT19937", _constructor: object = None) -> np.random.Generator:
    made = bits if isinstance(bits, np.random.BitGenerator) else _bit_generator(bits)
    return np.random.Generator(made)


class _Seeds:
    """Stands for a SeedSequence until its state is known: the seeds from which a generator spawns others."""

    sequence: np.random.SeedSequence | None = None

    def __init__(self, *_: object) -> None:
        pass


def _set_seeds(seeds: _Seeds, state: Any) -> None:
    require(type(state) is tuple and len(state) == 5, "the state of a SeedSequence")
    entropy, n_spawned, _, pool_size, spawn_key = state
    require(
        all(type(n) is int and 0 <= n < 2**32 for n in (n_spawned, pool_size)) and pool_size <= MOST_SEEDS,
        "its numbers",
    )
    seeds.sequence = np.random.SeedSequence(
        entropy, spawn_key=spawn_key, pool_size=pool_size, n_children_spawned=n_spawned
    )


def _tensor(
    storage: Any, offset: int, size: Any, stride: Any, requires_grad: bool = False, *_hooks: object
) -> th.Tensor:
    require(isinstance(storage, th.storage.TypedStorage), "a tensor without storage")
    numbers = (offset, *size, *stride)
    require(all(type(n) is int and n >= 0 for n in numbers) and len(size) == len(stride), "a tensor's shape")
    tensor: th.Tensor = resolve("torch._utils:_rebuild_tensor_v2")(storage, 0, (0,), (1,), False, OrderedDict())
    held = tensor.untyped_storage()
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    require(math.prod(size) == 0 or (last + 1) * tensor.itemsize <= held.nbytes(), "a tensor outside its storage")
    return tensor.set_(held, offset, tuple(size), tuple(stride)).requires_grad_(bool(requires_grad))


def _parameter(data: Any, requires_grad: bool = True, *_hooks: object) -> nn.Parameter:
    require(isinstance(data, th.Tensor), "a parameter without tensor")
    return nn.Parameter(data, bool(requires_grad))


def _storage(data: Any) -> Any:
    require(isinstance(data, bytes) and data.startswith(_LEGACY), "a tensor's storage")
    require(not is_tarfile(BytesIO(data)), "a tensor's storage")  # old versions of torch trust tar files
    return th.load(BytesIO(data), weights_only=True, map_location="cpu")


def require_keys(keys: Iterable[Any]) -> None:
    """Require keys that Python can hash. Of tuples in tuples in tuples, it overflows its stack.

    :param keys: keys of a dict, or elements of a set
    """
    for key in keys:
        parts = key if isinstance(key, tuple) else (key,)
        require(not any(isinstance(part, tuple | frozenset) for part in parts), "a key of tuples in tuples")


def _ordered_dict(items: Iterable[Any] = ()) -> OrderedDict[Any, Any]:
    pairs = [tuple(item) for item in items]
    require_keys(key for key, _ in pairs)
    return OrderedDict(pairs)


def _deque(items: Iterable[Any] = (), maxlen: int | None = None) -> deque[Any]:
    return deque(items, maxlen)


def _defaultdict(factory: Any = None) -> defaultdict[Any, Any]:
    require(factory in (dict, list, None), f"a default dict of {brief(factory)}")
    return defaultdict(factory)


def _set(items: Iterable[Any] = ()) -> set[Any]:
    return set(_frozenset(items))


def _frozenset(items: Iterable[Any] = ()) -> frozenset[Any]:
    elements = list(items)
    require_keys(elements)
    return frozenset(elements)


def _bytearray(data: Any = b"") -> bytearray:
    require(isinstance(data, bytes), "bytes")
    return bytearray(data)


def _size(sizes: Iterable[int]) -> th.Size:
    return th.Size(sizes)


def _device(*arguments: Any) -> th.device:
    require(all(type(argument) in (str, int) for argument in arguments), f"a device {brief(arguments)}")
    return th.device(*arguments)


def _member_of(name: str) -> Callable[..., Enum]:
    def member(value: object) -> Enum:
        made: Enum = resolve(name)(value)
        return made

    return member


def _attribute(owner: Any, name: Any) -> Enum:
    """Look up a member of an Enum: some versions of Python pickle it that way."""
    members = [resolve(enum) for enum in _ENUMS]
    require(owner in members and name in owner.__members__, f"getattr({brief(owner)}, {brief(name)})")
    found: Enum = owner[name]
    return found


_ENUMS: Final = (
    "stable_baselines3.common.type_aliases:TrainFrequencyUnit",
    "stable_baselines3.her.goal_selection_strategy:GoalSelectionStrategy",
)
#: What ``CALLS`` make and :func:`set_state` fills.
MADE_BY_CALLS: Final = (np.dtype, np.ndarray, np.random.Generator, np.random.BitGenerator, _Seeds)
#: Functions that a file may call, and what is called in their place.
CALLS: Final[Mapping[str, Callable[..., Any]]] = {
    "builtins:bytearray": _bytearray,
    "builtins:frozenset": _frozenset,
    "builtins:getattr": _attribute,
    "builtins:set": _set,
    "collections:OrderedDict": _ordered_dict,
    "collections:defaultdict": _defaultdict,
    "collections:deque": _deque,
    "numpy.core.multiarray:_reconstruct": _empty_array,
    "numpy._core.multiarray:_reconstruct": _empty_array,
    "numpy.core.multiarray:scalar": _scalar,
    "numpy._core.multiarray:scalar": _scalar,
    "numpy.core.numeric:_frombuffer": _array_of_buffer,
    "numpy._core.numeric:_frombuffer": _array_of_buffer,
    "numpy.random._pickle:__bit_generator_ctor": _bit_generator,
    "numpy.random._pickle:__generator_ctor": _generator,
    "numpy.random.bit_generator:__pyx_unpickle_SeedSequence": _Seeds,
    "numpy:dtype": _dtype,
    "torch._utils:_rebuild_parameter": _parameter,
    "torch._utils:_rebuild_tensor_v2": _tensor,
    "torch.storage:_load_from_bytes": _storage,
    "torch:Size": _size,
    "torch:device": _device,
    **{name: _member_of(name) for name in _ENUMS},
}
