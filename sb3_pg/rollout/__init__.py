"""Collect env steps, store them, and make batches of them. Other rooms of the package import from here."""

from sb3_pg.rollout.actor import (
    Actor,
    Failure,
    Fragment,
    Playback,
    RemoteTraceback,
    env_of,
    infos_of_episodes,
    order_for,
)
from sb3_pg.rollout.batch import RolloutBatch
from sb3_pg.rollout.buffers import DictTrajectoryRolloutBuffer, TrajectoryRolloutBuffer
from sb3_pg.rollout.collector import (
    Collector,
    CollectorState,
    Order,
    Recording,
    RecordingEnv,
    RolloutListener,
    skip_reset_steps,
)
from sb3_pg.rollout.env_errors import EnvWorkerError, naming_env_errors, require_form
from sb3_pg.rollout.make_batch import (
    action_log_probs,
    batch_from_filled_buffer,
    make_batch,
    score_again,
    score_batch,
    value_again,
)
from sb3_pg.rollout.nonfinite import (
    NormalizationGuard,
    require_finite_observation,
    require_finite_policy,
    require_finite_step,
    require_usable_policy,
)
from sb3_pg.rollout.rollout_counter import EndlessEpisodeError, EpisodeLimit
from sb3_pg.rollout.trajectories import Pieces, Trajectory
from sb3_pg.rollout.trajectory_buffer import DictTrajectoryReplayBuffer, TrajectoryReplayBuffer
from sb3_pg.rollout.transition_buffer import (
    BehaviorReplayBuffer,
    BehaviorSamples,
    DictBehaviorReplayBuffer,
    NStepBehaviorReplayBuffer,
    keep_what_is_drawn,
)

__all__ = [
    "Actor",
    "BehaviorReplayBuffer",
    "BehaviorSamples",
    "Collector",
    "CollectorState",
    "DictBehaviorReplayBuffer",
    "DictTrajectoryReplayBuffer",
    "DictTrajectoryRolloutBuffer",
    "EndlessEpisodeError",
    "EnvWorkerError",
    "EpisodeLimit",
    "Failure",
    "Fragment",
    "NStepBehaviorReplayBuffer",
    "NormalizationGuard",
    "Order",
    "Pieces",
    "Playback",
    "Recording",
    "RecordingEnv",
    "RemoteTraceback",
    "RolloutBatch",
    "RolloutListener",
    "Trajectory",
    "TrajectoryReplayBuffer",
    "TrajectoryRolloutBuffer",
    "action_log_probs",
    "batch_from_filled_buffer",
    "env_of",
    "infos_of_episodes",
    "keep_what_is_drawn",
    "make_batch",
    "naming_env_errors",
    "order_for",
    "require_finite_observation",
    "require_finite_policy",
    "require_finite_step",
    "require_form",
    "require_usable_policy",
    "score_again",
    "score_batch",
    "skip_reset_steps",
    "value_again",
]
