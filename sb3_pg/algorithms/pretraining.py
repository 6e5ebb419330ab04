"""Pretrain a model on demonstrations: statistics of its VecNormalize, its actor, and its critic."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize, VecTransposeImage
from tqdm import tqdm  # type: ignore[import-untyped]

from sb3_pg.action_masks import MASK_KEY
from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.environments import require_normalized_last
from sb3_pg.demonstrations import Demonstrations, PretrainReport
from sb3_pg.demonstrations.checks import chunks
from sb3_pg.demonstrations.cloning import Schedule, agreement, clone
from sb3_pg.demonstrations.critic_fit import CriticToFit, ReturnTargets, fit_critic
from sb3_pg.demonstrations.steps import DemonstratedSteps
from sb3_pg.envs import ActionMaskVecEnv
from sb3_pg.functional import reward_to_go
from sb3_pg.learner.rollback import undone_on_failure
from sb3_pg.policies import map_observations, set_training_mode
from sb3_pg.rollout import NormalizationGuard


def _check_validation(name: str, value: Any) -> None:
    arg.real(0, 1)(name, value)
    if value == 1:
        raise ValueError(f"{name} must be below 1, which would hold out everything, got {value!r}")


#: Steps that frozen statistics count. All steps of a training change them by less than a thousandth of a percent.
FROZEN_COUNT: Final = 1e12
#: Standard deviation of a number that is constant but for rounding, as a share of its size.
ROUNDING: Final = 1e-6
#: Checks of the arguments of ``pretrain``.
CHECKS: Final[Mapping[str, arg.Check]] = {
    "demos": arg.instance(Demonstrations),
    "n_epochs": arg.integer(1),
    "batch_size": arg.integer(1),
    "validation": _check_validation,
    "critic": arg.instance(bool, optional=True),
    "learning_rate": arg.schedule(above_0=True),
    "min_std": arg.real(0),
    "freeze_normalization": arg.instance(bool),
    "patience": arg.integer(1, optional=True),
    "seed": arg.integer(0, optional=True),
    "progress_bar": arg.instance(bool),
}


def pretrain(
    model: Any,
    steps: DemonstratedSteps,
    critic: CriticToFit | None,
    schedule: Schedule,
    validation: float,
    min_std: float,
    freeze_normalization: bool,
    progress_bar: bool,
) -> PretrainReport:
    """Fit statistics, actor and critic to demonstrations. If that fails, all of them stay as they were.

    :param model: the algorithm, with a policy
    :param steps: the demonstrations as the policy takes them, see :func:`steps_for`
    :param critic: the critic to fit; None for none
    :param schedule: how long to train, and in which steps
    :param validation: share of the episodes that are held out
    :param min_std: floor of the standard deviation, see :class:`~sb3_pg.demonstrations.cloning.StdFloor`
    :param freeze_normalization: whether the statistics of observations stay as they are from here on
    :param progress_bar: whether to show one
    """
    demos = steps.demos
    learned, held_out = split_steps(demos, validation, schedule.seed)
    policy: BasePolicy = model.policy
    training = policy.training
    set_training_mode(policy, False)
    normalization = model.get_vec_normalize_env()
    n_parts = 1 if critic is None else 2
    try:
        with (
            statistics_kept(model),
            undone_on_failure(policy),
            tqdm(total=n_parts * schedule.n_epochs, disable=not progress_bar, unit="epoch") as bar,
        ):
            if normalization is not None and normalization.training:
                fit_statistics(normalization, demos, freeze_normalization)
            curve = clone(steps, learned, held_out, schedule, min_std, bar.update)
            fitted = None
            if critic is not None:
                assert demos.rewards is not None
                bar.update(schedule.n_epochs - bar.n)
                rewards = demos.rewards.astype(np.float64)
                scaled = rewards if normalization is None else normalization.normalize_reward(rewards)
                fitted = fit_critic(ReturnTargets(steps, scaled, critic), learned, held_out, schedule, bar.update)
            agrees = agreement(steps, held_out if len(held_out) else learned)
    finally:
        set_training_mode(policy, training)
    is_box = isinstance(model.action_space, spaces.Box)
    return PretrainReport(
        len(learned),
        len(held_out),
        curve.training,
        curve.held_out,
        curve.best,
        None if is_box else agrees,
        agrees if is_box else None,
        [] if fitted is None else fitted.losses,
        explained_variance=None if fitted is None else fitted.explained_variance,
    )


def split_steps(demos: Demonstrations, validation: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of the steps to learn from, and of those held out: of whole episodes if there are two.

    Steps of a single episode are drawn at random.

    :param demos: the demonstrations
    :param validation: share that is held out, in [0, 1)
    :param seed: of the draw
    """
    if demos.n_episodes > 1 or demos.n_steps == 1:
        return demos.held_out_steps(validation, seed)
    n_held_out = min(max(round(validation * demos.n_steps), validation > 0), demos.n_steps - 1)
    order = np.random.default_rng(seed).permutation(demos.n_steps)
    return np.sort(order[n_held_out:]), np.sort(order[:n_held_out])


