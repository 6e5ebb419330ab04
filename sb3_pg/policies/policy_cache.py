"""What a policy is made of: found once, since walking through its modules takes longer than a small update."""

import copy
import inspect
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn.modules.module import _has_any_global_hook

PolicyT = TypeVar("PolicyT", bound=BasePolicy)
#: torch's modules that do something else in training than in evaluation.
_MODE_DEPENDENT = (
    nn.modules.batchnorm._NormBase,
    nn.modules.dropout._DropoutNd,
    nn.RNNBase,
    nn.RReLU,
    nn.MultiheadAttention,
)


#: SB3's own methods, as they were when this module was imported.
_OF_SB3 = dict(inspect.getmembers(ActorCriticPolicy))


def original(policy: PolicyT) -> PolicyT:
    """The policy itself, where ``torch.compile`` has wrapped it into a module of its own."""
    wrapped = policy._modules.get("_orig_mod")  # torch has no public name for it
    return policy if wrapped is None else cast(PolicyT, wrapped)


def overrides(policy: BasePolicy, *methods: str) -> bool:
    """Whether the policy replaces one of these methods of SB3's ActorCriticPolicy, in its class or in the object.

    A policy that ``torch.compile`` has wrapped replaces all of them.
    """
    cls, own = type(policy), vars(policy)
    for name in methods:  # noqa: SIM110 (a generator takes twice the time, several times in every small update)
        if name in own or getattr(cls, name, None) is not _OF_SB3[name]:
            return True
    return False


def has_own_forward(policy: BasePolicy) -> bool:
    """Whether the policy replaces a method of SB3's that samples, scores or extracts features.

    Then ``forward`` and ``evaluate_actions``, which SB3 calls, are the only ones that say what the policy is.
    """
    return overrides(policy, "forward", "evaluate_actions", "extract_features", "get_distribution", "_predict")


def has_own_head(policy: ActorCriticPolicy) -> bool:
    """Whether the policy replaces SB3's way from the actor's last layer to the distribution, or methods of that."""
    return overrides(policy, "_get_action_dist_from_latent") or is_patched(policy.action_dist)


@cache
def _methods_of(cls: type) -> frozenset[str]:
    """Names of a class's methods; of those that all modules have, the ones that a call or a change of mode calls."""
    members = {name: getattr(cls, name, None) for name in dir(cls)}
    methods = {name for name, member in members.items() if callable(member) and not inspect.isclass(member)}
    return frozenset(methods.difference(dir(nn.Module)) | methods & {"forward", "train"})


def is_patched(instance: object) -> bool:
    """Whether somebody has replaced a method of the object's class in the object itself."""
    return not vars(instance).keys().isdisjoint(_methods(instance))


def _methods(instance: object) -> frozenset[str]:
    cls: Any = type(instance)
    return _methods_of(cls)


def visible_changes(policy: BasePolicy) -> tuple[int, ...]:
    """Numbers that differ after a method of the policy was replaced or put back, or a hook on it added or removed."""
    module = original(policy)
    return id(policy), len(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks)


def has_own_predict(policy: BasePolicy) -> bool:
    """Whether the policy replaces SB3's ``predict``, in its class or in the object."""
    module = original(policy)
    return "predict" in vars(module) or type(module).predict is not BasePolicy.predict


