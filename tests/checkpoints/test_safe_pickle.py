"""Pickles of unknown origin: what honest ones hold loads, and nothing that hostile ones name runs."""

import collections
import functools
import importlib.util
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import LinearSchedule

from sb3_pg.baselines import LinearBaseline
from sb3_pg.checkpoints import json_values
from sb3_pg.checkpoints.safe_pickle import Vetted, loads
from sb3_pg.checkpoints.vetted import CALLS, CLASSES, CONSTANTS, resolve
from sb3_pg.errors import DamagedFileError, UntrustedFileError
from sb3_pg.learner import LearnerState


def seeded(space: spaces.Space[Any]) -> spaces.Space[Any]:
    space.seed(3)
    return space


VALUES: dict[str, Any] = {
    "box": seeded(spaces.Box(-1, 1, (2,))),
    "dict": spaces.Dict({"a": spaces.Discrete(3, start=1), "b": spaces.MultiBinary(2)}),
    "multi discrete": seeded(spaces.MultiDiscrete([2, 3])),
    "arrays": [np.arange(6).reshape(2, 3), np.array(["a", "bc"]), np.float32(2), np.array([True]), np.zeros((0, 3))],
    "containers": [(1, {2}), frozenset({3}), b"4", {5: 6}, {":a": 7}, collections.OrderedDict(a=8)],
    "deque": collections.deque([{"r": 1.0}], maxlen=3),
    "train_freq": TrainFreq(2, TrainFrequencyUnit.EPISODE),
    "classes": {"optimizer_class": th.optim.Adam, "activation_fn": th.nn.ReLU},
    "schedule": LinearSchedule(1.0, 0.0, 1.0),
    "noise": NormalActionNoise(np.zeros(2), np.ones(2)),
    "state": LearnerState(),
    "baseline": LinearBaseline(),
    "device": th.device("cuda:0"),
}


def same(a: Any, b: Any) -> bool:
    return bool(json_values.encode(a) == json_values.encode(b))


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("name", VALUES)
def test_honest_pickles_load(name: str, protocol: int) -> None:
    found = loads(pickle.dumps(VALUES[name], protocol), "file")
    assert type(found) is type(VALUES[name])
    assert same(found, VALUES[name])


@pytest.mark.parametrize("name", VALUES)
def test_values_go_through_json(name: str) -> None:
    text = json.dumps(json_values.encode(VALUES[name]))
    assert same(json_values.decode(json.loads(text), Vetted("file")), VALUES[name])


def test_random_generators_go_on_where_they_were() -> None:
    for name in ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"):
        generator = np.random.Generator(getattr(np.random, name)(5))
        generator.random(3)
        copy = loads(pickle.dumps(generator), "file")
        state = json_values.decode(json_values.encode(generator), Vetted("file"))
        expected = pickle.loads(pickle.dumps(generator)).random(5)
        np.testing.assert_array_equal(copy.random(5), expected)
        np.testing.assert_array_equal(state.random(5), expected)


def test_a_policy_with_its_optimizer_loads() -> None:
    model = th.nn.Sequential(th.nn.Linear(2, 2), th.nn.Tanh())
    optimizer = th.optim.Adam(model.parameters())
    model(th.ones(1, 2)).sum().backward()
    optimizer.step()
    model.zero_grad()
    found, its_optimizer = loads(cloudpickle.dumps((model, optimizer)), "file")
    assert its_optimizer.param_groups[0]["params"][0] is found[0].weight
    assert found[0].weight.equal(model[0].weight)


def test_every_listed_name_exists_and_none_has_a_destructor() -> None:
    for name in CLASSES | CONSTANTS:
        module = name.partition(":")[0]
        if module.startswith("rl_zoo3") and importlib.util.find_spec("rl_zoo3") is None:
            continue
        if module in ("numpy", "numpy.random._pcg64"):
            continue  # names differ between versions of NumPy
        found = resolve(name)
        assert not hasattr(found, "__del__"), name
        assert isinstance(found, type | th.dtype), name
    assert not CLASSES & CALLS.keys()
    assert not any(name.startswith(("os:", "functools:", "operator:", "subprocess:")) for name in CALLS)


# -------------------------------------------------------------------- hostile pickles


class Reduced:
    """An object whose pickle calls a function."""

    def __init__(self, *reduced: Any) -> None:
        self._reduced = reduced

    def __reduce__(self) -> Any:
        return self._reduced


