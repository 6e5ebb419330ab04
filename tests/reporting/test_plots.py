"""``sb3-pg plot``: what it reads, what it draws, and what it says when it cannot."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from sb3_pg.reporting.curves import Curve
from sb3_pg.reporting.plots import draw, main


def curve(label: str, env: str = "CartPole-v1", n_runs: int = 3) -> Curve:
    x = np.array([1e3, 2e3, 3e3])
    return Curve(label, env, n_runs, x, x / 10, x / 20, x / 5)


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two evaluated runs of one algorithm, one of another, and one that has training episodes alone."""
    monkeypatch.chdir(tmp_path)
    monitor = '#{"t_start": 0.0, "env_id": "CartPole-v1"}\nr,l,t\n' + "".join(f"{i}.0,10,{i}.5\n" for i in range(1, 31))
    for name, evaluated in [("reinforce/CartPole-v1_1", 1), ("reinforce/CartPole-v1_2", 1), ("a2c/CartPole-v1_1", 0)]:
        folder = tmp_path / "logs" / name
        folder.mkdir(parents=True)
        (folder / "0.monitor.csv").write_text(monitor)
        if evaluated:
            steps = list(range(20, 201, 20))
            np.savez(folder / "evaluations.npz", timesteps=steps, results=[[1.0, i] for i in steps])
    return tmp_path / "logs"


def test_figure_says_what_it_shows() -> None:
    curves = [curve("reinforce"), curve("ppo", n_runs=1), curve("ppo", "Acrobot-v1"), curve("a2c", n_runs=1)]
    figure = draw(curves, title="Mine")
    cartpole, acrobot = figure.axes
    assert figure.get_suptitle() == "Mine"
    assert (cartpole.get_title(), acrobot.get_title()) == ("CartPole-v1", "Acrobot-v1")
    assert cartpole.get_xlabel() == "Training time [env steps]"
    assert cartpole.get_ylabel() == "Evaluation return [reward per episode]"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "reinforce (3 runs)",
        "ppo (1 to 3 runs)",
        "a2c (1 run)",
    ]
    assert "95 % bootstrap" in legend.get_title().get_text()


def test_figure_draws_mean_and_band() -> None:
    (panel,) = draw([curve("reinforce")]).axes
    (line,) = panel.get_lines()
    np.testing.assert_array_equal(line.get_xydata(), [[1e3, 100], [2e3, 200], [3e3, 300]])
    (band,) = panel.collections
    outline = band.get_paths()[0].vertices
    assert {tuple(point) for point in np.asarray(outline)} >= {(1e3, 50), (1e3, 200), (3e3, 150), (3e3, 600)}


def test_a_label_has_one_color_in_all_figures_of_the_same_labels() -> None:
    alone, both = draw([curve("b")], labels=["a", "b"]), draw([curve("a"), curve("b")])
    assert alone.axes[0].get_lines()[0].get_color() == both.axes[0].get_lines()[1].get_color() == "C1"
    assert [text.get_text() for text in alone.legends[0].get_texts()] == ["b (3 runs)"]


def test_a_label_has_one_color_in_all_panels() -> None:
    left, right = draw([curve("a"), curve("b"), curve("b", "Acrobot-v1")]).axes
    assert left.get_lines()[1].get_color() == right.get_lines()[0].get_color()


def test_many_labels_have_different_lines() -> None:
    (panel,) = draw([curve(f"label {i}") for i in range(13)]).axes
    assert len({(line.get_color(), line.get_linestyle()) for line in panel.get_lines()}) == 13


def test_panels_without_curves_are_hidden() -> None:
    figure = draw([curve("a", f"Env{i}-v0") for i in range(4)])
    assert [panel.get_visible() for panel in figure.axes] == [True] * 4 + [False] * 2


@pytest.mark.usefixtures("logs")
def test_plot_writes_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-o", "pictures/curve.png", "--title", "Two runs", "--source", "evaluation"]) == 0
    output = capsys.readouterr()
    assert output.out == "pictures/curve.png\n"
    assert "left out: no evaluations.npz in " in output.err  # the a2c run, which has none
    height, width, _ = image.imread("pictures/curve.png").shape
    assert height > 400
    assert width > 600


def test_short_run_is_reported(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(logs / "reinforce/CartPole-v1_2/evaluations.npz", timesteps=range(100, 1001, 100), results=[[1.0]] * 10)
    assert main(["--label", "reinforce"]) == 0
    assert "reinforce on CartPole-v1 ends at 200, where its shortest run ends; its longest run ends at 1,000" in (
        capsys.readouterr().err
    )


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Curve], str, str]]:
    """What `main` asks to be drawn."""
    calls: list[tuple[list[Curve], str, str]] = []

    def record(curves: list[Curve], source: str, axis: str, title: str | None) -> object:
        calls.append((curves, source, axis))
        return draw(curves, title=title)

    monkeypatch.setattr("sb3_pg.reporting.plots.draw", record)
    return calls


@pytest.mark.usefixtures("logs")
@pytest.mark.parametrize(
    ("arguments", "source", "labels"),
    [
        ("", "training", {("reinforce", 2), ("a2c", 1)}),  # one of them has no evaluations
        ("--source evaluation", "evaluation", {("reinforce", 2)}),
        ("logs/reinforce", "evaluation", {("reinforce", 2)}),
        ("--source training", "training", {("reinforce", 2), ("a2c", 1)}),
        ("--x-axis time", "training", {("reinforce", 2), ("a2c", 1)}),
        ("logs/a2c", "training", {("a2c", 1)}),
        ("--source training --label a2c", "training", {("a2c", 1)}),
        ("logs/reinforce logs/reinforce/CartPole-v1_1", "evaluation", {("reinforce", 2)}),
        ("mine=logs/reinforce/CartPole-v1_1 logs/reinforce", "evaluation", {("mine", 1), ("reinforce", 2)}),
        ("--env CartPole-v1", "training", {("reinforce", 2), ("a2c", 1)}),
    ],
)
def test_choice_of_runs(
    arguments: str, source: str, labels: set[tuple[str, int]], drawn: list[tuple[list[Curve], str, str]]
) -> None:
    assert main(arguments.split()) == 0
    ((curves, used, _),) = drawn
    assert used == source
    assert {(curve.label, curve.n_runs) for curve in curves} == labels


@pytest.mark.usefixtures("logs")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nowhere", "no evaluations.npz and no *.monitor.csv in nowhere or its subfolders"),
        ("--env Acrobot-v1", "no run in logs matches --env and --label"),
        ("--source evaluation --x-axis time", "use --source training with --x-axis time"),
        ("--source evaluation --label a2c", "no run with evaluation episodes"),
        ("-o curve.foo", "Format 'foo' is not supported"),
        ("--x-axis stepps", "invalid choice: 'stepps'"),
    ],
)
def test_wrong_call(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments.split())
    assert raised.value.code == 2
    assert message in capsys.readouterr().err
