"""RLlib's IMPALA on the envs of ``asynchronous.py``: env steps per second. It runs in an environment of its own.

    python -m venv /tmp/rllib && /tmp/rllib/bin/pip install "ray[rllib]" torch "gymnasium[classic-control,mujoco]"
    /tmp/rllib/bin/python benchmarks/asynchronous_rllib.py CartPole-v1 --n-actors 2 --seconds 120

The steps are counted from the first iteration that reports some.
"""

import argparse
import importlib
import time
from typing import Any

N_ENVS, N_STEPS = 16, 64


def steps_of(result: dict[str, Any]) -> int:
    """Env steps since the start, from what ``train()`` returns. Its first results may have none."""
    return int(result.get("env_runners", {}).get("num_env_steps_sampled_lifetime", 0))


def main() -> None:
    """Print one rate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("env")
    parser.add_argument("--n-actors", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=120.0)
    options = parser.parse_args()
    config: Any = importlib.import_module("ray.rllib.algorithms.impala").IMPALAConfig()
    algorithm = (
        config.environment(options.env)
        .env_runners(
            num_env_runners=options.n_actors,
            num_envs_per_env_runner=N_ENVS // options.n_actors,
            rollout_fragment_length=N_STEPS,
        )
        .learners(num_learners=0)
        .training(train_batch_size_per_learner=N_STEPS * N_ENVS // options.n_actors)
        .build_algo()
    )
    first = 0
    while not first:
        first = steps_of(algorithm.train())
    began = time.perf_counter()
    latest = first
    while time.perf_counter() - began < options.seconds:
        latest = steps_of(algorithm.train())
    print(f"{options.env}: {(latest - first) / (time.perf_counter() - began):.0f} env steps per second")
    algorithm.stop()


if __name__ == "__main__":
    main()
