"""Memory: recurrent layers between a policy's features and its networks, run over whole sequences at once."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch as th
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from sb3_pg.policies.observations import map_observations

#: State of recurrent layers: (h,) of a GRU, (h, c) of an LSTM, each ``(n_layers, n_sequences, hidden_size)``.
State = tuple[th.Tensor, ...]
#: "actor" and, if it has layers of its own, "critic" -> state
States = Mapping[str, State]

_LAYERS: dict[str, type[nn.LSTM | nn.GRU]] = {"lstm": nn.LSTM, "gru": nn.GRU}
_CRITICS = ("own", "shared", "none")


@dataclass(frozen=True)
class Memory:
    r"""Recurrent layers of a policy.

    .. math:: m_t = f(m_{t-1}, x(o_t)), \qquad a_t \sim \pi(\cdot | m_t), \qquad V(m_t)

    x are the features of the observation :math:`o_t`, and m is 0 before an episode's first step. Source: Hochreiter and
    Schmidhuber (1997) for the LSTM, Cho et al. (2014) for the GRU; Wierstra et al. (2010) for their policy gradient. On
    the CPU, torch runs an LSTM 1.4 to 3.7 times as fast as a GRU, depending on the number of steps and sequences.

    :param kind: "lstm" or "gru"
    :param hidden_size: units per layer
    :param n_layers: number of layers, each on top of the other
    :param critic: "own": the critic has recurrent layers of its own; "shared": it sees the actor's; "none": it sees the
        present observation alone
    :param backprop_steps: steps through which gradients go back; None for the whole sequence
    :raises ValueError: an argument is out of range
    :raises TypeError: an argument is of the wrong type
    """

    kind: Literal["lstm", "gru"] = "lstm"
    hidden_size: int = 64
    n_layers: int = 1
    critic: Literal["own", "shared", "none"] = "own"
    backprop_steps: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("kind", tuple(_LAYERS)), ("critic", _CRITICS)):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"memory's {name} must be one of {list(allowed)}, got {value!r}")
        for name in ("hidden_size", "n_layers", "backprop_steps"):
            value = getattr(self, name)
            if value is None and name == "backprop_steps":
                continue
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise TypeError(f"memory's {name} must be a whole number of at least 1, got {value!r}")
            if value < 1:
                raise ValueError(f"memory's {name} must be a whole number of at least 1, got {value!r}")
            object.__setattr__(self, name, int(value))

    @property
    def n_parts(self) -> int:
        """Number of tensors in a state: h of a GRU, h and c of an LSTM."""
        return 2 if self.kind == "lstm" else 1

    def has_layers_of(self, other: "Memory | None") -> bool:
        """Whether another memory has the same parameters.

        :param other: None for no memory
        """
        return other is not None and replace(self, backprop_steps=None) == replace(other, backprop_steps=None)


def to_memory(value: Any) -> Memory | None:
    """Return the memory that the argument ``memory`` of an algorithm means.

    :param value: "lstm", "gru", a :class:`Memory`, a dict of its arguments, or None
    :raises ValueError: it is another text, or a dict with a value out of range
    :raises TypeError: it is of another type, or a dict with an unknown name
    """
    if value is None:
        return None
    if isinstance(value, Memory):
        return Memory(**vars(value))  # checks it again: a file may have filled it
    if isinstance(value, str):
        if value not in _LAYERS:
            raise ValueError(f"memory must be one of {list(_LAYERS)}, a Memory or None, got {value!r}")
        return Memory(value)  # type: ignore[arg-type]  # checked above
    if isinstance(value, dict):
        unknown = sorted(map(str, value.keys() - vars(Memory()).keys()))
        if unknown:
            raise TypeError(f"memory must have the names {list(vars(Memory()))}, got {unknown}")
        return Memory(**value)
    raise TypeError(f"memory must be one of {list(_LAYERS)}, a Memory or None, got {value!r}")


# ---------------------------------------------------------------- sequences


class Sequences:
    """Which rows of a batch follow each other, in the order in which torch's recurrent layers take them.

    A packed batch is one tensor without padding: the first step of all sequences, the second step of all that have one,
    and so on; longer sequences come first (:class:`~torch.nn.utils.rnn.PackedSequence`). The GPU is fast with it. On
    the CPU, torch is several times faster where all sequences have one length. There the time is cut into blocks, and
    sequences that end within a block are padded to its end.

    :param ids: number of each row's sequence, from 0, ``(n_rows,)``
    :param steps: index of each row within its sequence, ``(n_rows,)``
    :param device: device of the rows
    :param states: the memory before each sequence's first step; a part that is missing is 0
    """

    def __init__(self, ids: np.ndarray, steps: np.ndarray, device: th.device, states: States | None = None) -> None:
        self.ids, self.steps, self.device, self.states = ids, steps, device, dict(states or {})
        lengths = np.bincount(ids)
        by_length = np.argsort(-lengths, kind="stable")
        ranks = np.empty_like(by_length)
        ranks[by_length] = np.arange(len(by_length))
        order = np.lexsort((ranks[ids], steps))
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        self.n_sequences = len(lengths)
        #: on the CPU, where torch wants it: number of sequences that have a first step, a second one, ...
        self.batch_sizes = th.from_numpy(np.bincount(steps))
        self.packed_rows = order
        self.order, self.places = th.as_tensor(order, device=device), th.as_tensor(places, device=device)
        self.by_length, self.ranks = th.as_tensor(by_length, device=device), th.as_tensor(ranks, device=device)
        self._blocks: dict[int | None, Blocks] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def blocks(self, every: int | None) -> "Blocks":
        """Return the blocks that the time is cut into.

        :param every: a block ends at each multiple of this number of steps; None for no such steps
        """
        if every not in self._blocks:
            self._blocks[every] = Blocks.of(self, every)
        return self._blocks[every]

    @classmethod
    def of_rollout(
        cls,
        ends: np.ndarray,
        mask: np.ndarray,
        device: th.device,
        continued: np.ndarray | None = None,
        states: States | None = None,
    ) -> "Sequences":
        """Return the episodes, and pieces of episodes, in a rollout. The rows are its valid steps.

        :param ends: ``(n_steps, n_envs)``, True where a step is the last of its episode
        :param mask: ``(n_steps, n_envs)``, True where a step is valid. In each column the valid steps come first
        :param device: device of the rows
        :param continued: ``(n_envs,)``, True where the first step goes on with an episode; None for nowhere
        :param states: memory before the rollout, one sequence per env
        """
        starts = np.ones_like(ends)
        starts[1:] = ends[:-1]
        numbers = ((starts & mask).T.cumsum() - 1).reshape(ends.shape[::-1]).T
        rows = np.arange(len(ends))[:, None]
        steps = rows - np.maximum.accumulate(np.where(starts, rows, 0), axis=0)
        found = cls(numbers[mask], steps[mask], device)
        if states and continued is not None:
            envs = np.flatnonzero(continued & mask[0])
            to, of = (th.as_tensor(index, device=device) for index in (numbers[0, envs], envs))
            for name, state in states.items():
                parts = [part.to(device) for part in state]
                blank = [part.new_zeros(len(part), found.n_sequences, part.shape[2]) for part in parts]
                found.states[name] = tuple(
                    zeros.index_copy_(1, to, part[:, of]) for zeros, part in zip(blank, parts, strict=True)
                )
        return found

    def of_rows(self, rows: np.ndarray) -> "Sequences":
        """Return the sequences of some rows.

        :param rows: numbers of all rows of some sequences
        """
        kept, ids = np.unique(self.ids[rows], return_inverse=True)
        chosen = th.as_tensor(kept, device=self.device)
        states = {name: tuple(part[:, chosen] for part in state) for name, state in self.states.items()}
        return Sequences(ids, self.steps[rows], self.device, states)

    def only(self, numbers: th.Tensor) -> "tuple[th.Tensor, Sequences, th.Tensor]":
        """Return the rows of some sequences, their :class:`Sequences`, and the place of each among these.

        :param numbers: of the sequences
        """
        wanted = numbers.cpu().numpy()
        rows = np.flatnonzero(np.isin(self.ids, wanted))
        places = np.searchsorted(np.unique(wanted), wanted)
        return th.as_tensor(rows, device=self.device), self.of_rows(rows), th.as_tensor(places, device=self.device)

    def minibatches(self, size: int, shuffle: bool) -> Iterator[np.ndarray]:
        """Yield the rows of minibatches, which hold whole sequences.

        :param size: rows per minibatch, at least, but for the last one
        :param shuffle: whether to draw the sequences in random order
        """
        order = th.randperm(self.n_sequences).numpy() if shuffle else np.arange(self.n_sequences)
        lengths = np.bincount(self.ids)
        by_sequence = np.lexsort((self.steps, self.ids))
        first = lengths.cumsum() - lengths
        chosen: list[np.ndarray] = []
        n = 0
        for i in order:
            chosen.append(by_sequence[first[i] : first[i] + lengths[i]])
            n += lengths[i]
            if n >= size:
                yield np.concatenate(chosen)
                chosen, n = [], 0
        if chosen:
            yield np.concatenate(chosen)


#: Rows of padding that a block may have in any case: a call of torch's layers takes longer than they do.
FEW_ROWS = 64


class Blocks(NamedTuple):
    """Sequences in blocks of equal length. A block has at most one row of padding for four others, and a few more.

    :param rows: the row at each place of the blocks, one block after the other, time-major; any row in the padding
    :param shapes: number of steps and of sequences of each block. The sequences of a block are the first of the block
        before it
    :param places: where each row is, ``(n_rows,)``
    """

    rows: th.Tensor
    shapes: list[tuple[int, int]]
    places: th.Tensor

    @classmethod
    def of(cls, sequences: Sequences, every: int | None) -> "Blocks":
        """Cut the time of sequences into blocks: see :meth:`Sequences.blocks`."""
        sizes, order = sequences.batch_sizes.numpy(), sequences.packed_rows
        before = np.concatenate(([0], sizes.cumsum()))
        places = np.empty_like(order)
        rows: list[np.ndarray] = []
        shapes: list[tuple[int, int]] = []
        start = n_places = 0
        while start < len(sizes):
            n_sequences = int(sizes[start])
            last = len(sizes) if every is None else min(len(sizes), (start // every + 1) * every)
            n_steps = np.arange(1, last - start + 1)
            n_valid = before[start + 1 : last + 1] - before[start]
            length = int(np.flatnonzero(n_steps * n_sequences <= 1.25 * n_valid + FEW_ROWS)[-1]) + 1
            steps = slice(start, start + length)
            valid = np.arange(n_sequences) < sizes[steps, None]
            packed = np.where(valid, before[steps, None] + np.arange(n_sequences), 0)
            rows.append(order[packed].ravel())
            places[order[packed[valid]]] = n_places + np.flatnonzero(valid)
            shapes.append((length, n_sequences))
            start, n_places = start + length, n_places + valid.size
        with th.inference_mode(False):  # autograd will use them too
            index = (th.as_tensor(array, device=sequences.device) for array in (np.concatenate(rows), places))
            return cls(next(index), shapes, next(index))


@dataclass(frozen=True)
class History:
    """Observations, and which of them follow each other: what a policy with memory computes its outputs from.

    :param observations: one row per sample, or a dict of such tensors
    :param sequences: of these rows
    """

    observations: Any
    sequences: Sequences

    def of_rows(self, rows: np.ndarray) -> "History":
        """Return the history of the rows of some sequences."""
        index = th.as_tensor(rows, device=self.sequences.device)
        return History(map_observations(lambda x: x[index], self.observations), self.sequences.of_rows(rows))

    def __getitem__(self, rows: th.Tensor) -> "list[History]":
        """Return one history per row of an index, which lists the steps of one sequence in their order.

        :param rows: ``(n_histories, longest)``. Rows after a sequence's end may be any
        """
        device, known = self.sequences.device, self.sequences.states
        ids, steps = np.zeros(rows.shape[1], dtype=np.int64), np.arange(rows.shape[1])
        found = []
        for row in rows:
            of = int(self.sequences.ids[int(row[0])])
            states = {name: tuple(part[:, of : of + 1] for part in state) for name, state in known.items()}
            observations = map_observations(lambda x, row=row: x[row], self.observations)
            found.append(History(observations, Sequences(ids, steps, device, states)))
        return found


class Followers(NamedTuple):
    """Observations that follow the last step of some sequences, in a policy with memory.

    :param observations: one row per sequence
    :param sequences: numbers of these sequences
    :param at_start: True where the observation is the first of a new episode, before which nothing is remembered; None
        for nowhere
    """

    observations: Any
    sequences: th.Tensor
    at_start: th.Tensor | None = None


# ---------------------------------------------------------------- layers


class MemoryCore(nn.Module):
    """Recurrent layers.

    :param n_features: size of their input
    :param memory: which layers
    """

    def __init__(self, n_features: int, memory: Memory) -> None:
        super().__init__()
        self.layers = _LAYERS[memory.kind](int(n_features), memory.hidden_size, memory.n_layers)
        self.backprop_steps = memory.backprop_steps

    def init_weights(self) -> None:
        """Make the weights orthogonal and the biases 0."""
        for name, parameter in self.layers.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)
            else:
                nn.init.orthogonal_(parameter)

    def forward(self, features: th.Tensor, sequences: Sequences, state: State | None) -> th.Tensor:
        """Run the layers over sequences.

        :param features: one row per step, ``(n_rows, n_features)``
        :param sequences: of these rows
        :param state: before each sequence's first step, None for 0
        :return: outputs, ``(n_rows, hidden_size)``
        """
        if features.device.type != "cpu":
            return self._packed(features, sequences, state)[0]
        rows, shapes, places = sequences.blocks(self.backprop_steps)
        present = None if state is None else tuple(part[:, sequences.by_length] for part in state)
        outputs: list[th.Tensor] = []
        n_steps = 0
        for (length, n), block in zip(shapes, features[rows].split([length * n for length, n in shapes]), strict=True):
            if n_steps:
                present = self._cut(present, n, n_steps)
            output, present = self._run(block.view(length, n, -1), present)
            outputs.append(output.flatten(0, 1))
            n_steps += length
        return th.cat(outputs)[places]

    @th.no_grad()
    def state_after(self, features: th.Tensor, sequences: Sequences, state: State | None) -> State:
        """Return the state after each sequence's last step, without gradient. The arguments are those of a call."""
        return self._packed(features, sequences, state)[1]

    def _packed(self, features: th.Tensor, sequences: Sequences, state: State | None) -> tuple[th.Tensor, State]:
        """Return outputs and the state after each sequence, from packed sequences."""
        data, sizes = features[sequences.order], sequences.batch_sizes
        present = None if state is None else tuple(part[:, sequences.by_length] for part in state)
        blocks = sizes.split(self.backprop_steps or len(sizes))
        outputs: list[th.Tensor] = []
        finals: list[State] = []
        n_steps = 0
        for block, piece in zip(blocks, data.split([int(block.sum()) for block in blocks]), strict=True):
            if present is not None and n_steps:
                n = int(block[0])
                finals.append(tuple(part[:, n:] for part in present))
                present = self._cut(present, n, n_steps)
            packed, present = self._run(PackedSequence(piece, block), present)
            outputs.append(packed.data)
            n_steps += len(block)
        assert present is not None
        finals.append(present)
        whole = [th.cat(parts[::-1], 1)[:, sequences.ranks] for parts in zip(*finals, strict=True)]
        return th.cat(outputs)[sequences.places], tuple(whole)

    def _cut(self, state: State | None, n: int, n_steps: int) -> State | None:
        """Return the state of the first n sequences; the others have ended. The gradient may stop here."""
        assert state is not None
        stops = self.backprop_steps is not None and n_steps % self.backprop_steps == 0
        return tuple((part.detach() if stops else part)[:, :n].contiguous() for part in state)

    def step(self, features: th.Tensor, state: State | None) -> tuple[th.Tensor, State]:
        """Take one step of several sequences.

        :param features: ``(n_sequences, n_features)``
        :param state: before the step, None for 0
        :return: outputs, ``(n_sequences, hidden_size)``, and the state after the step
        """
        outputs, state = self._run(features[None], state)
        return outputs[0], state

    def _run(self, features: Any, state: State | None) -> tuple[Any, State]:
        given = state if state is None or len(state) == 2 else state[0]
        with self._differentiable():
            outputs, after = self.layers(features, given)
        return outputs, after if isinstance(after, tuple) else (after,)

    def _differentiable(self) -> AbstractContextManager[Any]:
        """Return a context without cuDNN where the natural gradient is computed: it has no second derivative there."""
        if th.is_grad_enabled() and not self.training:
            return th.backends.cudnn.flags(enabled=False)
        return nullcontext()


