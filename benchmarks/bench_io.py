"""What the benchmark scripts share: version stamps, CSV files that are never half written, and text tables.

POSIX only (file locks). Imports the standard library alone, so that a worker can still set its thread limits before
numpy and torch are loaded.
"""

import argparse
import csv
import fcntl
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a script's docstring.

    :param doc: its summary, an empty line, and the rest
    """
    description, _, details = (doc or "").partition("\n\n")
    return argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def limit_threads() -> None:
    """One thread for every numerical library that is imported after this call."""
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))


def cpu_count() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(*packages: str) -> str:
    """``python=3.11.2 torch=2.13.0 ...`` for packages; ``none`` where one is not installed."""

    def stamp(package: str) -> str:
        try:
            return f"{package}={version(package)}"
        except PackageNotFoundError:
            return f"{package}=none"

    return " ".join([f"python={platform.python_version()}", *map(stamp, packages)])


def date_and_versions(packages: Iterable[str]) -> dict[str, str]:
    """Columns that every result has: the day in UTC, and the versions of packages."""
    return {"date": time.strftime("%Y-%m-%d", time.gmtime()), "versions": versions(*packages)}


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: Iterable[Row], columns: Sequence[str]) -> None:
    """Write a CSV file in one step: a reader, or a killed writer, finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for one read-change-write. The lock is the kernel's and ends with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def row_key(row: Row, key: Sequence[str]) -> tuple[str, ...]:
    """A row's identity, as text: what is in memory equals what was read back from a file."""
    return tuple(str(row[column]) for column in key)


def merge_csv(path: Path, rows: Sequence[Row], columns: Sequence[str], key: Sequence[str]) -> None:
    """Put ``rows`` in the file in place of all rows with the same ``key``; the other rows stay as they are.

    The file is sorted by key (rows with one key keep their order), so that its differences are those of the results.

    :raises ValueError: the file has a column that is not in ``columns`` (writing would lose it)
    """
    with locked(path.parent):
        old = read_csv(path)
        if old and not set(old[0]) <= set(columns):
            raise ValueError(f"{path} has unknown columns: {sorted(set(old[0]) - set(columns))}")
        replaced = {row_key(row, key) for row in rows}
        kept = [row for row in old if row_key(row, key) not in replaced]
        write_csv(path, sorted([*kept, *rows], key=lambda row: row_key(row, key)), columns)


def format_table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A text table: a header, then one line per row; numbers to the right, text to the left."""
    cells = [[str(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(text) for text in texts) for texts in zip(columns, *cells, strict=True)]
    numeric = [all(isinstance(row.get(column) or 0, int | float) for row in rows) for column in columns]

    def line(texts: Sequence[str]) -> str:
        aligned = zip(texts, widths, numeric, strict=True)
        return "  ".join(t.rjust(w) if right else t.ljust(w) for t, w, right in aligned).rstrip()

    return "\n".join(line(texts) for texts in [list(columns), *cells])
