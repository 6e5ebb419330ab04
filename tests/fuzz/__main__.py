"""Run random cases, and print how they ended: ``python -m tests.fuzz --cases 10000``."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch as th
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.cases import Case, Summary, cases


def run(n_cases: int, first_seed: int) -> Summary:
    """Run cases in blocks of 100, one seed each.

    :param n_cases: number of cases
    :param first_seed: seed of the first block
    """
    summary, block = Summary(), first_seed
    while (left := n_cases - sum(summary.counts.values())) > 0:

        @seed(block)
        @settings(
            max_examples=min(100, left),
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(cases())
        def count(case: Case) -> None:
            summary.add(case)

        count()
        block += 1
    return summary


def main() -> int:
    """Print the summary, and return 1 if a case went wrong or too few cases have learned."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    th.set_num_threads(1)
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:  # some cases take a random word for a folder
        os.chdir(folder)
        summary = run(arguments.cases, arguments.seed)
        os.chdir(before)
    print(summary)
    return int(bool(summary.wrong) or summary.share_learned < 0.7)


if __name__ == "__main__":
    sys.exit(main())
