"""What ``compile=True`` buys: the loss of one batch and its gradient, compiled and not."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gymnasium import spaces
from speed_timing import Case, KernelCase
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy

from sb3_pg.policies import compile_networks, evaluate
from sb3_pg.policies import compiled as in_update

FLAT, IMAGE = spaces.Box(-1, 1, (11,)), spaces.Box(0, 255, (4, 84, 84), dtype="uint8")


def build_compiled(
    policy_class: type[ActorCriticPolicy], space: spaces.Box, n_samples: int, seed: int
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Log-probs, entropies and values with their gradient, of two policies with the same parameters."""
    torch.manual_seed(seed)
    space.seed(seed)
    compiled, plain = (policy_class(space, spaces.Discrete(4), lambda _: 1e-3) for _ in range(2))
    plain.load_state_dict(compiled.state_dict())
    compile_networks(compiled)
    observations = torch.stack([torch.from_numpy(space.sample()) for _ in range(n_samples)])
    actions = torch.randint(4, (n_samples,))

    @in_update()
    def gradient(policy: ActorCriticPolicy) -> torch.Tensor:
        log_prob, entropy, values, *_ = evaluate(policy, observations, actions, with_values=True)
        assert entropy is not None
        assert values is not None
        loss = (log_prob + entropy + values.square()).mean()
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(policy.parameters()))])

    mine, theirs = gradient(compiled), gradient(plain)
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
    return partial(gradient, compiled), partial(gradient, plain)


def compiled_case(name: str, policy_class: type[ActorCriticPolicy], space: spaces.Box, n_samples: int) -> KernelCase:
    """One loss and its gradient."""
    build = partial(build_compiled, policy_class, space, n_samples)
    return KernelCase(f"compile-{name}-{n_samples}", "compile=True", "compile=False", build, n_samples)


CASES: tuple[Case, ...] = (
    compiled_case("mlp", ActorCriticPolicy, FLAT, 2048),
    compiled_case("cnn", ActorCriticCnnPolicy, IMAGE, 128),
)
