"""Callbacks: what they measure, and that training does not notice."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import torch as th
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import FlattenExtractor

from sb3_pg import NPG, TRPO, ActorCritic, GradientDiagnosticsCallback, KLPenaltyPG, Reinforce
from sb3_pg.policies import reachable_parameters
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES, OwnForward, ScriptedEnv, parameters, policy_for, vec

Make = Callable[..., Any]
#: Gradient of the policy's term alone, unclipped: what is left in ``grad`` is what the callback is to find.
BARE: dict[str, Any] = {"ent_coef": 0.0, "vf_coef": 0.0, "max_grad_norm": 1e9}
JOINT: dict[str, Any] = {"critic_learning_rate": None, "n_critic_updates": 1}
PPO_ONCE: dict[str, Any] = {"n_steps": 16, "batch_size": 32, "n_epochs": 1, "normalize_advantage": True}
MODELS: dict[str, Make] = {
    "a2c": lambda env, **k: A2C(k.pop("policy", "MlpPolicy"), env, **{"n_steps": 16, **k}),
    "a2c-normalized": lambda env, **k: A2C(
        k.pop("policy", "MlpPolicy"), env, **{"n_steps": 16, "normalize_advantage": True, **k}
    ),
    "ppo": lambda env, **k: PPO(k.pop("policy", "MlpPolicy"), env, **PPO_ONCE | k),
    "actor-critic": lambda env, **k: ActorCritic(k.pop("policy", "MlpPolicy"), env, **{"n_steps": 16, **k}),
    "actor-critic-episodes": lambda env, **k: ActorCritic(
        k.pop("policy", "MlpPolicy"),
        env,
        **{"n_steps": None, "n_episodes": 4, "gae_lambda": 0.9, "n_critic_updates": 2, **k},
    ),
    "segments": lambda env, **k: Reinforce(k.pop("policy", "MlpPolicy"), env, **{"n_steps": 16, **k}),
    "segments-normalized": lambda env, **k: Reinforce(
        k.pop("policy", "MlpPolicy"), env, **{"n_steps": 16, "normalize_advantage": True, **k}
    ),
    "episodes": lambda env, **k: Reinforce(
        k.pop("policy", "MlpPolicy"), env, **{"n_episodes": 4, "baseline": "leave_one_out", **k}
    ),
    "episodes-discounted": lambda env, **k: Reinforce(
        k.pop("policy", "MlpPolicy"), env, **{"n_episodes": 4, "baseline": "time", "state_discount": True, **k}
    ),
    "foreign-buffer": lambda env, **k: Reinforce(
        k.pop("policy", "MlpPolicy"), env, **{"n_steps": 16, "rollout_buffer_class": RolloutBuffer, **k}
    ),
    "kl-penalty": lambda env, **k: KLPenaltyPG(
        k.pop("policy", "MlpPolicy"), env, **{"n_steps": 16, "batch_size": 32, "n_epochs": 1, **JOINT, **k}
    ),
}
#: They leave nothing in ``grad``.
NATURAL: dict[str, Make] = {
    "npg": lambda env, **k: NPG("MlpPolicy", env, **{"n_steps": 16, "batch_size": 32, **k}),
    "trpo": lambda env, **k: TRPO("MlpPolicy", env, **{"n_steps": 16, "batch_size": 32, "fisher_subsample": 2, **k}),
    "trpo-episodes": lambda env, **k: TRPO(
        "MlpPolicy",
        env,
        **{"n_steps": None, "n_episodes": 4, "normalize_advantage": False, "state_discount": True, **k},
    ),
}


class Recorder(BaseCallback):
    """What is in the logger when each rollout ends."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        values = self.logger.name_to_value
        self.logged.append({name: x for name, x in values.items() if name.startswith("diagnostics/")})


class Noisy(FlattenExtractor):
    """An extractor that draws random numbers, as dropout does, and says whether it was in training mode."""

    modes: tuple[bool, ...] = ()

    def forward(self, x: th.Tensor) -> th.Tensor:
        type(self).modes += (self.training,)
        return super().forward(x) + 0.1 * th.rand(1)


@pytest.mark.parametrize("unit", ["episode", "sample"])
@pytest.mark.parametrize("name", [*MODELS, *NATURAL])
def test_training_does_not_notice(name: str, unit: str) -> None:
    def train(callback: BaseCallback | None) -> Any:
        env = make_vec_env("Pendulum-v1", 2, seed=0, env_kwargs={"max_episode_steps": 12})
        model = {**MODELS, **NATURAL}[name](env, seed=0, device="cpu", use_sde=True, sde_sample_freq=5)
        return model.learn(96, callback)

    callback = GradientDiagnosticsCallback(unit=unit)
    measured, plain = train(callback), train(None)
    assert callback.diagnostics is not None
    assert th.equal(parameters(measured), parameters(plain))


