"""How far a step goes that TRPO has accepted with ``target_kl=0.01``: ours, and sb3-contrib's.

    python benchmarks/trust_region.py
    python benchmarks/trust_region.py --tasks box-6 multibinary-6 --seeds 0 1 --updates 5

Protocol
--------
- The trust region of TRPO limits the KL of the policy, which draws whole action vectors: for independent action
  dimensions that is the sum over them. sb3-contrib's TRPO averages over the dimensions of Box and MultiBinary spaces.
- Both sides have their defaults, which are the same wherever both know the argument, ``target_kl`` among them; 8 envs,
  256 steps each per update.
- ``box-d`` and ``multibinary-d`` are one task: hit a target vector that is a linear function of the observation, in d
  dimensions. The reward is minus the mean squared distance, so that rewards are alike whatever d. The others are
  Gymnasium's.
- Before and after each update the policy's distributions at all states of the rollout are taken, and torch's
  ``kl_divergence(before, after)`` is summed over dimensions and averaged over states, in nats. Neither side's own
  bookkeeping is asked. (sb3-contrib limits the KL of after and before, in this order, which for small steps is nearly
  the same: in one dimension it may be above ``target_kl`` by a hair.)
- Mean, largest, and the share above ``target_kl`` are over the updates in which a step was accepted, of all seeds;
  ``accepted`` is their share of all updates. The rest have a KL of 0: the policy is as it was.
"""

import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import sb3_contrib
import torch
from bench_io import date_and_versions, format_table, make_parser, merge_csv
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from torch.distributions import Distribution, kl_divergence

from sb3_pg import TRPO

OUTPUT = Path(__file__).resolve().parent / "results" / "trust_region.csv"
PACKAGES = ("sb3_pg", "stable_baselines3", "sb3_contrib", "gymnasium", "torch", "numpy")
N_ENVS, N_STEPS, TARGET_KL = 8, 256, 0.01
Model = TRPO | sb3_contrib.TRPO
IMPLEMENTATIONS: dict[str, Callable[..., Model]] = {"ours": TRPO, "sb3-contrib": sb3_contrib.TRPO}


class Target(gym.Env[np.ndarray, np.ndarray]):
    """Hit a vector that is a linear function of the observation.

    :param action_space: Box or MultiBinary, of one axis
    """

    N_INPUTS, EPISODE = 8, 50

    def __init__(self, action_space: spaces.Box | spaces.MultiBinary) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (self.N_INPUTS,))
        self.action_space = action_space
        (n_dimensions,) = action_space.shape
        self._weights = np.random.default_rng(0).standard_normal((n_dimensions, self.N_INPUTS))
        self._weights /= np.linalg.norm(self._weights, axis=1, keepdims=True)
        self._binary = isinstance(action_space, spaces.MultiBinary)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode."""
        super().reset(seed=seed)
        self._n_steps = 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Score the action, and draw the next observation."""
        target = self._weights @ self._observation
        error = action - (target > 0 if self._binary else target)
        self._n_steps += 1
        return self._observe(), -float(np.square(error).mean()), self._n_steps == self.EPISODE, False, {}

    def _observe(self) -> np.ndarray:
        self._observation = self.np_random.standard_normal(self.N_INPUTS).astype(np.float32)
        return self._observation


def box(n_dimensions: int) -> gym.Env[np.ndarray, np.ndarray]:
    """Continuous actions, wide enough that none is clipped."""
    return Target(spaces.Box(-10, 10, (n_dimensions,)))


def multibinary(n_dimensions: int) -> gym.Env[np.ndarray, np.ndarray]:
    """One bit per dimension."""
    return Target(spaces.MultiBinary(n_dimensions))


TASKS: dict[str, str | Callable[[], gym.Env[np.ndarray, np.ndarray]]] = {
    **{f"box-{d}": partial(box, d) for d in (1, 3, 6, 17)},
    **{f"multibinary-{d}": partial(multibinary, d) for d in (1, 6, 17)},
    **{name: name for name in ("Pendulum-v1", "Walker2d-v4", "Humanoid-v4")},
}

