"""The options of ``sb3-pg train``: those of ``rl_zoo3.train``, with more choices and other defaults."""

import argparse
from typing import Any, Final

VECTOR_BACKENDS: Final = ("vector", "envpool")
"""What ``--vec-env`` takes beside rl_zoo3's own: backends of :func:`sb3_pg.envs.make_vec_env`."""

_CHANGED: Final[dict[str, dict[str, Any]]] = {
    "--vec-env": {
        "choices": ["dummy", "subproc", *VECTOR_BACKENDS],
        "help": "VecEnv of the training envs (default: dummy): SB3's, Gymnasium's vector env, or EnvPool's (extra "
        "`envpool`)",
    },
    "--trained-agent": {
        "help": "Path to a pretrained agent to continue training. The count of its steps goes on, and -n adds to it; "
        "schedules such as lin_0.01 are those of one run of all these steps",
    },
    "--log-interval": {
        "help": "Updates between two logs, or episodes for off-policy algorithms (default: -1, as many as make a log "
        "about every 500 steps of each env, as often as A2C's default; algorithms of rl_zoo3 keep their own default; "
        "-2: no logging)",
    },
    "--eval-freq": {
        "default": None,  # follows from the number of steps, which the config file has
        "help": "Evaluate the agent every n steps, and before the first (if negative, no evaluation; default: a "
        "twentieth of the run, but at least 1000). During hyperparameter optimization n-evaluations is used instead",
    },
    "--n-eval-envs": {
        "default": None,  # follows from the number of training envs, which the config file has
        "help": "Number of environments for evaluation (default: as many as training envs, but at most one for each "
        "episode)",
    },
    "--track": {
        "help": "if toggled, this experiment will be tracked with Weights and Biases (extra `track`)",
    },
}


class TrainParser(argparse.ArgumentParser):
    """What ``rl_zoo3.train`` builds its command line with, while ``sb3-pg train`` runs."""

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """As argparse's, but for the options that differ here."""
        changed = next((_CHANGED[name] for name in names if name in _CHANGED), {})
        return super().add_argument(*names, **options | changed)

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """As argparse's; numbers that would fail later are refused.

        :raises SystemExit: the command line cannot be parsed, or a number is out of range
        """
        parsed = super().parse_args(*args, **kwargs)
        for name in ("eval_episodes", "n_eval_envs"):
            value = getattr(parsed, name)
            if value is not None and value < 1:
                self.error(f"argument --{name.replace('_', '-')}: must be at least 1, got {value}")
        if parsed.log_interval == 0:
            self.error("argument --log-interval: must be at least 1, -1 (default) or -2 (no logging), got 0")
        return parsed
