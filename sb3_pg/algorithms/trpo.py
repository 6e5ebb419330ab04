"""Natural policy gradient and trust region policy optimization, which differ only by the line search."""

import math
import warnings
from typing import Any, ClassVar, Literal

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from typing_extensions import Unpack

from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.arguments import ON_POLICY, SHARED
from sb3_pg.algorithms.critic_estimates import CRITIC_ESTIMATES, CriticArguments, estimator_with_critic
from sb3_pg.algorithms.learners import CriticRule
from sb3_pg.algorithms.objective import OBJECTIVE
from sb3_pg.algorithms.on_policy import OnPolicyPG
from sb3_pg.algorithms.validation import SB3, EnvLike, Group, documented
from sb3_pg.learner import NaturalStep
from sb3_pg.learner.trust_region import require_known_divergence


class NaturalGradientArguments(CriticArguments, total=False):
    """Keyword arguments of NPG and TRPO that sb3_contrib's TRPO does not have."""

    ent_coef: float
    critic_learning_rate: float | str | Schedule | None
    line_search_accept_ratio: float
    cg_tolerance: float
    fisher_chunk_size: int
    fisher_subsample: int


def _check(model: Any) -> None:
    if model.fisher_subsample > 1 and model.sub_sampling_factor > 1:
        raise ValueError(
            f"sub_sampling_factor is another name for fisher_subsample: give one of them, got "
            f"{model.sub_sampling_factor} and {model.fisher_subsample}"
        )


def _without_effect(model: Any) -> dict[str, str]:
    unused = {"vf_coef": f"{type(model).__name__}: {_REFUSED['vf_coef'][1]}"}
    if model.critic_learning_rate is not None:
        unused["learning_rate"] = f"critic_learning_rate={model.critic_learning_rate!r}: no other step follows it"
    if model.critic_batch_size is not None:
        unused["batch_size"] = f"critic_batch_size={model.critic_batch_size}, which says the same"
    return unused


#: Arguments of the other algorithms that NPG and TRPO refuse -> their value, and why.
_REFUSED: dict[str, tuple[Any, str]] = {
    "max_grad_norm": (None, "the length of the actor's step follows from target_kl, not from the gradient's"),
    "vf_coef": (0.5, "the critic has steps of its own"),
}
_OF_LINE_SEARCH = ("line_search_shrinking_factor", "line_search_max_iter", "line_search_accept_ratio")
NATURAL_GRADIENT = Group(
    """
    :param batch_size: samples per step of the critic, None for all; ``critic_batch_size``, if given, takes its place
    :param cg_max_steps: largest number of steps of the conjugate gradient
    :param cg_damping: c, added to the Fisher matrix's diagonal
    :param line_search_shrinking_factor: beta, in (0, 1), for TRPO. NPG has the arguments of the line search too, but
        takes the whole step
    :param line_search_max_iter: largest number of steps that TRPO tries
    :param line_search_accept_ratio: eta, in [0, 1]: smallest gain that TRPO accepts, as a share of the predicted gain.
        sb3_contrib accepts any gain, as 0 does
    :param target_kl: delta, the joint KL of a step, nats: a number, ``"lin_0.01"`` (falls linearly to 0, where the last
        update takes no step), or a function of the remaining progress
    :param sub_sampling_factor: sb3_contrib's name for ``fisher_subsample``. In sb3_contrib it also thins the batch of
        the gradient and of the line search. Here it thins only the Fisher products
    :param cg_tolerance: residual, as a share of the gradient's norm, at which the conjugate gradient may stop
    :param fisher_chunk_size: samples per forward pass with graph; use fewer for images. A batch that is not larger
        keeps its graph. A larger one builds the graph again for each chunk and product, which bounds the memory
    :param fisher_subsample: k: the Fisher products use one sample in k, the same samples for all products of a step
    """,
    {
        "batch_size": (128, arg.integer(1, optional=True)),
        "cg_max_steps": (15, arg.integer(1)),
        "cg_damping": (0.1, arg.real(0)),
        "line_search_shrinking_factor": (0.8, arg.fraction),
        "line_search_max_iter": (10, arg.integer(1)),
        "line_search_accept_ratio": (0.1, arg.real(0, 1)),
        "target_kl": (0.01, arg.schedule(above_0=True)),
        "sub_sampling_factor": (1, arg.integer(1)),
        "cg_tolerance": (1e-5, arg.real(0)),
        "fisher_chunk_size": (16384, arg.integer(1)),
        "fisher_subsample": (1, arg.integer(1)),
    },
    check=_check,
    without_effect=_without_effect,
    tolerated=frozenset({"learning_rate", "batch_size"}),
    refused=_REFUSED,
)


def _step_without_effect(model: Any) -> dict[str, str]:
    unused = dict.fromkeys(_OF_LINE_SEARCH, "NPG, which has no line search")
    if model.step == "kl":
        return unused | {"step_size": "step='kl': give step='fixed'"}
    return unused | {"target_kl": "step='fixed': give step='kl'"}


