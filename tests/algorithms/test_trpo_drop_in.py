"""In the place of sb3_contrib's TRPO: its arguments, its zips, its steps."""

import copy
import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import sb3_contrib
import torch as th
from stable_baselines3.common.vec_env import VecEnv

from sb3_pg import NPG, TRPO
from sb3_pg.functional import joint_kl
from sb3_pg.policies import torch_distributions
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES, ScriptedEnv, parameters, rollout_of, vec

SIGNATURE = inspect.signature(sb3_contrib.TRPO.__init__).parameters
#: Action space -> number of dimensions that sb3_contrib's divergence is averaged over.
DIMENSIONS = {"discrete": 1, "multi_discrete": 1, "box": 2, "matrix": 4, "multi_binary": 3}


def envs(action_space: str) -> VecEnv:
    spaces = copy.deepcopy((OBSERVATION_SPACES["vector"], ACTION_SPACES[action_space]))
    return vec(*(ScriptedEnv((5, 9), (False, True), first, *spaces) for first in (-40.0, 3.0)))


def make(cls: Any, action_space: str = "box", **kwargs: Any) -> Any:
    return cls(
        "MlpPolicy", envs(action_space), **{"n_steps": 32, "batch_size": 64, "seed": 0, "device": "cpu"} | kwargs
    )


def actors_change(model: Any, n_steps: int = 64) -> th.Tensor:
    actor = [p for name, p in model.policy.named_parameters() if "value" not in name]
    before = th.nn.utils.parameters_to_vector(actor).detach().clone()
    model.learn(n_steps)
    return th.nn.utils.parameters_to_vector(actor).detach() - before


