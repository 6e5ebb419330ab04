"""Per-episode gradients against one backward pass per episode."""

import pytest
import torch as th
from torch import nn
from torch.func import functional_call

from sb3_pg.functional import episode_gradients


class DataDependent(nn.Module):
    """A module that vmap cannot take."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        return x if bool((x > -1e9).all()) else -x


@pytest.mark.parametrize("awkward", [False, True], ids=["vmap", "loop"])
@pytest.mark.parametrize("max_floats", [2**24, 1], ids=["one chunk", "chunks of one"])
def test_equals_one_backward_per_episode(awkward: bool, max_floats: int) -> None:
    th.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), DataDependent() if awkward else nn.Identity(), nn.Linear(5, 4))
    episodes = th.tensor([0, 2, 1, 0, 0, 2, 1, 0, 2, 0])  # interleaved, of lengths 5, 2, 3
    observations, actions = th.randn(10, 3), th.randint(4, (10,))
    weights = th.randn(2, 10)

    def log_prob(parameters: dict[str, th.Tensor], obs: th.Tensor, act: th.Tensor) -> th.Tensor:
        logits: th.Tensor = functional_call(net, parameters, (obs,))
        return logits.log_softmax(-1).gather(-1, act[..., None]).squeeze(-1)

    parameters: dict[str, th.Tensor] = dict(net.named_parameters())
    found: dict[int, th.Tensor] = {}
    for indices, gradients in episode_gradients(
        log_prob, parameters, observations, actions, weights, episodes, max_floats
    ):
        assert gradients.shape == (len(indices), 2, sum(p.numel() for p in net.parameters()))
        found |= dict(zip(indices.tolist(), gradients, strict=True))
    assert sorted(found) == [0, 1, 2]
    for episode, gradients in found.items():
        rows = episodes == episode
        for k in range(2):
            loss = weights[k, rows] @ log_prob(parameters, observations[rows], actions[rows])
            expected = th.cat([g.flatten() for g in th.autograd.grad(loss, list(net.parameters()))])
            assert th.allclose(gradients[k], expected, atol=1e-6)


def test_takes_dict_observations() -> None:
    weight = th.tensor([2.0])
    observations = {"a": th.tensor([1.0, 2.0, 3.0]), "b": th.tensor([10.0, 20.0, 30.0])}
    ((_, gradients),) = episode_gradients(
        lambda p, obs, act: p["w"] * (obs["a"] + obs["b"]) * act,
        {"w": weight},
        observations,
        th.ones(3),
        th.ones(1, 3),
        th.tensor([0, 0, 1]),
    )
    assert sorted(gradients.flatten().tolist()) == [33.0, 33.0]
