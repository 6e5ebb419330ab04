"""SB3's replay buffer of transitions, with the log-probs of the policies that acted."""

from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer

from sb3_pg.policies.actions import takes_other_numbers


def keep_what_is_drawn(buffer: ReplayBuffer) -> None:
    """Let an empty buffer store the floating numbers that are drawn for a Box of integers.

    :param buffer: SB3's, which has an array of the space's dtype
    """
    if isinstance(buffer.action_space, spaces.Box) and takes_other_numbers(buffer.action_space):
        buffer.actions = buffer.actions.astype(np.float32)


class BehaviorSamples(NamedTuple):
    """A minibatch: SB3's fields, and the behavior's log-probs, nats, ``(n_samples,)``."""

    observations: Any
    actions: th.Tensor
    next_observations: Any
    dones: th.Tensor
    rewards: th.Tensor
    discounts: th.Tensor | None
    log_probs: th.Tensor


class BehaviorReplayBuffer(ReplayBuffer):
    """Replay buffer that knows how probable each action was. Its arguments are those of SB3's."""

    log_probs: np.ndarray

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        keep_what_is_drawn(self)
        self.log_probs = np.zeros((self.buffer_size, self.n_envs), dtype=np.float32)

    def record_log_probs(self, log_probs: np.ndarray) -> None:
        """Log-probs of the actions that were added last.

        :param log_probs: log mu(a|s), nats, ``(n_envs,)``
        """
        self.log_probs[self.pos - 1] = log_probs

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> BehaviorSamples:  # type: ignore[override]
        # SB3 draws each sample's env in here, from NumPy's global generator, and does not say which it was.
        state = np.random.get_state()  # noqa: NPY002
        env_indices = np.random.randint(0, high=self.n_envs, size=len(batch_inds))  # noqa: NPY002
        np.random.set_state(state)  # noqa: NPY002
        samples = super()._get_samples(batch_inds, env)
        return BehaviorSamples(*samples, self.to_torch(self.log_probs[batch_inds, env_indices]))


class DictBehaviorReplayBuffer(BehaviorReplayBuffer, DictReplayBuffer):  # type: ignore[misc]
    """:class:`BehaviorReplayBuffer` for Dict observations."""


class NStepBehaviorReplayBuffer(BehaviorReplayBuffer, NStepReplayBuffer):  # type: ignore[misc]
    """:class:`BehaviorReplayBuffer` whose rewards, next observations and discounts are those of n steps.

    Its arguments are those of SB3's NStepReplayBuffer.
    """
