"""Files of named arrays: NumPy's ``.npz``, which can be memory-mapped, and HDF5."""

import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from sb3_pg.errors import DamagedFileError
from sb3_pg.extras import extra_hints

#: Suffixes of files that are HDF5.
HDF5: Final = (".hdf5", ".h5")
#: Bytes of a member's header in a zip file, before its name.
_HEADER: Final = 30


def read_arrays(path: Path, names: Collection[str], mmap: bool = False) -> dict[str, np.ndarray]:
    """Return arrays of a file. Nothing is unpickled.

    :param path: a file that ``numpy.savez`` has written, or HDF5 if its suffix says so
    :param names: the arrays to read, if the file has them; those named ``name/...`` belong to ``name``
    :param mmap: whether the arrays stay on the disk, where a row is read when it is used. They are read-only
    :raises OSError: there is no such file, or it cannot be opened
    :raises DamagedFileError: the file is truncated, is not a file of arrays, or an array holds Python objects
    :raises ValueError: ``mmap`` is True, and the file is compressed, or HDF5
    :raises MissingExtraError: HDF5 needs h5py
    """
    if path.suffix in HDF5:
        if mmap:
            raise ValueError(f"mmap must be False for HDF5 such as {path}, got True")
        return _read_hdf5(path, names)
    with _reading(path), path.open("rb") as file, zipfile.ZipFile(file) as archive:
        named = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        members = {name: info for name, info in named.items() if name.partition("/")[0] in names}
        if not mmap:
            return {name: _read(archive, info) for name, info in members.items()}
        if all(info.compress_type == zipfile.ZIP_STORED for info in members.values()):
            return {name: _map(path, file, info) for name, info in members.items()}
    raise ValueError(f"mmap must be False for a compressed file such as {path}, got True")


def write_npz(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as ``numpy.savez`` does, uncompressed. An array that is memory-mapped is read in pieces.

    :param file: open for writing
    :param arrays: name -> array of numbers
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Context in which a damaged file raises DamagedFileError."""
    try:
        yield
    except (EOFError, NotImplementedError, ValueError, struct.error, zipfile.BadZipFile, zlib.error) as error:
        raise DamagedFileError(str(path), error) from error


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as member:
        array: np.ndarray = np.lib.format.read_array(member, allow_pickle=False)
        return array


def _map(path: Path, file: BinaryIO, info: zipfile.ZipInfo) -> np.ndarray:
    """Map a stored member: its bytes are an ``.npy`` file that begins somewhere in the ``.npz``."""
    file.seek(info.header_offset)
    name_length, extra_length = struct.unpack("<HH", file.read(_HEADER)[-4:])
    file.seek(name_length + extra_length, 1)
    version = np.lib.format.read_magic(file)
    read_header: Any = getattr(np.lib.format, f"read_array_header_{version[0]}_{version[1]}")
    shape, is_fortran, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError(f"{info.filename} holds Python objects")
    if 0 in shape:
        return np.zeros(shape, dtype)  # no bytes to map
    return np.memmap(path, dtype, "r", file.tell(), shape, "F" if is_fortran else "C")


def _read_hdf5(path: Path, names: Collection[str]) -> dict[str, np.ndarray]:
    with extra_hints():
        import h5py  # type: ignore[import-untyped]  # noqa: PLC0415 (it is optional)
    arrays: dict[str, np.ndarray] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and name.partition("/")[0] in names:
            arrays[name] = item[()]

    with path.open("rb") as file:  # says that there is no such file as other readers do
        try:
            with h5py.File(file, "r") as archive:
                archive.visititems(visit)
        except OSError as error:
            raise DamagedFileError(str(path), error) from error
    return arrays
