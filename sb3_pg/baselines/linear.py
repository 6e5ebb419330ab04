"""The linear feature baseline."""

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, preprocess_obs

from sb3_pg.baselines.base import Baseline, subtract
from sb3_pg.policies import Observations
from sb3_pg.rollout import RolloutBatch

#: Largest number of features. The matrix of the regression has the square of it.
MAX_FEATURES = 5_000


class LinearBaseline(Baseline):
    r"""Ridge regression of the return on simple features of state and time.

    .. math:: b(s, t) = \phi(s, t)^\top w, \quad \phi = [s, s^2, t, t^2, t^3, 1], \quad
              w = (\Phi^\top \Phi + \lambda I)^{-1} \Phi^\top G

    Source: Duan et al. (2016), the "linear feature baseline". As there, s is clipped to [-10, 10] and t is counted in
    hundreds of steps. States of discrete spaces are one-hot. The gradient is unbiased if the baseline is fitted after
    the batch it is subtracted from (``critic_fit="after"``, the default).

    :param regularization: lambda, at least 0
    :param observation_space: space by which observations are turned into vectors; None uses them as they are
    :raises ValueError: lambda < 0, or observations that are too large for a regression, such as images
    """

    uses_fit = True

    def __init__(self, regularization: float = 1e-5, observation_space: spaces.Space[Any] | None = None) -> None:
        if not regularization >= 0:
            raise ValueError(f"regularization must be at least 0, got {regularization}")
        if observation_space is not None:
            n_features = 2 * _n_state(observation_space) + 4
            if n_features > MAX_FEATURES:
                raise ValueError(
                    f"baseline='linear' solves a regression on at most {MAX_FEATURES} features, got {n_features} from "
                    f"{observation_space}: use baseline='value'"
                )
        self.regularization = regularization
        self.observation_space = observation_space
        #: w, None before the first fit; a NumPy array, so that models load on every device
        self.weights: np.ndarray | None = None

    def features(self, observations: Observations, timesteps: th.Tensor) -> th.Tensor:
        """phi(s, t).

        :param observations: one row per sample, or a dict of such tensors
        :param timesteps: step within the episode, one per sample
        :return: double precision, ``(n_samples, 2 * n_state + 4)``
        """
        if self.observation_space is not None:
            observations = preprocess_obs(observations, self.observation_space)
        parts = list(observations.values()) if isinstance(observations, dict) else [observations]
        state = th.cat([part.flatten(1).double() for part in parts], dim=1).clamp(-10, 10)
        t = timesteps.double()[:, None] / 100.0
        return th.cat((state, state.square(), t, t**2, t**3, th.ones_like(t)), dim=1)

    def fit(self, batch: RolloutBatch, returns: th.Tensor) -> None:
        """Solve the ridge regression. If it is singular, lambda is multiplied by 10 until it is not."""
        phi = self.features(batch.select(batch.observations), batch.select(batch.timesteps))
        gram, moment = phi.T @ phi, phi.T @ batch.select(returns).double()
        identity = th.eye(len(gram), dtype=gram.dtype, device=gram.device)
        regularization = self.regularization
        for _ in range(10):
            weights, failed = th.linalg.solve_ex(gram + regularization * identity, moment)
            if not failed and weights.isfinite().all():
                self.weights = weights.cpu().numpy()
                return
            regularization = max(10 * regularization, 1e-10)

    def advantages(self, batch: RolloutBatch, returns: th.Tensor) -> th.Tensor:
        """Returns less b(s_t, t)."""
        return subtract(self.predict(batch), batch, returns)

    def predict(self, batch: RolloutBatch) -> th.Tensor:
        """b(s_t, t); 0 before the first fit."""
        if self.weights is None:
            return th.zeros_like(batch.rewards)
        phi = self.features(batch.select(batch.observations), batch.select(batch.timesteps))
        return batch.restore((phi @ th.as_tensor(self.weights, device=phi.device)).to(batch.rewards.dtype))


def _n_state(space: spaces.Space[Any]) -> int:
    if isinstance(space, spaces.Dict):
        return sum(_n_state(subspace) for subspace in space.spaces.values())
    return get_flattened_obs_dim(space)
