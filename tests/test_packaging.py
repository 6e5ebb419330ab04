"""The wheel carries all that the package needs, and finds it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import sb3_pg
from sb3_pg.zoo import ALGORITHMS, config_path

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-c", f"from hatchling.build import build_wheel; build_wheel({str(folder)!r})"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_wheel_has_what_the_checkout_has(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = {
            name.rpartition("/")[2]: archive.read(name).decode() for name in archive.namelist() if "-info/" in name
        }
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sb3_pg").rglob("*.py")}
    configs = {f"sb3_pg/zoo_configs/{path.name}" for path in (ROOT / "zoo_configs").glob("*.yml")}
    assert names == sources | configs | {"sb3_pg/py.typed"}
    assert "sb3-pg = sb3_pg.cli:main" in metadata["entry_points.txt"]
    assert f"Version: {sb3_pg.__version__}\n" in metadata["METADATA"]
    assert "License-File: LICENSE" in metadata["METADATA"]


def test_wheel_finds_its_configs(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    command = [sys.executable, "-c", "from sb3_pg.zoo import config_path; print(config_path('reinforce'))"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    output = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    assert Path(output.strip()) == tmp_path / "sb3_pg/zoo_configs/reinforce.yml"
    assert (tmp_path / "sb3_pg/zoo_configs/reinforce.yml").is_file()


def test_checkout_finds_its_configs() -> None:
    assert all(config_path(algo).is_file() for algo in ALGORITHMS)
