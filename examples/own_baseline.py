"""Subtract a baseline of your own: here a moving average of the returns of earlier batches."""

import torch as th

from sb3_pg import Reinforce
from sb3_pg.rollout import RolloutBatch


class MovingAverage:
    """The mean return of the batches before. It knows nothing of the batch that it corrects, so it adds no bias.

    :param decay: weight of the past
    """

    def __init__(self, decay: float = 0.9) -> None:
        self.decay, self.mean = decay, 0.0

    def predict(self, batch: RolloutBatch) -> float:
        """Return the baseline: a number, or a tensor of the shape of ``batch.rewards``."""
        return self.mean

    def fit(self, batch: RolloutBatch, returns: th.Tensor) -> None:
        """Take the batch's returns into account. This is called after ``predict``."""
        self.mean = self.decay * self.mean + (1 - self.decay) * float(returns[batch.valid].mean())


if __name__ == "__main__":
    baseline = MovingAverage()
    model = Reinforce("MlpPolicy", "CartPole-v1", baseline=baseline, seed=0, device="cpu")
    model.learn(20_000)
    print(f"the baseline has come to {baseline.mean:.1f}")
