"""Saving and loading: what a zip holds, and what is made of a zip that lacks something."""

import io
import pathlib
import warnings
from typing import Any, TypeVar

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import GymEnv, TensorDict

from sb3_pg.algorithms.learning import LearningAlgorithm

SelfSaved = TypeVar("SelfSaved", bound="SavedAlgorithm")
#: Attributes that belong to a rollout or follow from the policy, and are neither saved nor copied.
PASSING = ("_batch", "_collected", "_collector", "_parameter_sets", "_surrogate", "_pieces")


class SavedAlgorithm(LearningAlgorithm):
    """An algorithm whose critic may have an optimizer of its own, and whose zips may be those of SB3."""

    policy: ActorCriticPolicy
    critic_optimizer: th.optim.Optimizer | None = None
    _from_sb3: bool

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and copy take: all but the last rollout and the loop that collected it."""
        return {name: value for name, value in vars(self).items() if name not in PASSING}

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *PASSING]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, variables = super()._get_torch_save_params()
        return state_dicts + ([] if self.critic_optimizer is None else ["critic_optimizer"]), variables

    @classmethod
    def load(
        cls: type[SelfSaved],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | str | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfSaved:
        """As SB3's; ``kwargs`` replace attributes, and arguments of the constructor are checked as there.

        ``env`` may be the id of a registered environment, or one of Gymnasium's vector envs, too. A critic's optimizer
        that was not saved starts afresh, and one that is no longer wanted is left out. ``policy_kwargs`` need not name
        the optimizer that ``use_rms_prop`` has put into the saved ones.

        :raises TypeError: an argument that is misspelled
        """
        if isinstance(kwargs.get("policy_kwargs"), dict) and "optimizer_class" not in kwargs["policy_kwargs"]:
            data, _, _ = load_from_zip_file(path, device="cpu", custom_objects=custom_objects)
            saved = (data or {}).get("policy_kwargs", {})
            if issubclass(saved.get("optimizer_class", object), th.optim.RMSprop):
                optimizer = {name: saved[name] for name in ("optimizer_class", "optimizer_kwargs") if name in saved}
                kwargs["policy_kwargs"] = {**kwargs["policy_kwargs"], **optimizer}
        model = super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
        has_rms_prop = isinstance(model.policy.optimizer, th.optim.RMSprop)
        if kwargs.get("use_rms_prop", has_rms_prop) != has_rms_prop:
            kept = type(model.policy.optimizer).__name__
            warnings.warn(
                f"use_rms_prop={not has_rms_prop} has no effect: the model was saved with {kept}", stacklevel=2
            )
        if "rms_prop_eps" in kwargs:
            warnings.warn("rms_prop_eps has no effect: the model was saved with its optimizer", stacklevel=2)
        return model

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """As SB3's."""
        params: Any = load_path_or_dict
        if self._is_loading() and isinstance(params, dict):  # which may change what has an optimizer of its own
            params = dict(params)
            saved = params.pop("critic_optimizer", None)
            if self.critic_optimizer is not None:
                params["critic_optimizer"] = saved or self.critic_optimizer.state_dict()
        super().set_parameters(params, exact_match, device)
