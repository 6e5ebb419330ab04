"""Policies of OffPAC: a stochastic actor and Q critics for every action space. SB3 has them only for Box, in SAC."""

import copy
import math
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution, make_proba_distribution
from stable_baselines3.common.policies import BasePolicy, ContinuousCritic
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, NatureCNN, create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.sac.policies import Actor, SACPolicy
from torch import nn

from sb3_pg.action_masks import MASK_KEY, first_forbidden, mask_starts
from sb3_pg.errors import NonFiniteError
from sb3_pg.policies import (
    MaskedPolicy,
    has_own_predict,
    is_listened_to,
    is_patched,
    mask_distribution,
    original,
    policy_actions,
    scaled,
    seen_part,
    unvalidated_distributions,
)
from sb3_pg.rollout import require_finite_policy, require_finite_step


class SeenPart(BaseFeaturesExtractor):
    """Runs a features extractor on a part of observations with action masks.

    :param space: observation space
    :param seen: space of the part, see :func:`~sb3_pg.policies.seen_space`
    :param extractor: the extractor for the part
    """

    def __init__(self, space: spaces.Space[Any], seen: spaces.Space[Any], extractor: BaseFeaturesExtractor) -> None:
        super().__init__(space, extractor.features_dim)
        self.seen, self.extractor = seen, extractor

    def forward(self, observations: Any) -> th.Tensor:
        """Return the features of preprocessed observations, ``(n_samples, features_dim)``."""
        features: th.Tensor = self.extractor(seen_part(observations, self.seen))
        return features


class DiscreteActor(BasePolicy):
    """Logits of a Categorical, MultiCategorical or Bernoulli distribution.

    :param observation_space: observation space
    :param action_space: Discrete, MultiDiscrete or MultiBinary
    :param net_arch: widths of the hidden layers
    :param features_extractor: network that the observations go through first
    :param features_dim: width of its output
    :param activation_fn: activation between the layers
    :param normalize_images: whether to divide images by 255
    :param masks: whether observations have an action mask
    """

    masks: bool = False

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        net_arch: list[int],
        features_extractor: nn.Module,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
        masks: bool = False,
        **_: Any,  # arguments of gSDE, which only Box has
    ) -> None:
        super().__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        self.masks = masks
        self.latent_pi = nn.Sequential(*create_mlp(features_dim, -1, net_arch, activation_fn))
        head: Any = make_proba_distribution(action_space).proba_distribution_net(
            latent_dim=net_arch[-1] if net_arch else features_dim
        )
        self.logits: nn.Linear = head
        with th.no_grad():  # so that all actions are about equally probable at first
            self.logits.weight.mul_(0.01)
            self.logits.bias.zero_()

    def distribution(self, obs: PyTorchObs) -> Distribution:
        """Return the policy's distribution at each observation. A mask that allows nothing counts as allowing all."""
        logits = self.logits(self.latent_pi(self.extract_features(obs, self.features_extractor)))
        distribution: Distribution = make_proba_distribution(self.action_space).proba_distribution(logits)
        if self.masks:
            assert isinstance(obs, dict)
            mask_distribution(distribution, obs[MASK_KEY], nothing_is_all=True)
        return distribution

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """Draw actions, or return the most probable ones."""
        actions: th.Tensor = self.distribution(obs).get_actions(deterministic)
        return actions

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        actions: th.Tensor = self(observation, deterministic)
        return actions


class ContinuousActor(Actor):
    """The actor of SB3's SAC, a squashed Gaussian with or without gSDE, with a method for its distribution."""

    def distribution(self, obs: PyTorchObs) -> Distribution:
        """Return the policy's distribution at each observation."""
        mean, log_std, kwargs = self.get_action_dist_params(obs)
        own = copy.copy(self.action_dist)  # proba_distribution changes the object
        distribution: Distribution = own.proba_distribution(mean, log_std, **kwargs)
        return distribution

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """Draw actions, or return the most probable ones."""
        return self.distribution(obs).get_actions(deterministic)


