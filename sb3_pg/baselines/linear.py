"""The linear feature baseline."""

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, preprocess_obs

from sb3_pg.rollout.batch import Observations, RolloutBatch

#: The regression's matrix has the square of this many numbers.
MAX_FEATURES = 5_000


class LinearBaseline:
    r"""Ridge regression of the return on simple features of state and time.

    .. math:: b(s, t) = \phi(s, t)^\top w, \quad \phi = [s, s^2, t, t^2, t^3, 1], \quad
              w = (\Phi^\top \Phi + \lambda I)^{-1} \Phi^\top G

    Source: Duan et al. (2016), the "linear feature baseline". s is clipped to [-10, 10] and t is counted in
    hundreds of steps, as there; states of discrete spaces are one-hot. Fitted after the batch it corrects
    (the default), the gradient is unbiased.

    :param regularization: lambda, at least 0
    :param observation_space: says how observations become vectors; None takes them as they are
    :raises ValueError: lambda < 0, or observations too large for a regression, images that is
    """

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
        #: weights, None before the first fit; kept on the CPU so that models load anywhere
        self.weights: np.ndarray | None = None

    def features(self, observations: Observations, timesteps: th.Tensor) -> th.Tensor:
        """phi(s, t).

        :param observations: one row per sample, or a dict of those
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
        """Solve the ridge regression; a singular one is regularized more, tenfold at a time."""
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
