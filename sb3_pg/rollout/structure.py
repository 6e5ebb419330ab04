"""What a policy is made of: found once, since walking through its modules takes longer than a small update."""

import math
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

#: torch's modules that do something else in training than in evaluation.
_MODE_DEPENDENT = (
    nn.modules.batchnorm._NormBase,
    nn.modules.dropout._DropoutNd,
    nn.RNNBase,
    nn.RReLU,
    nn.MultiheadAttention,
)


def overrides(policy: ActorCriticPolicy, *methods: str) -> bool:
    """Whether the policy's class replaces one of these methods of SB3's ActorCriticPolicy."""
    return any(getattr(type(policy), name) is not getattr(ActorCriticPolicy, name) for name in methods)


def has_own_forward(policy: ActorCriticPolicy) -> bool:
    """Whether ``forward`` and ``evaluate_actions`` are the only methods that say what the policy is."""
    return overrides(policy, "forward", "evaluate_actions", "extract_features", "get_distribution", "_predict")


class Snapshot:
    """Values of tensors at one moment; of parameters of one kind as one vector, which is fewer operations.

    :param parameters: floating
    :param buffers: of any kind
    """

    def __init__(self, parameters: list[nn.Parameter], buffers: list[th.Tensor]) -> None:
        self._parameters, self._buffers = parameters, buffers
        with th.no_grad():
            groups = [[p] for p in parameters] if len({(p.dtype, p.device) for p in parameters}) > 1 else [parameters]
            self._flat = [(group, _flatten_dense_tensors(group)) for group in groups if group]
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


class Structure:
    """The modules and parameters of a policy, which it holds no reference to.

    :param policy: the policy
    """

    def __init__(self, policy: ActorCriticPolicy) -> None:
        self.parts = [module for module in policy.modules() if module is not policy]
        self.parameters = list(policy.parameters())
        self.buffers = list(policy.buffers())
        #: the bare layers of :mod:`sb3_pg.rollout.plain`, False if there are none, None if nobody has asked
        self.plain: Any = None
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

    @property
    def has_hooks(self) -> bool:
        """Whether somebody listens to the modules' forwards."""
        return any(part._forward_hooks or part._forward_pre_hooks for part in self.parts)

    @cached_property
    def is_same_in_both_modes(self) -> bool:
        """Whether the policy surely computes the same in training and in evaluation mode.

        Modules that are neither torch's nor SB3's may look at their mode.
        """
        return all(
            type(part).__module__.startswith(("torch.nn.", "stable_baselines3."))
            and not isinstance(part, _MODE_DEPENDENT)
            for part in self.parts
        )

    @cached_property
    def has_own_modes(self) -> bool:
        """Whether a module does more, on a change of mode, than to note it."""
        return any(type(part).train is not nn.Module.train for part in self.parts)


_KNOWN: WeakKeyDictionary[nn.Module, Structure] = WeakKeyDictionary()


def structure_of(policy: ActorCriticPolicy) -> Structure:
    """The policy's structure, as it was at the latest :func:`set_training_mode`."""
    structure = _KNOWN.get(policy)
    return _KNOWN.setdefault(policy, Structure(policy)) if structure is None else structure


def set_training_mode(policy: ActorCriticPolicy, mode: bool) -> None:
    """As the policy's method, in a tenth of the time; looks whether the policy's structure is still the same.

    :param policy: the policy
    :param mode: True for training, False for evaluation
    """
    structure = structure_of(policy)
    if not structure.is_current():
        structure = _KNOWN[policy] = Structure(policy)
    if structure.has_own_modes or overrides(policy, "set_training_mode", "train"):
        policy.set_training_mode(mode)
        return
    vars(policy)["training"] = mode
    for part in structure.parts:
        vars(part)["training"] = mode


def parameter_version(policy: ActorCriticPolicy) -> int:
    """Number that changes with every change of a parameter."""
    version = 0
    for parameter in structure_of(policy).parameters:
        version += parameter._version
    return version
