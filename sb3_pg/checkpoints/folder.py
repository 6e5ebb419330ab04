"""A folder of checkpoints: each is written whole or not at all, and a damaged one is noticed.

::

    ckpt/
      000041/manifest.json   what the run is, and the SHA-256 of every file
      000041/model.zip       as ``model.save`` writes it
      000041/state           everything else
      000042/...
      blocks/<SHA-256>       pieces of large arrays

Large arrays, such as those of a replay buffer, are cut into blocks. A block is a file named by its SHA-256, and
checkpoints share the blocks that have not changed between them. So a checkpoint of a million transitions writes only
those that are new.
"""

import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import numpy as np
from typing_extensions import Self

from sb3_pg.checkpoints.atomic import fsync_folder, write_atomically
from sb3_pg.errors import CheckpointError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

#: Bytes of a block.
BLOCK_SIZE: Final = 1 << 20
FORMAT: Final = 1
#: Names of a checkpoint's files, besides the manifest.
FILES: Final = frozenset({"model.zip", "state"})
#: Name of a block.
_BLOCK: Final = re.compile("[0-9a-f]{64}")
#: Name of an array's type.
_DTYPE: Final = re.compile("[|]b1|[|][iu]1|[<>][iu][248]|[<>]f(2|4|8|12|16)|[<>]c(8|16|24|32)|[|<>][SU][1-9][0-9]{0,8}")
#: How often a block may be in arrays, on average. Below _SMALL bytes of arrays it may be more often.
_MOST_COPIES: Final = 1000
_SMALL: Final = 1 << 30
_MOST_STEPS: Final = 1 << 62


@dataclass
class StoredArray:
    """An array in blocks.

    :param dtype: NumPy's name of the type
    :param shape: shape of the array
    :param blocks: SHA-256 of each block
    """

    dtype: str
    shape: list[int]
    blocks: list[str]

    @property
    def n_bytes(self) -> int:
        """Size of the array, bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def require_valid(self) -> None:
        """Require what :meth:`CheckpointFolder.write` writes.

        :raises CheckpointError: it is something else
        """
        is_shape = type(self.shape) is list and all(type(n) is int and n >= 0 for n in self.shape)
        is_dtype = type(self.dtype) is str and re.fullmatch(_DTYPE, self.dtype)
        names = self.blocks if type(self.blocks) is list else [None]
        if not (is_shape and is_dtype and all(type(name) is str and _BLOCK.fullmatch(name) for name in names)):
            raise CheckpointError("manifest.json describes an array that no checkpoint has")


@dataclass
class Manifest:
    """Description of a checkpoint.

    :param run: identifies the run; all checkpoints of a folder belong to one run
    :param algorithm: name of the algorithm's class
    :param num_timesteps: env steps taken
    :param asked: ``total_timesteps`` as given to ``learn``
    :param finished: whether ``learn`` has ended
    :param versions: package -> its version
    :param arrays: large arrays, by name
    :param files: SHA-256 of each file
    :param format: version of the layout
    """

    run: str
    algorithm: str
    num_timesteps: int
    asked: float
    finished: bool
    versions: dict[str, str]
    arrays: dict[str, StoredArray] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> bytes:
        """Return the manifest as JSON, with a digest of itself."""
        values = vars(self) | {"arrays": {name: vars(array) for name, array in self.arrays.items()}}
        return json.dumps(values | {"digest": _digest(json.dumps(values).encode())}, indent=1).encode()

    def require_valid(self) -> None:
        """Require what :meth:`CheckpointFolder.write` writes.

        :raises CheckpointError: it is something else
        """
        for array in self.arrays.values():
            array.require_valid()
        numbers = all(type(n) in (int, float) and 0 <= n < _MOST_STEPS for n in (self.num_timesteps, self.asked))
        texts = (self.run, self.algorithm, *self.versions, *self.versions.values(), *self.files.values())
        is_texts = all(type(text) is str for text in texts) and self.files.keys() == FILES
        if not (numbers and is_texts and type(self.finished) is bool):
            raise CheckpointError("manifest.json describes what no checkpoint has")

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Read what :meth:`to_json` has returned.

        :raises CheckpointError: the data is damaged, or of another format
        """
        try:
            values = json.loads(data)
            digest = values.pop("digest")
            if values["format"] != FORMAT:
                raise CheckpointError(f"its format is {values['format']}, and this version reads {FORMAT}")
            if _digest(json.dumps(values).encode()) != digest:
                raise CheckpointError("manifest.json is damaged")
            arrays = {name: StoredArray(**array) for name, array in values.pop("arrays").items()}
            found = cls(**values, arrays=arrays)
            found.require_valid()
            return found
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError("manifest.json is damaged") from error