FIGURES = ("task", "dims", "implementation", "target_kl", "mean_kl", "max_kl", "above_target", "accepted")
COLUMNS = (*FIGURES, "seeds", "updates", "date", "versions")


@dataclass(frozen=True)
class Settings:
    """What all runs have in common."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    updates: int = 20
    n_envs: int = N_ENVS
    n_steps: int = N_STEPS


def divergences(task: str, implementation: str, seed: int, settings: Settings) -> tuple[int, list[float]]:
    """Train, and measure every update from outside.

    :return: dimensions of the action, and the joint KL of each update, nats
    """
    env = make_vec_env(TASKS[task], n_envs=settings.n_envs, seed=seed)
    make = IMPLEMENTATIONS[implementation]
    model = make("MlpPolicy", env, n_steps=settings.n_steps, target_kl=TARGET_KL, seed=seed, device="cpu")
    train, found = model.train, []

    def measured_train() -> None:
        shape = env.observation_space.shape or ()
        observations = torch.from_numpy(model.rollout_buffer.observations.reshape(-1, *shape).copy())
        before = distribution(model, observations)
        train()
        found.append(joint_kl(before, distribution(model, observations)))

    model.train = measured_train  # type: ignore[method-assign]
    model.learn(settings.updates * settings.n_envs * settings.n_steps)
    env.close()
    return int(np.prod(env.action_space.shape or ())), found


def distribution(model: Model, observations: torch.Tensor) -> Distribution:
    """What the policy draws actions from at each state: torch's, one dimension beside the other."""
    with torch.no_grad():
        held = model.policy.get_distribution(observations.float()).distribution
    assert isinstance(held, Distribution)
    return held


def joint_kl(before: Distribution, after: Distribution) -> float:
    """KL(before || after), summed over action dimensions, averaged over states; nats."""
    return float(kl_divergence(before, after).double().sum(1).mean())


def summarize(kls: Iterable[float]) -> dict[str, float]:
    """The figures of a row."""
    kls = list(kls)
    steps = [kl for kl in kls if kl != 0]
    return {
        "target_kl": TARGET_KL,
        "mean_kl": round(statistics.fmean(steps), 5),
        "max_kl": round(max(steps), 5),
        "above_target": round(statistics.fmean(kl > TARGET_KL for kl in steps), 3),
        "accepted": round(len(steps) / len(kls), 3),
    }


def measure(task: str, implementation: str, settings: Settings) -> dict[str, Any]:
    """One row."""
    runs = [divergences(task, implementation, seed, settings) for seed in settings.seeds]
    return {
        "task": task,
        "dims": runs[0][0],
        "implementation": implementation,
        **summarize(kl for _, kls in runs for kl in kls),
        "seeds": len(settings.seeds),
        "updates": settings.updates,
    }


def main(arguments: Sequence[str] | None = None, settings: Settings | None = None) -> int:
    """Measure the chosen tasks, save each row, print the table."""
    settings = settings or Settings()
    parser = make_parser(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=settings.seeds)
    parser.add_argument("--updates", type=int, default=settings.updates, help="per seed")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="CSV file; rows of other tasks stay in it")
    options = parser.parse_args(arguments)
    if options.updates < 1:
        parser.error("--updates is 1 or more")
    settings = Settings(tuple(options.seeds), options.updates, settings.n_envs, settings.n_steps)
    torch.set_num_threads(1)
    stamps = date_and_versions(PACKAGES)
    rows = []
    for task in options.tasks:
        for implementation in IMPLEMENTATIONS:
            print(f"{task} {implementation} ...", file=sys.stderr, flush=True)
            rows.append(measure(task, implementation, settings))
            merge_csv(options.output, [rows[-1] | stamps], COLUMNS, ("task", "implementation"))
    print(format_table(rows, FIGURES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
