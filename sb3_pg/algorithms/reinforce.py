"""REINFORCE: the Monte-Carlo policy gradient."""

from typing import Any, ClassVar

from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import MaybeCallback, Schedule
from typing_extensions import Self, Unpack

from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.arguments import ON_POLICY, SHARED, OnPolicyArguments
from sb3_pg.algorithms.learners import from_arguments
from sb3_pg.algorithms.monte_carlo import MONTE_CARLO, BaselineName, keep_baseline, monte_carlo, require_episodes
from sb3_pg.algorithms.on_policy import OnPolicyPG
from sb3_pg.algorithms.shell import LogInterval
from sb3_pg.algorithms.validation import SB3, EnvLike, Group, documented
from sb3_pg.baselines import Baseline, FitPredict
from sb3_pg.learner import GradientStep
from sb3_pg.learner.estimators import Returns


@documented
class Reinforce(OnPolicyPG):
    r"""Monte-Carlo policy gradient with any return, discount form and baseline.

    .. math:: \nabla_\theta J \approx \frac{1}{N} \sum_{i=1}^N \sum_t w_t
              \nabla_\theta \log \pi_\theta(a_{i,t}|s_{i,t}) \,(G_{i,t} - b)

    Source: Williams (1992); Sutton and Barto (2018), section 13.3 and 13.4. The sum is over time and the mean over
    the N complete episodes of a batch; with ``n_steps`` it is the mean over steps. w_t is gamma^t with
    ``state_discount``, otherwise 1.

    ============== ================== ==========================================================================
    returns        state_discount     estimates
    ============== ================== ==========================================================================
    total          False              grad J_gamma
    reward_to_go   True, w_t=gamma^t  grad J_gamma (the slides' option 2)
    reward_to_go   False, w_t=1       sum_t E[score_t Q_gamma(s_t, a_t)] (option 1): for gamma < 1 not the gradient
                                      of any objective (Nota and Thomas 2020), and the usual form in practice
    ============== ================== ==========================================================================

    :param critic_learning_rate: step size of the critic's own optimizer; None, with ``n_critic_updates=1``, trains
        actor and critic in one step as A2C
    :raises ValueError: an argument out of range, or arguments that contradict each other
    :raises TypeError: an argument of the wrong type, or an unknown one
    """

    groups: ClassVar[tuple[Group, ...]] = (SHARED, SB3, ON_POLICY, MONTE_CARLO)
    make_estimator = monte_carlo
    make_step = from_arguments(GradientStep)
    returns: Returns
    baseline: BaselineName | Baseline | FitPredict
    fitted_baseline: Baseline

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: EnvLike | None,
        learning_rate: float | str | Schedule = 7e-3,
        returns: Returns = "reward_to_go",
        baseline: BaselineName | Baseline | FitPredict = "value",
        baseline_kwargs: dict[str, Any] | None = None,
        critic_learning_rate: float | str | Schedule | None = 3e-3,
        n_critic_updates: int = 10,
        **kwargs: Unpack[OnPolicyArguments],
    ) -> None:
        super().__init__(**arg.given(locals()))

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: LogInterval = "auto",
        *args: Any,
        **kwargs: Any,
    ) -> Self:
        """As the base class, with a log about every 500 steps of each env by default, as often as A2C."""
        return super().learn(total_timesteps, callback, log_interval, *args, **kwargs)

    def _prepare(self) -> None:
        keep_baseline(self)
        super()._prepare()
        require_episodes(self)

    def check_segments(self, name: str, n_steps: int | None) -> None:
        """As the base class. ``returns="total"`` needs complete episodes too."""
        if self.returns == "total" and n_steps is not None:
            raise ValueError(f"returns='total' takes complete episodes, got {name}={n_steps}")
        super().check_segments(name, n_steps)

    def check_given_estimates(self) -> None:
        """As the base class. A component-wise baseline has no advantage per step, and raises an error too."""
        super().check_given_estimates()
        if self.fitted_baseline.per_parameter:
            raise ValueError(
                f"baseline={self.baseline!r} with component_wise=True has no advantage per step, which is what "
                "rollout_buffer holds: train from a rollout that collect_rollouts has collected"
            )

    @property
    def segments_by(self) -> str:  # type: ignore[override]
        """As the base class."""
        forward = " and returns='reward_to_go'" if self.returns == "total" else ""
        return f"n_steps=, baseline='value'{forward}"
