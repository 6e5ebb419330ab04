"""Recurrent layers over packed sequences against single steps by hand, and what a policy with memory computes."""

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from torch.nn.utils.rnn import pack_sequence

from sb3_pg import Memory
from sb3_pg.policies import Followers, History, Sequences, extended, to_memory
from sb3_pg.policies import memory as memory_module
from sb3_pg.policies.memory import MemoryCore
from tests.recurrence import ByHand, Layers, blank, layers_step, masked, packed, unpacked

N_STEPS, N_ENVS, N_FEATURES, SIZE = 9, 5, 3, 4
CPU = th.device("cpu")
KINDS = pytest.mark.parametrize("kind", ["lstm", "gru"])
LAYERS = pytest.mark.parametrize("n_layers", [1, 2])


class Case:
    """A rollout's ends, valid steps, and which envs go on with an episode, with random observations and memory."""

    def __init__(self, seed: int, kind: str = "lstm", n_layers: int = 1, waiting: bool = True) -> None:
        rng = np.random.default_rng(seed)
        th.manual_seed(seed)
        shape = (N_STEPS, N_ENVS)
        lengths = rng.integers(1, N_STEPS + 1, N_ENVS) if waiting else np.full(N_ENVS, N_STEPS)
        lengths[0] = N_STEPS
        self.mask = np.arange(N_STEPS)[:, None] < lengths
        self.ends = (rng.random(shape) < 0.3) & self.mask
        self.continued = rng.random(N_ENVS) < 0.6
        self.continued[:2] = True, False
        self.features = th.randn(*shape, N_FEATURES).double()
        self.state = tuple(th.randn(n_layers, N_ENVS, SIZE).double() for _ in range(2 if kind == "lstm" else 1))
        self.states = {"actor": self.state}

    @property
    def sequences(self) -> Sequences:
        return Sequences.of_rollout(self.ends, self.mask, CPU, self.continued, self.states)

    @property
    def pieces(self) -> list[list[tuple[int, int]]]:
        """Steps and envs of each sequence, env by env."""
        found: list[list[tuple[int, int]]] = []
        for env in range(N_ENVS):
            begins = True
            for t in range(N_STEPS):
                if not self.mask[t, env]:
                    break
                if begins:
                    found.append([])
                found[-1].append((t, env))
                begins = bool(self.ends[t, env])
        return found

    @property
    def rows(self) -> dict[tuple[int, int], int]:
        """Step and env -> row among the valid steps."""
        return {(int(t), int(env)): row for row, (t, env) in enumerate(np.argwhere(self.mask))}

    def starts(self, t: int) -> th.Tensor:
        """Where an episode begins at a step."""
        return th.as_tensor(~self.continued if t == 0 else self.ends[t - 1])

    def select(self, x: th.Tensor) -> th.Tensor:
        return x[th.as_tensor(self.mask)]


def by_hand(
    case: Case, kind: str, w: dict[str, th.Tensor], features: th.Tensor, detach_every: int | None = None
) -> tuple[th.Tensor, list[tuple[th.Tensor, ...]]]:
    """Outputs of the valid steps, and the state after each sequence, by a loop over each sequence."""
    outputs: dict[tuple[int, int], th.Tensor] = {}
    finals = []
    for piece in case.pieces:
        first, env = piece[0]
        state: Layers = blank(kind, len(case.state[0]), 1, SIZE)
        if first == 0 and case.continued[env]:
            state = unpacked([part[:, env : env + 1] for part in case.state])
        for n, (t, env) in enumerate(piece):
            if detach_every is not None and n and n % detach_every == 0:
                state = [tuple(part.detach() for part in layer) for layer in state]
            state = layers_step(kind, features[t, env][None], state, w)
            outputs[t, env] = state[-1][0][0]
        finals.append(packed(state))
    return th.stack([outputs[place] for place in case.rows]), finals


def make_core(kind: str, n_layers: int, backprop_steps: int | None = None) -> tuple[MemoryCore, dict[str, th.Tensor]]:
    core = MemoryCore(N_FEATURES, Memory(kind, SIZE, n_layers, backprop_steps=backprop_steps)).double()  # type: ignore[arg-type]
    with th.no_grad():
        for parameter in core.parameters():
            parameter.normal_(0, 0.6)
    return core, dict(core.layers.named_parameters())


# ---------------------------------------------------------------- sequences


