"""What a logger has written, so that a resumed run goes on in the same files.

SB3's formats empty their files when they open them. So the content of text files is part of a checkpoint. TensorBoard
opens a new event file instead. There a resumed run cuts off what was written after the checkpoint.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.logger import (
    CSVOutputFormat,
    JSONOutputFormat,
    KVWriter,
    Logger,
    TensorBoardOutputFormat,
)
from typing_extensions import Self

from sb3_pg.envs.state.encoding import CannotSaveError, Decoder, Encoder

#: Name of TensorBoard's event files.
EVENT_FILES = "events.out.tfevents.*"
#: Name of the file in the same folder that says which run has written them.
MARK = ".sb3_pg_run"


@dataclass
class LoggerState:
    """State of a logger.

    :param pending: the values that wait for the next log, in the logger's three tables
    :param texts: content of each text file. Its name is the class of its format, and the position among the formats of
        that class
    :param columns: name of a CSV file in ``texts`` -> its columns
    :param event_folder: folder of TensorBoard's event files, None without TensorBoard
    :param event_sizes: name of each event file -> bytes
    :param folder: the logger's folder
    """

    pending: list[dict[str, Any]]
    texts: dict[str, np.ndarray] = field(default_factory=dict)
    columns: dict[str, list[str]] = field(default_factory=dict)
    event_folder: str | None = None
    event_sizes: dict[str, int] = field(default_factory=dict)
    folder: str | None = None

    @classmethod
    def of(cls, logger: Logger) -> Self:
        """Read a logger's state.

        :param logger: its files are read, and not changed
        """
        pending = [dict(table) for table in _tables(logger)]
        state = cls(pending, folder=logger.dir)
        for name, output, file in _text_files(logger):
            state.texts[name] = np.frombuffer(Path(file.name).read_bytes(), dtype=np.uint8)
            if isinstance(output, CSVOutputFormat):
                state.columns[name] = list(output.keys)
        for output in logger.output_formats:
            if isinstance(output, TensorBoardOutputFormat):
                state.event_folder = str(Path(output.writer.log_dir).absolute())
                found = Path(state.event_folder).glob(EVENT_FILES)
                state.event_sizes = {path.name: path.stat().st_size for path in found}
        return state

    def restore(self, logger: Logger) -> None:
        """Give a logger the pending values, and its text files their content.

        :param logger: a logger with the same formats
        """
        for table, values in zip(_tables(logger), self.pending, strict=True):
            table.clear()
            table.update(values)
        for name, output, file in _text_files(logger):
            if name in self.texts:
                file.seek(0)
                file.truncate()
                file.write(self.texts[name].tobytes().decode())
                file.flush()
            if isinstance(output, CSVOutputFormat):
                output.keys = list(self.columns.get(name, output.keys))

    def is_of(self, run: str) -> bool:
        """Return whether TensorBoard's folder is one that this run has written to. The folder says so, see
        :func:`mark_event_folders`: a checkpoint could name any folder.

        :param run: identifies the run
        """
        mark = Path(str(self.event_folder)) / MARK
        return self.event_folder is not None and mark.is_file() and mark.read_text() == run

    def event_files(self, run: str) -> list[Path]:
        """Return the event files that are in TensorBoard's folder now; none if another run has written them.

        :param run: identifies the run
        """
        found = Path(str(self.event_folder)).glob(EVENT_FILES) if self.is_of(run) else ()
        return [path for path in found if not path.is_symlink()]

    def cut_events(self, files: Iterable[Path]) -> None:
        """Remove what was written to TensorBoard's files after this state was read.

        :param files: event files, without those that are open
        """
        for path in files:
            size = self.event_sizes.get(path.name, 0)
            if type(size) is not int or size < 0:
                raise ValueError(f"the size of {path.name} is {size!r}")
            if size == 0:
                path.unlink(missing_ok=True)
            elif path.stat().st_size > size:
                os.truncate(path, size)

    def plain(self) -> dict[str, Any]:
        """Return the state without the texts, as plain data."""
        pending: list[dict[str, Any]] = []
        for table in self.pending:
            pending.append({})
            for name, value in table.items():
                with suppress(CannotSaveError):  # a video
                    pending[-1][name] = Encoder([], with_models=False).encode(value)
        return vars(self) | {"texts": {}, "pending": pending}

    @classmethod
    def from_plain(cls, values: dict[str, Any], texts: dict[str, np.ndarray], unpickle: Callable[[bytes], Any]) -> Self:
        """Return the state from what :meth:`plain` has returned, and the texts.

        :param unpickle: loads what could only be stored as a pickle
        """
        pending = [
            {name: Decoder([], unpickle).decode(item) for name, item in table.items()} for table in values["pending"]
        ]
        return cls(**values | {"texts": texts, "pending": pending})


def mark_event_folders(logger: Logger, run: str) -> None:
    """Write the name of the run into TensorBoard's folder, so that a resumed run knows the folder again.

    :param logger: the run's logger
    :param run: identifies the run
    """
    for output in logger.output_formats:
        if isinstance(output, TensorBoardOutputFormat):
            (Path(output.writer.log_dir) / MARK).write_text(run)


def _tables(logger: Logger) -> tuple[dict[str, Any], ...]:
    tables: tuple[dict[str, Any], ...] = (logger.name_to_value, logger.name_to_count, logger.name_to_excluded)
    return tables


def _text_files(logger: Logger) -> Iterator[tuple[str, KVWriter, Any]]:
    """Yield the formats that write into a text file of their own: name, format and file."""
    counts: Counter[str] = Counter()
    for output in logger.output_formats:
        kind = type(output).__name__
        if isinstance(output, CSVOutputFormat | JSONOutputFormat) or getattr(output, "own_file", False):
            yield f"{kind}-{counts[kind]}", output, output.file  # type: ignore[attr-defined]
            counts[kind] += 1
