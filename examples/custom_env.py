"""Train on an environment of your own."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_pg import TRPO


class Thermostat(gym.Env[np.ndarray, np.ndarray]):
    """Keep a room at 20 degrees by heating or cooling; it is colder outside."""

    observation_space = spaces.Box(-30.0, 30.0, (1,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin at a random temperature."""
        super().reset(seed=seed)
        self.degrees, self.steps = self.np_random.uniform(10.0, 25.0), 0
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Heat or cool for a minute. The time limit is a truncation, not a termination."""
        self.degrees += 2.0 * float(action[0]) + 0.05 * (5.0 - self.degrees)
        self.steps += 1
        return self._observation(), -abs(self.degrees - 20.0), False, self.steps >= 50, {}

    def _observation(self) -> np.ndarray:
        return np.array([self.degrees - 20.0], dtype=np.float32)


if __name__ == "__main__":
    model = TRPO("MlpPolicy", Thermostat(), n_steps=500, target_kl=0.05, gamma=0.9, seed=0, device="cpu")
    before, _ = evaluate_policy(model, Monitor(Thermostat()), n_eval_episodes=10)
    model.learn(25_000)
    after, _ = evaluate_policy(model, Monitor(Thermostat()), n_eval_episodes=10)
    print(f"mean return before training {before:.0f}, after {after:.0f}")
