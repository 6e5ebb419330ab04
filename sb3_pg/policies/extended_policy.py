"""SB3's policies with memory and action masks."""

import functools
import inspect
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BasePolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.utils import obs_as_tensor

from sb3_pg import compat
from sb3_pg.action_masks import MASK_KEY
from sb3_pg.policies.actions import to_env
from sb3_pg.policies.masked_distributions import mask_distribution
from sb3_pg.policies.masked_policy import MaskedPolicy
from sb3_pg.policies.memory import (
    Followers,
    History,
    Memory,
    MemoryExtractor,
    Sequences,
    State,
    States,
    to_memory,
)
from sb3_pg.policies.observations import CHUNK_SIZE, map_observations, n_rows, split_observations
from sb3_pg.policies.policy_cache import count_as_standard, original

#: Methods of SB3's that :class:`ExtendedPolicy` replaces: a policy with one of its own would lose it.
_REPLACED = ("forward", "evaluate_actions", "get_distribution", "predict_values", "extract_features", compat.PREDICT)


class Outputs(NamedTuple):
    """What a policy with memory computes for whole sequences.

    :param distribution: of the actions of all steps
    :param values: V, ``(n_rows,)``
    :param other_values: V of the observations that follow, ``(n_followers,)``; None if there are none
    :param critic_state: what a critic with a memory of its own remembers before each of these, otherwise None
    """

    distribution: Distribution
    values: th.Tensor
    other_values: th.Tensor | None
    critic_state: State | None


