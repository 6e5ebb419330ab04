"""One change at a time, beside the settings as they are."""

from pathlib import Path

import ablation
import pytest
from bench_io import read_csv

SETTINGS = ("n_envs:1", "n_steps:64", "n_critic_updates:1", "cg_max_steps:2", "policy_kwargs:dict(net_arch=[4])")


def test_runs_are_compared_with_the_settings_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {ablation.BASE: SETTINGS, "no change": SETTINGS, "a larger step": (*SETTINGS, "target_kl:0.1")}
    monkeypatch.setattr(ablation, "CHANGES", changes)
    output = tmp_path / "ablation.csv"
    arguments = ["--env", "Pendulum-v1", "--seeds", "100", "--steps", "64", "--output", str(output)]
    assert ablation.main(arguments) == 0
    printed = capsys.readouterr().out
    finals = [float(row["final_mean"]) for row in read_csv(output)]
    assert len(finals) == 2
    assert "no change" not in printed
    assert f"{round(abs(finals[0] - finals[1]))}" in printed.splitlines()[-1]
    assert output.with_suffix(".png").stat().st_size > 10_000
    assert ablation.main([*arguments, "--plot"]) == 0


def test_every_change_is_of_an_argument_that_the_run_takes() -> None:
    runs = ablation.plan(["Pendulum-v1"], [100], 64)
    assert set(runs) <= set(ablation.CHANGES)
    assert len({run.config_hash for all_runs in runs.values() for run in all_runs}) == len(runs)


def test_a_change_of_the_policy_leaves_the_rest_of_the_policy_as_it_is() -> None:
    (run,) = ablation.plan(["HalfCheetah-v4"], [100], 64)["256 units"]
    policy_kwargs = [word for word in run.overrides if word.startswith("policy_kwargs:")]
    assert policy_kwargs == ["policy_kwargs:dict(dict(log_std_init=-1), net_arch=[256, 256])"]


def test_a_start_is_below_the_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "STARTS", {"Pendulum-v1": ("target_kl:0.3",)})
    runs = ablation.plan(["Pendulum-v1"], [100], 64)
    assert runs[ablation.BASE][0].hyperparams["target_kl"] == 0.3
    assert runs["KL 0.02, constant"][0].hyperparams["target_kl"] == 0.02


def test_report_seeds_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        ablation.main(["--seeds", "0", "100", "--output", str(tmp_path / "a.csv")])
    assert "do not mix" in capsys.readouterr().err
