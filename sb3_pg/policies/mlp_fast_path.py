"""SB3's standard MLP policies as bare matrices: the same numbers without the overhead of modules."""

from collections.abc import Callable, Iterable

import numpy as np
import torch as th
import torch.nn.functional as nnf
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from torch import nn

from sb3_pg.functional.perceptron import SLOPES, PerceptronJacobian
from sb3_pg.policies.observations import Observations
from sb3_pg.policies.policy_cache import overrides, structure_of

Layer = Callable[[th.Tensor], th.Tensor]
NumpyLayer = Callable[[np.ndarray], np.ndarray]


class PlainLayers:
    """The layers of a policy whose networks are flat features, :class:`MlpExtractor` and linear heads.

    :param policy: such a policy, see :func:`plain_layers`; no reference to it is kept
    """

    def __init__(self, policy: ActorCriticPolicy) -> None:
        space = policy.observation_space
        self.n_classes = int(space.n) if isinstance(space, spaces.Discrete) else None
        self._actor = [*policy.mlp_extractor.policy_net, policy.action_net]
        self._arrays: tuple[list[int], list[NumpyLayer]] = [], []
        self._latent_pi = _bare(_calls(policy.mlp_extractor.policy_net))
        self._action_net = _bare([policy.action_net])
        self._values = _bare([*_calls(policy.mlp_extractor.value_net), policy.value_net])

    def features(self, observations: Observations) -> th.Tensor:
        """Observations as the first layer takes them, ``(n_samples, n_features)``; Discrete ones one-hot."""
        assert isinstance(observations, th.Tensor)
        if self.n_classes is not None:
            observations = nnf.one_hot(observations.long().flatten(), self.n_classes)
        return observations.flatten(1).float()

    def latent_pi(self, features: th.Tensor) -> th.Tensor:
        """What the head that gives the action distribution starts from."""
        return _apply(self._latent_pi, features)

    def action_outputs(self, features: th.Tensor) -> th.Tensor:
        """Output of that head: logits or means, ``(n_samples, n_outputs)``."""
        return _apply(self._action_net, self.latent_pi(features))

    def numpy_actor(self) -> list[NumpyLayer] | None:
        """The layers of :meth:`action_outputs` in NumPy, whose calls cost less than torch's; None where it cannot.

        They share the parameters' memory as it is now: to be asked for again before every rollout.
        """
        parameters = [parameter for module in self._actor for parameter in module.parameters()]
        known = {nn.Linear, nn.Tanh, nn.ReLU} >= {type(module) for module in self._actor}
        known &= all(getattr(module, "bias", module) is not None for module in self._actor)
        if not known or any(p.device.type != "cpu" or p.dtype != th.float32 for p in parameters):
            return None
        addresses = [parameter.data_ptr() for parameter in parameters]
        if addresses != self._arrays[0]:
            self._arrays = addresses, [_numpy_layer(module) for module in self._actor]
        return self._arrays[1]

    def jacobian(self, features: th.Tensor) -> PerceptronJacobian | None:
        """That of :meth:`action_outputs` in the actor's parameters; None where layers are of other kinds."""
        linear = [module for module in self._actor if type(module) is nn.Linear]
        known = {nn.Linear, *SLOPES} >= {type(module) for module in self._actor}
        known &= all(module.bias is not None for module in linear)
        return PerceptronJacobian(self._actor, features) if known else None

    def values(self, features: th.Tensor) -> th.Tensor:
        """V(s), ``(n_samples,)``."""
        return _apply(self._values, features).flatten()


def plain_layers(policy: ActorCriticPolicy) -> PlainLayers | None:
    """The policy's bare layers, or None if its networks are anything else than SB3's standard ones."""
    structure = structure_of(policy)
    if structure.plain is None:
        structure.plain = PlainLayers(policy) if _is_plain(policy) else False
    return None if structure.calls_matter else structure.plain or None


def value_function(policy: ActorCriticPolicy) -> Callable[[Observations], th.Tensor]:
    """V(s) of the policy's critic, by the fastest way that honors the policy's own methods.

    :param policy: the policy, whose modules stay what they are as long as the function is in use
    :return: from one row per sample to ``(n_samples,)``
    """
    plain = None if overrides(policy, "predict_values") else plain_layers(policy)
    if plain is None:
        return lambda observations: policy.predict_values(observations).flatten()
    return lambda observations: plain.values(plain.features(observations))


def _is_plain(policy: ActorCriticPolicy) -> bool:
    space = policy.observation_space
    flat = isinstance(space, spaces.Discrete) or (isinstance(space, spaces.Box) and not is_image_space(space))
    return (
        flat
        and not overrides(policy, "extract_features", "__call__")
        and type(policy.pi_features_extractor) is FlattenExtractor
        and type(policy.vf_features_extractor) is FlattenExtractor
        and type(policy.mlp_extractor) is MlpExtractor
        and type(policy.mlp_extractor.policy_net) is nn.Sequential
        and type(policy.mlp_extractor.value_net) is nn.Sequential
        and type(policy.action_net) is nn.Linear
        and type(policy.value_net) is nn.Linear
    )


def _calls(network: nn.Sequential) -> Iterable[nn.Module]:
    """A network's layers, or the network itself where it is compiled as a whole."""
    return network if network._compiled_call_impl is None else [network]


def _bare(modules: Iterable[nn.Module]) -> list[Layer]:
    """What modules compute, without the overhead of calling them as such."""
    functions: dict[type, Layer] = {nn.Tanh: th.tanh, nn.ReLU: th.relu}

    def bare(module: nn.Module) -> Layer:
        if type(module) is nn.Linear:
            weight, bias = module.weight, module.bias
            return lambda x: nnf.linear(x, weight, bias)
        return functions.get(type(module), module)

    return [bare(module) for module in modules]


def _apply(layers: list[Layer], x: th.Tensor) -> th.Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _numpy_layer(module: nn.Module) -> NumpyLayer:
    if isinstance(module, nn.Linear):
        weight = module.weight.detach().numpy().T
        bias = module.bias.detach().numpy()
        return lambda x: x @ weight + bias
    return np.tanh if isinstance(module, nn.Tanh) else lambda x: np.maximum(x, 0)
