"""``sb3-pg train --pretrain demos.npz --anchor kl:0.1``."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
import yaml  # type: ignore[import-untyped]
from rl_zoo3.exp_manager import ExperimentManager

from sb3_pg import DemonstrationLoss, Demonstrations, KLAnchor
from sb3_pg.algorithms import ALGORITHMS
from sb3_pg.zoo import scripts
from sb3_pg.zoo.safe_files import SettingsLoader
from tests.demonstrations.demos import cart_poles
from tests.helpers import parameters, the_others_slow

SHORT = "--env CartPole-v1 --num-threads 1 --device cpu --eval-freq -1 --verbose 0 --seed 0"
FEW = {
    "off_policy_pg": "train_freq:(2,'episode')",
    "off_pac": "learning_starts:20",
    "reinforce": "n_steps:None n_episodes:2",
}


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    demos: Any = cart_poles()
    rewards = np.linspace(0, 1, demos.n_steps)
    Demonstrations(demos.observations, demos.actions, rewards, demos.terminated).save("right.npz")
    Demonstrations(demos.observations[:, :3], demos.actions).save("narrow.npz")
    Demonstrations(demos.observations, demos.actions * 2).save("beyond.npz")
    Path("damaged.npz").write_bytes(b"PK\3\4 nothing")


@pytest.fixture
def before_learning(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Models as ``learn`` has got them: parameters, observation statistics and anchor."""
    seen: list[Any] = []
    for cls in set(ALGORITHMS.values()):
        learn = cls.learn

        def noting(self: Any, *args: Any, learn: Any = learn, **kwargs: Any) -> Any:
            env = self.get_vec_normalize_env()
            mean = None if env is None else env.obs_rms.mean.copy()
            seen.append((parameters(self), mean, self.anchor if hasattr(self, "anchor") else None, self))
            return learn(self, *args, **kwargs)

        monkeypatch.setattr(cls, "learn", noting)
    return seen


def train(algo: str, options: str, *params: str) -> Path:
    scripts.train([*f"--algo {algo} -n 64 {SHORT} {options}".split(), "-params", "n_envs:2", *params])
    return max(Path("logs", algo).glob("CartPole-v1_*"), key=lambda path: int(path.name.rpartition("_")[2]))


QUICK = ["actor_critic", "off_pac", "trpo"]


