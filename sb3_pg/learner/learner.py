"""The learner: it estimates advantages, trains the critic, moves the actor, and undoes all of it if an update fails."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal, NamedTuple

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pg.errors import NonFiniteError
from sb3_pg.functional import normalize, rounding
from sb3_pg.learner.anchor import Anchor
from sb3_pg.learner.critic import CriticFit, ReturnScale, fit_critic
from sb3_pg.learner.metrics import Metrics, describe_batch
from sb3_pg.learner.rollback import OptimizerSnapshot, require_finite_parameters
from sb3_pg.policies import (
    Observations,
    ParameterSets,
    PolicyCache,
    Snapshot,
    evaluation_mode,
    parameter_sets_of,
    policy_actions,
    policy_cache,
    set_training_mode,
)
from sb3_pg.rollout import RolloutBatch, value_again

#: What an update measures beyond what it needs: nothing, the batch and the policy, or the step's effect as well.
Report = Literal["nothing", "batch", "step"]


#: Eligibility traces of each env, see :class:`~sb3_pg.learner.TraceStep`. "actor" and "critic" are z of all trained
#: parameters in their order, ``(n_envs, n_parameters)``. "decay" is their factor in the step that follows, and
#: "timestep" that step's index in its episode, both ``(n_envs,)``. They are replaced, never changed.
Traces = dict[str, th.Tensor]
_TRACES: Final = dict.fromkeys(("actor", "critic", "decay", "timestep"))


class Estimator(ABC):
    """Gives each step of a batch a return, an advantage and a weight."""

    @property
    @abstractmethod
    def requires_critic(self) -> bool:
        """Whether the batch must hold the critic's values."""

    @property
    @abstractmethod
    def bootstraps(self) -> bool:
        """Whether returns include the value of the state that follows a truncated episode."""

    #: whether the task goes on after a termination, in the state that the reset gives
    continues: ClassVar[bool] = False

    @property
    def parameter_constants(self) -> th.Tensor | None:
        """c_k of each trained actor parameter: c_k E[w_t score_t]_k is subtracted from component k of the gradient."""
        return None

    @abstractmethod
    def estimate(self, batch: RolloutBatch, policy: ActorCriticPolicy) -> tuple[th.Tensor, th.Tensor]:
        """Return returns, which critic or baseline are fitted to, and advantages, which actions are credited with.

        :param batch: scored by the policy
        :param policy: in eval mode
        :return: both ``(n_steps, n_envs)``, reward units, 0 in the padding
        """

    @abstractmethod
    def weights(self, batch: RolloutBatch) -> th.Tensor | None:
        """w_t, the weight of each step's term in the gradient, ``(n_steps, n_envs)``; None for 1."""

    def trace_decay(self, batch: RolloutBatch) -> th.Tensor:
        """Factor of each step's eligibility traces in the step that follows, ``(n_steps, n_envs)``; 0 cuts them.

        :raises NotImplementedError: the estimator has no traces
        """
        raise NotImplementedError(f"{type(self).__name__} has no eligibility traces")

    def describe(self, batch: RolloutBatch) -> Metrics:
        """Return metrics of the batch that only this estimator knows."""
        del batch
        return {}

    def remember(self, batch: RolloutBatch, state: "LearnerState") -> None:
        """Keep what the next batch is estimated with. This is called after an update that has succeeded.

        :param batch: of the update
        :param state: of the learner
        """
        del batch, state


class StepInputs(NamedTuple):
    """What a step is made from, one row per valid sample of the batch.

    ``actions`` are as the policy's distribution expects them. ``credit`` is w_t A_t, reward units. ``targets`` are the
    critic's; None where its loss is no part of the step. ``parameters`` are all of the policy's. ``trained`` are the
    parameters to differentiate by, None for all. The gradient of ``untrained`` is dropped. ``constants`` are the
    estimator's :attr:`~Estimator.parameter_constants`.
    """

    observations: Observations
    actions: th.Tensor
    credit: th.Tensor
    targets: th.Tensor | None
    parameters: list[th.nn.Parameter]
    trained: list[th.nn.Parameter] | None
    untrained: list[th.nn.Parameter]
    constants: th.Tensor | None


