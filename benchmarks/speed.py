"""Speed: ours against a peer in the same process, in turns, one thread; env steps per second.

    python benchmarks/speed.py
    python benchmarks/speed.py --cases cartpole-8 --repeats 9 --steps 40960

Protocol
--------
- Ours, peer, limit, ours, peer, limit, ...: what the machine does meanwhile hits all of them. A rate is the median over
  the repetitions; ``ratio`` is the median of the pairwise ratios ours / peer, with their least and greatest beside it.
- Training: repetition i builds fresh models and envs from seed i, so all repetitions time the same phase of training
  (early: a policy that improves has longer episodes, fewer resets and a faster env). One ``learn()`` of one rollout
  warms up; the next ``learn()`` is timed. ``verbose=0`` and one ``log_interval`` on both sides: 1, or where
  ``ActorCritic`` meets A2C the 100 that both have by default.
- The limit is the same VecEnv under random actions drawn beforehand: no policy, no learning, no buffer.
- ``update`` is the share of the time spent in ``train()``; the rest is collecting, returns and logging.
- ``episode`` is the mean episode length during the timed part: the sides are comparable where these are alike.
- ``memory`` is by how many MiB training raises the peak of a process that has imported everything (Linux); some
  90 of them are libraries that torch loads when it is first used, on both sides.
- A kernel row times a function against its peer on the same data, after checking that the results agree.
- ``a2c-5-*`` are A2C's defaults, 5 steps per rollout and a log entry in 100; so small an update is all overhead.
- ``critic-*`` times minibatch steps of the critic on one rollout: our loop, and sb3-contrib's, which is the difference
  between its TRPO's ``train()`` with many passes over the critic and with one.
- ``fisher-h-n`` are products with the Fisher matrix of a policy of Hopper-v4's sizes with two hidden layers of h, at n
  samples; graphs are made beforehand on both sides. sb3-contrib averages the KL over action dimensions: its product is
  ours, but for the damping, divided by their number.
- ``trpo-update-8`` times ``train()`` of one rollout of Hopper-v4, again and again from one policy, in the same units
  (``target_kl`` and ``cg_damping`` times the number of dimensions). The peer's conjugate gradient ends at 15 steps, or
  before that at an absolute residual of 1e-5; ours does as many (``cg_tolerance=0``), after which both policies agree.
  Both fit the critic by 10 passes of minibatches of 128.
- ``trpo-cartpole-8``, ``trpo-hopper-8``: sb3-contrib's defaults on both sides, converted in the same way.
- ``kl_penalty-8``: as many steps with as many samples as PPO's defaults, actor and critic in one; for information.
- ``lstm-8``: 64 units, actor and critic with layers of their own; against sb3-contrib's RecurrentPPO with one epoch,
  the same layers and its default minibatches. ``lstm-shared-8`` and ``lstm-256-shared-8`` (256 units): the critic sees
  the actor's layers; against the same algorithm without memory, whose episodes are longer there.
- ``off_pac-box-1``, ``off_pac-discrete-1``: one gradient step per env step on both sides, over a tenth of the steps;
  OffPAC has SAC's networks there, and DQN's here, with an actor besides, of which DQN has none.
- ``vector-*``, ``envpool-*``: ours on a native vector env, or EnvPool's with two threads; the peer, with as many envs,
  on DummyVecEnv. Steps in which a native env is only reset take their time and are not counted.
- ``floor-*``: ours there against the least there is to do: env, one forward per step, one gradient step per rollout.
- ``sbx-ppo-8``, ``tianshou-a2c-8``: there where these packages are installed. sbx has PPO's networks and minibatches in
  JAX, whose import its memory includes; Tianshou's A2C, on its own DummyVectorEnv, has the nets, the optimizer and the
  rollouts of ours.
- ``a2c-null`` is A2C against itself: the spread of its ratio is what this machine, at this hour, can tell apart.
"""

