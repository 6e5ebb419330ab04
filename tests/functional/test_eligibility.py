"""Eligibility traces against a plain loop and the forward view; gradients of rows against one backward pass each."""

from typing import Any

import pytest
import torch as th
from torch import nn

from sb3_pg.functional import eligibility_trace, row_gradients


def loop(gradients: th.Tensor, decay: th.Tensor, initial: th.Tensor | None) -> th.Tensor:
    z = th.zeros_like(gradients[0]) if initial is None else initial.clone()
    rows = []
    for t in range(len(gradients)):
        for env in range(gradients.shape[1]):
            z[env] = float(decay[t, env]) * z[env] + gradients[t, env]
        rows.append(z.clone())
    return th.stack(rows)


@pytest.mark.parametrize("n_steps", [1, 2, 3, 17, 64])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("starts_at_0", [True, False])
def test_equals_a_loop(n_steps: int, shape: tuple[int, ...], starts_at_0: bool) -> None:
    th.manual_seed(n_steps)
    gradients = th.randn(n_steps, 3, *shape, dtype=th.float64)
    decay = 0.9 * (th.rand(n_steps, 3) > 0.2).double()
    initial = None if starts_at_0 else th.randn(3, *shape, dtype=th.float64)
    copies = [x if x is None else x.clone() for x in (gradients, decay, initial)]
    found = eligibility_trace(gradients, decay, initial)
    assert found.dtype == th.float64
    assert th.allclose(found, loop(gradients, decay, initial), atol=1e-12)
    for x, copy in zip((gradients, decay, initial), copies, strict=True):
        assert x is copy or th.equal(x, copy)  # type: ignore[arg-type]


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_is_the_forward_view(lam: float) -> None:
    """sum_t delta_t z_t = sum_t g_t sum_k (gamma lambda)^k delta_{t+k} of each episode."""
    th.manual_seed(0)
    gamma, ends = 0.9, th.tensor([[0, 0, 1, 0, 0, 0, 1, 1, 0]]).T.bool()
    gradients = th.randn(9, 1, 4, dtype=th.float64)
    residuals = th.randn(9, 1, dtype=th.float64)
    starts = th.cat((th.ones(1, 1, dtype=th.bool), ends[:-1]))
    z = eligibility_trace(gradients, gamma * lam * (~starts).double())
    forward = th.zeros(4, dtype=th.float64)
    for t in range(9):
        k = t
        while True:
            forward += (gamma * lam) ** (k - t) * residuals[k, 0] * gradients[t, 0]
            if k == 8 or ends[k, 0]:
                break
            k += 1
    assert th.allclose((residuals[..., None] * z).sum((0, 1)), forward, atol=1e-12)


def test_a_decay_of_0_ends_whatever_there_was() -> None:
    initial = th.tensor([[th.nan], [th.inf], [2.0]])
    assert eligibility_trace(th.ones(1, 3, 1), th.tensor([[0.0, 0.0, 0.5]]), initial).flatten().tolist() == [1, 1, 2]


@pytest.mark.parametrize(
    ("gradients", "decay", "initial"),
    [((3, 2, 4), (3, 1), None), ((3,), (3,), None), ((3, 2, 4), (2, 2), None), ((3, 2, 4), (3, 2), (2, 5))],
    ids=str,
)
def test_shapes_that_do_not_fit(gradients: Any, decay: Any, initial: Any) -> None:
    with pytest.raises(ValueError, match=r"\(3, 2\)|\(3,\)|\(2, 5\)|shape"):
        eligibility_trace(th.ones(gradients), th.ones(decay), None if initial is None else th.ones(initial))


class Doubled(th.autograd.Function):
    """An operation that vmap does not support."""

    @staticmethod
    def forward(_ctx: Any, x: th.Tensor) -> th.Tensor:
        return 2 * x

    @staticmethod
    def backward(_ctx: Any, *gradients: th.Tensor) -> Any:
        (gradient,) = gradients
        return 2 * gradient if bool(gradient.isfinite().all()) else gradient  # reads numbers


@pytest.mark.parametrize("n_rows", [1, 4])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("awkward", [False, True], ids=["vmap", "loop"])
def test_row_gradients_equal_one_backward_per_row(n_rows: int, weighted: bool, awkward: bool) -> None:
    th.manual_seed(0)
    first, last, unused = nn.Linear(3, 5), nn.Linear(5, 1), nn.Parameter(th.ones(2))
    hidden = first(th.randn(n_rows, 3)).tanh()
    outputs = last(Doubled.apply(hidden) if awkward else hidden).flatten()  # type: ignore[no-untyped-call]
    parameters = [*first.parameters(), unused, *last.parameters()]
    weights = th.randn(n_rows) if weighted else None
    found = row_gradients(outputs, parameters, weights)
    assert found.shape == (n_rows, sum(p.numel() for p in parameters))
    assert not found.requires_grad
    for i in range(n_rows):
        output = outputs[i] if weights is None else weights[i] * outputs[i]
        rows = th.autograd.grad(output, parameters, retain_graph=True, materialize_grads=True)
        assert th.allclose(found[i], th.cat([row.flatten() for row in rows]), atol=1e-6)


def test_row_gradients_of_constants_are_0() -> None:
    parameter = nn.Parameter(th.ones(3))
    assert row_gradients(th.ones(2), [parameter]).tolist() == [[0.0] * 3] * 2
    assert row_gradients(parameter * 2, []).shape == (3, 0)
    with pytest.raises(ValueError, match=r"outputs.*weights"):
        row_gradients(parameter * 2, [parameter], th.ones(2))
