"""300 random cases, the same ones every time. ``make fuzz`` runs more of them."""

from dataclasses import replace
from typing import Any

import pytest
import torch as th
from hypothesis import HealthCheck, Phase, given, seed, settings

from sb3_pg.algorithms.shell import LEARN_CHECKS
from tests.fuzz.__main__ import run
from tests.fuzz.cases import CLASSES, LEARN, VALID, Case, cases, outcome
from tests.helpers import parameters

SMALLEST_SHARE = 0.7


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_random_cases_learn_or_say_what_is_wrong() -> None:
    summary = run(300, first_seed=0)
    assert not summary.wrong, str(summary)
    assert summary.share_learned >= SMALLEST_SHARE, str(summary)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@seed(0)
@settings(
    max_examples=60, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(cases())
def test_one_actor_is_dummy_in_random_cases(case: Case) -> None:
    """To the bit: how it ends, the parameters, the number of steps, and the random generator."""
    ends = []
    for n_actors in (0, 1):
        made: list[Any] = []
        how = outcome(replace(case, n_actors=n_actors), made)
        learned = [vars(model).get("num_timesteps") for model in made]
        values = [parameters(model).nan_to_num().tolist() for model in made if hasattr(model, "policy")]
        ends.append((how, learned, values, th.get_rng_state().tolist()))
    assert ends[0] == ends[1]


def test_every_argument_is_drawn() -> None:
    known = {name for cls in CLASSES for name in cls.checks}
    assert known - {"policy", "env"} == VALID.keys()
    assert LEARN_CHECKS.keys() == LEARN.keys()
