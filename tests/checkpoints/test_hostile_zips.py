"""Zips of unknown origin: nothing that they name runs, every error names the file, and the model stays as it was."""

import base64
import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_pg import ActorCritic
from sb3_pg.checkpoints.model_file import MANIFEST
from sb3_pg.errors import DamagedFileError, UntrustedFileError
from tests.checkpoints.test_safe_pickle import touching

Entries = dict[str, bytes]
RELEASED = Path(__file__).parent / "sb3_releases" / "a2c-2.0.0.zip"


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("honest") / "model.zip"
    ActorCritic("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [4]}, device="cpu").learn(10).save(path)
    return path


def entries_of(path: Path) -> Entries:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name != MANIFEST}


def write(path: Path, entries: Entries, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, entry in entries.items():
            archive.writestr(name, entry)
    return path


def with_field(entries: Entries, name: str, value: Any) -> Entries:
    return entries | {"data": json.dumps(json.loads(entries["data"]) | {name: value}).encode()}


def pickled(data: bytes) -> dict[str, str]:
    return {":type:": "x", ":serialized:": base64.b64encode(data).decode()}


def tensors(value: Any) -> bytes:
    held = io.BytesIO()
    th.save(value, held)
    return held.getvalue()


def test_code_in_every_pickled_field(tmp_path: Path) -> None:
    touch = tmp_path / "touched"
    entries = entries_of(RELEASED)
    fields = [name for name, value in json.loads(entries["data"]).items() if isinstance(value, dict)]
    assert {"policy_class", "observation_space", "lr_schedule", "_last_obs", "ep_info_buffer"} <= set(fields)
    for name in [*fields, "unknown"]:
        changed = with_field(entries, name, pickled(touching(touch)["os.system"]))
        path = write(tmp_path / f"{name}.zip", changed)
        if name == "lr_schedule":  # follows from learning_rate
            ActorCritic.load(path, device="cpu")
        else:
            with pytest.raises(UntrustedFileError, match=f"field '{name}' of .*{name}.zip holds os.system"):
                ActorCritic.load(path, device="cpu")
        assert not touch.exists()
    ActorCritic.load(tmp_path / "unknown.zip", device="cpu", trusted=True)
    assert touch.exists()  # the code does run if the file is trusted


CHANGED: dict[str, Callable[[Entries], Entries]] = {
    "no data": lambda entries: {name: entry for name, entry in entries.items() if name != "data"},
    "no policy": lambda entries: {name: entry for name, entry in entries.items() if name != "policy.pth"},
    "no observation space": lambda entries: with_field(entries, "observation_space", None),
    "no json": lambda entries: entries | {"data": b"\xff{"},
    "list": lambda entries: entries | {"data": b"[1]"},
    "deep json": lambda entries: entries | {"data": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"},
    "deep values": lambda entries: entries | {"data": b'{"a":' + b'{":tuple:": [' * 400 + b"1" + b"]}" * 400 + b"}"},
    "many digits": lambda entries: entries | {"data": b'{"a":' + b"9" * 100_000 + b"}"},
    "unknown word": lambda entries: with_field(entries, "a", {":code:": "x"}),
    "two words": lambda entries: with_field(entries, "a", {":tuple:": [], ":set:": []}),
    "array with a wrong size": lambda entries: with_field(
        entries, "a", {":array:": "AAAA", "dtype": "<f8", "shape": [9**9]}
    ),
    "array of objects": lambda entries: with_field(
        entries, "a", {":array:": "AAAAAAAAAAA=", "dtype": "|O", "shape": [1]}
    ),
    "unlisted class": lambda entries: with_field(entries, "policy_class", {":class:": "subprocess:Popen"}),
    "unlisted call": lambda entries: with_field(entries, "a", {":call:": "os:system", "arguments": ["true"]}),
    "call of a class": lambda entries: with_field(
        entries, "a", {":call:": "stable_baselines3.common.buffers:ReplayBuffer", "arguments": [1, 2, 3]}
    ),
    "env": lambda entries: with_field(entries, "env", "antigravity:CartPole-v1"),
    "path traversal": lambda entries: entries | {"../../escaped": b"x"},
    "absolute path": lambda entries: entries | {"/tmp/escaped.pth": tensors({})},
    "dunder entry": lambda entries: entries | {"policy.__class__.pth": tensors({"x": th.ones(1)})},
    "unknown entry": lambda entries: entries | {"evil.pkl": b"x"},
    "unknown module": lambda entries: entries | {"logger.pth": tensors({"x": th.ones(1)})},
    "unknown tensor": lambda entries: entries | {"pytorch_variables.pth": tensors({"policy.training": th.ones(1)})},
    "many entries": lambda entries: entries | {f"a{i}.pth": b"" for i in range(2000)},
    "bomb": lambda entries: entries | {"system_info.txt": bytes(200 * 2**20)},
    "code in weights": lambda entries: entries | {"policy.pth": b"\x80\x02cos\nsystem\n(Vtrue\ntR."},
    "weights that are no dict": lambda entries: entries | {"policy.pth": tensors([th.ones(1)])},
    "packed weights": lambda entries: entries | {"policy.pth": _packed(entries["policy.pth"])},
    "weights of another shape": lambda entries: (
        entries | {"policy.pth": tensors({"mlp_extractor.policy_net.0.weight": th.ones(3, 3)})}
    ),
    "swapped": lambda entries: (
        entries | {"policy.pth": entries["policy.optimizer.pth"], "policy.optimizer.pth": entries["policy.pth"]}
    ),
}


def _packed(data: bytes) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as plain, zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    return held.getvalue()


@pytest.mark.parametrize("name", CHANGED)
def test_changed_zips_are_errors(name: str, honest: Path, tmp_path: Path) -> None:
    compression = zipfile.ZIP_DEFLATED if name == "bomb" else zipfile.ZIP_STORED
    path = write(tmp_path / "changed.zip", CHANGED[name](entries_of(honest)), compression)
    with pytest.raises((UntrustedFileError, DamagedFileError, ValueError)) as caught:
        ActorCritic.load(path, device="cpu")
    assert str(path) in str(caught.value), caught.value
    assert not (tmp_path.parent.parent / "escaped").exists()


@pytest.mark.parametrize(
    "name", [name for name in CHANGED if "weights" in name or "entr" in name or name in ("swapped", "bomb")]
)
def test_parameters_stay_as_they_were(name: str, honest: Path, tmp_path: Path) -> None:
    compression = zipfile.ZIP_DEFLATED if name == "bomb" else zipfile.ZIP_STORED
    path = write(tmp_path / "changed.zip", CHANGED[name](entries_of(honest)), compression)
    model = ActorCritic("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [4]}, device="cpu").learn(10)
    before = tensors(model.get_parameters())
    with pytest.raises(ValueError, match=r"changed\.zip"):
        model.set_parameters(str(path), device="cpu")
    assert tensors(model.get_parameters()) == before
    model.learn(10)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["action_net.weight", "value_net.bias"])
def test_weights_that_are_not_finite(name: str, value: float, honest: Path, tmp_path: Path) -> None:
    entries = entries_of(honest)
    state = th.load(io.BytesIO(entries["policy.pth"]), weights_only=True)
    state[name].flatten()[0] = value
    path = write(tmp_path / "changed.zip", entries | {"policy.pth": tensors(state)})
    for load in (
        lambda: ActorCritic.load(path, device="cpu"),
        lambda: ActorCritic.load(honest, device="cpu").set_parameters(str(path)),
    ):
        with pytest.raises(ValueError, match=rf"policy\.{name} in .*changed\.zip is {value}"):
            load()


def test_a_manifest_shows_a_changed_entry(honest: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(honest) as archive:
        manifest = archive.read(MANIFEST)
    entries = entries_of(honest) | {MANIFEST: manifest}
    ActorCritic.load(write(tmp_path / "same.zip", entries), device="cpu")
    other = with_field(entries, "gamma", 0.5)
    with pytest.raises(DamagedFileError, match=r"other\.zip cannot be read: it holds another data than was saved"):
        ActorCritic.load(write(tmp_path / "other.zip", other), device="cpu")


@pytest.mark.parametrize("kind", ["ours", "SB3's"])
def test_truncated_files_and_random_bit_flips(kind: str, honest: Path, tmp_path: Path) -> None:
    source = honest if kind == "ours" else RELEASED
    whole, path = source.read_bytes(), tmp_path / "changed.zip"
    rng = np.random.default_rng(0)
    changes = [whole[:n] for n in rng.integers(0, len(whole), 20)]
    for _ in range(200):
        changed = bytearray(whole)
        changed[rng.integers(len(changed))] ^= 1 << rng.integers(8)
        changes.append(bytes(changed))
    n_errors = n_loaded = 0
    for content in changes:
        path.write_bytes(content)
        try:
            ActorCritic.load(path, device="cpu")
        except ValueError as error:
            n_errors += str(path) in str(error)
        else:
            n_loaded += 1
    assert n_errors + n_loaded == len(changes)
    assert n_errors > 150  # a flip in a date or the like does no harm


def test_a_size_that_is_declared_is_not_allocated(honest: Path, tmp_path: Path) -> None:
    whole = bytearray(honest.read_bytes())
    central = whole.rindex(b"PK\x01\x02")
    whole[central + 24 : central + 28] = struct.pack("<I", 2**32 - 2)  # uncompressed size
    path = tmp_path / "changed.zip"
    path.write_bytes(whole)
    with pytest.raises(DamagedFileError, match=r"changed\.zip cannot be read: it holds .* bytes, more than"):
        ActorCritic.load(path, device="cpu")


def test_files_that_are_no_zip(tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    for content in (b"", b"text", touching(tmp_path / "touched")["os.system"]):
        path.write_bytes(content)
        with pytest.raises(DamagedFileError, match=r"model\.zip cannot be read"):
            ActorCritic.load(path, device="cpu")
    with pytest.raises(FileNotFoundError, match=r"missing\.zip"):
        ActorCritic.load(tmp_path / "missing")
    assert not (tmp_path / "touched").exists()


IDENTITY = {":object:": "torch.nn.modules.linear:Identity"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("set_parameters", {":class:": "builtins:dict"}),
        ("_setup_model", {":class:": "builtins:dict"}),
        ("train", IDENTITY),
        ("policy_aliases", {}),
        ("groups", 3),
        ("gamma", "x"),
        ("gamma", 3),
        ("rollout_buffer_kwargs", {"a": 1}),
        ("policy_class", "x"),
        ("learner_state", IDENTITY),
        ("anchor", IDENTITY),
        ("anchor", 3),
        ("anchor", {":object:": "sb3_pg.demonstrations.anchors:KLAnchor"}),
        ("anchor", {":object:": "sb3_pg.demonstrations.anchors:KLAnchor", "state": {"require_valid": 1}}),
        ("anchor", {":object:": "sb3_pg.demonstrations.anchors:DemonstrationLoss", "state": {"path": "demos.npz"}}),
        ("action_noise", IDENTITY),
        ("observation_space", IDENTITY),
        ("_stats_window_size", -1),
        ("_timesteps", True),
        ("verbose", {":array:": "", "dtype": "<f4", "shape": [0]}),
        ("x", {":serialized:": "aa", ":class:": []}),
    ],
)
def test_attributes_that_no_model_has(name: str, value: Any, honest: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "model.zip", with_field(entries_of(honest), name, value))
    with pytest.raises(DamagedFileError, match=rf"{path}.* cannot be read"):
        ActorCritic.load(path, device="cpu")


@pytest.mark.parametrize(
    "name", ["checkpointer", "_resumption", "_collector", "_logger", "_vec_normalize_env", "policy"]
)
def test_attributes_of_a_process_are_not_read(name: str, honest: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "model.zip", with_field(entries_of(honest), name, IDENTITY))
    assert ActorCritic.load(path, env="CartPole-v1", device="cpu").learn(10).num_timesteps == 10


BIG = th.zeros(3)
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "eps of policy.optimizer is 'a'": lambda state: state["param_groups"][0].update(eps="a"),
    "centered of policy.optimizer is True": lambda state: state["param_groups"][0].update(centered=True),
    "differentiable of policy.optimizer is True": lambda state: state["param_groups"][0].update(differentiable=True),
    "weight_decay of policy.optimizer is a Tensor": lambda state: state["param_groups"][0].update(
        weight_decay=th.zeros(3)
    ),
    "IndexError|other groups": lambda state: state.update(param_groups=[]),
    "square_avg of policy.optimizer has the shape": lambda state: state["state"][0].update(square_avg=th.zeros(7)),
    "a tensor larger than its numbers": lambda state: state["state"][0].update(square_avg=th.zeros(1).expand(10**12)),
}


@pytest.mark.parametrize("why", OPTIMIZERS)
def test_states_that_do_not_fit_the_optimizer(why: str, honest: Path, tmp_path: Path) -> None:
    entries = entries_of(honest)
    state = th.load(io.BytesIO(entries["policy.optimizer.pth"]), weights_only=True)
    OPTIMIZERS[why](state)
    path = write(tmp_path / "model.zip", entries | {"policy.optimizer.pth": tensors(state)})
    model = ActorCritic.load(honest, device="cpu")
    before = model.get_parameters()
    for load in (lambda: ActorCritic.load(path, device="cpu"), lambda: model.set_parameters(str(path))):
        with pytest.raises(DamagedFileError, match=rf"{path}.*({why})"):
            load()
    for name, tensor in model.get_parameters()["policy"].items():
        assert th.equal(tensor, before["policy"][name])


def test_nothing_is_before_the_tensors(honest: Path, tmp_path: Path) -> None:
    entries = entries_of(honest)
    path = write(tmp_path / "model.zip", entries | {"policy.pth": b"junk" + entries["policy.pth"]})
    with pytest.raises(DamagedFileError, match=r"policy\.pth in .*something before the tensors"):
        ActorCritic.load(path, device="cpu")
