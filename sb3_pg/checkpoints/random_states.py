"""The random generators that SB3 seeds: those of Python, NumPy and torch."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch as th


@contextmanager
def unchanged_random_state(device: th.device) -> Iterator[None]:
    """Context that leaves all random generators as they were.

    :param device: the device on which random numbers may be drawn
    """
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 (the generator that SB3 seeds)
    try:
        with th.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
