"""The commands of rl_zoo3's own tests (tests/test_train.py and the others of its repository), with our algorithms."""

import shlex
from itertools import product
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from rl_zoo3.utils import get_latest_run_id

from sb3_pg import KLPenaltyPG, OffPolicyPG
from sb3_pg.cli import main
from sb3_pg.zoo import ALGORITHMS
from tests.helpers import the_others_slow

N_STEPS = 100
CARTPOLE = [(algo, "CartPole-v1") for algo in ALGORITHMS]
#: Normalization and stacked frames; Box actions.
OTHERS = [(algo, env) for algo in ("actor_critic", "trpo") for env in ("BipedalWalkerHardcore-v3", "Pendulum-v1")]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sb3_pg(command: str) -> int:
    """The exit code of ``sb3-pg <command>``."""
    try:
        return main(shlex.split(f"{command} --num-threads 1" if command.startswith("train") else command))
    except SystemExit as error:
        return int(error.code or 0)


@pytest.mark.parametrize(("algo", "env"), [*CARTPOLE, *OTHERS, ("off_pac", "Pendulum-v1")])
def test_train(algo: str, env: str) -> None:
    stacked = "frame_stack:2" if env.startswith("Bipedal") else ""
    assert sb3_pg(f"train -n {N_STEPS} --algo {algo} --env {env} -f logs -params n_envs:2 {stacked}") == 0
    assert Path(f"logs/{algo}/{env}_1/{env}.zip").is_file()


@pytest.mark.parametrize("algo", ["off_policy_pg", "off_pac"])
def test_save_and_load_the_replay_buffer(algo: str) -> None:
    command = (
        f"train -n {N_STEPS} --algo {algo} --env Pendulum-v1 -f logs --save-replay-buffer "
        "-params buffer_size:2000 n_envs:1 normalize:False --env-kwargs g:8.0 --eval-env-kwargs g:5.0 "
    )
    if algo == "off_policy_pg":
        command = command.replace(f"-n {N_STEPS}", "-n 200").replace("-params", "-params train_freq:'[1, \"episode\"]'")
    assert sb3_pg(command) == 0
    assert Path(f"logs/{algo}/Pendulum-v1_1/replay_buffer.pkl").is_file()
    assert sb3_pg(f"{command} -i logs/{algo}/Pendulum-v1_1/Pendulum-v1.zip") == 0
    assert Path(f"logs/{algo}/Pendulum-v1_2/replay_buffer.pkl").is_file()


@pytest.mark.parametrize("algo", ["reinforce", "off_pac"])
def test_monitor_arguments_and_a_callback(algo: str) -> None:
    command = (
        f"train -n 400 --algo {algo} --env Pendulum-v1 -f logs "
        "-params monitor_kwargs:'dict(info_keywords=(\"TimeLimit.truncated\",))' "
        "callback:\"'stable_baselines3.common.callbacks.ProgressBarCallback'\""
    )
    assert sb3_pg(command) == 0
    (monitor, *_) = Path(f"logs/{algo}/Pendulum-v1_1").glob("*.monitor.csv")
    assert monitor.read_text().splitlines()[1] == "r,l,t,TimeLimit.truncated"


def test_custom_yaml_and_policy() -> None:
    from rl_zoo3 import train as script  # noqa: PLC0415

    config = Path(script.__file__).parent / "hyperparams/a2c.yml"
    assert config.is_file()
    command = (
        f"train -n {N_STEPS} --algo kl_penalty_pg --env CartPole-v1 -f logs -conf {config} "
        "-params n_envs:2 n_steps:50 n_epochs:2 batch_size:4 policy:\"'stable_baselines3.ppo.MlpPolicy'\""
    )
    assert sb3_pg(command) == 0
    model = KLPenaltyPG.load("logs/kl_penalty_pg/CartPole-v1_1/CartPole-v1.zip", device="cpu")
    assert (model.n_steps, model.n_epochs, model.batch_size) == (50, 2, 4)


