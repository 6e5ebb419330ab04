"""What is done to the policy object counts: replaced methods, hooks, replaced layers, ``torch.compile``."""

import types
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import A2C, SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from sb3_pg import NPG, TRPO, ActorCritic, KLPenaltyPG, OffPAC, OffPolicyPG, Reinforce
from sb3_pg.callbacks import GradientDiagnosticsCallback
from tests.helpers import ACTION_SPACES, ActingPolicy, ScriptedEnv, parameters, rollout_of, vec

ON_POLICY: dict[Any, dict[str, Any]] = {
    Reinforce: {"n_episodes": 4},
    ActorCritic: {"n_steps": 8},
    NPG: {"n_steps": 16, "batch_size": 16, "n_critic_updates": 2},
    TRPO: {"n_steps": 16, "batch_size": 16, "n_critic_updates": 2},
    KLPenaltyPG: {"n_steps": 16, "batch_size": 16, "n_epochs": 2, "n_critic_updates": 2},
    OffPolicyPG: {"train_freq": (4, "episode"), "gradient_steps": 2},
}
SETTINGS: dict[Any, dict[str, Any]] = {**ON_POLICY, OffPAC: {"learning_starts": 0, "batch_size": 8}}
all_classes = pytest.mark.parametrize("cls", SETTINGS)
of_actor_critic_policies = pytest.mark.parametrize("cls", ON_POLICY)


def make_env(space: str = "discrete") -> Any:
    env = vec(*(ScriptedEnv(lengths, action_space=ACTION_SPACES[space]) for lengths in ((3, 5), (4,))))
    env.seed(0)
    return env


def make(cls: Any, space: str = "discrete", policy: Any = "MlpPolicy", **kwargs: Any) -> Any:
    return cls(policy, make_env(space), **{"seed": 0, "device": "cpu", **SETTINGS[cls], **kwargs})


class Watch(BaseCallback):
    """Keeps what was done, and calls a function at the end of a rollout.

    :param changes: number of the rollout -> the function, of the model
    """

    def __init__(self, changes: Mapping[int, Callable[[Any], object]] | None = None) -> None:
        super().__init__()
        self.changes, self.rollouts = changes or {}, 0
        self.actions: list[Any] = []

    def _on_step(self) -> bool:
        self.actions.append(np.array(self.locals["actions"]))
        return True

    def _on_rollout_end(self) -> None:
        self.rollouts += 1
        self.changes.get(self.rollouts, lambda _: None)(self.model)


# ---------------------------------------------------------------- methods of the policy


def masked_head(policy: Any, latent_pi: th.Tensor) -> Any:
    logits = policy.action_net(latent_pi)
    return policy.action_dist.proba_distribution(logits.index_fill(1, th.tensor([0]), -1e8))


def mask_head(model: Any) -> None:
    model.policy._get_action_dist_from_latent = types.MethodType(masked_head, model.policy)


def impossible_head(policy: Any, latent_pi: th.Tensor) -> Any:
    logits = policy.action_net(latent_pi)
    return policy.action_dist.proba_distribution(logits.index_fill(1, th.tensor([0]), -th.inf))


def mask_head_with_infinity(model: Any) -> None:
    model.policy._get_action_dist_from_latent = types.MethodType(impossible_head, model.policy)


def mask_head_by_a_closure(model: Any) -> None:
    policy = model.policy
    policy._get_action_dist_from_latent = lambda latent_pi: masked_head(policy, latent_pi)


def mask_layer(model: Any) -> None:
    head = model.policy.action_net
    model.handle = head.register_forward_hook(lambda _, __, x: x.index_fill(1, th.tensor([0]), -1e8))


def mask_layer_by_its_forward(model: Any) -> None:
    head = model.policy.action_net
    head.forward = lambda x: nn.functional.linear(x, head.weight, head.bias).index_fill(1, th.tensor([0]), -1e8)


def mask_distribution(model: Any) -> None:
    distribution = model.policy.action_dist
    original = distribution.proba_distribution
    distribution.proba_distribution = lambda action_logits: original(action_logits.index_fill(1, th.tensor([0]), -1e8))


class Masked(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: th.Tensor) -> th.Tensor:
        logits: th.Tensor = self.head(x)
        return logits.index_fill(1, th.tensor([0]), -1e8)


def wrap_layer(model: Any) -> None:
    model.policy.action_net = Masked(model.policy.action_net)


class MaskedDistribution(CategoricalDistribution):
    def proba_distribution(self, action_logits: th.Tensor) -> Any:
        return super().proba_distribution(action_logits.index_fill(1, th.tensor([0]), -1e8))


def replace_distribution(model: Any) -> None:
    model.policy.action_dist = MaskedDistribution(3)


MASKS = [
    mask_head,
    mask_head_by_a_closure,
    mask_layer,
    mask_layer_by_its_forward,
    mask_distribution,
    mask_head_with_infinity,
    wrap_layer,
    replace_distribution,
]