import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench_io import cpu_count, date_and_versions, format_table, make_parser, merge_csv
from speed_cases import CASES
from speed_memory import peak_memory
from speed_peers import CASES as PEER_CASES
from speed_replay import CASES as REPLAY_CASES
from speed_timing import ROLLOUT, Case, Sample
from speed_vector import CASES as VECTOR_CASES
from stable_baselines3.common.utils import set_random_seed

OUTPUT = Path(__file__).resolve().parent / "results" / "speed.csv"
PACKAGES = ("sb3_pg", "stable_baselines3", "sb3_contrib", "gymnasium", "torch", "numpy")
FIGURES = (
    *("case", "ours", "peer", "n_envs", "ours_rate", "peer_rate", "ratio", "ratio_min", "ratio_max"),
    *("env_rate", "ours_of_env", "peer_of_env", "ours_update", "peer_update", "ours_episode", "peer_episode"),
    *("ours_memory", "peer_memory"),
)
ALL_CASES = (*CASES, *REPLAY_CASES, *VECTOR_CASES, *PEER_CASES)
COLUMNS = (*FIGURES, "steps", "repeats", "cpu_count", "date", "versions")


def median(values: Sequence[float], digits: int) -> float | str:
    """Rounded median; empty where nothing was measured."""
    middle = statistics.median(values)
    return "" if math.isnan(middle) else round(middle, digits) if digits else round(middle)


def summarize(ours: Sequence[Sample], peer: Sequence[Sample], limit: Sequence[Sample]) -> dict[str, float | str]:
    """The figures of a row. Ratios and shares are taken within a repetition, then their median."""
    ratios = [mine.rate / theirs.rate for mine, theirs in zip(ours, peer, strict=True)]
    row = {
        "ours_rate": median([sample.rate for sample in ours], 0),
        "peer_rate": median([sample.rate for sample in peer], 0),
        "ratio": median(ratios, 2),
        "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
    }
    for side, samples in (("ours", ours), ("peer", peer)):
        row[f"{side}_update"] = median([sample.update_seconds / sample.seconds for sample in samples], 3)
        row[f"{side}_episode"] = median([sample.episode for sample in samples], 1)
        if limit:
            shares = [sample.rate / most.rate for sample, most in zip(samples, limit, strict=True)]
            row[f"{side}_of_env"] = median(shares, 3)
    if limit:
        row["env_rate"] = median([sample.rate for sample in limit], 0)
    return row


def measure(case: Case, repeats: int, steps: int) -> dict[str, Any]:
    """One row: ``repeats`` times ours, peer, limit."""
    samples = []
    for repetition in range(repeats):
        set_random_seed(repetition)
        samples.append([take() for take in case.measures(repetition, steps)])
    ours, peer, *limit = zip(*samples, strict=True)
    names = {"case": case.name, "ours": case.ours_name, "peer": case.peer_name, "n_envs": case.n_envs}
    memory = {f"{side}_memory": peak_memory(case, i, steps) for i, side in enumerate(("ours", "peer"))}
    return names | summarize(ours, peer, limit[0] if limit else ()) | memory


def main(arguments: Sequence[str] | None = None, cases: Sequence[Case] = ALL_CASES) -> int:
    """Measure the chosen cases, save each, print the table."""
    parser = make_parser(__doc__)
    names = [case.name for case in cases]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10 * ROLLOUT, help="env steps per timing, about")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="CSV file; rows of other cases stay in it")
    options = parser.parse_args(arguments)
    if options.repeats < 1 or options.steps < 1:
        parser.error("--repeats and --steps are 1 or more")
    torch.set_num_threads(1)
    stamps = {
        "steps": options.steps,
        "repeats": options.repeats,
        "cpu_count": cpu_count(),
        **date_and_versions(PACKAGES),
    }
    rows = []
    for case in cases:
        if case.name in options.cases:
            print(f"{case.name} ...", file=sys.stderr, flush=True)
            rows.append(measure(case, options.repeats, options.steps))
            # saved case by case: an interrupt costs the current one only
            merge_csv(options.output, [rows[-1] | stamps], COLUMNS, ("case",))
    print(format_table(rows, FIGURES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