class Step(ABC):
    """Moves the actor, and a critic that has no steps of its own."""

    #: whether a smaller gradient makes a smaller step; otherwise a gradient of rounding errors would make a full one
    length_follows_gradient: ClassVar[bool] = True
    #: whether the step begins with the scores of the policy that collected the batch, see ``batch.kept_scores``
    reuses_scores: ClassVar[bool] = False

    @abstractmethod
    def take(self, learner: "Learner", batch: RolloutBatch, inputs: StepInputs) -> Metrics:
        """Move the parameters.

        :param learner: which policy is trained, and how
        :param batch: with returns and advantages
        :param inputs: samples of the batch
        :return: name -> number to log
        :raises NonFiniteError: a gradient is not finite
        """

    def critic_corrections(self, learner: "Learner", batch: RolloutBatch) -> Mapping[th.nn.Parameter, th.Tensor]:
        """Return what is subtracted from the gradient of a critic with steps of its own. By default it is nothing.

        :param learner: as in :meth:`take`
        :param batch: as in :meth:`take`, which may have been called before
        :return: parameter -> correction
        """
        del learner, batch
        return {}

    def measure(self, learner: "Learner", batch: RolloutBatch, inputs: StepInputs) -> Metrics:
        """Measure what the step has done, if :meth:`take` has not: this costs another forward.

        :param learner: as in :meth:`take`
        :param batch: as in :meth:`take`
        :param inputs: as in :meth:`take`
        """
        del learner, batch, inputs
        return {}

    def conclude(self, learner: "Learner") -> None:
        """Finish an update, which succeeded or was undone. By default, no outcome is logged.

        :param learner: its ``outcome`` is that of :meth:`take`, or "nonfinite" if the update was undone
        """
        learner.outcome = ""


