"""From env steps to a batch: sampling, collecting, storing, evaluating."""

from sb3_pg.rollout.actions import from_env, predict, require_choices, scaled, stored_dtype, takes_other_numbers, to_env
from sb3_pg.rollout.batch import Observations, RolloutBatch
from sb3_pg.rollout.behavior import (
    Behavior,
    BehaviorPolicy,
    BehaviorSampler,
    PolicyBehavior,
    adopted,
    behavior_source,
    uniform_behavior,
)
from sb3_pg.rollout.buffers import DictTrajectoryRolloutBuffer, TrajectoryRolloutBuffer
from sb3_pg.rollout.callback_locals import OffPolicyLocals
from sb3_pg.rollout.collector import Collector, false_steps_masked
from sb3_pg.rollout.compiled import compile_networks, compiled
from sb3_pg.rollout.evaluation import (
    action_log_probs,
    batch_from_filled_buffer,
    evaluate_batch,
    fill_bootstrap,
    make_batch,
)
from sb3_pg.rollout.finite import (
    NormalizationGuard,
    require_finite_observation,
    require_finite_policy,
    require_finite_step,
)
from sb3_pg.rollout.forward import (
    CHUNK_SIZE,
    Distributions,
    EntropyUse,
    Evaluation,
    action_distribution,
    evaluate,
    perceptron_distribution,
    policy_actions,
    predict_log_probs,
    predict_values,
    split_observations,
    torch_distributions,
)
from sb3_pg.rollout.plain import value_function
from sb3_pg.rollout.progress import EndlessEpisodeError, EpisodeLimit
from sb3_pg.rollout.replay import DictTrajectoryReplayBuffer, TrajectoryReplayBuffer
from sb3_pg.rollout.samplers import Sampler, make_sampler, unvalidated_distributions
from sb3_pg.rollout.structure import (
    Snapshot,
    Structure,
    action_dist_kept,
    evaluation_mode,
    has_own_forward,
    has_own_predict,
    is_listened_to,
    is_patched,
    is_same_in_both_modes,
    original,
    set_training_mode,
    structure_of,
)
from sb3_pg.rollout.trajectories import Pieces, Trajectory
from sb3_pg.rollout.transitions import (
    BehaviorReplayBuffer,
    BehaviorSamples,
    DictBehaviorReplayBuffer,
    NStepBehaviorReplayBuffer,
    keep_what_is_drawn,
)

__all__ = [
    "CHUNK_SIZE",
    "Behavior",
    "BehaviorPolicy",
    "BehaviorReplayBuffer",
    "BehaviorSampler",
    "BehaviorSamples",
    "Collector",
    "DictBehaviorReplayBuffer",
    "DictTrajectoryReplayBuffer",
    "DictTrajectoryRolloutBuffer",
    "Distributions",
    "EndlessEpisodeError",
    "EntropyUse",
    "EpisodeLimit",
    "Evaluation",
    "NStepBehaviorReplayBuffer",
    "NormalizationGuard",
    "Observations",
    "OffPolicyLocals",
    "Pieces",
    "PolicyBehavior",
    "RolloutBatch",
    "Sampler",
    "Snapshot",
    "Structure",
    "Trajectory",
    "TrajectoryReplayBuffer",
    "TrajectoryRolloutBuffer",
    "action_dist_kept",
    "action_distribution",
    "action_log_probs",
    "adopted",
    "batch_from_filled_buffer",
    "behavior_source",
    "compile_networks",
    "compiled",
    "evaluate",
    "evaluate_batch",
    "evaluation_mode",
    "false_steps_masked",
    "fill_bootstrap",
    "from_env",
    "has_own_forward",
    "has_own_predict",
    "is_listened_to",
    "is_patched",
    "is_same_in_both_modes",
    "keep_what_is_drawn",
    "make_batch",
    "make_sampler",
    "original",
    "perceptron_distribution",
    "policy_actions",
    "predict",
    "predict_log_probs",
    "predict_values",
    "require_choices",
    "require_finite_observation",
    "require_finite_policy",
    "require_finite_step",
    "scaled",
    "set_training_mode",
    "split_observations",
    "stored_dtype",
    "structure_of",
    "takes_other_numbers",
    "to_env",
    "torch_distributions",
    "uniform_behavior",
    "unvalidated_distributions",
    "value_function",
]
