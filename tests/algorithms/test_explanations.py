"""What an update logs of itself is computed only where a log shows it."""

from typing import Any

import pytest
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pg import ActorCritic, Reinforce


class CountingPolicy(ActorCriticPolicy):
    """Counts the forward passes, all of which extract features."""

    n_calls = 0

    def extract_features(self, *args: Any, **kwargs: Any) -> Any:
        self.n_calls += 1
        return super().extract_features(*args, **kwargs)


@pytest.mark.parametrize(
    ("cls", "kwargs"),
    [
        (Reinforce, {"baseline": "value"}),
        (ActorCritic, {}),
        (ActorCritic, {"critic_learning_rate": 1e-3, "n_critic_updates": 2}),
    ],
)
def test_only_updates_that_are_logged_pay_for_their_explanation(cls: Any, kwargs: dict[str, Any]) -> None:
    """An explanation takes forward passes: every n-th update has one with ``log_interval=n``."""
    calls: dict[Any, int] = {}
    updates = {1: 12, 2: 6, 3: 4, None: 0, "auto": 5}
    for log_interval in updates:
        model = cls(CountingPolicy, "CartPole-v1", n_steps=8, seed=0, device="cpu", **kwargs)
        model.learn(12 * 8, log_interval=log_interval)
        calls[log_interval] = model.policy.n_calls
    assert calls[3] - calls[None] >= updates[3]
    assert calls[None] < calls["auto"] < calls[2]
    assert (calls[1] - calls[3]) * (updates[2] - updates[3]) == (calls[2] - calls[3]) * (updates[1] - updates[3]) > 0
