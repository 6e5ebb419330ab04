"""Monte-Carlo returns and a baseline: what an algorithm that waits for an episode's end credits its actions with."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch as th

from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.first_order import FirstOrderAlgorithm
from sb3_pg.algorithms.signature import CHECKS
from sb3_pg.baselines import Baseline, NoBaseline, OptimalBaseline, make_baseline
from sb3_pg.functional import episode_gradients, policy_gradient_loss, reward_to_go, total_return
from sb3_pg.learner.metrics import Metrics
from sb3_pg.policies import policy_actions
from sb3_pg.policies.functional_policy import functional_log_prob
from sb3_pg.rollout import RolloutBatch


class MonteCarloAlgorithm(FirstOrderAlgorithm):
    """Returns G_t of whole episodes (or of segments that a critic bootstraps), less a baseline.

    :param returns: "reward_to_go": G_t is the reward from t on; "total": that of the whole episode
    :param baseline: b: "none", "mean", "leave_one_out", "time", "optimal", "linear", "value", or an object with
        ``fit(batch, returns)`` and ``predict(batch)``
    :param baseline_kwargs: arguments of the named baseline, e.g. ``{"component_wise": True}`` of "optimal"
    """

    checks: ClassVar[Mapping[str, arg.Check]] = {
        **CHECKS,
        "returns": arg.choice("reward_to_go", "total"),
        "baseline_kwargs": arg.instance(dict, optional=True),
        "baseline": lambda _, value: None if isinstance(value, str) else (make_baseline(value), None)[1],
    }

    def __init__(
        self,
        *args: Any,
        returns: str = "reward_to_go",
        baseline: str | Baseline = "value",
        baseline_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.returns = returns
        self.baseline = baseline
        self.baseline_kwargs = baseline_kwargs
        self._baseline: Baseline | None = None
        self._baseline_of: Any = None
        super().__init__(*args, **kwargs)

    # ---------------------------------------------------------------- arguments

    def _uses_critic(self) -> bool:
        return self.baseline == "value" or bool(getattr(self.baseline, "uses_critic", False))

    @property
    def _bootstraps_truncated(self) -> bool:
        return self.returns != "total" and super()._bootstraps_truncated

    def _check_combinations(self) -> None:
        if self.returns == "total":
            if self.state_discount and self.gamma < 1:
                raise ValueError(
                    f"state_discount=True with returns='total' and gamma={self.gamma} would discount twice: the total "
                    "return is discounted from the episode's start already"
                )
            if self.truncation == "bootstrap":
                raise ValueError("truncation='bootstrap' has no place in returns='total', the reward that was received")
        super()._check_combinations()
        baseline = make_baseline(self.baseline, self.baseline_kwargs, observation_space=self.observation_space)
        if isinstance(baseline, OptimalBaseline) and baseline.component_wise and self.normalize_advantage:
            raise ValueError("normalize_advantage has no single advantage to normalize with a component-wise baseline")

    def _without_effect(self) -> dict[str, str]:
        unused = super()._without_effect()
        baseline = make_baseline(self.baseline, self.baseline_kwargs, observation_space=self.observation_space)
        fitted_first = getattr(baseline, "fits_own_batch", False) or isinstance(baseline, NoBaseline)
        if fitted_first and not self._uses_critic():
            unused["critic_fit"] = f"baseline={self.baseline!r}, which has nothing to fit later"
        return unused

    def _setup_model(self) -> None:
        super()._setup_model()
        self._require_several_episodes()
        asked_for = [self.baseline, self.baseline_kwargs, self.returns]  # as it comes back from a zip
        # A loaded model brings its fitted baseline along, unless load() was asked for another one.
        if not isinstance(self.baseline, str):
            self._baseline = self.baseline
        elif self._baseline is None or self._baseline_of != asked_for:
            self._baseline = make_baseline(
                self.baseline, self.baseline_kwargs, self.returns == "total", self.observation_space
            )
            self._baseline_of = asked_for

    @abstractmethod
    def _n_episodes_at_least(self) -> int:
        """Episodes that every batch has at least."""

    def _require_several_episodes(self) -> None:
        """One episode is all of its own average, and nothing is left of the advantage.

        :raises ValueError: for baselines that take the batch's other episodes
        """
        averages = {"leave_one_out", "time"} | ({"mean", "optimal"} if self.returns == "total" else set())
        component_wise = self.baseline == "optimal" and bool((self.baseline_kwargs or {}).get("component_wise"))
        alone = self._n_episodes_at_least() == 1
        if alone and self.env is not None and (component_wise or self.baseline in averages):
            raise ValueError(f"baseline={self.baseline!r} needs at least 2 episodes per update, got n_episodes=1")

    # ---------------------------------------------------------------- the formula

    def _estimate(self, batch: RolloutBatch) -> tuple[th.Tensor, th.Tensor]:
        returns = self._returns(batch)
        return returns, self._advantages(batch, returns)

    def _returns(self, batch: RolloutBatch) -> th.Tensor:
        if self.returns == "total":
            return total_return(batch.rewards, batch.ends, self.gamma, batch.mask)
        return reward_to_go(batch.rewards, batch.ends, self.gamma, batch.bootstrap, batch.mask)

    def _advantages(self, batch: RolloutBatch, returns: th.Tensor) -> th.Tensor:
        baseline = self._baseline
        assert baseline is not None
        own_batch = getattr(baseline, "fits_own_batch", False) or self.critic_fit == "before"
        if isinstance(baseline, OptimalBaseline):
            self._accumulate_episodes(batch, returns, baseline)
        if own_batch:
            baseline.fit(batch, returns)
        if isinstance(baseline, OptimalBaseline) and baseline.component_wise:
            return th.where(batch.valid, returns - baseline.center, 0.0)
        expected = th.as_tensor(baseline.predict(batch), dtype=returns.dtype, device=returns.device)
        if expected.dim() and expected.shape != returns.shape:
            raise ValueError(
                f"baseline.predict must return a scalar or shape {tuple(returns.shape)}, (n_steps, n_envs), got "
                f"{tuple(expected.shape)} from {baseline!r}"
            )
        if not own_batch:
            baseline.fit(batch, returns)
        return th.where(batch.valid, returns - expected.detach(), 0.0)

    def _accumulate_gradient(self, batch: RolloutBatch) -> Metrics:
        metrics = super()._accumulate_gradient(batch)
        baseline = self._baseline
        if isinstance(baseline, OptimalBaseline) and baseline.component_wise:
            # What is there is mean X', of the centered returns; from it goes (b - center) * mean Y.
            log_prob = self._evaluation(batch).log_prob
            weights = batch.select(self._score_weights(batch)).to(log_prob.dtype)
            parameters = list(self._trained_by_actor().values())
            loss = policy_gradient_loss(log_prob, weights, n_episodes=batch.n_episodes)
            gradients = th.autograd.grad(loss, parameters, materialize_grads=True)
            sizes = [parameter.numel() for parameter in parameters]
            for parameter, score, constant in zip(parameters, gradients, baseline.constant.split(sizes), strict=True):
                assert parameter.grad is not None
                parameter.grad -= constant.view_as(parameter) * score
        return metrics

    def _trained_by_actor(self) -> dict[str, th.nn.Parameter]:
        return {name: parameter for name, parameter in self.parameter_sets.actor.items() if parameter.requires_grad}

    def _score_weights(self, batch: RolloutBatch) -> th.Tensor:
        weights = self._weights(batch)
        return th.ones_like(batch.rewards) if weights is None else weights

    def _accumulate_episodes(self, batch: RolloutBatch, returns: th.Tensor, baseline: OptimalBaseline) -> None:
        """Gradients of each episode by itself, X with centered returns and Y without, for the optimal baseline."""
        weights = self._score_weights(batch)
        center = batch.select(returns).mean()
        baseline.reset(center)
        with functional_log_prob(self.policy) as log_prob:
            chunks = episode_gradients(
                log_prob,
                {name: parameter.detach() for name, parameter in self._trained_by_actor().items()},
                batch.flat_observations,
                policy_actions(batch.select(batch.actions), self.action_space),
                th.stack((batch.select(weights * (returns - center)), batch.select(weights))).float(),
                batch.select(batch.episodes),
            )
            for _, gradients in chunks:
                baseline.accumulate(gradients)
