"""rl_zoo3 knows our algorithms, keeps its own, one of them under another name, and finds the configs of both."""

import inspect
import itertools
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import sb3_contrib
import yaml  # type: ignore[import-untyped]
from rl_zoo3 import hyperparams_opt
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from rl_zoo3.utils import ALGOS
from stable_baselines3 import A2C

import sb3_pg
from sb3_pg.zoo import ALGORITHMS, config_path, register
from sb3_pg.zoo.samplers import SEARCHES

CONFIGS: list[tuple[str, str]] = [
    (algo, entry) for algo in ALGORITHMS for entry in yaml.safe_load(config_path(algo).read_text())
]


def manager(algo: str, env: str, tmp_path: Path, **kwargs: Any) -> ExperimentManager:
    return ExperimentManager(Namespace(), algo, env, str(tmp_path), n_timesteps=-1, eval_freq=-1, **kwargs)


def python(*arguments: str, cwd: Path) -> str:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


def test_registered() -> None:
    for name, algorithm in ALGORITHMS.items():
        assert ALGOS[name] is algorithm
        sampler: Any = HYPERPARAMS_SAMPLER[name]
        assert sampler.__self__ is SEARCHES[name]
        assert HYPERPARAMS_CONVERTER[name] is SEARCHES[name].convert
    assert SEARCHES.keys() == ALGORITHMS.keys()


def test_trpo_is_ours_and_contrib_trpo_is_sb3_contribs() -> None:
    assert (ALGOS["trpo"], ALGOS["contrib_trpo"]) == (sb3_pg.TRPO, sb3_contrib.TRPO)
    assert HYPERPARAMS_SAMPLER["contrib_trpo"] is hyperparams_opt.sample_trpo_params
    assert HYPERPARAMS_CONVERTER["contrib_trpo"] is hyperparams_opt.convert_onpolicy_params


def test_import_adds_ours_and_changes_nothing_but_the_name_of_their_trpo(tmp_path: Path) -> None:
    script = """
import sys
import sb3_contrib, gymnasium.vector
from rl_zoo3 import callbacks, enjoy, exp_manager, hyperparams_opt, train, utils, wrappers
import sb3_pg

def contents(value):
    ours = getattr(value, "__module__", "").split(".")[0] in ("rl_zoo3", "stable_baselines3", "sb3_contrib")
    if isinstance(value, type) and ours:
        return dict(vars(value))
    return dict(value) if isinstance(value, dict) and value is not vars(sys.modules["builtins"]) else None

def snapshot():
    names = [n for n in sys.modules if n.split(".")[0] in ("rl_zoo3", "stable_baselines3", "sb3_contrib", "gymnasium")]
    return {(n, key): (value, contents(value)) for n in names for key, value in list(vars(sys.modules[n]).items())}

def same(a, b):
    return a is b or (type(a) is dict and type(b) is dict and a.keys() == b.keys() and all(a[k] is b[k] for k in a))

before = snapshot()
tables = [dict(utils.ALGOS), dict(hyperparams_opt.HYPERPARAMS_SAMPLER), dict(hyperparams_opt.HYPERPARAMS_CONVERTER)]
import sb3_pg.zoo
after = snapshot()
assert len(before) > 1000 and before.keys() <= after.keys()
assert all(before[place][0] is after[place][0] for place in before), "a name stands for another object"
changed = {key for (module, key), (_, old) in before.items() if not same(old, after[module, key][1])}
assert changed == {"ALGOS", "HYPERPARAMS_SAMPLER", "HYPERPARAMS_CONVERTER", "ExperimentManager"}, changed
old, new = (found["rl_zoo3.exp_manager", "ExperimentManager"][1] for found in (before, after))
assert {name for name in new if new[name] is not old.get(name)} == {"__init__"}  # which finds the configs
for old, new in zip(tables, (utils.ALGOS, hyperparams_opt.HYPERPARAMS_SAMPLER, hyperparams_opt.HYPERPARAMS_CONVERTER)):
    kept = {"contrib_trpo" if name == "trpo" else name: entry for name, entry in old.items()}
    assert set(new) == set(kept) | set(sb3_pg.zoo.ALGORITHMS), new
    assert all(new[name] is entry for name, entry in kept.items())
print("compared", [len(old) for old in tables])
"""
    compared = python("-c", script, cwd=tmp_path)
    assert compared.startswith("compared [12,")


