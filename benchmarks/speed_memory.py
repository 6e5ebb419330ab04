"""How much memory one side of a case takes at most: in a process of its own, since a process has one peak."""

import multiprocessing
import sys

from speed_timing import Case, TrainingCase

MIB = 2**20


def peak_memory(case: Case, side: int, steps: int) -> float | str:
    """Growth of the process's peak over that of importing everything, MiB; empty where it is not known.

    :param case: of training, with an env; functions are timed on data that both sides share
    :param side: 0 ours, 1 the peer
    :param steps: env steps
    """
    if sys.platform == "win32" or not isinstance(case, TrainingCase):
        return ""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return round(pool.apply(_growth, (case, side, steps)), 1)


def _growth(case: Case, side: int, steps: int) -> float:
    import torch  # noqa: PLC0415

    torch.set_num_threads(1)
    before = _peak()
    case.measures(0, steps)[side]()
    return (_peak() - before) / MIB


def _peak() -> int:
    """Largest resident set so far, bytes."""
    import resource  # noqa: PLC0415 (not on Windows)

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
