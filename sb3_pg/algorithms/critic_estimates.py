"""Arguments of algorithms whose advantage comes from a critic."""

from typing import Any

from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.arguments import NewSharedArguments
from sb3_pg.algorithms.learners import from_arguments
from sb3_pg.algorithms.objective import ObjectiveArguments, for_objective
from sb3_pg.algorithms.validation import Group
from sb3_pg.errors import SingleStepError
from sb3_pg.learner import Bootstrapped, Estimator
from sb3_pg.learner.estimators import OWN_TARGET, Advantage, CriticTarget


class CriticArguments(NewSharedArguments, ObjectiveArguments, total=False):
    """Keyword arguments of on-policy algorithms whose advantage comes from a critic, without those of SB3's A2C."""

    n_episodes: int | None
    advantage: Advantage
    td_steps: int
    critic_target: CriticTarget | None
    recompute_advantage: bool


def _check(model: Any) -> None:
    if model.env is not None and model.normalize_advantage and model.n_steps == model.n_envs == 1:
        raise SingleStepError(
            "normalize_advantage=True leaves nothing of a single step's advantage, got n_steps=1 with one env: "
            "more steps, or normalize_advantage=False"
        )
    asked = (model.advantage, model.critic_target or "lambda", model.recompute_advantage)
    if model.has_foreign_buffer and asked != ("gae", "lambda", False):
        raise ValueError(
            f"rollout_buffer_class={model.rollout_buffer_class} computes generalized advantages and lambda-returns "
            f"itself, once: got advantage={model.advantage!r}, critic_target={model.critic_target!r}, "
            f"recompute_advantage={model.recompute_advantage}"
        )
    if model.advantage == "td_lambda":
        _check_traces(model)


#: Argument -> the value that eligibility traces take, and why they take no other.
_OF_TRACES: dict[str, tuple[Any, str]] = {
    "memory": (None, "a trace has no gradient through what is remembered"),
    "critic_target": (None, "a trace is multiplied by the TD residual"),
    "normalize_advantage": (False, "a trace is multiplied by the TD residual as it is"),
    "recompute_advantage": (False, "actor and critic share the TD residual"),
    "critic_fit": ("after", "actor and critic share the TD residual"),
    "n_critic_updates": (1, "a trace advances once per env step"),
    "critic_batch_size": (None, "each update has one step of each env"),
}


def _check_traces(model: Any) -> None:
    if not getattr(model, "has_traces", False):
        others = ", ".join(repr(name) for name in OWN_TARGET if name != "td_lambda")
        raise ValueError(
            f"advantage='td_lambda' is for ActorCritic, whose step follows the gradient: {type(model).__name__} takes "
            f"one of {others}"
        )
    for name, (only, why) in _OF_TRACES.items():
        if (value := getattr(model, name)) != only:
            raise ValueError(f"{name} must be {only!r} with advantage='td_lambda', got {value!r}: {why}")


def _without_effect(model: Any) -> dict[str, str]:
    own = OWN_TARGET[model.advantage]
    kinds, asked = {own, model.critic_target or own}, f"advantage={model.advantage!r} and critic_target="
    unused = {} if "n_step" in kinds else {"td_steps": f"{asked}{model.critic_target!r}"}
    if "lambda" not in kinds and model.advantage != "td_lambda" and not model.has_foreign_buffer:
        unused["gae_lambda"] = f"{asked}{model.critic_target!r}"
    return unused


CRITIC_ESTIMATES = Group(
    """
    :param advantage: estimate of the advantage, "gae", "td", "n_step" or "monte_carlo", and in
        :class:`~sb3_pg.ActorCritic` with ``n_steps=1`` "td_lambda", eligibility traces; see
        :class:`~sb3_pg.learner.estimators.Bootstrapped`
    :param td_steps: n of "n_step": rewards before the critic's value
    :param critic_target: return that the critic is trained on, "lambda", "td", "n_step" or "monte_carlo"; None for the
        return that the advantage is computed from
    :param recompute_advantage: whether to compute the batch's values again before each pass of the critic
        (``n_critic_updates``), so that bootstrapped targets follow the critic
    """,
    {
        "advantage": ("gae", arg.choice(*OWN_TARGET)),
        "td_steps": (5, arg.integer(1)),
        "critic_target": (None, arg.choice(*OWN_TARGET.values(), optional=True)),
        "recompute_advantage": (False, arg.instance(bool)),
    },
    check=_check,
    without_effect=_without_effect,
    tolerated=frozenset({"td_steps"}),
)


_bootstrapped = from_arguments(Bootstrapped)


def estimator_with_critic(self: Any) -> Estimator:
    """Make the estimator of the objective from the model's present arguments."""
    return for_objective(self, _bootstrapped(self))
