"""What all algorithms share: arguments, env, ``learn``, log, saving and loading."""

import inspect
import io
import pathlib
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from copy import copy, deepcopy
from functools import partial
from typing import Any, ClassVar, Final, Literal, NamedTuple, TypeVar, cast

import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from stable_baselines3.common.base_class import BaseAlgorithm, maybe_make_env
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import recursive_getattr
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule, TensorDict
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import VecEnv
from typing_extensions import Self

from sb3_pg.action_masks import has_mask_key
from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.environments import check_action_space, check_observation_space
from sb3_pg.algorithms.masks import fit_evaluations, masks_of, used_masks, using_masks, with_masks
from sb3_pg.algorithms.policy_arguments import check_policy_kwargs, require_policy_for
from sb3_pg.algorithms.pretraining import CHECKS as PRETRAIN_CHECKS
from sb3_pg.algorithms.pretraining import pretrain, steps_for
from sb3_pg.algorithms.saved_files import (
    as_zip,
    require_attributes,
    require_finite_states,
    require_like_optimizers,
    set_variables,
    why_not_loaded,
)
from sb3_pg.algorithms.suggestions import REMOVED
from sb3_pg.algorithms.validation import ALWAYS, SB3, EnvLike, Group, defaults_of
from sb3_pg.checkpoints import read_model, unchanged_random_state, write_model
from sb3_pg.checkpoints.folder import CheckpointFolder
from sb3_pg.checkpoints.model_file import RECOMPUTED, NamedBytes, name_of
from sb3_pg.checkpoints.resume import ResumeCallback, Resumption
from sb3_pg.checkpoints.safe_pickle import loads
from sb3_pg.demonstrations import Demonstrations, PretrainReport
from sb3_pg.demonstrations.cloning import Schedule as CloningSchedule
from sb3_pg.demonstrations.critic_fit import CriticToFit
from sb3_pg.envs import GymVectorAdapter, infos_have_masks
from sb3_pg.errors import DamagedFileError, NonFiniteError
from sb3_pg.extras import extra_hints
from sb3_pg.learner import Metrics
from sb3_pg.policies import Memory, States, extended, has_masks, predict, seen_space, to_memory
from sb3_pg.rollout import NormalizationGuard, naming_env_errors

SelfAlgorithm = TypeVar("SelfAlgorithm", bound="Algorithm")
#: Type of ``log_interval`` in ``learn``: as in SB3, or "auto", which logs about every 500 steps of each env.
LogInterval = int | Literal["auto"] | None
#: Steps of each env between two logs with "auto". A2C logs as often: every 100 updates of 5 steps.
AUTO_LOG_STEPS: Final = 500
#: Resets in a row whose observations may be NaN with ``on_nonfinite="skip"``.
MAX_FAILED_RESETS: Final = 10


class _Load(NamedTuple):
    """A call of ``load``: the names of the attributes that it was given, and the file."""

    given: Collection[str]
    file: str


#: The call of ``load`` that runs, None if none does.
_LOADING: ContextVar[_Load | None] = ContextVar("loading", default=None)
#: Attributes that belong to one rollout, or that are made from the policy. They are neither saved nor copied.
TRANSIENT_ATTRS = (
    *("learner", "rollout_batch", "_collected", "_collector", "_pieces", "checkpointer", "_resumption"),
    "_rollouts_left",
)
#: Metrics that are printed only with ``verbose=2``. TensorBoard and CSV files have all metrics.
_DETAILS: Final = frozenset(
    {
        *("clipped_action_fraction", "entropy", "step_size", "surrogate_predicted", "surrogate_realized"),
        *("largest_ratio", "effective_sample_size", "largest_weight", "truncated_fraction"),
        *("cg_iterations", "cg_residual", "line_search_steps"),
    }
)
#: Checks of the arguments of ``learn``, in the order of its signature.
LEARN_CHECKS: dict[str, arg.Check] = {
    "total_timesteps": arg.real(0),
    "callback": arg.callback,
    "log_interval": arg.log_interval,
    "tb_log_name": arg.instance(str, optional=True),
    "reset_num_timesteps": arg.instance(bool),
    "progress_bar": arg.instance(bool),
}


