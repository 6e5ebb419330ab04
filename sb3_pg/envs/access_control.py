"""A queue that never ends, with a known optimum of the average reward."""

from functools import cached_property
from math import comb
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

REJECT, ACCEPT = 0, 1
#: Colors of a free server, of a busy one, and of the customer, for images.
_FREE, _BUSY, _CUSTOMER = (80, 180, 80), (60, 60, 60), (80, 120, 200)
_CELL = 32


class AccessControl(gym.Env[np.ndarray, np.int64]):
    r"""Access control of a queue of customers, who pay by their priority for one of some servers.

    At each step the customer at the head of the queue is accepted (action 1) or rejected (action 0). One who is
    accepted while a server is free pays, occupies the server, and is the reward. Anyone else is sent away. Each busy
    server then becomes free with probability ``p_free``. The next customer's priority is uniform. The task never ends.

    Observations are the number of free servers and the number of the priority, a MultiDiscrete. It is registered as
    ``AccessControl-v0`` by ``import sb3_pg``, with a time limit of 1000 steps, since evaluations of episodes would
    otherwise wait for ever. Source: Sutton and Barto (2018), example 10.2.

    :param n_servers: number of servers
    :param payments: what a customer of each priority pays, reward units
    :param p_free: probability that a busy server becomes free, in (0, 1]
    :param render_mode: "ansi", "rgb_array" or None
    :raises ValueError: an argument is out of range
    """

    metadata = {  # noqa: RUF012 (as in Gymnasium)
        "render_modes": ["ansi", "rgb_array"],
        "render_fps": 4,
    }

    def __init__(
        self,
        n_servers: int = 10,
        payments: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0),
        p_free: float = 0.06,
        render_mode: str | None = None,
    ) -> None:
        if n_servers < 1 or not payments:
            raise ValueError(
                f"n_servers must be at least 1 and payments not empty, got n_servers={n_servers} and "
                f"payments={payments}"
            )
        if not 0 < p_free <= 1:
            raise ValueError(f"p_free must lie in (0, 1], got {p_free}")
        self.n_servers, self.payments, self.p_free = n_servers, tuple(payments), p_free
        self.render_mode = render_mode
        self.observation_space = spaces.MultiDiscrete([n_servers + 1, len(payments)])
        self.action_space = spaces.Discrete(2)
        self._free, self._priority = n_servers, 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Free all servers."""
        super().reset(seed=seed)
        self._free = self.n_servers
        return self._next_customer(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Accept or reject the customer."""
        reward = 0.0
        if int(action) == ACCEPT and self._free:
            self._free -= 1
            reward = self.payments[self._priority]
        self._free += int(self.np_random.binomial(self.n_servers - self._free, self.p_free))
        return self._next_customer(), reward, False, False, {}

    def _next_customer(self) -> np.ndarray:
        self._priority = int(self.np_random.integers(len(self.payments)))
        return np.array([self._free, self._priority])

    def render(self) -> Any:
        """Return the servers, free ones first, above what the customer pays, as an image or as text."""
        payment = self.payments[self._priority]
        if self.render_mode != "rgb_array":
            return f"{self._free} of {self.n_servers} servers are free; the customer pays {payment:g}"
        cells = np.full((2, self.n_servers, 3), 255, np.uint8)
        cells[0] = _BUSY
        cells[0, : self._free] = _FREE
        cells[1, : max(1, round(self.n_servers * payment / max(self.payments)))] = _CUSTOMER
        return cells.repeat(_CELL, 0).repeat(_CELL, 1)

    # ---------------------------------------------------------------- the optimum

    @cached_property
    def _moves(self) -> np.ndarray:
        """Probability that f free servers are f' after one step without a new customer, ``(F, F)``."""
        n, p = self.n_servers, self.p_free
        moves = np.zeros((n + 1, n + 1))
        for free in range(n + 1):
            busy = n - free
            for k in range(busy + 1):
                moves[free, free + k] = comb(busy, k) * p**k * (1 - p) ** (busy - k)
        return moves

    def optimum(self, tolerance: float = 1e-10) -> tuple[float, np.ndarray]:
        r"""Return the largest average reward, and the actions that reach it, by relative value iteration.

        .. math:: h(s) \leftarrow \max_a \left[r(s, a) + \sum_{s'} p(s'|s, a) h(s')\right] - \text{the same at } s_0

        Source: Puterman (1994), section 8.5.

        :param tolerance: largest error of the average reward
        :return: reward units per step; actions, ``(n_servers + 1, n_priorities)``
        """
        payments = np.array(self.payments)
        h = np.zeros(self.n_servers + 1)  # mean over the next customer's priority
        while True:
            rejected = self._moves @ h
            accepted = payments + np.concatenate([[-np.inf], rejected[:-1]])[:, None]
            worth = np.maximum(rejected[:, None], accepted)
            change = worth.mean(axis=1) - h
            if np.ptp(change) < tolerance:
                return float(change.mean()), (accepted > rejected[:, None]).astype(np.int64)
            h = worth.mean(axis=1) - worth[0].mean()