@pytest.mark.parametrize("algo", the_others_slow(ALGORITHMS, QUICK))
def test_the_model_learns_from_the_file_first(
    algo: str, before_learning: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(algo, "--pretrain right.npz", *FEW.get(algo, "").split())
    printed = capsys.readouterr().out
    assert "Cloned 64 steps" in printed
    assert "equal actions: " in printed
    ((_, _, _, model),) = before_learning
    assert model.num_timesteps >= 64
    saved = yaml.load((run / "CartPole-v1/args.yml").read_text(), SettingsLoader)
    assert saved["pretrain"] == "right.npz"
    loaded = ALGORITHMS[algo].load(run / "CartPole-v1.zip", device="cpu")
    taken = loaded.predict(Demonstrations.load("right.npz").observations, deterministic=True)[0]
    assert (taken == 1).mean() > 0.9


@pytest.mark.parametrize("options", ["", "--vec-env actors", "-params normalize:True"])
def test_it_is_pretrain_of_a_model_made_in_the_same_way(options: str, before_learning: list[Any]) -> None:
    """Statistics of a VecNormalize are fitted too."""
    backend, _, params = options.partition("-params ")
    train("actor_critic", f"--pretrain right.npz {backend}", *params.split())
    train("actor_critic", backend, *params.split())
    (pretrained, mean, _, _), (fresh, before, _, _) = before_learning
    assert not th.equal(pretrained, fresh)
    if params:
        demos: Any = Demonstrations.load("right.npz")
        assert np.allclose(mean, demos.observations.mean(0), atol=1e-4)
        assert (before == 0).all()


def test_the_seed_of_the_run_decides(before_learning: list[Any]) -> None:
    for _ in range(2):
        train("actor_critic", "--pretrain right.npz")
    assert th.equal(before_learning[0][0], before_learning[1][0])


@pytest.mark.parametrize(
    ("text", "cls", "weight"), [("kl:0.5:0.9", KLAnchor, 0.5), ("demos:0.1", DemonstrationLoss, 0.1)]
)
def test_anchors(text: str, cls: Any, weight: float, before_learning: list[Any]) -> None:
    run = train("actor_critic", f"--pretrain right.npz --anchor {text}")
    ((first, _, _, model),) = before_learning
    anchor = model.anchor
    assert type(anchor) is cls
    assert (anchor.coef, anchor.n_updates > 0) == (weight, True)
    if cls is KLAnchor:  # it holds the policy near the pretrained one
        names = [name for name, _ in model.policy.named_parameters()]
        pretrained = split(model, first)[names.index("action_net.weight")]
        assert th.equal(anchor.reference["action_net.weight"], pretrained)
    loaded: Any = ALGORITHMS["actor_critic"].load(run / "CartPole-v1.zip", device="cpu")
    assert type(loaded.anchor) is cls
    assert yaml.load((run / "CartPole-v1/args.yml").read_text(), SettingsLoader)["anchor"] == text


def split(model: Any, row: th.Tensor) -> list[th.Tensor]:
    """A row of parameters as tensors."""
    tensors = list(model.policy.parameters())
    parts = row.split([tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def test_an_anchor_without_pretraining(before_learning: list[Any]) -> None:
    train("actor_critic", "--anchor kl:0.5")
    assert type(before_learning[0][2]) is KLAnchor


def test_an_agent_that_is_continued(before_learning: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    run = train("actor_critic", "")
    train("actor_critic", f"--pretrain right.npz -i {run / 'CartPole-v1.zip'}")
    assert "Cloned 64 steps" in capsys.readouterr().out
    assert before_learning[1][3].num_timesteps > 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--algo actor_critic --pretrain nowhere.npz",
            "--pretrain: [Errno 2] No such file or directory: 'nowhere.npz'",
        ),
        ("--algo actor_critic --pretrain damaged.npz", "--pretrain: damaged.npz"),
        ("--algo off_pac --pretrain narrow.npz", "--pretrain: observations must have shape (4,) a row"),
        ("--algo trpo --pretrain beyond.npz", "--pretrain: actions must be in [0, 1], got 2 at step 0"),
        ("--algo ppo --pretrain right.npz", "argument --pretrain: ppo has no pretrain, which these have: "),
        ("--algo contrib_trpo --pretrain right.npz", "argument --pretrain: contrib_trpo has no pretrain"),
        ("--algo trpo --pretrain right.npz -optimize", "argument --pretrain: a search (--optimize-hyperparameters)"),
        (
            "--algo trpo --pretrain right.npz -params frame_stack:2",
            "--pretrain: observations must have shape (8,) a row",
        ),
        ("--algo trpo --pretrain right.npz --anchor kl", "argument --anchor: must be kl:COEF, kl:COEF:DECAY, "),
        ("--algo trpo --pretrain right.npz --anchor kl:-1", "argument --anchor: coef must be a finite number"),
        ("--algo trpo --pretrain right.npz --anchor nll:1", "argument --anchor: must be kl:COEF"),
        ("--algo trpo --anchor demos:1", "demos:1 takes the demonstrations of --pretrain, which is not given"),
        ("--algo off_pac --anchor kl:1", "argument --anchor: off_pac has no anchors"),
    ],
)
def test_what_is_wrong_is_said_before_training(
    options: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ExperimentManager, "learn", lambda *_: pytest.fail("it trains"))
    with pytest.raises(SystemExit) as raised:
        scripts.train([*SHORT.split(), *options.split()])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err
    assert not Path("logs").exists() or not list(Path("logs").rglob("CartPole-v1_*"))


def test_a_normalized_env_below_stacked_frames(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train("trpo", "--pretrain right.npz", "normalize:True", "frame_stack:2")
    message = "--pretrain: env must have its VecNormalize around VecFrameStack, got the opposite order: demonstrations"
    assert message in capsys.readouterr().err


def test_numbers_that_overflow(capsys: pytest.CaptureFixture[str]) -> None:
    demos: Any = cart_poles()
    Demonstrations(demos.observations, demos.actions, np.full(64, 1e300), demos.terminated).save("right.npz")
    with pytest.raises(SystemExit) as raised:
        train("actor_critic", "--pretrain right.npz")
    assert raised.value.code == 2
    assert "--pretrain: critic's loss of epoch 1 is" in capsys.readouterr().err