@pytest.mark.parametrize("seed", range(5))
def test_sequences_are_the_pieces_of_episodes(seed: int) -> None:
    case = Case(seed)
    sequences, pieces, rows = case.sequences, case.pieces, case.rows
    assert sequences.n_sequences == len(pieces)
    for i, piece in enumerate(pieces):
        for n, place in enumerate(piece):
            assert (sequences.ids[rows[place]], sequences.steps[rows[place]]) == (i, n)
    by_length = [pieces[i] for i in sequences.by_length]
    expected = pack_sequence([th.tensor([rows[place] for place in piece]) for piece in by_length])
    assert th.equal(sequences.order, expected.data)
    assert th.equal(sequences.batch_sizes, expected.batch_sizes)
    assert th.equal(sequences.order[sequences.places], th.arange(len(rows)))
    (h, _) = sequences.states["actor"]
    for i, piece in enumerate(pieces):
        first, env = piece[0]
        goes_on = first == 0 and case.continued[env]
        assert th.equal(h[:, i], case.state[0][:, env] if goes_on else th.zeros(1, SIZE).double())


def test_without_a_memory_all_sequences_begin_with_nothing() -> None:
    case = Case(0)
    for sequences in (
        Sequences.of_rollout(case.ends, case.mask, CPU),
        Sequences.of_rollout(case.ends, case.mask, CPU, case.continued, {}),
        Sequences.of_rollout(case.ends, case.mask, CPU, None, case.states),
    ):
        assert sequences.states == {}
        assert sequences.n_sequences == len(case.pieces)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("size", [1, 4, 7, 1000])
def test_minibatches_hold_whole_sequences_in_their_order(size: int, shuffle: bool) -> None:
    case = Case(3)
    sequences = case.sequences
    chunks = list(sequences.minibatches(size, shuffle))
    assert sorted(np.concatenate(chunks)) == list(range(len(case.rows)))
    assert all(len(chunk) >= size for chunk in chunks[:-1])
    whole = {tuple(case.rows[place] for place in piece) for piece in case.pieces}
    found = []
    for chunk in chunks:
        part = sequences.of_rows(chunk)
        (h, _), rows = part.states["actor"], np.arange(len(chunk))
        for i in range(part.n_sequences):
            here = rows[part.ids == i]
            found.append(tuple(chunk[here[np.argsort(part.steps[here])]].tolist()))
            assert th.equal(h[:, i], sequences.states["actor"][0][:, sequences.ids[found[-1][0]]])
    assert set(found) == whole
    assert len(found) == len(whole)


# ---------------------------------------------------------------- layers


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("few_rows", [0, 64])
@LAYERS
@KINDS
def test_outputs_states_and_gradients_are_those_of_single_steps(
    kind: str, n_layers: int, seed: int, few_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_module, "FEW_ROWS", few_rows)  # more blocks, or fewer
    case = Case(seed, kind, n_layers)
    core, w = make_core(kind, n_layers)
    features = case.features.requires_grad_()
    sequences = case.sequences
    inputs = case.select(features), sequences, sequences.states["actor"]
    outputs, state = core(*inputs), core.state_after(*inputs)
    assert (core._packed(*inputs)[0] - outputs).abs().max() < 1e-12  # as on the GPU
    expected, finals = by_hand(case, kind, w, features)
    assert (outputs - expected).abs().max() < 1e-12
    for i, final in enumerate(finals):
        for part, own in zip(state, final, strict=True):
            assert (part[:, i : i + 1] - own).abs().max() < 1e-12
    weights = th.randn_like(outputs)
    leaves = [*w.values(), features]
    found, wanted = (th.autograd.grad((x * weights).sum(), leaves, retain_graph=True) for x in (outputs, expected))
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() < 1e-11
    assert not found[-1][~th.as_tensor(case.mask)].any()  # of the padding


