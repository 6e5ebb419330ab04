"""Write a file whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4


@contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of ``path`` when the block ends.

    The bytes go to a temporary file in the same folder. They are on the disk before the name changes, so after a crash
    ``path`` is the old file or the whole new one. If the block raises, the temporary file is removed and ``path`` stays
    as it was. Two processes that write to one path do not meet: the last one to finish wins.

    A killed process leaves its temporary file, whose name begins with a dot and ends with ``.tmp``.

    :param path: the file; its folder must exist. If it is a link, the file that it leads to is replaced
    :raises OSError: the disk is full, or the folder is not writable. The message names ``path``
    """
    final = Path(os.path.realpath(path))
    temporary = final.with_name(f".{final.name[:200]}.{uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            shutil.copymode(final, temporary)
        temporary.replace(final)
        fsync_folder(final.parent)
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(error.errno, f"{error.strerror}; what was there is as it was", str(final)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Write a folder's entries to the disk, where the file system can do it.

    :param folder: the folder
    """
    if hasattr(os, "O_DIRECTORY"):  # not on Windows
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
