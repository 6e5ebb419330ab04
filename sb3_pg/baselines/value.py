"""The policy's own critic as a baseline."""

import torch as th

from sb3_pg.rollout.batch import RolloutBatch


class ValueBaseline:
    r"""b(s_t) = V(s_t), the policy's critic as it was when the rollout was evaluated.

    Any function of the state leaves the gradient unbiased if it was fitted before this batch
    (``critic_fit="after"``: the batch trains the critic once its advantages are computed). The algorithm trains the
    critic, together with the actor or by its own optimizer.
    """

    uses_critic = True

    def fit(self, batch: RolloutBatch, returns: th.Tensor) -> None:
        """Nothing: the algorithm trains the critic."""

    def predict(self, batch: RolloutBatch) -> th.Tensor:
        """V(s_t).

        :raises ValueError: the batch was evaluated without the critic
        """
        if batch.values is None:
            raise ValueError("The value baseline needs a batch that was evaluated with the critic")
        return batch.values
