"""The command line finds its commands, and says so when it does not."""

import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pytest

import sb3_pg
from sb3_pg.cli import COMMANDS, main
from sb3_pg.extras import MissingExtraError
from sb3_pg.zoo import ALGORITHMS, scripts


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--help"])
    assert raised.value.code == 0
    output = capsys.readouterr().out
    assert all(f"  {name} " in output for name in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--version"])
    assert raised.value.code == 0
    assert capsys.readouterr().out == f"sb3-pg {sb3_pg.__version__}\n"


def test_no_command_is_a_wrong_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: sb3-pg" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("trian", "did you mean 'train'?"),
        ("record-v", "did you mean 'record-video'?"),
        ("xyz", "choose from train, enjoy"),
    ],
)
def test_unknown_command(name: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main([name])
    assert raised.value.code == 2
    assert f"unknown command {name!r}: {hint}" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_under_its_own_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.argv
    with pytest.raises(SystemExit) as raised:
        main([name, "--help"])
    assert raised.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: sb3-pg {name} ")
    assert sys.argv is before


def test_train_offers_ours_and_theirs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    choices = capsys.readouterr().out
    assert all(name in choices for name in (*ALGORITHMS, "contrib_trpo", "ppo_lstm"))


def test_command_gets_its_arguments_and_gives_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def run(arguments: Sequence[str]) -> int:
        calls.append(list(arguments))
        return 3

    # All modules first: one that is imported while another is patched would keep the patch.
    modules = {command.module: import_module(command.module) for command in COMMANDS.values()}
    for name, command in COMMANDS.items():
        monkeypatch.setattr(modules[command.module], command.function, run)
        assert main([name, "-P", "--version", name]) == 3
    assert calls == [["-P", "--version", name] for name in COMMANDS]


def test_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(_: Sequence[str]) -> None:
        raise MissingExtraError('Box2D is not installed: pip install "sb3_pg[envs]"')

    monkeypatch.setattr(scripts, "train", run)
    assert main(["train"]) == 1
    assert capsys.readouterr().err == 'sb3-pg train: error: Box2D is not installed: pip install "sb3_pg[envs]"\n'


def test_module_is_the_same_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sb3_pg", "--version"]
    output = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert output == f"sb3-pg {sb3_pg.__version__}\n"


def test_help_waits_for_nothing_heavy(tmp_path: Path) -> None:
    script = """
import sys
import stable_baselines3  # before 2.9 it loads matplotlib itself
before = set(sys.modules)
from sb3_pg.cli import main
try:
    main(["--help"])
except SystemExit:
    print("loaded", [name for name in ("rl_zoo3", "optuna", "matplotlib") if name in set(sys.modules) - before])
"""
    command = [sys.executable, "-c", script]
    output = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert output.splitlines()[-1] == "loaded []"
