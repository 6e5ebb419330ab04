"""A copy of the policy on another device, which acts."""

import copy
import warnings
from itertools import chain

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pg.policies.policy_cache import Structure, is_patched, original, set_training_mode, structure_of


class ActingCopy:
    """Keeps a copy of a policy up to date: its parameters and buffers, not what else it may hold.

    A policy with hooks, or with methods that were replaced in the object, acts itself: a copy's may be bound to it.

    :param device: where it acts
    """

    def __init__(self, device: th.device | str) -> None:
        self.device = th.device(device)
        self._copied: tuple[Structure, ActorCriticPolicy] | None = None
        self._has_warned = False

    def of(self, policy: ActorCriticPolicy) -> tuple[ActorCriticPolicy, th.device]:
        """The copy as the policy is now.

        :param policy: the policy that is trained, in eval mode
        :return: its copy, in eval mode; where it is
        """
        if (unwrapped := original(policy)) is not policy:
            policy = unwrapped
            set_training_mode(policy, False)  # looks at its structure
        structure = structure_of(policy)
        if structure.calls_matter or is_patched(policy) or is_patched(policy.action_dist):
            if not self._has_warned:
                warnings.warn(
                    f"act_device={str(self.device)!r} has no effect while the policy has hooks or replaced methods, "
                    "which a copy would not share: it acts where it is",
                    stacklevel=2,
                )
            self._has_warned = True
            return policy, policy.device
        if self._copied is None or self._copied[0] is not structure:
            # the optimizer does not act; the distribution may hold results of a forward, which are not to be copied
            instead = {id(policy.optimizer): None, id(policy.action_dist): copy.copy(policy.action_dist)}
            self._copied = structure, copy.deepcopy(policy, instead).to(self.device)
        acting = self._copied[1]
        with th.no_grad():
            theirs = chain(policy.parameters(), policy.buffers())
            for mine, now in zip(chain(acting.parameters(), acting.buffers()), theirs, strict=True):
                mine.copy_(now)
        set_training_mode(acting, False)
        return acting, self.device
