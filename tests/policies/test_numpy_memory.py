"""The samplers of policies with memory: NumPy's steps against single steps by hand, and both draw the same actions."""

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import CombinedExtractor
from torch import nn

from sb3_pg import Memory
from sb3_pg.policies import MemorySampler, NumpyMemorySampler, extended, make_sampler
from sb3_pg.policies.extended_policy import ExtendedMultiInputPolicy
from sb3_pg.policies.numpy_memory import NumpyMemory
from tests.helpers import LinearExtractor
from tests.recurrence import ByHand, layers_step, masked, packed, unpacked

N_ENVS, SIZE, N_STEPS = 3, 5, 12
CPU = th.device("cpu")
BOX = spaces.Box(-1, 1, (2, 2), np.float32)
SPACES = {"discrete": spaces.Discrete(4), "box": BOX}
kinds = pytest.mark.parametrize("kind", ["lstm", "gru"])
layers = pytest.mark.parametrize("n_layers", [1, 2])


def make_policy(memory: Memory, action_space: spaces.Space[Any], cls: Any = ActorCriticPolicy, **kwargs: Any) -> Any:
    th.manual_seed(2)
    space = kwargs.pop("observation_space", spaces.Box(-5, 5, (3,), np.float32))
    policy = extended(cls)(space, action_space, lambda _: 1e-3, memory=memory, **{"net_arch": [6], **kwargs})
    with th.no_grad():
        for parameter in policy.parameters():
            parameter.normal_(0, 0.6)
    policy.set_training_mode(False)
    return policy


