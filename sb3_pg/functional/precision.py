"""The precision of sums and differences that single precision would spoil."""

import torch as th


def precise(x: th.Tensor) -> th.Tensor:
    """The same numbers in double precision; in single on a device that has no double (MPS).

    :param x: any shape
    """
    return x.float() if x.device.type == "mps" else x.double()
