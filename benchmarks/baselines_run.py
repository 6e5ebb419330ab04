"""One run of ``baselines.py``: training with one estimator, and the variance of all of them along the reference run.

Heavy imports live here and not in ``baselines.py``: a worker sets its thread limits before it imports this module.
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from baselines_spec import ESTIMATORS, REFERENCE, Result, Run
from learning_run import EVALUATION_SEED, FINAL_SEED, Evaluations
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from sb3_pg import ActorCritic, Reinforce
from sb3_pg.algorithms.on_policy import OnPolicyPG
from sb3_pg.functional import GradientDiagnostics, episode_gradients, gradient_diagnostics
from sb3_pg.learner.critic import ReturnScale
from sb3_pg.policies import functional_log_prob, policy_actions
from sb3_pg.rollout import RolloutBatch

PROBE_ENVS = 8


def build(run: Run, estimator: str, env: VecEnv, seed: int, **arguments: Any) -> OnPolicyPG:
    """A model with this estimator and the run's other settings."""
    settings = {name: value for name, value in run.settings if name not in ESTIMATORS[run.estimator]}
    del settings["n_envs"]
    algorithm = ActorCritic if "advantage" in ESTIMATORS[estimator] else Reinforce
    return algorithm("MlpPolicy", env, seed=seed, device="cpu", **settings | ESTIMATORS[estimator] | arguments)


@dataclass(frozen=True)
class Stop:
    """Policy and critic at one point of training."""

    share: float
    step: int
    state: dict[str, torch.Tensor]
    scale: ReturnScale  # of the critic's values

    @classmethod
    def of(cls, model: Any, share: float) -> "Stop":
        """As they are now."""
        return cls(share, model.num_timesteps, deepcopy(model.policy.state_dict()), model.learner_state.return_scale)


class Stops(BaseCallback):
    """Keep the policy as it is when the first rollout begins at or past each of these shares of the budget."""

    def __init__(self, shares: Iterable[float], budget: int) -> None:
        super().__init__()
        self.due = sorted(shares, reverse=True)
        self.budget = budget
        self.kept: list[Stop] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        while self.due and self.num_timesteps >= self.due[-1] * self.budget:
            self.kept.append(Stop.of(self.model, self.due.pop()))


class Rollouts(BaseCallback):
    """The rollout that was collected last, and the mean return of each one's episodes beside its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.means: list[tuple[int, float]] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        model: Any = self.model
        self.batch: RolloutBatch = model.rollout_batch
        rewards = self.batch.select(self.batch.rewards)
        self.means.append((self.num_timesteps, float(rewards.sum()) / self.batch.n_episodes))

    def mean_at(self, step: int) -> float:
        """Of the rollout that this step is part of."""
        return next(mean for end, mean in self.means if end >= step)


def collect(run: Run, stop: Stop, n_episodes: int, seed: int) -> RolloutBatch:
    """Complete episodes of a policy, with its critic's values."""
    env = make_vec_env(run.env, min(n_episodes, PROBE_ENVS), seed=seed)
    model = build(run, REFERENCE, env, seed, n_episodes=n_episodes, learning_rate=0.0, critic_learning_rate=0.0)
    model.policy.load_state_dict(stop.state)
    model.learner_state.return_scale = stop.scale
    rollouts = Rollouts()
    model.learn(1, rollouts)
    env.close()
    return rollouts.batch


def measure(run: Run, stop: Stop, earlier: RolloutBatch, batch: RolloutBatch) -> GradientDiagnostics:
    """The gradients of each episode under every estimator, side by side in the order of ``ESTIMATORS``.

    :param stop: the policy that collected both batches
    :param earlier: what a baseline that is fitted before its batch is fitted to
    """
    env = make_vec_env(run.env, 1)
    weights = []
    for estimator in ESTIMATORS:
        model = build(run, estimator, env, seed=0)
        model.policy.load_state_dict(stop.state)
        model.learner.estimate(earlier)
        model.learner.estimate(batch)
        weights.append(batch.select(model.learner.credit(batch)))
    env.close()
    with functional_log_prob(model.policy) as log_prob:
        return gradient_diagnostics(
            episode_gradients(
                log_prob,
                {name: parameter.detach() for name, parameter in model.learner.parameters.actor.items()},
                batch.flat_observations,
                policy_actions(batch.select(batch.actions), model.action_space),
                torch.stack(weights).float(),
                batch.select(batch.episodes),
            )
        )


def variances(run: Run, stop: Stop, seed: int) -> list[dict[str, Any]]:
    """Rows of one stop, one for each estimator."""
    earlier = collect(run, stop, dict(run.settings)["n_episodes"], seed)
    batch = collect(run, stop, run.probe_episodes, seed + 500)
    found = measure(run, stop, earlier, batch)
    common = {
        "stop": stop.share,
        "step": stop.step,
        "episodes": found.n_rows,
        "episode_length": round(len(batch.select(batch.rewards)) / found.n_rows, 2),
    }
    numbers = (x.tolist() for x in (found.total_variance, found.squared_norm, found.half_batch_cosine))
    return [
        common
        | {
            "estimator": estimator,
            "gradient_variance": f"{variance:.6g}",
            "gradient_squared_norm": f"{squared_norm:.6g}",
            "half_batch_cosine": f"{cosine:.4f}",
        }
        for estimator, variance, squared_norm, cosine in zip(ESTIMATORS, *numbers, strict=True)
    ]


def train(run: Run) -> Result:
    """Train and evaluate once; measure all estimators' variance at the run's stops."""
    torch.set_num_threads(1)
    settings = dict(run.settings)
    evaluation_env = make_vec_env(run.env, run.evaluation_episodes, seed=EVALUATION_SEED + 1000 * run.seed)
    evaluations = Evaluations(evaluation_env, run.steps, run.evaluations, run.evaluation_episodes, True, lambda _: None)
    stops = Stops([share for share in run.stops if share < 1], run.steps)
    env = make_vec_env(run.env, settings["n_envs"], seed=run.seed)
    model = build(run, run.estimator, env, run.seed)
    rollouts = Rollouts()
    model.learn(run.steps, [evaluations, stops, rollouts])
    evaluation_env.close()
    env.close()
    learning = [
        {
            "step": step,
            "eval_mean": round(mean, 3),
            "eval_std": round(std, 3),
            "eval_episodes": run.evaluation_episodes,
            "train_mean": round(rollouts.mean_at(step), 3),
        }
        for step, mean, std, _ in evaluations.points
    ]
    if 1.0 in run.stops:
        stops.kept.append(Stop.of(model, 1.0))
    variance = [
        row
        for n, stop in enumerate(stops.kept)
        for row in variances(run, stop, FINAL_SEED + 10_000 * run.seed + 1000 * n)
    ]
    return Result(learning, variance)
