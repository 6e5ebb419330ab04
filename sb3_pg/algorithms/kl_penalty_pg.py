"""Policy gradient under a KL constraint, by dual gradient descent."""

from typing import Any, ClassVar, Literal

from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from typing_extensions import Unpack

from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.arguments import ON_POLICY, SHARED, SB3Arguments
from sb3_pg.algorithms.critic_estimates import CRITIC_ESTIMATES, CriticArguments, estimator_with_critic
from sb3_pg.algorithms.learners import CriticRule, from_arguments
from sb3_pg.algorithms.objective import OBJECTIVE
from sb3_pg.algorithms.on_policy import OnPolicyPG
from sb3_pg.algorithms.validation import SB3, EnvLike, Group, documented
from sb3_pg.learner import KLPenaltyStep
from sb3_pg.learner.trust_region import require_known_divergence


class KLPenaltyArguments(CriticArguments, SB3Arguments, total=False):
    """Keyword arguments of KLPenaltyPG that other algorithms have too."""

    ent_coef: float
    vf_coef: float
    max_grad_norm: float | None
    rollout_buffer_class: type[RolloutBuffer] | None
    rollout_buffer_kwargs: dict[str, Any] | None


def _check(model: Any) -> None:
    if model.dual_update == "multiplicative" and model.kl_coef == 0:
        raise ValueError("dual_update='multiplicative' leaves kl_coef=0 at 0 for ever: start above 0")


def _without_effect(model: Any) -> dict[str, str]:
    if model.dual_update == "multiplicative":
        return {"dual_learning_rate": "dual_update='multiplicative': give dual_update='additive'"}
    return {}


KL_PENALTY = Group(
    """
    :param batch_size: samples per gradient step, of the critic too unless ``critic_batch_size`` is given
    :param n_epochs: largest number of passes over each batch
    :param target_kl: epsilon, the joint KL between one policy and the next, nats
    :param kl_coef: lambda at the start, reward units per nat. Training changes it; ``model.kl_coef`` is its present
        value
    :param dual_update: "additive", the gradient step above, or "multiplicative"
    :param dual_learning_rate: alpha of "additive", units of lambda per nat
    :param max_kl_ratio: the passes over a batch end after a pass in which the KL of a minibatch was above this many
        times ``target_kl``. This keeps an update from moving the policy, and then lambda, too far. None for no limit
    """,
    {
        "batch_size": (64, arg.integer(1)),
        "n_epochs": (10, arg.integer(1)),
        "target_kl": (0.01, arg.positive()),
        "kl_coef": (1.0, arg.real(0)),
        "dual_update": ("additive", arg.choice("additive", "multiplicative")),
        "dual_learning_rate": (50.0, arg.positive()),
        "max_kl_ratio": (2.0, arg.positive(optional=True)),
    },
    check=_check,
    without_effect=_without_effect,
)


@documented
class KLPenaltyPG(OnPolicyPG):
    r"""The surrogate objective under a limit of the KL, by dual gradient descent.

    .. math:: \mathcal L(\theta, \lambda) = L(\theta) - \lambda\, \big(\bar D_{KL}(\theta_{old}, \theta) - \epsilon\big)

    1. :math:`\theta \leftarrow \arg\max_\theta \mathcal L(\theta, \lambda)`, approximately: at most
       ``n_epochs`` passes of minibatch gradient steps
    2. :math:`\lambda \leftarrow \max\big(0,\; \lambda + \alpha\, (\bar D_{KL} - \epsilon)\big)`

    L is :class:`~sb3_pg.learner.trust_region.SurrogateObjective`. The KL is KL(old || new) of the whole action vector.
    Step 2 measures it on the whole batch. Source: the lecture's policy gradient with constraints (which prints the two
    policies in the divergence exchanged); Boyd et al. (2011), section 2.1, for dual ascent; Schulman et al. (2017),
    section 4, for ``dual_update="multiplicative"``: lambda is doubled if the KL is above 1.5 epsilon, and halved if it
    is below epsilon / 1.5.

    At the optimum the KL is epsilon, or lambda is 0. Lambda has the scale of the advantages over sqrt(epsilon), and
    alpha the scale of lambda over epsilon. The defaults are chosen for ``normalize_advantage=True``.

    :param critic_learning_rate: step size of the critic's own optimizer; None, with ``n_critic_updates=1``, trains
        actor and critic in one step, as in PPO
    :raises ValueError: an argument out of range, arguments that contradict each other, or a policy whose distribution
        is not known
    :raises TypeError: an argument of the wrong type, or an unknown one
    """

    groups: ClassVar[tuple[Group, ...]] = (SHARED, SB3, ON_POLICY, CRITIC_ESTIMATES, OBJECTIVE, KL_PENALTY)
    make_estimator = estimator_with_critic
    make_step = from_arguments(KLPenaltyStep)
    critic_rule: ClassVar[CriticRule] = CriticRule(shares_batch_size=True)
    batch_size: int
    n_epochs: int
    target_kl: float
    kl_coef: float
    dual_update: Literal["additive", "multiplicative"]
    dual_learning_rate: float
    max_kl_ratio: float | None

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: EnvLike | None,
        learning_rate: float | str | Schedule = 3e-4,
        n_steps: int | None = 2048,
        batch_size: int = 64,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        target_kl: float = 0.01,
        kl_coef: float = 1.0,
        dual_update: Literal["additive", "multiplicative"] = "additive",
        dual_learning_rate: float = 50.0,
        max_kl_ratio: float | None = 2.0,
        critic_learning_rate: float | str | Schedule | None = 1e-3,
        n_critic_updates: int = 10,
        normalize_advantage: bool = True,
        **kwargs: Unpack[KLPenaltyArguments],
    ) -> None:
        super().__init__(**arg.given(locals()))

    def train(self) -> None:
        """Take one update as the base class does, and update ``kl_coef``."""
        n_updates = self._n_updates
        super().train()
        step = self.learner.step
        assert isinstance(step, KLPenaltyStep)
        if self._n_updates > n_updates:
            self.kl_coef = step.kl_coef

    def _setup_model(self) -> None:
        super()._setup_model()
        require_known_divergence(self.policy)
