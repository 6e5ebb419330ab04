"""Errors about action masks and memory: that they come early, and name what is wrong and what to do instead."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

from sb3_pg import ActorCritic, OffPAC, Reinforce
from sb3_pg.envs import ActionMaskVecEnv, make_vec_env
from tests.envs.masked import Restless

BOTH = [ActorCritic, OffPAC]
SMALL: dict[Any, dict[str, Any]] = {
    ActorCritic: {"n_steps": 8},
    Reinforce: {"n_episodes": 2},
    OffPAC: {"buffer_size": 100, "learning_starts": 5, "batch_size": 4},
}


def make(cls: Any, env: Any, policy: str = "MlpPolicy", **kwargs: Any) -> Any:
    return cls(policy, env, **{"seed": 0, "device": "cpu", **SMALL[cls], **kwargs})


class Dicts(Restless):
    """An env without masks whose observations have several keys."""

    def __init__(self) -> None:
        super().__init__(as_dict=True, source="none")


class OnlyMask(Restless):
    """Its observations are the mask alone."""

    def __init__(self) -> None:
        super().__init__(source="key")
        self.observation_space = spaces.Dict({"action_mask": spaces.MultiBinary(4)})

    def _shown(self) -> tuple[Any, dict[str, Any]]:
        return {"action_mask": self.mask().astype(np.int8)}, {}


# ---------------------------------------------------------------- the policy and what it sees


@pytest.mark.parametrize("policy", ["MlpPolicy", "CnnPolicy"])
@pytest.mark.parametrize("cls", BOTH)
def test_a_policy_that_takes_no_dict_is_refused_with_what_it_would_see(cls: Any, policy: str) -> None:
    seen = (
        rf"You must use `MultiInputPolicy` .*not {policy}: its networks would see Dict\('class': Discrete\(3\), 'vec'"
    )
    with pytest.raises(ValueError, match=seen):
        make(cls, Restless(as_dict=True), policy)
    with pytest.raises(ValueError, match=seen):
        make(cls, Dicts(), policy)
    with pytest.raises(ValueError, match=rf"not {policy}: its networks would see Dict.*observe_masks"):
        make(cls, Restless(), policy, policy_kwargs={"observe_masks": True})
    make(cls, Restless(as_dict=True), "MultiInputPolicy").learn(16)
    make(cls, Restless(), "MultiInputPolicy", policy_kwargs={"observe_masks": True}).learn(16)


@pytest.mark.parametrize("policy", ["MlpPolicy", "CnnPolicy", "MultiInputPolicy"])
@pytest.mark.parametrize("cls", BOTH)
def test_observations_that_are_nothing_but_masks_leave_nothing_to_see(cls: Any, policy: str) -> None:
    with pytest.raises(ValueError, match=r"observation_space must have a key besides 'action_mask'.*observe_masks"):
        make(cls, OnlyMask(), policy)


@pytest.mark.parametrize("policy", ["MlpPolicy", "MultiInputPolicy"])
@pytest.mark.parametrize("cls", BOTH)
def test_a_policy_may_see_nothing_but_masks(cls: Any, policy: str) -> None:
    model = make(cls, OnlyMask(), policy, policy_kwargs={"observe_masks": True}).learn(24)
    assert model.predict({"action_mask": np.array([0, 0, 1, 0])})[0] == 2


@pytest.mark.parametrize("cls", BOTH)
def test_arguments_of_policies_that_are_arguments_of_algorithms(cls: Any) -> None:
    message = r"policy_kwargs\['memory'\] .* give memory=" if cls is ActorCritic else r"OffPAC has no memory"
    with pytest.raises(TypeError, match=message):
        make(cls, "CartPole-v1", policy_kwargs={"memory": "lstm"})
    with pytest.raises(ValueError, match=r"policy_kwargs\['observe_masks'\] must .*env has no action masks"):
        make(cls, "CartPole-v1", policy_kwargs={"observe_masks": True})
    with pytest.raises(ValueError, match=r"policy_kwargs\['observe_masks'\] must .*use_action_masks=False"):
        make(cls, Restless(), policy_kwargs={"observe_masks": True}, use_action_masks=False)


# ---------------------------------------------------------------- loading, and changes after construction


@pytest.mark.parametrize("cls", BOTH)
def test_a_model_with_masks_says_so_to_an_env_without(cls: Any, tmp_path: Path) -> None:
    make(cls, Restless()).save(tmp_path / "model.zip")
    message = r"env must give action masks, since the model was trained with them, by a method action_masks\(\)"
    for env in (Restless(source="none"), DummyVecEnv([lambda: Restless(source="none")])):
        with pytest.raises(ValueError, match=message) as caught:
            cls.load(tmp_path / "model.zip", env=env)
        assert caught.type is ValueError  # the file is intact
    model = cls.load(tmp_path / "model.zip", env=Restless())
    with pytest.raises(ValueError, match=message) as caught:
        model.set_env(Restless(source="none"))
    assert caught.type is ValueError
    with pytest.raises(ValueError, match=r"eval_env must give action masks, since the model was trained with them"):
        model.learn(10, callback=EvalCallback(DummyVecEnv([lambda: Restless(source="none")]), warn=False))
    assert model.learn(10).uses_masks


def test_masks_that_cannot_be_taken_out_are_no_damage_of_a_file(tmp_path: Path) -> None:
    make(ActorCritic, Restless(), use_action_masks=False).save(tmp_path / "model.zip")
    env = VecNormalize(ActionMaskVecEnv(DummyVecEnv([Restless])))
    with pytest.raises(
        ValueError, match="use_action_masks=False cannot take the masks out of a VecNormalize"
    ) as caught:
        ActorCritic.load(tmp_path / "model.zip", env=env)
    assert caught.type is ValueError


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("use_action_masks", False, "use_action_masks must be True, as when the model was made, got False"),
        ("memory", "lstm", "memory must be that of the saved policy"),
    ],
)
def test_custom_objects_are_refused_as_keyword_arguments_are(
    name: str, value: Any, message: str, tmp_path: Path
) -> None:
    make(ActorCritic, Restless()).save(tmp_path / "model.zip")
    for kwargs in ({"custom_objects": {name: value}}, {name: value}):
        with pytest.raises(ValueError, match=message) as caught:
            ActorCritic.load(tmp_path / "model.zip", **kwargs)
        assert caught.type is ValueError
    given = {"use_action_masks": True, "memory": None}
    assert ActorCritic.load(tmp_path / "model.zip", custom_objects=given).uses_masks


@pytest.mark.parametrize(("made", "other"), [(None, False), (True, False), (False, True), (None, "yes")])
@pytest.mark.parametrize("cls", BOTH)
def test_use_action_masks_that_is_set_after_construction_is_an_error(cls: Any, made: Any, other: Any) -> None:
    model = make(cls, Restless(), use_action_masks=made)
    model.use_action_masks = other
    with pytest.raises(ValueError, match=r"use_action_masks must be .* policy was made with.*got"):
        model.learn(10)


@pytest.mark.parametrize(("made", "same"), [(None, True), (True, None)])
def test_use_action_masks_may_say_the_same_in_another_way(made: Any, same: Any) -> None:
    model = make(ActorCritic, Restless(), use_action_masks=made)
    model.use_action_masks = same
    model.learn(10)


@pytest.mark.parametrize("use", [True, None])
def test_masks_that_a_policy_was_not_made_for_are_an_error_after_construction(use: Any) -> None:
    class Takes(Restless):
        def step(self, action: Any) -> Any:
            self.source = "none"
            try:
                _, *others = super().step(action)
            finally:
                self.source = "key"
            return self._shown()[0], *others

    model = make(ActorCritic, Takes(source="key"), "MultiInputPolicy", use_action_masks=False)
    model.use_action_masks = use
    with pytest.raises(ValueError, match="use_action_masks must be False, as the policy was made with"):
        model.learn(10)


def test_a_model_with_masks_can_be_copied() -> None:
    model = make(ActorCritic, make_vec_env("MaskedGrid-v0", 2)).learn(16)
    other = copy.deepcopy(model)
    assert other.env is not model.env
    for one in (model, other):
        one.learn(16)
        assert one.uses_masks


# ---------------------------------------------------------------- predict

OBS, MASK = np.zeros(2, np.float32), np.array([0, 0, 1, 0])


@pytest.mark.parametrize(("cls", "memory"), [(ActorCritic, None), (ActorCritic, "lstm"), (OffPAC, None)])
def test_predict_names_what_does_not_fit(cls: Any, memory: Any) -> None:
    model = make(cls, Restless(), **({"memory": memory} if memory else {}))
    rows = "action_masks must have as many rows as there are observations, {}, got {}"
    for n, masks in ((2, [MASK] * 3), (2, MASK), (1, [MASK] * 3)):
        observation = np.stack([OBS] * n) if n > 1 else OBS
        for predict in (model.predict, model.policy.predict):
            with pytest.raises(ValueError, match=rows.format(n, len(np.atleast_2d(masks)))):
                predict(observation, action_masks=np.array(masks))
    with pytest.raises(ValueError, match="action_masks must have as many rows"):
        model.predict({"observation": np.stack([OBS, OBS]), "action_mask": MASK})
    others: Any = ({}, {"obs": OBS}, {"observation": OBS, "obs": OBS})
    for observation in others:
        with pytest.raises(ValueError, match=r"observation must have the keys \['observation'\]"):
            model.predict({**observation, "action_mask": MASK})
        with pytest.raises(ValueError, match=r"observation must have the keys \['observation'\]"):
            model.predict(observation, action_masks=MASK)
    with pytest.raises(ValueError, match="You have passed a tuple to the predict"):
        model.predict(Restless().reset(), action_masks=MASK)


@pytest.mark.parametrize(("cls", "memory"), [(ActorCritic, None), (ActorCritic, "lstm"), (OffPAC, None)])
def test_one_observation_with_a_row_of_masks_gives_one_action(cls: Any, memory: Any) -> None:
    model = make(cls, Restless(), **({"memory": memory} if memory else {}))
    for actions in (
        model.predict(OBS, action_masks=MASK[None])[0],
        model.policy.predict({"observation": OBS, "action_mask": MASK[None]})[0],
    ):
        assert np.shape(actions) == ()
        assert actions == 2
    assert model.predict(OBS[None], action_masks=MASK)[0].tolist() == [2]


def test_predict_with_memory_names_what_does_not_fit() -> None:
    model = make(ActorCritic, "CartPole-v1", memory="lstm")
    with pytest.raises(ValueError, match="You have passed a tuple to the predict"):
        model.predict(gym.make("CartPole-v1").reset())
    for state in (3, (None, None), [1, 2, 3], "state"):
        with pytest.raises(ValueError, match=r"state must be a tuple of arrays of the shapes \[\(1, 1, 64\), "):
            model.predict(np.zeros(4), state=state)
    several = make(ActorCritic, Dicts(), "MultiInputPolicy", memory="gru")
    for observation in ({"vec": OBS}, {"vec": OBS, "class": 1, "other": OBS}):
        with pytest.raises(ValueError, match=r"observation must have the keys \['class', 'vec'\], got"):
            several.predict(observation)
    with pytest.raises(ValueError, match=r"observation must have as many rows for each key"):
        several.predict({"vec": np.zeros((2, 2)), "class": 1})


# ---------------------------------------------------------------- a key whose space does not fit


def with_key(space: spaces.Space[Any]) -> Any:
    class Key(Restless):
        def __init__(self) -> None:
            super().__init__(source="none")
            self.observation_space = spaces.Dict({"vec": self.observation_space, "action_mask": space})

        def _shown(self) -> tuple[Any, dict[str, Any]]:
            return {"vec": np.zeros(2, np.float32), "action_mask": np.zeros(space.shape, space.dtype)}, {}

    return Key()


@pytest.mark.parametrize("space", [spaces.MultiBinary(7), spaces.MultiDiscrete([2] * 4), spaces.Box(0, 1, (4, 1))])
@pytest.mark.parametrize("cls", BOTH)
def test_a_key_of_masks_whose_space_does_not_fit_gives_a_warning(
    cls: Any, space: Any, recwarn: pytest.WarningsRecorder
) -> None:
    message = r"observation_space\['action_mask'\] is .* fits no masks of Discrete\(4\).*Box or MultiBinary .*\(4,\)"
    with pytest.warns(UserWarning, match=message):
        model = make(cls, with_key(space), "MultiInputPolicy")
    assert not model.uses_masks
    model.learn(10)
    recwarn.clear()
    make(cls, with_key(space), "MultiInputPolicy", use_action_masks=False)
    assert not [one for one in recwarn if "action_mask" in str(one.message)]
    with pytest.raises(ValueError, match=r"use_action_masks=True takes .*Box or MultiBinary .*\(4,\)"):
        make(cls, with_key(space), "MultiInputPolicy", use_action_masks=True)


def test_a_key_beside_actions_that_have_no_masks_gives_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    env = with_key(spaces.MultiBinary(4))
    env.action_space = spaces.Box(-1, 1, (1,))
    make(ActorCritic, env, "MultiInputPolicy").learn(10)
    assert not [one for one in recwarn if "action_mask" in str(one.message)]


@pytest.mark.parametrize("wrapper", [VecNormalize, partial(VecFrameStack, n_stack=2)])
def test_masks_that_wrappers_have_changed_give_no_warning(wrapper: Any, recwarn: pytest.WarningsRecorder) -> None:
    assert make(ActorCritic, wrapper(make_vec_env("MaskedGrid-v0"))).uses_masks
    assert not [one for one in recwarn if "action_mask" in str(one.message)]
