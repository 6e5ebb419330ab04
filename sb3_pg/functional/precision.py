"""Double precision for sums and differences that lose digits in single precision."""

import torch as th


def precise(x: th.Tensor) -> th.Tensor:
    """The numbers in double precision; in single precision on MPS, which has no double.

    :param x: any shape
    """
    return x.float() if x.device.type == "mps" else x.double()
