"""Find and keep a policy's modules, methods and hooks: to walk through them takes longer than a small update."""

import copy
import functools
import inspect
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, TypeVar, cast
from weakref import WeakKeyDictionary

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from torch import nn
from torch.distributions import Distribution

from sb3_pg import compat
from sb3_pg.policies.masked_policy import MaskedPolicy

PolicyT = TypeVar("PolicyT", bound=BasePolicy)
#: SB3's own methods, as they were when this module was imported, and those that do the same in classes of this package.
_STANDARD: dict[str, tuple[Any, ...]] = {name: (method,) for name, method in inspect.getmembers(ActorCriticPolicy)}


# ---------------------------------------------------------------- methods


def original(policy: PolicyT) -> PolicyT:
    """Return the policy inside a module that ``torch.compile`` has returned; any other policy is returned itself."""
    wrapped = compat.compiled_original(policy)
    return policy if wrapped is None else cast(PolicyT, wrapped)


def uncompiled() -> AbstractContextManager[None]:
    """Return a context that runs compiled policies as original code: a compiled graph has a first derivative only."""
    stance: AbstractContextManager[None] = th.compiler.set_stance("force_eager")
    return stance


def overrides(policy: BasePolicy, *methods: str) -> bool:
    """Whether the policy replaces one of these methods of SB3's ActorCriticPolicy, in its class or in the object.

    A policy that ``torch.compile`` has wrapped replaces all of them.
    """
    cls, own = type(policy), vars(policy)
    for name in methods:  # noqa: SIM110 (a generator takes twice the time, several times in every small update)
        if name in own or getattr(cls, name, None) not in _STANDARD[name]:
            return True
    return False


def count_as_standard(cls: type[ActorCriticPolicy]) -> None:
    """Let methods of a class count as SB3's: they sample, score and value observations in the same way.

    :param cls: a class of this package
    """
    for name, known in _STANDARD.items():
        if name in vars(cls):
            _STANDARD[name] = (*known, vars(cls)[name])


def has_own_forward(policy: BasePolicy) -> bool:
    """Whether the policy replaces a method of SB3's that samples, scores or extracts features.

    Such a policy is called through ``forward`` and ``evaluate_actions`` only, as SB3 calls it.
    """
    return overrides(policy, "forward", "evaluate_actions", "extract_features", "get_distribution", compat.PREDICT)


def has_own_predict(policy: BasePolicy) -> bool:
    """Whether the policy replaces SB3's ``predict``, in its class or in the object, but to add masks."""
    module = original(policy)
    return "predict" in vars(module) or type(module).predict not in (BasePolicy.predict, MaskedPolicy.predict)


@functools.cache
def _methods_of(cls: type) -> frozenset[str]:
    """Return the names of a class's methods. Of nn.Module's methods, only ``forward`` and ``train`` are included."""
    members = {name: getattr(cls, name, None) for name in dir(cls)}
    methods = {name for name, member in members.items() if callable(member) and not inspect.isclass(member)}
    return frozenset(methods.difference(dir(nn.Module)) | methods & {"forward", "train"})


def _methods(instance: object) -> frozenset[str]:
    cls: Any = type(instance)
    return _methods_of(cls)


def is_patched(instance: Any) -> bool:
    """Whether a method of the object's class is replaced in the object itself."""
    return not vars(instance).keys().isdisjoint(_methods(instance))


def is_listened_to(modules: Iterable[nn.Module]) -> bool:
    """Whether one of these modules has hooks on its calls or is compiled in place."""
    return compat.has_global_hooks() or any(
        any(compat.hooks_of(module)) or compat.is_compiled_in_place(module) for module in modules
    )


def visible_changes(policy: BasePolicy) -> tuple[int, ...]:
    """Return numbers that change when a method of the policy, or a hook on its forward, is added or removed."""
    module = original(policy)
    return id(policy), len(vars(module)), *map(len, compat.hooks_of(module)[:2])


# ---------------------------------------------------------------- modules and parameters


