"""Arguments of algorithms with Monte-Carlo returns and a baseline, and their estimator."""

from typing import Any, Literal

from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.validation import Group
from sb3_pg.baselines import make_baseline
from sb3_pg.learner import MonteCarlo

BaselineName = Literal["none", "mean", "leave_one_out", "time", "optimal", "linear", "value"]


def monte_carlo(model: Any) -> MonteCarlo:
    """Make the estimator from a model's present arguments. It uses the model's fitted baseline.

    :param model: an algorithm with the arguments of :data:`MONTE_CARLO`
    """
    return MonteCarlo(
        model.gamma, model.returns, model.fitted_baseline, model.state_discount, model.critic_fit == "before"
    )


def keep_baseline(model: Any) -> None:
    """Make the model's baseline. Keep a fitted baseline, e.g. a loaded one, if it was made from the same arguments.

    :param model: an algorithm with the arguments of :data:`MONTE_CARLO`
    """
    attributes = vars(model)
    if "_baseline" in attributes:  # from a zip of an earlier version
        model.fitted_baseline, model.baseline_of = attributes.pop("_baseline"), attributes.pop("_baseline_of", None)
    asked_for = [model.baseline, model.baseline_kwargs, model.returns]  # a list, because a zip turns a tuple into one
    fitted = attributes.get("fitted_baseline")
    is_fitted = isinstance(model.baseline, str) and getattr(fitted, "uses_fit", False)
    if not is_fitted or attributes.get("baseline_of") != asked_for:
        per_episode = model.returns == "total"
        model.fitted_baseline = make_baseline(
            model.baseline, model.baseline_kwargs, per_episode, model.observation_space
        )
        model.baseline_of = asked_for


def require_episodes(model: Any) -> None:
    """Require batches with as many episodes as the baseline needs.

    :param model: an algorithm with the arguments of :data:`MONTE_CARLO`
    :raises ValueError: batches have fewer episodes, so that all advantages would be 0
    """
    fewest, least = model.n_episodes_at_least, model.fitted_baseline.min_episodes
    if fewest < least and model.env is not None:
        raise ValueError(
            f"baseline={model.baseline!r} needs at least {least} episodes per update, got n_episodes={fewest}"
        )


def _check(model: Any) -> None:
    if model.returns == "total":
        if model.state_discount and model.gamma < 1:
            raise ValueError(
                f"state_discount=True with returns='total' and gamma={model.gamma} would discount twice: the total "
                "return is discounted from the episode's start already"
            )
        if model.truncation == "bootstrap":
            raise ValueError("truncation='bootstrap' has no place in returns='total', the reward that was received")
    if model.fitted_baseline.per_parameter and model.normalize_advantage:
        raise ValueError("normalize_advantage has no single advantage to normalize with a component-wise baseline")
    if getattr(model, "has_foreign_buffer", False) and not model.fitted_baseline.subtracts_values:
        raise ValueError(
            f"rollout_buffer_class={model.rollout_buffer_class} subtracts the critic's values itself: "
            f"it takes baseline='value', got {model.baseline!r}"
        )


def _without_effect(model: Any) -> dict[str, str]:
    unused = {}
    baseline = model.fitted_baseline
    if not baseline.uses_fit and not baseline.requires_critic:
        unused["critic_fit"] = f"baseline={model.baseline!r}, which has nothing to fit later"
    if not getattr(model, "has_foreign_buffer", True):
        unused["gae_lambda"] = f"the returns of {type(model).__name__}: ActorCritic has generalized advantages"
    return unused


MONTE_CARLO = Group(
    """
    :param returns: "reward_to_go": G_t is the sum of rewards from t on; "total": that of the whole episode
    :param baseline: b: "none", "mean", "leave_one_out", "time", "optimal", "linear", "value", or an object with
        ``fit(batch, returns)`` and ``predict(batch)``
    :param baseline_kwargs: arguments of the named baseline, e.g. ``{"component_wise": True}`` of "optimal"
    """,
    {
        "returns": ("reward_to_go", arg.choice("reward_to_go", "total")),
        "baseline": ("value", lambda _, value: None if isinstance(value, str) else (make_baseline(value), None)[1]),
        "baseline_kwargs": (None, arg.instance(dict, optional=True)),
    },
    check=_check,
    without_effect=_without_effect,
)
