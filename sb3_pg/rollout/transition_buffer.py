"""SB3's replay buffers, with the log-prob of each stored action under the policy that chose it."""

from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer

from sb3_pg.policies import takes_other_numbers


def keep_what_is_drawn(buffer: ReplayBuffer) -> None:
    """Let an empty buffer store floating-point actions where the action space is a Box of integers.

    The log-prob belongs to the number that was drawn, not to the integer that the env receives.

    :param buffer: any of SB3's replay buffers, whose array of actions has the space's dtype
    """
    if isinstance(buffer.action_space, spaces.Box) and takes_other_numbers(buffer.action_space):
        buffer.actions = buffer.actions.astype(np.float32)


class BehaviorSamples(NamedTuple):
    """A minibatch of transitions: the fields of SB3's ReplayBufferSamples, and ``log_probs``.

    ``log_probs`` are those of the actions under the policy that chose them, nats, ``(n_samples,)``.
    """

    observations: Any
    actions: th.Tensor
    next_observations: Any
    dones: th.Tensor
    rewards: th.Tensor
    discounts: th.Tensor | None
    log_probs: th.Tensor


class BehaviorReplayBuffer(ReplayBuffer):
    """SB3's replay buffer that also stores the log-prob of each action. It takes the same arguments.

    From the same seed it samples the same transitions as SB3's buffer.
    """

    log_probs: np.ndarray

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        keep_what_is_drawn(self)
        self.log_probs = np.zeros((self.buffer_size, self.n_envs), dtype=np.float32)

    def record_log_probs(self, log_probs: np.ndarray) -> None:
        """Store the log-probs of the actions that the last ``add`` stored.

        :param log_probs: log mu(a|s), nats, ``(n_envs,)``
        """
        self.log_probs[self.pos - 1] = log_probs

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> BehaviorSamples:  # type: ignore[override]
        # SB3 draws the env of each sample in its own method and returns fields of the transition only. So its array of
        # actions is replaced by the number of the env for that call; actions and log-probs are looked up afterwards.
        actions, numbers = self.actions, np.arange(self.n_envs)[:, None]
        self.actions = np.broadcast_to(numbers, (self.buffer_size, self.n_envs, 1))  # takes no memory
        try:
            samples = super()._get_samples(batch_inds, env)
        finally:
            self.actions = actions
        env_indices = samples.actions.squeeze(1).cpu().numpy()
        chosen = self.to_torch(actions[batch_inds, env_indices])
        log_probs = self.to_torch(self.log_probs[batch_inds, env_indices])
        return BehaviorSamples(*samples._replace(actions=chosen), log_probs)


class DictBehaviorReplayBuffer(BehaviorReplayBuffer, DictReplayBuffer):  # type: ignore[misc]
    """:class:`BehaviorReplayBuffer` for Dict observations."""


class NStepBehaviorReplayBuffer(BehaviorReplayBuffer, NStepReplayBuffer):  # type: ignore[misc]
    """:class:`BehaviorReplayBuffer` with rewards of n steps. It takes the arguments of SB3's NStepReplayBuffer.

    Next observations and discounts are those after n steps, too.
    """