class Critic(ContinuousCritic):
    """Q(s, a) of several networks: one output per action for Discrete, actions as an input otherwise.

    Its arguments are those of :class:`stable_baselines3.common.policies.ContinuousCritic`.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
        n_critics: int = 2,
        share_features_extractor: bool = True,
    ) -> None:
        super(ContinuousCritic, self).__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        self.share_features_extractor = share_features_extractor
        self.n_critics = n_critics
        n_inputs, n_outputs = features_dim, 1
        if isinstance(action_space, spaces.Discrete):
            n_outputs = int(action_space.n)
        else:
            n_inputs += spaces.flatdim(action_space)
        self.q_networks = []
        for i in range(n_critics):
            network = nn.Sequential(*create_mlp(n_inputs, n_outputs, net_arch, activation_fn))
            self.add_module(f"qf{i}", network)
            self.q_networks.append(network)

    def all_q_values(self, obs: PyTorchObs) -> th.Tensor:
        """Q(s, .) of a Discrete space, reward units, ``(n_critics, n_samples, n_actions)``."""
        return th.stack(self(obs))

    def q_values(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """Q(s, a), reward units.

        :param obs: one row per state
        :param actions: as the actor draws them, one per state or several: ``([n_actions,] n_samples[, action_dim])``
        :return: ``(n_critics, [n_actions,] n_samples)``
        """
        if isinstance(self.action_space, spaces.Discrete):
            values = self.all_q_values(obs)
            index = actions.reshape(-1, values.shape[1]).T.expand(self.n_critics, -1, -1)
            return values.gather(2, index).transpose(1, 2).reshape(-1, *actions.shape)
        return th.stack(self(obs, actions)).squeeze(-1)

    def forward(self, obs: PyTorchObs, actions: th.Tensor | None = None) -> tuple[th.Tensor, ...]:
        """Return one column of Q values per network, as SB3's critic does.

        The other methods get their values from here, so that hooks on the critic are called.

        :param obs: one row per state
        :param actions: as a replay buffer stores them. None, for a Discrete space only, returns a column per action
        """
        features = self._features(obs)
        if isinstance(self.action_space, spaces.Discrete):
            values = tuple(network(features) for network in self.q_networks)
            if actions is None:
                return values
            chosen = policy_actions(actions, self.action_space).unsqueeze(1)
            return tuple(value.gather(1, chosen) for value in values)
        assert actions is not None
        encoded = self._encode(actions)
        if encoded.dim() == 3:
            features = features.expand(len(encoded), -1, -1)
        rows = th.cat((features, encoded), dim=-1)
        return tuple(network(rows) for network in self.q_networks)

    def _features(self, obs: PyTorchObs) -> th.Tensor:
        # Shared features are trained by the actor's loss only, as in SB3.
        with th.set_grad_enabled(th.is_grad_enabled() and not self.share_features_extractor):
            return self.extract_features(obs, self.features_extractor)

    def _encode(self, actions: th.Tensor) -> th.Tensor:
        if isinstance(self.action_space, spaces.MultiDiscrete):
            parts = actions.long().unbind(-1)
            sizes = (int(n) for n in self.action_space.nvec)
            encoded = [nn.functional.one_hot(part, n) for part, n in zip(parts, sizes, strict=True)]
            return th.cat(encoded, dim=-1).float()
        return actions.float()


class OffPACPolicy(MaskedPolicy, SACPolicy):
    """A stochastic actor, Q critics and their targets, with or without action masks.

    Its other arguments are those of SB3's SACPolicy.

    :param masks: whether there are action masks, which the actor keeps to
    :param observe_masks: whether the networks see the mask. It takes a policy for Dict observations
    """

    actor: DiscreteActor | ContinuousActor  # type: ignore[assignment]
    critic: Critic
    critic_target: Critic

    @property
    def use_sde(self) -> bool:
        """Whether the actor's noise depends on the state."""
        return bool(self.actor_kwargs.get("use_sde", False))

    def _build(self, lr_schedule: Schedule) -> None:
        if self.masks:
            self.actor_kwargs["masks"] = True
        super()._build(lr_schedule)
        if self.masks and not getattr(self.actor, "masks", False):
            raise ValueError(
                f"policy {type(self).__name__} must make its actor with masks=True, as actor_kwargs has it, got a "
                f"{type(self.actor).__name__} without masks: or give use_action_masks=False"
            )

    def make_features_extractor(self) -> BaseFeaturesExtractor:
        """Make a features extractor, as in SB3, for the part of the observations that the networks see."""
        extractor = super().make_features_extractor()
        if self.seen_space == self.observation_space:
            return extractor
        return SeenPart(self.observation_space, self.seen_space, extractor)

    def get_distribution(self, obs: PyTorchObs) -> Distribution:
        """Return the actor's distribution at each observation, as the method of SB3's ActorCriticPolicy does."""
        return self.actor.distribution(obs)

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> Any:
        """Make the actor for the action space."""
        kwargs = self._update_features_extractor(self.actor_kwargs, features_extractor)
        cls: Any = ContinuousActor if isinstance(self.action_space, spaces.Box) else DiscreteActor
        return cls(**kwargs).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> Critic:
        """Make a critic for the action space."""
        return Critic(**self._update_features_extractor(self.critic_kwargs, features_extractor)).to(self.device)


