"""``sb3-pg train``, ``enjoy`` and ``record`` on an env with action masks."""

from pathlib import Path

import pytest

from sb3_pg import Demonstrations, cli
from sb3_pg.action_masks import MASK_KEY
from tests.helpers import the_others_slow


@pytest.mark.parametrize(
    ("algo", "vec_env"),
    the_others_slow(
        [("actor_critic", "dummy"), ("actor_critic", "subproc"), ("off_pac", "dummy")],
        quick=[("actor_critic", "dummy"), ("off_pac", "dummy")],
    ),
)
def test_train_and_enjoy(algo: str, vec_env: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--algo", algo, "--env", "MaskedGrid-v0", "-f", str(tmp_path)]
    options = ["-n", "200", "--eval-freq", "100", "--eval-episodes", "1", "--seed", "0", "--vec-env", vec_env]
    cli.main(["train", *common, *options])
    assert "Saving to" in capsys.readouterr().out
    cli.main(["enjoy", *common, "--no-render", "-n", "150"])
    assert "Mean reward" in capsys.readouterr().out
    cli.main(["record", *common, "--n-episodes", "2", "-o", str(tmp_path / "demos")])
    demos = Demonstrations.load(tmp_path / "demos.npz")
    assert isinstance(demos.observations, dict)
    assert demos.observations[MASK_KEY][range(len(demos)), demos.actions].all()
