"""What a policy is made of: found once, since walking through its modules takes longer than a small update."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn.modules.module import _has_any_global_hook

#: torch's modules that do something else in training than in evaluation.
_MODE_DEPENDENT = (
    nn.modules.batchnorm._NormBase,
    nn.modules.dropout._DropoutNd,
    nn.RNNBase,
    nn.RReLU,
    nn.MultiheadAttention,
)


def overrides(policy: BasePolicy, *methods: str) -> bool:
    """Whether the policy's class replaces one of these methods of SB3's ActorCriticPolicy."""
    return any(getattr(type(policy), name) is not getattr(ActorCriticPolicy, name) for name in methods)


def has_own_forward(policy: ActorCriticPolicy) -> bool:
    """Whether the policy replaces a method of SB3's that samples, scores or extracts features.

    Then ``forward`` and ``evaluate_actions``, which SB3 calls, are the only ones that say what the policy is.
    """
    return overrides(policy, "forward", "evaluate_actions", "extract_features", "get_distribution", "_predict")


def has_own_head(policy: ActorCriticPolicy) -> bool:
    """Whether the policy replaces SB3's way from the actor's last layer to the distribution."""
    return overrides(policy, "_get_action_dist_from_latent")


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


def is_listened_to(modules: list[nn.Module]) -> bool:
    """Whether there are hooks on calls of any of these modules, or somebody has replaced one's ``forward``."""
    return bool(_has_any_global_hook()) or any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
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
        #: the bare layers of :mod:`sb3_pg.rollout.plain`, False if there are none, None if nobody has asked
        self.plain: Any = None
        self.has_hooks = is_listened_to(self.parts)
        tables = [t for m in (policy, *self.parts) for t in (m._modules, m._parameters, m._buffers)]
        self._tables = [table.values() for table in tables if table]
        self._empty = [table for table in tables if not table]
        self._ids = self._identify()

    def _identify(self) -> list[tuple[int, ...]]:
        return [tuple(map(id, values)) for values in self._tables]

    def is_current(self) -> bool:
        """Whether no module, parameter or buffer has been added, removed or replaced."""
        return self._identify() == self._ids and not any(self._empty)

    def snapshot(self) -> Snapshot:
        """The parameters' and buffers' values as they are now."""
        return Snapshot(self.parameters, self.buffers)

    def refresh_hooks(self) -> None:
        """Look again whether somebody listens to the modules' calls."""
        self.has_hooks = is_listened_to(self.parts)

    @property
    def is_same_in_both_modes(self) -> bool:
        """Whether the policy surely computes the same in training and in evaluation mode.

        Hooks, and modules that are neither torch's nor SB3's, may look at the mode.
        """
        return self._parts_ignore_modes and not self.has_hooks

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
        structure.refresh_hooks()
    else:
        structure = _KNOWN[policy] = Structure(policy)
    if structure.has_own_modes or overrides(policy, "set_training_mode", "train"):
        policy.set_training_mode(mode)
        return
    vars(policy)["training"] = mode
    for part in structure.parts:
        vars(part)["training"] = mode


@contextmanager
def evaluation_mode(policy: BasePolicy) -> Iterator[None]:
    """Let the body have the policy as it acts."""
    before = policy.training
    set_training_mode(policy, False)
    try:
        yield
    finally:
        set_training_mode(policy, before)


@contextmanager
def action_dist_kept(policy: ActorCriticPolicy) -> Iterator[None]:
    """Let the body use a copy of the policy's distribution object.

    It keeps what it computed last, graphs and tensors of transforms included, which could not be copied or used later.
    """
    distribution = policy.action_dist
    policy.action_dist = copy.copy(distribution)
    try:
        yield
    finally:
        policy.action_dist = distribution
