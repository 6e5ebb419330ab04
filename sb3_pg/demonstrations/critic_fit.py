"""Fit a critic to the returns of demonstrations."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch as th

from sb3_pg.demonstrations.cloning import Schedule, Tick, run_epochs
from sb3_pg.demonstrations.steps import DemonstratedSteps
from sb3_pg.functional import reward_to_go, total_return, value_loss
from sb3_pg.learner.metrics import share_of_variance
from sb3_pg.learner.optimizers import with_fewer_operations
from sb3_pg.policies import CHUNK_SIZE, Followers, evaluation_mode, has_memory, map_observations


@dataclass
class CriticToFit:
    """A critic, and what its values mean.

    :param parameters: those that are trained
    :param predict: from observations (or their history) and actions to the critic's values, ``([n_networks,] n_steps)``
    :param value_after: from the observations of episodes' ends, and the history before them if there is memory
        (otherwise None), to their values, ``(n_ends,)``
    :param heads: its last layers, whose outputs are the values; empty if they are not linear
    :param gamma: discount per env step, in [0, 1]
    :param bootstraps: whether the value of the state after a truncated episode counts
    :param total: whether the target of each step is the return of its whole episode
    :param scaled_by: returns the reward units per unit of the critic's values. It is given the targets of all steps,
        once, before training
    :param in_training_mode: whether the critic is trained in training mode
    :param finish: is called after training
    """

    parameters: list[th.nn.Parameter]
    predict: Callable[[Any, th.Tensor], th.Tensor]
    value_after: Callable[[Any, Any], th.Tensor]
    heads: list[th.nn.Linear]
    gamma: float
    bootstraps: bool = True
    total: bool = False
    scaled_by: Callable[[th.Tensor | None], float] = lambda _: 1.0
    in_training_mode: bool = True
    finish: Callable[[], Any] = lambda: None


class FittedCritic(NamedTuple):
    """The result of :func:`fit_critic`.

    :param losses: mean squared error of each epoch, while the critic was learning, squared units of its values
    :param explained_variance: 1 - Var[G - V] / Var[G] of the held-out steps, or of all if none is held out; NaN if
        these returns are all but equal, or there is nothing to train
    """

    losses: list[float]
    explained_variance: float


class _Ends(NamedTuple):
    """Where the value of a state follows the last reward that counts.

    :param before: the steps before it, of the same episode
    :param observation: the state's row among the observations; None if it is among the final observations
    :param episode: number of the episode
    """

    before: slice
    observation: int | None
    episode: int


class ReturnTargets:
    r"""Discounted returns of demonstrations, which a critic is fitted to.

    .. math:: G_t = r_t + \gamma G_{t+1}, \qquad G_T = V(s_T) \text{ behind a truncated episode, otherwise } 0

    Without final observations, nothing is known of the state behind a truncated episode. Then its last observation is
    taken for it, so that its last step has no target.

    :param steps: the demonstrations, and the policy
    :param rewards: r_t, as the critic is to see them, ``(n_steps,)``
    :param critic: the critic
    """

    def __init__(self, steps: DemonstratedSteps, rewards: np.ndarray, critic: CriticToFit) -> None:
        self.steps, self.critic, device = steps, critic, steps.policy.device
        demos = steps.demos
        ended, counted = demos.terminated | demos.truncated, np.ones(len(steps), bool)
        self._ends: list[_Ends] = []
        for n, episode in enumerate(demos.episodes if critic.bootstraps else ()):
            last = episode.stop - 1
            if demos.terminated[last]:
                continue
            if demos.final_observations is not None:
                self._ends.append(_Ends(episode, None, n))
                continue
            counted[last] = False
            if last > episode.start:
                ended[last - 1] = True
                self._ends.append(_Ends(slice(episode.start, last), last, n))
        #: True where a step has a target, ``(n_steps,)``
        self.counted = counted
        self._rewards = th.as_tensor(rewards, dtype=th.float64, device=device)
        self._ended = th.as_tensor(ended, device=device)
        places = [end.before.stop - 1 for end in self._ends]
        self._places = th.as_tensor(np.array(places, np.int64), device=device)

    def present(self, in_reward_units: Callable[[th.Tensor], th.Tensor]) -> th.Tensor:
        """Return the targets of all steps, reward units, ``(n_steps,)``, with the critic's present values.

        :param in_reward_units: function that converts the critic's values
        """
        bootstrap = th.zeros_like(self._rewards)
        if self._ends:
            with evaluation_mode(self.steps.policy), th.no_grad():
                values = th.cat(list(self._values()))
            bootstrap[self._places] = in_reward_units(values.to(bootstrap.dtype))
        columns = (self._rewards[:, None], self._ended[:, None], self.critic.gamma)
        returns = total_return(*columns) if self.critic.total else reward_to_go(*columns, bootstrap[:, None])
        return returns[:, 0]

    def _values(self) -> Iterator[th.Tensor]:
        """Yield the values of the states behind truncated episodes."""
        remembers = has_memory(self.steps.policy)
        chosen: list[_Ends] = []
        n_rows = 0
        for end in self._ends:
            chosen.append(end)
            n_rows += end.before.stop - end.before.start if remembers else 1
            if n_rows >= CHUNK_SIZE or end is self._ends[-1]:
                history = self.steps.history([one.before for one in chosen]) if remembers else None
                yield self.critic.value_after(history, self._observed(chosen))
                chosen, n_rows = [], 0

    def _observed(self, ends: list[_Ends]) -> Any:
        demos = self.steps.demos
        if ends[0].observation is not None:
            return self.steps.observations(np.array([end.observation for end in ends]))
        rows = np.array([end.episode for end in ends])
        return self.steps.seen(map_observations(lambda array: np.asarray(array[rows]), demos.final_observations))


def fit_critic(
    targets: ReturnTargets, learned: np.ndarray, held_out: np.ndarray, schedule: Schedule, tick: Tick = lambda: None
) -> FittedCritic:
    r"""Train a critic on the returns of demonstrations.

    .. math:: \phi \leftarrow \phi - \alpha \nabla_\phi \frac{1}{M} \sum_t (V_\phi(s_t) - G_t)^2

    The steps are Adam's, whose size does not depend on that of the returns. So the critic's outputs are standardized
    while it is trained, by the mean and standard deviation of the targets: its last layer is changed so that the values
    stay the same, and is changed back afterwards (van Hasselt et al. 2016). The values behind truncated episodes are
    computed anew before each epoch.

    Training stops when the loss does not get smaller. Held-out episodes have no say in that: the returns of a few
    episodes differ by chance, and an untrained critic may be the best for them.

    :param targets: the returns, and the critic
    :param learned: numbers of the steps to learn from
    :param held_out: numbers of steps to measure the explained variance with; may be empty
    :param schedule: how long to train, and in which steps
    :param tick: is called after each epoch
    :raises NonFiniteError: the loss is not finite. The caller puts the parameters back
    """
    steps, critic, rng = targets.steps, targets.critic, np.random.default_rng(schedule.seed)
    learned, held_out = (chosen[targets.counted[chosen]] for chosen in (learned, held_out))
    parameters = [parameter for parameter in critic.parameters if parameter.requires_grad]
    if not (parameters and len(learned)):
        return FittedCritic([], np.nan)
    optimizer = with_fewer_operations(th.optim.Adam(parameters))
    scale = critic.scaled_by(None)
    first = targets.present(lambda values: values * scale)[th.as_tensor(targets.counted, device=steps.policy.device)]
    scale = critic.scaled_by(first)
    mean, std = _moments(first / scale) if critic.heads else (0.0, 1.0)

    def standardized() -> th.Tensor:
        """Return the targets of all steps, as the critic is to put them out."""
        goals = targets.present(lambda values: (values * std + mean) * scale) / scale
        return ((goals - mean) / std).float()

    def epoch() -> th.Tensor:
        goals, losses = standardized(), []
        for batch in steps.minibatches(learned, schedule.batch_size, rng):
            values = batch.select(critic.predict(batch.observations, batch.actions))
            loss = value_loss(values, goals[batch.select(batch.steps)].expand_as(values))
            optimizer.zero_grad()
            loss.backward(inputs=parameters)
            optimizer.step()
            losses.append(loss.detach())
        return th.stack(losses).mean() * std**2

    _rescale(critic.heads, 1 / std, -mean / std)
    losses = run_epochs(
        epoch, schedule, optimizer, steps.policy, "critic's loss", tick, in_training_mode=critic.in_training_mode
    )
    goals, errors, numbers = standardized(), [], []
    with evaluation_mode(steps.policy), th.no_grad():
        for batch in steps.minibatches(held_out if len(held_out) else learned, CHUNK_SIZE):
            values = batch.select(critic.predict(batch.observations, batch.actions))
            numbers.append(batch.select(batch.steps))
            errors.append(goals[numbers[-1]] - values.reshape(-1, len(numbers[-1])).mean(0))
    explained = share_of_variance(goals[th.cat(numbers)] + mean / std, th.cat(errors))
    _rescale(critic.heads, std, mean)
    critic.finish()
    return FittedCritic(losses, float(explained))


def _moments(targets: th.Tensor) -> tuple[float, float]:
    """Return mean and standard deviation; 1 in place of a standard deviation that is nothing but rounding errors."""
    std, mean = (float(x) for x in th.std_mean(targets, correction=0))
    return mean, std if std > 1e-6 * abs(mean) and std > 0 else 1.0


@th.no_grad()
def _rescale(heads: list[th.nn.Linear], factor: float, shift: float) -> None:
    """Change linear layers so that their outputs are multiplied by a factor, and then shifted."""
    for head in heads:
        head.weight *= factor
        head.bias.mul_(factor).add_(shift)


def followers(observations: Any) -> Followers:
    """Return observations that follow the last steps of all sequences of a history, one for each."""
    rows = next(iter(observations.values())) if isinstance(observations, dict) else observations
    return Followers(observations, th.arange(len(rows), device=rows.device))
