"""Off-policy policy gradient: importance-sampled REINFORCE over replayed trajectories."""

from typing import Any, ClassVar

from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from typing_extensions import Unpack

from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.arguments import SHARED
from sb3_pg.algorithms.learners import from_arguments
from sb3_pg.algorithms.monte_carlo import MONTE_CARLO, BaselineName, keep_baseline, monte_carlo, require_episodes
from sb3_pg.algorithms.off_policy import REPLAY, OffPolicyShell, ReplayArguments
from sb3_pg.algorithms.validation import SB3, EnvLike, Group, documented
from sb3_pg.baselines import Baseline, FitPredict
from sb3_pg.functional.importance import RATIOS
from sb3_pg.learner import GradientStep, ImportanceSampled
from sb3_pg.learner.estimators import Ratio, Returns

IMPORTANCE = Group(
    """
    :param ratio: form of W_t: "per_step", "prefix", "per_decision" or "trajectory"
    :param max_ratio: largest value of W_t, where it is truncated; None for no truncation
    :param self_normalize: whether to divide W_t by its mean over the batch's episodes
    :param min_ess: smallest effective sample size of W_t with which a gradient step is taken, as a share of the
        samples. While it is smaller, the oldest trajectories leave the buffer
    """,
    {
        "ratio": ("per_step", arg.choice(*RATIOS)),
        "max_ratio": (None, arg.positive(optional=True)),
        "self_normalize": (False, arg.instance(bool)),
        "min_ess": (0.0, arg.real(0, 1)),
    },
)


@documented
class OffPolicyPG(OffPolicyShell):
    r"""Policy gradient from trajectories of other policies: its own earlier ones, or any whose log-probs are known.

    .. math:: \nabla_\theta J \approx \frac{1}{N} \sum_{i=1}^N \sum_t W_{i,t}\, w_t\,
              \nabla_\theta \log \pi_\theta(a_{i,t}|s_{i,t}) \,(G_{i,t} - b), \qquad
              \rho_t = \frac{\pi_\theta(a_t|s_t)}{\mu(a_t|s_t)}

    Source: Precup et al. (2000); Jie and Abbeel (2010); the lecture's off-policy policy gradient. W_t by ``ratio``:

    ============== ============================= ================================================================
    ratio          W_t                           expectation
    ============== ============================= ================================================================
    per_step       rho_t                         the slides' first-order approximation: of states that mu visits
    prefix         rho_0 ... rho_t               biased by the later ratios, which the slides ignore
    per_decision   rho_0 ... rho_t, and rho_t+1  unbiased
                   ... rho_t' at each reward
                   r_t' in G_t
    trajectory     rho_0 ... rho_T-1             unbiased, with the most variance
    ============== ============================= ================================================================

    Each update takes ``gradient_steps`` steps on the newest trajectories and on replayed ones. Each step computes the
    weights with the present policy. With one step on new data the algorithm is :class:`~sb3_pg.Reinforce`. The baseline
    "value" is a critic that is trained on V-trace targets (Espeholt et al. 2018) of the same trajectories.

    :param baseline: b, as in :class:`~sb3_pg.Reinforce`. A baseline that is fitted to returns is fitted to the returns
        of the policies that acted, unless ``ratio`` is "per_decision". "linear" is fitted after each step, so that it
        may have been fitted to the episodes of the next step
    :param critic_learning_rate: step size of the critic's own optimizer; None, with ``n_critic_updates=1``, trains
        actor and critic in one step
    :param n_critic_updates: passes of the critic over the batch, per gradient step
    :raises ValueError: an argument out of range, or arguments that contradict each other
    :raises TypeError: an argument of the wrong type, or an unknown one

    ``behavior_policy`` acts instead of the policy that is trained. It is a model, a policy, or a callable that returns
    actions and their log-probs:

    >>> import numpy as np
    >>> from stable_baselines3 import A2C
    >>> from sb3_pg import OffPolicyPG
    >>> teacher = A2C("MlpPolicy", "CartPole-v1", device="cpu").learn(100)
    >>> model = OffPolicyPG("MlpPolicy", "CartPole-v1", behavior_policy=teacher, device="cpu").learn(200)
    >>> rng = np.random.default_rng(0)
    >>> def mostly_right(obs):
    ...     right = rng.random(len(obs)) < 0.6
    ...     return right.astype(int), np.log(np.where(right, 0.6, 0.4))
    >>> model = OffPolicyPG("MlpPolicy", "CartPole-v1", behavior_policy=mostly_right, device="cpu").learn(200)
    """

    groups: ClassVar[tuple[Group, ...]] = (SHARED, SB3, REPLAY, MONTE_CARLO, IMPORTANCE)
    make_step = from_arguments(GradientStep)
    ratio: Ratio
    max_ratio: float | None
    self_normalize: bool

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: EnvLike | None,
        learning_rate: float | str | Schedule = 3e-3,
        ratio: Ratio = "per_step",
        max_ratio: float | None = None,
        self_normalize: bool = False,
        min_ess: float = 0.0,
        returns: Returns = "reward_to_go",
        baseline: BaselineName | Baseline | FitPredict = "value",
        baseline_kwargs: dict[str, Any] | None = None,
        critic_learning_rate: float | str | Schedule | None = 3e-3,
        n_critic_updates: int = 2,
        **kwargs: Unpack[ReplayArguments],
    ) -> None:
        super().__init__(**arg.given(locals()))

    def make_estimator(self) -> ImportanceSampled:
        """Returns less a baseline, weighted by importance ratios."""
        return ImportanceSampled(monte_carlo(self), self.ratio, self.max_ratio, self.self_normalize)

    def _check_combinations(self) -> None:
        keep_baseline(self)
        super()._check_combinations()
        require_episodes(self)
