"""The surrogate objective of one batch, and how far a policy has gone from the one that collected it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch as th
from stable_baselines3.common.distributions import Distribution as SB3Distribution
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_pg.functional import OfPerceptron, distribution_parameters, joint_kl, with_parameters
from sb3_pg.functional.precision import precise
from sb3_pg.learner.metrics import Metrics
from sb3_pg.policies import (
    CHUNK_SIZE,
    Distributions,
    Observations,
    action_dist_kept,
    action_distribution,
    compiled,
    evaluation_mode,
    perceptron_distribution,
    policy_actions,
    split_observations,
    torch_distributions,
    unvalidated_distributions,
)
from sb3_pg.policies.observations import example_observation
from sb3_pg.rollout import RolloutBatch


class Effect(NamedTuple):
    """What a step has done to the policy, on the states and actions that it was made from; scalars.

    ``gain`` is that of the objective, entropy included, in reward units.
    """

    joint_kl: th.Tensor | float
    gain: th.Tensor | float
    largest_ratio: th.Tensor | float
    effective_sample_size: th.Tensor | float

    @classmethod
    def of_nothing(cls) -> "Effect":
        """Of no step."""
        return cls(0.0, 0.0, 1.0, 1.0)

    def metrics(self) -> Metrics:
        """Name -> number to log."""
        return {
            "joint_kl": self.joint_kl,
            "surrogate_realized": self.gain,
            "largest_ratio": self.largest_ratio,
            "effective_sample_size": self.effective_sample_size,
        }


class _Old(NamedTuple):
    """The policy before the step, at one chunk of states."""

    log_prob: th.Tensor
    entropy: th.Tensor
    distribution: Sequence[th.distributions.Distribution]


class SurrogateObjective:
    r"""What the policy that collected a batch expects of another one.

    .. math:: L(\theta) = \hat E[\rho_t(\theta)\, w_t \hat A_t] + c_{ent} \hat E[H(\pi_\theta(\cdot|s_t))], \qquad
              \rho_t(\theta) = \frac{\pi_\theta(a_t|s_t)}{\pi_{old}(a_t|s_t)}

    E is the mean over steps. Source: Schulman et al. (2015), eq. 14; Kakade and Langford (2002), theorem 4.1. An
    entropy without closed form is estimated by rho - 1 - rho log pi, whose gradient at theta_old is that of the score
    function.

    :param policy: in evaluation mode whenever a method is called: the policy that acts
    :param batch: what it has done
    :param credit: w_t A_t, reward units, ``(n_samples,)``
    :param ent_coef: c_ent
    :param chunk_size: samples per forward; of a single chunk the graph is kept
    """

    def __init__(
        self,
        policy: ActorCriticPolicy,
        batch: RolloutBatch,
        credit: th.Tensor,
        ent_coef: float = 0.0,
        chunk_size: int = CHUNK_SIZE,
    ) -> None:
        self._policy, self._ent_coef = policy, ent_coef
        self.credit = credit
        self.actions = policy_actions(batch.select(batch.actions), policy.action_space)
        observations = split_observations(batch.flat_observations, chunk_size)
        self._chunks = list(zip(observations, self.actions.split(chunk_size), credit.split(chunk_size), strict=True))
        self._old: list[_Old] = []
        #: of a single chunk: the distribution with its graph, once the gradient is known
        self.distribution: Distributions | None = None

    @property
    def old_log_prob(self) -> th.Tensor:
        """Log-probs of the actions before the step, nats, ``(n_samples,)``."""
        return th.cat([old.log_prob for old in self._old])

    @property
    def entropy(self) -> th.Tensor:
        """Mean entropy of the policy before the step, nats."""
        return th.cat([old.entropy for old in self._old]).mean()

    @property
    def old_distribution(self) -> tuple[Sequence[th.distributions.Distribution], list[th.Tensor]]:
        """What the policy drew actions from before the step: one of its kind, and its parameters at all states."""
        chunks = [distribution_parameters(old.distribution) for old in self._old]
        return self._old[0].distribution, [th.cat(parts) for parts in zip(*chunks, strict=True)]

    def remember(self) -> None:
        """Take the policy as it is now for the one before the step."""
        self._old = []
        with th.no_grad():
            for observations, actions, _ in self._chunks:
                distribution = action_distribution(self._policy, observations)
                self._remember(distribution, distribution.log_prob(actions), distribution.entropy())

    def gradient(self, parameters: Sequence[th.Tensor], keep_graph: bool = True) -> th.Tensor:
        """Gradient at theta_old, which is what the policy's parameters are now; it is remembered.

        :param parameters: theta
        :param keep_graph: whether ``distribution`` is wanted afterwards
        :return: ``(n_parameters,)``
        """
        self._old, parts = [], []
        keep_graph &= len(self._chunks) == 1
        for observations, actions, credit in self._chunks:
            with th.enable_grad(), compiled(not keep_graph):
                distribution = action_distribution(self._policy, observations)
                log_prob = distribution.log_prob(actions)
                objective = (log_prob * credit.to(log_prob.dtype)).sum()
                with th.set_grad_enabled(self._ent_coef > 0):
                    entropy = distribution.entropy()
                if self._ent_coef > 0:
                    bonus = -log_prob.detach() * log_prob if entropy is None else entropy
                    objective = objective + self._ent_coef * bonus.sum()
            whole = self._remember(distribution, log_prob, entropy)
            self.distribution = whole if keep_graph else None
            gradients: Sequence[th.Tensor] = [objective.new_zeros(0)]  # where all of theta is frozen
            if parameters:
                gradients = th.autograd.grad(objective, parameters, retain_graph=keep_graph, materialize_grads=True)
            parts.append(th.cat([gradient.flatten() for gradient in gradients]))
        return th.stack(parts).sum(0) / len(self.actions)

    def _remember(self, distribution: SB3Distribution, log_prob: th.Tensor, entropy: th.Tensor | None) -> Distributions:
        whole = require_torch_distributions(self._policy, distribution)
        known = with_parameters(whole, [z.detach() for z in distribution_parameters(whole)])
        self._old.append(_Old(log_prob.detach(), (-log_prob if entropy is None else entropy).detach(), known))
        return whole

    def effect(self) -> Effect:
        """Compare the policy as it is now with the one before the step; after :meth:`gradient`."""
        kls, gains, bonuses, ratios = [], [], [], []
        with th.no_grad():
            for (observations, actions, credit), old in zip(self._chunks, self._old, strict=True):
                distribution = action_distribution(self._policy, observations)
                log_prob = distribution.log_prob(actions)
                log_ratio = precise(log_prob - old.log_prob)
                excess = log_ratio.expm1()
                ratios.append(excess + 1)
                gains.append(excess * credit)
                kls.append(joint_kl(old.distribution, require_torch_distributions(self._policy, distribution)))
                if self._ent_coef > 0:
                    entropy = distribution.entropy()
                    new = excess - (excess + 1) * log_prob if entropy is None else entropy
                    bonuses.append(new - old.entropy)
            ratio, surrogate = th.cat(ratios), th.cat(gains).mean()
            return Effect(
                joint_kl=precise(th.cat(kls)).mean(),
                gain=surrogate + self._ent_coef * th.cat(bonuses).mean() if bonuses else surrogate,
                largest_ratio=ratio.max(),
                effective_sample_size=ratio.sum().square() / ratio.square().sum() / len(ratio),
            )


def chunked_distributions(
    policy: ActorCriticPolicy, observations: Observations, chunk_size: int
) -> list[Callable[[], Distributions | OfPerceptron]]:
    """What gives the policy's distributions at each chunk of states, with graph, as often as it is called."""

    def at(chunk: Observations) -> Callable[[], Distributions | OfPerceptron]:
        def distributions() -> Distributions | OfPerceptron:
            with compiled(False):  # it is differentiated twice
                return perceptron_distribution(policy, chunk) or require_torch_distributions(
                    policy, action_distribution(policy, chunk)
                )

        return distributions

    return [at(chunk) for chunk in split_observations(observations, chunk_size)]


