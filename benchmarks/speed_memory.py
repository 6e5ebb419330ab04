"""How much memory one side of a case takes at most: in a process of its own, since a process has one peak."""

import multiprocessing
import os
import re
from pathlib import Path

from speed_timing import Case, TrainingCase

PROCESS = Path("/proc/self")  # Linux's


def peak_memory(case: Case, side: int, steps: int) -> float | str:
    """By how much training raises a process's memory at most, after everything is imported, MiB.

    :param case: of training, with an env; functions are timed on data that both sides share
    :param side: 0 ours, 1 the peer
    :param steps: env steps
    :return: empty where it is not known: functions, and systems other than Linux
    """
    if not (isinstance(case, TrainingCase) and os.access(PROCESS / "clear_refs", os.W_OK)):
        return ""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return round(pool.apply(_growth, (case, side, steps)), 1)


def _growth(case: Case, side: int, steps: int) -> float:
    import torch  # noqa: PLC0415

    torch.set_num_threads(1)
    (PROCESS / "clear_refs").write_text("5")  # the peak is now what there is
    before = _peak()
    case.measures(0, steps)[side]()
    return _peak() - before


def _peak() -> float:
    """Largest resident set, MiB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", (PROCESS / "status").read_text())
    assert found is not None
    return int(found[1]) / 1024