def test_registering_again_changes_nothing() -> None:
    before = dict(ALGOS), dict(HYPERPARAMS_SAMPLER), dict(HYPERPARAMS_CONVERTER), ExperimentManager.__init__
    register()
    assert (dict(ALGOS), dict(HYPERPARAMS_SAMPLER), dict(HYPERPARAMS_CONVERTER), ExperimentManager.__init__) == before


@pytest.mark.parametrize("name", ["reinforce", "trpo", "contrib_trpo"])
@pytest.mark.parametrize(
    "table", [ALGOS, HYPERPARAMS_SAMPLER, HYPERPARAMS_CONVERTER], ids=["class", "sampler", "converter"]
)
def test_foreign_entry_is_refused_and_nothing_is_changed(
    table: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(ALGOS, "npg")
    monkeypatch.setitem(table, name, A2C)
    with pytest.raises(ValueError, match=rf"rl_zoo3 already has .*A2C.* under the name '{name}'"):
        register()
    assert table[name] is A2C
    assert "npg" not in ALGOS


def test_our_config_is_the_default_for_ours_only(tmp_path: Path) -> None:
    assert manager("reinforce", "CartPole-v1", tmp_path).config == str(config_path("reinforce"))
    ppo = Path(inspect.getfile(ExperimentManager)).parent / "hyperparams" / "ppo.yml"
    assert manager("ppo", "CartPole-v1", tmp_path).config == str(ppo)


@pytest.mark.parametrize("algo", ["reinforce", "contrib_trpo"])
def test_given_config_wins(algo: str, tmp_path: Path) -> None:
    assert manager(algo, "CartPole-v1", tmp_path, config="mine.yml").config == "mine.yml"


def test_contrib_trpo_has_rl_zoo3s_hyperparameters(tmp_path: Path) -> None:
    experiment = manager("contrib_trpo", "CartPole-v1", tmp_path)
    assert experiment.config == str(Path(inspect.getfile(ExperimentManager)).parent / "hyperparams" / "trpo.yml")
    experiment.args = Namespace()
    result = experiment.setup_experiment()
    assert result is not None
    model, saved = result
    assert type(model) is sb3_contrib.TRPO
    assert (model.cg_damping, model.n_critic_updates, saved["n_envs"]) == (1e-3, 20, 2)


def test_config_of_foreign_algorithm_is_refused() -> None:
    with pytest.raises(KeyError, match=r"algo must be one of .*got 'ppo'"):
        config_path("ppo")


def test_every_algorithm_has_a_default_config() -> None:
    assert {algo for algo, entry in CONFIGS if entry == "default"} == set(ALGORITHMS)


@pytest.mark.parametrize(("algo", "entry"), CONFIGS)
def test_config_entry_makes_a_model(algo: str, entry: str, tmp_path: Path) -> None:
    if entry.startswith("popgym-"):
        pytest.importorskip("popgym")  # registers its envs
    env = "MountainCarContinuous-v0" if entry == "default" else entry
    experiment = manager(algo, env, tmp_path)
    experiment.args = Namespace(env=env)
    result = experiment.setup_experiment()
    assert result is not None
    model, saved = result
    assert isinstance(model, ALGORITHMS[algo])
    assert model.get_env() is not None
    assert model.n_envs == saved.get("n_envs", 1)
    for name in ("gamma", "n_steps", "n_episodes"):
        if name in saved:
            assert getattr(model, name) == saved[name]


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_tuned_entries_say_what_they_reached_on_which_seeds(algo: str) -> None:
    lines = config_path(algo).read_text().splitlines()
    for entry in {entry for name, entry in CONFIGS if name == algo} - {"default"}:
        place = next(i for i, line in enumerate(lines) if line.startswith(f"{entry}:"))
        before = lines[:place]
        comment = list(itertools.takewhile(lambda line: line.startswith("#"), reversed(before)))
        assert re.search(r"seeds? \d|As TRPO|As NPG", " ".join(comment)), f"{algo}.yml, {entry}"


def test_users_own_script(tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text("from rl_zoo3.train import train\nimport sb3_pg.zoo\ntrain()\n")
    options = ["--algo", "reinforce", "--env", "CartPole-v1", "-n", "500", "--eval-freq", "-1", "--num-threads", "1"]
    output = python(str(script), *options, cwd=tmp_path)
    assert f"Loading hyperparameters from: {config_path('reinforce')}" in output
    assert (tmp_path / "logs/reinforce/CartPole-v1_1/CartPole-v1.zip").is_file()
