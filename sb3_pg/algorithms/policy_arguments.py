"""Checks of ``policy_kwargs`` and of the policy for an observation space, before SB3 builds the policy."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor, NatureCNN
from torch import nn

from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.suggestions import suggestion
from sb3_pg.errors import SpaceError

#: Arguments of a policy that the algorithm gives itself.
_GIVEN = ("observation_space", "action_space", "lr_schedule", "masks")
_OF_SB3 = (FlattenExtractor, NatureCNN, CombinedExtractor)
_NO_MASKS = "left out: the env has no action masks, or use_action_masks=False ignores them"


def check_policy_kwargs(
    policy: type[BasePolicy], kwargs: Mapping[str, Any], space: spaces.Space[Any], use_sde: bool
) -> None:
    """Check the arguments of a policy of SB3 or of this package. Others may do what they like with theirs.

    :param policy: class of the policy
    :param kwargs: ``policy_kwargs``; with action masks, without ``observe_masks``
    :param space: space of what the policy's networks see
    :param use_sde: whether the policy explores with gSDE
    :raises ValueError: a value is out of range, the policy does not take the observation space, or it is to see masks
        where there are none
    :raises TypeError: a value has the wrong type, or the policy has no such argument
    """
    if not policy.__module__.startswith(("stable_baselines3.", "sb3_pg.")):
        return
    _require_names(policy, kwargs)
    checks = {
        "net_arch": _net_arch,
        "activation_fn": _activation,
        "log_std_init": _number,  # require_usable_std knows the range
        "clip_mean": arg.real(0),
        "n_critics": arg.integer(1),
        "optimizer_kwargs": arg.instance(dict, optional=True),
        "features_extractor_class": arg.subclass(BaseFeaturesExtractor, optional=False),
        "features_extractor_kwargs": arg.instance(dict, optional=True),
        **dict.fromkeys(("ortho_init", "full_std", "use_expln", "squash_output"), arg.instance(bool)),
        **dict.fromkeys(("share_features_extractor", "normalize_images"), arg.instance(bool)),
    }
    named = {f"policy_kwargs[{name!r}]": value for name, value in kwargs.items()}
    arg.check_arguments(named, {f"policy_kwargs[{name!r}]": check for name, check in checks.items()})
    if kwargs.get("squash_output") and not use_sde:
        raise ValueError("policy_kwargs['squash_output'] must be False without gSDE, got True: give use_sde=True")
    _check_optimizer(kwargs)
    _check_extractor(policy, kwargs, space)


def require_policy_for(
    name: str, extractor: type[BaseFeaturesExtractor], space: spaces.Space[Any], observes_masks: bool
) -> None:
    """Require a policy whose networks take the space that they see.

    :param name: the policy's name
    :param extractor: class of its features extractor
    :param space: space of what they see: the observations, or their part without masks
    :param observes_masks: whether ``policy_kwargs`` ask that they see the masks
    :raises ValueError: the space is a Dict with nothing in it, or the policy takes a Dict, or none, and it is the other
    """
    if not isinstance(space, spaces.Dict):
        if name == "MultiInputPolicy" and extractor is CombinedExtractor:
            raise ValueError(
                "policy='MultiInputPolicy' is for Dict observations: use 'MlpPolicy', or 'CnnPolicy' for images, with "
                f"{space}"
            )
        return
    if not space.spaces:
        raise ValueError(
            "observation_space must have a key besides 'action_mask', which the policy does not see: or give "
            "policy_kwargs={'observe_masks': True} with 'MultiInputPolicy'"
        )
    if extractor in (FlattenExtractor, NatureCNN):
        masks = ", by policy_kwargs['observe_masks']" if observes_masks else ""
        raise ValueError(
            f"You must use `MultiInputPolicy` when working with dict observation space, not {name}: its networks would "
            f"see {space}{masks}"
        )


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Return the named parameters of a class, and those of its bases as long as keywords are handed on to them."""
    found: dict[str, inspect.Parameter] = {}
    for init in (vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base)):
        parameters = inspect.signature(init).parameters
        found = {**parameters, **found}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    unnamed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: parameter for name, parameter in found.items() if parameter.kind not in unnamed and name != "self"}


