"""Envs whose episodes do not end: an error or a warning, with advice that the class can follow."""

import re
import warnings
from typing import Any

import numpy as np
import pytest

from sb3_pg import NPG, TRPO, ActorCritic, KLPenaltyPG, OffPAC, OffPolicyPG, Reinforce
from sb3_pg.rollout import EndlessEpisodeError
from tests.helpers import ScriptedEnv, vec

ENDLESS = 10**9
CPU: dict[str, Any] = {"device": "cpu", "seed": 0}
STEPS: dict[str, Any] = {**CPU, "train_freq": (16, "step")}


def endless(n_envs: int = 1) -> Any:
    return vec(*(ScriptedEnv(lengths=(ENDLESS,)) for _ in range(n_envs)))


def advice_of(error: pytest.ExceptionInfo[EndlessEpisodeError]) -> str:
    message = str(error.value)
    assert "gymnasium.wrappers.TimeLimit" in message
    assert "raise max_episode_steps" in message
    return message


# ---------------------------------------------------------------- OffPolicyPG, in steps


@pytest.mark.parametrize("n_envs", [1, 3])
def test_the_longest_episode_holds_across_rollouts(n_envs: int) -> None:
    model = OffPolicyPG("MlpPolicy", endless(n_envs), max_episode_steps=50, **STEPS)
    with pytest.raises(EndlessEpisodeError, match=r"env 0 .*max_episode_steps=50 .*ActorCritic") as caught:
        model.learn(10_000)
    assert model.num_timesteps == 50 * n_envs
    assert "n_steps=" not in advice_of(caught)
    assert "baseline" not in str(caught.value)


def test_it_counts_from_the_beginning_of_each_envs_episode() -> None:
    env = vec(ScriptedEnv(lengths=(7,)), ScriptedEnv(lengths=(30, ENDLESS)))
    model = OffPolicyPG("MlpPolicy", env, max_episode_steps=40, **STEPS)
    with pytest.raises(EndlessEpisodeError, match="The episode of env 1"):
        model.learn(10_000)
    assert model.num_timesteps == 2 * (30 + 40)
    assert model._n_updates > 0


@pytest.mark.parametrize("ends", [(20,), (20, 19)])
def test_an_episode_of_exactly_the_longest_length_is_replayed(ends: tuple[int, ...]) -> None:
    model = OffPolicyPG("MlpPolicy", vec(ScriptedEnv(lengths=ends)), max_episode_steps=20, **STEPS)
    model.learn(200)
    assert model.replay_buffer is not None
    assert max(stored.length for stored in model.replay_buffer.trajectories) == 20
    with pytest.raises(EndlessEpisodeError):
        OffPolicyPG("MlpPolicy", vec(ScriptedEnv(lengths=ends)), max_episode_steps=19, **STEPS).learn(200)


def test_after_the_error_training_goes_on_from_a_reset() -> None:
    script = ScriptedEnv(lengths=(30, 5, 20))
    model = OffPolicyPG("MlpPolicy", vec(script), max_episode_steps=25, **STEPS)
    with pytest.raises(EndlessEpisodeError):
        model.learn(100)
    assert model.num_timesteps == 25
    model.learn(8, reset_num_timesteps=False)
    assert model.replay_buffer is not None
    assert [stored.length for stored in model.replay_buffer.trajectories] == [5]


def test_a_new_learn_begins_new_episodes() -> None:
    model = OffPolicyPG("MlpPolicy", endless(), max_episode_steps=40, **STEPS)
    for _ in range(3):
        with pytest.warns(UserWarning, match="no episode has ended"):
            model.learn(32)
    with pytest.raises(EndlessEpisodeError):
        model.learn(32, reset_num_timesteps=False)


def test_segments_of_those_that_need_no_end_are_not_limited() -> None:
    for cls in (ActorCritic, Reinforce, NPG, TRPO, KLPenaltyPG):
        model = cls("MlpPolicy", endless(), n_steps=16, **CPU)
        model.max_episode_steps = 20
        assert model.learn(64).num_timesteps == 64


# ---------------------------------------------------------------- complete episodes


