"""``sb3-pg`` reads agents, settings and statistics without running what they name, unless ``--trusted``."""

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from sb3_pg.cli import main
from tests.checkpoints.test_hostile_zips import entries_of, pickled, with_field, write
from tests.checkpoints.test_safe_pickle import touching

RUN = Path("logs/actor_critic/Pendulum-v1_1")
SETTINGS = RUN / "Pendulum-v1/config.yml"
STATISTICS = RUN / "Pendulum-v1/vecnormalize.pkl"
TRAIN = "train --algo actor_critic --env Pendulum-v1 -n 100"
ENJOY = "enjoy --algo actor_critic --env Pendulum-v1 -n 5 --no-render"
GO_ON = f"{TRAIN} --eval-freq -1 -i {RUN}/Pendulum-v1.zip"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    main([*TRAIN.split(), "--eval-freq", "-1", "-params", "n_envs:1", "normalize:True"])
    return tmp_path


def agent(touch: Path) -> None:
    path = RUN / "Pendulum-v1.zip"
    write(path, with_field(entries_of(path), "unknown", pickled(touching(touch)["os.system"])))


def settings(text: str) -> Callable[[Path], None]:
    def change(touch: Path) -> None:
        SETTINGS.write_text(SETTINGS.read_text() + text.replace("TOUCH", str(touch)))

    return change


def replaced_settings(text: str) -> Callable[[Path], None]:
    def change(touch: Path) -> None:
        SETTINGS.write_text(text.replace("TOUCH", str(touch)))

    return change


def statistics(touch: Path) -> None:
    STATISTICS.write_bytes(touching(touch)["os.system"])


HOSTILE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "agent": (ENJOY, agent),
    "agent, continued": (GO_ON, agent),
    "statistics": (ENJOY, statistics),
    "statistics, continued": (GO_ON, statistics),
    "settings": (ENJOY, replaced_settings("!!python/object/apply:os.system ['touch TOUCH']")),
    "evaluated": (ENJOY, replaced_settings("normalize: \"open('TOUCH', 'w')\"")),
}


@pytest.mark.usefixtures("run")
def test_an_honest_run_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (ENJOY, GO_ON, f"{ENJOY} --trusted"):
        main(command.split())
    assert capsys.readouterr().out.count("running average") == 2
    assert Path("logs/actor_critic/Pendulum-v1_2/Pendulum-v1.zip").is_file()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_run_is_refused(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, change = HOSTILE[name]
    touch = run / "touched"
    change(touch)
    with pytest.raises(SystemExit) as caught:
        main(command.split())
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "--trusted" in error, error
    assert not touch.exists()


@pytest.mark.parametrize("name", ["agent", "agent, continued"])
def test_a_trusted_run_is_run(name: str, run: Path) -> None:
    command, change = HOSTILE[name]
    touch = run / "touched"
    change(touch)
    main([*command.split(), "--trusted"])
    assert touch.exists()


def test_wrappers_must_be_known(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replaced_settings("env_wrapper: subprocess.Popen")(run)
    with pytest.raises(SystemExit):
        main(ENJOY.split())
    assert "'env_wrapper' in" in capsys.readouterr().err
    assert pickle.loads(STATISTICS.read_bytes()).norm_obs
    assert zipfile.is_zipfile(RUN / "Pendulum-v1.zip")
