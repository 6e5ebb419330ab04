"""The zip of a model, in SB3's layout, and the pickle of a replay buffer."""

import io
import json
import pathlib
import pickle
import re
import warnings
import zipfile
from base64 import b64decode, b64encode
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from hashlib import sha256
from typing import Any, BinaryIO, Final, NamedTuple

import cloudpickle  # type: ignore[import-untyped]
import stable_baselines3 as sb3
import torch as th
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.utils import get_device, get_system_info

from sb3_pg.checkpoints import json_values, safe_pickle
from sb3_pg.checkpoints.atomic import write_atomically
from sb3_pg.checkpoints.renamed_modules import current_name
from sb3_pg.checkpoints.safe_pickle import Vetted, named, read_checked
from sb3_pg.checkpoints.vetted import require, resolve
from sb3_pg.errors import DamagedFileError, UntrustedFileError

Path = str | pathlib.Path | io.BufferedIOBase
#: The zip's own table of contents: format, names of pickled fields, hashes of the other entries.
MANIFEST: Final = "sb3_pg.json"
#: Largest size of all entries of an untrusted zip together, unpacked, bytes.
MOST_BYTES: Final = 16 * 2**30
#: How often larger than the zip its entries may be. Below _SMALL bytes they may be larger.
MOST_EXPANSION: Final = 100
_SMALL: Final = 64 * 2**20
_MOST_ENTRIES: Final = 1000
_VARIABLES: Final = ("pytorch_variables.pth", "tensors.pth")
_ENTRY: Final = re.compile(
    r"data|_stable_baselines3_version|system_info\.txt|sb3_pg\.json|[A-Za-z_]\w*(\.[A-Za-z_]\w*)*\.pth"
)
#: Fields that follow from others. They are not read from an untrusted file.
RECOMPUTED: Final = frozenset({"lr_schedule"})


class Contents(NamedTuple):
    """What the zip of a model holds.

    :param data: attributes of the model
    :param params: name of a module or optimizer -> its state dict
    :param variables: name of a tensor -> the tensor
    :param system_info: system on which the model was saved; None if unknown
    """

    data: dict[str, Any]
    params: dict[str, dict[str, Any]]
    variables: dict[str, th.Tensor]
    system_info: bytes | None


# ---------------------------------------------------------------- reading


class NamedBytes(io.BytesIO):
    """A file in memory, with the name that errors call it.

    :param data: its content
    :param name: its name
    """

    def __init__(self, data: bytes, name: str | pathlib.Path) -> None:
        super().__init__(data)
        self.name = str(name)


def name_of(path: Path) -> str:
    """Return how errors call a file."""
    return str(path) if isinstance(path, str | pathlib.Path) else str(getattr(path, "name", "the file"))


def read_model(
    path: Path,
    *,
    replaced: Mapping[str, Any] | None = None,
    device: th.device | str = "auto",
    with_data: bool = True,
    trusted: bool = False,
    allow: Collection[type] = (),
) -> Contents:
    """Read the zip of a model. Unless it is trusted, no code runs that the zip names.

    :param path: path, without ``.zip`` too, or an open file
    :param replaced: attribute -> its value, instead of that in the zip
    :param device: where to put tensors
    :param with_data: whether to read the attributes
    :param trusted: run whatever pickles in the zip say, and accept any size
    :param allow: classes and functions of the user that the zip may name
    :raises UntrustedFileError: the zip names a class or function that is not known to be harmless
    :raises DamagedFileError: it is no zip, is damaged or too large, or holds what no model has
    :raises FileNotFoundError: there is no such file
    """
    if replaced is not None and not isinstance(replaced, dict):
        raise ValueError("custom_objects argument must be a dict or None")
    file, what = open_path(path, "r", suffix="zip"), name_of(path)
    try:
        entries = read_checked(lambda: _read_entries(file, trusted), what)
    finally:
        if isinstance(path, str | pathlib.Path):
            file.close()
    fields = {}
    if with_data:
        require_entry(entries, "data", what)
        fields = read_checked(lambda: json.loads(entries["data"].decode()), f"'data' in {what}")
        if not isinstance(fields, dict):
            raise DamagedFileError(f"'data' in {what}", "it is not a dict")
    data = {}
    for name, value in fields.items():
        if replaced is not None and name in replaced:
            data[name] = replaced[name]
        elif trusted or name not in RECOMPUTED:
            _read_field(data, name, value, f"field {name!r} of {what}", trusted, allow)
    read = partial(_read_tensors, device=get_device(device))
    tensors = {
        name: read_checked(partial(read, entry), f"{name} in {what}")
        for name, entry in entries.items()
        if name.endswith(".pth")
    }
    variables: dict[str, th.Tensor] = {}
    for name in _VARIABLES:
        variables |= tensors.pop(name, {})
    params = {name.removesuffix(".pth"): value for name, value in tensors.items()}
    return Contents(data, params, variables, entries.get("system_info.txt"))


