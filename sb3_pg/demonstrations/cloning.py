"""Behavior cloning: maximum likelihood of demonstrated actions, in small steps, with early stopping."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.utils import LinearSchedule

from sb3_pg.demonstrations.steps import DemonstratedSteps
from sb3_pg.errors import NonFiniteError
from sb3_pg.functional import behavior_cloning_loss
from sb3_pg.learner.optimizers import with_fewer_operations
from sb3_pg.policies import (
    CHUNK_SIZE,
    action_distribution,
    evaluation_mode,
    original,
    parameter_sets_of,
    policy_cache,
    score_actions,
    score_in_chunks,
    set_training_mode,
    to_env,
    torch_distributions,
    unvalidated_distributions,
)

LearningRate = Callable[[float], float]
#: What to do after each epoch, for a progress bar.
Tick = Callable[[], Any]


@dataclass
class Schedule:
    """How long to train, and in which steps.

    :param n_epochs: passes over the steps to learn from, at most
    :param batch_size: steps of the demonstrations per gradient step
    :param learning_rate: step size of Adam, as a function of the remaining progress, 1 to 0
    :param patience: epochs without an improvement, after which training stops; None for all epochs
    :param seed: seed of the order of the steps
    """

    n_epochs: int = 200
    batch_size: int = 128
    learning_rate: LearningRate = field(default_factory=lambda: LinearSchedule(1e-3, 0.0, 1.0))
    patience: int | None = 50
    seed: int = 0


@dataclass
class Curve:
    """The losses of a training.

    :param training: mean of each epoch, while the parameters change
    :param held_out: after each epoch, of steps that were held out; empty if there are none
    :param best: number of the epoch whose parameters were kept, from 1; 0 if none was better than those before
    """

    training: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    best: int = 0


def clone(
    steps: DemonstratedSteps,
    learned: np.ndarray,
    held_out: np.ndarray,
    schedule: Schedule,
    min_std: float = 0.0,
    tick: Tick = lambda: None,
) -> Curve:
    r"""Train the actor of a policy to do what was demonstrated.

    .. math:: \theta \leftarrow \theta - \alpha \nabla_\theta \left(-\frac{1}{M} \sum_t \log \pi_\theta(a_t|s_t)\right)

    The steps are Adam's. Parameters that only the critic depends on stay as they are.

    With held-out steps, the parameters that agree best with them are kept, which may be those from before: by -log pi,
    or for a Box by the mean absolute error of the most probable action. (There -log pi rises again long before this
    error does, because the standard deviation follows the errors on the steps that are learned.) Without held-out
    steps, the parameters of the last epoch are kept.

    :param steps: the demonstrations, and the policy
    :param learned: numbers of the steps to learn from
    :param held_out: numbers of steps that say when to stop; may be empty
    :param schedule: how long to train, and in which steps
    :param min_std: smallest standard deviation of the actions, see :class:`StdFloor`
    :param tick: is called after each epoch
    :raises NonFiniteError: the loss is not finite. The caller puts the parameters back
    """
    policy, rng = steps.policy, np.random.default_rng(schedule.seed)
    parameters = actor_parameters(policy)
    floor, optimizer = StdFloor(policy, min_std), _optimizer(policy, parameters)

    def epoch() -> th.Tensor:
        losses: list[th.Tensor] = []
        for batch in steps.minibatches(learned, schedule.batch_size, rng):
            log_prob, distributions = _scores(policy, batch.observations, batch.actions)
            loss = behavior_cloning_loss(log_prob, batch.counted)
            if optimizer is not None:
                optimizer.zero_grad()
                loss.backward(inputs=parameters)
                optimizer.step()
                floor.raise_std(distributions)
            losses.append(loss.detach())
        return th.stack(losses).mean()

    curve = Curve()
    least, best = math.inf, None

    def judge(n: int) -> bool:
        """Compare the parameters with the best ones so far."""
        nonlocal least, best
        with evaluation_mode(policy):
            loss = float(negative_log_prob(steps, held_out))
            error = agreement(steps, held_out) if isinstance(policy.action_space, spaces.Box) else loss
        if n:
            curve.held_out.append(finite(loss, "-log pi of held-out steps", n))
        if is_better := error < least:
            least, best, curve.best = error, policy_cache(policy).snapshot(), n
        return is_better

    with unvalidated_distributions():
        if len(held_out):
            judge(0)
            losses = run_epochs(epoch, schedule, optimizer, policy, "-log pi", tick, judge)
        else:
            losses = run_epochs(epoch, replace(schedule, patience=None), optimizer, policy, "-log pi", tick)
            curve.best = len(losses)
        curve.training = losses
        if best is not None:
            best.restore()
        floor.raise_to(steps, learned)
    return curve


def run_epochs(
    epoch: Callable[[], th.Tensor],
    schedule: Schedule,
    optimizer: th.optim.Optimizer | None,
    policy: BasePolicy,
    name: str,
    tick: Tick,
    is_better: Callable[[int], bool] | None = None,
    in_training_mode: bool = True,
) -> list[float]:
    """Train until nothing gets better, and return the mean loss of each epoch.

    :param epoch: trains for an epoch, and returns its mean loss
    :param schedule: how long to train, and in which steps
    :param optimizer: takes the steps; None if nothing is trained
    :param policy: whose parameters are trained
    :param name: name of the loss, for the error message
    :param tick: is called after each epoch
    :param is_better: returns whether an epoch, counted from 1, was better than all before; None compares the losses
    :param in_training_mode: whether the policy is in training mode during an epoch
    :raises NonFiniteError: a loss is not finite
    """
    losses: list[float] = []
    best = 0
    for n in range(1, schedule.n_epochs + 1):
        set_training_mode(policy, in_training_mode)
        rate = schedule.learning_rate(1 - (n - 1) / schedule.n_epochs)
        for group in [] if optimizer is None else optimizer.param_groups:
            group["lr"] = rate * group.get("factor", 1)
        losses.append(finite(float(epoch()), name, n))
        tick()
        if is_better(n) if is_better is not None else losses[-1] <= min(losses):
            best = n
        elif schedule.patience is not None and n - best >= schedule.patience:
            break
    return losses


def finite(loss: float, name: str, epoch: int) -> float:
    """Return a loss.

    :raises NonFiniteError: it is not finite
    """
    if not math.isfinite(loss):
        raise NonFiniteError(f"{name} of epoch {epoch}", loss, hint="A smaller learning rate may help.")
    return loss


def _optimizer(policy: BasePolicy, parameters: list[th.nn.Parameter]) -> th.optim.Adam | None:
    """Return Adam for these parameters; None if there are none. The ``factor`` of a group multiplies the learning rate.

    Logarithms of standard deviations take steps of ten times the size. There are some hundred gradient steps, and each
    of Adam's moves a parameter by at most about the learning rate: the standard deviation would hardly leave its first
    value.
    """
    if not parameters:
        return None
    fast = [parameter for parameter in parameters if parameter is log_std_of(policy)]
    slow = [parameter for parameter in parameters if parameter is not log_std_of(policy)]
    groups: list[dict[str, Any]] = [{"params": slow}, {"params": fast, "factor": 10}]
    optimizer = th.optim.Adam([group for group in groups if group["params"]])
    with_fewer_operations(optimizer)
    return optimizer


# ---------------------------------------------------------------- the actor


def actor_parameters(policy: BasePolicy) -> list[th.nn.Parameter]:
    """Return the parameters that the actions depend on, without frozen ones. Those of shared features are included.

    :param policy: SB3's ActorCriticPolicy, or one with an ``actor`` and ``get_distribution``
    """
    actor: Any = original(policy)
    if isinstance(actor, ActorCriticPolicy):
        reached = list(parameter_sets_of(actor).actor.values())
    else:
        reached = list(actor.actor.parameters())
    return [parameter for parameter in reached if parameter.requires_grad]


def distribution_of(policy: BasePolicy, observations: Any) -> Distribution:
    """Return the policy's action distribution in a new object.

    :param policy: as in :func:`actor_parameters`
    :param observations: one row per sample, or their history
    """
    known: Any = original(policy)
    if isinstance(known, ActorCriticPolicy):
        return action_distribution(known, observations)
    distribution: Distribution = known.get_distribution(observations)
    return distribution


def _scores(policy: BasePolicy, observations: Any, actions: th.Tensor) -> tuple[th.Tensor, Callable[[], Any]]:
    """Return log-probs with gradient, and a function that returns the torch distributions."""
    if isinstance(original(policy), ActorCriticPolicy):
        given: Any = policy
        scores = score_actions(given, observations, actions, with_values=False)
        return scores.log_prob, scores.distribution or (lambda: None)
    distribution = distribution_of(policy, observations)
    return distribution.log_prob(actions), lambda: torch_distributions(distribution)


def negative_log_prob(steps: DemonstratedSteps, chosen: np.ndarray) -> th.Tensor:
    """Return the mean of -log pi of demonstrated actions, nats, without gradient.

    :param steps: the demonstrations, and the policy, in evaluation mode
    :param chosen: numbers of the steps
    """
    policy: Any = steps.policy
    is_known = isinstance(original(policy), ActorCriticPolicy)
    sums = []
    for batch in steps.minibatches(chosen, CHUNK_SIZE):
        if is_known:
            log_prob = score_in_chunks(policy, batch.observations, batch.actions).log_prob
        else:
            with th.no_grad(), unvalidated_distributions():
                log_prob = distribution_of(policy, batch.observations).log_prob(batch.actions)
        sums.append(batch.select(log_prob).sum(dtype=th.float64))
    return -th.stack(sums).sum() / len(chosen)


def agreement(steps: DemonstratedSteps, chosen: np.ndarray) -> float:
    """Return how well the policy's most probable actions agree with demonstrated ones.

    :param steps: the demonstrations, and the policy
    :param chosen: numbers of the steps
    :return: for a Box the mean absolute error, in the env's units, of actions that are clipped to the bounds as SB3
        does; otherwise the share of equal actions, each dimension counted by itself
    """
    policy = steps.policy
    space, convert = policy.action_space, to_env(policy)
    errors = []
    with evaluation_mode(policy), th.no_grad(), unvalidated_distributions():
        for batch in steps.minibatches(chosen, CHUNK_SIZE):
            drawn = distribution_of(policy, batch.observations).get_actions(deterministic=True)
            if not isinstance(space, spaces.Box):
                equal = (drawn == batch.actions).float().reshape(len(drawn), -1).mean(1)
                errors.append(batch.select(equal).sum())
                continue
            rows = batch.steps.cpu().numpy()
            taken = convert(drawn.cpu().numpy().reshape(-1, *space.shape)).astype(np.float64)
            wanted = np.clip(steps.demos.actions[rows].astype(np.float64), space.low, space.high)
            error = th.as_tensor(np.abs(taken - wanted).reshape(len(rows), -1).mean(1), device=batch.steps.device)
            errors.append(batch.select(error).sum())
    return float(th.stack(errors).sum() / len(chosen))


# ---------------------------------------------------------------- the standard deviation


def log_std_of(policy: BasePolicy) -> Any:
    """Return the ``log_std`` of a policy's actor: a parameter, a layer, or None if it has none.

    :param policy: as in :func:`actor_parameters`
    """
    known: Any = original(policy)
    return getattr(known if isinstance(known, ActorCriticPolicy) else known.actor, "log_std", None)


class StdFloor:
    r"""Keeps the standard deviation of a policy's actions from falling below a floor. It is for Box actions.

    The likelihood of a deterministic expert's actions grows without bound as the standard deviation goes to 0. Then
    the cloned policy would explore nothing. The floor is ``min_std`` times half the width of the action's range, or
    ``min_std`` before the squashing, where a policy squashes its actions to [-1, 1].

    - A standard deviation that is a parameter (``policy.log_std``) is clamped after each gradient step.
    - With gSDE it depends on the state, as it does in :class:`~sb3_pg.OffPAC`. There the floor is that of the root mean
      square over states: where it is smaller in an action dimension, the logarithms of all standard deviations of this
      dimension are raised by the difference. This is done after each gradient step with its minibatch, and at the end
      with all steps.

    A frozen parameter stays as it is, and so does the standard deviation of a policy whose ``log_std`` is anything else
    than a parameter or a linear layer.

    :param policy: as in :func:`actor_parameters`
    :param min_std: the floor, 0 for none
    """

    def __init__(self, policy: BasePolicy, min_std: float) -> None:
        given = log_std_of(policy)
        held = given.bias if isinstance(given, th.nn.Linear) else given
        self._log_std: th.nn.Parameter | None = None
        space = policy.action_space
        if not (min_std and isinstance(space, spaces.Box) and isinstance(held, th.nn.Parameter) and held.requires_grad):
            return
        half_width = 0.5 * (space.high.astype(np.float64) - space.low).ravel()
        scale = np.ones_like(half_width) if policy.squash_output else half_width
        with np.errstate(divide="ignore"):  # an action without a range has no floor
            self._floor = th.as_tensor(np.log(min_std * scale), dtype=held.dtype, device=held.device)
        self._log_std = held
        #: whether the standard deviation is the parameter itself
        self._is_plain = held is given and held.dim() == 1

    @th.no_grad()
    def raise_std(self, distributions: Callable[[], Any]) -> None:
        """Raise the standard deviation to the floor.

        :param distributions: returns the distribution of some states
        """
        if self._log_std is None:
            return
        if self._is_plain:
            self._log_std.clamp_(min=self._floor)
            return
        std = getattr(distributions(), "stddev", None)
        if std is not None:
            self._raise_by(std.square().mean(0))

    def _raise_by(self, variance: th.Tensor) -> None:
        assert self._log_std is not None
        missing = (self._floor - 0.5 * variance.log()).clamp(min=0)
        if self._log_std.shape[-1] == 1:  # gSDE with one number for all action dimensions
            missing = missing.max()
        self._log_std.add_(missing)

    @th.no_grad()
    def raise_to(self, steps: DemonstratedSteps, chosen: np.ndarray) -> None:
        """Raise the standard deviation to the floor for given steps.

        :param steps: the demonstrations, and the policy
        :param chosen: numbers of the steps
        """
        if self._log_std is None:
            return
        if self._is_plain:
            self._log_std.clamp_(min=self._floor)
            return
        with evaluation_mode(steps.policy):
            squares = []
            for batch in steps.minibatches(chosen, CHUNK_SIZE):
                std = getattr(torch_distributions(distribution_of(steps.policy, batch.observations)), "stddev", None)
                if std is None:
                    return
                squares.append(batch.select(std.T).square().sum(1))
        self._raise_by(th.stack(squares).sum(0) / len(chosen))
