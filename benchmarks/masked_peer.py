"""What MaskablePPO needs of an env whose masks are in its infos."""

from typing import Any

import gymnasium as gym
import numpy as np


class TaxiMasks(gym.Wrapper[Any, Any, Any, Any]):
    """Taxi with the method ``action_masks()`` that sb3-contrib asks for."""

    def action_masks(self) -> np.ndarray:
        """Which of the actions change the state, ``(6,)``."""
        taxi: Any = self.unwrapped
        masks: np.ndarray = taxi.action_mask(taxi.s)
        return masks.astype(bool)