@pytest.mark.parametrize("k", [1, 2, 3, 100])
@LAYERS
@KINDS
def test_gradients_go_back_through_so_many_steps(kind: str, n_layers: int, k: int) -> None:
    case = Case(1, kind, n_layers)
    core, w = make_core(kind, n_layers, backprop_steps=k)
    whole, _ = make_core(kind, n_layers)
    whole.load_state_dict(core.state_dict())
    sequences, features = case.sequences, case.features.requires_grad_()
    inputs: Any = (case.select(features), sequences, sequences.states["actor"])
    outputs, state = core(*inputs), core.state_after(*inputs)
    values, after = whole(*inputs), whole.state_after(*inputs)
    assert (outputs - values).abs().max() < 1e-14
    assert all((a - b).abs().max() < 1e-14 for a, b in zip(state, after, strict=True))
    expected, _ = by_hand(case, kind, w, features, detach_every=k)
    weights, leaves = th.randn_like(outputs), [*w.values(), features]
    found, wanted = (th.autograd.grad((x * weights).sum(), leaves, retain_graph=True) for x in (outputs, expected))
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() < 1e-11
    (uncut,) = th.autograd.grad((values * weights).sum(), [features])
    assert ((found[-1] - uncut).abs().max() > 1e-3) == (k < 100)


@KINDS
def test_single_steps_of_the_layers(kind: str) -> None:
    core, w = make_core(kind, 2)
    state, own = None, blank(kind, 2, N_ENVS, SIZE)
    for _ in range(4):
        x = th.randn(N_ENVS, N_FEATURES).double()
        outputs, state = core.step(x, state)
        own = layers_step(kind, x, own, w)
        assert (outputs - own[-1][0]).abs().max() < 1e-12
        assert all((a - b).abs().max() < 1e-12 for a, b in zip(state, packed(own), strict=True))


# ---------------------------------------------------------------- policies


def make_policy(memory: Memory, action_space: spaces.Space[Any] | None = None, **kwargs: Any) -> Any:
    th.manual_seed(1)
    space = spaces.Box(-np.inf, np.inf, (N_FEATURES,), np.float32)
    chosen = {"net_arch": [5], **kwargs}
    actions = action_space or spaces.Discrete(3)
    policy = extended(ActorCriticPolicy)(space, actions, lambda _: 1e-3, memory=memory, **chosen)
    with th.no_grad():
        for parameter in policy.parameters():
            parameter.normal_(0, 0.5)
    policy.set_training_mode(False)
    return policy


@pytest.mark.parametrize("critic", ["own", "shared", "none"])
@LAYERS
@KINDS
def test_a_policys_log_probs_and_values_are_those_of_single_steps(kind: Any, n_layers: int, critic: Any) -> None:
    case = Case(2, kind, n_layers)
    other = Case(7, kind, n_layers)
    case.states = {"actor": case.state, "critic": other.state} if critic == "own" else {"actor": case.state}
    case.states = {name: tuple(part.float() for part in state) for name, state in case.states.items()}
    policy = make_policy(Memory(kind, SIZE, n_layers, critic))
    model = ByHand(policy)
    observations, actions = case.features.float(), th.randint(3, (N_STEPS, N_ENVS))
    actor = critic_state = unpacked(case.states["actor"])
    if critic == "own":
        critic_state = unpacked(case.states["critic"])
    log_probs, values = [], []
    for t in range(N_STEPS):
        step = model(observations[t], masked(actor, case.starts(t)), masked(critic_state, case.starts(t)))
        actor, critic_state = step.actor, step.critic
        log_probs.append(step.outputs.log_softmax(1)[th.arange(N_ENVS), actions[t]])
        values.append(step.values)
    history = History(case.select(observations), case.sequences)
    found_values, found_log_probs, entropies = policy.evaluate_actions(history, case.select(actions))
    expected = case.select(th.stack(log_probs)), case.select(th.stack(values))
    assert (found_log_probs - expected[0]).abs().max() < 1e-6 * (1 + expected[0].abs().max())
    assert (found_values[:, 0] - expected[1]).abs().max() < 1e-6 * (1 + expected[1].abs().max())
    assert entropies.shape == found_log_probs.shape
    distribution, alone = policy.get_distribution(history), policy.predict_values(history)
    assert th.allclose(distribution.log_prob(case.select(actions)), found_log_probs, atol=1e-6)
    assert th.allclose(alone, found_values, atol=1e-6)
    weights = th.randn(len(found_log_probs), 2).double()
    loss = (th.stack((found_log_probs, found_values[:, 0]), 1).double() * weights).sum()
    own_loss = (th.stack(expected, 1) * weights).sum()
    own = th.autograd.grad(own_loss, list(model.w.values()), materialize_grads=True)
    gradients = th.autograd.grad(loss, list(policy.parameters()), materialize_grads=True)
    for a, b in zip(gradients, own, strict=True):
        assert (a.double() - b).norm() <= 1e-5 * (1 + b.norm())