def test_random_numbers_and_modes_stay_as_they_were() -> None:
    def train(callback: BaseCallback | None) -> Any:
        policy_kwargs = {"features_extractor_class": Noisy}
        return A2C("MlpPolicy", "CartPole-v1", n_steps=20, policy_kwargs=policy_kwargs, seed=0).learn(60, callback)

    measured, plain = train(GradientDiagnosticsCallback()), train(None)
    assert th.equal(parameters(measured), parameters(plain))
    model = A2C("MlpPolicy", "CartPole-v1", n_steps=20, policy_kwargs={"features_extractor_class": Noisy}, seed=0)
    callback = GradientDiagnosticsCallback()
    model.learn(20, callback)
    model.policy.set_training_mode(True)
    Noisy.modes = ()
    callback.on_rollout_end()
    assert not any(Noisy.modes)
    assert model.policy.training


@pytest.mark.parametrize("unit", ["auto", "sample"])
@pytest.mark.parametrize("name", list(MODELS))
def test_mean_is_the_gradient_that_the_update_takes(name: str, unit: str) -> None:
    callback = GradientDiagnosticsCallback(unit=unit)
    env = make_vec_env("CartPole-v1", 2, seed=0)
    policy_kwargs = {"optimizer_class": th.optim.SGD}  # foreign optimizers may write into grad
    model = MODELS[name](env, seed=0, device="cpu", learning_rate=1e-3, policy_kwargs=policy_kwargs, **BARE)
    model.learn(1, callback)
    actor = reachable_parameters(model.policy).actor
    gradients: list[Any] = [p.grad for p in actor.values()]
    expected = -th.cat([gradient.flatten() for gradient in gradients])
    assert callback.diagnostics is not None
    th.testing.assert_close(
        callback.diagnostics.mean, expected.double(), rtol=1e-4, atol=1e-6 * float(expected.abs().max())
    )


@pytest.mark.parametrize("name", list(NATURAL))
def test_mean_is_the_gradient_that_the_natural_step_begins_with(name: str) -> None:
    callback = GradientDiagnosticsCallback()
    model = NATURAL[name](make_vec_env("CartPole-v1", 2, seed=0), seed=0, device="cpu").learn(1, callback)
    assert callback.diagnostics is not None
    norm = float(callback.diagnostics.mean.norm())
    assert norm == pytest.approx(model.logger.name_to_value["train/grad_norm"], rel=1e-4)


@pytest.mark.parametrize("name", ["a2c", "segments", "foreign-buffer"])
def test_units(name: str) -> None:
    counts = {}
    for unit in ("auto", "episode", "sample"):
        model = MODELS[name](vec(*(ScriptedEnv(lengths=(3, 5)) for _ in range(2))), seed=0, n_steps=10)
        callback, recorder = GradientDiagnosticsCallback(unit=unit), Recorder()
        model.learn(40, [callback, recorder])
        counts[unit] = [logged["diagnostics/n_units"] for logged in recorder.logged]
    # 3 + 5 + 2 steps, then 3 + 3 + 4 of the next rollout: the piece that goes on is one of its own
    assert counts == {"auto": [6, 8], "episode": [6, 8], "sample": [20, 20]}


def test_complete_episodes_are_rows_and_waiting_steps_are_not() -> None:
    envs = [ScriptedEnv(lengths=lengths) for lengths in ((3, 5), (9, 1))]
    recorder = Recorder()
    for unit, expected in (("auto", 4), ("sample", 18)):
        model = Reinforce("MlpPolicy", vec(*envs), n_episodes=4, baseline="none", seed=0)
        model.learn(1, [GradientDiagnosticsCallback(unit=unit), recorder])
        assert recorder.logged[-1]["diagnostics/n_units"] == expected


def test_what_is_logged_is_what_was_measured() -> None:
    callback, recorder = GradientDiagnosticsCallback(), Recorder()
    Reinforce("MlpPolicy", "CartPole-v1", seed=0).learn(1, [callback, recorder])
    found = callback.diagnostics
    assert found is not None
    assert recorder.logged == [
        {
            "diagnostics/gradient_variance": float(found.total_variance / 8),
            "diagnostics/gradient_variance_max": float(found.variance.max() / 8),
            "diagnostics/gradient_snr": float(found.signal_to_noise),
            "diagnostics/gradient_noise_scale": float(found.noise_scale),
            "diagnostics/half_batch_cosine": float(found.half_batch_cosine),
            "diagnostics/n_units": 8,
        }
    ]


