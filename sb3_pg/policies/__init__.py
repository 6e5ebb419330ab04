"""Act with SB3's policies, score actions with them, and find out about their methods, modules and parameters.

Other rooms of the package import from here.
"""

from sb3_pg.policies.acting_copy import ActingCopy
from sb3_pg.policies.actions import (
    first_choice,
    from_env,
    predict,
    require_choices,
    scaled,
    stored_dtype,
    takes_other_numbers,
    to_env,
)
from sb3_pg.policies.behavior import (
    Behavior,
    BehaviorPolicy,
    BehaviorSampler,
    PolicyBehavior,
    adopted,
    behavior_source,
    masked_uniform_behavior,
    uniform_behavior,
)
from sb3_pg.policies.extended_policy import ExtendedPolicy, extended, has_masks, has_memory
from sb3_pg.policies.functional_policy import functional_log_prob
from sb3_pg.policies.kept_scores import KeptScores, score_and_keep
from sb3_pg.policies.masked_distributions import MaskedBernoulli, MaskedCategorical, mask_distribution
from sb3_pg.policies.masked_policy import MaskedPolicy, seen_part, seen_space
from sb3_pg.policies.memory import Followers, History, Memory, Sequences, State, States, to_memory
from sb3_pg.policies.minibatches import minibatches, one_in
from sb3_pg.policies.mlp_fast_path import value_function
from sb3_pg.policies.observations import (
    CHUNK_SIZE,
    Observations,
    example_observation,
    map_observations,
    split_observations,
)
from sb3_pg.policies.parameter_sets import ParameterSets, parameter_sets_of, reachable_parameters
from sb3_pg.policies.policy_cache import (
    PolicyCache,
    Snapshot,
    action_dist_kept,
    evaluation_mode,
    has_own_forward,
    has_own_predict,
    is_listened_to,
    is_patched,
    original,
    policy_cache,
    set_training_mode,
    uncompiled,
    unvalidated_distributions,
    visible_changes,
)
from sb3_pg.policies.samplers import ForwardSampler, MemorySampler, NumpyMemorySampler, Sampler, make_sampler
from sb3_pg.policies.score_actions import (
    ActionScores,
    Distributions,
    action_distribution,
    policy_actions,
    predict_all_values,
    predict_values,
    score_actions,
    score_in_chunks,
    torch_distributions,
)

__all__ = [
    "CHUNK_SIZE",
    "ActingCopy",
    "ActionScores",
    "Behavior",
    "BehaviorPolicy",
    "BehaviorSampler",
    "Distributions",
    "ExtendedPolicy",
    "Followers",
    "ForwardSampler",
    "History",
    "KeptScores",
    "MaskedBernoulli",
    "MaskedCategorical",
    "MaskedPolicy",
    "Memory",
    "MemorySampler",
    "NumpyMemorySampler",
    "Observations",
    "ParameterSets",
    "PolicyBehavior",
    "PolicyCache",
    "Sampler",
    "Sequences",
    "Snapshot",
    "State",
    "States",
    "action_dist_kept",
    "action_distribution",
    "adopted",
    "behavior_source",
    "evaluation_mode",
    "example_observation",
    "extended",
    "first_choice",
    "from_env",
    "functional_log_prob",
    "has_masks",
    "has_memory",
    "has_own_forward",
    "has_own_predict",
    "is_listened_to",
    "is_patched",
    "make_sampler",
    "map_observations",
    "mask_distribution",
    "masked_uniform_behavior",
    "minibatches",
    "one_in",
    "original",
    "parameter_sets_of",
    "policy_actions",
    "policy_cache",
    "predict",
    "predict_all_values",
    "predict_values",
    "reachable_parameters",
    "require_choices",
    "scaled",
    "score_actions",
    "score_and_keep",
    "score_in_chunks",
    "seen_part",
    "seen_space",
    "set_training_mode",
    "split_observations",
    "stored_dtype",
    "takes_other_numbers",
    "to_env",
    "to_memory",
    "torch_distributions",
    "uncompiled",
    "uniform_behavior",
    "unvalidated_distributions",
    "value_function",
    "visible_changes",
]