@pytest.mark.parametrize("config", ["my_config", "my_config.py"])
def test_python_config_file(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_config.py").write_text(
        'hyperparams = {"MountainCarContinuous-v0": dict(n_envs=2, n_timesteps=200, policy="MlpPolicy", n_steps=25, '
        "policy_kwargs=dict(net_arch=[8]), normalize=dict(norm_obs=True, norm_reward=False))}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    command = f"train -n {N_STEPS} --algo actor_critic --env MountainCarContinuous-v0 -f logs -conf {config}"
    assert sb3_pg(command) == 0


def test_default_hyperparameters(tmp_path: Path) -> None:
    block = "  policy: 'MlpPolicy'\n  n_timesteps: 200\n  n_steps: 32\n"
    for name in ("default", "CartPole-v1"):
        (tmp_path / f"{name}.yml").write_text(f"{name}:\n{block}")
    assert sb3_pg(f"train -n {N_STEPS} --algo actor_critic --env CartPole-v1 -f logs -conf default.yml") == 0
    assert sb3_pg(f"train -n {N_STEPS} --algo actor_critic --env Pendulum-v1 -f logs -conf CartPole-v1.yml") == 2


def test_gym_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "my_envs"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from gymnasium.envs.registration import register\n"
        "register('MyEnv-v0', entry_point='gymnasium.envs.classic_control:CartPoleEnv', max_episode_steps=50)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert sb3_pg(f"train -n {N_STEPS} --algo trpo --env MyEnv-v0 -f logs --gym-packages my_envs") == 0


def test_callbacks_that_stop() -> None:
    callbacks = (
        '[{"stable_baselines3.common.callbacks.StopTrainingOnMaxEpisodes": dict(max_episodes=3)}, '
        '"stable_baselines3.common.callbacks.ProgressBarCallback"]'
    )
    command = f"train -n 5000 --algo reinforce --env CartPole-v1 -f logs --eval-freq -1 -params callback:'{callbacks}'"
    assert sb3_pg(command) == 0
    model = ALGORITHMS["reinforce"].load("logs/reinforce/CartPole-v1_1/CartPole-v1.zip", device="cpu")
    assert model.num_timesteps < 2000


OPTIMIZE = "--no-optim-plots --seed 14 --n-trials 2 --n-jobs 1 --n-evaluations 2 --n-startup-trials 1 -optimize"


@pytest.mark.parametrize(
    ("sampler", "pruner", "algo"),
    the_others_slow(
        product(["random", "tpe"], ["none", "halving", "median"], ["actor_critic", "trpo"]),
        quick=[("random", "none", "trpo"), ("tpe", "halving", "actor_critic"), ("tpe", "median", "trpo")],
    ),
)
def test_optimize(sampler: str, pruner: str, algo: str) -> None:
    command = (
        f"train -n {N_STEPS} --algo {algo} --env CartPole-v1 -f logs -params policy_kwargs:'dict(net_arch=[32])' "
        f"--sampler {sampler} --pruner {pruner} {OPTIMIZE}"
    )
    assert sb3_pg(command) == 0
    assert list(Path(f"logs/{algo}").glob("report_*.pkl"))


def test_optimize_with_logs_and_train_what_was_found() -> None:
    study = "--study-name demo --storage demo.log"
    network = "-params policy_kwargs:'dict(net_arch=[32])'"
    command = f"train -n {N_STEPS} --algo actor_critic --env CartPole-v1 -f logs {network} {study}"
    assert sb3_pg(f"{command} --sampler random --pruner median --optimization-log-path optim {OPTIMIZE}") == 0
    assert Path("optim/trial_1/evaluations.npz").is_file()
    assert sb3_pg(f"{command} --trial-id 1") == 0


def test_several_workers_share_a_study() -> None:
    command = (
        "train -n 100 --algo actor_critic --env CartPole-v1 -f logs -params n_envs:1 --n-evaluations 1 --seed 12 "
        "--n-trials 2 --max-total-trials 3 --storage sqlite:///optuna.db --study-name study --no-optim-plots -optimize"
    )
    assert [sb3_pg(command) for _ in range(3)] == [0, 0, 0]
    study: Any = optuna.load_study(study_name="study", storage="sqlite:///optuna.db")
    assert len(study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))) == 3


def test_enjoy_the_best_and_the_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yml").write_text(
        "Pendulum-v1:\n  n_envs: 8\n  n_timesteps: !!float 1e6\n  policy: 'MlpPolicy'\n  env_kwargs:\n    g: 0.0\n"
    )
    command = "train -c config.yml --algo actor_critic --env Pendulum-v1 -n 1000 -f logs -params n_envs:1"
    assert sb3_pg(f"{command} --eval-freq 500 --save-freq 500 -P") == 0
    assert get_latest_run_id("logs/actor_critic", "Pendulum-v1") == 1
    base = f"enjoy --algo actor_critic --env Pendulum-v1 -n {N_STEPS} -f logs --no-render "
    for option, model in (
        ("--load-best -P", "best_model.zip"),
        ("--load-checkpoint 500", "rl_model_500_steps.zip"),
        ("--load-last-checkpoint", "rl_model_1000_steps.zip"),
    ):
        capsys.readouterr()
        assert sb3_pg(base + option) == 0
        assert f"Pendulum-v1_1/{model}" in capsys.readouterr().out


def test_the_buffer_that_was_saved_is_the_one_that_is_loaded() -> None:
    options = (
        "--eval-freq -1 --save-replay-buffer -params n_envs:1 train_freq:'[1, \"episode\"]' buffer_trajectories:64"
    )
    command = f"train -n 300 --algo off_policy_pg --env CartPole-v1 -f logs {options}"
    assert sb3_pg(command) == 0
    model = OffPolicyPG.load("logs/off_policy_pg/CartPole-v1_1/CartPole-v1.zip", device="cpu")
    model.load_replay_buffer("logs/off_policy_pg/CartPole-v1_1/replay_buffer.pkl")
    assert model.replay_buffer is not None
    assert sum(trajectory.length for trajectory in model.replay_buffer.trajectories) >= 300