class Snapshot:
    """Values of tensors at one moment; of parameters of one kind as one vector, which is fewer operations.

    :param parameters: floating
    :param buffers: of any kind
    """

    def __init__(self, parameters: list[nn.Parameter], buffers: list[th.Tensor]) -> None:
        self._parameters, self._buffers = parameters, buffers
        self._trained = [parameter.requires_grad for parameter in parameters]
        groups: dict[Any, list[nn.Parameter]] = {}
        for parameter in parameters:
            groups.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        with th.no_grad():
            self._flat = [(group, _flatten(group)) for group in groups.values()]
            self._copies = [buffer.clone() for buffer in buffers]

    def values(self) -> dict[th.Tensor, th.Tensor]:
        """Tensor -> its value."""
        copies: dict[th.Tensor, th.Tensor] = dict(zip(self._buffers, self._copies, strict=True))
        for group, flat in self._flat:
            copies.update(zip(group, _unflatten_dense_tensors(flat, group), strict=True))
        return copies

    def is_finite(self) -> bool:
        """Whether all parameters are finite. (An overflowing sum says no, too.)"""
        return all(math.isfinite(flat.sum()) for _, flat in self._flat)

    def equals(self, other: "Snapshot") -> bool:
        """Whether another snapshot is of the same tensors with the same values, frozen ones and all."""
        return (
            self._parameters is other._parameters
            and self._trained == other._trained
            and all(th.equal(a, b) for (_, a), (_, b) in zip(self._flat, other._flat, strict=True))
            and all(th.equal(a, b) for a, b in zip(self._copies, other._copies, strict=True))
        )


def _flatten(group: list[nn.Parameter]) -> th.Tensor:
    flat: th.Tensor = _flatten_dense_tensors(group)
    return flat.clone() if len(group) == 1 else flat  # of one tensor it is a view


def is_listened_to(modules: Iterable[nn.Module]) -> bool:
    """Whether there are hooks on calls of any of these modules, or the user has compiled one in place."""
    return bool(_has_any_global_hook()) or any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or (module._compiled_call_impl and not getattr(module._compiled_call_impl, "for_updates_only", False))
        for module in modules
    )


class Structure:
    """The modules and parameters of a policy, which it holds no reference to.

    :param policy: the policy
    """

    def __init__(self, policy: BasePolicy) -> None:
        self.parts = [module for module in policy.modules() if module is not policy]
        self.parameters = list(policy.parameters())
        self.buffers = list(policy.buffers())
        #: the bare layers of :mod:`sb3_pg.policies.mlp_fast_path`, False if there are none, None if nobody has asked
        self.plain: Any = None
        self.attributes = [vars(part) for part in self.parts]
        self._methods = [(vars(part).keys(), _methods(part)) for part in self.parts]
        self._hooks = [
            hooks
            for part in (policy, *self.parts)
            for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
        ]
        self._n_attributes: list[int] = []
        # A weight that is no parameter may be replaced unnoticed.
        constants = not all(names.isdisjoint(("weight", "bias")) for names, _ in self._methods)
        self._is_irregular = constants or "log_std" in vars(policy) or _splits_features(policy)
        self.look_at_calls(policy)
        tables = [t for m in (policy, *self.parts) for t in (m._modules, m._parameters, m._buffers)]
        self._tables = [table.values() for table in tables if table]
        self._empty = [table for table in tables if not table]
        self._ids = self._identify()

    def _identify(self) -> list[tuple[Any, ...]]:
        return [tuple(map(type, self.parts)), *(tuple(map(id, values)) for values in self._tables)]

    def is_current(self) -> bool:
        """Whether no module, parameter or buffer has been added, removed or replaced, and no module's class."""
        return self._identify() == self._ids and not any(self._empty)

    def snapshot(self) -> Snapshot:
        """The parameters' and buffers' values as they are now."""
        return Snapshot(self.parameters, self.buffers)

    def look_at_calls(self, policy: BasePolicy) -> None:
        """Look again for hooks and for methods that somebody has replaced.

        :param policy: the policy
        """
        n_attributes = list(map(len, self.attributes))
        if n_attributes != self._n_attributes:
            self._n_attributes = n_attributes
            self._is_patched = not all(names.isdisjoint(methods) for names, methods in self._methods)
        has_hooks = any(self._hooks) or bool(_has_any_global_hook())
        #: whether only SB3's own calls of the policy and its modules say what the policy is
        self.calls_matter = has_hooks or self._is_patched or self._is_irregular

    @property
    def is_same_in_both_modes(self) -> bool:
        """Whether the modules surely compute the same in training and in evaluation mode.

        Hooks, and modules that are neither torch's nor SB3's, may look at the mode.
        """
        return self._parts_ignore_modes and not self.calls_matter

    @cached_property
    def _parts_ignore_modes(self) -> bool:
        names = [type(part).__module__ for part in self.parts]
        known = all(name.startswith(("torch.nn.modules.", "stable_baselines3.")) for name in names)
        return known and not any(isinstance(part, _MODE_DEPENDENT) for part in self.parts)

    @cached_property
    def has_own_modes(self) -> bool:
        """Whether a module does more, on a change of mode, than to note it."""
        return any(
            type(part).train is not nn.Module.train or isinstance(part, th.jit.ScriptModule) for part in self.parts
        )


