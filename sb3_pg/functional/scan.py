"""The reverse linear recurrence that every return and advantage is computed with."""

import torch as th

#: Longest sequence that is solved as one triangular system.
SHORT = 16


def scan(x: th.Tensor, decay: th.Tensor) -> th.Tensor:
    r"""Solve a first-order linear recurrence that runs backwards in time.

    .. math:: y_t = x_t + d_t\, y_{t+1}, \qquad y_T = 0

    Neighbors are combined pairwise, the half-length problem is solved, and the odd steps are filled in:
    O(log T) vectorized passes and O(T) work (Blelloch 1990, section 1.4, for the operator
    :math:`(x, d) \circ (x', d') = (x + d x', d d')`). Short sequences are solved as one triangular system, which
    takes fewer calls. Differentiable in both arguments.

    :param x: shape ``(n_steps, ...)``, floating
    :param decay: d_t, same shape as ``x``; the last row has no effect
    :return: y, same shape, dtype and device as ``x``
    :raises ValueError: unequal shapes, or no time axis
    :raises TypeError: ``x`` is not floating
    """
    if x.shape != decay.shape or x.dim() == 0:
        raise ValueError(
            f"x and decay must have one shape (n_steps, ...), got {tuple(x.shape)} and {tuple(decay.shape)}"
        )
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating tensor, got {x.dtype}")
    decay = decay.to(x.dtype)
    if 1 < len(x) <= SHORT and x.dim() == 2 and x.dtype in (th.float32, th.float64):
        # (I - D) y = x, where D has d_t beside the diagonal
        matrix = th.diag_embed(-decay[:-1].T, offset=1)
        y: th.Tensor = th.linalg.solve_triangular(matrix, x.T.unsqueeze(-1), upper=True, unitriangular=True)
        return y.squeeze(-1).T.contiguous()
    return _solve(x, decay)


def _solve(x: th.Tensor, decay: th.Tensor) -> th.Tensor:
    n_steps = x.shape[0]
    if n_steps < 2:
        return x
    pairs = n_steps // 2
    x_even, x_odd = x[0 : 2 * pairs : 2], x[1::2]
    d_even, d_odd = decay[0 : 2 * pairs : 2], decay[1::2]
    # y_{2k} = (x_{2k} + d_{2k} x_{2k+1}) + d_{2k} d_{2k+1} y_{2k+2}
    x_pair, d_pair = th.addcmul(x_even, d_even, x_odd), d_even * d_odd
    if n_steps % 2:
        y_even = _solve(th.cat((x_pair, x[-1:])), th.cat((d_pair, decay[-1:])))
        y_odd = th.addcmul(x_odd, d_odd, y_even[1:])
        return th.cat((th.stack((y_even[:-1], y_odd), dim=1).flatten(0, 1), y_even[-1:]))
    y_even = _solve(x_pair, d_pair)
    y_odd = th.cat((th.addcmul(x_odd[:-1], d_odd[:-1], y_even[1:]), x_odd[-1:]))
    return th.stack((y_even, y_odd), dim=1).flatten(0, 1)