def test_every_kth_rollout() -> None:
    recorder = Recorder()
    model = Reinforce("MlpPolicy", "CartPole-v1", n_steps=32, seed=0)
    model.learn(7 * 32, [GradientDiagnosticsCallback(every=3), recorder], log_interval=1)
    assert [bool(logged) for logged in recorder.logged] == [False, False, True, False, False, True, False]


def test_one_row_has_no_variance(capsys: pytest.CaptureFixture[str]) -> None:
    callback, recorder = GradientDiagnosticsCallback(verbose=1), Recorder()
    A2C("MlpPolicy", ScriptedEnv(lengths=(100,)), n_steps=4).learn(16, [callback, recorder])
    assert recorder.logged == 4 * [{}]
    assert callback.diagnostics is None
    assert capsys.readouterr().out.count("needs 2 rows, this rollout has 1") == 1


def test_a_rollout_that_is_not_finite_is_left_out() -> None:
    class NanReward(gym.RewardWrapper[Any, Any]):
        def reward(self, reward: Any) -> float:
            return float("nan")

    callback = GradientDiagnosticsCallback()
    env = NanReward(gym.make("CartPole-v1"))
    with pytest.warns(UserWarning, match="skipped"):
        Reinforce("MlpPolicy", env, n_steps=16, on_nonfinite="skip", seed=0).learn(16, callback)
    assert callback.diagnostics is None


@pytest.mark.parametrize(
    ("observations", "actions"),
    [("vector", name) for name in ACTION_SPACES] + [(name, "box") for name in OBSERVATION_SPACES if name != "vector"],
)
@pytest.mark.parametrize("name", ["a2c", "segments", "episodes", "kl-penalty"])
def test_all_spaces(name: str, observations: str, actions: str) -> None:
    spaces: dict[str, Any] = {
        "observation_space": OBSERVATION_SPACES[observations],
        "action_space": ACTION_SPACES[actions],
    }
    env = vec(ScriptedEnv(lengths=(3, 2), **spaces), ScriptedEnv(lengths=(4,), **spaces))
    policy = policy_for(OBSERVATION_SPACES[observations])
    callback = GradientDiagnosticsCallback()
    model = MODELS[name](env, policy=policy, seed=0, device="cpu", learning_rate=0.0, **BARE)
    before = list(model.policy.parameters())
    model.learn(1, callback)
    assert all(a is b for a, b in zip(before, model.policy.parameters(), strict=True))
    actor = reachable_parameters(model.policy).actor
    gradients: list[Any] = [p.grad for p in actor.values()]
    expected = -th.cat([gradient.flatten() for gradient in gradients])
    assert callback.diagnostics is not None
    th.testing.assert_close(
        callback.diagnostics.mean, expected.double(), rtol=1e-3, atol=1e-5 * float(expected.abs().max())
    )
    assert float(callback.diagnostics.total_variance) > 0


def test_contrib_trpo() -> None:
    callback = GradientDiagnosticsCallback()
    sb3_contrib.TRPO("MlpPolicy", "CartPole-v1", n_steps=64, batch_size=64, seed=0).learn(64, callback)
    assert callback.diagnostics is not None
    assert np.isfinite(float(callback.diagnostics.noise_scale))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"every": 0}, ValueError, "every must be a whole number of at least 1, got 0"),
        ({"every": 1.5}, TypeError, "every must be a whole number of at least 1, got 1.5"),
        ({"unit": "step"}, ValueError, r"unit must be one of \['auto', 'episode', 'sample'\], got 'step'"),
        ({"unit": None}, TypeError, "unit must be one of"),
        ({"verbose": -1}, ValueError, "verbose must be"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GradientDiagnosticsCallback(**kwargs)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DQN("MlpPolicy", "CartPole-v1", buffer_size=100), TypeError, "DQN: it is not an on-policy"),
        (lambda: sb3_contrib.RecurrentPPO("MlpLstmPolicy", "CartPole-v1"), ValueError, "RecurrentPPO with Recurrent"),
        (lambda: A2C(OwnForward, "CartPole-v1"), ValueError, "A2C with OwnForward"),
        (
            lambda: Reinforce("MlpPolicy", "CartPole-v1", baseline="optimal", baseline_kwargs={"component_wise": True}),
            ValueError,
            "Reinforce with a component-wise baseline",
        ),
    ],
)
def test_what_it_cannot_measure(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    model = make()
    with pytest.raises(error, match=message):
        model.learn(100, GradientDiagnosticsCallback())
    assert model.num_timesteps == 0
