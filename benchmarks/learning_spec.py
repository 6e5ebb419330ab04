"""What a run of ``learning.py`` is: algorithm, env, seed, budget and settings.

Imports the standard library alone, so that a worker can still set its thread limits before numpy and torch are loaded.
"""

import ast
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench_io import row_key

#: The columns that tell runs apart.
KEY = ("algo", "env", "seed", "steps", "config_hash")


@dataclass(frozen=True)
class Run:
    """One training run, and how it is evaluated."""

    algo: str
    env: str
    seed: int
    steps: int
    overrides: tuple[str, ...] = ()  # --hyperparams, as typed
    config: str | None = None
    config_hash: str = ""
    evaluations: int = 20
    evaluation_episodes: int = 5
    final_episodes: int = 50
    n_actors: int = 0  # processes that collect; 0: DummyVecEnv

    @property
    def key(self) -> tuple[str, ...]:
        """What makes it the same run as one in the file."""
        return row_key(asdict(self), KEY)

    @property
    def hyperparams(self) -> dict[str, Any]:
        """The overrides, as values."""
        return parse_hyperparams(self.overrides)

    @property
    def command(self) -> str:
        """The command line that does this run alone."""
        words = ["python", "benchmarks/learning.py", "--algo", self.algo, "--env", self.env]
        words += ["--seeds", str(self.seed), "--steps", str(self.steps)]
        for name in ("evaluations", "evaluation_episodes", "final_episodes"):
            if getattr(self, name) != getattr(Run, name):
                words += ["--" + name.replace("_", "-"), str(getattr(self, name))]
        words += ["--config", self.config] if self.config else []
        words += ["--n-actors", str(self.n_actors)] if self.n_actors else []
        words += ["--hyperparams", *self.overrides] if self.overrides else []
        return shlex.join(words)

    def __str__(self) -> str:
        return f"{self.algo} {self.env} seed {self.seed}"


def parse_hyperparams(words: Sequence[str]) -> dict[str, Any]:
    """``["gamma:0.9", "learning_rate:lin_0.001"]`` as a dict.

    A value that is no Python literal stays text: what rl_zoo3 takes as text in its YAML files (schedules,
    ``dict(...)``) needs no second pair of quotes.

    :raises ValueError: a word without a colon
    """
    values: dict[str, Any] = {}
    for word in words:
        name, separator, text = word.partition(":")
        if not separator:
            raise ValueError(f"hyperparameter {word!r} is not name:value")
        try:
            values[name] = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            values[name] = text
    return values