STEP_LENGTH = Group(
    """
    :param step: "kl": alpha from ``target_kl``; "fixed": ``step_size``
    :param step_size: alpha of "fixed": a number, ``"lin_0.1"``, or a function of the remaining progress
    """,
    {
        "step": ("kl", arg.choice("kl", "fixed")),
        "step_size": (0.1, arg.schedule()),
    },
    without_effect=_step_without_effect,
    tolerated=frozenset({*_OF_LINE_SEARCH, "target_kl"}),
)


def _now(model: OnPolicyPG, name: str) -> float:
    """Return the present value of an argument that may be a schedule.

    :raises ValueError: the value is negative or not finite
    """
    given = getattr(model, name)
    if isinstance(given, float) and 0 <= given < math.inf:
        return given
    value = float(arg.to_schedule(given, name)(model._current_progress_remaining))
    arg.real(0)(name, value)
    return value


def _natural_step(model: Any, line_search: bool, step_size: float | None = None) -> NaturalStep:
    return NaturalStep(
        target_kl=_now(model, "target_kl") if step_size is None else 0.0,
        step_size=step_size,
        line_search=line_search,
        accept_ratio=model.line_search_accept_ratio,
        shrinking_factor=model.line_search_shrinking_factor,
        max_iter=model.line_search_max_iter,
        cg_max_steps=model.cg_max_steps,
        cg_damping=model.cg_damping,
        cg_tolerance=model.cg_tolerance,
        chunk_size=model.fisher_chunk_size,
        subsample=max(model.fisher_subsample, model.sub_sampling_factor),
        ent_coef=model.ent_coef,
    )


def _set_up(model: Any) -> None:
    """Set up the model. This is the method ``_setup_model`` of both NPG and TRPO.

    :raises ValueError: the KL of the policy's distribution is not known
    """
    from_contrib = model._from_sb3
    if from_contrib:
        model.max_grad_norm = None  # sb3_contrib's TRPO has 0, which it does not use
    OnPolicyPG._setup_model(model)
    require_known_divergence(model.policy)
    target_kl, space = model.target_kl, model.action_space
    if not from_contrib or not isinstance(target_kl, int | float) or model._is_given_to_load("target_kl"):
        return
    d = math.prod(space.shape or ()) if isinstance(space, spaces.Box | spaces.MultiBinary) else 1
    if d > 1:
        warnings.warn(
            f"target_kl={target_kl} of sb3_contrib's model is averaged over the {d} action dimensions, and is "
            f"the joint KL here: load(..., target_kl={d * target_kl:g}, cg_damping={d * model.cg_damping:g}) "
            "goes on with the same steps",
            stacklevel=2,
        )


def _warn(model: Any) -> None:
    """Warn if ``sub_sampling_factor`` does less than in sb3_contrib, or if the critic's last minibatch is smaller."""
    if model.sub_sampling_factor > 1:
        warnings.warn(
            f"sub_sampling_factor={model.sub_sampling_factor} thins the Fisher products alone here, as "
            "fisher_subsample does: gradient and line search use the whole batch",
            stacklevel=3,
        )
    if model.env is None or model.n_steps is None or model.batch_size is None or model.critic_batch_size is not None:
        return
    size = model.n_steps * model.n_envs
    if size % model.batch_size:
        warnings.warn(
            f"batch_size={model.batch_size} does not divide the {size} samples of a batch (n_steps={model.n_steps}, "
            f"{model.n_envs} envs): the last of the critic's minibatches has {size % model.batch_size}, which count"
            " as much as those of the others",
            stacklevel=3,
        )


