"""What every algorithm here owes to SB3: one table of algorithms, shared tests."""

from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_pg import Reinforce
from tests.algorithms.every_algorithm import ALGORITHMS, Make
from tests.algorithms.steps import AtRolloutEnd
from tests.helpers import (
    ScriptedEnv,
    parameters,
    vec,
)

pytestmark = pytest.mark.filterwarnings("ignore:batch_size=.* does not divide")


def test_the_same_seed_gives_the_same_weights(make: Make) -> None:
    a, b, other = (make("CartPole-v1", seed=seed).learn(300) for seed in (3, 3, 4))
    assert th.equal(parameters(a), parameters(b))
    assert not th.equal(parameters(a), parameters(other))


def test_deterministic_prediction_is_a_function_of_the_observation(make: Make) -> None:
    model = make("Pendulum-v1", max_episode_steps=200)
    obs = model.get_env().reset()
    first, second = (model.predict(obs, deterministic=True)[0] for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(*(model.predict(obs)[0] for _ in range(2)))


@pytest.mark.parametrize("schedule", ["lin_1e-2", lambda progress: 1e-2 * progress])
def test_learning_rate_schedules(make: Make, schedule: Any) -> None:
    model = make("CartPole-v1", learning_rate=schedule).learn(1000)
    assert 0 <= model.policy.optimizer.param_groups[0]["lr"] < 5e-3


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if not name.startswith(("npg", "trpo"))])
def test_gradients_are_clipped_to_the_norm_or_not_at_all(name: str) -> None:
    kwargs = {"learning_rate": 1.0, "policy_kwargs": {"optimizer_class": th.optim.SGD}, "device": "cpu", "seed": 0}
    if name.startswith("kl-penalty"):
        kwargs |= {"batch_size": 32, "n_epochs": 1}  # a single step
    if name.startswith("async"):
        kwargs |= {"n_epochs": 1}
    if name.startswith("off-policy"):
        kwargs |= {"gradient_steps": 1}
    for norm in (None, 1e-3):
        model = ALGORITHMS[name]("CartPole-v1", max_grad_norm=norm, **kwargs)
        actor = list(model.learner.parameters.actor.values())
        before = th.nn.utils.parameters_to_vector(actor).detach().clone()
        while not model._n_updates:
            model.learn(1, reset_num_timesteps=False)
        assert model._n_updates == 1
        step = (th.nn.utils.parameters_to_vector(actor) - before).norm().item()
        assert step > 1e-2 if norm is None else step <= 1e-3 * (1 + 1e-3)


@pytest.mark.cuda
@pytest.mark.skipif(not th.cuda.is_available(), reason="no CUDA device")
def test_trains_on_cuda(make: Make) -> None:
    model = make("CartPole-v1", device="cuda").learn(300)
    assert model.policy.device.type == "cuda"


def test_rounding_of_a_fitted_critic_is_not_normalized_to_full_size() -> None:
    class Constant(ScriptedEnv):
        def _obs(self) -> Any:
            return np.ones(3, np.float32)

        def step(self, action: Any) -> Any:
            obs, _, *rest = super().step(action)
            return obs, 100.0, *rest

    model = Reinforce(
        "MlpPolicy",
        vec(Constant(), Constant()),
        gamma=0.0,
        n_steps=32,
        normalize_advantage=True,
        device="cpu",
        seed=0,
    )
    rng = np.random.default_rng(0)

    def fit_exactly(model: Any) -> None:
        buffer = model.rollout_buffer
        assert (buffer.returns == 100).all()
        buffer.advantages[:] = 3e-6 * rng.standard_normal(buffer.advantages.shape)

    model.learn(32 * 2, AtRolloutEnd(fit_exactly), log_interval=1)
    assert abs(model.logger.name_to_value["train/policy_loss"]) < 1e-4


@pytest.mark.parametrize(
    "kwargs",
    [{"baseline": "time"}, *({"baseline": b, "returns": "total"} for b in ("mean", "leave_one_out", "optimal"))],
    ids=lambda kwargs: "-".join(kwargs.values()),
)
def test_equal_episodes_teach_nothing_even_normalized(kwargs: dict[str, Any]) -> None:
    """Rounding must not become a spread: a solved task would walk away from its solution."""

    class Same(ScriptedEnv):
        def step(self, action: Any) -> Any:
            obs, _, *rest = super().step(action)
            return obs, 1.0, *rest

    model = Reinforce(
        "MlpPolicy",
        vec(*(Same(lengths=(501,)) for _ in range(8))),
        normalize_advantage=True,
        n_episodes=8,
        device="cpu",
        seed=0,
        **kwargs,
    )
    before = parameters(model)
    model.learn(1)
    assert model._n_updates == 1
    assert (parameters(model) - before).abs().max() < 1e-3  # Adam's full step is 7e-3