# ---------------------------------------------------------------- spaces


def steps_for(model: Any, demos: Demonstrations) -> DemonstratedSteps:
    """Return the steps of demonstrations as a model's policy takes them.

    :param model: the algorithm, with a policy
    :param demos: the demonstrations
    :raises ValueError: they do not fit the model's spaces, or a wrapper changes what its VecNormalize has normalized
    """
    squashed = isinstance(model.action_space, spaces.Box) and model.policy.squash_output
    demos.check_spaces(space_of(model, demos), model.action_space, squashed=squashed)
    return DemonstratedSteps(demos, model.policy, normalizer(model))


def space_of(model: Any, demos: Demonstrations) -> spaces.Space[Any]:
    """Return the space of observations before normalization, with masks if the demonstrations have some."""
    space: spaces.Space[Any] = model.observation_space
    normalization: VecNormalize | None = model.get_vec_normalize_env()
    if normalization is not None and normalization.norm_obs:
        require_normalized_last(model.env, "demonstrations hold", (ActionMaskVecEnv, VecTransposeImage))
        space = normalization.venv.observation_space
    if not model.uses_masks:
        return space
    parts = dict(model.observation_space.spaces)
    mask = parts.pop(MASK_KEY)
    inner = space.spaces if isinstance(space, spaces.Dict) else dict.fromkeys(parts, space)
    parts = {key: inner[key] for key in parts}
    if not isinstance(demos.observations, dict) and len(parts) == 1:
        return next(iter(parts.values()))
    has_masks = isinstance(demos.observations, dict) and MASK_KEY in demos.observations
    return spaces.Dict({**parts, MASK_KEY: mask} if has_masks else parts)


# ---------------------------------------------------------------- VecNormalize


def normalizer(model: Any) -> Callable[[Any], Any] | None:
    """Return a function that normalizes observations, without masks, as the model's VecNormalize does at present."""
    normalization: VecNormalize | None = model.get_vec_normalize_env()
    if normalization is None or not normalization.norm_obs:
        return None
    if isinstance(normalization.observation_space, spaces.Dict):
        return normalization.normalize_obs

    def normalize(rows: Any) -> Any:  # masks are added around it, which makes a dict
        return map_observations(normalization.normalize_obs, rows)

    return normalize


def fit_statistics(normalization: VecNormalize, demos: Demonstrations, freeze: bool) -> None:
    """Add demonstrations to the running statistics of a VecNormalize, as if it had seen their steps.

    :param normalization: the wrapper
    :param demos: the demonstrations
    :param freeze: whether the statistics of observations stay as they are then. If they are new, a number that is the
        same in all demonstrated observations gets the variance 1: with its own, all but 0, any other value would be
        clipped as long as they are frozen
    """
    observations: Any = demos.observations
    if normalization.norm_obs:
        running: Any = normalization.obs_rms
        if isinstance(running, dict):
            parts = [(statistics, observations[key]) for key, statistics in running.items()]
        else:
            if isinstance(observations, dict):  # besides masks, which the wrapper has not seen
                observations = next(array for key, array in observations.items() if key != MASK_KEY)
            parts = [(running, observations)]
        for statistics, array in parts:
            seen = RunningMeanStd(0.0, array.shape[1:])
            for _, piece in chunks(array):
                seen.update(np.asarray(piece))
            is_new = statistics.count < 1
            statistics.combine(seen)
            if freeze and is_new:
                constant = np.sqrt(seen.var) <= ROUNDING * np.abs(seen.mean)
                statistics.var = np.where(constant, 1.0, statistics.var)
            if freeze:
                statistics.count = max(statistics.count, FROZEN_COUNT)
    if demos.rewards is not None:
        # R_t = r_t + gamma R_{t-1} within an episode: a return backwards in time
        starts = np.zeros(demos.n_steps, bool)
        starts[[episode.start for episode in demos.episodes]] = True
        rewards, ends = (
            th.as_tensor(array[::-1].copy())[:, None] for array in (demos.rewards.astype(np.float64), starts)
        )
        normalization.ret_rms.update(reward_to_go(rewards, ends, normalization.gamma)[:, 0].numpy())


@contextmanager
def statistics_kept(model: Any) -> Iterator[None]:
    """Context that puts the statistics of a model's VecNormalize, and of its critic's targets, back if it fails."""
    state = vars(model).get("learner_state")
    before = copy.copy(state)
    guard = NormalizationGuard(model.env) if model.env is not None else None
    try:
        if guard is None:
            yield
        else:
            with guard.statistics_kept(BaseException):
                yield
    except BaseException:
        if state is not None:
            vars(state).update(vars(before))
        raise
