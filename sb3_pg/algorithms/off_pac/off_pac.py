"""Off-policy actor-critic: a stochastic actor improved on replayed states, by replayed Q values."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import update_learning_rate
from torch.nn.functional import mse_loss
from typing_extensions import Never

from sb3_pg.algorithms import validation as arg
from sb3_pg.algorithms.off_pac.losses import ACTOR_LOSSES, Scene, default_actor_gradient, entropies, state_values
from sb3_pg.algorithms.off_pac.policies import OffPACCnnPolicy, OffPACMultiInputPolicy, OffPACPolicy
from sb3_pg.algorithms.off_pac.transition_replay import TransitionAlgorithm
from sb3_pg.extras import extra_hints
from sb3_pg.learner.metrics import Metrics
from sb3_pg.learner.rollback import frozen, unchanged_if_nonfinite
from sb3_pg.policies import compiled, policy_actions, set_training_mode, unvalidated_distributions
from sb3_pg.rollout import BehaviorReplayBuffer, BehaviorSamples


class OffPAC(TransitionAlgorithm):
    r"""Actor-critic on replayed transitions: the slides' off-policy algorithm, with both of its fixes.

    The critic takes the target of the policy's own next action (fix 1), with the smallest of ``n_critics`` target
    networks: for Discrete the expectation over actions (Expected SARSA, van Seijen et al. 2009), otherwise a sample.

    .. math:: y = r + \gamma (1 - d) \sum_{a'} \pi_\theta(a'|s') \min_i Q_{\bar\phi_i}(s', a')

    The actor follows, at replayed states, one of four gradients of :math:`E_\pi[Q(s, a)] + c_{ent} H(\pi(\cdot|s))`:

    ================ ============================================================================ =====================
    actor_gradient   estimate                                                                     actions, spaces
    ================ ============================================================================ =====================
    expected         :math:`\sum_a \nabla \pi(a|s) Q(s, a)`                                        all; Discrete
    score            :math:`\nabla \log \pi(a_k|s) (Q(s, a_k) - \frac{1}{K-1} \sum_{j \ne k}       the policy's own
                     Q(s, a_j))`                                                                  (fix 2); all
    reparameterized  :math:`\nabla_\theta Q(s, a_\theta(s, \epsilon))`, SVG(0)                     the policy's own; Box
    importance       :math:`\min(\rho, c) \nabla \log \pi(a|s) (Q(s, a) - V(s))`,                   the replayed; all
                     :math:`\rho = \pi / \mu`
    ================ ============================================================================ =====================

    Sources: Degris et al. (2012), eq. 4 and 5, for the objective and ``importance``; Heess et al. (2015) for SVG(0);
    the slides' "Off-Policy Actor-Critic" for ``score``. As they say, the states are those of the buffer, a broader
    distribution than the policy's own, and nothing is done about it. SB3's DDPG is the deterministic case.

    :param policy: "MlpPolicy", "CnnPolicy", "MultiInputPolicy", or a subclass of
        :class:`~sb3_pg.algorithms.off_pac.policies.OffPACPolicy`
    :param env: environment, vectorized environment, or the id of a registered one
    :param learning_rate: step size of actor and critic: a number, ``"lin_1e-3"``, or a function of the remaining
        progress (1 to 0)
    :param actor_gradient: see above. Default: expected for Discrete, reparameterized for Box, score for the others
    :param n_actions: K of "score", at least 2; of "importance", how many V(s) is the mean of where it is no exact sum
    :param max_ratio: c, None for no truncation
    :param ent_coef: weight of the entropy bonus, reward units per nat: a number, ``"lin_1.0"`` (falls linearly to 0),
        or a function of the remaining progress
    :param critic_learning_rate: step size of the critic, None for that of the actor
    :param buffer_size: transitions that the replay buffer has room for
    :param learning_starts: env steps before the first update, whose actions are drawn uniformly
    :param batch_size: transitions per gradient step
    :param tau: share of the critic that its target takes on with each gradient step, in [0, 1]
    :param gamma: discount per env step, in [0, 1]
    :param train_freq: steps, or ``(n, "step")``, ``(n, "episode")`` (one env), between updates
    :param gradient_steps: per update; -1 for as many as steps were taken
    :param replay_buffer_class: buffer class; "importance" takes a
        :class:`~sb3_pg.rollout.BehaviorReplayBuffer`
    :param replay_buffer_kwargs: its arguments
    :param optimize_memory_usage: as in SB3's off-policy algorithms
    :param n_steps: rewards before the bootstrap in the critic's target, uncorrected for the policy's changes since; not
        for Dict observations. As in SB3's off-policy algorithms, it is ignored beside a ``replay_buffer_class``, with a
        warning: give that its own ``replay_buffer_kwargs={"n_steps": 3}``; gamma is the algorithm's
    :param action_noise: must be None: the log-prob of a noisy action would be unknown
    :param compile: as :class:`~sb3_pg.algorithms.setup.ConfiguredAlgorithm` has it
    :param use_sde: generalized state-dependent exploration
    :param sde_sample_freq: steps between new gSDE noise, -1 for once per rollout
    :param stats_window_size: episodes that the logged means are taken over
    :param tensorboard_log: folder of TensorBoard logs
    :param policy_kwargs: arguments of the policy, e.g. ``{"n_critics": 1}``
    :param verbose: 0 nothing, 1 info, 2 debug
    :param seed: seed of all random generators
    :param device: PyTorch device, or "auto"
    :raises ValueError: an argument out of range, or arguments that contradict each other
    :raises TypeError: an argument of the wrong type, or an unknown one
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": OffPACPolicy,
        "CnnPolicy": OffPACCnnPolicy,
        "MultiInputPolicy": OffPACMultiInputPolicy,
    }
    checks: ClassVar[Mapping[str, arg.Check]] = {
        **TransitionAlgorithm.checks,
        "ent_coef": arg.schedule(),
        "actor_gradient": arg.choice(*ACTOR_LOSSES, optional=True),
        "n_actions": arg.integer(2),
        "max_ratio": arg.positive(optional=True),
    }

    def __init__(
        self,
        policy: str | type[OffPACPolicy],
        env: GymEnv | str | None,
        learning_rate: float | str | Schedule = 3e-4,
        actor_gradient: str | None = None,
        n_actions: int = 4,
        max_ratio: float | None = 1.0,
        ent_coef: float | str | Schedule = 0.0,
        critic_learning_rate: float | str | Schedule | None = None,
        buffer_size: int = 1_000_000,
        learning_starts: int = 100,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        action_noise: ActionNoise | None = None,
        compile: bool = False,  # noqa: A002 (the name that its users know)
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        **unknown: Never,
    ) -> None:
        arg.known_arguments(type(self), unknown)
        arg.check_arguments(locals(), self.checks)
        self.actor_gradient = actor_gradient
        self.n_actions = n_actions
        self.max_ratio = max_ratio
        self.ent_coef = ent_coef
        self.critic_learning_rate = critic_learning_rate
        self.compile = compile
        with extra_hints():
            super().__init__(
                policy,
                env,  # type: ignore[arg-type]
                learning_rate,  # type: ignore[arg-type]
                buffer_size,
                learning_starts,
                batch_size,
                tau,
                gamma,
                train_freq,
                gradient_steps,
                replay_buffer_class=replay_buffer_class,
                replay_buffer_kwargs=replay_buffer_kwargs,
                optimize_memory_usage=optimize_memory_usage,
                n_steps=n_steps,
                policy_kwargs=dict(policy_kwargs or {}),  # SB3 writes into it
                stats_window_size=stats_window_size,
                tensorboard_log=tensorboard_log,
                verbose=verbose,
                device=device,
                support_multi_env=True,
                seed=seed,
                use_sde=use_sde,
                sde_sample_freq=sde_sample_freq,
                supported_action_spaces=(spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
            )
        if _init_setup_model:
            self._setup_model()

    # ---------------------------------------------------------------- arguments

    def _check_combinations(self) -> None:
        super()._check_combinations()
        kind, space = self._gradient, self.action_space
        if kind == "expected" and not isinstance(space, spaces.Discrete):
            raise ValueError(f"actor_gradient='expected' sums over the actions of a Discrete space, got {space}")
        if kind == "reparameterized" and not isinstance(space, spaces.Box):
            raise ValueError(f"actor_gradient='reparameterized' differentiates Q by the action: Box alone, got {space}")
        cls = self.replay_buffer_class
        if kind == "importance" and cls is not None and not issubclass(cls, BehaviorReplayBuffer):
            raise ValueError(
                f"actor_gradient='importance' takes the behavior's log-probs from the buffer: replay_buffer_class must "
                f"be a BehaviorReplayBuffer (None with n_steps= makes one of n steps), got {cls.__name__}"
            )

    tolerated: ClassVar[frozenset[str]] = TransitionAlgorithm.tolerated | {"n_actions", "max_ratio"}

    def _without_effect(self) -> dict[str, str]:
        unused, kind = super()._without_effect(), self._gradient
        is_exact = kind == "importance" and isinstance(self.action_space, spaces.Discrete)
        if kind in ("expected", "reparameterized") or is_exact:
            unused["n_actions"] = f"actor_gradient={kind!r} and {self.action_space}"
        if kind != "importance":
            unused["max_ratio"] = f"actor_gradient={kind!r}: give actor_gradient='importance'"
        return unused

    @property
    def _gradient(self) -> str:
        return self.actor_gradient or default_actor_gradient(self.action_space)

    @property
    def _entropy_weight(self) -> float:
        return arg.to_schedule(self.ent_coef, "ent_coef")(self._current_progress_remaining)

    # ---------------------------------------------------------------- updating

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """Gradient steps of critic and actor on replayed transitions; parameters stay as they were if one fails.

        :param gradient_steps: how many
        :param batch_size: transitions per step
        :raises NonFiniteError: a parameter would not be finite
        :raises ValueError: layers of the critic have been changed, and not those of its target
        """
        policy = self.policy
        buffer, progress = self.replay_buffer, self._current_progress_remaining
        assert buffer is not None
        self._discount_replay()
        set_training_mode(policy, True)
        rate = critic_rate = self.lr_schedule(progress)
        if self.critic_learning_rate is not None:
            critic_rate = arg.to_schedule(self.critic_learning_rate, "critic_learning_rate")(progress)
            self.logger.record("train/critic_learning_rate", critic_rate)
        update_learning_rate(policy.actor.optimizer, rate)
        update_learning_rate(policy.critic.optimizer, critic_rate)
        steps: list[Metrics] = []
        with (
            unchanged_if_nonfinite(policy, policy.actor.optimizer, policy.critic.optimizer),
            unvalidated_distributions(),
            compiled(),
        ):
            for _ in range(gradient_steps):
                samples: Any = buffer.sample(batch_size, env=self._vec_normalize_env)
                steps.append(self._fit_critic(samples) | self._move_actor(samples))
                self._move_target()
        self._n_updates += gradient_steps
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/learning_rate", rate)
        self.logger.record("train/ent_coef", self._entropy_weight)
        if steps:
            rows = th.stack([th.stack([th.as_tensor(value) for value in metrics.values()]) for metrics in steps])
            for name, values in zip(steps[0], rows.T.tolist(), strict=True):
                largest = name == "largest_weight"
                self.logger.record(f"train/{name}", max(values) if largest else sum(values) / len(values))

    def _fit_critic(self, samples: BehaviorSamples) -> Metrics:
        critic = self.policy.critic
        with th.no_grad():
            following = self.policy.actor.distribution(samples.next_observations)
            next_values = state_values(self.policy.critic_target, samples.next_observations, following)
            discounts = self.gamma if samples.discounts is None else samples.discounts.squeeze(1)  # of n steps
            targets = samples.rewards.squeeze(1) + discounts * (1 - samples.dones.squeeze(1)) * next_values
        q_values = critic.q_values(samples.observations, policy_actions(samples.actions, self.action_space))
        loss = mse_loss(q_values, targets.expand_as(q_values)) * (0.5 * len(q_values))
        _descend(loss, critic.optimizer)
        return {"critic_loss": loss.detach(), "q_value": q_values.detach().mean()}

    def _move_actor(self, samples: BehaviorSamples) -> Metrics:
        actor, critic = self.policy.actor, self.policy.critic
        with frozen(critic.optimizer):
            distribution = actor.distribution(samples.observations)
            scene = Scene(samples, distribution, critic, self.n_actions, self.max_ratio)
            loss, metrics = ACTOR_LOSSES[self._gradient](scene)
        ent_coef = self._entropy_weight
        with th.set_grad_enabled(ent_coef > 0):
            entropy = entropies(distribution).mean()
        metrics |= {"actor_loss": loss.detach(), "entropy": entropy.detach()}
        _descend(loss - ent_coef * entropy, actor.optimizer)
        return metrics

    def _move_target(self) -> None:
        critic, target = self.policy.critic, self.policy.critic_target
        slow: list[th.Tensor] = list(target.parameters())
        fast: list[th.Tensor] = list(critic.parameters())
        if [parameter.shape for parameter in slow] != [parameter.shape for parameter in fast]:
            theirs, ours = ([tuple(parameter.shape) for parameter in parameters] for parameters in (slow, fast))
            raise ValueError(
                "policy.critic_target must have parameters of the shapes of policy.critic, in the same order: change "
                f"layers in both, got {theirs} and {ours}"
            )
        with th.no_grad():
            th._foreach_lerp_(slow, fast, self.tau)
            for statistics, now in zip(target.buffers(), critic.buffers(), strict=True):  # BatchNorm's
                statistics.copy_(now)


def _descend(loss: th.Tensor, optimizer: th.optim.Optimizer) -> None:
    optimizer.zero_grad()
    if loss.requires_grad:  # not all of it is frozen
        loss.backward()
    optimizer.step()