def test_arguments_are_sb3_contribs_in_its_order_with_its_defaults() -> None:
    ours = inspect.signature(TRPO.__init__).parameters
    positional = {name: p for name, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(positional) == list(SIGNATURE)
    assert {name: p.default for name, p in positional.items()} == {name: p.default for name, p in SIGNATURE.items()}
    assert TRPO.policy_aliases.keys() == sb3_contrib.TRPO.policy_aliases.keys()


def test_all_arguments_may_be_positional() -> None:
    chosen = {"env": envs("box"), "policy": "MlpPolicy", "n_steps": 8, "batch_size": 4, "target_kl": 0.02, "seed": 1}
    arguments: list[Any] = [chosen.get(p.name, p.default) for p in list(SIGNATURE.values())[1:]]
    for model in (TRPO(*arguments), NPG(*arguments)):
        assert (model.n_steps, model.batch_size, model.target_kl, model.seed) == (8, 4, 0.02, 1)
        model.learn(16)


@pytest.mark.parametrize("cls", [TRPO, NPG])
@pytest.mark.parametrize("action_space", DIMENSIONS)
def test_sb3_contribs_zips_load_and_train_on(cls: Any, action_space: str, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {
        "target_kl": 0.02,
        "cg_damping": 0.2,
        "n_critic_updates": 3,
        "gamma": 0.9,
        "gae_lambda": 0.8,
    }
    theirs = make(sb3_contrib.TRPO, action_space, **chosen).learn(64)
    theirs.save(tmp_path / "model")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = cls.load(tmp_path / "model", env=envs(action_space), device="cpu")
    d = DIMENSIONS[action_space]
    advice = f"load(..., target_kl={d * 0.02:g}, cg_damping={d * 0.2:g})"
    assert [advice in str(warning.message) for warning in caught] == ([] if d == 1 else [True])
    assert th.equal(parameters(ours), parameters(theirs))
    for name in SIGNATURE.keys() - {"self", "policy", "env", "_init_setup_model", "rollout_buffer_class"}:
        if hasattr(theirs, name):
            assert getattr(ours, name) == getattr(theirs, name), name
    before = theirs.policy.optimizer.state_dict()["state"]
    critic_only = [name for name, _ in ours.policy.named_parameters() if "value" in name]
    assert len(before) == len(critic_only)
    assert str(ours.policy.optimizer.state_dict()["state"]) == str(before)
    ours.learn(64, reset_num_timesteps=False)
    assert ours.num_timesteps == 128
    assert ours.logger.name_to_value["train/step_outcome"] == "accepted"
    assert {int(state["step"]) for state in ours.policy.optimizer.state_dict()["state"].values()} == {3 + 3}


def test_what_the_warning_of_units_advises_ends_it(tmp_path: Path) -> None:
    make(sb3_contrib.TRPO).save(tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = TRPO.load(tmp_path / "theirs", env=envs("box"), target_kl=0.02, cg_damping=0.2)
        assert (model.target_kl, model.cg_damping) == (0.02, 0.2)
        model.save(tmp_path / "ours")
        again = TRPO.load(tmp_path / "ours", env=envs("box"))
    assert (again.target_kl, again.cg_damping) == (0.02, 0.2)


@pytest.mark.parametrize("action_space", DIMENSIONS)
def test_one_step_is_sb3_contribs_in_the_units_of_the_joint_divergence(action_space: str) -> None:
    d = DIMENSIONS[action_space]
    kwargs: dict[str, Any] = {"cg_max_steps": 100, "n_critic_updates": 1}
    theirs = actors_change(make(sb3_contrib.TRPO, action_space, target_kl=1e-3, cg_damping=0.05, **kwargs))
    translated: dict[str, Any] = {"target_kl": d * 1e-3, "cg_damping": d * 0.05, "cg_tolerance": 1e-6}
    for cls in (TRPO, NPG):
        ours = actors_change(make(cls, action_space, **translated, **kwargs))
        assert (ours - theirs).norm() < 1e-3 * theirs.norm()
    untranslated = actors_change(make(TRPO, action_space, target_kl=1e-3, cg_damping=0.05, **kwargs))
    assert ((untranslated - theirs).norm() > 0.1 * theirs.norm()) == (d > 1)


@pytest.mark.parametrize("critic_learning_rate", [None, "lin_1e-2"])
def test_a_zip_of_ours_goes_on_as_if_nothing_had_happened(critic_learning_rate: str | None, tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {
        "critic_learning_rate": critic_learning_rate,
        "normalize_value_targets": True,
        "use_sde": True,
    }
    model = make(TRPO, fisher_chunk_size=13, line_search_accept_ratio=0.2, **kwargs).learn(128)
    model.save(tmp_path / "model")
    env = copy.deepcopy(model.get_env())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = TRPO.load(tmp_path / "model", env=env, force_reset=False, device="cpu")
    assert loaded.fisher_chunk_size == 13
    assert loaded.line_search_accept_ratio == 0.2
    assert loaded.value_scale == model.value_scale != 1
    for goes_on in (model, loaded):
        th.manual_seed(1)
        goes_on.learn(128, reset_num_timesteps=False)
    assert th.equal(parameters(model), parameters(loaded))
    assert str(model.get_parameters()) == str(loaded.get_parameters())


def test_arguments_of_load_take_effect(tmp_path: Path) -> None:
    make(TRPO, target_kl=0.01).save(tmp_path / "model")
    model = TRPO.load(tmp_path / "model", env=envs("box"), target_kl=1e-4, critic_batch_size=16, n_critic_updates=2)
    model.learn(64)
    assert 0 < model.logger.name_to_value["train/joint_kl"] <= 1e-4
    assert {int(state["step"]) for state in model.policy.optimizer.state_dict()["state"].values()} == {2 * 4}
    with pytest.raises(ValueError, match=r"target_kl must be .*above 0.*, got 0"):
        TRPO.load(tmp_path / "model", target_kl=0)


def test_sub_sampling_thins_the_fisher_products_alone() -> None:
    with pytest.warns(UserWarning, match="sub_sampling_factor=8 thins the Fisher products alone"):
        thinned = make(TRPO, sub_sampling_factor=8)
    before = copy.deepcopy(thinned.policy)
    change = actors_change(thinned)
    assert th.equal(change, actors_change(make(TRPO, fisher_subsample=8)))
    whole = make(TRPO)
    assert not th.allclose(change, actors_change(whole))
    logged = thinned.logger.name_to_value
    assert logged["train/grad_norm"] == whole.logger.name_to_value["train/grad_norm"]
    observations = rollout_of(thinned).flat_observations
    old, new = (torch_distributions(policy.get_distribution(observations)) for policy in (before, thinned.policy))
    assert old is not None
    assert new is not None
    assert logged["train/joint_kl"] == pytest.approx(joint_kl(old, new).mean().item(), rel=1e-4)


@pytest.mark.parametrize(
    "argument", [{"line_search_shrinking_factor": 0.5}, {"line_search_max_iter": 3}, {"line_search_accept_ratio": 0.0}]
)
def test_npg_says_that_it_has_no_line_search(argument: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match=f"{next(iter(argument))}=.* has no effect with NPG, which has no line"):
        make(NPG, **argument)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(TRPO, **argument)
        make(NPG)


@pytest.mark.parametrize("cls", [TRPO, NPG])
@pytest.mark.parametrize(
    ("argument", "why"),
    [
        ("max_grad_norm", "length of the actor's step follows from target_kl"),
        ("vf_coef", "critic has steps of its own"),
    ],
)
def test_what_is_of_no_use_is_refused(cls: Any, argument: str, why: str) -> None:
    with pytest.raises(TypeError, match=f"{cls.__name__} has no argument '{argument}': .*{why}"):
        cls("MlpPolicy", "CartPole-v1", **{argument: 0.5})


@pytest.mark.parametrize("cls", [TRPO, NPG])
@pytest.mark.parametrize("error", [ValueError, AssertionError])  # the one as everywhere here, the other as there
def test_a_single_step_cannot_be_normalized(cls: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"normalize_advantage=True .* n_steps=1 with one env"):
        cls("MlpPolicy", "CartPole-v1", n_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls("MlpPolicy", "CartPole-v1", n_steps=1, batch_size=1, normalize_advantage=False)
        make(cls, n_steps=1, batch_size=2)


def test_minibatches_of_unequal_size_are_warned_of_as_there() -> None:
    for cls in (sb3_contrib.TRPO, TRPO, NPG):
        with pytest.warns(UserWarning, match="batch"):
            make(cls, n_steps=3, batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(TRPO, n_steps=3, batch_size=3)
        make(TRPO, n_steps=3, batch_size=None)
        make(TRPO, n_steps=3, batch_size=128, critic_batch_size=4)
        make(TRPO, n_steps=None, n_episodes=2, batch_size=4)
