"""Returns and advantages that bootstrap from a critic: what actor-critic and natural-gradient methods share."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch as th

from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.on_policy import PolicyGradientAlgorithm
from sb3_pg.algorithms.signature import CHECKS, NewArguments
from sb3_pg.errors import SingleStepError
from sb3_pg.functional import lambda_return, n_step_return, reward_to_go
from sb3_pg.rollout import RolloutBatch

#: What the critic is trained on where nothing else is said: the return that the advantage is made of.
_DEFAULT_TARGETS = {"gae": "lambda", "td": "td", "n_step": "n_step", "monte_carlo": "monte_carlo"}


class CriticArguments(NewArguments, total=False):
    """Keyword arguments of every algorithm whose advantage comes from a critic."""

    advantage: str
    td_steps: int
    critic_target: str | None
    recompute_advantage: bool


class CriticEstimates(PolicyGradientAlgorithm):
    r"""Advantage :math:`\hat A_t = G_t - V_\phi(s_t)`, and a return :math:`y_t` that the critic is trained on.

    =============== =============== ================================================== ==============================
    ``advantage``   critic target   return                                             estimate of the advantage
    =============== =============== ================================================== ==============================
    ``gae``         ``lambda``      :math:`G_t^\lambda`                                Schulman et al. (2016), eq. 16
    ``td``          ``td``          :math:`r_t + \gamma V(s_{t+1})`                    one-step actor-critic
    ``n_step``      ``n_step``      n rewards, then :math:`\gamma^n V(s_{t+n})`        Sutton and Barto, eq. 7.1
    ``monte_carlo`` ``monte_carlo`` all rewards of the episode, or of the segment      unbiased with complete episodes
                                    and the value where it is cut
    =============== =============== ================================================== ==============================

    All but ``monte_carlo`` are biased as far as the critic is wrong, and have less variance the sooner they bootstrap.

    :param advantage: "gae", "td", "n_step" or "monte_carlo"
    :param td_steps: n of "n_step": rewards before the critic's value
    :param critic_target: "lambda", "td", "n_step" or "monte_carlo"; None for the one beside the advantage's name
    :param recompute_advantage: value the batch anew with the critic before each of its passes (``n_critic_updates``),
        so that targets which bootstrap follow the critic that they train
    """

    checks: ClassVar[Mapping[str, arg.Check]] = {
        **CHECKS,
        "advantage": arg.choice(*_DEFAULT_TARGETS),
        "td_steps": arg.integer(1),
        "critic_target": arg.choice(*_DEFAULT_TARGETS.values(), optional=True),
        "recompute_advantage": arg.instance(bool),
    }

    def __init__(
        self,
        *args: Any,
        advantage: str = "gae",
        td_steps: int = 5,
        critic_target: str | None = None,
        recompute_advantage: bool = False,
        **kwargs: Any,
    ) -> None:
        self.advantage = advantage
        self.td_steps = td_steps
        self.critic_target = critic_target
        self.recompute_advantage = recompute_advantage
        super().__init__(*args, **kwargs)

    def _check_combinations(self) -> None:
        super()._check_combinations()
        if self.env is not None and self.normalize_advantage and self.n_steps == self.n_envs == 1:
            raise SingleStepError(
                "normalize_advantage=True leaves nothing of a single step's advantage, got n_steps=1 with one env: "
                "more steps, or normalize_advantage=False"
            )
        asked = (self.advantage, self.critic_target or "lambda", self.recompute_advantage)
        if self._has_foreign_buffer and asked != ("gae", "lambda", False):
            raise ValueError(
                f"rollout_buffer_class={self.rollout_buffer_class} computes generalized advantages and lambda-returns "
                f"itself, once: got advantage={self.advantage!r}, critic_target={self.critic_target!r}, "
                f"recompute_advantage={self.recompute_advantage}"
            )

    def _check_given_estimates(self) -> None:
        super()._check_given_estimates()
        if self.recompute_advantage:
            raise ValueError(
                "recompute_advantage=True estimates advantages anew before each pass of the critic, which takes a "
                "rollout that collect_rollouts has put into rollout_buffer: this one was filled otherwise"
            )

    tolerated: ClassVar[frozenset[str]] = PolicyGradientAlgorithm.tolerated | {"td_steps"}

    def _without_effect(self) -> dict[str, str]:
        unused = super()._without_effect()
        asked = f"advantage={self.advantage!r} and critic_target={self.critic_target!r}"
        if "n_step" not in self._kinds:
            unused["td_steps"] = asked
        if "gae_lambda" in unused:
            unused["gae_lambda"] = asked
        return unused

    @property
    def _kinds(self) -> set[str]:
        """The returns that are computed."""
        kind = _DEFAULT_TARGETS[self.advantage]
        return {kind, self.critic_target or kind}

    @property
    def _uses_gae_lambda(self) -> bool:
        return "lambda" in self._kinds or super()._uses_gae_lambda

    def _estimate(self, batch: RolloutBatch) -> tuple[th.Tensor, th.Tensor]:
        assert batch.values is not None
        kind = _DEFAULT_TARGETS[self.advantage]
        credited = self._returns(batch, batch.values, kind)
        target = self.critic_target or kind
        returns = credited if target == kind else self._returns(batch, batch.values, target)
        return returns, credited - batch.values

    def _returns(self, batch: RolloutBatch, values: th.Tensor, kind: str) -> th.Tensor:
        if kind == "monte_carlo":
            return reward_to_go(batch.rewards, batch.ends, self.gamma, batch.bootstrap, batch.mask)
        if kind == "lambda":
            return lambda_return(
                batch.rewards, values, batch.ends, self.gamma, self.gae_lambda, batch.bootstrap, batch.mask
            )
        n = 1 if kind == "td" else self.td_steps
        return n_step_return(batch.rewards, values, batch.ends, self.gamma, n, batch.bootstrap, batch.mask)
