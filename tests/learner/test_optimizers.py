"""Clipping and RMSprop on one flat vector, against torch's own."""

import copy
import io
from typing import Any

import pytest
import torch as th
from torch import nn

from sb3_pg.learner.gradient_step import clip_gradient
from sb3_pg.learner.optimizers import FlatRMSprop, with_fewer_operations


def make_net() -> nn.Sequential:
    th.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3), nn.LayerNorm(3))


def descend(net: nn.Module, optimizer: th.optim.Optimizer, n_steps: int, skip: str = "") -> None:
    data = th.Generator().manual_seed(0)
    for _ in range(n_steps):
        optimizer.zero_grad()
        (3 * net(th.randn(5, 4, generator=data)).exp().mean()).backward()
        for name, parameter in net.named_parameters():
            if name == skip:
                parameter.grad = None
        optimizer.step()


def parameters(net: nn.Module) -> th.Tensor:
    return nn.utils.parameters_to_vector(net.parameters()).detach()


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"alpha": 0.5, "eps": 1e-3}, {"momentum": 0.9}, {"centered": True}, {"weight_decay": 0.1}, {"maximize": True}],
    ids=lambda kwargs: "-".join(kwargs) or "default",
)
@pytest.mark.parametrize("skip", ["", "2.bias"])
def test_steps_are_those_of_torch(kwargs: dict[str, Any], skip: str) -> None:
    ours, theirs = make_net(), make_net()
    descend(ours, FlatRMSprop(ours.parameters(), lr=1e-2, **kwargs), 20, skip)
    descend(theirs, th.optim.RMSprop(theirs.parameters(), lr=1e-2, **kwargs), 20, skip)
    assert th.allclose(parameters(ours), parameters(theirs), atol=1e-6)
    assert not th.allclose(parameters(ours), parameters(make_net()), atol=1e-2)


def test_states_are_exchanged_with_torch() -> None:
    """Saved after some steps and loaded, either way round, both go on alike."""
    nets = [make_net() for _ in range(3)]
    ours = FlatRMSprop(nets[0].parameters(), lr=1e-2)
    descend(nets[0], ours, 5)
    file = io.BytesIO()
    th.save(ours.state_dict(), file)
    file.seek(0)
    saved = th.load(file)
    assert saved["state"][0].keys() == {"step", "square_avg"}
    assert saved["state"][0]["step"] == 5
    for net, cls in zip(nets[1:], (th.optim.RMSprop, FlatRMSprop), strict=True):
        net.load_state_dict(nets[0].state_dict())
        optimizer = cls(net.parameters(), lr=1.0)
        optimizer.load_state_dict(copy.deepcopy(saved))
        descend(net, optimizer, 5)
    descend(nets[0], copy.copy(ours), 5)
    assert th.allclose(parameters(nets[1]), parameters(nets[2]), atol=1e-7)
    assert th.allclose(parameters(nets[0]), parameters(nets[2]), atol=1e-7)


def test_a_copied_optimizer_trains_its_own_net() -> None:
    net = make_net()
    optimizer = FlatRMSprop(net.parameters(), lr=1e-2)
    descend(net, optimizer, 3)
    other, other_optimizer = copy.deepcopy((net, optimizer))
    before = parameters(net)
    descend(other, other_optimizer, 3)
    assert th.equal(parameters(net), before)
    descend(net, optimizer, 3)
    assert th.equal(parameters(net), parameters(other))


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


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_hooks_and_schedulers_are_those_of_the_optimizer_that_was_given(momentum: float) -> None:
    """Each hook runs once a step, also where torch takes the step itself."""
    net = make_net()
    given = th.optim.RMSprop(net.parameters(), lr=1e-2, momentum=momentum)
    calls: list[str] = []
    given.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer = with_fewer_operations(given)
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    assert optimizer is given
    assert isinstance(optimizer, FlatRMSprop)
    scheduler = th.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    descend(net, optimizer, 2)
    scheduler.step()
    assert calls == ["before", "after"] * 2
    assert optimizer.param_groups[0]["lr"] == 5e-3


def test_adam_takes_its_fused_steps() -> None:
    nets = [make_net() for _ in range(2)]
    optimizers = [th.optim.Adam(net.parameters(), lr=1e-2) for net in nets]
    assert with_fewer_operations(optimizers[0]) is optimizers[0]
    assert optimizers[0].param_groups[0]["fused"]
    for net, optimizer in zip(nets, optimizers, strict=True):
        descend(net, optimizer, 5)
    separate, fused = map(parameters, nets)
    assert th.allclose(separate, fused, atol=1e-6)
    foreach = th.optim.Adam(nets[0].parameters(), foreach=True)
    assert with_fewer_operations(foreach).param_groups[0]["fused"] is None
