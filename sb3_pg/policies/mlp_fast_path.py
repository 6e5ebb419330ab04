"""Compute SB3's standard MLP policies with bare matrices: the same numbers without the overhead of modules."""

from collections.abc import Callable, Iterable

import numpy as np
import torch as th
import torch.nn.functional as nnf
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from torch import nn

from sb3_pg.compat import is_compiled_in_place
from sb3_pg.policies.observations import Observations
from sb3_pg.policies.policy_cache import PolicyCache, overrides, own_methods

Layer = Callable[[th.Tensor], th.Tensor]
NumpyLayer = Callable[[np.ndarray], np.ndarray]
_FUNCTIONS: dict[type, Layer] = {nn.Tanh: th.tanh, nn.ReLU: th.relu}


class MlpFastPath:
    """The layers of a policy that consists of flat features, :class:`MlpExtractor` and linear heads.

    :param policy: such a policy, see :func:`mlp_fast_path`; no reference to it is kept
    """

    def __init__(self, policy: ActorCriticPolicy) -> None:
        space, extractor = policy.observation_space, policy.mlp_extractor
        self.n_classes = int(space.n) if isinstance(space, spaces.Discrete) else None
        self._actor = [*extractor.policy_net, policy.action_net]
        self._parameters = [parameter for module in self._actor for parameter in module.parameters()]
        self._arrays: tuple[list[int], list[NumpyLayer] | None] = [], None
        self._latent_pi, self._action_net = _bare(extractor.policy_net), _bare([policy.action_net])
        self._values = [*_bare(extractor.value_net), *_bare([policy.value_net])]
        #: whether the layers compute the same in training and in evaluation mode
        self.same_in_both_modes = {nn.Linear, *_FUNCTIONS} >= {
            type(module) for module in (*extractor.policy_net, *extractor.value_net)
        }

    def features(self, observations: Observations) -> th.Tensor:
        """Return the input of the first layer, ``(n_samples, n_features)``. Discrete observations are one-hot."""
        assert isinstance(observations, th.Tensor)
        if self.n_classes is not None:
            observations = nnf.one_hot(observations.long().flatten(), self.n_classes)
        return observations.flatten(1).float()

    def latent_pi(self, features: th.Tensor) -> th.Tensor:
        """Return the output of the actor's last hidden layer."""
        return _apply(self._latent_pi, features)

    def action_outputs(self, features: th.Tensor) -> th.Tensor:
        """Return the actor's output: logits or means, ``(n_samples, n_outputs)``."""
        return _apply(self._action_net, self.latent_pi(features))

    def values(self, features: th.Tensor) -> th.Tensor:
        """Return V(s), ``(n_samples,)``."""
        return _apply(self._values, features).flatten()

    def numpy_actor(self) -> list[NumpyLayer] | None:
        """Return the layers of :meth:`action_outputs` in NumPy, whose calls take less time than torch's.

        They use the parameters' present memory, which may be replaced between rollouts: call this before every rollout.

        :return: None if a layer is of another kind, or if a parameter is not on the CPU or not in single precision
        """
        addresses = [parameter.data_ptr() for parameter in self._parameters]
        if addresses != self._arrays[0]:
            self._arrays = addresses, numpy_layers(self._actor)
        return self._arrays[1]


def mlp_fast_path(policy: ActorCriticPolicy, cache: PolicyCache) -> MlpFastPath | None:
    """Return the policy's bare layers, or None if its networks are not SB3's standard ones or have hooks.

    :param policy: the policy
    :param cache: its cache
    """
    if cache.fast_path is None:
        cache.fast_path = MlpFastPath(policy) if _is_standard(policy) else False
    return None if cache.calls_matter else cache.fast_path or None


def value_function(policy: ActorCriticPolicy) -> Callable[[Observations], th.Tensor]:
    """Return the fastest function that computes V(s) and respects the methods which the policy replaces.

    :param policy: the policy; its modules must stay the same while the function is in use
    :return: takes observations, one row per sample, and returns values ``(n_samples,)``
    """
    own = own_methods(policy)
    layers = None if own.values else mlp_fast_path(policy, own.cache)
    if layers is None:
        return lambda observations: policy.predict_values(observations).flatten()
    return lambda observations: layers.values(layers.features(observations))


def _is_standard(policy: ActorCriticPolicy) -> bool:
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


def _bare(modules: Iterable[nn.Module]) -> list[Layer]:
    """Return functions that compute the same as the modules, without the overhead of calling modules."""

    def bare(module: nn.Module) -> Layer:
        if type(module) is nn.Linear:
            weight, bias = module.weight, module.bias
            return lambda x: nnf.linear(x, weight, bias)
        return _FUNCTIONS.get(type(module), module)

    if isinstance(modules, nn.Module) and is_compiled_in_place(modules):
        return [modules]
    return [bare(module) for module in modules]


def _apply(layers: list[Layer], x: th.Tensor) -> th.Tensor:
    for layer in layers:
        x = layer(x)
    return x


def numpy_layers(modules: list[nn.Module]) -> list[NumpyLayer] | None:
    """Return layers in NumPy that use the parameters' present memory.

    :param modules: one after the other
    :return: None if a layer is of another kind, or if a parameter is not on the CPU or not in single precision
    """
    parameters = [parameter for module in modules for parameter in module.parameters()]
    known = {nn.Linear, nn.Tanh, nn.ReLU} >= {type(module) for module in modules}
    known &= all(getattr(module, "bias", module) is not None for module in modules)
    known &= all(p.device.type == "cpu" and p.dtype == th.float32 for p in parameters)
    return [_numpy_layer(module) for module in modules] if known else None


def _numpy_layer(module: nn.Module) -> NumpyLayer:
    if isinstance(module, nn.Linear):
        weight, bias = module.weight.detach().numpy().T, module.bias.detach().numpy()
        return lambda x: x @ weight + bias
    return np.tanh if isinstance(module, nn.Tanh) else lambda x: np.maximum(x, 0)