def require_entry(entries: Mapping[str, bytes], name: str, what: str) -> None:
    """Require that a zip has an entry.

    :raises DamagedFileError: it has not
    """
    if name not in entries:
        raise DamagedFileError(what, f"it has no entry {name!r}")


def _read_entries(file: BinaryIO, trusted: bool) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        if not trusted:
            packed = file.seek(0, io.SEEK_END)
            total = sum(info.file_size for info in infos)
            most = min(MOST_BYTES, max(_SMALL, MOST_EXPANSION * packed))
            require(len(infos) <= _MOST_ENTRIES, f"{len(infos)} entries, more than {_MOST_ENTRIES}")
            require(total <= most, f"{total:,} bytes, more than {most:,}; trusted=True lifts the limit")
        names = [info.filename for info in infos]
        require(len(set(names)) == len(names), "an entry twice")
        entries = {}
        for info in infos:
            is_known = _ENTRY.fullmatch(info.filename)
            require(is_known or trusted, f"an entry {info.filename!r}, which no model has")
            require(info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED), "an unusual compression")
            if is_known:
                entries[info.filename] = archive.read(info)
    if MANIFEST in entries:
        hashes = json.loads(entries[MANIFEST])["sha256"]
        for name in entries.keys() - {MANIFEST}:
            require(hashes.get(name) == sha256(entries[name]).hexdigest(), f"another {name} than was saved")
        require(hashes.keys() <= entries.keys(), f"no {sorted(hashes.keys() - entries.keys())}")
    return entries


def _read_tensors(data: bytes, device: th.device) -> dict[str, Any]:
    require(data.startswith(b"PK"), "something before the tensors")  # which torch may read instead
    with zipfile.ZipFile(io.BytesIO(data)) as archive:  # what torch writes is not packed: it cannot expand
        require(all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist()), "packed tensors")
        require(not any(name.endswith("constants.pkl") for name in archive.namelist()), "a TorchScript program")
        require(sum(info.file_size for info in archive.infolist()) <= len(data), "tensors larger than the file")
    loaded = th.load(io.BytesIO(data), map_location=device, weights_only=True)
    require(isinstance(loaded, dict), "something else than a dict of tensors")
    require(all(type(name) is str for name in loaded), "a tensor without name")
    for tensor in _tensors_in(loaded):
        is_dense = tensor.layout == th.strided and not tensor.is_quantized
        require(is_dense and tensor.nbytes <= tensor.untyped_storage().nbytes(), "a tensor larger than its numbers")
    return dict(loaded)


