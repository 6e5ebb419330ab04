"""Checkpoints of unknown origin: nothing that they name runs, and no file of others changes."""

import hashlib
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EveryNTimesteps
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import ConstantSchedule

from sb3_pg import ActorCritic, ResumeCallback
from sb3_pg.checkpoints.folder import CheckpointFolder
from sb3_pg.checkpoints.log_files import MARK
from sb3_pg.checkpoints.run_state import callback_state, set_callback_state
from sb3_pg.checkpoints.safe_pickle import loads
from sb3_pg.envs import get_env_state, set_env_state
from sb3_pg.envs.state import subproc_vec_env
from sb3_pg.errors import CheckpointError

STEPS = 64
FORK = {"start_method": "fork"}  # has the classes of this module


class Evil:
    def __init__(self, touch: Path) -> None:
        self.touch = touch

    def __reduce__(self) -> Any:
        return open, (str(self.touch), "w")


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_env() -> Any:
    return make_vec_env("CartPole-v1", 2, seed=0)


def trained(folder: Path, *callbacks: BaseCallback, **kwargs: Any) -> Path:
    model = ActorCritic("MlpPolicy", make_env(), n_steps=8, policy_kwargs={"net_arch": [4]}, device="cpu", **kwargs)
    model.learn(STEPS, [*callbacks, ResumeCallback(folder, every=16, on_signals=())])
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Write a checkpoint with valid digests whose state is changed, as one of a run that has not ended."""
    checkpoint = CheckpointFolder(folder).newest()
    assert checkpoint is not None
    parts = pickle.loads(checkpoint.files["state"])
    parts["attributes"]["_total_timesteps"] = 2 * STEPS
    change(parts)
    checkpoint.manifest.finished = False
    checkpoint.manifest.asked = 2 * STEPS
    arrays = {name: checkpoint.arrays(name)[""] for name in checkpoint.manifest.arrays}
    CheckpointFolder(folder).write(checkpoint.manifest, {**checkpoint.files, "state": pickle.dumps(parts)}, arrays, 9)


def rewrite_manifest(folder: Path, **values: Any) -> None:
    path = sorted(folder.glob("[0-9]*"))[-1] / "manifest.json"
    found = {name: value for name, value in json.loads(path.read_bytes()).items() if name != "digest"} | values
    path.write_text(json.dumps(found | {"digest": sha256_of(json.dumps(found).encode())}))


def go_on(folder: Path, *callbacks: BaseCallback) -> Any:
    model = ActorCritic.resume(folder, make_env(), device="cpu")
    return model.learn(2 * STEPS, [*callbacks, ResumeCallback(folder, every=1000, on_signals=())])


# -------------------------------------------------------------------- code


def loading(touch: Path, evil: Path) -> Any:
    """Plain data of a Sequential that gives the name of a file to a method that runs what the file holds."""
    th.save(Evil(touch), evil)
    constant = ConstantSchedule(0)
    constant.val = str(evil)  # type: ignore[assignment]
    touch.unlink(missing_ok=True)
    tables = ("_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    attributes: dict[str, Any] = {name: ("dict", [], []) for name in (*tables, "_backward_pre_hooks")}
    parts = [("pickled", pickle.dumps(constant)), ("method", 1, "load")]
    policy = ("pickled", pickle.dumps(ActorCriticPolicy.__new__(ActorCriticPolicy)))
    modules = {"policy": policy, "training": True, "_modules": ("dict", ["a", "b"], parts)}
    return ("object", "torch.nn.Sequential", pickle.dumps(th.nn.Sequential), modules | attributes)


@pytest.mark.parametrize("where", ["lr_schedule", "step of an env", "train", "callback"])
def test_a_method_that_runs_files_is_out_of_reach(where: str, tmp_path: Path) -> None:
    folder, touch = trained(tmp_path / "ckpt", CheckpointCallback(8, str(tmp_path))), tmp_path / "touched"

    def change(parts: dict[str, Any]) -> None:
        value = loading(touch, tmp_path / "evil")
        if where == "step of an env":
            parts["env"][1][-1]["attributes"]["step"] = value
        elif where == "callback":
            (state,) = (state for name, state in parts["callbacks"].items() if "CheckpointCallback" in name)
            state["attributes"]["_on_step"] = pickle.dumps(value)
        else:
            parts["attributes"][where] = value

    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=rf"{folder.name}/\d+ cannot be resumed"):
        go_on(folder, CheckpointCallback(8, str(tmp_path)))
    assert not touch.exists()


@pytest.mark.parametrize("name", ["train", "num_vec_envs", "env", "policy"])
def test_other_attributes_of_the_model_are_errors(name: str, tmp_path: Path) -> None:
    folder = trained(tmp_path / "ckpt")
    rewrite(folder, lambda parts: parts["attributes"].update({name: 3}))
    with pytest.raises(CheckpointError, match=f"the attribute {name} is 3"):
        go_on(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_timesteps", "9"), ("_last_obs", np.zeros((2, 7))), ("ep_info_buffer", 3), ("_n_updates", -5)],
)
def test_attributes_of_another_kind_are_errors(name: str, value: Any, tmp_path: Path) -> None:
    folder = trained(tmp_path / "ckpt")
    rewrite(folder, lambda parts: parts["attributes"].update({name: value}))
    with pytest.raises(CheckpointError, match=f"the attribute {name} is"):
        go_on(folder)


def test_a_checkpoint_does_not_choose_where_callbacks_write(tmp_path: Path) -> None:
    given, other = tmp_path / "given", tmp_path / "other"
    folder = trained(tmp_path / "ckpt", CheckpointCallback(8, str(given)))

    def change(parts: dict[str, Any]) -> None:
        (state,) = (state for name, state in parts["callbacks"].items() if "CheckpointCallback" in name)
        state["attributes"]["save_path"] = pickle.dumps(str(other))
        state["attributes"]["n_calls"] = pickle.dumps(7)

    rewrite(folder, change)
    callback = CheckpointCallback(8, str(given))
    go_on(folder, callback)
    assert callback.save_path == str(given)
    assert not other.exists()


def test_callbacks_inside_callbacks_stay(tmp_path: Path) -> None:
    inner = CheckpointCallback(1000, str(tmp_path))
    folder = trained(tmp_path / "ckpt", EveryNTimesteps(8, inner))
    kept = EveryNTimesteps(8, inner)

    def change(parts: dict[str, Any]) -> None:
        (state,) = (state for name, state in parts["callbacks"].items() if "EveryNTimesteps" in name)
        state["attributes"] |= {"callback": pickle.dumps(("list", [])), "model": pickle.dumps(3)}

    rewrite(folder, change)
    model = go_on(folder, kept)
    assert kept.callback is inner
    assert kept.model is model


class Numbered(gym.Wrapper[Any, Any, Any, Any]):
    """Has a dtype."""

    kind = np.dtype("f8")

    def flags(self) -> int:
        return int(self.kind.flags)


class Flagged:
    def __reduce__(self) -> Any:
        return np.dtype, ("f8", False, True), (3, "<", None, None, None, -1, -1, 1)


def test_workers_read_pickles_by_the_same_rules() -> None:
    env = subproc_vec_env([lambda: Numbered(gym.make("CartPole-v1"))], **FORK)
    try:
        env.reset()
        state = get_env_state(env)
        worker = state.members[0]["workers"][0]["state"]
        worker[1][worker[0]["classes"].index(f"{__name__}.Numbered")]["attributes"]["kind"] = (
            "pickled",
            pickle.dumps(Flagged()),
        )
        set_env_state(env, state, partial(loads, what="file"))
        assert env.env_method("flags") == [0]
    finally:
        env.close()


# -------------------------------------------------------------------- files


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("kind", ["name", "link", "pipe", "block"])
def test_no_file_outside_of_the_checkpoint_is_read(kind: str, tmp_path: Path) -> None:
    folder = trained(tmp_path / "ckpt")
    path = sorted(folder.glob("[0-9]*"))[-1]
    files = json.loads((path / "manifest.json").read_bytes())["files"]
    (tmp_path / "outside").write_bytes(b"x")
    digest = sha256_of(b"x")
    if kind == "name":
        rewrite_manifest(folder, files=files | {"../../outside": digest})
    elif kind == "block":
        array = {"dtype": "|u1", "shape": [1], "blocks": ["../../outside"]}
        rewrite_manifest(folder, arrays={"log/x": array})
    else:
        (path / "state").unlink()
        if kind == "pipe":
            os.mkfifo(path / "state")
        else:
            (path / "state").symlink_to("/dev/zero")
    with pytest.warns(UserWarning, match=rf"Checkpoint .*{path.name} is skipped"):
        newest = CheckpointFolder(folder).newest()
    assert newest is not None
    assert newest.path != path


@pytest.mark.parametrize(
    "values",
    [
        {"num_timesteps": "3"},
        {"asked": None},
        {"run": 3},
        {"files": {}},
        {"finished": 1},
        {"versions": {"torch": 3}},
        {"arrays": {"log/x": {"dtype": "|O", "shape": [1], "blocks": []}}},
        {"arrays": {"log/x": {"dtype": "<f3", "shape": [0], "blocks": []}}},
        {"arrays": {"log/x": {"dtype": "|u1", "shape": [10**15], "blocks": []}}},
        {"arrays": {"log/x": {"dtype": "|u1", "shape": [-1], "blocks": []}}},
        {"arrays": {"log/x": {"dtype": "|u1", "shape": 3, "blocks": None}}},
        {"arrays": []},
    ],
)
def test_manifests_of_another_form_are_skipped(values: dict[str, Any], tmp_path: Path) -> None:
    folder = trained(tmp_path / "ckpt")
    rewrite_manifest(folder, **values)
    newest_number = CheckpointFolder(folder).numbers[0]
    with pytest.warns(UserWarning, match="is skipped"):
        newest = CheckpointFolder(folder).newest()
    assert newest is not None
    assert newest.number < newest_number


def test_only_blocks_are_deleted_and_a_link_is_not_emptied(tmp_path: Path) -> None:
    folder, other = trained(tmp_path / "ckpt"), tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years")
    for path in (folder / "blocks").iterdir():
        path.rename(other / path.name)
    (folder / "blocks").rmdir()
    (folder / "blocks").symlink_to(other)
    (folder / ".lock").unlink(missing_ok=True)
    (folder / ".lock").symlink_to(other / "thesis.tex")
    rewrite(folder, lambda _: None)
    go_on(folder)
    assert (other / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize("kind", ["another folder", "a link"])
def test_event_files_of_others_stay(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    own, other = tmp_path / "tb", tmp_path / "other"
    folder = trained(tmp_path / "ckpt", tensorboard_log=str(own))
    victim = other / "events.out.tfevents.1"
    other.mkdir()
    victim.write_bytes(b"a" * 100)
    run_folder = own / "ActorCritic_1"
    if kind == "a link":
        (run_folder / "events.out.tfevents.2").symlink_to(victim)

    def change(parts: dict[str, Any]) -> None:
        if kind == "a link":
            parts["logger"]["event_sizes"]["events.out.tfevents.2"] = 1
        else:
            parts["logger"]["event_folder"] = str(other)

    rewrite(folder, change)
    go_on(folder)
    assert victim.read_bytes() == b"a" * 100
    assert [path.name for path in other.iterdir()] == [victim.name]
    assert (run_folder / MARK).is_file()


# -------------------------------------------------------------------- sizes


def test_a_list_that_is_twice_in_each_next_one(tmp_path: Path) -> None:
    folder = trained(tmp_path / "ckpt")

    def change(parts: dict[str, Any]) -> None:
        value: Any = ("list", [])
        for _ in range(40):
            value = ("list", [value, value])
        parts["env"][1][0]["attributes"]["x"] = value

    rewrite(folder, change)
    with pytest.raises(CheckpointError, match="more values than its size allows"):
        go_on(folder)


def _random_change(value: Any, rng: random.Random) -> Any:
    """Return a value in which one part at a random place is another."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.15:
            return {name: item for name, item in value.items() if name != key}
        return value | {key: _random_change(value[key], rng)}
    if isinstance(value, list | tuple) and value and rng.random() < 0.85:
        place = rng.randrange(len(value))
        return type(value)([*value[:place], _random_change(value[place], rng), *value[place + 1 :]])
    return rng.choice(
        [None, -1, 3, "x", b"x", [], {}, (), 10**400, np.zeros(2), ("list", []), ("same", 99), ("pickled", b"x")]
    )