@pytest.mark.parametrize("cls", [ActorCritic, NPG, TRPO, KLPenaltyPG, Reinforce, OffPolicyPG])
def test_the_advice_can_be_followed(cls: Any) -> None:
    in_episodes: dict[str, Any] = {"n_steps": None, "n_episodes": 2}
    if cls is OffPolicyPG:
        in_episodes = {"train_freq": (2, "episode")}
    model = cls("MlpPolicy", endless(2), max_episode_steps=30, **in_episodes, **CPU)
    with pytest.raises(EndlessEpisodeError, match=r"env 0 .*max_episode_steps=30 ") as caught:
        model.learn(1000)
    advice = advice_of(caught)
    if cls is OffPolicyPG:
        assert "use ActorCritic" in advice
        assert "n_steps=" not in advice
        ActorCritic("MlpPolicy", endless(2), **CPU).learn(20)
        return
    assert "collect segments with n_steps=" in advice
    assert ("baseline='value'" in advice) == (cls is Reinforce)
    cls("MlpPolicy", endless(2), n_steps=16, **CPU).learn(32)


def test_the_advice_for_total_returns_can_be_followed() -> None:
    total: dict[str, Any] = {
        "returns": "total",
        "baseline": "mean",
        "n_critic_updates": 1,
        "critic_learning_rate": None,
    }
    model = Reinforce("MlpPolicy", endless(), n_episodes=2, max_episode_steps=30, **total, **CPU)
    with pytest.raises(EndlessEpisodeError, match="n_steps=, baseline='value' and returns='reward_to_go'"):
        model.learn(1000)
    Reinforce("MlpPolicy", endless(), n_steps=16, baseline="value", returns="reward_to_go", **CPU).learn(32)


# ---------------------------------------------------------------- learn() without an update


def silent(model: Any, *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return model.learn(*args, **kwargs)


def test_no_update_because_no_episode_has_ended_is_said() -> None:
    model = OffPolicyPG("MlpPolicy", endless(), **STEPS)
    message = r"learn\(\) has taken no update: no episode has ended in 64 steps.*TimeLimit.*ActorCritic"
    with pytest.warns(UserWarning, match=message):
        model.learn(64)
    assert model._n_updates == 0


@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [(OffPolicyPG, {"train_freq": 16}), (OffPolicyPG, {"train_freq": (2, "episode")}), (OffPAC, {"batch_size": 4})],
)
def test_no_update_because_of_learning_starts_is_said(cls: Any, kwargs: dict[str, Any]) -> None:
    model = cls("MlpPolicy", vec(ScriptedEnv()), learning_starts=100, **kwargs, **CPU)
    with pytest.warns(
        UserWarning, match=r"has taken no update: num_timesteps=\d+ is not above learning_starts=100"
    ) as w:
        model.learn(32)
    assert [str(one.message) for one in w if "reset_num_timesteps=False" in str(one.message)]
    silent(model, 150, reset_num_timesteps=False)
    assert model._n_updates > 0


def test_no_update_because_of_min_ess_is_said() -> None:
    rng = np.random.default_rng(0)

    def far(obs: Any) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(len(obs), dtype=int), rng.uniform(-50, 0, len(obs))

    model = OffPolicyPG("MlpPolicy", vec(ScriptedEnv()), behavior_policy=far, min_ess=1.0, ratio="prefix", **CPU)
    with pytest.warns(UserWarning, match=r"no update: .*min_ess=1.0"):
        model.learn(32)


def test_what_was_asked_for_or_has_been_said_gives_no_warning() -> None:
    silent(OffPolicyPG("MlpPolicy", endless(), gradient_steps=0, **STEPS), 32)
    silent(OffPAC("MlpPolicy", vec(ScriptedEnv()), gradient_steps=0, **CPU), 32)
    for model in (OffPolicyPG("MlpPolicy", endless(), **STEPS), OffPAC("MlpPolicy", endless(), **CPU)):
        silent(model, 0)
        silent(model, 32, callback=lambda *_: False)
    silent(ActorCritic("MlpPolicy", endless(), **CPU), 1)
    silent(OffPolicyPG("MlpPolicy", vec(ScriptedEnv()), **STEPS), 32)


def test_an_episode_that_spans_two_calls_is_learned_from_in_the_second() -> None:
    model = OffPolicyPG("MlpPolicy", vec(ScriptedEnv(lengths=(40,))), **STEPS)
    with pytest.warns(UserWarning, match=re.escape("learn() has taken no update")):
        model.learn(32)
    silent(model, 32, reset_num_timesteps=False)
    assert model._n_updates > 0
