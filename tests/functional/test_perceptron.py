"""A perceptron's Jacobian against torch's, and Fisher products through it against those through autograd."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_pg.functional import FisherVectorProduct, PerceptronJacobian
from sb3_pg.policies import action_distribution, perceptron_distribution, torch_distributions

NETS: dict[str, Callable[[], list[nn.Module]]] = {
    "tanh": lambda: [nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)],
    "relu": lambda: [nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)],
    "linear": lambda: [nn.Linear(3, 2)],
    "two in a row": lambda: [nn.Linear(3, 5), nn.Linear(5, 2), nn.Tanh()],
}


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_jacobian_and_its_transpose(net: Callable[[], list[nn.Module]]) -> None:
    th.manual_seed(0)
    layers = [layer.double() for layer in net()]
    inputs = th.randn(7, 3, dtype=th.double)
    jacobian = PerceptronJacobian(layers, inputs)
    whole = nn.Sequential(*layers)
    names = [name for name, _ in whole.named_parameters()]
    assert all(a is b for a, b in zip(jacobian.parameters, whole.parameters(), strict=True))
    assert th.equal(jacobian.outputs, whole(inputs))
    vector = [th.randn_like(parameter) for parameter in jacobian.parameters]

    def outputs(*parameters: th.Tensor) -> Any:
        return th.func.functional_call(whole, dict(zip(names, parameters, strict=True)), inputs)

    _, expected = th.func.jvp(outputs, tuple(jacobian.parameters), tuple(vector))
    assert th.allclose(jacobian(vector), expected, atol=1e-12)
    cotangent = th.randn_like(jacobian.outputs)
    for ours, theirs in zip(
        jacobian.transposed(cotangent), th.autograd.grad(whole(inputs), jacobian.parameters, cotangent), strict=True
    ):
        assert th.allclose(ours, theirs, atol=1e-12)
    for i in range(len(vector)):  # nothing where a part is left out, and the others as they are
        alone: list[th.Tensor | None] = [None] * len(vector)
        alone[i] = vector[i]
        zeros = [part if j == i else th.zeros_like(part) for j, part in enumerate(vector)]
        assert th.allclose(jacobian(alone), jacobian(zeros), atol=1e-12)
    assert not jacobian([None] * len(vector)).any()


@pytest.mark.parametrize("layer", [nn.GELU(), nn.Linear(2, 2, bias=False)])
def test_other_layers_are_refused(layer: nn.Module) -> None:
    with pytest.raises(TypeError, match="layers must be linear, with a bias, or one of"):
        PerceptronJacobian([nn.Linear(3, 2), layer], th.zeros(1, 3))


def test_parameters_that_have_changed_are_an_error() -> None:
    layer = nn.Linear(3, 2)
    jacobian = PerceptronJacobian([layer], th.zeros(1, 3))
    with th.no_grad():
        layer.weight += 1
    with pytest.raises(RuntimeError, match="have been changed"):
        jacobian([None, None])
    with pytest.raises(RuntimeError, match="have been changed"):
        jacobian.transposed(th.zeros(1, 2))


def policy_of(space: spaces.Space[Any], observations: spaces.Space[Any] | None = None, **kwargs: Any) -> Any:
    th.manual_seed(1)
    box = spaces.Box(-1, 1, (3,)) if observations is None else observations
    policy = ActorCriticPolicy(box, space, lambda _: 0.0, **{"net_arch": [5, 4], **kwargs})  # type: ignore[arg-type]
    for parameter in policy.parameters():
        parameter.data += 0.3 * th.randn_like(parameter)
    return policy


POLICIES: dict[str, tuple[spaces.Space[Any], dict[str, Any]]] = {
    "discrete": (spaces.Discrete(4), {}),
    "box": (spaces.Box(-1, 1, (2,)), {}),
    "multi_discrete": (spaces.MultiDiscrete([2, 3]), {}),
    "multi_binary": (spaces.MultiBinary(3), {}),
    "relu": (spaces.Box(-1, 1, (2,)), {"activation_fn": nn.ReLU}),
    "no hidden layer": (spaces.Discrete(3), {"net_arch": []}),
    "classes": (spaces.Discrete(3), {"observations": spaces.Discrete(4)}),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("n_chunks", [1, 2])
@pytest.mark.parametrize("name", POLICIES)
def test_products_are_those_through_autograd(name: str, n_chunks: int, frozen: bool) -> None:
    space, kwargs = POLICIES[name]
    policy = policy_of(space, **kwargs)
    observations = th.arange(6) % 4 if name == "classes" else th.randn(6, 3)
    parameters = [p for n, p in policy.named_parameters() if "value" not in n]
    if frozen:
        parameters = parameters[1:] if len(parameters) > 2 else parameters[:1]
    chunks = list(observations.chunk(n_chunks))
    ours = FisherVectorProduct([partial(perceptron_distribution, policy, c) for c in chunks], parameters, 0.1)
    through_autograd = [partial(lambda c: torch_distributions(action_distribution(policy, c)), c) for c in chunks]
    general = FisherVectorProduct(through_autograd, parameters, 0.1)
    for _ in range(3):
        vector = th.randn(sum(p.numel() for p in parameters))
        expected = general(vector)
        assert (ours(vector) - expected).norm() <= 2e-6 * expected.norm()


def test_weights_that_layers_share_count_as_often_as_they_are_used() -> None:
    policy = policy_of(spaces.Discrete(3), net_arch=[5, 5, 5])
    policy.mlp_extractor.policy_net[4] = policy.mlp_extractor.policy_net[2]
    parameters = [p for n, p in policy.named_parameters() if "value" not in n]
    observations = th.randn(6, 3)
    ours = FisherVectorProduct([partial(perceptron_distribution, policy, observations)], parameters)
    general = FisherVectorProduct([lambda: torch_distributions(action_distribution(policy, observations))], parameters)
    vector = th.randn(sum(p.numel() for p in parameters))
    expected = general(vector)
    assert (ours(vector) - expected).norm() <= 2e-6 * expected.norm()


def test_parameters_that_have_no_part_are_an_error() -> None:
    policy = policy_of(spaces.Discrete(3))
    made = perceptron_distribution(policy, th.randn(6, 3))
    with pytest.raises(ValueError, match="depend on at least one of the parameters"):
        FisherVectorProduct([lambda: made], list(policy.value_net.parameters()))


class OwnHead(ActorCriticPolicy):
    """Makes its distribution in a way of its own."""

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Any:
        return self.action_dist.proba_distribution(2 * self.action_net(latent_pi))  # type: ignore[call-arg]


def test_other_policies_take_the_general_way() -> None:
    box = spaces.Box(-1, 1, (3,))
    observations = th.zeros(2, 3)
    assert perceptron_distribution(policy_of(spaces.Box(-1, 1, (2,)), use_sde=True), observations) is None
    assert perceptron_distribution(policy_of(spaces.Discrete(2), activation_fn=nn.GELU), observations) is None
    own = OwnHead(box, spaces.Discrete(2), lambda _: 0.0)
    assert perceptron_distribution(own, observations) is None
    hooked = policy_of(spaces.Discrete(2))
    hooked.action_net.register_forward_hook(lambda *_: None)
    assert perceptron_distribution(hooked, observations) is None
    image = spaces.Box(0, 255, (3, 36, 36), np.uint8)
    assert perceptron_distribution(policy_of(spaces.Discrete(2), image), th.zeros(2, 3, 36, 36)) is None
