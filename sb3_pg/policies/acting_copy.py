"""A copy of the policy that acts on another device."""

import copy
import warnings
from itertools import chain

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pg.policies.policy_cache import PolicyCache, is_patched, original, policy_cache, set_training_mode


class ActingCopy:
    """Makes a copy of a policy on another device, and keeps its parameters and buffers up to date.

    A policy with hooks, or with methods replaced in the object, is not copied: they may be bound to the policy.

    :param device: device of the copy
    """

    def __init__(self, device: th.device | str) -> None:
        self.device = th.device(device)
        self._copied: tuple[PolicyCache, ActorCriticPolicy] | None = None
        self._has_warned = False

    def of(self, policy: ActorCriticPolicy) -> tuple[ActorCriticPolicy, th.device]:
        """Return an up-to-date copy of the policy, and its device.

        :param policy: the policy that is trained, in eval mode
        :return: the copy, in eval mode; or the policy itself and its device, if it cannot be copied
        """
        if (unwrapped := original(policy)) is not policy:
            policy = unwrapped
            set_training_mode(policy, False)  # brings its cache up to date
        cache = policy_cache(policy)
        if cache.calls_matter or is_patched(policy) or is_patched(policy.action_dist):
            if not self._has_warned:
                warnings.warn(
                    f"act_device={str(self.device)!r} has no effect while the policy has hooks or replaced methods, "
                    "which a copy would not share: it acts where it is",
                    stacklevel=2,
                )
            self._has_warned = True
            return policy, policy.device
        if self._copied is None or self._copied[0] is not cache:
            # The optimizer does not act. The distribution may hold results of a forward, which cannot be copied.
            instead = {id(policy.optimizer): None, id(policy.action_dist): copy.copy(policy.action_dist)}
            self._copied = cache, copy.deepcopy(policy, instead).to(self.device)
        acting = self._copied[1]
        with th.no_grad():
            theirs = chain(policy.parameters(), policy.buffers())
            for mine, now in zip(chain(acting.parameters(), acting.buffers()), theirs, strict=True):
                mine.copy_(now)
        set_training_mode(acting, False)
        return acting, self.device
