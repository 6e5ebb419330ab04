"""Clipping on one flat vector, and optimizers' options, against torch's defaults."""

from typing import Any

import pytest
import torch as th
from torch import nn

from sb3_pg.learner.gradient_step import clip_gradient
from sb3_pg.learner.optimizers import with_fewer_operations


def make_net() -> nn.Sequential:
    th.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3), nn.LayerNorm(3))


def descend(net: nn.Module, optimizer: th.optim.Optimizer, n_steps: int) -> None:
    data = th.Generator().manual_seed(0)
    for _ in range(n_steps):
        optimizer.zero_grad()
        (3 * net(th.randn(5, 4, generator=data)).exp().mean()).backward()
        optimizer.step()


def parameters(net: nn.Module) -> th.Tensor:
    return nn.utils.parameters_to_vector(net.parameters()).detach()


@pytest.mark.parametrize("max_norm", [None, 1e-3, 1e3])
@pytest.mark.parametrize("mixed", [False, True])
def test_clipping_is_that_of_torch(max_norm: float | None, mixed: bool) -> None:
    ours, theirs = make_net(), make_net()
    for net in (ours, theirs):
        if mixed:
            net[3].double()
        for i, parameter in enumerate(net.parameters()):
            parameter.grad = th.full_like(parameter, i + 1.0)
        net[0].bias.grad = None
    norm = clip_gradient(list(ours.parameters()), max_norm)
    assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(theirs.parameters(), max_norm or th.inf)))
    pairs: Any = zip(ours.parameters(), theirs.parameters(), strict=True)
    for a, b in pairs:
        assert (a.grad is None and b.grad is None) or th.allclose(a.grad, b.grad)


@pytest.mark.parametrize(("cls", "option"), [(th.optim.Adam, "fused"), (th.optim.RMSprop, "foreach")])
def test_steps_are_those_of_torch(cls: type[th.optim.Adam | th.optim.RMSprop], option: str) -> None:
    nets = [make_net() for _ in range(2)]
    optimizers = [cls(net.parameters(), lr=1e-2) for net in nets]
    assert with_fewer_operations(optimizers[0]) is optimizers[0]
    assert optimizers[0].param_groups[0][option] is True
    for net, optimizer in zip(nets, optimizers, strict=True):
        descend(net, optimizer, 5)
    faster, plain = map(parameters, nets)
    assert th.allclose(faster, plain, atol=1e-6)
    assert not th.allclose(faster, parameters(make_net()), atol=1e-2)


@pytest.mark.parametrize("cls", [th.optim.Adam, th.optim.RMSprop, th.optim.SGD])
@pytest.mark.parametrize("chosen", [{"foreach": False}, {"foreach": True}, {"differentiable": True}])
def test_what_the_user_has_chosen_stays(cls: Any, chosen: dict[str, bool]) -> None:
    optimizer = cls(make_net().parameters(), lr=1e-2, **chosen)
    before = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    after = with_fewer_operations(optimizer).param_groups[0]
    assert {name: value for name, value in after.items() if name != "params"} == before