class MemoryExtractor(nn.Module):
    """Memory, followed by a policy's networks: the ``mlp_extractor`` of a policy with memory.

    :param n_features: size of the features
    :param memory: which recurrent layers
    :param networks: SB3's ``mlp_extractor``, with ``memory.hidden_size`` inputs
    """

    def __init__(self, n_features: int, memory: Memory, networks: Any) -> None:
        super().__init__()
        self.actor = MemoryCore(n_features, memory)
        self.critic = MemoryCore(n_features, memory) if memory.critic == "own" else None
        self.project = nn.Linear(n_features, memory.hidden_size) if memory.critic == "none" else None
        self._critic_name = "actor" if self.critic is None else "critic"
        self.networks = networks
        self.latent_dim_pi, self.latent_dim_vf = networks.latent_dim_pi, networks.latent_dim_vf

    def init_weights(self) -> None:
        """Make the recurrent weights orthogonal."""
        for core in (self.actor, self.critic):
            if core is not None:
                core.init_weights()

    def forward(self, features: th.Tensor, sequences: Sequences | None = None) -> tuple[th.Tensor, th.Tensor]:
        """Return the inputs of ``action_net`` and ``value_net``. Without sequences, each row is a first step."""
        return self.both(features, features, sequences)

    def forward_actor(self, features: th.Tensor, sequences: Sequences | None = None) -> th.Tensor:
        """Return the input of ``action_net``."""
        latent: th.Tensor = self.networks.forward_actor(_remember(self.actor, features, sequences, "actor"))
        return latent

    def forward_critic(self, features: th.Tensor, sequences: Sequences | None = None) -> th.Tensor:
        """Return the input of ``value_net``."""
        if self.project is not None:
            remembered = self.project(features)
        else:
            remembered = _remember(self.critic or self.actor, features, sequences, self._critic_name)
        latent: th.Tensor = self.networks.forward_critic(remembered)
        return latent

    def both(
        self, features: th.Tensor, of_critic: th.Tensor, sequences: Sequences | None
    ) -> tuple[th.Tensor, th.Tensor]:
        """Return the inputs of ``action_net`` and ``value_net``.

        :param features: of the actor, one row per step
        :param of_critic: the critic's, same shape
        :param sequences: of these rows; without them, each row is a first step
        """
        if self.critic is not None or self.project is not None:
            return self.forward_actor(features, sequences), self.forward_critic(of_critic, sequences)
        latents: tuple[th.Tensor, th.Tensor] = self.networks(_remember(self.actor, features, sequences, "actor"))
        return latents

    def critic_state(self, features: th.Tensor, sequences: Sequences) -> State | None:
        """Return what the critic remembers after each sequence, without gradient; None if it has no memory.

        :param features: the critic's, one row per step
        :param sequences: of these rows
        """
        if self.project is not None:
            return None
        state = sequences.states.get(self._critic_name)
        return (self.critic or self.actor).state_after(features, sequences, state)

    def critic_step(self, features: th.Tensor, state: State | None) -> th.Tensor:
        """Return the input of ``value_net`` one step later.

        :param features: ``(n_sequences, n_features)``
        :param state: what the critic remembers before the step
        """
        if self.project is not None:
            remembered = self.project(features)
        else:
            remembered = (self.critic or self.actor).step(features, state)[0]
        latent: th.Tensor = self.networks.forward_critic(remembered)
        return latent


def _remember(core: MemoryCore, features: th.Tensor, sequences: Sequences | None, name: str) -> th.Tensor:
    if sequences is None:
        return core.step(features, None)[0]
    outputs: th.Tensor = core(features, sequences, sequences.states.get(name))
    return outputs
