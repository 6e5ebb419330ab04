"""Attributes as plain data, and back."""

import io
import pickle
import random
import threading
from collections import OrderedDict, deque
from enum import Enum, Flag
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils import EzPickle

from sb3_pg.envs.state.encoding import CannotSaveError, Decoder, Encoder
from tests.envs.state.exactness import PlainUnpickler, comparable, refuse


class Owner:
    """An object with any attributes."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


def restored(owner: Owner, fresh: Owner | None = None, unpickle: Any = refuse) -> Any:
    """An object with the attributes of another one, which were in a file."""
    encoded = Encoder([owner], with_models=True).attributes(owner, ())
    file = pickle.dumps(encoded)
    new = Owner() if fresh is None else fresh

    Decoder([new], unpickle).set_attributes(new, PlainUnpickler(io.BytesIO(file)).load())
    return new


class Color(Enum):
    RED = 1
    BLUE = 2


class Rights(Flag):
    READ = 1
    WRITE = 2


PLAIN: dict[str, Any] = {
    "scalars": [None, True, 3, 10**40, 0.1, float("inf"), "text", b"bytes"],
    "numpy": [np.float32(0.1), np.int64(-3), np.bool_(True), np.str_("a"), np.datetime64("2020-01-01")],
    "tuple": (1, (2.0, [3]), ()),
    "dict": {"a": {1: [2]}, (1, 2): None, 3.5: "x"},
    "ordered": OrderedDict([("b", 1), ("a", [2])]),
    "sets": [{1, 2}, frozenset({"a"}), {(1, 2)}],
    "deque": deque([1, [2], 3], maxlen=5),
    "arrays": [np.arange(3), np.zeros((0, 4)), np.array(2.5), np.array(["a", "bc"])],
    "structured": np.array([(1, 2.0)], dtype=[("a", int), ("b", float)]),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_values(name: str) -> None:
    value = restored(Owner(value=PLAIN[name])).value
    assert type(value) is type(PLAIN[name])
    assert repr(value) == repr(PLAIN[name])


def test_excluded_attributes() -> None:
    owner = Owner(a=1, b=2, c=[3])
    assert Encoder([owner], with_models=False).attributes(owner, {"b", "c"}) == {"a": 1}


def test_layout_of_arrays() -> None:
    value = restored(Owner(value=np.asfortranarray(np.arange(6.0).reshape(2, 3)))).value
    assert value.flags.f_contiguous
    assert not value.flags.c_contiguous


def test_an_object_that_is_met_twice_stays_one() -> None:
    array, generator, items = np.arange(4), np.random.default_rng(0), [1, [2]]
    thing = SimpleNamespace(generator=generator)
    owner = Owner(a=array, b=[array], c={"generator": generator}, d=generator, e=items, f=(items,), g=thing)
    new = restored(owner, Owner(g=SimpleNamespace()))
    assert new.b[0] is new.a is not array
    assert new.d is new.c["generator"] is new.g.generator is not generator
    assert new.f[0] is new.e


def test_cycles_and_references_to_the_owner() -> None:
    items: list[Any] = [1]
    items.append(items)
    owner = Owner(items=items)
    owner.child = Owner(parent=owner)  # type: ignore[attr-defined]
    new = restored(owner, Owner(child=Owner()))
    assert new.items[1] is new.items
    assert new.child.parent is new


def test_a_view_shows_later_changes() -> None:
    whole = np.arange(12.0).reshape(3, 4)
    new = restored(Owner(row=whole[1], column=whole[::-1, 2], part=whole[1:, :2], whole=whole))
    assert np.array_equal(new.row, whole[1])
    assert np.array_equal(new.column, whole[::-1, 2])
    new.whole[:] = -1
    assert (new.row == -1).all()
    assert (new.column == -1).all()
    assert (new.part == -1).all()


def test_a_view_stays_inside_its_memory() -> None:
    item = ("view", np.zeros(4), "<f8", 0, (100,), (8,))
    with pytest.raises((TypeError, ValueError), match=r"buffer|strides"):
        Decoder([], refuse).decode(item)
    with pytest.raises(ValueError, match=r"dtype of a saved array must not be \|O"):
        Decoder([], refuse).decode(("view", np.zeros(4), "|O", 0, (1,), (8,)))


def test_memory_of_another_library_is_written_in_place() -> None:
    foreign = [np.frombuffer(bytearray(24)) for _ in range(2)]
    foreign[0][:] = 1, 2, 3
    fresh = Owner(value=foreign[1])
    assert restored(Owner(value=foreign[0]), fresh).value is foreign[1]
    assert list(foreign[1]) == [1, 2, 3]


@pytest.mark.parametrize("bits", ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"])
def test_generators(bits: str) -> None:
    generator = np.random.Generator(getattr(np.random, bits)(5))
    generator.spawn(2)
    generator.integers(10, size=3, dtype=np.int32)  # may leave half a number in the generator
    legacy, python = np.random.RandomState(1), random.Random(2)
    legacy.normal()
    python.gauss()
    new = restored(Owner(generator=generator, legacy=legacy, python=python))
    assert (
        new.generator.integers(10, size=9, dtype=np.int32).tolist()
        == generator.integers(10, size=9, dtype=np.int32).tolist()
    )
    assert new.generator.spawn(1)[0].random() == generator.spawn(1)[0].random()
    assert new.legacy.normal(size=3).tolist() == legacy.normal(size=3).tolist()
    assert [new.python.gauss() for _ in range(3)] == [python.gauss() for _ in range(3)]


SPACE = spaces.Dict({"a": spaces.Discrete(9), "b": spaces.Tuple([spaces.Box(-1, 1, (2,)), spaces.MultiBinary(3)])})


def test_spaces_stay_and_draw_the_same() -> None:
    space, other = (spaces.Dict(dict(SPACE.spaces)) for _ in range(2))
    space = pickle.loads(pickle.dumps(space))
    space.seed(3)
    space.sample()
    fresh = Owner(space=other)
    new = restored(Owner(space=space), fresh)
    assert new.space is other
    assert comparable([new.space.sample() for _ in range(3)]) == comparable([space.sample() for _ in range(3)])


def test_a_space_that_has_not_drawn() -> None:
    other = spaces.Discrete(9, seed=1)
    assert restored(Owner(space=spaces.Discrete(9)), Owner(space=other)).space is other
    state = vars(other)["_np_random"]
    assert state is None


def test_objects_are_changed_in_place_or_made_of_a_class_that_the_caller_loads() -> None:
    owner = Owner(child=Owner(n=3), color=Color.BLUE)
    fresh = Owner(child=Owner(n=1, other=2), color=Color.RED)
    child = fresh.child  # type: ignore[attr-defined]
    new = restored(owner, fresh)
    assert new.child is child
    assert new.child.n == 3
    assert new.color is Color.BLUE
    with pytest.raises(AssertionError, match="is not plain data"):
        restored(owner, Owner(child=None, color=None))
    made = restored(owner, Owner(child=None, color=None), pickle.loads)
    assert made.child.n == 3
    assert made.color is Color.BLUE


def test_a_class_that_is_none() -> None:
    item: Any = ("object", "tests.Owner", pickle.dumps(len), {})
    with pytest.raises(ValueError, match=r"tests\.Owner must be a class, got <built-in function len>"):
        Decoder([], pickle.loads).decode(item)


def test_objects_that_were_two_stay_two() -> None:
    child = Owner(n=0)
    new = restored(Owner(a=Owner(n=1), b=Owner(n=2)), Owner(a=child, b=child), pickle.loads)
    assert (new.a.n, new.b.n) == (1, 2)


class Constructed(EzPickle):
    """Pickles its arguments only."""

    def __init__(self, n: int) -> None:
        EzPickle.__init__(self, n)
        self.n = n


def test_attributes_of_what_pickles_its_arguments_only() -> None:
    value = Constructed(1)
    value.n = 5
    assert restored(Owner(value=value), Owner(value=Constructed(1))).value.n == 5


def test_what_can_only_be_pickled() -> None:
    values = Fraction(1, 3), Rights.READ | Rights.WRITE, np.array([None, "a"]), slice(1, 2), 2j
    owner = Owner(values=values)
    with pytest.raises(AssertionError, match="is not plain data"):
        restored(owner)
    assert repr(restored(owner, unpickle=pickle.loads).values) == repr(values)


class Reduced:
    def __init__(self, inside: Any) -> None:
        self.inside = inside

    def __reduce__(self) -> Any:
        return Reduced, (self.inside,)


class Broken:
    def __reduce__(self) -> Any:
        raise RuntimeError("not today")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (threading.Lock(), r"Owner.value has a lock, which can be neither copied nor pickled"),
        ([{"a": iter("text" for _ in range(2))}], "Owner.value has a generator, which can be neither"),
        (Broken(), r"Owner.value has a Broken, which can be neither copied nor pickled \(not today\)"),
        (Reduced(threading.Lock()), "Owner.value has a Reduced, which can be neither copied nor pickled"),
    ],
)
def test_what_cannot_be_saved(value: Any, message: str) -> None:
    owner = Owner(first=[1, 2], value=value)
    encoder = Encoder([owner], with_models=False)
    with pytest.raises(CannotSaveError, match=message):
        encoder.attributes(owner, ())
    assert encoder.attributes(owner, {"value"}) == {"first": ("list", [1, 2])}  # as if nothing had been met before
    assert encoder.random_states(owner) == {}


def test_a_pickle_that_would_make_two_objects_of_one() -> None:
    generator = np.random.default_rng(0)
    owner = Owner(generator=generator, value=Reduced(generator))
    with pytest.raises(CannotSaveError, match=r"Owner\.value can only be pickled, and shares a Generator"):
        Encoder([owner], with_models=False).attributes(owner, ())
    own = Owner()
    own.value = Reduced(own)  # type: ignore[attr-defined]
    with pytest.raises(CannotSaveError, match=r"Owner\.value can only be pickled, and shares a Owner"):
        Encoder([own], with_models=False).attributes(own, ())


def test_too_many_levels() -> None:
    owner = Owner(value=None)
    for _ in range(5000):
        owner.value = [owner.value]  # type: ignore[attr-defined]
    with pytest.raises(CannotSaveError, match=r"Owner\.value has too many objects inside each other"):
        Encoder([owner], with_models=False).attributes(owner, ())


def test_functions_files_and_drawings_are_left_out(tmp_path: Any) -> None:
    pygame = pytest.importorskip("pygame")
    with (tmp_path / "file").open("w") as file:
        owner = Owner(
            f=len, g=lambda: 1, module=gym, cls=Owner, file=file, surface=pygame.Surface((2, 2)), h=[print, 1]
        )
        fresh = Owner(surface=3, h=["print", 2])
        new = restored(owner, fresh)
    assert vars(new) == {"surface": 3, "h": ["print", 1]}


def test_state_of_pygame() -> None:
    pygame = pytest.importorskip("pygame")
    assert restored(Owner(rect=pygame.Rect(1, 2, 3, 4)), unpickle=pickle.loads).rect == pygame.Rect(1, 2, 3, 4)
