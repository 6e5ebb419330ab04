"""The arguments of the average-reward objective, and the estimator that they ask for."""

from dataclasses import replace
from typing import Any, Literal, TypedDict

from gymnasium.wrappers import NormalizeReward
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.validation import Group
from sb3_pg.errors import SingleStepError
from sb3_pg.learner import Bootstrapped, Differential, Estimator, LearnerState, VTrace

Objective = Literal["discounted", "average"]


class ObjectiveArguments(TypedDict, total=False):
    """Keyword arguments of algorithms that can maximize the average reward."""

    objective: Objective
    average_reward_step_size: float | None
    reset_cost: float
    value_center: float


def _check(model: Any) -> None:
    if model.objective == "discounted":
        return
    average = "objective='average'"
    if model.n_steps is None:
        raise ValueError(
            f"{average} takes segments of n_steps=, got n_steps=None: complete episodes belong to a task that ends"
        )
    if model.state_discount:
        raise ValueError(f"{average} has no discount, got state_discount=True: set it to False")
    if model.truncation == "terminal":
        raise ValueError(f"{average} is of a task that no time limit ends, got truncation='terminal': use 'bootstrap'")
    if model.has_foreign_buffer:
        raise ValueError(
            f"{average} takes a rollout buffer of this package, got rollout_buffer_class={model.rollout_buffer_class}, "
            "which computes discounted returns itself"
        )
    if model.env is None:
        return
    if model.average_reward_step_size is None and model.n_steps * model.n_envs == 1:
        raise SingleStepError(
            f"{average} subtracts the mean reward of a batch, which leaves nothing of a single step's, got n_steps=1 "
            "with one env: set average_reward_step_size, e.g. to 0.01"
        )
    _require_endless(model.env)


def _require_endless(env: VecEnv) -> None:
    """Require an env whose rewards and resets are those of a task that goes on for ever.

    :param env: the env with all its wrappers
    :raises ValueError: its rewards are scaled by discounted returns, or it hides the state that follows a reset
    """
    normalization = unwrap_vec_normalize(env)
    instead = "use normalize_value_targets=True for a critic whose targets have scale 1"
    if normalization is not None and normalization.norm_reward:
        raise ValueError(
            "objective='average' takes rewards as they are, got an env with VecNormalize(norm_reward=True), which "
            f"divides them by the spread of discounted returns: set norm_reward=False, and {instead}"
        )
    if any(env.env_is_wrapped(NormalizeReward)):
        raise ValueError(
            "objective='average' takes rewards as they are, got an env with gymnasium's NormalizeReward, which divides "
            f"them by the spread of discounted returns: leave it out, and {instead}"
        )
    if getattr(env, "next_step_autoreset", False):
        raise ValueError(
            "objective='average' goes on in the state that follows a reset, got an env that gives it one step later "
            "(AutoresetMode.NEXT_STEP): use AutoresetMode.SAME_STEP"
        )


def _without_effect(model: Any) -> dict[str, str]:
    if model.objective == "average":
        return {"gamma": "objective='average', which has no discount: leave gamma at its default"}
    names = ("average_reward_step_size", "reset_cost", "value_center")
    return dict.fromkeys(names, "objective='discounted': give objective='average'")


OBJECTIVE = Group(
    """
    :param objective: "discounted": the discounted return of an episode. "average": the average reward of a task that
        goes on for ever; see :class:`~sb3_pg.learner.Differential`. It has no ``gamma``, takes segments of ``n_steps``,
        and rewards without VecNormalize's scaling. With ``gae_lambda=1`` only the segment's end bounds the horizon,
        and the variance is that of the sum of its rewards
    :param average_reward_step_size: eta, in (0, 1]: the average reward moves by eta times the mean TD error of each
        batch; None for the mean reward of each batch, which takes batches of some hundred steps
    :param reset_cost: is subtracted from the reward of a step that terminates an episode, reward units. The task goes
        on in the state that the reset gives
    :param value_center: nu, in [0, 1]: share of the critic's mean value that is subtracted from its targets, so that
        the constant in differential values, which nothing determines, does not drift. It is for batches of some
        hundred steps: with one step and one env it acts as a discount of 1 / (1 + nu)
    """,
    {
        "objective": ("discounted", arg.choice("discounted", "average")),
        "average_reward_step_size": (None, arg.unless(None, 1, check=arg.fraction)),
        "reset_cost": (0.0, arg.real(0)),
        "value_center": (0.0, arg.real(0, 1)),
    },
    check=_check,
    without_effect=_without_effect,
)


def for_objective(model: Any, estimator: Bootstrapped | VTrace) -> Estimator:
    """Return the estimator, or one of the average reward that is made from it.

    :param model: an algorithm with the arguments of :data:`OBJECTIVE`
    :param estimator: of the discounted objective
    """
    if model.objective == "discounted":
        return estimator
    state = vars(model).get("learner_state", LearnerState())
    return Differential(
        replace(estimator, gamma=1.0, state_discount=False),
        state.average_reward,
        model.average_reward_step_size,
        model.reset_cost,
        model.value_center,
    )