class Snapshot:
    """A copy of the values of tensors.

    Parameters of the same dtype and device are kept as one vector, which takes fewer operations.

    :param parameters: floating tensors
    :param buffers: tensors of any dtype
    """

    def __init__(self, parameters: list[nn.Parameter], buffers: list[th.Tensor]) -> None:
        groups: dict[Any, list[nn.Parameter]] = {}
        for parameter in parameters:
            groups.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        with th.no_grad():
            self._flat = [(group, _flatten(group)) for group in groups.values()]
            self._copies: dict[th.Tensor, th.Tensor] = {buffer: buffer.clone() for buffer in buffers}

    def values(self) -> dict[th.Tensor, th.Tensor]:
        """Return the copied value of each tensor."""
        copies = dict(self._copies)
        for group, flat in self._flat:
            copies.update(zip(group, compat.unflatten(flat, group), strict=True))
        return copies

    def restore(self) -> None:
        """Write the copied values back into the tensors."""
        with th.no_grad():
            for tensor, value in self.values().items():
                tensor.copy_(value)

    def has_values_of(self, other: "Snapshot") -> bool:
        """Whether the parameters have the same values as in another snapshot of them."""
        return all(th.equal(mine, theirs) for (_, mine), (_, theirs) in zip(self._flat, other._flat, strict=True))

    def is_finite(self) -> bool:
        """Whether all copied parameters are finite. It is False, too, if their sum overflows."""
        return all(math.isfinite(flat.sum()) for _, flat in self._flat)


def _flatten(group: list[nn.Parameter]) -> th.Tensor:
    flat: th.Tensor = compat.flatten(group)
    return flat.clone() if len(group) == 1 else flat  # flatten returns a view of a single tensor


class PolicyCache:
    """Lists the modules and parameters of a policy, and notes whether they have hooks or replaced methods.

    It holds no reference to the policy itself.

    :param policy: the policy
    """

    def __init__(self, policy: BasePolicy) -> None:
        self.parts = [module for module in policy.modules() if module is not policy]
        self.parameters, self.buffers = list(policy.parameters()), list(policy.buffers())
        #: result of :func:`~sb3_pg.policies.mlp_fast_path.mlp_fast_path`; False if there is no fast path, None if the
        #: function has not been called yet
        self.fast_path: Any = None
        #: whether a change of mode does more in some module than to set its attribute ``training``
        self.has_own_modes = any(
            type(part).train is not nn.Module.train or isinstance(part, th.jit.ScriptModule) for part in self.parts
        )
        self.attributes = [vars(part) for part in self.parts]
        self._methods = [(vars(part).keys(), _methods(part)) for part in self.parts]
        self._hooks = [hooks for part in (policy, *self.parts) for hooks in compat.hooks_of(part)]
        self._n_attributes: list[int] = []
        # If a weight is a plain attribute instead of a parameter, its replacement is not noticed.
        constants = any(
            isinstance(attributes.get(name), th.Tensor) for attributes in self.attributes for name in ("weight", "bias")
        )
        self._is_irregular = constants or "log_std" in vars(policy) or _splits_features(policy)
        self.look_at_calls()
        tables = [table for part in (policy, *self.parts) for table in compat.contents_of(part)]
        self._tables = [table.values() for table in tables if table]
        self._empty = [table for table in tables if not table]
        self._ids = self._identify()
        self._finite_versions: list[int] | None = None

    def _identify(self) -> list[tuple[Any, ...]]:
        return [tuple(map(type, self.parts)), *(tuple(map(id, values)) for values in self._tables)]

    def is_current(self) -> bool:
        """Whether all modules, parameters and buffers, and the modules' classes, are still the same."""
        return self._identify() == self._ids and not any(self._empty)

    def snapshot(self) -> Snapshot:
        """Copy the values of parameters and buffers."""
        return Snapshot(self.parameters, self.buffers)

    def note_finite(self) -> None:
        """Note that all parameters are finite now."""
        self._finite_versions = self._versions()

    def is_known_finite(self) -> bool:
        """Whether no parameter was changed since all were finite. A write through ``.data`` is not noticed."""
        return self._finite_versions == self._versions()

    def _versions(self) -> list[int]:
        return [-1 if parameter.is_inference() else compat.version_of(parameter) for parameter in self.parameters]

    def look_at_calls(self) -> None:
        """Update :attr:`calls_matter`."""
        n_attributes = list(map(len, self.attributes))
        if n_attributes != self._n_attributes:
            self._n_attributes = n_attributes
            self._is_patched = not all(names.isdisjoint(methods) for names, methods in self._methods)
        #: whether modules have hooks, replaced methods and the like, so that they must be called as SB3 calls them
        self.calls_matter = self._is_patched or self._is_irregular or any(self._hooks) or compat.has_global_hooks()