@dataclass
class LearnerState:
    """State that lasts from one update to the next, besides that of the policy and the optimizers.

    Three more things last, each in the object that uses it: the fitted baseline in the estimator, the KL coefficient in
    :class:`~sb3_pg.learner.KLPenaltyStep`, and what an :class:`~sb3_pg.learner.Anchor` remembers. The algorithms keep
    them in ``model.fitted_baseline``, ``model.kl_coef`` and ``model.anchor``.

    :param return_scale: running scale of the critic's targets
    :param n_warmed_up: updates in which only the critic was trained
    :param n_failures: updates in a row in which a step of fixed KL has not moved the policy
    :param average_reward: estimate of r(pi), reward units per step; None before the first update, and with a discount
    :param traces: eligibility traces; None if there are none
    """

    return_scale: ReturnScale = field(default_factory=ReturnScale)
    n_warmed_up: int = 0
    n_failures: int = 0
    average_reward: float | None = None
    traces: Traces | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state as dicts of numbers and tensors, which ``torch.load(..., weights_only=True)`` reads."""
        return vars(LearnerState()) | vars(self) | {"return_scale": self.return_scale.moments}

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for files and copies. Files hold tensors of the CPU."""
        if self.traces is None:
            return vars(self)
        return vars(self) | {"traces": {name: value.cpu() for name, value in self.traces.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the state by one that :meth:`state_dict` has returned.

        :param state: the result of :meth:`state_dict`; that of an earlier version lacks some keys
        :raises ValueError: a key is missing or unknown; the state stays as it is then
        """
        state = {"average_reward": None, "traces": None, **state}
        _require_keys("state", state, self.state_dict())
        _require_keys("state['return_scale']", state["return_scale"], self.return_scale.moments)
        if state["traces"] is not None:
            _require_keys("state['traces']", state["traces"], _TRACES)
        self.return_scale = ReturnScale.from_moments(**state["return_scale"])
        self.n_warmed_up, self.n_failures = state["n_warmed_up"], state["n_failures"]
        self.average_reward = state["average_reward"]
        self.traces = state["traces"]


def _require_keys(name: str, given: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    if given.keys() != expected.keys():
        missing, unknown = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
        raise ValueError(f"{name} must have the keys {list(expected)}: missing {missing}, unknown {unknown}")


class Learner:
    r"""Updates a policy from batches, without an env or an algorithm.

    1. ``estimator``: returns :math:`G_t`, advantages :math:`\hat A_t` and weights :math:`w_t`
    2. ``step``: moves the actor along :math:`\hat E[w_t \nabla_\theta \log \pi_\theta(a_t|s_t) \hat A_t]`
    3. ``critic``: regresses :math:`V_\phi` on the returns, in the actor's step or by steps of its own

    Parameters, buffers, optimizers, the return scale and traces stay as they were if an update fails or is interrupted.

    :param policy: the policy; its ``optimizer`` takes the actor's steps
    :param estimator: from :mod:`sb3_pg.learner.estimators`
    :param step: from :mod:`sb3_pg.learner.gradient_step`, ``trust_region`` or ``kl_penalty_step``
    :param critic: how the critic is trained
    :param normalize_advantage: shift and scale each batch of advantages to mean 0 and standard deviation 1
    :param anchor: holds the actor near another policy or near data; None for nothing
    :param state: state of an earlier learner of the policy, to go on from; None to begin

    >>> from stable_baselines3.common.env_util import make_vec_env
    >>> from stable_baselines3.common.policies import ActorCriticPolicy
    >>> from sb3_pg.learner import Bootstrapped, GradientStep, Learner
    >>> from sb3_pg.rollout import Collector
    >>> env = make_vec_env("CartPole-v1", n_envs=4)
    >>> policy = ActorCriticPolicy(env.observation_space, env.action_space, lambda _: 1e-3)
    >>> collector, learner = Collector(policy, env), Learner(policy, Bootstrapped(gae_lambda=0.95), GradientStep())
    >>> for _ in range(3):
    ...     metrics = learner.update(collector.collect(n_steps=32))
    >>> sorted(metrics)[:3]
    ['clipped_action_fraction', 'effective_sample_size', 'entropy']
    """

    def __init__(
        self,
        policy: ActorCriticPolicy,
        estimator: Estimator,
        step: Step,
        critic: CriticFit | None = None,
        *,
        normalize_advantage: bool = False,
        anchor: Anchor | None = None,
        state: LearnerState | None = None,
    ) -> None:
        self.policy = policy
        self.estimator = estimator
        self.step = step
        self.critic = critic or CriticFit()
        self.normalize_advantage = normalize_advantage
        self.anchor = anchor
        self.state = state or LearnerState()
        #: what the current update measures
        self.report: Report = "step"
        #: how the latest step ended; empty for kinds of steps that do not say so
        self.outcome = ""
        #: parameters and buffers before the current update
        self.before: Snapshot | None = None
        self._parameters: tuple[PolicyCache, ParameterSets] | None = None

    # ---------------------------------------------------------------- the policy

    @property
    def parameters(self) -> ParameterSets:
        """The actor's and the critic's parameters, frozen ones included."""
        cache = policy_cache(self.policy)
        if self._parameters is None or self._parameters[0] is not cache:
            self._parameters = cache, parameter_sets_of(self.policy)
        return self._parameters[1]

    @property
    def actor(self) -> dict[str, th.nn.Parameter]:
        """The actor's parameters that are not frozen."""
        return {name: parameter for name, parameter in self.parameters.actor.items() if parameter.requires_grad}

    @property
    def critic_only(self) -> dict[str, th.nn.Parameter]:
        """Parameters that only the critic depends on."""
        actor, critic = self.parameters
        return {name: parameter for name, parameter in critic.items() if name not in actor}

    @property
    def shares_features(self) -> bool:
        """Whether actor and critic have parameters in common."""
        actor, critic = self.parameters
        return not actor.keys().isdisjoint(critic)

    # ---------------------------------------------------------------- the critic

    @property
    def fits_critic(self) -> bool:
        """Whether the critic has steps of its own."""
        return self.critic.own_steps and self.estimator.requires_critic

    @property
    def critic_in_step(self) -> bool:
        """Whether the critic's loss is part of the actor's."""
        return self.estimator.requires_critic and (not self.critic.own_steps or self.shares_features)

    @property
    def reuses_scores(self) -> bool:
        """Whether the actor's step can use scores from before the update."""
        return self.step.reuses_scores and not self.warms_up and not (self.fits_critic and self.critic.before_actor)

    @property
    def warms_up(self) -> bool:
        """Whether only the critic is trained so far."""
        return self.state.n_warmed_up < self.critic.warmup_updates

    @property
    def active_anchor(self) -> Anchor | None:
        """The anchor, if it has any weight in the present update."""
        return None if self.anchor is None or self.warms_up or not self.anchor.weight else self.anchor

    @property
    def value_scale(self) -> float:
        """Reward units per unit of the critic's output."""
        return self.state.return_scale.value if self.critic.normalize_targets else 1.0

    def scaled(self, returns: th.Tensor) -> th.Tensor:
        """Return the critic's targets: returns in units of ``value_scale``."""
        return (returns / self.value_scale if self.critic.normalize_targets else returns).float()

    # ---------------------------------------------------------------- estimating

    def estimate(self, batch: RolloutBatch) -> None:
        """Give the batch returns, advantages and weights.

        :param batch: scored by the policy; see :func:`~sb3_pg.rollout.make_batch`
        """
        with evaluation_mode(self.policy) if self.policy.training else nullcontext():
            batch.returns, batch.advantages = self.estimator.estimate(batch, self.policy)

    def credit(self, batch: RolloutBatch) -> th.Tensor:
        """Return the factor of each step's log-prob in the loss: w_t A_t, with A_t normalized if that is asked for.

        :return: ``(n_steps, n_envs)``, 0 in the padding
        """
        advantages = batch.advantages
        assert advantages is not None
        if self.normalize_advantage:
            assert batch.returns is not None
            advantages = normalize(advantages, batch.mask, tolerance=rounding(batch.returns, advantages))
        weights = self.estimator.weights(batch)
        return advantages if weights is None else advantages * weights

    def _beyond_rounding(self, batch: RolloutBatch, credit: th.Tensor) -> th.Tensor:
        """Return the credit, ``(n_samples,)``; zeros if the advantages are nothing but rounding errors."""
        assert batch.advantages is not None
        assert batch.returns is not None
        advantages: th.Tensor = batch.select(batch.advantages)
        several = len(advantages) > 1
        size = advantages.std(correction=several) if self.normalize_advantage else advantages.abs().max()
        return th.where(size <= rounding(batch.returns, batch.advantages), 0.0, credit)

    # ---------------------------------------------------------------- updating

    def update(self, batch: RolloutBatch, report: Report = "step") -> Metrics:
        """Update the parameters from a batch.

        :param batch: scored by the policy; estimated here if it has no advantages
        :param report: what is measured beyond what the update needs
        :return: name -> number to log
        :raises NonFiniteError: a gradient or a parameter would not be finite; nothing has changed then
        """
        scale, traces = self.state.return_scale, self.state.traces
        self.report, self.outcome = report, ""
        if batch.advantages is None:
            self.estimate(batch)
        set_training_mode(self.policy, True)
        cache = policy_cache(self.policy)
        self.before = before = cache.snapshot()
        statistics = OptimizerSnapshot(self.policy.optimizer, self.critic.optimizer)
        try:
            if self.critic.normalize_targets:
                assert batch.returns is not None
                self.state.return_scale = scale.updated(batch.select(batch.returns))
            metrics = {} if report == "nothing" else describe_batch(batch, self.policy)
            inputs = self._update(batch, metrics, cache.parameters)
            if not cache.snapshot().is_finite():
                require_finite_parameters(self.policy)
            cache.note_finite()
            if report == "step" and inputs is not None:
                metrics |= self.estimator.describe(batch) | self.step.measure(self, batch, inputs)
        except BaseException as error:
            before.restore()
            self.state.return_scale, self.state.traces = scale, traces
            statistics.restore()
            if isinstance(error, NonFiniteError):
                self.outcome = "nonfinite"
                self.step.conclude(self)
            raise
        finally:
            self.before = None
        if inputs is not None:
            self.step.conclude(self)
        if self.anchor is not None:
            self.anchor.n_updates += not self.warms_up
        self.estimator.remember(batch, self.state)
        self.state.n_warmed_up += self.warms_up
        return metrics

    def _update(self, batch: RolloutBatch, metrics: Metrics, parameters: list[th.nn.Parameter]) -> StepInputs | None:
        """Move actor and critic, and add to ``metrics``.

        :return: what the actor's step was made from; None if there was no such step
        """
        fits_critic = self.fits_critic
        if fits_critic and (self.critic.before_actor or self.warms_up):
            metrics |= self.fit_critic(batch)
            if self.warms_up:
                return None
            self._value_again(batch)
        inputs = self._step_inputs(batch, parameters)
        metrics |= self.step.take(self, batch, inputs)
        if fits_critic and not self.critic.before_actor:
            metrics |= self.fit_critic(batch)
        return inputs

    def _step_inputs(self, batch: RolloutBatch, parameters: list[th.nn.Parameter]) -> StepInputs:
        actions, credit, returns = batch.select_all(batch.actions, self.credit(batch), batch.returns)
        if not self.step.length_follows_gradient:
            credit = self._beyond_rounding(batch, credit)
        critic_only = list(self.critic_only.values()) if self.fits_critic or self.warms_up else []
        return StepInputs(
            batch.flat_observations,
            policy_actions(actions, self.policy.action_space),
            credit,
            self.scaled(returns) if self.critic_in_step else None,
            parameters,
            [parameter for parameter in critic_only if parameter.requires_grad] if self.warms_up else None,
            critic_only if self.fits_critic else [],
            self.estimator.parameter_constants,
        )

    def fit_critic(self, batch: RolloutBatch) -> Metrics:
        """Train the critic by steps of its own.

        :param batch: with returns
        :return: name -> number to log
        """
        policy, critic, loss = self.policy, self.critic, th.zeros(())
        optimizer, parameters = critic.optimizer or policy.optimizer, list(self.critic_only.values())
        corrections = self.step.critic_corrections(self, batch)
        n_rounds, n_passes = (critic.n_passes, 1) if critic.revalue else (1, critic.n_passes)
        with evaluation_mode(policy) if critic.in_eval_mode and self.shares_features else nullcontext():
            for n in range(n_rounds):
                if n:
                    self._value_again(batch)
                targets, observations = self.scaled(batch.select(batch.returns)), batch.flat_observations
                sizes = n_passes, critic.batch_size
                loss = fit_critic(policy, optimizer, parameters, observations, targets, *sizes, corrections)
        return {"value_loss": loss}

    def _value_again(self, batch: RolloutBatch) -> None:
        """Give the batch the values of the critic as it is now, and estimate anew."""
        with evaluation_mode(self.policy):
            value_again(self.policy, batch, self.value_scale)
            batch.returns, batch.advantages = self.estimator.estimate(batch, self.policy)