class LogProbs(Watch):
    """Compares the log-probs that are stored with the policy's."""

    def __init__(self) -> None:
        super().__init__()
        self.compared = 0

    def _on_rollout_end(self) -> None:
        super()._on_rollout_end()
        model: Any = self.model
        buffer: Any
        if isinstance(model, OffPolicyPG):
            buffer = model.replay_buffer
            newest = [t for t in buffer.trajectories if t.group == buffer.trajectories[-1].group]
            rows: Any = np.concatenate([np.arange(t.start, t.start + t.length) for t in newest])
        else:
            buffer = model.rollout_buffer
            rows = buffer.mask
        obs, actions, log_probs = (
            th.as_tensor(x[rows]) for x in (buffer.observations, buffer.actions, buffer.log_probs)
        )
        policy: Any = model.policy
        with th.no_grad():
            expected = policy.get_distribution(obs.reshape(-1, 3)).log_prob(actions.flatten())
        assert th.allclose(expected, log_probs.flatten(), atol=1e-5)
        assert (expected > -1e3).all()
        self.compared += len(expected)


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.__name__)
@of_actor_critic_policies
def test_a_mask_holds_in_training(cls: Any, mask: Callable[[Any], None]) -> None:
    model = make(cls)
    mask(model)
    before = parameters(model.policy)
    watch = LogProbs()
    model.learn(96, callback=watch)
    actions = np.concatenate(watch.actions)
    assert set(actions) == {1, 2}
    assert model._n_updates > 1
    assert not th.equal(before, parameters(model.policy))
    assert parameters(model.policy).isfinite().all()
    assert watch.compared > 50


@pytest.mark.parametrize("mask", [mask_head, mask_layer], ids=lambda mask: mask.__name__)
@of_actor_critic_policies
def test_a_mask_counts_from_the_rollout_that_follows_and_as_long_as_it_stands(
    cls: Any, mask: Callable[[Any], None]
) -> None:
    def unmask(model: Any) -> None:
        if mask is mask_layer:
            model.handle.remove()
        else:
            del model.policy._get_action_dist_from_latent

    class Actions(Watch):
        def _on_rollout_start(self) -> None:
            self.actions.append([])

        def _on_step(self) -> bool:
            self.actions[-1].extend(self.locals["actions"])
            return True

    kwargs: dict[str, Any] = {} if cls is not ActorCritic else {"n_steps": 20}
    model = make(cls, **kwargs)
    watch = Actions({2: mask, 4: unmask})
    model.learn(1000 if cls is OffPolicyPG else 400, callback=watch)
    assert watch.rollouts >= 6
    seen = [0 in actions for actions in watch.actions]
    assert seen[:6] == [True, True, False, False, True, True]


@of_actor_critic_policies
def test_a_mask_that_is_set_within_a_rollout_counts_from_the_next(cls: Any) -> None:
    class InAStep(Watch):
        def _on_rollout_start(self) -> None:
            self.actions.append([])

        def _on_step(self) -> bool:
            self.actions[-1].extend(self.locals["actions"])
            if self.n_calls == 5:
                mask_head(self.model)
            return True

    model, watch = make(cls), InAStep()
    model.learn(96, callback=watch)
    assert 0 in watch.actions[0]
    assert set(np.concatenate(watch.actions[1:])) == {1, 2}


def test_masks_between_two_calls_of_learn() -> None:
    model = make(ActorCritic)
    for mask, expected in ((None, {0, 1, 2}), (mask_head, {1, 2}), (None, {0, 1, 2})):
        vars(model.policy).pop("_get_action_dist_from_latent", None)
        if mask is not None:
            mask(model)
        watch = Watch()
        model.learn(64, callback=watch)
        assert set(np.concatenate(watch.actions)) == expected


# ---------------------------------------------------------------- as A2C


def noisy_forward(policy: Any, obs: Any, deterministic: bool = False) -> Any:
    actions, values, log_prob = type(policy).forward(policy, obs, deterministic)
    return actions.roll(1), values + 0.5, log_prob - 1


def scaled_evaluation(policy: Any, obs: Any, actions: th.Tensor) -> Any:
    values, log_prob, entropy = type(policy).evaluate_actions(policy, obs, actions)
    return values * 2, log_prob * 3, entropy


def halved_features(policy: Any, obs: Any, features_extractor: Any = None) -> Any:
    return type(policy).extract_features(policy, obs, features_extractor) * 0.5


def sharper_head(policy: Any, latent_pi: th.Tensor) -> Any:
    distribution = policy.action_dist
    return distribution.proba_distribution(policy.action_net(latent_pi * (3 if policy.training else 4)))


def values_of_hundred(policy: Any, obs: Any) -> th.Tensor:
    values: th.Tensor = type(policy).predict_values(policy, obs)
    return values * 0 + 100


def always_training(policy: Any, _: bool) -> None:
    type(policy).set_training_mode(policy, True)