def walk(seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Observations, and where episodes begin."""
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(N_ENVS, 3)).astype(np.float32), rng.random(N_ENVS) < 0.25) for _ in range(N_STEPS)]


@pytest.mark.parametrize("carried", [False, True])
@layers
@kinds
def test_steps_are_those_of_the_equations(kind: Any, n_layers: int, carried: bool) -> None:
    policy = make_policy(Memory(kind, SIZE, n_layers), SPACES["discrete"])
    rnn = policy.mlp_extractor.actor.layers
    state = tuple(th.randn(n_layers, N_ENVS, SIZE) for _ in range(2 if kind == "lstm" else 1)) if carried else None
    given = None if state is None else [part.clone() for part in state]
    memory, w = NumpyMemory(rnn, N_ENVS, state), {name: p.double() for name, p in rnn.named_parameters()}
    blank = tuple(th.zeros(n_layers, N_ENVS, SIZE) for _ in range(2 if kind == "lstm" else 1))
    own = unpacked(blank if state is None else state)
    for obs, starts in walk():
        own = layers_step(kind, th.as_tensor(obs).double(), masked(own, th.as_tensor(starts)), w)
        assert np.abs(memory(obs, starts) - own[-1][0].detach().numpy()).max() < 1e-6
        for part, expected in zip(memory.state, packed(own), strict=True):
            assert (part - expected).abs().max() < 1e-6
    if state is not None and given is not None:  # the state that was given stays as it was
        assert all(th.equal(a, b) for a, b in zip(state, given, strict=True))


def test_gates_that_saturate_do_not_overflow() -> None:
    for kind in ("lstm", "gru"):
        policy = make_policy(Memory(kind, SIZE), SPACES["discrete"])
        memory = NumpyMemory(policy.mlp_extractor.actor.layers, N_ENVS, None)
        with np.errstate(all="raise", under="ignore"):
            for sign in (1, -1, 1):
                assert np.isfinite(memory(np.full((N_ENVS, 3), sign * 1e6, np.float32), None)).all()


def test_a_state_that_was_read_stays_as_it_was() -> None:
    policy = make_policy(Memory("gru", SIZE), SPACES["discrete"])
    memory = NumpyMemory(policy.mlp_extractor.actor.layers, N_ENVS, None)
    memory(np.ones((N_ENVS, 3), np.float32), None)
    (before,) = memory.state
    kept = before.clone()
    memory(np.ones((N_ENVS, 3), np.float32), None)
    assert th.equal(before, kept)


@pytest.mark.parametrize("space", SPACES)
@layers
@kinds
def test_both_samplers_draw_the_same_actions_from_the_same_seed(kind: Any, n_layers: int, space: str) -> None:
    policy = make_policy(Memory(kind, SIZE, n_layers), SPACES[space])
    fast, slow = make_sampler(policy, CPU, N_ENVS), MemorySampler(policy, CPU, None)
    assert isinstance(fast, NumpyMemorySampler)
    drawn = []
    for sampler in (fast, slow):
        th.manual_seed(5)
        drawn.append([sampler(obs, starts) for obs, starts in walk()])
    for a, b in zip(*drawn, strict=True):
        assert a.shape == b.shape
        if space == "discrete":
            assert np.array_equal(a, b)
        else:
            assert np.abs(a - b).max() < 2e-6
    assert slow.state is not None
    for mine, theirs in zip(fast.state, slow.state, strict=True):
        assert (mine - theirs).abs().max() < 1e-6


@kinds
def test_actions_are_of_the_policys_distribution(kind: Any) -> None:
    """Frequencies of many equal envs, against probabilities by hand."""
    policy, n = make_policy(Memory(kind, SIZE), SPACES["discrete"]), 20_000
    model, own = ByHand(policy), None
    sampler = make_sampler(policy, CPU, n)
    th.manual_seed(0)
    own = model.blank(1)
    for obs, _ in walk()[:3]:
        step = model(th.as_tensor(obs[:1]), own, own)
        own = step.actor
        actions = sampler(np.repeat(obs[:1], n, 0), np.zeros(n, bool))
        expected = step.outputs.softmax(1)[0].detach().numpy()
        assert np.abs(np.bincount(actions, minlength=4) / n - expected).max() < 0.02


def test_a_state_goes_on_in_the_next_sampler() -> None:
    policy = make_policy(Memory("lstm", SIZE), SPACES["discrete"])
    steps = walk()
    for make in (make_sampler, lambda policy, device, _, state=None: MemorySampler(policy, device, state)):
        once: Any = make(policy, CPU, N_ENVS)
        twice: Any = make(policy, CPU, N_ENVS)
        th.manual_seed(1)
        expected = [once(*step) for step in steps]
        th.manual_seed(1)
        found = [twice(*step) for step in steps[:5]]
        twice = make(policy, CPU, N_ENVS, twice.state)
        found += [twice(*step) for step in steps[5:]]
        assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


class OwnHead(ActorCriticPolicy):
    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Any:
        return super()._get_action_dist_from_latent(latent_pi * 0)


def test_which_policies_step_in_numpy() -> None:
    memory = Memory("lstm", SIZE)
    discrete = SPACES["discrete"]

    def sampler(policy: Any) -> Any:
        return type(make_sampler(policy, CPU, N_ENVS))

    for cls in (nn.Tanh, nn.ReLU):
        assert sampler(make_policy(memory, discrete, activation_fn=cls)) is NumpyMemorySampler
    assert sampler(make_policy(memory, discrete, net_arch=[])) is NumpyMemorySampler
    slow = [
        make_policy(memory, discrete, activation_fn=nn.ELU),
        make_policy(memory, discrete, features_extractor_class=LinearExtractor),
        make_policy(memory, discrete, cls=OwnHead),
        make_policy(memory, spaces.MultiDiscrete([2, 3])),
        make_policy(memory, spaces.MultiBinary(3)),
        make_policy(memory, BOX, use_sde=True),
        make_policy(memory, discrete, observation_space=spaces.Discrete(3)),
        ExtendedMultiInputPolicy(spaces.Dict({"a": spaces.Box(-1, 1, (3,))}), discrete, lambda _: 1e-3, memory=memory),
        make_policy(memory, discrete).double(),
    ]
    assert isinstance(slow[-2].features_extractor, CombinedExtractor)
    for policy in slow:
        assert sampler(policy) is MemorySampler
    hooked = make_policy(memory, discrete)
    hooked.action_net.register_forward_hook(lambda *_: None)
    hooked.set_training_mode(False)
    assert sampler(hooked) is MemorySampler
    replaced = make_policy(memory, discrete)
    replaced.mlp_extractor.actor.step = replaced.mlp_extractor.actor.step
    assert sampler(replaced) is MemorySampler


@pytest.mark.filterwarnings("ignore:.*torch.compile")
def test_a_compiled_policy_remembers() -> None:
    policy = make_policy(Memory("lstm", SIZE), SPACES["discrete"])
    compiled: Any = th.compile(policy, backend="eager")
    drawn = []
    for given in (policy, compiled):
        sampler = make_sampler(given, CPU, N_ENVS)
        th.manual_seed(3)
        drawn.append([sampler(*step) for step in walk()])
    assert all(np.array_equal(a, b) for a, b in zip(*drawn, strict=True))
