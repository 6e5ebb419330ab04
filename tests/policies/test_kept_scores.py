"""The graph of the rollout's scores is used for the update, and only where it is that of the policy that is updated."""

from collections.abc import Callable
from typing import Any

import pytest
import torch as th
from stable_baselines3.common.distributions import CategoricalDistribution

from sb3_pg import ActorCritic, Reinforce, policies
from sb3_pg.policies import kept_scores
from tests.algorithms.steps import AtRolloutEnd
from tests.helpers import parameters

pytestmark = pytest.mark.usefixtures("one_thread")


def train(cls: Any, env: str, action: Callable[[Any], object] = lambda _: None, **kwargs: Any) -> Any:
    model = cls("MlpPolicy", env, n_steps=16, seed=0, device="cpu", **kwargs)
    return model.learn(80, callback=AtRolloutEnd(action), log_interval=2)


@pytest.fixture
def n_forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each forward of the update."""
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return policies.score_actions(*args, **kwargs)

    monkeypatch.setattr("sb3_pg.learner.gradient_step.score_actions", counted)
    return calls


KINDS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "discrete": (ActorCritic, "CartPole-v1", {}),
    "box": (ActorCritic, "Pendulum-v1", {"ent_coef": 0.01, "normalize_advantage": True}),
    "gsde": (ActorCritic, "Pendulum-v1", {"use_sde": True}),
    "own critic": (Reinforce, "CartPole-v1", {}),
    "one optimizer": (
        Reinforce,
        "Pendulum-v1",
        {"baseline": "value", "critic_learning_rate": None, "n_critic_updates": 1},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_with_the_kept_graph_is_an_update_without(
    kind: str, n_forwards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cls, env, kwargs = KINDS[kind]
    kept = train(cls, env, **kwargs)
    assert n_forwards == []
    monkeypatch.setattr(kept_scores, "_identity", lambda _: None)
    anew = train(cls, env, **kwargs)
    assert len(n_forwards) == 5
    assert th.allclose(parameters(kept), parameters(anew), atol=1e-6)
    assert kept.logger.name_to_value.keys() == anew.logger.name_to_value.keys()


def double_the_actor(model: Any) -> None:
    with th.no_grad():
        model.policy.action_net.weight.mul_(2.0)


def replace_data(model: Any) -> None:
    model.policy.action_net.weight.data = 2 * model.policy.action_net.weight.data


def double_behind_autograd(model: Any) -> None:
    model.policy.action_net.weight.data.mul_(2.0)


def write_the_same_values(model: Any) -> None:
    model.set_parameters(model.get_parameters())


def freeze_the_bias(model: Any) -> None:
    model.policy.action_net.bias.requires_grad_(False)


class Sharper(CategoricalDistribution):
    def proba_distribution(self, action_logits: th.Tensor) -> Any:
        return super().proba_distribution(4 * action_logits)


def new_distribution(model: Any) -> None:
    model.policy.action_dist = Sharper(2)


def hook(model: Any) -> None:
    model.policy.action_net.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    "change",
    [
        double_the_actor,
        double_behind_autograd,
        replace_data,
        write_the_same_values,
        freeze_the_bias,
        new_distribution,
        hook,
    ],
)
def test_a_policy_that_was_changed_after_the_rollout_is_scored_anew(
    change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = train(ActorCritic, "CartPole-v1", change)
    monkeypatch.setattr(kept_scores, "_identity", lambda _: None)
    assert th.equal(parameters(model), parameters(train(ActorCritic, "CartPole-v1", change)))


def test_layers_that_depend_on_the_mode_are_scored_anew(n_forwards: list[int]) -> None:
    train(ActorCritic, "CartPole-v1", policy_kwargs={"activation_fn": th.nn.Dropout})
    assert len(n_forwards) == 5


def test_a_second_update_of_the_same_rollout_is_scored_anew(n_forwards: list[int]) -> None:
    model = train(ActorCritic, "CartPole-v1")
    before = parameters(model).clone()
    model.train()
    assert n_forwards == [1]
    assert not th.equal(before, parameters(model))


@pytest.mark.parametrize("kwargs", [{"critic_fit": "before"}, {"critic_warmup_updates": 5}])
def test_no_graph_is_kept_where_the_critic_moves_first(kwargs: dict[str, Any]) -> None:
    model = train(ActorCritic, "CartPole-v1", **kwargs)
    assert not model.learner.reuses_scores or model.learner.state.n_warmed_up == 5