def _tensors_in(value: Any) -> Iterator[th.Tensor]:
    if isinstance(value, th.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(item)


def _read_field(data: dict[str, Any], name: str, value: Any, what: str, trusted: bool, allow: Collection[type]) -> None:
    """Put one field into ``data``."""
    if name == "env" and value is not None and not trusted:
        raise UntrustedFileError(what, "an environment")
    vetted = _Importing(what, allow) if trusted else Vetted(what, allow)
    if not (isinstance(value, dict) and ":serialized:" in value):
        data[name] = read_checked(lambda: json_values.decode(value, vetted), what)
    elif isinstance(value.get(":class:"), str) and value[":class:"] in vetted.allowed:
        data[name] = vetted.allowed[value[":class:"]]
    else:
        pickled = read_checked(lambda: b64decode(value[":serialized:"], validate=True), what)
        try:
            data[name] = safe_pickle.loads(pickled, what, allow, trusted)
        except (RuntimeError, TypeError, AttributeError) as error:  # as SB3 does, if it is trusted
            warnings.warn(
                f"Could not deserialize object {name}. Consider using `custom_objects` argument to replace this "
                f"object.\nException: {error}",
                stacklevel=4,
            )


class _Importing(Vetted):
    """Finds every name, for files that are trusted."""

    def find(self, module: str, name: str) -> Any:
        try:
            return super().find(module, name)
        except UntrustedFileError:
            module, name = current_name(module, name)
            return resolve(f"{module}:{name}")


def read_buffer(path: Path, trusted: bool = False, allow: Collection[type] = (), verbose: int = 0) -> Any:
    """Read the pickle of a replay buffer. Unless it is trusted, no code runs that the pickle names.

    :param path: path, without ``.pkl`` too, or an open file
    :param trusted: run whatever the pickle says
    :param allow: classes and functions of the user that the pickle may name
    :param verbose: 2 for a warning if ``.pkl`` was added to the path
    :raises UntrustedFileError: the pickle names a class or function that is not known to be harmless
    :raises DamagedFileError: it is no pickle, or it is damaged
    """
    file = open_path(path, "r", verbose=verbose, suffix="pkl")
    try:
        return safe_pickle.load(file, name_of(path), allow, trusted)
    finally:
        if isinstance(path, str | pathlib.Path):
            file.close()


# ---------------------------------------------------------------- writing


def write_model(path: Path, data: Mapping[str, Any], params: Mapping[str, Any], variables: Mapping[str, Any]) -> None:
    """Write the zip of a model, whole or not at all.

    Values are JSON and tensors. What has no form in JSON is a pickle. The manifest names the pickles.

    :param path: path, to which ``.zip`` is added if it has no suffix, or an open file
    :param data: attributes of the model
    :param params: name of a module or optimizer -> its state dict
    :param variables: name of a tensor -> the tensor
    :raises OSError: the disk is full, or the path cannot be written. The old file stays
    """
    fields = {name: _field(value) for name, value in data.items()}
    entries = {"data": json.dumps(fields).encode(), "pytorch_variables.pth": _tensor_bytes(variables)}
    entries |= {f"{name}.pth": _tensor_bytes(value) for name, value in params.items()}
    entries["_stable_baselines3_version"] = sb3.__version__.encode()
    entries["system_info.txt"] = get_system_info(print_info=False)[1].encode()
    pickled = [name for name, value in fields.items() if isinstance(value, dict) and ":serialized:" in value]
    hashes = {name: sha256(entry).hexdigest() for name, entry in entries.items()}
    entries[MANIFEST] = json.dumps({"format": 1, "pickled": pickled, "sha256": hashes}, indent=4).encode()

    def write(file: BinaryIO) -> None:
        with zipfile.ZipFile(file, "w") as archive:
            for name, entry in entries.items():
                archive.writestr(name, entry)

    write_whole(path, write, "zip")


def write_buffer(path: Path, buffer: Any, verbose: int = 0) -> None:
    """Write the pickle of a replay buffer, whole or not at all.

    :param path: path, to which ``.pkl`` is added if it has no suffix, or an open file
    :param buffer: the buffer
    :param verbose: 2 for a warning if the file exists
    :raises OSError: the disk is full, or the path cannot be written. The old file stays
    """
    write_whole(path, lambda file: pickle.dump(buffer, file, pickle.HIGHEST_PROTOCOL), "pkl", verbose)


def write_whole(path: Path, write: Callable[[BinaryIO], None], suffix: str, verbose: int = 0) -> None:
    """Write a file whole or not at all. An open file gets all bytes in one call.

    :param path: path, or an open file
    :param write: writes into a file
    :param suffix: added to a path that has none
    :param verbose: 2 for a warning if the file exists
    """
    if isinstance(path, str | pathlib.Path):
        with write_atomically(_target(pathlib.Path(path), suffix, verbose)) as file:
            write(file)
    else:
        open_path(path, "w")  # checks that it is open for writing
        held = io.BytesIO()
        write(held)
        path.write(held.getbuffer())


def _target(path: pathlib.Path, suffix: str, verbose: int) -> pathlib.Path:
    """Return the file that SB3 writes for a path, and make its folder."""
    path = path if path.suffix else pathlib.Path(f"{path}.{suffix}")
    if path.is_dir():
        warnings.warn(f"Path '{path}' is a folder. Will save instead to {path}_2", stacklevel=5)
        path = pathlib.Path(f"{path}_2")
    if not path.parent.exists():
        warnings.warn(f"Path '{path.parent}' does not exist. Will create it.", stacklevel=5)
        path.parent.mkdir(exist_ok=True, parents=True)
    if verbose > 1 and path.is_file():
        warnings.warn(f"Path '{path}' exists, will overwrite it.", stacklevel=5)
    return path


def _field(value: Any) -> Any:
    """Return a value as JSON. SB3's form of a pickle stands for what has no other."""
    try:
        return json_values.encode(value)
    except (json_values.NotJsonError, RecursionError):
        pickled = {":type:": str(type(value)), ":serialized:": b64encode(cloudpickle.dumps(value)).decode()}
        return pickled | ({":class:": named(value)} if json_values.is_named(value) else {})


def _tensor_bytes(value: Any) -> bytes:
    held = io.BytesIO()
    th.save(value, held)
    return held.getvalue()