class OffPACCnnPolicy(OffPACPolicy):
    """:class:`OffPACPolicy` for images."""

    def __init__(
        self, *args: Any, features_extractor_class: type[BaseFeaturesExtractor] = NatureCNN, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs | {"features_extractor_class": features_extractor_class})


class OffPACMultiInputPolicy(OffPACPolicy):
    """:class:`OffPACPolicy` for Dict observations."""

    takes_dict: ClassVar[bool] = True

    def __init__(
        self, *args: Any, features_extractor_class: type[BaseFeaturesExtractor] = CombinedExtractor, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs | {"features_extractor_class": features_extractor_class})


def act(policy: OffPACPolicy, obs: Any, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one action per env.

    :param policy: the policy
    :param obs: observations, ``(n_envs, ...)`` or a dict of those
    :param step: time step within the rollout, for errors
    :return: actions as they are stored, ``(n_envs, *action_shape)``, those of a Box in [-1, 1]; and their log-probs,
        nats, ``(n_envs,)``
    :raises NonFiniteError: naming the observation, or the parameter of the policy, that is not finite
    :raises ValueError: a method of the policy's own has drawn an action that a mask forbids
    """
    cause: Exception | None = None
    try:
        with th.no_grad(), unvalidated_distributions():
            obs_tensor = obs_as_tensor(obs, policy.device)
            distribution = policy.actor.distribution(obs_tensor)
            drawn = _predicted(policy, obs, obs_tensor) if _predict_matters(policy) else distribution.sample()
            actions, log_probs = drawn.cpu().numpy(), distribution.log_prob(drawn).cpu().numpy()
        if policy.masks:
            _require_allowed(policy, actions, obs[MASK_KEY])
        if np.isfinite(log_probs).all():
            return actions.reshape(len(log_probs), *(policy.action_space.shape or ())), log_probs
    except RuntimeError as error:  # torch raises it for probabilities that are not finite
        cause = error
    require_finite_step("observation", obs, step, cause=cause)
    require_finite_policy(policy, cause)
    raise cause or NonFiniteError("log_prob", math.nan, step=step)


def _require_allowed(policy: OffPACPolicy, actions: np.ndarray, masks: np.ndarray) -> None:
    env = first_forbidden(actions, masks, mask_starts(policy.action_space))
    if env is not None:
        raise ValueError(
            f"policy {type(policy).__name__} must draw actions that action_mask allows, got {actions[env]} for env "
            f"{env}: let its methods keep to the masks, or give use_action_masks=False"
        )


def _predict_matters(policy: OffPACPolicy) -> bool:
    """Whether ``predict``, which SB3 acts by, may do something else than draw from the actor's distribution.

    It may if the user has replaced a method on its way, or has registered hooks on the actor.
    """
    module = original(policy)
    own = "_predict" in vars(module) or type(module)._predict is not OffPACPolicy._predict
    return own or has_own_predict(module) or is_listened_to((module.actor,)) or is_patched(module.actor)


def _predicted(policy: OffPACPolicy, obs: Any, obs_tensor: Any) -> th.Tensor:
    """Draw actions as SB3 does; those of a Box are in [-1, 1]."""
    if not has_own_predict(policy):
        drawn: th.Tensor = policy._predict(obs_tensor)
        return drawn
    chosen, _ = policy.predict(obs)
    if isinstance(policy.action_space, spaces.Box):
        chosen = scaled(chosen, policy.action_space).astype(np.float32)
    return th.as_tensor(chosen, device=policy.device)


def move_target(critic: Critic, target: Critic, tau: float) -> None:
    r"""Move the target's parameters toward the critic's, and copy buffers such as BatchNorm's statistics.

    .. math:: \bar\phi \leftarrow (1 - \tau) \bar\phi + \tau \phi

    :raises ValueError: their parameters have different shapes
    """
    theirs, ours = ([tuple(parameter.shape) for parameter in net.parameters()] for net in (target, critic))
    if theirs != ours:
        raise ValueError(
            "policy.critic_target must have parameters of the shapes of policy.critic, in the same order: change "
            f"layers in both, got {theirs} and {ours}"
        )
    with th.no_grad():
        for slow, fast in zip(target.parameters(), critic.parameters(), strict=True):
            slow.lerp_(fast, tau)
        for statistics, now in zip(target.buffers(), critic.buffers(), strict=True):
            statistics.copy_(now)
