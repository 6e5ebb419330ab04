"""What somebody meets who installs the package and types the README's commands."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml  # type: ignore[import-untyped]
from gymnasium import spaces
from gymnasium.envs.registration import register, registry
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import KVWriter, Logger

from sb3_pg import NPG, TRPO, ActorCritic, KLPenaltyPG, OffPAC, OffPolicyPG, Reinforce
from sb3_pg.cli import main
from sb3_pg.demo import this_program
from sb3_pg.reporting.curves import env_of, label_of, read_evaluations, read_training
from sb3_pg.reporting.plots import main as plot
from sb3_pg.reporting.scores import read_results
from sb3_pg.zoo import ALGORITHMS, scripts
from tests.helpers import ScriptedEnv, the_others_slow
from tests.reporting.test_curves import write_evaluations, write_monitor

SHORT = ["--num-threads", "1", "--device", "cpu", "--seed", "0"]


class Short(gym.Env[Any, Any]):
    """Episodes of 5 steps that pay the actions; observations are drawn from the env's own generator."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)
    render_mode = None

    def _obs(self) -> Any:
        return self.np_random.uniform(-1, 1, 2).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return self._obs(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return self._obs(), float(action), self.t == 5, False, {}


class LikeAtariEnv(Short):
    """What rl_zoo3 takes for one of Atari's, by its name, and evaluates with random actions."""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    short: Any = Short
    like_atari: Any = LikeAtariEnv
    register("Short-v0", entry_point=short)
    register("Random-v0", entry_point=like_atari)
    yield
    del registry["Short-v0"], registry["Random-v0"]


def train(command: str, *params: str) -> Path:
    """``sb3-pg train`` with ``command``.

    :return: the run's folder
    """
    before = set(Path("logs").glob("*/*"))
    scripts.train([*SHORT, *command.split(), *(["-params", *params] if params else [])])
    (run,) = {path for path in set(Path("logs").glob("*/*")) - before if path.is_dir()}
    return run


def arguments_of(run: Path) -> dict[str, Any]:
    (path,) = run.glob("*/args.yml")
    return dict(yaml.load(path.read_text(), yaml.UnsafeLoader))


def parameters(run: Path) -> list[th.Tensor]:
    (path,) = run.glob("*-v*.zip")
    return list(ALGOS[run.parent.name].load(path, device="cpu").policy.state_dict().values())


# -------------------------------------------------------------------- 13: evaluations


@pytest.mark.parametrize(
    ("n_steps", "option", "expected"),
    [
        (24_000, "", [0, *range(1200, 24_001, 1200)]),
        (2_000, "", [0, 1000, 2000]),
        (2_000, "--eval-freq 400", [0, 400, 800, 1200, 1600, 2000]),
        (800, "", [0]),
    ],
)
def test_untrained_policy_is_evaluated_and_then_about_twenty_times(
    n_steps: int, option: str, expected: list[int]
) -> None:
    params = ("n_envs:4", "n_steps:50", "policy_kwargs:dict(net_arch=[2])", "critic_batch_size:None")
    command = f"--algo reinforce --env Short-v0 -n {n_steps} --eval-episodes 2 --verbose 0 {option}"
    run = train(command, *params, "n_critic_updates:1", "n_episodes:None", "critic_learning_rate:None")
    with np.load(run / "evaluations.npz") as log:
        assert log["timesteps"].tolist() == expected
        assert log["results"].shape == (len(expected), 2)
    assert arguments_of(run)["eval_freq"] == (400 if option else max(1000, n_steps // 20))
    assert arguments_of(run)["n_eval_envs"] == 2


def test_evaluation_can_be_left_out() -> None:
    run = train("--algo reinforce --env Short-v0 -n 100 --eval-freq -1 --verbose 0", "n_envs:1")
    assert not (run / "evaluations.npz").exists()
    assert not (run / "best_model.zip").exists()


@pytest.mark.parametrize(
    ("algo", "env"),
    the_others_slow(
        product(["reinforce", "off_policy_pg", "off_pac", "a2c"], ["Short-v0", "Random-v0"]),
        quick=[("reinforce", "Random-v0"), ("off_policy_pg", "Random-v0"), ("off_pac", "Short-v0")],
    ),
)
def test_evaluation_changes_nothing_in_training(algo: str, env: str) -> None:
    params = ["policy:'MlpPolicy'", "n_envs:1", "policy_kwargs:dict(net_arch=[2])"]
    params += {"a2c": ["n_steps:5", "normalize:True"], "off_pac": ["learning_starts:20", "batch_size:8"]}.get(algo, [])
    command = f"--algo {algo} --env {env} -n 200 --verbose 0"
    if (algo, env) == ("a2c", "Random-v0"):  # rl_zoo3 has a block for all of Atari, which wraps the env
        Path("a2c.yml").write_text("atari:\n  n_timesteps: 200\n")
        command += " -conf a2c.yml"
    without = parameters(train(f"{command} --eval-freq -1", *params))
    for option in ("", "--eval-freq 7 --n-eval-envs 3"):
        run = train(f"{command} {option}", *params)
        with np.load(run / "evaluations.npz") as log:
            assert log["timesteps"][0] == 0
        evaluated = parameters(run)
        assert all(th.equal(old, new) for old, new in zip(without, evaluated, strict=True))


def test_evaluation_prints_its_own_numbers_and_leaves_those_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    run = train("--algo reinforce --env Short-v0 -n 400 --eval-freq 80 --log-interval 1", "n_envs:1", "n_episodes:8")
    tables = [table for table in capsys.readouterr().out.split("\n---") if "total_timesteps" in table]
    evaluations = [table for table in tables if "eval/" in table]
    with np.load(run / "evaluations.npz") as log:
        assert len(evaluations) == len(log["timesteps"]) == 6
    assert not any("train/" in table or "rollout/" in table for table in evaluations)
    training = [table for table in tables if "eval/" not in table]
    assert len(training) == 10
    assert all("joint_kl" in table for table in training[1:])


def few_and_many(few: int, many: int = 12, trained: bool = True) -> None:
    """A run with few evaluations and one with many, of 30 training episodes each."""
    for name, n in (("few", few), ("many", many)):
        folder = Path("logs", name, "CartPole-v1_1")
        if n:
            write_evaluations(folder, [10 * i for i in range(n)], [[float(i)] for i in range(n)])
        if trained or name == "many":
            write_monitor(folder, 0, [(float(i), 10, float(i)) for i in range(30)])


@pytest.mark.parametrize(
    ("few", "trained", "arguments", "source"),
    [
        (9, True, "", "Training"),
        (10, True, "", "Evaluation"),
        (0, True, "", "Training"),
        (9, True, "--source evaluation", "Evaluation"),
        (10, True, "--source training", "Training"),
        (9, False, "", "Evaluation"),
        (9, True, "--label many", "Evaluation"),
    ],
)
def test_plot_falls_back_on_training_episodes(
    few: int,
    trained: bool,
    arguments: str,
    source: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    few_and_many(few, trained=trained)
    labels: list[str] = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, *_: labels.append(figure.axes[0].get_ylabel())
    )
    assert plot(arguments.split()) == 0
    assert labels == [f"{source} return [reward per episode]"]
    said = f"few on CartPole-v1 has {few} evaluations, fewer than 10: training episodes are drawn"
    assert (said in capsys.readouterr().err) is (source == "Training" and not arguments)


def test_a_run_that_was_evaluated_untrained_only_has_no_score(capsys: pytest.CaptureFixture[str]) -> None:
    write_evaluations(Path("logs/npg/CartPole-v1_1"), [0], [[1.0]])
    write_evaluations(Path("logs/npg/CartPole-v1_2"), [0, 10], [[1.0], [3.0]])
    (result,) = read_results(Path("logs"))
    assert (result.steps, result.final) == (10, 3.0)
    assert "CartPole-v1_1 was evaluated only before the first step" in capsys.readouterr().err


# -------------------------------------------------------------------- 14: what is printed


class Kept(KVWriter):
    """Keeps what is logged: env step -> values, and which of them are not printed."""

    def __init__(self) -> None:
        self.written: dict[int, dict[str, Any]] = {}
        self.unprinted: set[str] = set()

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.written[step] = dict(key_values)
        self.unprinted |= {key for key, excluded in key_excluded.items() if "stdout" in excluded}

    def close(self) -> None:
        pass


def logged(model: Any, n_steps: int, **kwargs: Any) -> dict[int, dict[str, Any]]:
    kept = Kept()
    model.set_logger(Logger(None, [kept]))
    model.learn(n_steps, **kwargs)
    return kept.written


def printed(model: Any, n_steps: int, capsys: pytest.CaptureFixture[str]) -> int:
    """Lines that a default ``learn`` prints."""
    capsys.readouterr()
    model.learn(n_steps)
    return len(capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    ("algorithm", "n_envs"),
    the_others_slow(product([Reinforce, OffPolicyPG], [1, 4]), quick=[(Reinforce, 4), (OffPolicyPG, 1)]),
)
def test_a_default_learn_prints_about_as_much_as_a2c(
    algorithm: Any, n_envs: int, capsys: pytest.CaptureFixture[str]
) -> None:
    envs = [make_vec_env("CartPole-v1", n_envs, seed=0) for _ in range(2)]
    n_steps = 2500 * n_envs
    theirs = printed(A2C("MlpPolicy", envs[0], verbose=1, seed=0, device="cpu"), n_steps, capsys)
    ours = printed(algorithm("MlpPolicy", envs[1], verbose=1, seed=0, device="cpu"), n_steps, capsys)
    assert 0.4 * theirs < ours < 1.3 * theirs


@pytest.mark.parametrize("algo", the_others_slow(ALGORITHMS, quick=["reinforce", "trpo", "off_pac"]))
def test_a_default_run_prints_about_as_many_tables_as_a2c(algo: str, capsys: pytest.CaptureFixture[str]) -> None:
    n_steps = 2000 if algo == "off_pac" else 12_000
    train(f"--algo {algo} --env CartPole-v1 -n {n_steps} --eval-freq -1", "n_envs:4")
    n_tables = capsys.readouterr().out.count("total_timesteps")
    assert 3 <= n_tables <= max(5, n_steps // (500 * 4))


@pytest.mark.parametrize(
    ("model", "kwargs"),
    [
        (Reinforce, {}),
        (Reinforce, {"n_steps": 100}),
        (ActorCritic, {"n_steps": 16}),
        (NPG, {"n_steps": 64, "batch_size": 64}),
        (TRPO, {"n_steps": 64, "batch_size": 64}),
        (KLPenaltyPG, {"n_steps": 64, "batch_size": 64}),
        (OffPolicyPG, {"train_freq": (2, "episode"), "gradient_steps": 2}),
        (OffPAC, {"learning_starts": 100, "train_freq": 50}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_every_log_of_auto_is_that_of_a_log_after_every_update(model: Any, kwargs: dict[str, Any]) -> None:
    every, auto = (
        logged(model("MlpPolicy", "CartPole-v1", seed=0, device="cpu", **kwargs), 3000, log_interval=n)
        for n in (1, "auto")
    )
    assert 3 <= len(auto) <= 7
    steps = np.array([0, *auto])
    if model is not OffPAC:  # which logs between two updates when an episode ends
        assert set(auto) <= set(every)
    assert (np.diff(steps) >= (500 if model is OffPAC else 450)).all()
    if model is OffPAC:
        assert all("train/critic_loss" in values for values in auto.values())
        return
    for step, values in auto.items():
        assert set(values) == set(every[step])
        assert "train/joint_kl" in values
        differing = [key for key in values if key[:5] != "time/" and not np.array_equal(values[key], every[step][key])]
        assert differing in ([], ["train/explained_variance"]), differing  # NaN


def test_log_interval_counts_updates_as_ever() -> None:
    model = Reinforce("MlpPolicy", "Short-v0", n_episodes=2, seed=0, device="cpu")
    assert list(logged(model, 100, log_interval=3)) == [30, 60, 90]
    assert list(logged(model, 100, log_interval=None)) == []
    assert list(logged(model, 100)) == [30, 50, 70, 90]  # a fifth of a short run, one update later


def test_auto_goes_on_after_a_learn_before() -> None:
    model = Reinforce("MlpPolicy", "Short-v0", n_episodes=2, seed=0, device="cpu").learn(2000)
    assert list(logged(model, 1000, reset_num_timesteps=False)) == [2210, 2410, 2610, 2810]


def test_dump_logs_of_a_callback_is_written() -> None:
    class Dumps(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 7:
                self.model.dump_logs()
            return True

    model = Reinforce("MlpPolicy", "Short-v0", n_episodes=2, seed=0, device="cpu")
    assert 7 in logged(model, 100, callback=Dumps())


@pytest.mark.parametrize("verbose", [1, 2])
def test_details_are_printed_with_verbose_two(verbose: int) -> None:
    kept = Kept()
    model = TRPO("MlpPolicy", "Short-v0", n_steps=32, batch_size=32, verbose=verbose, device="cpu")
    model.set_logger(Logger(None, [kept]))
    model.learn(96)
    values = kept.written[96]
    details = {"train/surrogate_realized", "train/cg_residual", "train/step_size", "time/update_seconds"}
    shown = {"train/joint_kl", "train/explained_variance", "train/entropy_loss", "train/step_outcome"}
    assert details | shown <= set(values)
    assert kept.unprinted >= details if verbose == 1 else not kept.unprinted & details
    assert not kept.unprinted & shown


class Constant(ScriptedEnv):
    """Episodes of one step that pay 100, more or less.

    :param spread: standard deviation of the reward
    """

    def __init__(self, spread: float) -> None:
        super().__init__(lengths=(1,))
        self.spread = spread

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, _, terminated, truncated, info = super().step(action)
        return obs, 100 + self.spread * (-1) ** self.episode, terminated, truncated, info


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.09, 0.11, 1.0, 50.0])
@pytest.mark.parametrize("algorithm", [Reinforce, ActorCritic, TRPO, OffPolicyPG])
def test_explained_variance_of_returns_without_spread_is_nan(algorithm: Any, spread: float) -> None:
    sizes: dict[Any, dict[str, Any]] = {
        Reinforce: {"n_episodes": 16},
        ActorCritic: {"n_steps": 16},
        TRPO: {"n_steps": 16, "batch_size": 16, "n_critic_updates": 1},
        OffPolicyPG: {"train_freq": (16, "episode"), "gradient_steps": 1, "buffer_trajectories": 16},
    }
    model = algorithm("MlpPolicy", Constant(spread), seed=0, device="cpu", **sizes[algorithm])
    found: list[float] = []

    class Reads(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            if algorithm is not OffPolicyPG:
                buffer = self.locals["rollout_buffer"]
                returns = buffer.returns.astype(np.float64)
                found.append(1 - np.var(returns - buffer.values) / np.var(returns) if spread else np.nan)

    values = logged(model, 48, callback=Reads(), log_interval=1)[32]["train/explained_variance"]
    if spread <= 0.1:
        assert np.isnan(values)
    elif algorithm is OffPolicyPG:
        assert np.isfinite(values)
    else:
        assert values == pytest.approx(found[0], rel=2e-2)


# -------------------------------------------------------------------- 15


def test_help_says_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--vec-env {dummy,subproc,vector,envpool,actors,ray}" in text
    assert "a twentieth of the run" in text
    assert "extra `track`" in text


def test_an_unknown_backend_is_refused_beside_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        scripts.train(["--vec-env", "vectr"])
    assert "invalid choice: 'vectr' (choose from " in (message := capsys.readouterr().err)
    assert "envpool" in message.partition("choose from")[2]


@pytest.mark.filterwarnings("error:Training and eval env")
def test_the_backend_is_saved_with_the_run() -> None:
    run = train("--algo reinforce --env CartPole-v1 --vec-env vector -n 100 --verbose 0", "n_envs:2")
    assert arguments_of(run)["vec_env"] == "vector"


def test_a_run_is_labeled_by_what_it_says_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    command = "--algo npg --env Short-v0 -n 60 --verbose 0 --eval-freq 20"
    run = train(command, "n_envs:1", "n_steps:20", "n_critic_updates:1")
    assert (label_of(run), env_of(run)) == ("npg", "Short-v0")
    shutil.copytree(run, "elsewhere/best of all")
    moved = Path("elsewhere/best of all")
    assert (label_of(moved), env_of(moved)) == ("npg", "Short-v0")
    assert (read_evaluations(moved).label, read_training(moved).label) == ("npg", "npg")
    assert [result.label for source in (run, moved) for result in read_results(source)] == ["npg", "npg"]
    for path in moved.glob("*.monitor.csv"):
        path.unlink()
    assert env_of(moved) == "Short-v0"
    drawn: list[tuple[list[str], list[str]]] = []

    def savefig(figure: Any, *_: Any) -> None:
        legend = [text.get_text() for text in figure.legends[0].get_texts()]
        drawn.append((legend, [panel.get_title() for panel in figure.axes]))

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    assert plot(["elsewhere/best of all"]) == 0
    assert plot(["mine=elsewhere/best of all"]) == 0
    assert plot(["elsewhere/best of all", "--label", "npg"]) == 0
    assert drawn == [(["npg (1 run)"], ["Short-v0"]), (["mine (1 run)"], ["Short-v0"]), (["npg (1 run)"], ["Short-v0"])]


def test_arguments_are_read_and_nothing_in_them_is_executed(tmp_path: Path) -> None:
    folder = tmp_path / "mine/Some-v0_1"
    write_evaluations(folder, [1], [[0.0]])
    (folder / "Some-v0").mkdir()
    (folder / "Some-v0/args.yml").write_text(
        "!!python/object/apply:collections.OrderedDict\n- - - algo\n    - ppo\n"
        "  - - tags\n    - !!python/tuple [a]\n  - - x\n    - !!python/object/apply:os.mkdir [executed]\n"
    )
    assert label_of(folder) == "ppo"
    assert not Path("executed").exists()
    (folder / "Some-v0/args.yml").write_text("a: [")
    with pytest.raises(SystemExit, match="2"):
        plot([str(folder)])


def test_evaluations_that_cannot_be_read_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    few_and_many(0)
    Path("logs/few/CartPole-v1_1/evaluations.npz").write_text("not numbers")
    assert plot(["--source", "evaluation"]) == 0
    assert "evaluations.npz cannot be read as evaluations of EvalCallback" in capsys.readouterr().err


@pytest.mark.slow
def test_demo_ends_with_commands_that_work_as_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "-n", "300"]) == 1  # not solved
    enjoy, compare = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  ") and "sb3" in line)
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(enjoy, check=False, cwd=tmp_path, env=environment, shell=True, capture_output=True, text=True)
    assert (done.returncode, "Mean reward: " in done.stdout) == (0, True), done.stderr
    words = compare.partition(" train ")[2].split()
    scripts.train([*words, "-n", "100", "--eval-freq", "-1", "--num-threads", "1"])
    assert (tmp_path / "logs/demo/trpo/CartPole-v1_1/CartPole-v1.zip").is_file()


@pytest.mark.parametrize(
    ("argv", "found", "expected"),
    [
        ("/usr/bin/sb3-pg", "/usr/bin/sb3-pg", "sb3-pg"),
        (".venv/bin/sb3-pg", None, ".venv/bin/sb3-pg"),
        (".venv/bin/sb3-pg", "/usr/bin/sb3-pg", ".venv/bin/sb3-pg"),
        ("my env/bin/sb3-pg", None, "'my env/bin/sb3-pg'"),
        ("/lib/sb3_pg/__main__.py", None, f"{sys.executable} -m sb3_pg"),
        ("/lib/sb3_pg/__main__.py", str(Path(sys.executable).with_name("python")), "python -m sb3_pg"),
    ],
)
def test_demo_names_the_program_as_it_can_be_typed(
    argv: str, found: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sb3_pg.demo.shutil.which", lambda _: found)
    monkeypatch.setattr("sys.argv", [argv])
    assert this_program() == expected


def test_tracking_without_wandb_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    assert main(["train", *SHORT, "--algo", "reinforce", "--track"]) == 1
    assert 'wandb is not installed: pip install "sb3_pg[track]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    "algo", the_others_slow([*ALGORITHMS, "a2c"], quick=["reinforce", "npg", "off_policy_pg", "off_pac"])
)
def test_a_continued_run_continues_its_count_of_steps(algo: str, capsys: pytest.CaptureFixture[str]) -> None:
    params = ["policy:'MlpPolicy'", "n_envs:1", "learning_rate:'lin_0.01'", "normalize:False"]
    params += {"off_pac": ["learning_starts:20", "batch_size:8"], "off_policy_pg": []}.get(algo, ["n_steps:10"])
    if algo == "off_policy_pg":
        params.append("train_freq:(2,'episode')")
    if algo == "reinforce":
        params.append("n_episodes:None")
    command = f"--algo {algo} --env Short-v0 -n 100 --eval-freq 50 --eval-episodes 1"
    first = train(command, *params)
    capsys.readouterr()
    second = train(f"{command} --log-interval 1 -i {first}/Short-v0.zip", *params)
    output = capsys.readouterr().out
    assert "Continuing at 100 env steps, for 100 more." in output
    assert "Schedules (lin_...) are those of one run of 200 steps: 50% of it is done." in output
    with np.load(second / "evaluations.npz") as log:
        assert log["timesteps"].tolist() == [100, 150, 200]
    model = ALGOS[algo].load(second / "Short-v0.zip", device="cpu")
    assert model.num_timesteps == 200
    rates = [float(line.split("|")[2]) for line in output.splitlines() if line.split()[1:2] == ["learning_rate"]]
    assert rates == sorted(rates, reverse=True)
    assert 0.003 < rates[0] <= 0.005  # half of it is gone
    assert rates[-1] < 0.001
    assert read_training(second).x[-1] == 200
    assert 100 < read_training(second).x[0] < 150
    assert read_training(first).x[-1] == 100
    assert (label_of(first), label_of(second)) == (algo, f"{algo} from step 100")
    assert plot(["logs", "--source", "evaluation"]) == 0  # as two curves: they have no x in common but the last


@pytest.mark.parametrize("algo", ["off_pac", "sac"])
def test_a_buffer_that_was_not_saved_is_filled_before_it_is_used(algo: str, capsys: pytest.CaptureFixture[str]) -> None:
    params: tuple[str, ...] = (
        "policy:'MlpPolicy'",
        "learning_starts:40",
        "batch_size:8",
        "n_envs:1",
        "buffer_size:500",
    )
    params += () if algo == "off_pac" else ("use_sde:False", "gradient_steps:1", "train_freq:1")
    command = f"--algo {algo} --env Pendulum-v1 -n 100 --eval-freq -1"
    first = train(f"{command} --save-replay-buffer", *params)
    zipped = f"{first}/Pendulum-v1.zip"
    capsys.readouterr()
    with_buffer = ALGOS[algo].load(train(f"{command} -i {zipped}", *params) / "Pendulum-v1.zip", device="cpu")
    assert "replay buffer was not saved" not in capsys.readouterr().out
    (first / "replay_buffer.pkl").unlink()
    without: Any = ALGOS[algo].load(train(f"{command} -i {zipped}", *params) / "Pendulum-v1.zip", device="cpu")
    assert "The replay buffer was not saved with the agent: 40 steps fill it" in capsys.readouterr().out
    assert (with_buffer._n_updates, without._n_updates) == (60 + 100, 60 + 60)
    assert without.learning_starts == 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("-conf nowhere.yml", "argument -conf/--conf-file: there is no file 'nowhere.yml'"),
        ("-conf nowhere", "No module named 'nowhere'"),
        ("--gym-packages nowhere", "No module named 'nowhere'"),
        ("--env-kwargs gravty:1.0", "unexpected keyword argument 'gravty'"),
        ("-params env_wrapper:'nowhere.Nothing'", "No module named 'nowhere'"),
        ("-params env_wrapper:'gymnasium.wrappers.Nothing'", "has no attribute 'Nothing'"),
        ("-params callback:'nowhere.Nothing'", "No module named 'nowhere'"),
        ("-params n_envs:0", "n_envs must be an integer of at least 1, got 0"),
        ("--env FrozenLake-v1 -params normalize:True", "VecNormalize only supports"),
        ("--trial-id 3 --study-name x --storage sqlite:///x.db", "name no trial"),
        ("--log-interval 0", "argument --log-interval: must be at least 1, -1 (default) or -2 (no logging), got 0"),
        ("--eval-episodes 0", "argument --eval-episodes: must be at least 1, got 0"),
        ("--n-eval-envs 0", "argument --n-eval-envs: must be at least 1, got 0"),
        ("--eval-freq x", "argument --eval-freq: invalid int value: 'x'"),
    ],
)
def test_wrong_call_says_so_without_traceback(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = arguments.replace("'nowhere.Nothing'", "\"'nowhere.Nothing'\"")
    words = words.replace("'gymnasium.wrappers.Nothing'", "\"'gymnasium.wrappers.Nothing'\"").replace('"', "")
    with pytest.raises(SystemExit, match="2"):
        scripts.train([*SHORT, "--algo", "reinforce", "-n", "50", *words.split()])
    error = capsys.readouterr().err
    assert "sb3-pg train: error: " in error
    assert message in error
    assert not list(Path().glob("logs/*/*"))


@pytest.mark.parametrize("options", ["--algo ppo", "--algo off_pac", "--algo reinforce --env Acrobot-v1"])
def test_what_cannot_be_continued_is_said(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = train("--algo reinforce --env CartPole-v1 -n 50 --verbose 0 --eval-freq -1", "n_envs:1")
    with pytest.raises(SystemExit, match="2"):
        scripts.train([*SHORT, *options.split(), "-n", "50", "-i", f"{run}/CartPole-v1.zip"])
    assert f"{run}/CartPole-v1.zip cannot be continued with {options[:10]}" in capsys.readouterr().err


def test_a_search_leaves_no_empty_run_behind() -> None:
    run = train("--algo npg --env Short-v0 -n 60 --verbose 0 --eval-freq -1", "n_envs:1", "n_steps:20")
    options = "-n 40 -optimize --n-trials 1 --n-evaluations 1 --no-optim-plots"
    scripts.train([*SHORT, "--algo", "npg", "--env", "Short-v0", *options.split()])
    assert [path for path in Path("logs/npg").iterdir() if path.is_dir()] == [run]  # what `enjoy` finds


def test_an_error_in_the_env_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("the env's own")

    monkeypatch.setattr(Short, "reset", broken)
    with pytest.raises(ValueError, match="the env's own"):
        train("--algo reinforce --env Short-v0 -n 50")


@pytest.mark.slow
def test_train_then_plot_of_the_readme_is_a_rising_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_: figures.append(figure))
    scripts.train([*SHORT, "--algo", "reinforce", "--env", "CartPole-v1", "-P", "--seed", "1"])
    assert plot(["logs/reinforce/CartPole-v1_1", "-o", "curve.png"]) == 0
    ((line,),) = ([*panel.get_lines()] for panel in figures[0].axes)
    x, y = np.asarray(line.get_xydata()).T
    assert (len(x), x[0], x[-1]) == (21, 0, 100_000)
    assert y[0] < 200
    assert y[-1] > 475


def test_nothing_but_what_was_changed_before_is_changed_by_import() -> None:
    assert ExperimentManager.create_envs.__module__ == "rl_zoo3.exp_manager"
    assert ExperimentManager.learn.__module__ == "rl_zoo3.exp_manager"