class Checkpoint:
    """A valid checkpoint of a folder.

    :param folder: the folder of all checkpoints
    :param number: number of the checkpoint
    :raises CheckpointError: a file is missing or damaged
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.number, self.path, self._blocks = number, folder / f"{number:06d}", folder / "blocks"
        self.manifest = Manifest.from_json(self._read(self.path / "manifest.json"))
        self.files = {name: self._verified(self.path / name, sha) for name, sha in self.manifest.files.items()}
        blocks = {block for array in self.manifest.arrays.values() for block in array.blocks}
        sizes = {block: len(self._verified(self._blocks / block, block)) for block in blocks}
        for name, array in self.manifest.arrays.items():
            if array.n_bytes != sum(sizes[block] for block in array.blocks):
                raise CheckpointError(f"the array {name!r} has another size than its blocks")
        if sum(array.n_bytes for array in self.manifest.arrays.values()) > max(
            _SMALL, _MOST_COPIES * sum(sizes.values())
        ):
            raise CheckpointError("its arrays hold the same blocks too often")

    def arrays(self, prefix: str) -> dict[str, np.ndarray]:
        """Read the large arrays whose name begins with a prefix.

        :param prefix: is taken off the names
        """
        found = {name: array for name, array in self.manifest.arrays.items() if name.startswith(prefix)}
        return {name.removeprefix(prefix): self._array(array) for name, array in found.items()}

    def _array(self, stored: StoredArray) -> np.ndarray:
        target, filled = np.empty(stored.n_bytes, dtype=np.uint8), 0
        for block in stored.blocks:
            data = np.frombuffer(self._verified(self._blocks / block, block), dtype=np.uint8)
            target[filled : filled + len(data)] = data
            filled += len(data)
        return target.view(stored.dtype).reshape(stored.shape)

    @classmethod
    def _verified(cls, path: Path, sha: str) -> bytes:
        data = cls._read(path)
        if _digest(data) != sha:
            raise CheckpointError(f"{path.name} is damaged")
        return data

    @staticmethod
    def _read(path: Path) -> bytes:
        try:
            if path.is_file():  # no pipe or device, which may never end
                return path.read_bytes()
            raise CheckpointError(f"{path.name} is missing")
        except OSError as error:
            raise CheckpointError(f"{path.name} cannot be read ({error.strerror})") from error


class CheckpointFolder:
    """Writes checkpoints into a folder, and finds the newest valid one.

    :param path: the folder; it is made when the first checkpoint is written
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def numbers(self) -> list[int]:
        """Numbers of the checkpoints, the newest first."""
        found = self.path.iterdir() if self.path.is_dir() else ()
        named = (path for path in found if re.fullmatch("[0-9]{6,18}", path.name) and path.is_dir())
        return sorted((int(path.name) for path in named), reverse=True)

    def newest(self) -> Checkpoint | None:
        """Return the newest valid checkpoint, None if there is none. A warning names each damaged one."""
        for number in self.numbers:
            try:
                return Checkpoint(self.path, number)
            except CheckpointError as error:
                warnings.warn(f"Checkpoint {self.path / f'{number:06d}'} is skipped: {error}", stacklevel=2)
        return None

    def manifests(self) -> Iterator[Manifest]:
        """Yield the manifests of the checkpoints, the newest first, without those that cannot be read."""
        for number in self.numbers:
            try:
                yield Manifest.from_json((self.path / f"{number:06d}" / "manifest.json").read_bytes())
            except (OSError, CheckpointError):
                continue

    def write(
        self, manifest: Manifest, files: Mapping[str, bytes], arrays: Mapping[str, np.ndarray], keep: int
    ) -> Path:
        """Write a checkpoint. If this fails, the folder's checkpoints are as before.

        :param manifest: gets the digests
        :param files: name -> content
        :param arrays: name -> large array
        :param keep: number of checkpoints to keep; older ones are deleted
        :return: the checkpoint's path
        :raises OSError: the disk is full, or the folder cannot be written
        """
        blocks = self.path / "blocks"
        blocks.mkdir(parents=True, exist_ok=True)
        manifest.arrays = {name: self._store(array) for name, array in arrays.items()}
        manifest.files = {name: _digest(data) for name, data in files.items()}
        number = max(self.numbers, default=0) + 1
        target = self.path / f"{number:06d}"
        temporary = self.path / f".{uuid4().hex}.tmp"
        try:
            temporary.mkdir()
            for name, data in {**files, "manifest.json": manifest.to_json()}.items():
                with (temporary / name).open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            fsync_folder(temporary)
            temporary.rename(target)
            fsync_folder(self.path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._clean(keep)
        return target

    def _store(self, array: np.ndarray) -> StoredArray:
        """Write the blocks of an array that do not exist yet."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        names = []
        for start in range(0, data.size, BLOCK_SIZE):
            block = data[start : start + BLOCK_SIZE]
            names.append(_digest(block))
            path = self.path / "blocks" / names[-1]
            if not (path.is_file() and path.stat().st_size == block.size):
                with write_atomically(path) as file:
                    file.write(block.tobytes())
        return StoredArray(array.dtype.str, list(array.shape), names)

    def _clean(self, keep: int) -> None:
        """Delete all but the newest checkpoints, and the blocks that no checkpoint uses any more."""
        for number in self.numbers[keep:]:
            shutil.rmtree(self.path / f"{number:06d}", ignore_errors=True)
        used = {block for manifest in self.manifests() for array in manifest.arrays.values() for block in array.blocks}
        for path in (self.path / "blocks").iterdir():
            if path.name not in used and _BLOCK.fullmatch(path.name.removeprefix(".")[:64]):
                path.unlink(missing_ok=True)

    def lock(self) -> ExitStack:
        """Lock the folder until the returned object is closed, or the process ends.

        :raises CheckpointError: another process, or another callback, trains with this folder
        """
        held = ExitStack()
        self.path.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            return held
        file = held.enter_context((self.path / ".lock").open("a"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.close()
            raise CheckpointError(f"{self.path} is in use by another run of ResumeCallback") from None
        except OSError:  # a file system without locks
            pass
        for left in self.path.glob(".*.tmp"):  # by a killed process
            shutil.rmtree(left, ignore_errors=True)
        return held


def latest_checkpoint(folder: str | Path) -> Path | None:
    """Return the path of the newest valid checkpoint, None if there is none.

    >>> from sb3_pg.checkpoints import latest_checkpoint
    >>> latest_checkpoint("no/such/folder") is None
    True

    :param folder: the folder that was given to a :class:`~sb3_pg.ResumeCallback`
    """
    newest = CheckpointFolder(folder).newest()
    return None if newest is None else newest.path


def _digest(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()
