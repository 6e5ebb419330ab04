"""Compiled networks compute what the others do, where they can be had, and are left alone where they cannot."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_pg import NPG, TRPO, ActorCritic, GradientDiagnosticsCallback, KLPenaltyPG, OffPAC, OffPolicyPG, Reinforce
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES, BatchNormExtractor, ScriptedEnv, vec

SMALL: dict[str, Any] = {"device": "cpu", "seed": 0, "learning_rate": 1e-2}
OF_BATCH_NORM: dict[str, Any] = {"policy_kwargs": {"features_extractor_class": BatchNormExtractor}}
CASES: dict[str, tuple[Any, str, dict[str, Any], dict[str, Any]]] = {
    "plain": (ActorCritic, "MlpPolicy", {"n_steps": 8}, {}),
    "episodes": (Reinforce, "MlpPolicy", {"n_episodes": 4}, {}),
    "segments": (ActorCritic, "MlpPolicy", {"n_steps": 8, "n_critic_updates": 3, "critic_batch_size": 5}, {}),
    "optimal baseline": (Reinforce, "MlpPolicy", {"n_episodes": 4, "baseline": "optimal"}, {}),
    "optimal baseline, own layers": (Reinforce, "MlpPolicy", {"baseline": "optimal", **OF_BATCH_NORM}, {}),
    "gsde": (ActorCritic, "MlpPolicy", {"use_sde": True}, {"action_space": ACTION_SPACES["box"]}),
    "perceptron's Fisher": (NPG, "MlpPolicy", {"n_steps": 16, "batch_size": 32}, {}),
    "Fisher by two passes": (TRPO, "MlpPolicy", {"n_steps": 16, "batch_size": 32, **OF_BATCH_NORM}, {}),
    "Fisher in chunks": (TRPO, "MlpPolicy", {"n_steps": 16, "fisher_chunk_size": 10, **OF_BATCH_NORM}, {}),
    "penalty": (KLPenaltyPG, "MlpPolicy", {"n_steps": 16, "batch_size": 8}, {}),
    "off-policy": (OffPolicyPG, "MlpPolicy", {"train_freq": (4, "episode"), "gradient_steps": 3}, {}),
    "off-policy critic": (OffPAC, "MlpPolicy", {"learning_starts": 8, "batch_size": 8}, {}),
    "off-policy critic, box": (
        OffPAC,
        "MlpPolicy",
        {"learning_starts": 8, "batch_size": 8},
        {"action_space": ACTION_SPACES["box"]},
    ),
    "image": (ActorCritic, "CnnPolicy", {"n_steps": 4}, {"observation_space": OBSERVATION_SPACES["image"]}),
    "dict": (ActorCritic, "MultiInputPolicy", {"n_steps": 4}, {"observation_space": OBSERVATION_SPACES["dict"]}),
}


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    th.compiler.reset()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Compile without a C++ compiler, by the same steps but the last; what is called is noted."""
    noted: list[Any] = []
    compile_ = th.compile

    def traced(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        noted.append(function)
        compiled: Callable[..., Any] = compile_(function, backend="aot_eager", dynamic=True)
        return compiled

    monkeypatch.setattr(th, "compile", traced)
    return noted


def learn(case: str, **kwargs: Any) -> BaseAlgorithm:
    cls, policy, settings, spaces = CASES[case]
    env = vec(ScriptedEnv((3, 5), (False, True), **spaces), ScriptedEnv((2,), **spaces))
    model: BaseAlgorithm = cls(policy, env, **SMALL, **settings, **kwargs)
    callback = GradientDiagnosticsCallback() if isinstance(model, Reinforce | ActorCritic) else None
    return model.learn(96, callback=callback)


@pytest.mark.parametrize("case", CASES)
def test_compiled_networks_learn_the_same(case: str, calls: list[Any]) -> None:
    compiled, plain = learn(case, compile=True), learn(case)
    networks = [module for module in compiled.policy.modules() if module._compiled_call_impl is not None]
    assert len(networks) >= 2
    assert len(calls) == len(networks) + 1
    state, expected = compiled.policy.state_dict(), plain.policy.state_dict()
    assert list(state) == list(expected)
    for name in expected:
        th.testing.assert_close(state[name], expected[name], rtol=2e-3, atol=2e-4)


def test_updates_run_the_compiled_networks_and_acting_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counting(graph: Callable[..., Any], _: Any) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            sizes.append(max(len(x) for x in arguments if isinstance(x, th.Tensor)))
            return graph(*arguments)

        return run

    compile_ = th.compile
    monkeypatch.setattr(th, "compile", lambda function, **_: compile_(function, backend=counting))
    model = ActorCritic("MlpPolicy", vec(ScriptedEnv((3, 5)), ScriptedEnv((2,))), n_steps=50, compile=True, **SMALL)
    sizes.clear()
    model.learn(100)
    assert sizes
    assert min(sizes) >= 100  # the batch, never the two envs' observations


def test_a_saved_model_is_compiled_again(calls: list[Any], tmp_path: Path) -> None:
    model = learn("segments", compile=True)
    model.save(tmp_path / "model")
    n_calls = len(calls)
    loaded = ActorCritic.load(tmp_path / "model", env=model.get_env())
    assert loaded.compile
    assert len(calls) == 2 * n_calls
    uncompiled = ActorCritic.load(tmp_path / "model", compile=False)
    assert all(module._compiled_call_impl is None for module in uncompiled.policy.modules())
    for mine, theirs in zip(loaded.policy.parameters(), uncompiled.policy.parameters(), strict=True):
        assert th.equal(mine, theirs)


def test_without_a_compiler_it_says_so_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> Any:
        raise FileNotFoundError("no C++ compiler")

    monkeypatch.setattr(th, "compile", fail)
    with pytest.raises(RuntimeError, match=r"compile=True takes .* 'cpu', a C\+\+ compiler .*: no C\+\+ compiler"):
        Reinforce("MlpPolicy", vec(ScriptedEnv()), compile=True, **SMALL)
    with pytest.raises(TypeError, match="compile must be bool"):
        Reinforce("MlpPolicy", vec(ScriptedEnv()), compile="yes", **SMALL)


@pytest.mark.skipif(shutil.which("g++") is None, reason="takes a C++ compiler")
def test_with_the_real_compiler() -> None:
    compiled, plain = learn("plain", compile=True), learn("plain")
    for mine, theirs in zip(compiled.policy.parameters(), plain.policy.parameters(), strict=True):
        th.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-4)