@documented
class TRPO(OnPolicyPG):
    r"""Natural gradient with a line search: the step is shortened until KL and gain are acceptable.

    .. math:: \theta \leftarrow \theta + \beta^k s, \qquad \bar D_{KL}(\pi_{old} \,\|\, \pi_\theta) \le \delta, \quad
              L(\theta) - L(\theta_{old}) \ge \eta\, \beta^k\, \nabla L^T s

    Source: Schulman et al. (2015), eq. 14 and appendix C. The whole step s is that of
    :class:`~sb3_pg.learner.NaturalStep`, and k is less than ``line_search_max_iter``. If no step is accepted, theta
    stays exactly as it was, and ``train/step_outcome`` says why.

    It is a drop-in for :class:`sb3_contrib.TRPO`. It takes the same arguments by position, and loads its zips.
    One argument has another unit: ``target_kl`` is the joint KL(old || new) of the whole action vector, in nats.
    sb3_contrib averages over the d dimensions of Box and MultiBinary actions. Its ``target_kl=t, cg_damping=c`` is
    ``target_kl=d * t, cg_damping=d * c`` here.

    The actor is updated in evaluation mode, the mode in which it acts. Features that actor and critic share are updated
    with the actor. The critic updates only its own parameters, with ``policy.optimizer`` as in sb3_contrib, or with its
    own optimizer if ``critic_learning_rate`` is given. A BatchNorm in shared features keeps its running statistics,
    because a change of them would move the policy outside the trust region.

    :param learning_rate: step size of the critic, unless ``critic_learning_rate`` is given. The actor's step follows
        from the trust region
    :param n_critic_updates: passes of the critic over each batch
    :raises ValueError: an argument out of range, arguments that contradict each other, or a policy whose distribution
        is not known
    :raises TypeError: an argument of the wrong type, or an unknown one
    """

    groups: ClassVar[tuple[Group, ...]] = (SHARED, SB3, ON_POLICY, CRITIC_ESTIMATES, OBJECTIVE, NATURAL_GRADIENT)
    make_estimator = estimator_with_critic
    _setup_model = _set_up
    critic_rule: ClassVar[CriticRule] = CriticRule(own_steps=True, shares_batch_size=True, keeps_statistics=True)
    batch_size: int | None
    cg_max_steps: int
    cg_damping: float
    cg_tolerance: float
    line_search_shrinking_factor: float
    line_search_max_iter: int
    line_search_accept_ratio: float
    target_kl: float | str | Schedule
    sub_sampling_factor: int
    fisher_chunk_size: int
    fisher_subsample: int

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: EnvLike | None,
        learning_rate: float | str | Schedule = 1e-3,
        n_steps: int | None = 2048,
        batch_size: int | None = 128,
        gamma: float = 0.99,
        cg_max_steps: int = 15,
        cg_damping: float = 0.1,
        line_search_shrinking_factor: float = 0.8,
        line_search_max_iter: int = 10,
        n_critic_updates: int = 10,
        gae_lambda: float = 0.95,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        normalize_advantage: bool = True,
        target_kl: float | str | Schedule = 0.01,
        sub_sampling_factor: int = 1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        **kwargs: Unpack[NaturalGradientArguments],
    ) -> None:
        super().__init__(**arg.given(locals()))
        _warn(self)

    def make_step(self) -> NaturalStep:
        """Make a natural-gradient step with a line search."""
        return _natural_step(self, line_search=True)


@documented
class NPG(OnPolicyPG):
    r"""Natural gradient without a line search: the whole step is taken.

    .. math:: \theta \leftarrow \theta + \alpha\, (F + c I)^{-1} \nabla L(\theta), \qquad
              \alpha = \sqrt{\frac{2 \delta}{\nabla L^T (F + c I)^{-1} \nabla L}}
              \;\text{or a constant}

    Source: Kakade (2001), section 2; the length that the KL allows: Rajeswaran et al. (2017), eq. 5 (whose delta is
    2 delta here). F, L and the direction are those of :class:`~sb3_pg.learner.NaturalStep`. The realized KL is near
    ``target_kl`` as far as the quadratic model holds. :class:`~sb3_pg.TRPO` also checks it with a line search. The
    arguments, the unit of ``target_kl`` and the treatment of shared features are those of TRPO.

    ``step="fixed"`` is the slides' form, where alpha is a learning rate. ``normalize_advantage`` makes the step
    independent of the scale of rewards. L and F are means over steps, with complete episodes and with segments. A step
    after which KL or gain is not finite is taken back.

    :param learning_rate: step size of the critic, unless ``critic_learning_rate`` is given. The actor's step follows
        from ``target_kl`` or ``step_size``
    :param n_critic_updates: passes of the critic over each batch
    :raises ValueError: an argument out of range, arguments that contradict each other, or a policy whose distribution
        is not known
    :raises TypeError: an argument of the wrong type, or an unknown one
    """

    groups: ClassVar[tuple[Group, ...]] = (*TRPO.groups, STEP_LENGTH)
    make_estimator = estimator_with_critic
    _setup_model = _set_up
    critic_rule: ClassVar[CriticRule] = TRPO.critic_rule
    batch_size: int | None
    cg_max_steps: int
    cg_damping: float
    cg_tolerance: float
    line_search_shrinking_factor: float
    line_search_max_iter: int
    line_search_accept_ratio: float
    target_kl: float | str | Schedule
    sub_sampling_factor: int
    fisher_chunk_size: int
    fisher_subsample: int
    step: Literal["kl", "fixed"]

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: EnvLike | None,
        learning_rate: float | str | Schedule = 1e-3,
        n_steps: int | None = 2048,
        batch_size: int | None = 128,
        gamma: float = 0.99,
        cg_max_steps: int = 15,
        cg_damping: float = 0.1,
        line_search_shrinking_factor: float = 0.8,
        line_search_max_iter: int = 10,
        n_critic_updates: int = 10,
        gae_lambda: float = 0.95,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        normalize_advantage: bool = True,
        target_kl: float | str | Schedule = 0.01,
        sub_sampling_factor: int = 1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        step: Literal["kl", "fixed"] = "kl",
        step_size: float | str | Schedule = 0.1,
        **kwargs: Unpack[NaturalGradientArguments],
    ) -> None:
        super().__init__(**arg.given(locals()))
        _warn(self)

    def make_step(self) -> NaturalStep:
        """Make a natural-gradient step without a line search."""
        return _natural_step(self, line_search=False, step_size=None if self.step == "kl" else _now(self, "step_size"))
