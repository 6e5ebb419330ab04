"""SB3's standard MLP policies as bare matrices: the same numbers without the overhead of modules."""

from collections.abc import Callable, Iterable

import torch as th
import torch.nn.functional as nnf
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from torch import nn

from sb3_pg.rollout.batch import Observations

Layer = Callable[[th.Tensor], th.Tensor]


def overrides(policy: ActorCriticPolicy, *methods: str) -> bool:
    """Whether the policy's class replaces one of these methods of SB3's ActorCriticPolicy."""
    return any(getattr(type(policy), name) is not getattr(ActorCriticPolicy, name) for name in methods)


def has_plain_layers(policy: ActorCriticPolicy) -> bool:
    """Whether flat features, :class:`MlpExtractor` and linear heads are all that the policy's networks are."""
    space = policy.observation_space
    flat = isinstance(space, spaces.Discrete) or (isinstance(space, spaces.Box) and not is_image_space(space))
    return (
        flat
        and not overrides(policy, "extract_features", "__call__")
        and type(policy.pi_features_extractor) is FlattenExtractor
        and type(policy.vf_features_extractor) is FlattenExtractor
        and type(policy.mlp_extractor) is MlpExtractor
        and type(policy.action_net) is nn.Linear
        and type(policy.value_net) is nn.Linear
        and not any(m._forward_hooks or m._forward_pre_hooks for m in policy.modules())
    )


def flat_input(observations: th.Tensor, space: spaces.Space[object]) -> th.Tensor:
    """Observations as the first layer takes them, ``(n_samples, n_features)``; Discrete ones one-hot."""
    if isinstance(space, spaces.Discrete):
        observations = nnf.one_hot(observations.long().flatten(), int(space.n))
    return observations.flatten(1).float()


def bare_layers(modules: Iterable[nn.Module]) -> list[Layer]:
    """What modules compute, without the overhead of calling them as such."""
    functions: dict[type, Layer] = {nn.Tanh: th.tanh, nn.ReLU: th.relu}

    def bare(module: nn.Module) -> Layer:
        if type(module) is nn.Linear:
            weight, bias = module.weight, module.bias
            return lambda x: nnf.linear(x, weight, bias)
        return functions.get(type(module), module)

    return [bare(module) for module in modules]


#: torch's modules that do something else in training than in evaluation.
_MODE_DEPENDENT = (
    nn.modules.batchnorm._NormBase,
    nn.modules.dropout._DropoutNd,
    nn.RNNBase,
    nn.RReLU,
    nn.MultiheadAttention,
)


def is_same_in_both_modes(policy: ActorCriticPolicy) -> bool:
    """Whether the policy surely computes the same in training and in evaluation mode.

    Modules that are neither torch's nor SB3's may look at their mode.
    """
    return all(
        type(module).__module__.startswith(("torch.nn.", "stable_baselines3."))
        and not isinstance(module, _MODE_DEPENDENT)
        for module in policy.modules()
        if module is not policy
    )


def value_function(policy: ActorCriticPolicy) -> Callable[[Observations], th.Tensor]:
    """V(s) of the policy's critic, by the fastest way that honors the policy's own methods.

    :param policy: the policy, whose modules stay what they are as long as the function is in use
    :return: from one row per sample to ``(n_samples,)``
    """
    if overrides(policy, "predict_values") or not has_plain_layers(policy):
        return lambda observations: policy.predict_values(observations).flatten()
    layers = bare_layers((*policy.mlp_extractor.value_net, policy.value_net))
    space = policy.observation_space

    def values(observations: Observations) -> th.Tensor:
        assert isinstance(observations, th.Tensor)
        x = flat_input(observations, space)
        for layer in layers:
            x = layer(x)
        return x.flatten()

    return values