@pytest.mark.parametrize("critic", ["own", "shared", "none"])
def test_values_over_a_history_and_what_follows(critic: Any) -> None:
    """V of the observation after the last step of a sequence, with the memory as it was there."""
    case = Case(4, "gru", waiting=False)
    case.states = {name: tuple(part.float() for part in case.state) for name in ("actor", "critic")}
    policy = make_policy(Memory("gru", SIZE, critic=critic))
    last = [i for i, piece in enumerate(case.pieces) if piece[-1][0] == N_STEPS - 1]
    following = th.randn(len(last), N_FEATURES)
    history = History(case.select(case.features.float()), case.sequences)
    with th.no_grad():
        values, others, _ = policy.values_over(history, Followers(following, th.tensor(last)))
    longer = Case(4, "gru", waiting=False)
    longer.states = case.states
    ends = np.concatenate((case.ends, np.zeros((1, N_ENVS), bool)))
    ends[N_STEPS - 1] = False  # the sequences go on by one step
    mask = np.ones_like(ends)
    observations = th.cat((case.features.float(), following[None]))
    whole = Sequences.of_rollout(ends, mask, CPU, case.continued, case.states)
    with th.no_grad():
        expected = policy.predict_values(History(observations.flatten(0, 1), whole)).view(N_STEPS + 1, N_ENVS)
    assert th.allclose(values.view(N_STEPS, N_ENVS), expected[:-1], atol=1e-6)
    assert th.allclose(others, expected[-1], atol=1e-6)


def test_observations_without_history_are_first_steps() -> None:
    policy = make_policy(Memory("lstm", SIZE))
    model, obs = ByHand(policy), th.randn(6, N_FEATURES)
    step = model(obs, model.blank(6), model.blank(6))
    values, log_probs, _ = policy.evaluate_actions(obs, th.zeros(6))
    assert (log_probs - step.outputs.log_softmax(1)[:, 0]).abs().max() < 1e-6
    assert (values[:, 0] - step.values).abs().max() < 2e-6


def test_a_critic_that_shares_memory_shares_features() -> None:
    with pytest.raises(ValueError, match=r"critic='shared'.*share_features_extractor=True.*critic='own'"):
        make_policy(Memory(critic="shared"), share_features_extractor=False)


# ---------------------------------------------------------------- predict


@KINDS
def test_predict_keeps_the_contract_of_recurrent_policies(kind: Any) -> None:
    policy = make_policy(Memory(kind, SIZE, 2))
    model = ByHand(policy)
    own, state = model.blank(N_ENVS), None
    rng = np.random.default_rng(0)
    for t in range(6):
        obs = rng.normal(size=(N_ENVS, N_FEATURES)).astype(np.float32)
        starts = np.ones(N_ENVS, bool) if t == 0 else rng.random(N_ENVS) < 0.4
        actions, state = policy.predict(obs, state, starts, deterministic=True)
        step = model(th.as_tensor(obs), masked(own, th.as_tensor(starts)), own)
        own = step.actor
        assert np.array_equal(actions, step.outputs.argmax(1).numpy())
        assert state is not None
        for part, expected in zip(state, packed(own), strict=True):
            assert isinstance(part, np.ndarray)
            assert part.shape == (2, N_ENVS, SIZE)
            assert np.abs(part - expected.detach().numpy()).max() < 1e-6


def test_predict_of_one_env_takes_and_gives_no_axis_of_envs() -> None:
    policy = make_policy(Memory("lstm", SIZE), spaces.Box(-1, 1, (2,), np.float32))
    obs = np.ones(N_FEATURES, np.float32)
    action, state = policy.predict(obs, deterministic=True)
    assert action.shape == (2,)
    assert [part.shape for part in state] == [(1, 1, SIZE)] * 2
    again, _ = policy.predict(obs, state, deterministic=True)
    fresh, _ = policy.predict(obs, state, episode_start=np.array([True]), deterministic=True)
    scalar, _ = policy.predict(obs, state, episode_start=True, deterministic=True)
    assert not np.array_equal(again, action)
    assert np.array_equal(fresh, action)
    assert np.array_equal(scalar, action)


