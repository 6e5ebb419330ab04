"""States of random generators that come from files: NumPy does not check all their numbers."""

from typing import Any, Final

import numpy as np

#: Largest pool of a SeedSequence. Making one takes the square of its size.
MOST_SEEDS: Final = 64
#: Largest position in MT19937's key, and in Philox's buffer.
_MOST: Final = {"pos": 624, "buffer_pos": 4}


def require_position(state: Any) -> None:
    """Require a state whose positions are inside the generator's memory.

    :param state: as ``BitGenerator.state`` or ``RandomState.get_state`` returns it
    :raises ValueError: a position is outside
    """
    if isinstance(state, tuple):
        inner: Any = dict(zip(("bit_generator", "key", "pos"), state, strict=False))
    elif isinstance(state, dict):
        inner = state | (state["state"] if isinstance(state.get("state"), dict) else {})
    else:
        raise ValueError("the state of a random generator must be a dict")
    for name, most in _MOST.items():
        position = inner.get(name, 0)
        if not (isinstance(position, int | np.integer) and 0 <= position <= most):
            raise ValueError(f"{name} of a random generator must be in [0, {most}]")


def set_bit_generator(bits: np.random.BitGenerator, state: Any) -> None:
    """Set the state of a random generator.

    :raises ValueError: it is not one of such a generator
    """
    require_position(state)
    bits.state = state
