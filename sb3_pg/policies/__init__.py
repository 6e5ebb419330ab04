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
    uniform_behavior,
)
from sb3_pg.policies.functional_policy import functional_log_prob
from sb3_pg.policies.kept_scores import KeptScores, score_and_keep
from sb3_pg.policies.mlp_fast_path import value_function
from sb3_pg.policies.observations import Observations, example_observation, map_observations, split_observations
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
from sb3_pg.policies.samplers import ForwardSampler, Sampler, make_sampler
from sb3_pg.policies.score_actions import (
    CHUNK_SIZE,
    ActionScores,
    Distributions,
    action_distribution,
    policy_actions,
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
    "ForwardSampler",
    "KeptScores",
    "Observations",
    "ParameterSets",
    "PolicyBehavior",
    "PolicyCache",
    "Sampler",
    "Snapshot",
    "action_dist_kept",
    "action_distribution",
    "adopted",
    "behavior_source",
    "evaluation_mode",
    "example_observation",
    "first_choice",
    "from_env",
    "functional_log_prob",
    "has_own_forward",
    "has_own_predict",
    "is_listened_to",
    "is_patched",
    "make_sampler",
    "map_observations",
    "original",
    "parameter_sets_of",
    "policy_actions",
    "policy_cache",
    "predict",
    "predict_values",
    "reachable_parameters",
    "require_choices",
    "scaled",
    "score_actions",
    "score_and_keep",
    "score_in_chunks",
    "set_training_mode",
    "split_observations",
    "stored_dtype",
    "takes_other_numbers",
    "to_env",
    "torch_distributions",
    "uncompiled",
    "uniform_behavior",
    "unvalidated_distributions",
    "value_function",
    "visible_changes",
]
