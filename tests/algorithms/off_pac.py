"""OffPACs on small envs, for the tests."""

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_pg import OffPAC
from sb3_pg.rollout import BehaviorReplayBuffer
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES, ScriptedEnv, policy_for, vec

NAN, INF = float("nan"), float("inf")
#: The gradients that exist for an action space.
GRADIENTS = {
    name: [
        *(["expected"] if name == "discrete" else []),
        *(["reparameterized"] if isinstance(space, spaces.Box) else []),
        "score",
        "importance",
    ]
    for name, space in ACTION_SPACES.items()
}
EVERY_GRADIENT = [(space, gradient) for space, gradients in GRADIENTS.items() for gradient in gradients]
SGD = {"optimizer_class": th.optim.SGD}


def make(env: Any, **kwargs: Any) -> OffPAC:
    """A small model."""
    observation_space = env.observation_space
    policy, policy_kwargs = policy_for(observation_space), {"net_arch": [8], **kwargs.pop("policy_kwargs", {})}
    if policy == "CnnPolicy":
        policy_kwargs["features_extractor_kwargs"] = {"features_dim": 8}
    small = {"buffer_size": 300, "learning_starts": 8, "batch_size": 8, "device": "cpu", "seed": 0}
    return OffPAC(policy, env, policy_kwargs=policy_kwargs, **{**small, **kwargs})


def envs(action_space: str, n: int = 1, observation_space: str = "vector", **kwargs: Any) -> Any:
    """Episodes of two and three steps, of which every third is truncated; rewards tell envs and steps apart."""
    arguments = {"lengths": (3, 2), "truncate": (False, False, True), **kwargs}
    arguments |= {"action_space": ACTION_SPACES[action_space]}
    arguments |= {"observation_space": OBSERVATION_SPACES[observation_space]}
    return vec(*(ScriptedEnv(first_reward=1000.0 * i + 1, **arguments) for i in range(n)))


def filled(action_space: str, n_steps: int = 40, **kwargs: Any) -> OffPAC:
    """A model with transitions to replay, whose critic, target and actor have nothing in common."""
    model = make(envs(action_space), gradient_steps=0, **kwargs).learn(n_steps)
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(0.05 * th.randn_like(parameter))
    return model


def sample(model: OffPAC, n: int = 16) -> Any:
    assert model.replay_buffer is not None
    return model.replay_buffer.sample(n)


def train_on(model: OffPAC, samples: Any) -> dict[str, Any]:
    """Take one gradient step from these transitions; what it has logged."""
    buffer: Any = model.replay_buffer
    buffer.sample = lambda *_, **__: samples
    model.train(1, len(samples.rewards))
    del buffer.sample
    return model.logger.name_to_value


def rows(q: th.Tensor) -> np.ndarray:
    return q.detach().numpy().astype(np.float64)


def stored(model: OffPAC, n_steps: int) -> tuple[th.Tensor, th.Tensor]:
    """Actions and log-probs."""
    buffer: Any = model.replay_buffer
    assert isinstance(buffer, BehaviorReplayBuffer)
    return th.as_tensor(buffer.actions[:n_steps]), th.as_tensor(buffer.log_probs[:n_steps])
