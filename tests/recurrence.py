"""A policy with memory by the textbook's equations, one step after the other, in double precision.

LSTM: Hochreiter and Schmidhuber (1997) with forget gates (Gers et al. 2000). GRU: Cho et al. (2014), in the variant
whose reset gate acts after the matrix product. Nothing of ``sb3_pg`` is imported here.
"""

from typing import Any, NamedTuple

import torch as th

#: h of each layer for a GRU, (h, c) of each layer for an LSTM: ``(n_sequences, hidden_size)`` each.
Layers = list[tuple[th.Tensor, ...]]


def lstm_step(x: th.Tensor, state: tuple[th.Tensor, ...], w: dict[str, th.Tensor], of: str) -> tuple[th.Tensor, ...]:
    """The next (h, c).

    :param w: parameters by name
    :param of: what comes after ``weight_ih`` in the names, such as ``_l0``
    """
    h, c = state
    gates = x @ w[f"weight_ih{of}"].T + w[f"bias_ih{of}"] + h @ w[f"weight_hh{of}"].T + w[f"bias_hh{of}"]
    i, f, g, o = gates.split(h.shape[1], 1)
    c = c / (1 + (-f).exp()) + g.tanh() / (1 + (-i).exp())
    return c.tanh() / (1 + (-o).exp()), c


def gru_step(x: th.Tensor, state: tuple[th.Tensor, ...], w: dict[str, th.Tensor], of: str) -> tuple[th.Tensor, ...]:
    """The next (h,)."""
    (h,) = state
    r_x, z_x, n_x = (x @ w[f"weight_ih{of}"].T + w[f"bias_ih{of}"]).split(h.shape[1], 1)
    r_h, z_h, n_h = (h @ w[f"weight_hh{of}"].T + w[f"bias_hh{of}"]).split(h.shape[1], 1)
    r, z = 1 / (1 + (-r_x - r_h).exp()), 1 / (1 + (-z_x - z_h).exp())
    return (h + (1 - z) * ((n_x + r * n_h).tanh() - h),)


STEPS = {"lstm": lstm_step, "gru": gru_step}


def blank(kind: str, n_layers: int, n: int, size: int) -> Layers:
    """The memory before an episode."""
    return [tuple(th.zeros(n, size).double() for _ in range(2 if kind == "lstm" else 1)) for _ in range(n_layers)]


def layers_step(kind: str, x: th.Tensor, state: Layers, w: dict[str, th.Tensor], of: str = "") -> Layers:
    """The memory after a step of all layers. The output is h of the last.

    :param of: what comes before ``weight_ih`` in the names
    """
    after: Layers = []
    named = {name.removeprefix(of): value for name, value in w.items() if name.startswith(of)}
    for i, layer in enumerate(state):
        after.append(STEPS[kind](x, layer, named, f"_l{i}"))
        x = after[-1][0]
    return after


def masked(state: Layers, starts: th.Tensor) -> Layers:
    """The memory of several sequences, 0 where an episode begins."""
    return [tuple(th.where(starts[:, None], 0.0, part) for part in layer) for layer in state]


def unpacked(state: Any) -> Layers:
    """A state of torch's layers, as this module has it."""
    return [tuple(part[i].double() for part in state) for i in range(len(state[0]))]


def packed(state: Layers) -> tuple[th.Tensor, ...]:
    """A state as torch's layers have it: ``(n_layers, n_sequences, hidden_size)`` each."""
    return tuple(th.stack(parts) for parts in zip(*state, strict=True))


class Step(NamedTuple):
    outputs: th.Tensor  # logits or means, (n, k)
    values: th.Tensor  # (n,)
    actor: Layers
    critic: Layers


class ByHand:
    """An MLP policy with memory and tanh layers.

    :param policy: with flat observations
    """

    def __init__(self, policy: Any) -> None:
        self.memory = policy.memory
        self.w = {name: p.detach().double().requires_grad_() for name, p in policy.named_parameters()}

    def blank(self, n: int) -> Layers:
        """The memory before an episode."""
        return blank(self.memory.kind, self.memory.n_layers, n, self.memory.hidden_size)

    def __call__(self, obs: th.Tensor, actor: Layers, critic: Layers) -> Step:
        """One step of several sequences."""
        kind, at, obs = self.memory.kind, "mlp_extractor", obs.double().flatten(1)
        actor = layers_step(kind, obs, actor, self.w, f"{at}.actor.layers.")
        x = self._net(actor[-1][0], "policy")
        if self.memory.critic == "own":
            critic = layers_step(kind, obs, critic, self.w, f"{at}.critic.layers.")
            seen = critic[-1][0]
        elif self.memory.critic == "shared":
            critic = actor
            seen = critic[-1][0]
        else:
            seen = self._linear(obs, f"{at}.project")
        values = self._linear(self._net(seen, "value"), "value_net")
        return Step(self._linear(x, "action_net"), values[:, 0], actor, critic)

    def _linear(self, x: th.Tensor, name: str) -> th.Tensor:
        outputs: th.Tensor = x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]
        return outputs

    def _net(self, x: th.Tensor, name: str) -> th.Tensor:
        n = 0
        while f"mlp_extractor.networks.{name}_net.{n}.weight" in self.w:
            x = self._linear(x, f"mlp_extractor.networks.{name}_net.{n}").tanh()
            n += 2
        return x
