"""``sb3-pg report``: what it writes, and what it says when it cannot."""

import csv
from pathlib import Path

import pytest
from matplotlib import image

from sb3_pg import cli
from sb3_pg.reporting.report import draw_summary, group_of, learning_curves, main, profiled, table
from sb3_pg.reporting.scores import Result, improvements, matrices, score
from tests.reporting.test_scores import results, write_table


@pytest.mark.parametrize(
    ("env", "group"),
    [
        ("CartPole-v1", "classic control"),
        ("LunarLander-v3", "Box2D"),
        ("Hopper-v4", "MuJoCo"),
        ("FrozenLake-v1", "other"),
        ("Nothing-v0", "other"),
    ],
)
def test_groups_of_envs(env: str, group: str) -> None:
    assert group_of(env) == group


def test_table_is_markdown() -> None:
    text = table(score(results("npg", 1.0, 2.0, 6.0)))
    head, rule, line = text.splitlines()
    assert head.count("|") == rule.count("|") == line.count("|")
    assert line.startswith("| CartPole-v1 | 100 | npg | 3 | 3.0 | 2.6 | 1.0, 6.0 | ")


@pytest.mark.slow
def test_summary_says_what_it_shows() -> None:
    found = [*results("ours", 2.0, 4.0), *results("peer", 1.0, 3.0)]
    profile, better = matrices(found, ["ours", "peer"]), improvements(found, "peer")
    left, right = draw_summary(found, profile, {"peer": better}).axes
    assert left.get_title() == "Performance profile on CartPole-v1"
    assert [line.get_label() for line in left.get_lines()] == ["ours (2 runs of each)", "peer (2 runs of each)"]
    assert right.get_title() == "Improvement on peer"
    assert [label.get_text() for label in right.get_yticklabels()] == ["ours\nCartPole-v1"]
    (alone,) = draw_summary(found, profile, {}).axes
    assert alone.get_title() == left.get_title()
    (alone,) = draw_summary(found, None, {"peer": better}).axes
    assert alone.get_title() == right.get_title()


def test_summary_says_which_runs_it_shows() -> None:
    found = [*results("ours", 2.0, 4.0), *results("ours", 1.0, env="Acrobot-v1")]
    (panel,) = draw_summary(found, matrices(found, ["ours"]), {}).axes
    assert panel.get_lines()[0].get_label() == "ours (first 1 run of each)"


def test_profile_is_of_those_that_follow_the_peer_everywhere() -> None:
    found = [r for env in ("A", "B") for label in ("peer", "ours") for r in results(label, 1.0, env=env)]
    found += results("few", 1.0, env="A")
    assert profiled(found, []) == ["peer", "ours", "few"]
    assert profiled(found, ["peer", "few"]) == ["peer", "ours"]
    assert profiled(found, ["few"]) == ["peer", "ours", "few"]
    found += results("peer", 1.0, env="C")  # where it is alone: no comparison
    assert profiled(found, ["peer"]) == ["peer", "ours", "few"]


def test_runs_of_different_lengths_are_different_curves() -> None:
    short, long = results("ours", 1.0, 2.0, steps=100), results("ours", 3.0, steps=1000)
    assert [(curve.env, curve.n_runs) for curve in learning_curves(short)] == [("CartPole-v1", 2)]
    others = [*results("peer", 4.0, steps=1000), *results("ours", 5.0, env="Acrobot-v1")]
    found = learning_curves([*long, *short, *others])
    assert [(curve.label, curve.env, curve.n_runs) for curve in found] == [
        ("ours", "CartPole-v1, 100 steps", 2),
        ("ours", "CartPole-v1, 1,000 steps", 1),
        ("peer", "CartPole-v1, 1,000 steps", 1),
        ("ours", "Acrobot-v1", 1),
    ]


@pytest.mark.slow
def test_report_of_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [("ours", 0, 10.0), ("ours", 1, 20.0), ("peer", 0, 5.0), ("peer", 1, 15.0)]
    source = write_table(tmp_path / "learning.csv", runs)
    assert cli.main(["report", str(source), "-o", str(tmp_path / "report"), "--against", "peer"]) == 0
    names = ["scores.md", "scores.csv", "improvements.csv", "curves_classic_control.png", "summary.png"]
    out = capsys.readouterr().out
    assert out.endswith("".join(f"{tmp_path / 'report' / name}\n" for name in names))
    assert "| CartPole-v1 | 100 | peer | 2 | 10.0 | 7.1 | 5.0, 15.0 |" in out
    with (tmp_path / "report/scores.csv").open() as file:
        ours, peer = csv.DictReader(file)
    assert (ours["label"], float(ours["mean"]), float(peer["iqm"])) == ("ours", 15, 10)
    assert float(ours["iqm_low"]) <= float(ours["iqm"]) <= float(ours["iqm_high"])
    with (tmp_path / "report/improvements.csv").open() as file:
        (line,) = csv.DictReader(file)
    assert (line["label"], line["against"], line["envs"]) == ("ours", "peer", "1")
    assert float(line["probability"]) == 0.75  # 10 > 5, 20 > 5, 20 > 15 of four pairs
    assert 0 <= float(line["low"]) <= 0.75 <= float(line["high"]) <= 1
    assert f"| ours | 0.75 ({float(line['low']):.2f} to {float(line['high']):.2f}) | CartPole-v1 |" in out
    for name in names[3:]:
        assert image.imread(tmp_path / "report" / name).std() > 0.01


