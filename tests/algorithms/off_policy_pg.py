"""Small models of OffPolicyPG, and episodes with given importance ratios."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import obs_as_tensor

from sb3_pg import OffPolicyPG
from sb3_pg.policies import policy_actions
from sb3_pg.rollout import Trajectory
from tests.helpers import (
    ACTION_SPACES,
    OBSERVATION_SPACES,
    ScriptedEnv,
    vec,
)


def envs(n_envs: int = 1, observations: str = "vector", actions: str = "discrete", **kwargs: Any) -> Any:
    """Episodes of unequal length, every other one truncated."""
    made = []
    for i in range(n_envs):
        own = copy.deepcopy((OBSERVATION_SPACES[observations], ACTION_SPACES[actions]))  # each with its own generator
        lengths, truncate = kwargs.get("lengths", (3, 1, 5, 2)), kwargs.get("truncate", (False, True))
        made.append(ScriptedEnv(lengths, truncate, 0.5 * i - 4, *own))
    return vec(*made)


def make(env: Any, policy: str = "MlpPolicy", cls: Any = OffPolicyPG, **kwargs: Any) -> Any:
    defaults = {"seed": 0, "device": "cpu", "policy_kwargs": {"net_arch": [8]}, "n_critic_updates": 2}
    return cls(policy, env, **{**defaults, **kwargs})


def log_prob(policy: Any, observations: Any, actions: np.ndarray) -> Any:
    """Of stored actions, by SB3's own method."""
    taken = policy_actions(th.as_tensor(actions), policy.action_space)
    with th.no_grad():
        return policy.evaluate_actions(obs_as_tensor(observations, policy.device), taken)[1].numpy()


def rows(model: Any, name: str) -> Any:
    """What the replay buffer holds, from the first step on."""
    buffer = model.replay_buffer
    assert not buffer.full
    array = getattr(buffer, name)
    return {key: x[: buffer.pos, 0] for key, x in array.items()} if isinstance(array, dict) else array[: buffer.pos, 0]


def stored_rewards(model: Any) -> list[list[float]]:
    buffer = model.replay_buffer
    return [buffer.rewards[t.start : t.start + t.length, 0].tolist() for t in buffer.trajectories]


class Watch(BaseCallback):
    """Does something at the start of training, of every rollout, and after every step."""

    def __init__(self, **acts: Callable[[Any], Any]) -> None:
        super().__init__()
        self.acts = acts

    def _act(self, when: str) -> Any:
        return self.acts[when](self) if when in self.acts else None

    def _on_training_start(self) -> None:
        self._act("training")

    def _on_rollout_start(self) -> None:
        self._act("rollout")

    def _on_step(self) -> bool:
        return self._act("step") is not False


def consecutive(model: Any, length: int) -> bool:
    """Whether all stored episodes are whole: ScriptedEnv counts its rewards."""
    found = stored_rewards(model)
    return bool(found) and all(r == [r[0] + i for i in range(length)] for r in found)


def with_ratios(model: Any, *episodes: list[float], seed: int = 0) -> list[Trajectory]:
    """Logged episodes whose steps have these importance ratios under the model's policy."""
    model.observation_space.seed(seed)
    model.action_space.seed(seed)
    found = []
    for ratios in episodes:
        observations = np.stack([model.observation_space.sample() for _ in ratios])
        actions = np.stack([model.action_space.sample() for _ in ratios])
        log_probs = log_prob(model.policy, observations, actions) - np.log(ratios)
        found.append(Trajectory(observations, actions, np.arange(1.0, len(ratios) + 1), log_probs, True))
    return found


def trained(model: Any, gradient_steps: int = 1, batch_size: int | None = None) -> dict[str, Any]:
    """What training without collecting logs."""
    model.set_logger(Logger(None, []))
    model.train(gradient_steps, batch_size)
    return dict(model.logger.name_to_value)
