"""rl_zoo3's scripts do for our algorithms what they do for its own."""

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import optuna
import pytest
import torch
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.envs.registration import EnvSpec, registry
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_pg import TRPO, Demonstrations, Reinforce
from sb3_pg.extras import MissingExtraError
from sb3_pg.zoo import ALGORITHMS, scripts

EVERY_ALGORITHM = [*ALGORITHMS, "contrib_trpo"]
SHORT = ["--algo", "reinforce", "--env", "CartPole-v1", "--verbose", "0", "--num-threads", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `train` has run once, with most of its options that need no optional dependency."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        options = "-n 1500 --eval-freq 500 --eval-episodes 3 --n-eval-envs 2 --save-freq 700 --seed 3 -P"
        scripts.train(
            [
                *SHORT,
                *options.split(),
                "-params",
                "n_envs:2",
                "n_steps:None",
                "n_episodes:4",
                "gamma:0.98",
                "normalize:True",
            ]
        )
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the working directory."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_train(trained: Path) -> None:
    run = trained / "logs/reinforce/CartPole-v1_1"
    model = Reinforce.load(run / "CartPole-v1.zip", device="cpu")
    assert model.num_timesteps >= 1500
    assert (model.n_envs, model.n_episodes, model.gamma, model.seed) == (2, 4, 0.98, 3)
    with np.load(run / "evaluations.npz") as log:
        assert log["results"].shape == (len(log["timesteps"]), 3)
        assert len(log["timesteps"]) >= 3
    assert (run / "CartPole-v1/vecnormalize.pkl").is_file()
    assert (run / "best_model.zip").is_file()
    assert list(run.glob("rl_model_*_steps.zip"))


def test_enjoy_reads_the_folder_that_train_writes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert here.is_dir()
    scripts.enjoy(["--algo", "reinforce", "--env", "CartPole-v1", "--no-render", "-n", "600", "--device", "cpu"])
    output = capsys.readouterr().out
    assert "Loading logs/reinforce/CartPole-v1_1/CartPole-v1.zip" in output
    assert "Mean reward: " in output


def test_enjoy_in_another_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "logs").rename(here / "elsewhere")
    options = "--algo reinforce --env CartPole-v1 --no-render -n 10 --load-best -f elsewhere"
    scripts.enjoy(options.split())
    assert "Loading elsewhere/reinforce/CartPole-v1_1/best_model.zip" in capsys.readouterr().out


def record_demos(arguments: list[str]) -> None:
    scripts.record([*arguments, "-o", "demos"])


RECORD = ["--algo", "reinforce", "--env", "CartPole-v1", "--device", "cpu"]


