"""``sb3-pg watch``: follow running trainings in TensorBoard.

TensorBoard reads event files, and trainings write ``progress.csv``. This copies new rows of all runs in a folder into
event files, in a temporary folder, every few seconds, and gives TensorBoard a layout.
"""

import argparse
import importlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from sb3_pg.extras import extra_hints
from sb3_pg.reporting.curves import LogError, find_runs
from sb3_pg.reporting.logged import FILE, STEPS, read_rows

#: Section of the page -> title of a chart -> logged names in it.
LAYOUT: Final[dict[str, dict[str, list[str]]]] = {
    "Return": {
        "return of training episodes": ["rollout/ep_rew_mean"],
        "length of training episodes": ["rollout/ep_len_mean"],
        "env steps per second": ["time/fps"],
    },
    "Step": {
        "KL(old, new) [nats]": ["train/joint_kl"],
        "entropy [nats]": ["train/entropy"],
        "gain, predicted and realized": ["train/surrogate_predicted", "train/surrogate_realized"],
        "gradient norm": ["train/grad_norm"],
    },
    "Critic and variance": {
        "explained variance": ["train/explained_variance"],
        "critic's loss": ["train/value_loss", "train/critic_loss"],
        "gradient's signal-to-noise ratio": ["diagnostics/gradient_snr"],
        "effective sample size": ["train/effective_sample_size", "train/importance_ess"],
    },
}


class Follower:
    """Copies what runs log into event files.

    :param root: folder with the runs
    :param events: folder for the event files
    """

    def __init__(self, root: Path, events: Path) -> None:
        self.root, self.events = root, events
        self._writers: dict[Path, Any] = {}
        self._n_rows: dict[Path, int] = {}

    def update(self) -> int:
        """Copy the rows that are new since the last call.

        :return: how many
        """
        n_new = 0
        for folder in sorted(path.parent for path in self.root.rglob(FILE)):
            rows = read_rows(folder / FILE)
            first = self._n_rows.get(folder, 0)
            self._n_rows[folder] = len(rows)
            n_new += max(0, len(rows) - first)
            for row in rows[first:]:
                for name, value in row.items():
                    self._writer(folder).add_scalar(name, value, int(row.get(STEPS, 0)))
            if folder in self._writers:
                self._writers[folder].flush()
        return n_new

    def _writer(self, folder: Path) -> Any:
        if folder not in self._writers:
            tensorboard: Any = importlib.import_module("torch.utils.tensorboard")  # imports an optional dependency
            name = folder.relative_to(self.root) if folder != self.root else Path(folder.name)
            writer = tensorboard.SummaryWriter(str(self.events / name))
            charts = {
                section: {title: ["Multiline", [f"^{name}$" for name in names]] for title, names in of_section.items()}
                for section, of_section in LAYOUT.items()
            }
            writer.add_custom_scalars(charts)
            self._writers[folder] = writer
        return self._writers[folder]

    def close(self) -> None:
        """Close the event files."""
        for writer in self._writers.values():
            writer.close()


def main(arguments: Sequence[str]) -> int:
    """``sb3-pg watch``: serve a page that follows the runs in a folder, until it is interrupted.

    :param arguments: the command line, without the program's name
    :return: exit code
    :raises SystemExit: the arguments cannot be parsed, are ``--help``, or there is no run
    :raises MissingExtraError: TensorBoard is not installed
    """
    parser = argparse.ArgumentParser(
        prog="sb3-pg watch", description="Follow running trainings: a local page with curves, KL, variance and speed."
    )
    parser.add_argument("logs", nargs="?", type=Path, default=Path("logs"), help="folder of runs (default: logs)")
    parser.add_argument("--port", type=int, default=6006, help="port of the page (default: %(default)s)")
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between updates (default: %(default)s)")
    args = parser.parse_args(arguments)
    if not args.interval > 0:
        parser.error(f"argument --interval: must be above 0, got {args.interval}")
    try:
        find_runs(args.logs)
    except LogError as error:
        parser.error(str(error))
    with extra_hints(), tempfile.TemporaryDirectory(prefix="sb3-pg-watch-") as events:
        program: Any = importlib.import_module("tensorboard.program")  # an optional dependency
        follower = Follower(args.logs, Path(events))
        follower.update()
        server = program.TensorBoard()
        server.configure(logdir=events, port=args.port, reload_interval=args.interval)
        print(f"{server.launch()}#custom_scalars shows {args.logs}; Ctrl+C ends it", flush=True)
        try:
            while True:
                time.sleep(args.interval)
                follower.update()
        except KeyboardInterrupt:
            return 0
        finally:
            follower.close()
