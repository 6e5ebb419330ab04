"""What behavior cloning has achieved."""

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PretrainReport:
    """What ``pretrain`` has achieved. ``print`` shows it in a few lines.

    Lists have one number per epoch. "Held out" are the steps that were not learned from; if there are none, lists about
    them are empty, and the other numbers are of all steps.

    :param n_steps: steps that were learned from
    :param n_held_out: steps that were held out
    :param losses: mean of -log pi of the demonstrated actions while the policy was learning, nats
    :param held_out_losses: the same of held-out steps, after each epoch
    :param best_epoch: the epoch whose parameters were kept, from 1; 0 if they are those from before
    :param accuracy: share of actions that are the policy's most probable ones, each dimension of MultiDiscrete and
        MultiBinary counted by itself; None for Box
    :param mean_absolute_error: of the policy's most probable actions, in the env's units; None for other spaces
    :param critic_losses: mean squared error of the critic while it was learning, in squared units of its values; empty
        if it was not trained
    :param explained_variance: 1 - Var[G - V] / Var[G] of the critic V and the returns G; NaN if the returns are all but
        equal, None if it was not trained
    """

    n_steps: int
    n_held_out: int
    losses: list[float]
    held_out_losses: list[float]
    best_epoch: int
    accuracy: float | None = None
    mean_absolute_error: float | None = None
    critic_losses: list[float] = field(default_factory=list)
    explained_variance: float | None = None

    @property
    def n_epochs(self) -> int:
        """Number of epochs that the policy was trained for, those after the best one included."""
        return len(self.losses)

    def __str__(self) -> str:
        where = "on held-out steps" if self.n_held_out else "on these steps"
        lines = [
            f"Cloned {self.n_steps} steps, {self.n_held_out} held out.",
            f"-log pi in nats: {_at(self.losses, self.held_out_losses, self.best_epoch)}",
        ]
        if self.accuracy is not None:
            lines.append(f"equal actions: {self.accuracy:.1%} {where}")
        if self.mean_absolute_error is not None:
            lines.append(f"mean absolute error of actions: {self.mean_absolute_error:.4g} {where}")
        if self.critic_losses:
            error = _at(self.critic_losses, [], len(self.critic_losses))
            explained = f"explained variance {self.explained_variance:.3f} {where}"
            if self.explained_variance is None or math.isnan(self.explained_variance):
                explained = "the returns are all but equal, so that no share of their variance is explained"
            lines.append(f"squared error of the critic: {error}; {explained}")
        return "\n".join(lines)


def _at(losses: list[float], held_out: list[float], best: int) -> str:
    """Return the losses of the best epoch as text."""
    if not best:
        return f"not better than before in {len(losses)} epochs, and kept from before"
    after = f", {held_out[best - 1]:.4g} held out" if held_out else ""
    return f"{losses[best - 1]:.4g}{after}, in epoch {best} of {len(losses)}"