@pytest.mark.parametrize("actions", ["--deterministic", "--stochastic"])
def test_record(actions: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scripts.record([*RECORD, actions, "--n-episodes", "5", "--n-envs", "2", "--seed", "4", "-o", "demos"])
    output = capsys.readouterr().out
    run = Path("logs/reinforce/CartPole-v1_1")
    assert f"Loading {run}/CartPole-v1.zip" in output
    demos = Demonstrations.load(here / "demos.npz")
    assert output.endswith(f"{demos.summary()}\nWritten to demos.npz\n")
    env = make_vec_env("CartPole-v1", 2)
    model = Reinforce.load(run / "CartPole-v1.zip", device="cpu")
    by_hand = Demonstrations.from_model(
        model,
        VecNormalize.load(str(run / "CartPole-v1/vecnormalize.pkl"), env),
        5,
        deterministic=actions == "--deterministic",
        seed=4,
    )
    for name in ("observations", "actions", "rewards", "terminated", "truncated", "final_observations"):
        np.testing.assert_array_equal(getattr(demos, name), getattr(by_hand, name))


def test_record_the_best_of_another_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "logs").rename(here / "elsewhere")
    scripts.record([*RECORD, "--load-best", "-f", "elsewhere", "--n-episodes", "3", "-o", "new/demos.npz"])
    assert "Loading elsewhere/reinforce/CartPole-v1_1/best_model.zip" in capsys.readouterr().out
    assert Demonstrations.load("new/demos.npz").n_episodes == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: -o/--output"),
        ("-o logs", "argument -o/--output: must be a file, got the folder 'logs'"),
        ("-o demos --n-episodes 0", "argument --n-episodes: must be at least 1, got 0"),
        ("-o demos --n-envs 0", "argument --n-envs: must be at least 1, got 0"),
        ("-o demos --n-episodes many", "argument --n-episodes: invalid int value: 'many'"),
        ("-o demos -n 100", "unrecognized arguments: -n 100"),
        ("-o demos --no-render", "unrecognized arguments: --no-render"),
        ("-o logs/reinforce/CartPole-v1_1/best_model.zip/demos", "argument -o/--output: nothing can be written to"),
    ],
)
def test_record_of_what_is_impossible(
    arguments: str, message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        scripts.record([*RECORD, *arguments.split()])
    error = capsys.readouterr().err
    assert "sb3-pg record: error: " in error
    assert message in error
    assert not list(here.rglob("demos*"))


def test_record_video(here: Path) -> None:
    scripts.record_video(["--algo", "reinforce", "--env", "CartPole-v1", "-n", "20", "-o", "videos"])
    (video,) = (here / "videos").glob("*.mp4")
    assert video.stat().st_size > 1000


def test_resume(here: Path) -> None:
    first = here / "logs/reinforce/CartPole-v1_1/CartPole-v1.zip"
    params = ["-params", "n_envs:2", "n_steps:None", "n_episodes:4", "learning_rate:1e-4", "normalize:True"]
    scripts.train([*SHORT, "-n", "600", "--eval-freq", "-1", "-i", str(first), *params])
    before, after = (
        Reinforce.load(path, device="cpu") for path in (first, here / "logs/reinforce/CartPole-v1_2/CartPole-v1.zip")
    )
    assert after.lr_schedule(1.0) == 1e-4
    assert after.n_episodes == 4
    old, new = before.policy.state_dict(), after.policy.state_dict()
    assert any((old[name] != new[name]).any() for name in old)  # it went on learning ...
    # ... from where it was, by small steps of the actor
    assert all((old[name] - new[name]).abs().max() < 0.1 for name in before.learner.parameters.actor)


@pytest.mark.parametrize("algo", EVERY_ALGORITHM)
def test_every_algorithm_is_trained_watched_and_continued_with_its_own_configuration(
    algo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    call = [*SHORT, "--algo", algo, "-n", "1000", "--eval-freq", "-1"]
    scripts.train(call)
    first, second = (Path(f"logs/{algo}/CartPole-v1_{i}/CartPole-v1.zip") for i in (1, 2))
    capsys.readouterr()
    scripts.enjoy(["--algo", algo, "--env", "CartPole-v1", "--no-render", "-n", "20", "--device", "cpu"])
    assert f"Loading {first}" in capsys.readouterr().out
    scripts.train([*call, "-i", str(first)])
    loaded: list[Any] = [ALGOS[algo].load(path, device="cpu") for path in (first, second)]
    before, after = loaded
    assert min(after.num_timesteps, before.num_timesteps) >= 1000
    old, new = (getattr(model.policy, "optimizer", None) or model.policy.actor.optimizer for model in (before, after))
    assert type(old) is type(new)


def test_resumed_trpo_goes_on_from_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call = [*SHORT, "--algo", "trpo", "-n", "512", "--eval-freq", "-1", "-params", "n_envs:2", "n_steps:256"]
    scripts.train([*call, "target_kl:0.03"])
    first, second = (Path(f"logs/trpo/CartPole-v1_{i}/CartPole-v1.zip") for i in (1, 2))
    scripts.train([*call, "target_kl:0.001", "-i", str(first)])
    loaded: list[Any] = [TRPO.load(path, device="cpu") for path in (first, second)]
    before, after = loaded
    assert (before.target_kl, after.target_kl) == (0.03, 0.001)
    observations = np.random.default_rng(0).uniform(-0.1, 0.1, (64, 4)).astype(np.float32)
    old, new = (model.policy.get_distribution(torch.as_tensor(observations)).distribution for model in (before, after))
    assert 0 < torch.distributions.kl_divergence(old, new).mean() < 0.01


def test_foreign_algorithms_keep_their_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    scripts.train(
        [
            "--algo",
            "a2c",
            "--env",
            "CartPole-v1",
            "-n",
            "40",
            "--eval-freq",
            "-1",
            "--verbose",
            "0",
            "--num-threads",
            "1",
        ]
    )
    assert "rl_zoo3/hyperparams/a2c.yml" in capsys.readouterr().out
    ALGOS["a2c"].load(tmp_path / "logs/a2c/CartPole-v1_1/CartPole-v1.zip")


@pytest.mark.slow
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_optimize_then_train_a_trial(
    algo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    short = [*SHORT, "--algo", algo]
    study_options = ["--storage", "sqlite:///study.db", "--study-name", "study"]
    search = "-n 300 -optimize --n-trials 3 --n-evaluations 1 --eval-episodes 2 --no-optim-plots --seed 0"
    scripts.train([*short, *search.split(), *study_options])
    study = optuna.load_study(study_name="study", storage="sqlite:///study.db")
    assert [trial.state.is_finished() for trial in study.trials] == [True] * 3
    (report,) = tmp_path.glob(f"logs/{algo}/report_*.csv")
    assert len(report.read_text().splitlines()) == 4

    capsys.readouterr()
    scripts.train([*short, "-n", "300", "--eval-freq", "-1", "--trial-id", "2", *study_options])
    run = max(tmp_path.glob(f"logs/{algo}/CartPole-v1_*"), key=lambda path: int(path.name.rpartition("_")[2]))
    model: Any = ALGORITHMS[algo].load(run / "CartPole-v1.zip", device="cpu")
    trial = study.trials[2]
    assert model.lr_schedule(1.0) == pytest.approx(trial.params["learning_rate"])
    reported = dict(trial.user_attrs)
    assert "gamma" in reported
    if "train_freq" in reported:  # SB3 makes a pair of it, with an enumeration
        given = reported.pop("train_freq")
        expected = given if isinstance(given, list) else [given, "step"]
        assert [model.train_freq.frequency, model.train_freq.unit.value] == expected
    else:
        assert "n_steps" in reported
    assert {name: getattr(model, name) for name in reported} == reported
    as_they_are = ("cg_damping", "dual_learning_rate", "ent_coef", "n_epochs", "target_kl")
    searched = {name: trial.params[name] for name in as_they_are if name in trial.params}
    assert {name: getattr(model, name) for name in searched} == searched


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--algo reinforc", "argument --algo: invalid choice: 'reinforc'"),
        (
            "--algo reinforce --env CartPol-v1",
            "is registered as 'CartPol-v1'; did you mean 'CartPole-v1'?",
        ),
        ("--algo reinforce --progres-bar", "unrecognized arguments: --progres-bar"),
        ("--algo reinforce -params n_episods:8", "Reinforce has no argument 'n_episods'; did you mean 'n_episodes'?"),
        ("--algo reinforce -params n_envs:3 n_steps:None n_episodes:8", "n_episodes"),
        ("--algo reinforce -params baseline:mean", "name 'mean' is not defined: write KEY:VALUE with VALUE in Python"),
        ("--algo reinforce -params gamma=0.9", "write KEY:VALUE with VALUE in Python"),
        ("--algo reinforce -params gamma:2", "gamma must be a number in [0, 1], got 2"),
        ("--algo reinforce --env-kwargs nonsense:1", "got an unexpected keyword argument 'nonsense'"),
        ("--algo reinforce --eval-env-kwargs nonsense:1", "got an unexpected keyword argument 'nonsense'"),
        ("--algo reinforce -i nowhere.zip", "must be the path of a .zip file, got 'nowhere.zip'"),
        ("--algo trpo -params cg_damp:0.1", "TRPO has no argument 'cg_damp'; did you mean 'cg_damping'?"),
        ("--algo trpo -params cg_damping:-1", "cg_damping must be a finite number of at least 0, got -1"),
        ("--algo npg -params step:'klx'", "step must be one of ['kl', 'fixed'], got 'klx'"),
        ("--algo kl_penalty_pg -params n_epoch:3", "KLPenaltyPG has no argument 'n_epoch'; did you mean 'n_epochs'?"),
        ("--algo contrib_trpo -params cg_damp:0.1", "unexpected keyword argument 'cg_damp'"),
        ("--algo contrib-trpo", "'contrib_trpo'"),
    ],
)
def test_wrong_call_says_so_and_exits_with_two(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as raised:
        scripts.train(arguments.split())
    assert raised.value.code == 2
    error = capsys.readouterr().err
    assert "sb3-pg train: error: " in error
    assert message in error
    assert not list(tmp_path.rglob("CartPole-v1_*"))  # `enjoy` would take an empty folder for the latest run


def test_enjoy_without_a_model_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as raised:
        scripts.enjoy(["--algo", "reinforce", "--env", "CartPole-v1", "--no-render"])
    assert raised.value.code == 2
    assert "sb3-pg enjoy: error: The logs/reinforce folder was not found" in capsys.readouterr().err


def test_other_errors_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def learn(*_args: object, **_kwargs: object) -> None:
        raise ValueError("in the middle of training")

    monkeypatch.setattr(Reinforce, "learn", learn)
    with pytest.raises(ValueError, match="in the middle of training"):
        scripts.train([*SHORT, "-n", "100", "--eval-freq", "-1"])


def test_a_missing_extra_leaves_no_empty_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stable_baselines3.common.utils.SummaryWriter", None)
    with pytest.raises(MissingExtraError, match="tensorboard"):
        scripts.train([*SHORT, "-n", "100", "--eval-freq", "-1", "-tb", "board"])
    assert not list(tmp_path.rglob("CartPole-v1_*"))


@pytest.mark.parametrize("method", ["learn", "train"])
def test_a_run_that_breaks_later_keeps_its_folder(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def breaks(*_: object, **__: object) -> None:
        raise ImportError("in the middle of training")

    monkeypatch.setattr(Reinforce, method, breaks)
    with pytest.raises(ImportError, match="in the middle"):
        scripts.train([*SHORT, "-n", "5000", "--eval-freq", "-1"])
    assert (tmp_path / "logs/reinforce/CartPole-v1_1/CartPole-v1/args.yml").is_file()


def test_nothing_is_written_before_the_hyperparameters_have_made_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[tuple[int, bool]] = []
    setup = Reinforce._setup_model

    def noted(self: Reinforce) -> None:
        setup(self)
        seen.append((self.n_envs, Path("logs").exists()))

    monkeypatch.setattr(Reinforce, "_setup_model", noted)
    scripts.train([*SHORT, "-n", "100", "--eval-freq", "-1"])
    assert seen == [(8, False), (8, True)]


class Drawing(CartPoleEnv):
    """Draws a number from PyTorch's own generator when it is made."""

    drawn: ClassVar[list[float]] = []

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(render_mode=render_mode)
        self.drawn.append(float(torch.rand(1)))


def test_trying_hyperparameters_out_draws_no_random_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    entry_point: Any = Drawing
    monkeypatch.setitem(registry, "Drawing-v0", EnvSpec("Drawing-v0", entry_point, max_episode_steps=50))
    (tmp_path / "mine.yml").write_text(
        "Drawing-v0:\n  n_envs: 1\n  n_timesteps: 60\n  policy: MlpPolicy\n  n_episodes: 2\n"
    )
    options = "--env Drawing-v0 -n 60 --eval-freq -1 -conf mine.yml --seed 7"
    scripts.train([*SHORT, *options.split()])
    tried, trained = Drawing.drawn
    assert tried == trained


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--env-kwargs x", "write KEY:VALUE with VALUE in Python"),
        ("--env-kwargs nonsense:1", "got an unexpected keyword argument 'nonsense'"),
        ("--gym-packages nowhere", "No module named 'nowhere'"),
        ("--algo reinforc", "invalid choice: 'reinforc'"),
        ("--exp-id 7", "CartPole-v1_7"),
        ("--load-checkpoint 7", "rl_model_7_steps"),
    ],
)
@pytest.mark.parametrize("script", [scripts.enjoy, record_demos, scripts.record_video])
@pytest.mark.usefixtures("here")
def test_what_enjoy_and_its_like_cannot_find_is_said(
    script: Any, arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        script(["--algo", "reinforce", "--env", "CartPole-v1", *arguments.split()])
    error = capsys.readouterr().err
    assert "error: " in error
    assert message in error


@pytest.mark.parametrize(
    "saved", [{"conf_file": "evil.py"}, {"hyperparams": {"policy_kwargs": "open('touched', 'w')"}}]
)
def test_resume_runs_nothing_that_the_folder_names(
    saved: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('touched', 'w')")
    run = tmp_path / "CartPole-v1_1"
    (run / "CartPole-v1").mkdir(parents=True)
    (run / "CartPole-v1/args.yml").write_text(json.dumps(saved))
    monkeypatch.setattr(scripts, "unfinished_run", lambda *_: run)
    with pytest.raises(SystemExit):
        scripts.train(["--algo", "reinforce", "--env", "CartPole-v1", "--resume"])
    assert f"was started with {next(iter(saved))}=" in capsys.readouterr().err
    assert not (tmp_path / "touched").exists()
