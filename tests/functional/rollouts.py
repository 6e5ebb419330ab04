"""Random rollouts of two policies, with everything that a column can hold, and their episodes as plain lists."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch as th

Step = tuple[int, int]  # row, column


class Rollout(NamedTuple):
    log_prob: th.Tensor
    behavior_log_prob: th.Tensor
    rewards: th.Tensor
    bootstrap: th.Tensor
    values: th.Tensor
    q_values: th.Tensor
    expected_q_values: th.Tensor
    ends: th.Tensor
    mask: th.Tensor

    def episodes(self) -> list[list[Step]]:
        """The valid steps of each episode; what a column ends with is one too, finished or not."""
        found: list[list[Step]] = []
        n_steps, n_envs = self.ends.shape
        for env in range(n_envs):
            starting = True
            for t in range(n_steps):
                if not self.mask[t, env]:
                    break
                if starting:
                    found.append([])
                found[-1].append((t, env))
                starting = bool(self.ends[t, env])
        return found

    def ratio(self, step: Step) -> float:
        return math.exp(self.log_prob[step].item() - self.behavior_log_prob[step].item())

    def fill(self, numbers: dict[Step, float]) -> th.Tensor:
        """The numbers where they belong, and 0 in the padding."""
        out = th.zeros(self.ends.shape, dtype=th.float64)
        for step, number in numbers.items():
            out[step] = number
        return out


def random_rollout(n_steps: int, padded: bool = True, seed: int = 0) -> Rollout:
    """Five columns: random episodes, episodes of one step, an unfinished end; padded from different rows on.

    Column 0 is valid throughout, column 3 in one row, column 4 nowhere. The padding holds what must not be looked at.
    """
    generator = th.Generator().manual_seed(seed)
    shape = (n_steps, 5)

    def normal() -> th.Tensor:
        return th.randn(shape, generator=generator, dtype=th.float64)

    def flip(p: float) -> th.Tensor:
        return th.rand(shape, generator=generator) < p

    lengths = th.tensor([n_steps, n_steps - 1, n_steps // 2, 1, 0]) if padded else th.full((5,), n_steps)
    rows = th.arange(n_steps)[:, None]
    mask = rows < lengths
    last = rows == lengths - 1
    ends = flip(0.25)
    ends[:, 1] = True
    ends[last & (th.arange(5) % 2 == 0)] = False
    following = th.where((ends & flip(0.5)) | (last & ~ends), normal(), 0.0)
    garbage = th.tensor([math.nan, math.inf, -math.inf, 1e30], dtype=th.float64)[rows % 4].expand(shape)
    floats = (0.7 * normal() - 1, 0.7 * normal() - 1, normal(), following, normal(), normal(), normal())
    return Rollout._make([*(th.where(mask, x, garbage) for x in floats), th.where(mask, ends, flip(0.5)), mask])