class ExtendedPolicy(MaskedPolicy, ActorCriticPolicy):
    """An ActorCriticPolicy with memory, action masks, or both. The other arguments are those of SB3's policy.

    With memory, its observations may be a :class:`~sb3_pg.policies.History`. Observations without a history are first
    steps of episodes.

    With masks, its observations are a Dict with the key "action_mask" (:mod:`sb3_pg.action_masks`). The actions that it
    forbids have probability 0.

    :param memory: the recurrent layers, None for none
    :param masks: whether there are action masks
    :param observe_masks: whether the networks see the mask. It takes a policy for Dict observations
    """

    mlp_extractor: Any

    def __init__(
        self, *args: Any, memory: Any = None, masks: bool = False, observe_masks: bool = False, **kwargs: Any
    ) -> None:
        given = to_memory(memory)
        self.memory: Memory | None = given
        super().__init__(*args, masks=masks, observe_masks=observe_masks, **kwargs)
        if given is not None and given.critic == "shared" and not self.share_features_extractor:
            raise ValueError(
                "memory with critic='shared' is run over the features of actor and critic, which must be the same: set "
                "share_features_extractor=True in policy_kwargs, or critic='own'"
            )

    def _build_mlp_extractor(self) -> None:
        if self.memory is None:
            super()._build_mlp_extractor()
            return
        n_features, self.features_dim = self.features_dim, self.memory.hidden_size
        super()._build_mlp_extractor()
        self.features_dim = n_features
        self.mlp_extractor = MemoryExtractor(n_features, self.memory, self.mlp_extractor)

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        if self.ortho_init and self.memory is not None:
            self.mlp_extractor.init_weights()

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | {"memory": self.memory}

    # ---------------------------------------------------------------- whole sequences

    def forward(self, obs: Any, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Draw actions. Return them, values and log-probs, as in SB3."""
        latent_pi, latent_vf, _ = self._latents(obs)
        distribution = self._distribution(latent_pi, obs)
        actions = distribution.get_actions(deterministic=deterministic)
        log_prob = distribution.log_prob(actions)
        shape: Any = self.action_space.shape
        return actions.reshape((-1, *shape)), self.value_net(latent_vf), log_prob

    def evaluate_actions(self, obs: Any, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """Return values, log-probs and entropies, as in SB3."""
        latent_pi, latent_vf, _ = self._latents(obs)
        distribution = self._distribution(latent_pi, obs)
        return self.value_net(latent_vf), distribution.log_prob(actions), distribution.entropy()

    def get_distribution(self, obs: Any) -> Distribution:
        """Return the action distribution, as in SB3."""
        features = self._features(obs, self.pi_features_extractor)
        return self._distribution(self.mlp_extractor.forward_actor(features, *self._sequences(obs)), obs)

    def predict_values(self, obs: Any) -> th.Tensor:
        """Return V, as in SB3."""
        features = self._features(obs, self.vf_features_extractor)
        values: th.Tensor = self.value_net(self.mlp_extractor.forward_critic(features, *self._sequences(obs)))
        return values

    def outputs_over(self, history: History, followers: Followers | None) -> "Outputs":
        """Return the action distribution and V of a history's steps, and V of the observations that follow.

        V of these has no gradient.

        :param history: whole sequences
        :param followers: observations after the last steps of some sequences
        """
        latent_pi, latent_vf, features = self._latents(history)
        values = self.value_net(latent_vf).flatten()
        after = self._values_after(features, history.sequences, followers)
        return Outputs(self._distribution(latent_pi, history), values, *after)

    def values_over(
        self, history: History, followers: Followers | None
    ) -> tuple[th.Tensor, th.Tensor | None, State | None]:
        """Return V of a history's steps, V of the observations that follow, and the critic's own memory.

        :param history: whole sequences
        :param followers: observations after the last steps of some sequences
        :return: ``(n_rows,)``; ``(n_followers,)`` or None; the memory before each of these, None if it is not its own
        """
        features = self._features(history, self.vf_features_extractor)
        values = self.value_net(self.mlp_extractor.forward_critic(features, history.sequences)).flatten()
        return values, *self._values_after(features, history.sequences, followers)

    @th.no_grad()
    def _values_after(
        self, features: th.Tensor, sequences: Sequences, followers: Followers | None
    ) -> tuple[th.Tensor | None, State | None]:
        """Return V of the observations that follow sequences, and what a critic with its own memory remembers there.

        :param features: of the sequences' steps
        :param sequences: all sequences
        :param followers: the observations
        """
        if followers is None or self.memory is None:
            return None, None
        rows, ended, places = sequences.only(followers.sequences)
        state = self.mlp_extractor.critic_state(features[rows], ended)
        state = None if state is None else tuple(part[:, places] for part in state)
        if state is not None and followers.at_start is not None:
            forgotten = followers.at_start[None, :, None]
            state = tuple(part.masked_fill(forgotten, 0.0) for part in state)
        following = self._features(followers.observations, self.vf_features_extractor)
        values = self.value_net(self.mlp_extractor.critic_step(following, state)).flatten()
        return values, state if self.memory.critic == "own" else None

    def _features(self, obs: Any, extractor: Any) -> th.Tensor:
        seen = self.seen(_observations(obs))

        def extracted(chunk: Any) -> th.Tensor:
            prepared = preprocess_obs(chunk, self.seen_space, normalize_images=self.normalize_images)
            features: th.Tensor = extractor(prepared)
            return features

        if th.is_grad_enabled() or n_rows(seen) <= CHUNK_SIZE:
            return extracted(seen)
        return th.cat([extracted(chunk) for chunk in split_observations(seen, CHUNK_SIZE)])

    def _sequences(self, obs: Any) -> tuple[Sequences | None, ...]:
        """Return what the networks take besides features."""
        if self.memory is None:
            return ()
        return (obs.sequences if isinstance(obs, History) else None,)

    def _latents(self, obs: Any) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Return the inputs of ``action_net`` and ``value_net``, and the critic's features."""
        features = of_critic = self._features(obs, self.pi_features_extractor)
        if not self.share_features_extractor:
            of_critic = self._features(obs, self.vf_features_extractor)
        if self.memory is None:
            return self.mlp_extractor.forward_actor(features), self.mlp_extractor.forward_critic(of_critic), of_critic
        latent_pi, latent_vf = self.mlp_extractor.both(features, of_critic, *self._sequences(obs))
        return latent_pi, latent_vf, of_critic

    def _distribution(self, latent: th.Tensor, obs: Any) -> Distribution:
        distribution: Distribution = getattr(self, compat.HEAD)(latent)
        return mask_distribution(distribution, _observations(obs)[MASK_KEY]) if self.masks else distribution

    # ---------------------------------------------------------------- single steps

    def next_distribution(
        self, obs: Any, state: State | None, starts: th.Tensor | None = None
    ) -> tuple[Distribution, State]:
        """Return the action distribution of the next step, and the memory after it.

        :param obs: of several envs, as tensors
        :param state: memory before the step, one sequence per env; None for 0
        :param starts: ``(n_envs,)``, True where an episode begins; None for nowhere
        """
        if state is not None and starts is not None:
            state = tuple(part.masked_fill(starts[None, :, None], 0.0) for part in state)
        features = self._features(obs, self.pi_features_extractor)
        remembered, state = self.mlp_extractor.actor.step(features, state)
        return self._distribution(self.mlp_extractor.networks.forward_actor(remembered), obs), state

    @th.no_grad()
    def memory_after(self, observations: Any, starts: np.ndarray, memory: States) -> States:
        """Return what actor and critic remember of several envs after some steps.

        :param observations: ``(n_steps, n_envs, ...)``, an array or a dict of arrays
        :param starts: ``(n_steps, n_envs)``, True where a step begins an episode
        :param memory: before the first step, one sequence per env; a part that is missing is 0
        """
        ends, n_envs, layers = np.ones_like(starts), starts.shape[1], self.mlp_extractor
        ends[:-1] = starts[1:]
        sequences = Sequences.of_rollout(ends, np.ones_like(ends), self.device, ~starts[0], memory)
        rows = map_observations(lambda x: x.reshape(-1, *x.shape[2:]), observations)
        seen = obs_as_tensor(rows, self.device)
        features = {"actor": self._features(seen, self.pi_features_extractor)}
        if layers.critic is not None:
            shared = self.share_features_extractor
            features["critic"] = features["actor"] if shared else self._features(seen, self.vf_features_extractor)
        last = th.as_tensor(sequences.ids[-n_envs:], device=self.device)
        after: dict[str, State] = {}
        for name, inputs in features.items():
            state = getattr(layers, name).state_after(inputs, sequences, sequences.states.get(name))
            after[name] = tuple(part[:, last] for part in state)
        return after

    def predict(
        self,
        observation: Any,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Return actions and the memory after them, as in SB3.

        :param observation: of one env, or of several
        :param state: the memory that the call before has returned, None at first
        :param episode_start: True for each env whose episode begins with ``observation``: its memory becomes 0
        :param deterministic: whether to return the distribution's mode instead of a sample
        :param action_masks: ``(n_masks,)``, or ``(n_envs, n_masks)`` for several envs; None if ``observation`` has them
            under the key "action_mask", or if there are none
        :return: actions, and the memory: arrays ``(n_layers, n_envs, hidden_size)``; ``state`` if there is no memory
        :raises ValueError: ``state`` or ``episode_start`` is that of another number of envs, or of other layers; masks
            are missing, are not expected, have another shape or number, or allow no action; or keys of ``observation``
            are missing or unknown
        """
        self.set_training_mode(False)
        obs, is_vectorized = self.obs_to_tensor(self.with_masks(observation, action_masks))
        with th.no_grad():
            if self.memory is None:
                distribution, after = self.get_distribution(obs), None
            else:
                distribution, after = self.next_distribution(obs, *self._given_memory(obs, state, episode_start))
            drawn = distribution.get_actions(deterministic=deterministic)
        space: Any = self.action_space
        actions = drawn.cpu().numpy().reshape((-1, *space.shape))
        if hasattr(space, "low"):  # a Box; others are converted by the algorithm, as those of SB3's policies
            actions = to_env(self)(actions)
        if not is_vectorized:
            actions = actions.squeeze(axis=0)
        return actions, state if after is None else tuple(part.cpu().numpy() for part in after)

    def _given_memory(self, obs: Any, state: Any, episode_start: Any) -> tuple[State | None, th.Tensor | None]:
        """Return the arguments ``state`` and ``episode_start`` of :meth:`predict` as tensors."""
        n_envs = len(next(iter(obs.values())) if isinstance(obs, dict) else obs)
        return self._given_state(state, n_envs), self._given_starts(episode_start, n_envs)

    def _given_state(self, state: Any, n_envs: int) -> State | None:
        if state is None:
            return None
        assert self.memory is not None
        shape = (self.memory.n_layers, n_envs, self.memory.hidden_size)
        expected = [shape] * self.memory.n_parts
        try:
            got: Any = [*map(np.shape, state)]
        except (TypeError, ValueError):  # no sequence, or one of lists of different lengths
            got = repr(state)
        if got != expected:
            raise ValueError(f"state must be a tuple of arrays of the shapes {expected}, got {got}")
        return tuple(th.as_tensor(part, dtype=th.float32, device=self.device) for part in state)

    def _given_starts(self, episode_start: Any, n_envs: int) -> th.Tensor | None:
        if episode_start is None:
            return None
        starts = np.asarray(episode_start, dtype=bool)
        if starts.shape not in ((), (1,), (n_envs,)):
            raise ValueError(f"episode_start must have the shape ({n_envs},), got {starts.shape}")
        return th.as_tensor(np.broadcast_to(starts, n_envs).copy(), device=self.device)


def _observations(obs: Any) -> Any:
    return obs.observations if isinstance(obs, History) else obs


def has_memory(policy: BasePolicy) -> bool:
    """Return whether a policy, or the one that ``torch.compile`` has wrapped, remembers observations.

    :param policy: the policy
    """
    inner = original(policy)
    return isinstance(inner, ExtendedPolicy) and inner.memory is not None


def has_masks(policy: BasePolicy) -> bool:
    """Return whether a policy, or the one that ``torch.compile`` has wrapped, keeps to action masks.

    :param policy: the policy
    """
    inner = original(policy)
    return isinstance(inner, MaskedPolicy) and inner.masks


class ExtendedCnnPolicy(ExtendedPolicy, ActorCriticCnnPolicy):
    """:class:`ExtendedPolicy` for images."""


class ExtendedMultiInputPolicy(ExtendedPolicy, MultiInputActorCriticPolicy):
    """:class:`ExtendedPolicy` for Dict observations."""


_EXTENDED: dict[type[ActorCriticPolicy], type[ExtendedPolicy]] = {
    ActorCriticPolicy: ExtendedPolicy,
    ActorCriticCnnPolicy: ExtendedCnnPolicy,
    MultiInputActorCriticPolicy: ExtendedMultiInputPolicy,
}

count_as_standard(ExtendedPolicy)


@functools.cache
def extended(base: type[BasePolicy]) -> type[MaskedPolicy]:
    """Return a policy class with action masks and, for an ActorCriticPolicy, with memory.

    :param base: the class without them; parts that it changes are kept. A class that has them is returned itself
    :raises ValueError: it has a method of its own that is replaced, or its constructor does not take masks
    """
    if issubclass(base, MaskedPolicy):
        names = inspect.signature(base).parameters
        if "masks" not in names and all(one.kind is not one.VAR_KEYWORD for one in names.values()):
            raise ValueError(
                f"policy {base.__name__} must hand the argument masks on to its base class, to take action masks: give "
                "its constructor **kwargs, or set use_action_masks=False"
            )
        return base
    if base in _EXTENDED:
        return _EXTENDED[base]
    own = [name for name in _REPLACED if getattr(base, name) is not getattr(ActorCriticPolicy, name)]
    if own:
        raise ValueError(
            f"memory replaces the methods {own} of policy {base.__name__}, and so do action masks: give another "
            "policy, or memory=None and use_action_masks=False"
        )
    return type(f"Extended{base.__name__}", (ExtendedPolicy, base), {"__module__": base.__module__})