def _splits_features(policy: BasePolicy) -> bool:
    """Whether a features extractor that actor and critic share has been replaced in one of its three places only.

    SB3's methods differ in where they look for it.
    """
    names = ("features_extractor", "pi_features_extractor", "vf_features_extractor")
    extractors = {getattr(policy, name, None) for name in names}
    return getattr(policy, "share_features_extractor", False) and len(extractors) > 1


_KNOWN: WeakKeyDictionary[nn.Module, Structure] = WeakKeyDictionary()


def structure_of(policy: BasePolicy) -> Structure:
    """The policy's structure, as it was at the latest :func:`set_training_mode`."""
    structure = _KNOWN.get(policy)
    return _KNOWN.setdefault(policy, Structure(policy)) if structure is None else structure


def set_training_mode(policy: BasePolicy, mode: bool) -> None:
    """As the policy's method, in a tenth of the time; looks whether the policy's structure is still the same.

    :param policy: the policy
    :param mode: True for training, False for evaluation
    """
    structure = structure_of(policy)
    if structure.is_current():
        structure.look_at_calls(policy)
    else:
        structure = _KNOWN[policy] = Structure(policy)
    if structure.calls_matter or structure.has_own_modes or overrides(policy, "set_training_mode", "train"):
        policy.set_training_mode(mode)
        return
    vars(policy)["training"] = mode
    for attributes in structure.attributes:
        attributes["training"] = mode


@contextmanager
def evaluation_mode(policy: BasePolicy) -> Iterator[None]:
    """Let the body have the policy as it acts."""
    before = policy.training
    set_training_mode(policy, False)
    try:
        yield
    finally:
        set_training_mode(policy, before)


def is_same_in_both_modes(policy: ActorCriticPolicy) -> bool:
    """Whether the policy surely computes the same in training and in evaluation mode.

    Methods and a distribution of its own may look at the mode.
    """
    return (
        structure_of(policy).is_same_in_both_modes
        and type(policy.action_dist).__module__.startswith("stable_baselines3.")
        and not has_own_forward(policy)
        and not has_own_head(policy)
    )


def without_gradient(policy: ActorCriticPolicy) -> type[th.no_grad] | type[th.inference_mode]:
    """The context for calls of the policy that are not differentiated.

    Hooks and methods of the user's own may keep tensors, which inference mode would make useless to autograd.
    """
    own = structure_of(policy).calls_matter or has_own_forward(policy) or has_own_head(policy)
    return th.no_grad if own or overrides(policy, "predict_values") else th.inference_mode


@contextmanager
def action_dist_kept(policy: ActorCriticPolicy) -> Iterator[None]:
    """Let the body use a copy of the policy's distribution object.

    It keeps what it computed last, graphs and tensors of transforms included, which could not be copied or used later.
    An object with methods of its own is not copied: they may be bound to it.
    """
    distribution = policy.action_dist
    if is_patched(distribution):
        yield
        return
    policy.action_dist = copy.copy(distribution)
    try:
        yield
    finally:
        policy.action_dist = distribution
