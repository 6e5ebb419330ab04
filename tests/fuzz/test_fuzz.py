"""300 random cases, the same ones every time. ``make fuzz`` runs more of them."""

import pytest

from sb3_pg.algorithms.shell import LEARN_CHECKS
from tests.fuzz.__main__ import run
from tests.fuzz.cases import CLASSES, LEARN, VALID

SMALLEST_SHARE = 0.7


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_random_cases_learn_or_say_what_is_wrong() -> None:
    summary = run(300, first_seed=0)
    assert not summary.wrong, str(summary)
    assert summary.share_learned >= SMALLEST_SHARE, str(summary)


def test_every_argument_is_drawn() -> None:
    known = {name for cls in CLASSES for name in cls.checks}
    assert known - {"policy", "env"} == VALID.keys()
    assert LEARN_CHECKS.keys() == LEARN.keys()
