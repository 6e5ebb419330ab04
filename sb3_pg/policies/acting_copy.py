"""A copy of the policy that acts on another device."""

import copy
import warnings
import weakref
from itertools import chain
from typing import Any

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pg import compat
from sb3_pg.policies.policy_cache import is_patched, original, policy_cache, set_training_mode

_BY_VALUE = (bool, int, float, complex, str, bytes, type(None))


def can_be_copied(policy: ActorCriticPolicy) -> bool:
    """Whether a copy of the policy acts as the policy does: it has no hooks, and no methods replaced in the object.

    :param policy: not compiled by ``torch.compile``; its cache must be up to date, see ``set_training_mode``
    """
    return not (policy_cache(policy).calls_matter or is_patched(policy) or is_patched(policy.action_dist))


def copy_without_optimizer(policy: ActorCriticPolicy) -> ActorCriticPolicy:
    """Return a copy of the policy that can act, but not be trained.

    :param policy: see :func:`can_be_copied`
    """
    # The distribution may hold results of a forward, which cannot be copied.
    instead: dict[int, Any] = {id(policy.optimizer): None, id(policy.action_dist): copy.copy(policy.action_dist)}
    return copy.deepcopy(policy, instead)


class CopiedFrom:
    """Notes what a policy is when it is copied, but for the values of its parameters and buffers.

    Numbers and words in attributes are compared by value, tensors by version, and other objects by identity: a list or
    an array that is changed in place is not noticed. Tensors with gradient are left out.

    :param policy: see :func:`can_be_copied`
    """

    def __init__(self, policy: ActorCriticPolicy) -> None:
        self._cache, self._attributes = weakref.ref(policy_cache(policy)), _attributes(policy)

    def is_current(self, policy: ActorCriticPolicy) -> bool:
        """Whether a copy would be the same now.

        :param policy: in the same mode
        """
        return self._cache() is policy_cache(policy) and self._attributes == _attributes(policy)


def _attributes(policy: ActorCriticPolicy) -> list[Any]:
    found: list[Any] = []
    for part in (vars(policy), *policy_cache(policy).attributes):
        for name, value in part.items():
            if isinstance(value, _BY_VALUE):
                found.append((name, value))
            elif not isinstance(value, th.Tensor):
                found.append((name, id(value)))
            elif not value.requires_grad:
                found.append((name, id(value), None if value.is_inference() else compat.version_of(value)))
    # The other attributes of a distribution are results.
    found += [(name, value) for name, value in vars(policy.action_dist).items() if isinstance(value, _BY_VALUE)]
    return found


class ActingCopy:
    """Makes a copy of a policy on another device, and keeps its parameters and buffers up to date.

    A policy with hooks, or with methods replaced in the object, is not copied: they may be bound to the policy.

    :param device: device of the copy
    """

    def __init__(self, device: th.device | str) -> None:
        self.device = th.device(device)
        self._copied: tuple[CopiedFrom, ActorCriticPolicy] | None = None
        self._has_warned = False

    def of(self, policy: ActorCriticPolicy) -> tuple[ActorCriticPolicy, th.device]:
        """Return an up-to-date copy of the policy, and its device.

        :param policy: the policy that is trained, in eval mode
        :return: the copy, in eval mode; or the policy itself and its device, if it cannot be copied
        """
        if (unwrapped := original(policy)) is not policy:
            policy = unwrapped
            set_training_mode(policy, False)  # brings its cache up to date
        if not can_be_copied(policy):
            if not self._has_warned:
                warnings.warn(
                    f"act_device={str(self.device)!r} has no effect while the policy has hooks or replaced methods, "
                    "which a copy would not share: it acts where it is",
                    stacklevel=2,
                )
            self._has_warned = True
            return policy, policy.device
        if self._copied is None or not self._copied[0].is_current(policy):
            self._copied = CopiedFrom(policy), copy_without_optimizer(policy).to(self.device)
        acting = self._copied[1]
        with th.no_grad():
            theirs = chain(policy.parameters(), policy.buffers())
            for mine, now in zip(chain(acting.parameters(), acting.buffers()), theirs, strict=True):
                mine.copy_(now)
        set_training_mode(acting, False)
        return acting, self.device