@pytest.mark.slow
def test_several_peers_each_have_a_table_and_a_panel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [(label, seed, value) for label, value in (("ours", 2.0), ("a", 1.0), ("b", 3.0)) for seed in (0, 1)]
    source = write_table(tmp_path / "learning.csv", runs)
    assert main([str(source), "-o", str(tmp_path / "out"), "--label", "ours", "--against", "a", "b", "a"]) == 0
    with (tmp_path / "out/improvements.csv").open() as file:
        found = {(line["label"], line["against"]): float(line["probability"]) for line in csv.DictReader(file)}
    assert found == {("ours", "a"): 1, ("b", "a"): 1, ("a", "b"): 0, ("ours", "b"): 0}
    text = (tmp_path / "out/scores.md").read_text()
    assert text in capsys.readouterr().out
    assert [text.count(f"P(ends higher than {peer})") for peer in "ab"] == [1, 1]
    better = {peer: improvements(results("ours", 2.0) + results(peer, 1.0), peer) for peer in "ab"}
    titles = [panel.get_title() for panel in draw_summary(results("ours", 2.0), None, better).axes]
    assert titles == ["Improvement on a", "Improvement on b"]


@pytest.mark.slow
def test_inputs_have_labels_and_are_chosen_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_table(tmp_path / "learning.csv", [("ours", 0, 10.0), ("other", 0, 20.0)])
    peers = write_table(tmp_path / "peers.csv", [("ours", 0, 5.0)])
    arguments = [str(source), f"old={peers}", "--label", "ours", "--against", "old", "-o", str(tmp_path / "out")]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "| ours | 1 | 10.0 |" in out
    assert "| old | 1 | 5.0 |" in out
    assert "other" not in out


def test_envs_and_labels_come_in_the_order_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_table(tmp_path / "learning.csv", [("a", 0, 1.0), ("b", 0, 1.0), ("peer", 0, 1.0), ("b", 1, 1.0)])
    for file in (source, tmp_path / "learning_curves.csv"):
        file.write_text(file.read_text().replace("b,CartPole-v1,1,", "b,Acrobot-v1,1,"))
    written: list[Result] = []

    def keep(results: list[Result], *_: object) -> list[Path]:
        written.extend(results)
        return []

    monkeypatch.setattr("sb3_pg.reporting.report.write_report", keep)
    chosen = ["--env", "Acrobot-v1", "CartPole-v1", "--label", "b", "a", "--against", "peer"]
    assert main([str(source), *chosen]) == 0
    assert [(result.env, result.label) for result in written] == [
        ("Acrobot-v1", "b"),
        ("CartPole-v1", "b"),
        ("CartPole-v1", "a"),
        ("CartPole-v1", "peer"),
    ]


@pytest.mark.slow
def test_labels_without_a_common_env_have_no_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_table(tmp_path / "learning.csv", [("ours", 0, 10.0), ("ours", 1, 10.0), ("peer", 0, 5.0)])
    text = source.read_text().replace("peer,CartPole-v1", "peer,Acrobot-v1")
    curves = tmp_path / "learning_curves.csv"
    curves.write_text(curves.read_text().replace("peer,CartPole-v1", "peer,Acrobot-v1"))
    source.write_text(text)
    assert main([str(source), "-o", str(tmp_path / "out")]) == 0
    assert "no performance profile: no env with the same number of training steps" in capsys.readouterr().err
    assert not (tmp_path / "out/summary.png").exists()
    both = write_table(tmp_path / "both.csv", [("b", 0, 1.0), ("b", 1, 1.0)])
    for file in (both, tmp_path / "both_curves.csv"):
        file.write_text(file.read_text().replace("b,CartPole-v1,1,", "b,Acrobot-v1,1,"))
    assert main([str(source), str(both), "-o", str(tmp_path / "out"), "--against", "b"]) == 0
    assert "no performance profile" in capsys.readouterr().err
    assert (tmp_path / "out/summary.png").exists()  # who improves on b, on what they have in common


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.csv"], "nowhere.csv is not a table"),
        (["learning.csv", "--env", "Acrobot-v1"], "no run in learning.csv matches --env and --label"),
        (["learning.csv", "--against", "ppo"], "no run of 'ppo'; there are runs of ours"),
    ],
)
def test_what_cannot_be_reported_is_said(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "learning.csv", [("ours", 0, 10.0)])
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report").exists()