def test_random_changes_are_errors_that_name_the_checkpoint(tmp_path: Path) -> None:
    folder = trained(tmp_path / "ckpt")
    checkpoint = CheckpointFolder(folder).newest()
    assert checkpoint is not None
    honest = pickle.loads(checkpoint.files["state"])
    rng, n_errors = random.Random(0), 0
    for _ in range(80):
        name = rng.choice(list(honest))
        changed = honest | {name: _random_change(honest[name], rng)}

        def change(parts: dict[str, Any], changed: Any = changed) -> None:
            parts.clear()
            parts.update(changed)

        rewrite(folder, change)
        try:
            go_on(folder)
        except CheckpointError as error:
            n_errors += str(error).startswith(f"{folder}/")
        for path in sorted(folder.glob("[0-9]*"))[1:]:
            shutil.rmtree(path)
    assert n_errors > 30


class Pairs(BaseCallback):
    """Holds one list twice, in each of two attributes."""

    def __init__(self) -> None:
        super().__init__()
        one, two = [1.0], [2.0]
        self.ones, self.twos = [one, one], [two, two]

    def _on_step(self) -> bool:
        return True


def test_attributes_of_a_callback_do_not_mix() -> None:
    old, new = Pairs(), Pairs()
    set_callback_state(new, callback_state(old, {}), pickle.loads)
    assert (new.ones, new.twos) == ([[1.0], [1.0]], [[2.0], [2.0]])
    assert new.twos[0] is new.twos[1]