def test_predict_refuses_what_belongs_to_other_envs_or_layers() -> None:
    policy = make_policy(Memory("lstm", SIZE))
    obs = np.ones((2, N_FEATURES), np.float32)
    good = np.zeros((1, 2, SIZE), np.float32)
    for wrong in (
        (np.zeros((1, 3, SIZE)),) * 2,
        (np.zeros((1, 2, SIZE + 1)),) * 2,
        (np.zeros((2, 2, SIZE)),) * 2,
        (good,),
        (good,) * 3,
        (good, np.zeros((1, 1, SIZE))),
    ):
        with pytest.raises(ValueError, match=r"state must be a tuple .* shapes \[\(1, 2, 4\), \(1, 2, 4\)\], got"):
            policy.predict(obs, wrong)
    with pytest.raises(ValueError, match=r"episode_start must have the shape \(2,\), got \(3,\)"):
        policy.predict(obs, (good, good), episode_start=np.ones(3, bool))


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("gru", Memory("gru")),
        (Memory("lstm", 8), Memory("lstm", 8)),
        ({"kind": "gru", "n_layers": np.int64(2)}, Memory("gru", n_layers=2)),
        ({}, Memory()),
    ],
)
def test_what_means_a_memory(value: Any, expected: Any) -> None:
    assert to_memory(value) == expected


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("rnn", ValueError, r"memory must be one of \['lstm', 'gru'\], a Memory or None, got 'rnn'"),
        (3, TypeError, r"memory must be one of \['lstm', 'gru'\], a Memory or None, got 3"),
        ({"size": 3}, TypeError, r"memory must have the names \['kind', .*'backprop_steps'\], got \['size'\]"),
        ({"kind": "rnn"}, ValueError, r"memory's kind must be one of \['lstm', 'gru'\], got 'rnn'"),
        ({"kind": ["lstm"]}, ValueError, r"memory's kind must be one of"),
        ({"critic": "both"}, ValueError, r"memory's critic must be one of \['own', 'shared', 'none'\], got 'both'"),
        ({"hidden_size": 0}, ValueError, "memory's hidden_size must be a whole number of at least 1, got 0"),
        ({"n_layers": 1.5}, TypeError, "memory's n_layers must be a whole number of at least 1, got 1.5"),
        ({"n_layers": None}, TypeError, "memory's n_layers must be"),
        ({"backprop_steps": True}, TypeError, "memory's backprop_steps must be"),
        ({"backprop_steps": -1}, ValueError, "memory's backprop_steps must be"),
    ],
)
def test_what_does_not(value: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        to_memory(value)


def test_a_memory_that_a_file_has_filled_is_checked_again() -> None:
    filled = Memory.__new__(Memory)
    vars(filled).update(kind="lstm", hidden_size=-3)
    with pytest.raises(ValueError, match="hidden_size"):
        to_memory(filled)


class OwnForwardPolicy(ActorCriticPolicy):
    def forward(self, obs: Any, deterministic: bool = False) -> Any:
        return super().forward(obs, deterministic)


class OwnNetworks(ActorCriticPolicy):
    """Changes what memory does not replace."""

    def __init__(self, *args: Any, wide: int = 7, **kwargs: Any) -> None:
        self.wide = wide
        super().__init__(*args, **{**kwargs, "net_arch": [wide]})


def test_policies_of_the_users_own() -> None:
    with pytest.raises(ValueError, match=r"memory replaces the methods \['forward'\] of policy OwnForwardPolicy"):
        extended(OwnForwardPolicy)
    cls: Any = extended(OwnNetworks)
    assert cls is extended(OwnNetworks)
    assert issubclass(cls, OwnNetworks)
    policy = cls(spaces.Box(-1, 1, (3,)), spaces.Discrete(2), lambda _: 1e-3, memory="gru", wide=6)
    assert policy.action_net.in_features == 6
    assert policy.memory == Memory("gru")


def test_a_policy_alone_is_saved_and_loaded(tmp_path: Any) -> None:
    policy = make_policy(Memory("gru", SIZE, 2, "none"))
    policy.save(tmp_path / "policy.pth")
    again = type(policy).load(tmp_path / "policy.pth")
    assert again.memory == policy.memory
    obs = np.ones((2, N_FEATURES), np.float32)
    for a, b in zip(policy.predict(obs)[1], again.predict(obs)[1], strict=True):
        assert np.array_equal(a, b)