def bind(name: str, function: Callable[..., Any]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        setattr(model.policy, name, types.MethodType(function, model.policy))

    change.__name__ = name
    return change


class ModeDependent(nn.Module):
    def forward(self, x: th.Tensor) -> th.Tensor:
        return x * 2 if self.training else x


def mode_of_the_policy(model: Any) -> None:
    """A network that depends on the mode, and a policy that never leaves training."""
    model.policy.mlp_extractor.policy_net.append(ModeDependent())
    bind("set_training_mode", always_training)(model)


def mode_of_a_part(model: Any) -> None:
    model.policy.mlp_extractor.policy_net.append(ModeDependent())
    layer = model.policy.mlp_extractor.policy_net[-1]
    layer.train = lambda _=True: nn.Module.train(layer, True)


def part(path: str, name: str = "forward", factor: float = 1.5) -> Callable[[Any], None]:
    """Multiplies what a submodule's method returns."""

    def change(model: Any) -> None:
        module = model.policy.get_submodule(path)
        original = getattr(module, name)

        def scaled(*args: Any) -> Any:
            result = original(*args)
            return tuple(x * factor for x in result) if isinstance(result, tuple) else result * factor

        setattr(module, name, scaled)

    change.__name__ = f"{path}.{name}"
    return change


def distribution_method(name: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        distribution = model.policy.action_dist
        original = getattr(distribution, name)
        setattr(distribution, name, lambda *args, **kwargs: original(*args, **kwargs) * 0.5)

    change.__name__ = f"distribution.{name}"
    return change


def draw_first(model: Any) -> None:
    model.policy.action_dist.sample = lambda: th.zeros(2).long()


def bound_to_the_distribution(model: Any) -> None:
    def log_prob(distribution: Any, actions: th.Tensor) -> th.Tensor:
        log_prob: th.Tensor = type(distribution).log_prob(distribution, actions)
        return log_prob * 2

    model.policy.action_dist.log_prob = types.MethodType(log_prob, model.policy.action_dist)


class Sharper(CategoricalDistribution):
    def proba_distribution(self, action_logits: th.Tensor) -> Any:
        return super().proba_distribution(action_logits * 4)


def new_distribution(model: Any) -> None:
    model.policy.action_dist = Sharper(2)


def new_head(model: Any) -> None:
    head = nn.Linear(64, model.policy.action_net.out_features)
    nn.init.constant_(head.weight, 0.01)
    nn.init.constant_(head.bias, 0.5)
    model.policy.action_net = head


def new_head_in_the_optimizer(model: Any) -> None:
    new_head(model)
    model.policy.optimizer.add_param_group({"params": list(model.policy.action_net.parameters())})


def new_layer(model: Any) -> None:
    model.policy.mlp_extractor.policy_net[1] = nn.Softplus()


class Doubled(nn.Linear):
    def forward(self, x: th.Tensor) -> th.Tensor:
        return super().forward(x) * 2


def own_linear_layer(model: Any) -> None:
    layer = Doubled(64, 64)
    layer.load_state_dict(model.policy.mlp_extractor.policy_net[2].state_dict())
    model.policy.mlp_extractor.policy_net[2] = layer


def other_class(model: Any) -> None:
    model.policy.mlp_extractor.policy_net[2].__class__ = Doubled


class Delegating(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)


def delegate(model: Any) -> None:
    policy = model.policy
    for name in ("mlp_extractor", "action_net", "value_net"):
        setattr(policy, name, Delegating(getattr(policy, name)))


class Squaring(FlattenExtractor):
    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations) ** 2


def new_extractor(model: Any) -> None:
    """In one of the three places where SB3 keeps it: forward and evaluate_actions look there."""
    model.policy.features_extractor = Squaring(model.observation_space)


def new_extractor_for_the_value(model: Any) -> None:
    model.policy.vf_features_extractor = Squaring(model.observation_space)


def plain_weight(model: Any) -> None:
    """A weight that is no parameter, and is replaced now and then."""
    head = model.policy.action_net
    weight = head.weight.detach() * 1.5
    del head.weight
    head.weight = weight


def parametrized(function: Callable[..., Any], path: str = "mlp_extractor.policy_net.2") -> Callable[[Any], None]:
    def change(model: Any) -> None:
        function(model.policy.get_submodule(path))

    change.__name__ = f"{getattr(function, 'func', function).__name__}.{path}"
    return change


class Half(nn.Module):
    def forward(self, x: th.Tensor) -> th.Tensor:
        return x * 0.5


def half_weight(module: nn.Module) -> None:
    parametrize.register_parametrization(module, "weight", Half())


def half(_: Any, __: Any, output: Any) -> Any:
    return tuple(x * 0.5 for x in output) if isinstance(output, tuple) else output * 0.5


def hook(path: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.handle = model.policy.get_submodule(path).register_forward_hook(half)

    change.__name__ = f"hook.{path}"
    return change


def pre_hook(path: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.policy.get_submodule(path).register_forward_pre_hook(lambda _, args: (args[0] * 0.5,))

    change.__name__ = f"pre_hook.{path}"
    return change


def noise(model: Any) -> None:
    model.policy.mlp_extractor.policy_net[1].register_forward_hook(lambda _, __, x: x + th.randn(1))


def backward_hook(model: Any) -> None:
    model.policy.action_net.register_full_backward_hook(lambda _, gradients, __: tuple(g * 0.1 for g in gradients))


def hook_on_the_policy(model: Any) -> None:
    model.handle = model.policy.register_forward_hook(lambda _, __, out: (out[0] * 0 + 1, out[1] + 1, out[2]))


def pre_hook_on_the_policy(model: Any) -> None:
    model.policy.register_forward_pre_hook(lambda _, args: (args[0] * 0,))


def compile_policy(model: Any) -> None:
    model.uncompiled = model.policy
    model.policy = th.compile(model.policy, backend="eager")


def compile_policy_in_place(model: Any) -> None:
    model.policy.compile(backend="eager")


def compile_part(*names: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for name in names:
            setattr(model.policy, name, th.compile(getattr(model.policy, name), backend="eager"))

    change.__name__ = f"compile.{names}"
    return change


def compile_part_in_place(model: Any) -> None:
    model.policy.mlp_extractor.compile(backend="eager")
    model.policy.mlp_extractor.policy_net.compile(backend="eager")
    model.policy.action_net.compile(backend="eager")


def compile_and_patch(model: Any) -> None:
    """What is written to the wrapper reaches the policy."""
    policy = model.policy
    compile_policy(model)
    model.policy._get_action_dist_from_latent = types.MethodType(sharper_head, policy)
    model.policy.evaluate_actions = types.MethodType(scaled_evaluation, policy)
    model.policy.action_net = nn.Linear(64, 2)
    assert policy.action_net is model.policy.action_net


CHANGES: list[Callable[[Any], None]] = [
    bind("forward", noisy_forward),
    bind("evaluate_actions", scaled_evaluation),
    bind("extract_features", halved_features),
    bind("_get_action_dist_from_latent", sharper_head),
    bind("predict_values", values_of_hundred),
    mode_of_the_policy,
    mode_of_a_part,
    *(part(f"mlp_extractor.{name}") for name in ("policy_net", "value_net", "policy_net.0", "value_net.3")),
    *(part("mlp_extractor", name) for name in ("forward", "forward_actor", "forward_critic")),
    *(part(name) for name in ("features_extractor", "action_net", "value_net")),
    *(distribution_method(name) for name in ("log_prob", "entropy")),
    draw_first,
    bound_to_the_distribution,
    new_distribution,
    new_head,
    new_head_in_the_optimizer,
    new_layer,
    own_linear_layer,
    other_class,
    delegate,
    new_extractor,
    new_extractor_for_the_value,
    plain_weight,
    *(parametrized(function) for function in (half_weight, spectral_norm, weight_norm)),
    *(parametrized(half_weight, path) for path in ("action_net", "value_net")),
    parametrized(parametrizations.orthogonal),
    parametrized(nn.utils.spectral_norm),
    parametrized(nn.utils.weight_norm, "action_net"),
    parametrized(partial(prune.l1_unstructured, name="weight", amount=0.5)),
    parametrized(partial(prune.random_unstructured, name="bias", amount=0.5), "value_net"),
    *(hook(path) for path in ("action_net", "value_net", "mlp_extractor", "mlp_extractor.policy_net.1")),
    *(pre_hook(path) for path in ("action_net", "value_net", "features_extractor", "mlp_extractor.value_net")),
    noise,
    backward_hook,
    hook_on_the_policy,
    pre_hook_on_the_policy,
    compile_policy,
    compile_policy_in_place,
    compile_part("mlp_extractor"),
    compile_part("action_net", "value_net", "features_extractor"),
    compile_part_in_place,
    compile_and_patch,
]


def learned(
    cls: Any, changes: Mapping[int, Callable[[Any], object]], env: str = "CartPole-v1", **kwargs: Any
) -> th.Tensor:
    """Parameters after 10 rollouts of 5 steps, with changes after some of them."""
    # without clipping: A2C counts the gradients of modules that its optimizer does not know, which nobody sets to zero
    kwargs = {"policy": "MlpPolicy", "max_grad_norm": float("inf"), "ent_coef": 0.01, **kwargs}
    model = cls(env=make_vec_env(env, 2, seed=0), seed=0, device="cpu", **kwargs)
    changes.get(0, lambda _: None)(model)
    return parameters(model.learn(100, callback=Watch(changes)).policy)


@pytest.mark.filterwarnings("ignore:Provided features_extractor", "ignore:.*weight_norm", "ignore:.*spectral_norm")
@pytest.mark.parametrize("after", [0, 4], ids=["before", "within"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_count_as_under_a2c(change: Callable[[Any], None], after: int) -> None:
    theirs, ours = (learned(cls, {after: change}) for cls in (A2C, ActorCritic))
    assert th.allclose(theirs, ours, atol=1e-5)


class OwnCall(ActorCriticPolicy):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        actions, values, log_prob = super().__call__(*args, **kwargs)
        return 1 - actions, values + 1, log_prob


def test_an_own_call_counts_as_under_a2c() -> None:
    theirs, ours = (learned(cls, {}, policy=OwnCall) for cls in (A2C, ActorCritic))
    assert th.allclose(theirs, ours, atol=1e-5)


def test_a_weight_that_is_no_parameter_may_be_replaced_at_any_time() -> None:
    theirs, ours = (learned(cls, dict.fromkeys(range(10), plain_weight)) for cls in (A2C, ActorCritic))
    assert th.allclose(theirs, ours, atol=1e-5)


def stretch_log_std(model: Any) -> None:
    log_std = model.policy.log_std.detach() + 0.2
    del model.policy.log_std
    model.policy.log_std = log_std


def test_a_log_std_that_is_no_parameter_may_be_replaced_at_any_time() -> None:
    changes = dict.fromkeys(range(10), stretch_log_std)
    theirs, ours = (learned(cls, changes, "Pendulum-v1") for cls in (A2C, ActorCritic))
    assert th.allclose(theirs, ours, atol=1e-5)


def put_back(model: Any) -> None:
    model.policy.action_net = model.heads.pop()


def take_away(model: Any) -> None:
    model.heads = [model.policy.action_net]
    new_head(model)


def test_a_layer_that_is_not_in_use_does_not_move() -> None:
    theirs, ours = (learned(cls, {3: take_away, 6: put_back}) for cls in (A2C, ActorCritic))
    assert th.allclose(theirs, ours, atol=1e-5)


UNDONE: dict[str, tuple[Callable[[Any], None], Callable[[Any], object]]] = {
    "head": (
        bind("_get_action_dist_from_latent", sharper_head),
        lambda model: delattr(model.policy, "_get_action_dist_from_latent"),
    ),
    "forward": (bind("forward", noisy_forward), lambda model: delattr(model.policy, "forward")),
    "part": (part("mlp_extractor", "forward"), lambda model: delattr(model.policy.mlp_extractor, "forward")),
    "distribution": (draw_first, lambda model: delattr(model.policy.action_dist, "sample")),
    "hook": (hook_on_the_policy, lambda model: model.handle.remove()),
    "hook on a layer": (hook("value_net"), lambda model: model.handle.remove()),
    "parametrization": (
        parametrized(half_weight, "action_net"),
        lambda model: parametrize.remove_parametrizations(model.policy.action_net, "weight"),
    ),
    "pruning": (
        parametrized(partial(prune.l1_unstructured, name="weight", amount=0.5), "action_net"),
        lambda model: prune.remove(model.policy.action_net, "weight"),
    ),
    "compiled": (compile_policy, lambda model: setattr(model, "policy", model.uncompiled)),
}


@pytest.mark.parametrize("name", UNDONE)
def test_changes_that_are_undone_count_no_more(name: str) -> None:
    change, undo = UNDONE[name]
    theirs, ours = (learned(cls, {0: change, 5: undo}) for cls in (A2C, ActorCritic))
    assert th.allclose(theirs, ours, atol=1e-5)


def new_log_std(model: Any) -> None:
    model.policy.log_std = nn.Parameter(th.full((1,), 0.7))


def constant_log_std(model: Any) -> None:
    del model.policy.log_std
    model.policy.log_std = th.full((1,), -0.3)


def parametrized_log_std(model: Any) -> None:
    parametrize.register_parametrization(model.policy, "log_std", Half())


def gaussian_head(policy: Any, latent_pi: th.Tensor) -> Any:
    distribution = policy.action_dist
    return distribution.proba_distribution(policy.action_net(latent_pi) * 2, policy.log_std - 1, latent_pi)


def pruned_log_std(model: Any) -> None:
    prune.l1_unstructured(model.policy, "log_std", amount=1)


OF_GSDE = [new_head, compile_policy, noise, bind("_get_action_dist_from_latent", gaussian_head)]
BOX_CHANGES = [
    *(
        (change, False)
        for change in (new_log_std, constant_log_std, parametrized_log_std, pruned_log_std, *OF_GSDE[:3])
    ),
    *((change, True) for change in OF_GSDE),
]


@pytest.mark.parametrize("after", [0, 4], ids=["before", "within"])
@pytest.mark.parametrize(("change", "use_sde"), BOX_CHANGES, ids=lambda x: getattr(x, "__name__", f"gSDE={x}"))
def test_changes_of_gaussian_policies_count_as_under_a2c(
    change: Callable[[Any], None], use_sde: bool, after: int
) -> None:
    theirs, ours = (learned(cls, {after: change}, "Pendulum-v1", use_sde=use_sde) for cls in (A2C, ActorCritic))
    assert th.allclose(theirs, ours, atol=1e-5)


def more_noise(policy: Any, n_envs: int = 1) -> None:
    type(policy).reset_noise(policy, n_envs)
    policy.action_dist.exploration_matrices *= 3


def test_own_noise() -> None:
    change, kwargs = bind("reset_noise", more_noise), {"use_sde": True, "sde_sample_freq": 2}
    theirs, ours = (learned(cls, {0: change}, "Pendulum-v1", **kwargs) for cls in (A2C, ActorCritic))
    assert th.allclose(theirs, ours, atol=1e-5)


# ---------------------------------------------------------------- hooks are called as often as under A2C


def calls(cls: Any, watch: Callable[[Any, Callable[..., None]], Any], **kwargs: Any) -> list[Any]:
    model = cls("MlpPolicy", make_vec_env("CartPole-v1", 2, seed=0), seed=0, device="cpu", n_steps=5, **kwargs)
    called: list[Any] = []
    handle = watch(model.policy, lambda *args: called.append(tuple(args[1][0].shape) if len(args) > 1 else None))
    try:
        model.learn(80)
    finally:
        if handle is not None:
            handle.remove()
    return called


def of_all_modules(policy: Any, call: Callable[..., None]) -> Any:
    def on_call(module: Any, args: Any, _: Any) -> None:
        if module is policy:
            call(module, args)

    return nn.modules.module.register_module_forward_hook(on_call)


def count_forward(policy: Any, call: Callable[..., None]) -> None:
    original = policy.forward

    def forward(obs: Any, deterministic: bool = False) -> Any:
        call(policy, (obs,))
        return original(obs, deterministic)

    policy.forward = forward


WATCHES: dict[str, Callable[[Any, Callable[..., None]], Any]] = {
    "hook": lambda policy, call: policy.register_forward_hook(call),
    "pre-hook": lambda policy, call: policy.register_forward_pre_hook(call),
    "hook with keywords": lambda policy, call: policy.register_forward_hook(
        lambda module, args, _, __: call(module, args), with_kwargs=True
    ),
    "hook of all modules": of_all_modules,
    "backward hook": lambda policy, call: policy.register_full_backward_hook(call),
    "forward": count_forward,
    "hook on a layer": lambda policy, call: policy.mlp_extractor.value_net[0].register_forward_hook(call),
    "pre-hook on a layer": lambda policy, call: policy.value_net.register_forward_pre_hook(call),
    "hook on the actor": lambda policy, call: policy.action_net.register_forward_hook(call),
    "backward hook on a layer": lambda policy, call: policy.value_net.register_full_backward_hook(call),
}


@pytest.mark.parametrize("name", WATCHES)
def test_hooks_are_called_as_often_as_under_a2c(name: str) -> None:
    theirs, ours = (calls(cls, WATCHES[name]) for cls in (A2C, ActorCritic))
    if name == "backward hook":
        assert theirs == ours == []  # SB3 calls the policy without gradient
        return
    rows, expected = ([shape[0] for shape in shapes if shape] for shapes in (ours, theirs))
    if name == "backward hook on a layer":  # the last is of the search for the actor's parameters
        assert len(ours) - 1 <= len(theirs) == 8
    elif "layer" in name or "actor" in name:  # the values of the last states are found for all envs at once
        assert rows.count(10) == expected.count(10) == 8
        assert rows.count(2) >= 40
    else:
        assert rows == expected == [2] * 40


@of_actor_critic_policies
def test_hooks_on_the_policy_are_called_at_every_step(cls: Any) -> None:
    model = make(cls)
    called: list[int] = []
    handle = model.policy.register_forward_hook(lambda *_: called.append(len(called)))
    model.learn(64)
    assert len(called) == model.num_timesteps / 2
    handle.remove()
    model.learn(64)
    assert len(called) < model.num_timesteps


@all_classes
def test_what_hooks_on_layers_are_given_may_be_kept(cls: Any) -> None:
    """Tensors of inference mode could not be used with gradient."""
    model = make(cls)
    kept: list[th.Tensor] = []
    modules = [module for module in model.policy.modules() if isinstance(module, nn.Linear)]
    for module in modules:
        module.register_forward_hook(lambda _, __, output: kept.append(output.detach()))
    model.learn(64)
    assert len(kept) > 10 * len(modules)
    scale = th.ones((), requires_grad=True)
    th.stack([(scale * x).pow(2).sum() for x in kept]).sum().backward()


# ---------------------------------------------------------------- torch.compile


def compile_all_parts(model: Any) -> None:
    for name, module in [*model.policy.named_children()]:
        setattr(model.policy, name, th.compile(module, backend="eager"))


def compile_all_parts_in_place(model: Any) -> None:
    for module in model.policy.children():
        module.compile(backend="eager")


def compile_networks(model: Any) -> None:
    owner = getattr(model.policy, "mlp_extractor", None)
    names: tuple[str, ...] = ("policy_net", "value_net")
    if owner is None:
        owner, names = model.policy.actor, ("latent_pi",)
    for name in names:
        setattr(owner, name, th.compile(getattr(owner, name), backend="eager"))


COMPILED = [
    compile_policy,
    compile_policy_in_place,
    compile_all_parts,
    compile_all_parts_in_place,
    compile_networks,
]


@pytest.mark.parametrize("change", COMPILED, ids=lambda change: change.__name__)
@all_classes
def test_compiled_policies_train_and_are_saved(cls: Any, change: Callable[[Any], None], tmp_path: Path) -> None:
    plain, model = make(cls).learn(64), make(cls)
    change(model)
    before = parameters(model.policy).clone()
    model.learn(64)
    assert not th.equal(before, parameters(model.policy))
    assert th.allclose(parameters(plain.policy), parameters(model.policy), atol=1e-4)
    obs = np.ones((1, 3), np.float32)
    assert np.array_equal(model.predict(obs, deterministic=True)[0], plain.predict(obs, deterministic=True)[0])
    model.save(tmp_path / "model", exclude=["uncompiled"])
    loaded = cls.load(tmp_path / "model", env=model.get_env())
    assert th.equal(parameters(loaded.policy), parameters(model.policy))
    assert type(loaded.policy) is type(plain.policy)
    loaded.learn(32)
    plain.save(tmp_path / "plain")
    model.set_parameters(tmp_path / "plain.zip")
    assert th.equal(parameters(plain.policy), parameters(model.policy))
    with th.no_grad():
        next(model.policy.parameters()).add_(1)
    model.set_parameters(plain.get_parameters())
    assert th.equal(parameters(plain.policy), parameters(model.policy))


@of_actor_critic_policies
def test_graphs_that_are_differentiated_twice(cls: Any) -> None:
    """In updates that are logged, and in natural gradients; torch's compiled graphs cannot do it by themselves."""
    plain, model = make(cls).learn(64, log_interval=1), make(cls)
    for name, module in [*model.policy.named_children()]:
        setattr(model.policy, name, th.compile(module, backend="aot_eager"))
    model.learn(64, log_interval=1)
    assert th.allclose(parameters(plain.policy), parameters(model.policy), atol=1e-4)


@pytest.mark.parametrize("cls", [Reinforce, ActorCritic, TRPO])
def test_a_method_that_is_compiled(cls: Any) -> None:
    plain, model = make(cls).learn(64, log_interval=1), make(cls)
    model.policy.evaluate_actions = th.compile(model.policy.evaluate_actions, backend="aot_eager")
    model.learn(64, log_interval=1)
    assert th.allclose(parameters(plain.policy), parameters(model.policy), atol=1e-4)


def test_a_compiled_policy_is_evaluated() -> None:
    model = make(ActorCritic)
    compile_policy(model)
    model.learn(32)
    lengths: Any
    _, lengths = evaluate_policy(model, model.get_env(), n_eval_episodes=2, warn=False, return_episode_rewards=True)
    assert len(lengths) == 2
    assert set(lengths) <= {3, 4, 5}


# ---------------------------------------------------------------- gradients of single episodes


class MaskedPolicy(ActorCriticPolicy):
    _get_action_dist_from_latent = masked_head


class ScaledPolicy(ActorCriticPolicy):
    def evaluate_actions(self, obs: Any, actions: th.Tensor) -> Any:
        values, log_prob, entropy = super().evaluate_actions(obs, actions)
        return values, log_prob * 2, entropy


def scale_evaluation(model: Any) -> None:
    policy = model.policy

    def evaluate_actions(obs: Any, actions: th.Tensor) -> Any:
        values, log_prob, entropy = type(policy).evaluate_actions(policy, obs, actions)
        return values, log_prob * 2, entropy

    policy.evaluate_actions = evaluate_actions


def mask_head_and_compile(model: Any) -> None:
    mask_head(model)
    compile_policy(model)


SAME_AS_CLASSES: dict[str, tuple[Any, Callable[[Any], None]]] = {
    "masked": (MaskedPolicy, mask_head),
    "masked layer": (MaskedPolicy, mask_layer),
    "masked and compiled": (MaskedPolicy, mask_head_and_compile),
    "compiled": ("MlpPolicy", compile_policy),
    "compiled parts": ("MlpPolicy", compile_all_parts),
    "own evaluation": (ScaledPolicy, scale_evaluation),
}


@pytest.mark.parametrize("component_wise", [False, True])
@pytest.mark.parametrize("name", SAME_AS_CLASSES)
def test_the_optimal_baseline_of_changed_policies(name: str, component_wise: bool) -> None:
    policy, change = SAME_AS_CLASSES[name]
    learned: list[th.Tensor] = []
    for used in (policy, "MlpPolicy"):
        kwargs: dict[str, Any] = {"baseline": "optimal", "baseline_kwargs": {"component_wise": component_wise}}
        model = make(Reinforce, policy=used, max_grad_norm=None, **kwargs)
        if used != policy or (policy == "MlpPolicy" and learned):
            change(model)
        learned.append(parameters(model.learn(64).policy))
    assert th.allclose(learned[0], learned[1], rtol=1e-3, atol=1e-4)


def test_the_optimal_baseline_takes_the_log_probs_of_evaluate_actions() -> None:
    """Twice the log-prob is twice the score, and the same baseline; another score is another one."""
    constants: list[float] = []

    def keep_constant(model: Any) -> None:
        rollout = rollout_of(model)
        constants.append(float((rollout.returns - rollout.advantages)[0, 0]))

    for change in (None, scale_evaluation, bind("evaluate_actions", sharper_evaluation)):
        model = make(Reinforce, baseline="optimal")
        if change is not None:
            change(model)
        model.learn(16, callback=Watch({1: keep_constant}))
    assert constants[0] == pytest.approx(constants[1], rel=1e-4)
    assert constants[0] != pytest.approx(constants[2], rel=1e-3)


def sharper_evaluation(policy: Any, obs: Any, actions: th.Tensor) -> Any:
    values, log_prob, entropy = type(policy).evaluate_actions(policy, obs, actions)
    return values, log_prob * obs[:, 0].abs(), entropy


@pytest.mark.parametrize("name", ["masked", "masked layer", "compiled", "compiled parts", "masked and compiled"])
@pytest.mark.parametrize("cls", [ActorCritic, A2C])
def test_gradient_diagnostics_of_changed_policies(cls: Any, name: str) -> None:
    policy, change = SAME_AS_CLASSES[name]
    measured: list[Any] = []
    for used in (policy, "MlpPolicy"):
        model = cls(used, make_env(), n_steps=16, seed=0, device="cpu")
        if used != policy or (policy == "MlpPolicy" and measured):
            change(model)
        callback = GradientDiagnosticsCallback()
        model.learn(64, callback=callback)
        measured.append(callback.diagnostics)
    a, b = (diagnostics.batch_variance for diagnostics in measured)
    assert float(a) > 0
    assert float(a) == pytest.approx(float(b), rel=1e-3)


@pytest.mark.parametrize("after", [0, 2])
def test_gradient_diagnostics_refuse_methods_that_score(after: int) -> None:
    model = make(ActorCritic)
    changes = {after: scale_evaluation}
    changes.get(0, lambda _: None)(model)
    with pytest.raises(ValueError, match=r"GradientDiagnosticsCallback cannot measure ActorCritic .* evaluate_actions"):
        model.learn(64, callback=[Watch(changes), GradientDiagnosticsCallback()])


# ---------------------------------------------------------------- acting on another device

ACTING = [mask_head, mask_head_by_a_closure, mask_layer, mask_layer_by_its_forward, mask_distribution]


@pytest.mark.parametrize("act_device", ["cpu", "cpu:0"])  # the second is another device, as far as they are compared
@pytest.mark.parametrize("change", [*ACTING, compile_policy], ids=lambda change: change.__name__)
@pytest.mark.filterwarnings("ignore:act_device")
def test_acting_on_another_device_takes_the_changed_policy(change: Callable[[Any], None], act_device: str) -> None:
    learned: list[th.Tensor] = []
    for device in (None, act_device):
        model = make(Reinforce, act_device=device).learn(16)  # makes a copy, which is not to be used any more
        change(model)
        watch = Watch()
        learned.append(parameters(model.learn(32, callback=watch).policy))
        assert (0 in np.concatenate(watch.actions)) == (change is compile_policy)
    assert th.allclose(learned[0], learned[1], atol=1e-6)


def test_a_hook_sees_what_acts_on_another_device() -> None:
    model = make(Reinforce, policy=ActingPolicy, act_device="cpu:0")
    called: list[Any] = []
    model.learn(16)
    assert ActingPolicy.last[0] is not model.policy
    handle = model.policy.register_forward_hook(lambda module, *_: called.append(module))
    with pytest.warns(UserWarning, match="act_device='cpu:0' has no effect while the policy has hooks"):
        model.learn(16)
    assert called
    assert all(module is model.policy for module in called)
    assert ActingPolicy.last[0] is model.policy
    handle.remove()
    model.learn(16)
    assert ActingPolicy.last[0] is not model.policy


def test_a_compiled_policy_acts_by_a_copy() -> None:
    model = make(Reinforce, policy=ActingPolicy, act_device="cpu:0")
    compile_policy(model)
    model.learn(32)
    assert type(ActingPolicy.last[0]) is ActingPolicy
    assert ActingPolicy.last[0] is not model.uncompiled


# ---------------------------------------------------------------- OffPAC, beside SAC

BOX = ("", "actor", "critic", "critic_target", "critic.qf0", "critic_target.qf1")


def calls_of_parts(cls: Any, names: tuple[str, ...], kind: str) -> dict[str, int]:
    model = cls("MlpPolicy", make_env("box"), seed=0, device="cpu", learning_starts=0, batch_size=8)
    counted = dict.fromkeys(names, 0)

    def count(*_: Any, name: str) -> None:
        counted[name] += 1

    for name in names:
        getattr(model.policy.get_submodule(name), f"register_forward_{kind}")(partial(count, name=name))
    model.learn(40)
    return counted


@pytest.mark.parametrize("kind", ["hook", "pre_hook"])
@pytest.mark.parametrize("names", [BOX, ("actor.latent_pi", "actor.mu")], ids=["calls", "layers"])
def test_hooks_of_offpac_are_called_as_often_as_under_sac(names: tuple[str, ...], kind: str) -> None:
    theirs, ours = (calls_of_parts(cls, names, kind) for cls in (SAC, OffPAC))
    assert theirs == ours
    assert sum(ours.values()) > 40


def masked_distribution(actor: Any, obs: Any) -> Any:
    logits = actor.logits(actor.latent_pi(actor.extract_features(obs, actor.features_extractor)))
    return CategoricalDistribution(3).proba_distribution(logits.index_fill(1, th.tensor([0]), -1e8))


def mask_actors_distribution(model: Any) -> None:
    model.policy.actor.distribution = types.MethodType(masked_distribution, model.policy.actor)


def mask_actors_distribution_through_a_wrapper(model: Any) -> None:
    compile_policy(model)
    mask_actors_distribution(model)


def mask_logits(model: Any) -> None:
    model.policy.actor.logits.register_forward_hook(lambda _, __, x: x.index_fill(1, th.tensor([0]), -1e8))


def wrap_logits(model: Any) -> None:
    model.policy.actor.logits = Masked(model.policy.actor.logits)


@pytest.mark.parametrize(
    "mask",
    [mask_actors_distribution, mask_actors_distribution_through_a_wrapper, mask_logits, wrap_logits],
    ids=lambda mask: mask.__name__,
)
@pytest.mark.parametrize("actor_gradient", ["expected", "score", "importance"])
def test_a_mask_of_the_actor_holds(mask: Callable[[Any], None], actor_gradient: str) -> None:
    model = make(OffPAC, actor_gradient=actor_gradient)
    mask(model)
    before = parameters(model.policy.actor)
    watch = Watch()
    model.learn(64, callback=watch)
    buffer = model.replay_buffer
    assert set(np.concatenate(watch.actions)) == {1, 2}
    assert set(buffer.actions[: buffer.pos].flatten()) == {1, 2}
    assert (buffer.log_probs[: buffer.pos] > -5).all()
    assert not th.equal(before, parameters(model.policy.actor))
    assert parameters(model.policy).isfinite().all()


def always_one(_: Any, obs: Any, deterministic: bool = False) -> th.Tensor:
    return th.ones(len(obs)).long() * (2 if deterministic else 1)


@pytest.mark.parametrize(("owner", "name"), [("", "_predict"), ("actor", "forward")])
def test_own_ways_to_act_as_under_sac(owner: str, name: str) -> None:
    model = make(OffPAC)
    module = model.policy.get_submodule(owner)
    setattr(module, name, types.MethodType(always_one, module))
    model.learn(16)
    buffer = model.replay_buffer
    assert (buffer.actions[: buffer.pos] == 1).all()
    assert np.allclose(buffer.log_probs[: buffer.pos], np.log(1 / 3), atol=0.3)  # of the action that was taken
    delattr(module, name)
    model.learn(32)
    assert len(np.unique(buffer.actions[: buffer.pos])) == 3


def test_what_hooks_on_the_critic_return_counts() -> None:
    """Of values that are all alike, neither the critic nor the actor learns anything."""
    for space in ("discrete", "box"):
        model = make(OffPAC, space)
        for critic in (model.policy.critic, model.policy.critic_target):
            critic.register_forward_hook(lambda _, __, values: tuple(value * 0 for value in values))
        before = parameters(model.policy)
        model.learn(32)
        assert model._n_updates > 5
        assert th.equal(before, parameters(model.policy))


def half_critics(model: Any) -> None:
    for critic in (model.policy.critic, model.policy.critic_target):
        half_weight(critic.qf0[2])


PARTS: list[Callable[[Any], object]] = [
    lambda model: prune.l1_unstructured(model.policy.actor.latent_pi[0], "weight", 0.5),
    lambda model: half_weight(model.policy.actor.latent_pi[2]),
    lambda model: setattr(model.policy.actor, "latent_pi", Delegating(model.policy.actor.latent_pi)),
    half_critics,
    lambda model: setattr(model.policy, "actor", th.compile(model.policy.actor, backend="eager")),
    lambda model: setattr(model.policy, "critic", th.compile(model.policy.critic, backend="eager")),
]


@pytest.mark.parametrize("change", PARTS)
@pytest.mark.parametrize("space", ["discrete", "box"])
def test_changed_parts_of_offpac_learn(space: str, change: Callable[[Any], Any]) -> None:
    model = make(OffPAC, space)
    change(model)
    before = {name: value.clone() for name, value in model.policy.named_parameters()}
    model.learn(32)
    moved = [name for name, value in model.policy.named_parameters() if not th.equal(value, before[name])]
    assert {name.split(".")[0] for name in moved} == {"actor", "critic", "critic_target"}


def test_a_critic_whose_target_cannot_follow_is_refused() -> None:
    model = make(OffPAC, "box")
    half_weight(model.policy.critic.qf0[2])
    with pytest.raises(ValueError, match="critic_target must have parameters of the shapes"):
        model.learn(32)
