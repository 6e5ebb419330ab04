"""Compiled networks compute what the others do, in updates, and are left alone elsewhere."""

import copy
import pickle
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_pg import NPG, TRPO, ActorCritic, GradientDiagnosticsCallback, KLPenaltyPG, OffPAC, OffPolicyPG, Reinforce
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES, BatchNormExtractor, ScriptedEnv, vec

SMALL: dict[str, Any] = {"device": "cpu", "seed": 0, "learning_rate": 1e-2}
OF_BATCH_NORM: dict[str, Any] = {"policy_kwargs": {"features_extractor_class": BatchNormExtractor}}
REPLAYING: dict[str, Any] = {"learning_starts": 8, "batch_size": 8}
CASES: dict[str, tuple[Any, str, dict[str, Any], dict[str, Any]]] = {
    "plain": (ActorCritic, "MlpPolicy", {"n_steps": 8}, {}),
    "episodes": (Reinforce, "MlpPolicy", {"n_episodes": 4}, {}),
    "segments": (ActorCritic, "MlpPolicy", {"n_steps": 8, "n_critic_updates": 3, "critic_batch_size": 5}, {}),
    "optimal baseline": (Reinforce, "MlpPolicy", {"n_episodes": 4, "baseline": "optimal"}, {}),
    "optimal baseline, own layers": (Reinforce, "MlpPolicy", {"baseline": "optimal", **OF_BATCH_NORM}, {}),
    "gsde": (ActorCritic, "MlpPolicy", {"use_sde": True}, {"action_space": ACTION_SPACES["box"]}),
    "acting copy": (ActorCritic, "MlpPolicy", {"n_steps": 8, "act_device": "cpu:0", **OF_BATCH_NORM}, {}),
    "perceptron's Fisher": (NPG, "MlpPolicy", {"n_steps": 16, "batch_size": 32}, {}),
    "Fisher by two passes": (TRPO, "MlpPolicy", {"n_steps": 16, "batch_size": 32, **OF_BATCH_NORM}, {}),
    "Fisher in chunks": (
        TRPO,
        "MlpPolicy",
        {"n_steps": 16, "batch_size": 32, "fisher_chunk_size": 10, **OF_BATCH_NORM},
        {},
    ),
    "penalty": (KLPenaltyPG, "MlpPolicy", {"n_steps": 16, "batch_size": 8}, {}),
    "off-policy": (OffPolicyPG, "MlpPolicy", {"train_freq": (4, "episode"), "gradient_steps": 3}, {}),
    "off-policy critic": (OffPAC, "MlpPolicy", REPLAYING, {}),
    "off-policy critic, box": (OffPAC, "MlpPolicy", REPLAYING, {"action_space": ACTION_SPACES["box"]}),
    "image": (ActorCritic, "CnnPolicy", {"n_steps": 4}, {"observation_space": OBSERVATION_SPACES["image"]}),
    "dict": (ActorCritic, "MultiInputPolicy", {"n_steps": 4}, {"observation_space": OBSERVATION_SPACES["dict"]}),
}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Compile without a C++ compiler, by the same steps but the last; which networks have run compiled, how often."""
    counted: Counter[int] = Counter()
    compile_ = th.compile
    th.compiler.reset()

    def traced(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        number = len(counted)
        counted[number] = 0

        def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
            from torch._dynamo.backends.debugging import aot_eager  # noqa: PLC0415

            run = aot_eager(graph, inputs)

            def count(*arguments: Any) -> Any:
                counted[number] += 1
                return run(*arguments)

            return count

        whole: Callable[..., Any] = compile_(function, backend=backend)
        return whole

    monkeypatch.setattr(th, "compile", traced)
    return counted


def make(case: str, **kwargs: Any) -> BaseAlgorithm:
    cls, policy, settings, spaces_ = CASES[case]
    env = vec(ScriptedEnv((3, 5), (False, True), **spaces_), ScriptedEnv((2,), **spaces_))
    model: BaseAlgorithm = cls(policy, env, **SMALL, **settings, **kwargs)
    return model


def learn(case: str, **kwargs: Any) -> BaseAlgorithm:
    model = make(case, **kwargs)
    return model.learn(
        96, callback=GradientDiagnosticsCallback() if isinstance(model, Reinforce | ActorCritic) else None
    )


def networks(model: BaseAlgorithm) -> list[nn.Module]:
    return [module for module in model.policy.modules() if module._compiled_call_impl is not None]


def assert_alike(mine: nn.Module, theirs: nn.Module) -> None:
    state, expected = mine.state_dict(), theirs.state_dict()
    assert list(state) == list(expected)
    for name in expected:
        th.testing.assert_close(state[name], expected[name], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("case", CASES)
def test_compiled_networks_learn_the_same(case: str, runs: Counter[int]) -> None:
    model = learn(case, compile=True)
    assert len(networks(model)) == len(runs) - 1 > 0  # the first of them has tried the compiler
    unused = {  # the actor is differentiated twice, or there is no critic
        "perceptron's Fisher": 0,  # but in the line search
        "optimal baseline": 1,
        "optimal baseline, own layers": 1,
    }
    assert sum(n > 0 for n in runs.values()) >= len(runs) - unused.get(case, 0)
    assert_alike(model.policy, learn(case).policy)


class Watch(BaseCallback):
    """Whether compiled networks run between the start of a rollout and its last step."""

    def __init__(self, runs: Counter[int]) -> None:
        super().__init__()
        self.runs, self.acted = runs, False

    def _on_rollout_start(self) -> None:
        self.before = self.runs.copy()

    def _on_step(self) -> bool:
        self.acted |= self.runs != self.before
        return True


@pytest.mark.parametrize(
    "case", ["acting copy", "optimal baseline, own layers", "off-policy critic", "image", "foreign"]
)
def test_acting_runs_the_original_networks(case: str, runs: Counter[int]) -> None:
    kwargs = {"rollout_buffer_class": RolloutBuffer} if case == "foreign" else {}
    case = "plain" if case == "foreign" else case
    model = make(case, compile=True, **kwargs)
    watch = Watch(runs)
    model.learn(64, callback=watch)
    assert not watch.acted
    before = runs.copy()
    assert sum(before.values()) > 1
    evaluate_policy(model, vec(ScriptedEnv((3,), **CASES[case][3])), n_eval_episodes=2, warn=False)
    assert runs == before


def test_networks_do_not_share_what_torch_keeps(runs: Counter[int]) -> None:
    """Its limit of recompilations, and that it gives up on a function once it has found nothing in it."""
    env = vec(ScriptedEnv((3,)))
    for arch in ([16], {"pi": [], "vf": [16]}, *([n] for n in range(1, 12))):
        before = sum(runs.values())
        kwargs: dict[str, Any] = {"policy_kwargs": {"net_arch": arch}, "n_steps": 4}
        model = ActorCritic("MlpPolicy", env, compile=True, **kwargs, **SMALL).learn(16)
        n_networks = len(networks(model))
        assert n_networks == (1 if isinstance(arch, dict) else 2)
        assert sum(runs.values()) - before >= 1 + 4 * n_networks


def test_hooks_that_come_later_are_called(runs: Counter[int]) -> None:
    learned = []
    for compile_ in (True, False):
        model = make("plain", compile=compile_).learn(32)
        handle = model.policy.mlp_extractor.policy_net[1].register_forward_hook(lambda _, __, out: out * 0.1)
        before = runs[1]
        model.learn(64)
        assert runs[1] == before
        handle.remove()
        learned.append(model.learn(32).policy)
        assert (runs[1] > before) == compile_
    assert_alike(*learned)


def test_hooks_on_a_layer_that_came_later_are_called(runs: Counter[int]) -> None:
    model = make("plain", compile=True).learn(32)
    network, called = model.policy.mlp_extractor.policy_net, []
    network[1] = nn.ReLU()
    network[1].register_forward_hook(lambda *_: called.append(True))
    before = runs[1]
    model.learn(32)
    assert called
    assert runs[1] == before


class Scaled(BaseFeaturesExtractor):
    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, 4)
        self.layer = nn.Linear(observation_space.shape[0], 4)

    def forward(self, observations: th.Tensor, scale: float = 1.0) -> th.Tensor:
        features: th.Tensor = scale * self.layer(observations)
        return features


class ScalingPolicy(ActorCriticPolicy):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, features_extractor_class=Scaled, **kwargs)

    def extract_features(self, obs: Any, features_extractor: BaseFeaturesExtractor | None = None) -> Any:
        del features_extractor
        return self.features_extractor(obs, scale=2.0)


def test_networks_take_keyword_arguments(runs: Counter[int]) -> None:
    learned = [
        ActorCritic(ScalingPolicy, vec(ScriptedEnv((3,))), n_steps=8, compile=on, **SMALL).learn(32).policy
        for on in (True, False)
    ]
    assert_alike(*learned)
    assert runs[1] > 0


def test_a_saved_model_is_compiled_again(runs: Counter[int], tmp_path: Path) -> None:
    model = learn("segments", compile=True)
    model.save(tmp_path / "model")
    loaded = ActorCritic.load(tmp_path / "model", env=model.get_env())
    assert loaded.compile
    assert len(networks(loaded)) == 2
    before = sum(runs.values())
    loaded.learn(16)
    assert sum(runs.values()) > before
    assert not networks(ActorCritic.load(tmp_path / "model", compile=False))
    A2C("MlpPolicy", "CartPole-v1").save(tmp_path / "a2c")
    assert networks(ActorCritic.load(tmp_path / "a2c", compile=True))
    assert not networks(ActorCritic.load(tmp_path / "a2c"))


def test_copies_are_the_original_networks(runs: Counter[int]) -> None:
    model = learn("plain", compile=True)
    for policy in (copy.deepcopy(model.policy), pickle.loads(pickle.dumps(model.policy))):
        assert all(module._compiled_call_impl is None for module in policy.modules())
        assert_alike(policy, model.policy)
    assert runs[1] > 0


def test_a_policy_without_networks_is_told() -> None:
    with pytest.warns(UserWarning, match="compile=True has no effect: ActorCriticPolicy has no network"):
        ActorCritic("MlpPolicy", vec(ScriptedEnv()), policy_kwargs={"net_arch": []}, compile=True, **SMALL)


def test_without_a_compiler_it_says_so_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> Any:
        raise FileNotFoundError("no C++ compiler")

    monkeypatch.setattr(th, "compile", fail)
    with pytest.raises(
        RuntimeError, match=r"compile=True takes .* 'cpu', a C\+\+ compiler .* load\(\) .*: no C\+\+ comp"
    ):
        Reinforce("MlpPolicy", vec(ScriptedEnv()), compile=True, **SMALL)
    with pytest.raises(TypeError, match="compile must be bool"):
        Reinforce("MlpPolicy", vec(ScriptedEnv()), compile="yes", **SMALL)


class Noisy(Scaled):
    def forward(self, observations: th.Tensor, scale: float = 1.0) -> th.Tensor:
        return nn.functional.dropout(super().forward(observations, scale), 0.5, self.training)


@pytest.mark.skipif(shutil.which("g++") is None, reason="takes a C++ compiler")
@pytest.mark.parametrize("extractor", [None, Noisy])
def test_with_the_real_compiler(extractor: type[Noisy] | None) -> None:
    settings: dict[str, Any] = {"n_steps": 8, **SMALL}
    if extractor is not None:
        settings["policy_kwargs"] = {"features_extractor_class": extractor}
    learned = [
        ActorCritic("MlpPolicy", vec(ScriptedEnv((3,))), compile=on, **settings).learn(32).policy
        for on in (True, False)
    ]
    assert_alike(*learned)
