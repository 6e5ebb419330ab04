"""A small env with invalid actions."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

#: Row and column that each action adds: up, right, down, left.
_MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))
#: A wall is "#", the start "S", the goal "G".
_MAP = ("S.#...", "..#.#.", ".#..#.", "....#.", "##.#..", "...#.G")
#: Color of each kind of cell, and width of a cell in pixels, for images.
_COLORS = {"#": (60, 60, 60), "G": (80, 180, 80), "A": (200, 60, 60)}
_CELL = 32


class MaskedGrid(gym.Env[np.ndarray, np.int64]):
    """A grid world whose moves into walls and across the border are invalid: ``action_masks()`` says which.

    Each step has reward -1, an invalid move -10, and the episode ends at the goal. Observations are row and column,
    each scaled to [-1, 1]. The env is deterministic; the shortest way takes 16 steps. It is registered as
    ``MaskedGrid-v0`` by ``import sb3_pg``, with a limit of 100 steps.

    :param layout: one string per row: "S" start, "G" goal, "#" wall, "." free
    :param render_mode: "ansi", "rgb_array" or None
    :raises ValueError: the rows differ in length, or there is not exactly one start and one goal
    """

    metadata = {  # noqa: RUF012 (as in Gymnasium)
        "render_modes": ["ansi", "rgb_array"],
        "render_fps": 4,
    }

    def __init__(self, layout: tuple[str, ...] = _MAP, render_mode: str | None = None) -> None:
        if len({len(row) for row in layout}) != 1:
            raise ValueError(f"layout must have rows of one length, got {layout}")
        cells = np.array([list(row) for row in layout])
        for name in "SG":
            if (cells == name).sum() != 1:
                raise ValueError(f"layout must have exactly one {name!r}, got {layout}")
        self.cells, self.render_mode = cells, render_mode
        row, column = np.argwhere(cells == "S")[0]
        self._place = self._start = int(row), int(column)
        walls = np.pad(cells == "#", 1, constant_values=True)
        rows, columns = np.indices(cells.shape) + 1
        #: row, column, action -> whether the action leads to a cell that is no wall
        self._free = ~np.stack([walls[rows + down, columns + right] for down, right in _MOVES], axis=-1)
        self._scale = (2 / np.maximum(np.array(cells.shape) - 1, 1)).astype(np.float32)
        self.observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.action_space = spaces.Discrete(len(_MOVES))

    def action_masks(self) -> np.ndarray:
        """Return which of up, right, down and left lead to a cell that is no wall, ``(4,)``."""
        allowed: np.ndarray = self._free[self._place].copy()
        return allowed

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Go to the start."""
        super().reset(seed=seed)
        self._place = self._start
        return self._observation(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move. An invalid move leaves the place as it is."""
        (row, column), (down, right) = self._place, _MOVES[int(action)]
        if not self._free[row, column, int(action)]:
            return self._observation(), -10.0, False, False, {}
        self._place = row + down, column + right
        return self._observation(), -1.0, bool(self.cells[self._place] == "G"), False, {}

    def render(self) -> Any:
        """Return the grid as an image, or as text with "A" where the agent is."""
        shown = self.cells.copy()
        shown[self._place] = "A"
        if self.render_mode == "rgb_array":
            small = np.array([[_COLORS.get(cell, (255, 255, 255)) for cell in row] for row in shown], np.uint8)
            return small.repeat(_CELL, 0).repeat(_CELL, 1)
        return "\n".join("".join(row) for row in shown)

    def _observation(self) -> np.ndarray:
        observation: np.ndarray = np.array(self._place, np.float32) * self._scale - 1
        return observation