def _require_names(policy: type[BasePolicy], kwargs: Mapping[str, Any]) -> None:
    known = _parameters(policy).keys() - set(_GIVEN)
    if "memory" in kwargs:
        hint = "give memory= to the algorithm itself"
        hint = hint if issubclass(policy, ActorCriticPolicy) else "OffPAC has no memory"
        raise TypeError(f"policy_kwargs['memory'] is no argument of {policy.__name__}: {hint}")
    observes = kwargs.get("observe_masks", False)  # with masks, it was taken out
    if observes is not False or ("observe_masks" in kwargs and "observe_masks" not in known):
        raise ValueError(f"policy_kwargs['observe_masks'] must be {_NO_MASKS}, got {observes!r}")
    for name in kwargs:
        if name in _GIVEN:
            raise TypeError(f"policy_kwargs[{name!r}] is given by the algorithm: leave it out")
        if name not in known:
            meant = suggestion(name, known)
            hint = f"did you mean {meant!r}?" if meant else f"it has {sorted(known)}"
            raise TypeError(f"policy_kwargs[{name!r}] is no argument of {policy.__name__}; {hint}")


def _net_arch(name: str, value: Any) -> None:
    if isinstance(value, dict):
        for key, sizes in value.items():
            _sizes(f"{name}[{key!r}]", sizes)
    elif isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):  # SB3 takes it, with a warning
        _net_arch(f"{name}[0]", value[0])
    elif value is not None:
        _sizes(name, value)


def _sizes(name: str, value: Any) -> None:
    if not isinstance(value, list | tuple):
        raise TypeError(f"{name} must be a list of layer sizes, such as [64, 64], or a dict of lists, got {value!r}")
    for i, size in enumerate(value):
        arg.integer(1)(f"{name}[{i}]", size)


def _number(name: str, value: Any) -> None:
    if not arg.is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}")


def _activation(name: str, value: Any) -> None:
    try:
        fits = isinstance(value(), nn.Module)
    except TypeError:
        fits = False
    if not fits:
        raise TypeError(f"{name} must be a class of activations, such as torch.nn.ReLU, got {value!r}")


def _check_optimizer(kwargs: Mapping[str, Any]) -> None:
    """Take a step with such an optimizer, as the algorithms do: without closure, for vectors and matrices."""
    cls, options = kwargs.get("optimizer_class", th.optim.Adam), kwargs.get("optimizer_kwargs") or {}
    asked = f"policy_kwargs['optimizer_class']={cls!r} with policy_kwargs['optimizer_kwargs']={options!r}"
    parameters = [nn.Parameter(th.zeros(shape)) for shape in ((2, 2), (2,))]
    for parameter in parameters:
        parameter.grad = th.zeros_like(parameter)
    try:
        cls(parameters, lr=1e-3, **options).step()
    except Exception as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{asked} must take steps without a closure along any gradient: {error}") from error


def _check_extractor(policy: type[BasePolicy], kwargs: Mapping[str, Any], space: spaces.Space[Any]) -> None:
    """Check the arguments of the features extractor; build it without memory if it is one of SB3's."""
    default = _parameters(policy)["features_extractor_class"].default
    cls, options = kwargs.get("features_extractor_class", default), kwargs.get("features_extractor_kwargs") or {}
    name = f"policy_kwargs['features_extractor_kwargs']={options!r}"
    try:
        inspect.signature(cls).bind(space, **options)
    except TypeError as error:
        raise TypeError(f"{name} do not fit {cls.__name__}: {error}") from error
    if cls not in _OF_SB3:
        return
    if cls is not FlattenExtractor and not kwargs.get("normalize_images", True):
        options = {"normalized_image": True, **options}
    try:
        with th.device("meta"):
            cls(copy.deepcopy(space), **options)  # it may draw a sample
    except Exception as error:
        what = f"policy={policy.__name__!r} with {name}" if options else f"policy={policy.__name__!r}"
        raise SpaceError(f"{what} does not take {space}: {error}") from error