def named(module: str, name: str) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode()


def calls(touch: str) -> dict[str, bytes]:
    """Pickles that would make the file ``touch`` if what they name were run."""
    text = f"V{touch}\n".encode()
    code = f"open({touch!r}, 'w')"
    skeleton = cloudpickle.dumps(lambda: 0)
    return {
        "os.system": b"cos\nsystem\n(Vtouch " + touch.encode() + b"\ntR.",
        "posix.system": b"cposix\nsystem\n(Vtouch " + touch.encode() + b"\ntR.",
        "eval": b"cbuiltins\neval\n(V" + code.encode() + b"\ntR.",
        "exec": b"cbuiltins\nexec\n(V" + code.encode() + b"\ntR.",
        "python 2": b"c__builtin__\neval\n(V" + code.encode() + b"\ntR.",
        "open": b"cbuiltins\nopen\n(" + text + b"Vw\ntR.",
        "dotted": b"\x80\x04\x8c\x07pathlib\x8c\x0aPath.touch\x93" + text + b"\x85R.",
        "vetted.dotted": b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.save\x93" + text + b"\x85R.",
        "inst": b"(" + text + b"Vw\nibuiltins\nopen\n.",
        "obj": b"(cbuiltins\nopen\n" + text + b"Vw\no.",
        "newobj": b"\x80\x02cpathlib\nPath\n" + text + b"\x85\x81.",
        "partial": pickle.dumps(Reduced(functools.partial, (open, touch, "w"))),
        "getattr": b"cbuiltins\ngetattr\n(cnumpy\nndarray\nVtofile\ntR.",
        "getattr of a class": b"cbuiltins\ngetattr\n(cstable_baselines3.common.policies\nActorCriticPolicy\nVload\ntR.",
        "reconstructor": b"ccopyreg\n_reconstructor\n(cbuiltins\nopen\ncbuiltins\nobject\nNtR.",
        "import": b"cbuiltins\n__import__\n(Vantigravity\ntR.",
        "cloudpickle": skeleton,
        "persistent id": b"Pbad\n.",
        "extension": b"\x82\x01.",
        "memo": b"cos\nsystem\nq\x00(Vtouch " + touch.encode() + b"\ntq\x01h\x00h\x01R.",
        "torch.load": b"ctorch\nload\n(" + text + b"tR.",
        "torch storage": pickle.dumps(Reduced(th.storage._load_from_bytes, (pickle.dumps(Reduced(eval, (code,))),))),
        "numpy.load": b"cnumpy\nload\n(" + text + b"tR.",
        "memmap": b"cnumpy\nmemmap\n(" + text + b"VuInt8\nVw+\ntR.",
        "state of a class": named("gymnasium.spaces.box", "Box")
        + b"}Vsample\n"
        + named("torch.optim.adam", "Adam")
        + b"sb.",
        "state of a function": named("collections", "deque") + b"}Va\nVb\nsb.",
        "state that hides a method": named("torch.nn.modules.linear", "Identity")
        + b")\x81}Vforward\n"
        + named("builtins", "dict")
        + b"sb.",
        "special state": named("gymnasium.spaces.box", "Box")
        + b")\x81}V__class__\n"
        + named("builtins", "dict")
        + b"sb.",
        "setstate": named("torch.nn.modules.linear", "Linear")
        + b")\x81}V__setstate__\n"
        + named("torch.optim.adam", "Adam")
        + b"sb}b.",
        "call of a class": named("stable_baselines3.common.buffers", "ReplayBuffer") + b"(I1\nI2\nI3\ntR.",
        "append to an object": named("torch.nn.modules.container", "ModuleList") + b")\x81I1\na.",
        "item of an object": named("torch.nn.modules.container", "ModuleDict") + b")\x81I1\nI2\ns.",
    }


def touching(touch: Path) -> dict[str, bytes]:
    return calls(str(touch))


@pytest.mark.parametrize("name", calls("x"))
def test_nothing_that_a_hostile_pickle_names_runs(name: str, tmp_path: Path) -> None:
    touch = tmp_path / "touched"
    with pytest.raises((UntrustedFileError, DamagedFileError), match=r"^field 'f' of the model "):
        loads(touching(touch)[name], "field 'f' of the model")
    assert not touch.exists()


