"""One step of gradient ascent with eligibility traces."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch as th

from sb3_pg.functional import eligibility_trace, row_gradients
from sb3_pg.learner.gradient_step import GradientStep
from sb3_pg.learner.learner import Learner, StepInputs, Traces
from sb3_pg.policies import ActionScores, policy_actions, score_actions, uncompiled
from sb3_pg.rollout import RolloutBatch

Corrections = dict[th.nn.Parameter, th.Tensor]


class _Carried(NamedTuple):
    """What earlier steps add to the gradients of the losses, with the sign turned.

    :param actor: to that of the actor's loss
    :param critic: to that of the mean squared error
    """

    actor: Corrections
    critic: Corrections


@dataclass
class TraceStep(GradientStep):
    r"""The step of the online actor-critic with eligibility traces.

    .. math:: z^\theta_t = \gamma \lambda z^\theta_{t-1} + w_t \nabla_\theta \log \pi_\theta(a_t|s_t), \qquad
              z^\phi_t = \gamma \lambda z^\phi_{t-1} + \nabla_\phi V_\phi(s_t)

    The actor moves along the mean over envs of :math:`\delta_t z^\theta_t`, the critic along that of
    :math:`2 c_{vf} \delta_t z^\phi_t`. Each env has traces of its own. They begin at 0 in each episode.
    :meth:`~sb3_pg.learner.Estimator.trace_decay` says by what they are multiplied, and where they end. They also begin
    at 0 where a step does not follow the latest one: where the env was reset, or a rollout was skipped. They are kept
    in ``learner.state.traces``.

    Source: Sutton and Barto (2018), section 13.5, "Actor-Critic with Eligibility Traces (episodic)". With lambda = 0 it
    is :class:`GradientStep`: this step is that one, and adds what the traces have from earlier steps. Entropy bonus and
    anchor have no traces. A critic with an optimizer of its own moves along the mean of :math:`2 \delta_t z^\phi_t`.

    A batch has one step of each env, and the estimator's advantages are TD residuals. A gradient for each env takes as
    much work as ``n_envs`` backward passes over the batch, and ``n_envs`` times the memory of the parameters.

    :param ent_coef: as in :class:`GradientStep`
    :param vf_coef: c_vf, as in :class:`GradientStep`
    :param max_grad_norm: as in :class:`GradientStep`
    """

    needs_values: ClassVar[bool] = True

    def _corrections(
        self, learner: Learner, batch: RolloutBatch, inputs: StepInputs, scores: ActionScores
    ) -> Corrections:
        self._carried: _Carried | None = self._advance(learner, batch, scores)
        corrections = dict(self._carried.actor)
        for parameter, part in self._carried.critic.items():
            weighted = self.vf_coef * part
            corrections[parameter] = corrections[parameter] + weighted if parameter in corrections else weighted
        return corrections

    def critic_corrections(self, learner: Learner, batch: RolloutBatch) -> Corrections:
        """Return what is subtracted from the critic's gradient. While it warms up, the traces advance here."""
        carried, self._carried = getattr(self, "_carried", None), None
        if carried is None or learner.warms_up:
            actions = policy_actions(batch.select(batch.actions), learner.policy.action_space)
            with uncompiled():
                scores = score_actions(learner.policy, batch.flat_observations, actions, True)
            carried = self._advance(learner, batch, scores)
        return carried.critic

    def _advance(self, learner: Learner, batch: RolloutBatch, scores: ActionScores) -> _Carried:
        """Advance the traces by one step.

        :return: the share of earlier steps in the gradients
        :raises ValueError: traces are not defined for such batches, or for the way in which the critic is trained
        """
        _require_traces(learner, batch)
        estimator, log_prob, values = learner.estimator, scores.log_prob, scores.values
        assert values is not None
        actor = list(learner.actor.values())
        critic = [parameter for parameter in learner.parameters.critic.values() if parameter.requires_grad]
        weights = estimator.weights(batch)
        of_actor = row_gradients(log_prob, actor, None if weights is None else batch.select(weights))
        of_critic = row_gradients(values, critic)
        envs: Any = slice(None) if batch.mask is None else batch.mask[0]  # the others have only been reset
        old = _fitting(learner.state.traces, batch, of_actor, of_critic)
        follows = batch.timesteps[0] == old["timestep"]
        decay = th.where(follows, old["decay"], 0.0)[None, envs]
        z_actor, z_critic = (
            eligibility_trace(rows[None], decay, old[name][envs])[0]
            for name, rows in (("actor", of_actor), ("critic", of_critic))
        )
        after = {
            "actor": z_actor,
            "critic": z_critic,
            "decay": estimator.trace_decay(batch)[0, envs].to(of_actor),
            "timestep": th.where(batch.ends[0], 0, batch.timesteps[0] + 1)[envs],
        }
        if batch.mask is not None:
            after = {name: old[name].index_put((envs,), x) for name, x in after.items()}
        learner.state.traces = after
        assert batch.advantages is not None
        residuals = batch.select(batch.advantages).to(of_actor)
        errors = learner.scaled(batch.select(batch.returns)) - values.detach()
        n_rows = len(residuals)
        return _Carried(
            _split(residuals / n_rows @ (z_actor - of_actor), actor),
            _split(2 / n_rows * errors.to(of_critic) @ (z_critic - of_critic), critic),
        )


def _require_traces(learner: Learner, batch: RolloutBatch) -> None:
    n_steps, critic = len(batch.rewards), learner.critic
    if n_steps != 1 or batch.sequences is not None:
        memory = "" if batch.sequences is None else " of a policy with memory"
        raise ValueError(f"TraceStep takes batches of one step of each env, without memory: got {n_steps}{memory}")
    if critic.own_steps and (critic.before_actor or critic.n_passes > 1 or critic.batch_size is not None):
        raise ValueError(
            "TraceStep takes a critic with one step after the actor's, on the whole batch, got "
            f"before_actor={critic.before_actor}, n_passes={critic.n_passes}, batch_size={critic.batch_size}"
        )
    if learner.normalize_advantage:
        raise ValueError("TraceStep takes TD residuals as they are: normalize_advantage must be False, got True")


def _fitting(traces: Traces | None, batch: RolloutBatch, of_actor: th.Tensor, of_critic: th.Tensor) -> Traces:
    """Return traces of these envs and parameters: those given, if they fit, or zeros."""
    of_envs = batch.timesteps[0]
    like = {"actor": of_actor, "critic": of_critic, "decay": of_actor, "timestep": of_envs}
    shapes = {name: (len(of_envs), rows.shape[1]) for name, rows in (("actor", of_actor), ("critic", of_critic))}
    if traces is None or any(traces[name].shape != shape for name, shape in shapes.items()):
        return {name: x.new_zeros(shapes.get(name, (len(of_envs),))) for name, x in like.items()}
    return {name: traces[name].to(x) for name, x in like.items()}


def _split(flat: th.Tensor, parameters: list[th.nn.Parameter]) -> Corrections:
    parts = flat.split([parameter.numel() for parameter in parameters])
    return {parameter: part.view_as(parameter) for parameter, part in zip(parameters, parts, strict=True)}