def require_torch_distributions(policy: ActorCriticPolicy, distribution: SB3Distribution) -> Distributions:
    """The distributions of torch's in what the policy draws from.

    :raises ValueError: there are none, so that no divergence is known
    """
    held = torch_distributions(distribution)
    if held is None:
        raise ValueError(
            f"policy must draw actions from a distribution of torch's, whose divergence is known: "
            f"{type(policy).__name__} has a {type(distribution).__name__} without one in its attribute 'distribution'"
        )
    return held


def require_known_divergence(policy: ActorCriticPolicy) -> None:
    """Check that the divergence between two of the policy's action distributions can be had.

    :raises ValueError: its distribution is not one of torch's, torch knows no divergence of it, or a policy with
        methods of its own scores actions by another one than ``get_distribution`` shows
    """
    observation = example_observation(policy)
    with evaluation_mode(policy), th.no_grad(), unvalidated_distributions():
        shown = action_distribution(policy, observation)
        distribution = require_torch_distributions(policy, shown)
        try:
            joint_kl(with_parameters(distribution, distribution_parameters(distribution)), distribution)
        except (NotImplementedError, TypeError) as error:
            raise ValueError(f"policy must have action distributions of known divergence: {error}") from error
        actions = shown.mode()
        shown_log_prob = shown.log_prob(actions)
        with action_dist_kept(policy):
            _, log_prob, _ = policy.evaluate_actions(observation, actions)
        if not th.allclose(log_prob, shown_log_prob, rtol=1e-3, atol=1e-3):
            raise ValueError(
                f"policy must have a get_distribution that agrees with evaluate_actions: {type(policy).__name__} gives "
                f"an action the log-probs {shown_log_prob.tolist()} and {log_prob.tolist()}"
            )