def _splits_features(policy: BasePolicy) -> bool:
    """Whether a shared features extractor was replaced in some of its three attributes only.

    SB3's methods differ in which attribute they use.
    """
    names = ("features_extractor", "pi_features_extractor", "vf_features_extractor")
    extractors = {getattr(policy, name, None) for name in names}
    return getattr(policy, "share_features_extractor", False) and len(extractors) > 1


_KNOWN: WeakKeyDictionary[nn.Module, PolicyCache] = WeakKeyDictionary()


def policy_cache(policy: BasePolicy) -> PolicyCache:
    """Return the policy's cache. :func:`set_training_mode` brings it up to date."""
    cache = _KNOWN.get(policy)
    return _KNOWN.setdefault(policy, PolicyCache(policy)) if cache is None else cache


class OwnMethods(NamedTuple):
    """Which of SB3's methods a policy replaces, and its cache.

    :param forward: see :func:`has_own_forward`
    :param head: whether it replaces the method that makes the distribution, or a method of the distribution
    :param values: whether it replaces ``predict_values``
    :param cache: see :func:`policy_cache`
    """

    forward: bool
    head: bool
    values: bool
    cache: PolicyCache


def own_methods(policy: ActorCriticPolicy) -> OwnMethods:
    """Return which of SB3's methods the policy replaces at present, and its cache."""
    head = overrides(policy, compat.HEAD) or is_patched(policy.action_dist)
    values = overrides(policy, "predict_values")
    return OwnMethods(has_own_forward(policy), head, values, policy_cache(policy))


# ---------------------------------------------------------------- modes


def set_training_mode(policy: BasePolicy, mode: bool) -> None:
    """Set a policy's mode, and bring its cache up to date.

    The result is that of ``policy.set_training_mode(mode)``, which takes ten times as long.

    :param policy: the policy
    :param mode: True for training, False for evaluation
    """
    cache = policy_cache(policy)
    if cache.is_current():
        cache.look_at_calls()
    else:
        cache = _KNOWN[policy] = PolicyCache(policy)
    _set_mode(policy, cache, mode)


def _set_mode(policy: BasePolicy, cache: PolicyCache, mode: bool) -> None:
    if cache.calls_matter or cache.has_own_modes or overrides(policy, "set_training_mode", "train"):
        policy.set_training_mode(mode)
        return
    vars(policy)["training"] = mode
    for attributes in cache.attributes:
        attributes["training"] = mode


@contextmanager
def evaluation_mode(policy: BasePolicy) -> Iterator[None]:
    """Put the policy into evaluation mode within the ``with`` block."""
    before = policy.training
    set_training_mode(policy, False)
    try:
        yield
    finally:
        _set_mode(policy, policy_cache(policy), before)


@contextmanager
def unvalidated_distributions() -> Iterator[None]:
    """Switch off the checks of torch distributions' arguments, which take longer than the sampling itself.

    The numbers are checked once per rollout and update instead, where the error message can name env and step.
    """
    before = getattr(Distribution, compat.VALIDATE_ARGS)
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def without_gradient(policy: ActorCriticPolicy) -> type[th.no_grad] | type[th.inference_mode]:
    """Return the context in which to call the policy without gradient.

    It is ``no_grad`` for policies with hooks or methods of their own. These may keep tensors, and autograd cannot use
    tensors of inference mode.
    """
    own = own_methods(policy)
    return th.no_grad if own.cache.calls_matter or any(own[:3]) else th.inference_mode


@contextmanager
def action_dist_kept(policy: ActorCriticPolicy) -> Iterator[None]:
    """Give the policy a copy of its distribution object within the ``with`` block, and switch off torch's checks.

    The object keeps its latest results, graphs included, which can be neither copied nor used later. An object with
    replaced methods stays in place, since they may be bound to it.
    """
    distribution = policy.action_dist
    with unvalidated_distributions():
        if is_patched(distribution):
            yield
            return
        policy.action_dist = copy.copy(distribution)
        try:
            yield
        finally:
            policy.action_dist = distribution