class Algorithm(BaseAlgorithm):
    """Base class of all algorithms. A subclass derives from it first, and then from a base class of SB3.

    The base class of SB3 is OnPolicyAlgorithm or OffPolicyAlgorithm.
    """

    #: name of an argument -> its check
    checks: ClassVar[Mapping[str, arg.Check]]
    critic_optimizer: th.optim.Optimizer | None = None
    on_nonfinite: str = "raise"
    _n_skipped = 0
    #: how often collecting has failed before its first step, and ``num_timesteps`` then
    _failed_resets = 0, 0
    #: with ``log_interval="auto"``, the smallest number of env steps between two logs; otherwise 0
    _log_steps = 0
    #: ``num_timesteps`` at the last log of ``log_interval="auto"``
    _logged_at = 0
    memory: Memory | Literal["lstm", "gru"] | dict[str, Any] | None = None
    use_action_masks: bool | None = None
    #: what a policy with memory remembers of each env; None for nothing
    _memory: States | None = None
    #: saves the run that ``learn`` is in
    checkpointer: ResumeCallback | None = None
    #: what the next ``learn`` goes on from
    _resumption: Resumption | None = None
    #: number of rollouts that ``warm_up_critic`` has still to collect; None while it does not run
    _rollouts_left: int | None = None

    # ---------------------------------------------------------------- arguments

    #: tables of the class's arguments, see :mod:`sb3_pg.algorithms.arguments`
    groups: ClassVar[tuple[Group, ...]] = ()

    def _construct(self, given: Mapping[str, Any], of_sb3: Collection[str], **fixed: Any) -> None:
        """Check the arguments, set them as attributes, and call the constructor of SB3's base class.

        :param given: the constructor's arguments
        :param of_sb3: names of arguments that SB3's base class takes, besides those of ``ALWAYS`` and ``SB3``
        :param fixed: other arguments of SB3's base class
        :raises ValueError: an argument out of range, or arguments that contradict each other
        :raises TypeError: an argument of the wrong type, or an unknown one
        """
        refused = {name: fixed for group in self.groups for name, fixed in group.refused.items()}
        values = defaults_of(self.groups)
        values |= {name: value for name, (value, _) in refused.items()}
        arg.require_arguments(type(self), given, but={name: why for name, (_, why) in refused.items()})
        values |= given
        arg.check_arguments(values, self.checks)
        init_setup_model = values.pop("_init_setup_model")
        if values["policy"] in ("MlpPolicy", "CnnPolicy"):  # SB3 refuses them with a Dict, which may be that of masks
            values["policy"] = self._get_policy_from_name(values["policy"])
        of_base = {name: values.pop(name) for name in (*ALWAYS.arguments, *SB3.arguments, *of_sb3) if name in values}
        of_base["policy_kwargs"] = dict(of_base["policy_kwargs"] or {})  # SB3 writes into it
        for name, value in values.items():
            setattr(self, name, value)
        use_masks = used_masks() if self._is_loading() else self.use_action_masks
        try:
            with extra_hints(), using_masks(use_masks, isinstance(given.get("env"), str)):
                super().__init__(
                    **of_base,
                    **fixed,
                    supported_action_spaces=(spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
                )
        except ValueError as error:
            if "gSDE" in str(error):
                raise ValueError(f"use_sde must be False for actions of this env, got True: {error}") from error
            raise
        if init_setup_model:
            self._setup_model()

    def _setup_lr_schedule(self) -> None:
        self.lr_schedule = arg.to_schedule(self.learning_rate)

    def _get_policy_from_name(self, policy_name: str) -> type[BasePolicy]:
        if policy_name in self.policy_aliases:
            return self.policy_aliases[policy_name]
        hint = ""
        if "lstm" in policy_name.lower() or "recurrent" in policy_name.lower():
            hint = "; give memory='lstm' with policy='MlpPolicy', 'CnnPolicy' or 'MultiInputPolicy' instead"
            if "memory" not in self.checks:
                hint = f"; {type(self).__name__} has no recurrent policies"
        raise ValueError(f"policy must be one of {list(self.policy_aliases)} or a class, got {policy_name!r}{hint}")

    def _check_combinations(self) -> None:
        """Check the arguments against each other.

        :raises ValueError: naming the arguments that contradict each other
        """
        for group in self.groups:
            group.check(self)

    def _check_effects(self) -> None:
        """Raise an error, or warn, if an argument was given that has no effect. A zip's arguments were not given.

        :raises ValueError: an argument without effect was given, and it is not among those that give a warning
        """
        fixed = {name: value for group in self.groups for name, (value, _) in group.refused.items()}
        unused = {
            name: why
            for group in self.groups
            for name, why in group.without_effect(self).items()
            if not self._is_kept_by_load(name) and not (name in fixed and getattr(self, name) == fixed[name])
        }
        tolerated = {name for group in self.groups for name in group.tolerated}
        arg.check_effects(type(self), vars(self), unused, tolerated)

    def _check_again(self) -> None:
        """Check the arguments again, because ``load`` replaces attributes after the constructor has run.

        :raises ValueError: an argument is out of range, or the model has never had an env
        :raises TypeError: an argument is of the wrong type
        """
        if not hasattr(self, "observation_space"):
            raise ValueError("env must be an environment or the id of a registered one, got None")
        self._make_plain()
        values = {name: value for name, value in vars(self).items() if name not in ("policy", "env")}
        arg.check_arguments(values, self.checks)
        space, policy_kwargs = self._seen_by_policy()
        names = {cls: name for name, cls in self.policy_aliases.items()}
        name = names.get(self.policy_class, self.policy_class.__name__)
        observes_masks = bool(self.uses_masks and self.policy_kwargs.get("observe_masks"))
        require_policy_for(name, self._features_extractor(), space, observes_masks)
        check_policy_kwargs(self.policy_class, policy_kwargs, space, self.use_sde)

    @property
    def uses_masks(self) -> bool:
        """Whether observations have action masks, which the policy keeps to."""
        if self.use_action_masks is False or not hasattr(self, "observation_space"):
            return False
        return has_mask_key(self.observation_space, self.action_space)

    def _seen_by_policy(self) -> tuple[spaces.Space[Any], dict[str, Any]]:
        """Return the space that the policy's networks see, and ``policy_kwargs`` without the name for masks."""
        if not self.uses_masks:
            return self.observation_space, self.policy_kwargs
        others = {name: value for name, value in self.policy_kwargs.items() if name != "observe_masks"}
        observe: Any = self.policy_kwargs.get("observe_masks", False)
        arg.instance(bool)("policy_kwargs['observe_masks']", observe)
        policy_class: Any = self.policy_class
        return seen_space(self.observation_space, policy_class, self._features_extractor(), observe), others

    def _features_extractor(self) -> type[BaseFeaturesExtractor]:
        """Return the class of the policy's features extractor. Any value of another type is checked later."""
        default = inspect.signature(self.policy_class).parameters.get("features_extractor_class")
        given: Any = FlattenExtractor if default is None else default.default
        given = self.policy_kwargs.get("features_extractor_class", given)
        return cast(type[BaseFeaturesExtractor], given) if inspect.isclass(given) else BaseFeaturesExtractor

    @contextmanager
    def _extended_policy(self) -> Iterator[None]:
        """Let SB3 make a policy with the memory that is asked for, and with masks, within the ``with`` block."""
        self.memory = memory = to_memory(getattr(self, "memory", None))
        masks = self.uses_masks
        if memory is None and not masks:
            yield
            return
        given = self.policy_class, self.policy_kwargs
        own = {"masks": masks} | ({} if memory is None else {"memory": memory})
        self.policy_class, self.policy_kwargs = extended(self.policy_class), self.policy_kwargs | own
        try:
            yield
        finally:
            self.policy_class, self.policy_kwargs = given

    def _require_what_policy_has(self) -> None:
        """Require ``memory`` and ``use_action_masks`` that the policy was made with: it stays what it is.

        :raises ValueError: one is another
        """
        own = getattr(self.policy, "memory", None)
        if to_memory(given := self.memory) != own:
            raise ValueError(f"memory must be that of the policy, {own!r}, got {given!r}: make another model")
        masks, use = has_masks(self.policy), self.use_action_masks
        if (self.uses_masks if use is None else use) != masks:
            raise ValueError(
                f"use_action_masks must be {masks}, as the policy was made with, got {use!r}: make another model"
            )

    def _make_plain(self) -> None:
        """Turn NumPy's numbers among the arguments into Python's own. Users and ``load`` set attributes at any time."""
        attributes = vars(self)
        for name in self.checks.keys() & attributes.keys() - {"policy", "env"}:
            attributes[name] = arg.plain(attributes[name])

    # ---------------------------------------------------------------- saving and loading

    @classmethod
    def load(
        cls: type[SelfAlgorithm],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: EnvLike | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        trusted: bool = False,
        allow: Collection[Any] = (),
        **kwargs: Any,
    ) -> SelfAlgorithm:
        """Load a model as SB3's ``load`` does. ``kwargs`` replace attributes, and are checked as in the constructor.

        ``env`` may also be the id of a registered environment, or a vector env of Gymnasium. If the arguments ask for
        an optimizer of the critic that was not saved, it starts afresh. If they no longer ask for one that was saved,
        it is dropped. ``policy_kwargs`` need not name the optimizer that ``use_rms_prop`` added to the saved ones.

        Random generators stay as they are, unless ``seed`` is given.

        :param trusted: run the code in the file, as SB3 does. Otherwise only classes and functions load that are known
            to be harmless
        :param allow: further classes and functions that the file may name, such as a policy class of your own
        :raises UntrustedFileError: the file asks for code that is not known to be harmless
        :raises DamagedFileError: the file is no model, or it was changed
        :raises TypeError: the name of an argument is misspelled
        """
        arg.require_arguments(cls, kwargs, others=True)
        if "stats_window_size" in kwargs:  # SB3 keeps it under another name
            kwargs["_stats_window_size"] = kwargs.pop("stats_window_size")
        given = {name: value for name, value in kwargs.items() if name != "policy_kwargs"}
        of_policy = ("memory", "use_action_masks")  # neither may change, whichever way they are given
        custom_objects = dict(custom_objects or {})
        kwargs = {name: custom_objects.pop(name) for name in of_policy if name in custom_objects} | kwargs
        replaced = {name: value for name, value in given.items() if name not in of_policy} | custom_objects
        saved = read_model(path, replaced=replaced, device=device, trusted=trusted, allow=allow)
        if not trusted:
            require_attributes(cls, saved.data, custom_objects, name_of(path))
        if "memory" in kwargs:
            _require_layers_of(kwargs["memory"], saved.data.get("memory"))
        saved.data.setdefault("use_action_masks", False)  # as in zips of earlier versions and of SB3
        use_masks = masks_of(saved.data, kwargs.get("use_action_masks"))
        if isinstance(kwargs.get("policy_kwargs"), dict):
            kwargs["policy_kwargs"] = _with_saved_optimizer(kwargs["policy_kwargs"], saved.data)
        keeps_random_state = nullcontext() if "seed" in kwargs else unchanged_random_state(get_device(device))
        with keeps_random_state, using_masks(use_masks, is_made=True):
            if env is not None:  # here, where an error is none of the file
                env = cls._wrap_env(env, kwargs.get("verbose", saved.data.get("verbose")) or 0)
            token = _LOADING.set(_Load(tuple(kwargs), name_of(path)))
            try:
                others: Any = (env, device, saved.data, print_system_info, force_reset)
                model = super().load(as_zip(saved), *others, **kwargs)
                set_variables(model, saved.variables, name_of(path))
            except Exception as error:
                why = why_not_loaded(error, name_of(path), () if kwargs or custom_objects else saved.data)
                if why is error:
                    raise
                raise why from error
            finally:
                _LOADING.reset(token)
        for name in REMOVED:  # zips of earlier versions hold them
            vars(model).pop(name, None)
        _warn_of_kept_optimizer(model, kwargs)
        return model

    @classmethod
    def resume(
        cls,
        folder: str | pathlib.Path,
        env: EnvLike,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        trusted: bool = False,
        allow: Collection[type] = (),
    ) -> Self:
        """Load the newest valid checkpoint of a :class:`~sb3_pg.ResumeCallback`, to go on with its run.

        The first ``learn`` continues the interrupted call. It takes the same ``total_timesteps`` and callbacks;
        ``reset_num_timesteps`` has no effect. If that call had ended, it returns at once.

        :param folder: folder of the checkpoints
        :param env: the env, made as for the constructor
        :param device: PyTorch device
        :param custom_objects: as in :meth:`load`
        :param trusted: as in :meth:`load`
        :param allow: as in :meth:`load`
        :raises FileNotFoundError: the folder has no valid checkpoint
        :raises ValueError: the checkpoint is one of another algorithm, or was made with other envs
        """
        checkpoint = CheckpointFolder(folder).newest()
        if checkpoint is None:
            raise FileNotFoundError(f"there is no valid checkpoint in {str(folder)!r}")
        if checkpoint.manifest.algorithm != cls.__name__:
            name = checkpoint.manifest.algorithm
            raise ValueError(f"{str(folder)!r} has checkpoints of {name}: use {name}.resume")
        unpickle = partial(loads, what=str(checkpoint.path), allow=allow, trusted=trusted)
        resumption = Resumption(checkpoint, unpickle)
        file = NamedBytes(checkpoint.files["model.zip"], checkpoint.path / "model.zip")
        model = cls.load(file, env, device, custom_objects, trusted=trusted, allow=allow)
        resumption.prepare(model)
        model._resumption = resumption
        return model

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """Save the model in a zip with SB3's layout, whole or not at all.

        The zip holds JSON and tensors. A value that JSON cannot say, such as a lambda, is a pickle, which ``load``
        reads with ``trusted=True`` only.

        :param path: path, or an open file
        :param exclude: names of attributes to leave out, besides those that are always left out
        :param include: names of attributes to save that would be left out otherwise
        :raises OSError: the disk is full, or the path cannot be written. The old file stays
        """
        write_model(path, *self.saved_parts(exclude or (), include or ()))

    def saved_parts(
        self, exclude: Iterable[str] = (), include: Iterable[str] = ()
    ) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, Any]]:
        """Return what :meth:`save` writes: attributes, state dicts of modules and optimizers, and tensors.

        :param exclude: as in :meth:`save`
        :param include: as in :meth:`save`
        """
        modules, tensors = self._get_torch_save_params()
        left_out = {*exclude, *self._excluded_save_params(), *RECOMPUTED} - set(include)
        left_out |= {name.split(".")[0] for name in (*modules, *tensors)}
        data = {name: value for name, value in vars(self).items() if name not in left_out}
        return data, self.get_parameters(), {name: recursive_getattr(self, name) for name in tensors}

    @staticmethod
    def _is_loading() -> bool:
        return _LOADING.get() is not None

    @staticmethod
    def _is_given_to_load(name: str) -> bool:
        """Return whether ``load`` is running and was given a value for this attribute."""
        loading = _LOADING.get()
        return loading is not None and name in loading.given

    @classmethod
    def _is_kept_by_load(cls, name: str) -> bool:
        """Return whether ``load`` is running and takes this attribute's value from the zip."""
        return cls._is_loading() and not cls._is_given_to_load(name)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for pickle and copy: all except the transient ones."""
        return {name: value for name, value in vars(self).items() if name not in TRANSIENT_ATTRS}

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *TRANSIENT_ATTRS, "_memory"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, variables = super()._get_torch_save_params()
        return state_dicts + ([] if self.critic_optimizer is None else ["critic_optimizer"]), variables

    def get_parameters(self) -> dict[str, dict[str, Any]]:
        """Return parameters as SB3's method does, with the names from before ``torch.compile`` wrapped a module."""
        parameters = super().get_parameters()
        return {key: {_of_original(name): value for name, value in parameters[key].items()} for key in parameters}

    def set_parameters(
        self, load_path_or_dict: str | TensorDict, exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """Set parameters as SB3's method does. If that fails, all of them stay as they were.

        Names from before ``torch.compile`` wrapped a module are valid too.

        :param load_path_or_dict: path of a zip, an open file, or what :meth:`get_parameters` returns
        :param exact_match: whether all parameters must be given
        :param device: where to put tensors that are read from a file
        :raises NonFiniteError: a parameter is NaN or infinite
        :raises DamagedFileError: the file is no model, or its parameters do not fit
        :raises ValueError: the names or shapes do not fit
        """
        given: Any = load_path_or_dict
        is_file = not isinstance(given, dict)
        loading = _LOADING.get()
        file = name_of(given) if is_file else loading.file if loading is not None else ""
        where = f" in {file}" if file else ""
        params: Any = read_model(given, device=device, with_data=False).params if is_file else given
        params = dict(params)
        wrapped = {_of_original(name): name for name in self.policy.state_dict()}
        if isinstance(params.get("policy"), dict):
            named = {wrapped.get(_of_original(name), name): value for name, value in params["policy"].items()}
            params["policy"] = named
        if self._is_loading():  # the arguments of load may add or remove the critic's optimizer
            saved = params.pop("critic_optimizer", None)
            if self.critic_optimizer is not None:
                params["critic_optimizer"] = saved or self.critic_optimizer.state_dict()
        if file:
            known = self._get_torch_save_params()[0]
            if unknown := sorted(params.keys() - set(known)):
                raise ValueError(f"parameters{where} must be of {known}, got {unknown}")
        require_finite_states(params, {name for name, _ in self.policy.named_parameters()}, where)
        before: Any = deepcopy(self.get_parameters())
        if file:
            require_like_optimizers(self, params, before, file)
        try:
            super().set_parameters(params, exact_match, device)
        except BaseException as error:
            super().set_parameters(before, device=device)
            # SB3's load handles RuntimeErrors of files of its old releases itself.
            if (file and isinstance(error, ValueError)) or (is_file and isinstance(error, Exception)):
                raise DamagedFileError(file, error) from error
            raise

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seed all random generators as SB3's method does; but ``load`` only does so with the argument ``seed``.

        :param seed: the seed
        """
        if not self._is_kept_by_load("seed"):
            super().set_random_seed(seed)

    # ---------------------------------------------------------------- demonstrations

    def pretrain(
        self,
        demos: Demonstrations,
        n_epochs: int = 200,
        batch_size: int = 128,
        validation: float = 0.0,
        critic: bool | None = None,
        learning_rate: float | str | Schedule = "lin_1e-3",
        min_std: float = 0.1,
        freeze_normalization: bool = True,
        patience: int | None = 50,
        seed: int | None = None,
        progress_bar: bool = False,
    ) -> PretrainReport:
        r"""Train the policy to do what was demonstrated, before ``learn``. This is behavior cloning.

        .. math:: \min_\theta -\frac{1}{M} \sum_t \log \pi_\theta(a_t|s_t)

        Source: Pomerleau (1989); the equality with the policy gradient is in
        :func:`~sb3_pg.functional.behavior_cloning_loss`. In this order:

        1. If the env has a VecNormalize that is in training, its statistics get the demonstrated observations and, if
           they are known, the discounted rewards, as if it had seen these steps. Those of observations then stay as
           they are (``freeze_normalization``), also in a second ``pretrain``.
        2. The actor is trained by minibatches, with Adam of its own: ``policy.optimizer`` is not used, and its state
           stays as it is, fresh in a new model. Parameters that only the critic depends on do not change. The
           parameters of the last epoch are kept. With ``validation`` it is the epoch that is best on held-out episodes:
           the one with the smallest loss, or for a Box with the smallest mean absolute error of the most probable
           action.
        3. The critic is trained on the demonstrated returns with the discount ``gamma``, rewards as VecNormalize scales
           them, again with Adam of its own; of features that it shares with the actor it trains its own head only.
           A truncated episode is bootstrapped with the critic's value of its final observation. Without final
           observations, the last observation is taken for it, whose step then is no sample. With
           ``normalize_value_targets``, the scale of the targets is updated with all returns. The critic of
           :class:`~sb3_pg.OffPAC` is Q(s, a): it learns the returns of demonstrated actions alone, and knows nothing of
           others; its target network becomes its copy.

        Demonstrations of an env with action masks may have them under the key "action_mask" of the observations.
        Without, every action counts as allowed. Policies with memory learn from whole episodes.

        ``critic_warmup_updates`` and ``anchor`` count from here. ``num_timesteps`` stays as it is. If it fails or is
        interrupted, the model is as before.

        :param demos: the demonstrations, with observations as the env returns them, before VecNormalize
        :param n_epochs: passes over the demonstrations, at most, of the actor, and of the critic
        :param batch_size: steps per gradient step. Minibatches of a policy with memory hold whole episodes, and so may
            have more
        :param validation: share of the episodes that are held out, in [0, 1): at least one of two or more; steps of a
            single episode. With 0, all episodes are learned from, and training takes all epochs
        :param critic: whether to train the critic. None trains it if one is in use and the demonstrations have rewards
        :param learning_rate: step size of Adam: a number, ``"lin_1e-3"`` (falls linearly to 0 over ``n_epochs``), or a
            function of the remaining progress (1 to 0)
        :param min_std: smallest standard deviation of Box actions, as a share of half the width of the action's range
            (before the squashing, where a policy squashes); 0 for none. A deterministic expert would let it go to 0,
            so that nothing is explored afterwards. It is a parameter that is clamped after each gradient step; where it
            depends on the state (gSDE, OffPAC), its root mean square over the demonstrated states is kept at least
            so large. See :class:`~sb3_pg.demonstrations.cloning.StdFloor`
        :param freeze_normalization: whether the statistics of observations in a VecNormalize stay as they are from here
            on. If they followed the states that the cloned policy visits while it explores, its networks would get
            other inputs in the same state, and it would lose what it has learned. Frozen statistics count as 10^12
            steps; ``env.obs_rms.count = n`` lets them go on as if they came from n steps. The statistics of rewards go
            on in any case
        :param patience: epochs without a better result on held-out steps (``validation``), after which training stops;
            None for never.
            The critic stops after as many epochs without a smaller loss on the steps that it learns from
        :param seed: of the episodes that are held out, and of the order of the steps; None draws it from PyTorch's
            generator, which the model's ``seed`` has set
        :param progress_bar: whether to show the epochs
        :return: losses, and how well policy and critic agree with the demonstrations
        :raises ValueError: an argument is out of range, the demonstrations do not fit the model's spaces, or
            ``critic=True`` without rewards or without a critic. Nothing has changed then
        :raises TypeError: an argument is of the wrong type
        :raises NonFiniteError: a loss or a parameter would not be finite
        """
        given = {name: arg.plain(value) for name, value in locals().items() if name != "self"}
        arg.check_arguments(given, PRETRAIN_CHECKS)
        self._make_plain()
        if getattr(self, "policy", None) is None:
            raise ValueError("pretrain() needs a policy, which _init_setup_model=False has left out: give True")
        self._require_what_policy_has()
        self._require_no_resumption("pretrain")
        if "anchor" in self.checks:
            self.checks["anchor"]("anchor", vars(self).get("anchor"))
        to_fit = self._critic_to_fit() if critic is not False else None
        if critic and to_fit is None:
            raise ValueError(
                "critic=True trains a critic on discounted returns, and none is in use: use baseline='value' and the "
                "discounted objective, or critic=None"
            )
        if critic and demos.rewards is None:
            raise ValueError("critic=True takes demonstrations with rewards, got some without: give critic=None")
        if demos.rewards is None:
            to_fit = None
        steps = steps_for(self, demos)  # checks them, before a seed is drawn
        schedule = CloningSchedule(
            n_epochs=given["n_epochs"],
            batch_size=given["batch_size"],
            learning_rate=arg.to_schedule(learning_rate),
            patience=given["patience"],
            seed=int(th.randint(1 << 31, (1,))) if seed is None else given["seed"],
        )
        more = {name: given[name] for name in ("validation", "min_std", "freeze_normalization", "progress_bar")}
        report = pretrain(self, steps, to_fit, schedule, **more)
        if "learner_state" in vars(self):
            vars(self)["learner_state"].n_warmed_up = 0
        if (anchor := copy(vars(self).get("anchor"))) is not None:
            anchor.restart()
            vars(self)["anchor"] = anchor
        return report

    def _critic_to_fit(self) -> CriticToFit | None:
        """Return the critic for demonstrations; None if the algorithm uses none."""
        return None

    def _require_env(self, method: str) -> VecEnv:
        if self.env is None:
            raise ValueError(f"{method}() needs an environment: call set_env(env), or load(path, env=env)")
        return self.env

    def _require_no_resumption(self, what: str) -> None:
        """Require that the model does not wait to go on with an interrupted run.

        :param what: what is asked for, for the error message
        :raises ValueError: it does
        """
        if self._resumption is not None:
            raise ValueError(f"{what} comes before learn, and this model goes on with a run that has begun: call learn")

    # ---------------------------------------------------------------- the env

    @classmethod
    def _wrap_env(cls, env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        """Wrap an env as SB3's method does. The constructor, ``set_env`` and ``load`` call this.

        It also makes the env of a registered id, and adapts vector envs of Gymnasium.

        :raises ValueError: no policy takes the observation space, or the algorithm cannot learn from this env
        :raises TypeError: ``env`` is not an environment
        """
        cls.checks["env"]("env", env)
        if env is None:
            raise TypeError("env must be an environment or the id of a registered one, got None")
        is_new = isinstance(env, str)
        env = maybe_make_env(env, verbose)
        if isinstance(env, VectorEnv):
            if verbose >= 1:
                print("Wrapping the env in a GymVectorAdapter.")
            env = GymVectorAdapter(env)
        check_observation_space(env.observation_space)
        check_action_space(env.action_space)
        wrapped = super()._wrap_env(env, verbose, monitor_wrapper)
        cls._check_env(wrapped)
        return with_masks(wrapped, is_new)

    def set_env(self, env: EnvLike, force_reset: bool = True) -> None:
        """Set the env as SB3's method does. Where the model was trained with action masks, the env must have them.

        :param env: as in the constructor
        :param force_reset: as in SB3
        """
        given: Any = env
        with using_masks(masks_of(vars(self), None), is_made=hasattr(self, "observation_space")):
            super().set_env(given, force_reset)

    @classmethod
    def _check_env(cls, env: VecEnv) -> None:
        """Require an env that this class can learn from.

        :param env: the env with all its wrappers
        :raises ValueError: the class cannot learn from this env. The message says why, and what to use instead
        """

    # ---------------------------------------------------------------- learning

    def _learn(
        self: SelfAlgorithm,
        total_timesteps: int,
        callback: MaybeCallback,
        log_interval: LogInterval,
        tb_log_name: str | None,
        *arguments: Any,
    ) -> SelfAlgorithm:
        """Check the arguments and call SB3's ``learn``. Warn if there was no update although one was expected.

        :raises ValueError: an argument is out of range, or the model has no env
        :raises TypeError: an argument is of the wrong type
        """
        total_timesteps, log_interval, arguments = arg.plain((total_timesteps, log_interval, arguments))
        given = (total_timesteps, callback, log_interval, tb_log_name, *arguments)
        arg.check_arguments(dict(zip(LEARN_CHECKS, given, strict=True)), LEARN_CHECKS)
        self._make_plain()
        self._log_steps = self._logged_at = 0
        if log_interval == "auto":
            log_interval = 1
            # A short run is logged about five times.
            self._log_steps = max(1, min(AUTO_LOG_STEPS * self.n_envs, int(total_timesteps) // 5))
        env = self._require_env("learn")
        if getattr(self, "policy", None) is None:
            raise ValueError("learn() needs a policy, which _init_setup_model=False has left out: give True")
        self._require_what_policy_has()
        fit_evaluations(callback, self.uses_masks, env)
        updates_before = self._n_updates
        if self._resumption is not None:
            self._resumption.require_same_total(total_timesteps)
        grad_enabled = th.is_grad_enabled()
        try:
            with extra_hints():
                self._run(total_timesteps, callback, log_interval, tb_log_name or type(self).__name__, *arguments)
            self._finish_resuming()  # if the run had ended, there was no rollout
            if self.checkpointer is not None:
                self.checkpointer.finish()
        finally:
            th.set_grad_enabled(grad_enabled)  # ctrl-C at the first line of a `with th.no_grad()` leaves it off
            if self.checkpointer is not None:
                self.checkpointer.close()
        was_stopped = self.num_timesteps < self._total_timesteps  # by a callback
        if total_timesteps and self._n_updates == updates_before and not was_stopped and (why := self._why_no_update()):
            warnings.warn(f"learn() has taken no update: {why}", stacklevel=3)
        return self

    def _run(self, *arguments: Any) -> None:
        """Train as SB3's ``learn`` does.

        :param arguments: of SB3's ``learn``
        """
        learn: Any = super().learn  # type: ignore[safe-super]  # a method of SB3's on- or off-policy base
        learn(*arguments)

    def _ends_here(self) -> bool:
        """Return whether ``warm_up_critic`` has collected all its rollouts. If not, count the next one."""
        if self._rollouts_left is None:
            return False
        self._rollouts_left -= 1
        return self._rollouts_left < 0

    def _at_boundary(self) -> None:
        """Do what is to be done between an update and the next rollout: resume, or save a checkpoint."""
        self._finish_resuming()
        if self.checkpointer is not None:
            self.checkpointer.at_boundary()

    def _finish_resuming(self) -> None:
        """Complete a resumption. If it fails before this, the next ``learn`` tries again."""
        if self._resumption is not None:
            self._resumption.finish(self)
            self._resumption = None

    def _why_no_update(self) -> str:
        """Return why ``learn`` took no update, for a warning. Empty if none was expected, or if the user knows why."""
        return ""

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        """Prepare training and reset the env as SB3's method does. A NaN does not enter a VecNormalize's statistics.

        The first call after ``resume`` goes on where the run was interrupted.

        :raises NonFiniteError: the first observation is not finite, and ``on_nonfinite`` is "raise"
        """
        assert self.env is not None
        guard = NormalizationGuard(self.env)
        result: tuple[int, BaseCallback] | None = None
        try:
            with guard.statistics_kept(), naming_env_errors(self.env):
                if self._resumption is not None:
                    result = self._resumption.begin(self, super()._setup_learn, callback, progress_bar)
                else:
                    arguments = (total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
                    result = super()._setup_learn(*arguments)
                guard.check_reset(self._last_obs)
            if self.use_action_masks is None and not self.uses_masks and infos_have_masks(self.env):
                warnings.warn(
                    "the env's infos have action masks, which were not seen before the first reset, and are ignored: "
                    "give use_action_masks=True to use them, or False to ignore them",
                    stacklevel=4,
                )
        except NonFiniteError as error:
            self._last_obs = None  # the first rollout resets the envs again
            if result is None:
                raise
            self._skip_or_raise(error, has_stepped=False)
        if self.checkpointer is not None:
            of = None if self._resumption is None else self._resumption.checkpoint
            self.checkpointer.begin(result[1], total_timesteps, of)
        if self._resumption is not None:
            self._resumption.set_callbacks(result[1])
        return result

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        """Update the progress as SB3's method does, but not below 0 if the last rollout takes more steps than asked.

        ``warm_up_critic`` makes no progress.
        """
        if self._rollouts_left is None:
            super()._update_current_progress_remaining(min(num_timesteps, total_timesteps), total_timesteps)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Return actions as SB3's method does, in the form that the env takes.

        They are integers for a Box of integers, and count from ``start`` for a Discrete or MultiDiscrete space.

        :param action_masks: which actions are allowed, ``(n_masks,)`` or ``(n_envs, n_masks)``, for a policy that was
            trained with masks; None if the observation has them under the key "action_mask"
        :return: actions, and the next state of a recurrent policy
        :raises ValueError: masks are missing, or are not expected
        """
        actions, state = predict(self.policy, observation, state, episode_start, deterministic, action_masks)
        return actions, state

    # ---------------------------------------------------------------- log

    def _is_time_to_log(self) -> bool:
        """Return whether ``log_interval="auto"`` logs now. If so, count the next interval from here."""
        if self.num_timesteps - max(self._logged_at, self._num_timesteps_at_start) < self._log_steps:
            return False
        self._logged_at = self.num_timesteps
        return True

    def _skip_or_raise(self, error: NonFiniteError, has_stepped: bool = True) -> None:
        """Raise an error, or count it and give a warning, as ``on_nonfinite`` says.

        :param error: the error
        :param has_stepped: whether the envs were stepped before it. Otherwise the next rollout repeats it, unless an
            env's reset returned the number. This is skipped, but not for ever
        """
        hopeless = not has_stepped and error.env is None
        if not has_stepped:
            n, when = self._failed_resets
            self._failed_resets = (n + 1 if when == self.num_timesteps else 1), self.num_timesteps
            hopeless |= self._failed_resets[0] >= MAX_FAILED_RESETS
        if self.on_nonfinite == "raise" or hopeless:
            raise error
        self._n_skipped += 1
        warnings.warn(f"Update skipped: {error}", stacklevel=2)
        self.logger.record("train/n_skipped", self._n_skipped)

    def _record(self, metrics: Metrics) -> None:
        """Log metrics under ``train/``, unless their names have a slash, with a single transfer from the device."""
        values = th.stack([th.as_tensor(v, device=self.device).detach().float() for v in metrics.values()]).tolist()
        for name, value in zip(metrics, values, strict=True):
            whole = name if "/" in name else f"train/{name}"
            self.logger.record(whole, value, self._detail if name in _DETAILS else None)

    @property
    def _detail(self) -> str | None:
        """The log format that leaves out details."""
        return None if self.verbose > 1 else "stdout"


def _of_original(name: str) -> str:
    """Return a parameter's name without the prefix that ``torch.compile`` adds."""
    return name.replace("_orig_mod.", "")


def _require_layers_of(given: Any, saved: Any) -> None:
    """Require a memory with the parameters of a saved one.

    :param given: argument of ``load``
    :param saved: the attribute in the zip
    :raises ValueError: it has others
    """
    memory = to_memory(given)
    if memory != saved and not (memory is not None and memory.has_layers_of(to_memory(saved))):
        raise ValueError(f"memory must be that of the saved policy but for backprop_steps, {saved!r}, got {given!r}")


def _warn_of_kept_optimizer(model: Any, given: Mapping[str, Any]) -> None:
    """Warn of arguments of ``load`` that have no effect, because a loaded model keeps its optimizer.

    :param model: the loaded model
    :param given: keyword arguments of ``load``
    """
    optimizer = getattr(model.policy, "optimizer", None)  # an OffPACPolicy has one in its actor and its critic
    has_rms_prop = isinstance(optimizer, th.optim.RMSprop)
    if given.get("use_rms_prop", has_rms_prop) != has_rms_prop:
        kept = type(optimizer).__name__
        warnings.warn(f"use_rms_prop={not has_rms_prop} has no effect: the model was saved with {kept}", stacklevel=3)
    if "rms_prop_eps" in given:
        warnings.warn("rms_prop_eps has no effect: the model was saved with its optimizer", stacklevel=3)


def _with_saved_optimizer(policy_kwargs: dict[str, Any], saved_data: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``policy_kwargs`` with the RMSprop that A2C's ``use_rms_prop`` added to the saved ones.

    :param policy_kwargs: argument of ``load``
    :param saved_data: attributes in the zip
    """
    if "optimizer_class" in policy_kwargs:
        return policy_kwargs
    saved = saved_data.get("policy_kwargs", {})
    if not issubclass(saved.get("optimizer_class", object), th.optim.RMSprop):
        return policy_kwargs
    return policy_kwargs | {name: saved[name] for name in ("optimizer_class", "optimizer_kwargs") if name in saved}


def waits_for_learning_starts(model: OffPolicyAlgorithm) -> str:
    """Return the message that ``learn`` ended before ``learning_starts``, and what to change."""
    return (
        f"num_timesteps={model.num_timesteps} is not above learning_starts={model.learning_starts}. Give more "
        "total_timesteps, a smaller learning_starts, or reset_num_timesteps=False to go on counting."
    )