@pytest.mark.parametrize("name", ["os.system", "eval", "open"])
def test_the_hostile_pickles_do_run_if_they_are_trusted(name: str, tmp_path: Path) -> None:
    touch = tmp_path / "touched"
    loads(touching(touch)[name], "file", trusted=True)
    assert touch.exists()


def _dtype_with(flags: int) -> bytes:
    """An array of objects whose dtype says that it holds numbers: NumPy would take the bytes for addresses."""

    class Dtype:
        def __reduce__(self) -> Any:
            return np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, flags)

    class Array:
        def __reduce__(self) -> Any:
            reconstruct = np.zeros(1).__reduce__()[0]
            return reconstruct, (np.ndarray, (0,), b"b"), (1, (1,), Dtype(), False, struct.pack("P", 1))

    return pickle.dumps(Array(), 4)


def _generator(name: str, inner: dict[str, int], outer: dict[str, int]) -> bytes:
    """A random generator with numbers that NumPy does not check."""
    state: Any = getattr(np.random, name)(1).state
    state = state | outer | {"state": state["state"] | inner}
    make = np.random.PCG64(1).__reduce__()[0]
    return pickle.dumps(Reduced(make, (name,), state))


def _fields() -> bytes:
    return pickle.dumps(np.zeros(2, [("a", object)]), 4)


DAMAGED: dict[str, Callable[[], bytes]] = {
    "addresses for objects": lambda: _dtype_with(0),
    "fields of objects": _fields,
    "short data": lambda: pickle.dumps(np.arange(9), 4).replace(struct.pack("<q", 3), b""),
    "position in a key": lambda: _generator("MT19937", {"pos": 9999}, {}),
    "position in a buffer": lambda: _generator("Philox", {}, {"buffer_pos": -1}),
    "huge bytes": lambda: b"\x80\x05\x8e" + struct.pack("<Q", 2**60) + b".",
    "huge byte array": lambda: b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
    "huge frame": lambda: b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b".",
    "tuples in tuples": lambda: b"}" + b")" + b"\x85" * 300_000 + b"Ns.",
    "empty": lambda: b"",
    "truncated": lambda: pickle.dumps(VALUES["box"])[:-10],
    "no pickle": lambda: b"PK\x03\x04",
    "numbers with a million digits": lambda: b"I" + b"9" * 1_000_000 + b"\n.",
    "protocol": lambda: b"\x80\x63.",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_pickles_are_errors(name: str) -> None:
    with pytest.raises(DamagedFileError, match=r"^replay\.pkl cannot be read: "):
        loads(DAMAGED[name](), "replay.pkl")


def test_tensors_do_not_reach_outside_their_storage() -> None:
    tensor = th.arange(4.0)
    storage = tensor.__reduce_ex__(2)
    rebuild, arguments = storage[0], list(storage[1])
    assert arguments[1:4] == [0, (4,), (1,)]
    for place, wrong in ((1, 5), (2, (400,)), (3, (100,)), (2, (-1,))):
        changed = [*arguments]
        changed[place] = wrong
        with pytest.raises(DamagedFileError, match="a tensor"):
            loads(pickle.dumps(Reduced(rebuild, tuple(changed))), "file")


def test_random_bit_flips(tmp_path: Path) -> None:
    touch = tmp_path / "touched"
    honest = pickle.dumps(VALUES)
    rng = np.random.default_rng(0)
    n_errors = 0
    for _ in range(300):
        changed = bytearray(honest)
        changed[rng.integers(len(changed))] ^= 1 << rng.integers(8)
        try:
            loads(bytes(changed), "file")
        except (UntrustedFileError, DamagedFileError) as error:
            n_errors += str(error).startswith("file ")
    assert n_errors > 50
    assert not touch.exists()


class Own:
    """A class of the user."""

    def __init__(self) -> None:
        self.value = 3


def test_classes_of_the_user_are_named() -> None:
    data = pickle.dumps(Own())
    with pytest.raises(UntrustedFileError, match=r"test_safe_pickle\.Own.*allow=\[Own\].*trusted=True"):
        loads(data, "file")
    assert loads(data, "file", allow=[Own]).value == 3
    assert loads(data, "file", trusted=True).value == 3


def test_messages_do_not_print_what_a_file_holds() -> None:
    doubled = b"]" + b"".join(b"q" + bytes([i]) + b"](h" + bytes([i]) + b"h" + bytes([i]) + b"e" for i in range(60))
    with pytest.raises(DamagedFileError, match="a call of a list"):
        loads(doubled + b")R.", "file")
