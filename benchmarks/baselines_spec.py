"""What a run of ``baselines.py`` is, which estimators there are, and what a run measures.

Imports the standard library alone, so that a worker can still set its thread limits before numpy and torch are loaded.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

CRITIC: dict[str, Any] = {"normalize_value_targets": True}
#: estimator -> arguments; those with an ``advantage`` are ActorCritic's, the others Reinforce's. From the noisiest on.
ESTIMATORS: dict[str, dict[str, Any]] = {
    "total return": {"returns": "total", "baseline": "none"},
    "reward-to-go": {"baseline": "none"},
    "mean": {"baseline": "mean"},
    "time": {"baseline": "time"},
    "optimal": {"baseline": "optimal"},
    "linear": {"baseline": "linear"},
    "value": {"baseline": "value", **CRITIC},
    "GAE": {"advantage": "gae", "gae_lambda": 0.95, "n_steps": None, "use_rms_prop": False, **CRITIC},
}
REFERENCE = "value"

#: The columns that tell runs of one estimator apart, and those that tell all runs apart.
RUN = ("env", "seed", "steps", "config_hash")
LEARNING_KEY = ("estimator", *RUN)


@dataclass(frozen=True)
class Run:
    """One training run, how it is evaluated, and where its gradients are measured if it is the reference."""

    estimator: str
    env: str
    seed: int
    steps: int
    settings: tuple[tuple[str, Any], ...]
    evaluations: int = 20
    evaluation_episodes: int = 5
    stops: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 1.0)  # shares of the budget
    probe_episodes: int = 64

    @property
    def config_hash(self) -> str:
        """Ten hexadecimal digits for the settings and the protocol."""
        used = [self.settings, self.evaluations, self.evaluation_episodes, self.stops, self.probe_episodes]
        return hashlib.sha256(json.dumps(used, default=str).encode()).hexdigest()[:10]

    @property
    def identity(self) -> dict[str, Any]:
        """The columns that say which run a row is of."""
        return {name: getattr(self, name) for name in LEARNING_KEY}

    def __str__(self) -> str:
        return f"{self.env} {self.estimator} seed {self.seed}"


@dataclass
class Result:
    """What a run measured: rows without the columns of :attr:`Run.identity`."""

    learning: list[dict[str, Any]]
    variance: list[dict[str, Any]]
