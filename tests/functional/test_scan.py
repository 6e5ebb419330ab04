"""The recurrence against a plain loop, in both directions of differentiation."""

import pytest
import torch as th

from sb3_pg.functional import scan


def loop(x: th.Tensor, decay: th.Tensor) -> th.Tensor:
    rows, y = [], th.zeros_like(x[0])
    for t in reversed(range(len(x))):
        y = x[t] + decay[t] * y
        rows.append(y)
    return th.stack(rows[::-1])


@pytest.mark.parametrize("n_steps", [1, 2, 3, 4, 5, 7, 8, 63, 64, 65, 1000, 2048])
@pytest.mark.parametrize("n_envs", [1, 8, 64])
def test_equals_a_loop(n_steps: int, n_envs: int) -> None:
    th.manual_seed(n_steps)
    x = th.randn(n_steps, n_envs)
    decay = 0.99 * (th.rand(n_steps, n_envs) > 0.02).float()
    assert th.allclose(scan(x, decay), loop(x.double(), decay.double()).float(), rtol=1e-5, atol=1e-4)


def test_is_exact_in_double_precision_without_decay() -> None:
    x = th.arange(1.0, 101.0, dtype=th.float64)[:, None]
    assert th.equal(scan(x, th.ones_like(x)), x.flip(0).cumsum(0).flip(0))


def test_is_differentiable_in_both_arguments() -> None:
    th.manual_seed(0)
    x = th.randn(9, 2, dtype=th.float64, requires_grad=True)
    decay = th.rand(9, 2, dtype=th.float64, requires_grad=True)
    assert th.autograd.gradcheck(scan, (x, decay))


def test_leaves_its_arguments_alone() -> None:
    x, decay = th.randn(16, 2), th.rand(16, 2)
    copies = x.clone(), decay.clone()
    scan(x, decay)
    assert th.equal(x, copies[0])
    assert th.equal(decay, copies[1])


def test_takes_any_number_of_trailing_axes() -> None:
    th.manual_seed(0)
    x, decay = th.randn(6, 2, 3), th.rand(6, 2, 3)
    assert th.allclose(scan(x, decay), loop(x, decay))
    assert th.allclose(scan(x[:, 0, 0], decay[:, 0, 0]), loop(x, decay)[:, 0, 0])


def test_refuses_what_it_cannot_mean() -> None:
    with pytest.raises(ValueError, match="one shape"):
        scan(th.zeros(3, 2), th.zeros(3, 1))
    with pytest.raises(TypeError, match="int64"):
        scan(th.zeros(3, dtype=th.long), th.zeros(3))


@pytest.mark.cuda
@pytest.mark.skipif(not th.cuda.is_available(), reason="no CUDA device")
def test_equals_a_loop_on_cuda() -> None:
    x, decay = th.randn(777, 8, device="cuda"), th.rand(777, 8, device="cuda")
    y = scan(x, decay)
    assert y.device == x.device
    assert th.allclose(y, loop(x, decay), rtol=1e-5, atol=1e-5)
