"""A file is written whole or not at all: killed, interrupted, on a full disk, by two processes at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sb3_pg import Reinforce
from sb3_pg.checkpoints import write_atomically

#: Saves a model in a loop, and says when it begins.
SAVE_IN_A_LOOP = """
import sys
from sb3_pg import Reinforce
model = Reinforce("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [256, 256]}, device="cpu")
model.save(sys.argv[1])
print("saved", flush=True)
for _ in range(int(sys.argv[2])):
    model.save(sys.argv[1])
"""


def save_in_a_loop(path: Path, times: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-c", SAVE_IN_A_LOOP, str(path), str(times)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "saved\n"
    return process


def test_the_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"first", b"second"):
        with write_atomically(path) as file:
            file.write(content)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError(), OSError(28, "No space left on device")])
def test_after_an_error_the_old_file_is_there(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write() -> None:
        with write_atomically(path) as file:
            file.write(b"new")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_modes_and_links_are_kept(tmp_path: Path) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_bytes(b"old")
    path.chmod(0o640)
    link.symlink_to(path)
    with write_atomically(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_process_killed_while_it_saves_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    process = save_in_a_loop(path, 10**6)
    for _ in range(20):  # the file is whole at every moment
        time.sleep(0.002)
        assert Reinforce.load(path, device="cpu").num_timesteps == 0
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert Reinforce.load(path, device="cpu").num_timesteps == 0


def test_two_processes_save_to_one_path(tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    processes = [save_in_a_loop(path, 10) for _ in range(2)]
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    assert Reinforce.load(path, device="cpu").num_timesteps == 0
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits of a process")
def test_a_full_disk(tmp_path: Path) -> None:
    code = """
import resource, signal, sys
from sb3_pg import OffPAC
model = OffPAC("MlpPolicy", "CartPole-v1", buffer_size=5000, learning_starts=10, device="cpu").learn(20)
model.save(sys.argv[1] + "/model")
model.save_replay_buffer(sys.argv[1] + "/buffer")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
free = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, free[1]))
for save, name in ((model.save, "model.zip"), (model.save_replay_buffer, "buffer.pkl")):
    try:
        save(sys.argv[1] + "/" + name)
    except OSError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, free)
OffPAC.load(sys.argv[1] + "/model", device="cpu").load_replay_buffer(sys.argv[1] + "/buffer")
model.save(sys.argv[1] + "/model")
"""
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for name in ("model.zip", "buffer.pkl"):
        assert f"File too large; what was there is as it was: '{tmp_path / name}'" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"model.zip", "buffer.pkl"}
