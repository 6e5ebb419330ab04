"""What undoes an update."""

import copy
from typing import Any

import pytest
import torch as th

from sb3_pg.learner.rollback import OptimizerSnapshot


def step(optimizer: th.optim.Optimizer, generator: th.Generator) -> None:
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = th.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    optimizer.step()


def numbers(optimizer: th.optim.Optimizer) -> Any:
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {i: {name: th.as_tensor(value).tolist() for name, value in of.items()} for i, of in state.items()}


@pytest.mark.parametrize("n_before", [0, 3])
@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [
        (th.optim.Adam, {"amsgrad": True}),
        (th.optim.Adam, {"fused": True}),
        (th.optim.RMSprop, {"centered": True}),
        (th.optim.SGD, {"momentum": 0.9}),
        (th.optim.NAdam, {}),
    ],
)
def test_statistics_are_put_back(cls: Any, kwargs: dict[str, Any], n_before: int) -> None:
    image = th.randn(4, 3, 5, 5).to(memory_format=th.channels_last)
    parameters = [th.nn.Parameter(value) for value in (image, th.randn(7), th.randn(2, 3, dtype=th.float64))]
    optimizer, generator = cls(parameters, lr=0.1, **kwargs), th.Generator().manual_seed(0)
    for _ in range(n_before):
        step(optimizer, generator)
        OptimizerSnapshot(optimizer)
    for _ in range(2):
        before, snapshot = numbers(optimizer), OptimizerSnapshot(None, optimizer)
        step(optimizer, generator)
        assert numbers(optimizer) != before
        snapshot.restore()
        assert numbers(optimizer) == before
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # the tensors are others from now on


def test_statistics_that_are_not_finite_are_forgotten() -> None:
    parameters = [th.nn.Parameter(th.zeros(2)) for _ in range(2)]
    optimizer = th.optim.RMSprop(parameters)
    step(optimizer, th.Generator().manual_seed(0))
    optimizer.state[parameters[0]]["square_avg"][1] = th.nan
    OptimizerSnapshot(optimizer).restore()
    assert optimizer.state.keys() == {parameters[1]}
