"""OffPAC's rewards of n steps: SB3's argument, the algorithm's discount, and what goes with what."""

import copy
import inspect
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer

from sb3_pg import OffPAC
from sb3_pg.rollout import BehaviorReplayBuffer, NStepBehaviorReplayBuffer
from tests.algorithms.off_pac import GRADIENTS, envs, make

N = 3
GAMMA = 0.5
#: How rewards of three steps are asked for.
WAYS: dict[str, dict[str, Any]] = {
    "argument": {"n_steps": N},
    "SB3's buffer": {"replay_buffer_class": NStepReplayBuffer, "replay_buffer_kwargs": {"n_steps": N}},
    "same gamma": {"replay_buffer_class": NStepReplayBuffer, "replay_buffer_kwargs": {"n_steps": N, "gamma": GAMMA}},
    "our buffer": {"replay_buffer_class": NStepBehaviorReplayBuffer, "replay_buffer_kwargs": {"n_steps": N}},
}
each_way = pytest.mark.parametrize("way", WAYS)


def filled(n_envs: int = 2, action_space: str = "discrete", **kwargs: Any) -> OffPAC:
    """With 20 steps of each env to replay; episodes of three and two steps, every third truncated."""
    model = make(envs(action_space, n_envs), gradient_steps=0, **{"gamma": GAMMA, **kwargs}).learn(20 * n_envs)
    with th.no_grad():  # critic, target and actor have nothing in common
        for parameter in model.policy.parameters():
            parameter.add_(0.05 * th.randn_like(parameter))
    return model


def by_hand(buffer: Any, observation: np.ndarray, n: int, gamma: float) -> tuple[float, float, float, np.ndarray]:
    """Return of n steps after this observation, discount of what follows, whether it has ended, and what follows."""
    (found,) = np.argwhere((buffer.observations == observation).reshape(*buffer.observations.shape[:2], -1).all(-1))
    row, env = found
    total = 0.0
    for k in range(n):
        total += gamma**k * buffer.rewards[row + k, env]
        done, cut = buffer.dones[row + k, env], buffer.timeouts[row + k, env]
        if done or row + k == buffer.pos - 1:
            break
    return total, gamma ** (k + 1), float(done and not cut), buffer.next_observations[row + k, env]


def require_returns_by_hand(model: OffPAC, n: int, gamma: float) -> None:
    buffer: Any = model.replay_buffer
    samples = buffer.sample(64)
    lengths = set()
    for i, observation in enumerate(samples.observations.numpy()):
        total, discount, ended, following = by_hand(buffer, observation, n, gamma)
        assert samples.rewards[i].item() == pytest.approx(total, rel=1e-6)
        assert samples.discounts[i].item() == pytest.approx(discount, rel=1e-6)
        assert samples.dones[i].item() == ended
        assert np.array_equal(samples.next_observations[i], following)
        lengths.add(discount)
    assert len(lengths) == min(n, 3)  # some end sooner


def require_critic_loss_by_hand(model: OffPAC, n: int, gamma: float) -> None:
    buffer: Any = model.replay_buffer
    state = np.random.get_state()  # noqa: NPY002  # SB3's buffers draw from it
    samples = buffer.sample(16)
    np.random.set_state(state)  # noqa: NPY002
    with th.no_grad():
        q_all = [network(samples.observations) for network in model.critic.q_networks]
        q = th.stack([values[range(16), samples.actions[:, 0].long()] for values in q_all])
        q_next = th.stack([network(samples.next_observations) for network in model.critic_target.q_networks]).amin(0)
        probs = model.actor.distribution(samples.next_observations).distribution.probs
        targets = []
        for observation, value in zip(samples.observations.numpy(), (probs * q_next).sum(1), strict=True):
            total, discount, ended, _ = by_hand(buffer, observation, n, gamma)
            targets.append(total + discount * (1 - ended) * float(value))
        wanted = 0.5 * (q - th.tensor(targets)).square().mean(1).sum().item()
    model.train(1, 16)
    assert model.logger.name_to_value["train/critic_loss"] == pytest.approx(wanted, rel=1e-5)


@each_way
def test_returns_and_targets_are_those_of_the_algorithms_gamma(way: str) -> None:
    model = filled(**WAYS[way])
    require_returns_by_hand(model, N, GAMMA)
    require_critic_loss_by_hand(model, N, GAMMA)


@each_way
def test_another_gamma_by_load_or_by_hand(way: str, tmp_path: Path) -> None:
    model = filled(**WAYS[way])
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded: Any = OffPAC.load(tmp_path / "model", env=envs("discrete", 2), gamma=0.25)
    loaded.load_replay_buffer(tmp_path / "buffer")
    loaded.set_logger(model.logger)
    require_critic_loss_by_hand(loaded, N, 0.25)
    require_returns_by_hand(loaded, N, 0.25)
    model.gamma = 0.75
    require_critic_loss_by_hand(model, N, 0.75)
    again: Any = OffPAC.load(tmp_path / "model", env=envs("discrete", 2), gamma=0.25, learning_starts=2).learn(40)
    require_returns_by_hand(again, N, 0.25)


@each_way
@pytest.mark.parametrize("action_space", ["discrete", "box"])
def test_what_is_saved_is_loaded_without_a_warning(way: str, action_space: str, tmp_path: Path) -> None:
    model: Any = make(envs(action_space), gamma=GAMMA, **WAYS[way]).learn(20)
    model.save(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded: Any = OffPAC.load(tmp_path / "model", env=envs(action_space))
    assert type(loaded.replay_buffer) is type(model.replay_buffer)
    assert loaded.replay_buffer_class is model.replay_buffer_class
    assert (loaded.replay_buffer.n_steps, loaded.replay_buffer.gamma) == (N, GAMMA)
    loaded.learn(20)


def test_load_takes_another_number_of_steps(tmp_path: Path) -> None:
    for saved, wanted in ((1, 3), (3, 1), (3, 2)):
        make(envs("discrete"), n_steps=saved, gamma=GAMMA).save(tmp_path / "model")
        loaded: Any = OffPAC.load(tmp_path / "model", env=envs("discrete"), n_steps=wanted, learning_starts=2)
        loaded.learn(20)
        assert isinstance(loaded.replay_buffer, NStepReplayBuffer) == (wanted > 1)
        if wanted > 1:
            require_returns_by_hand(loaded, wanted, GAMMA)


def test_a_zip_with_another_gamma_in_its_buffers_arguments_loads(tmp_path: Path) -> None:
    model = make(envs("discrete"), gamma=GAMMA, **WAYS["SB3's buffer"])
    model.replay_buffer_kwargs = {"n_steps": N, "gamma": 0.99}  # as it was possible before
    model.save(tmp_path / "model")
    loaded: Any = OffPAC.load(tmp_path / "model", env=envs("discrete"), learning_starts=2).learn(20)
    require_returns_by_hand(loaded, N, GAMMA)
    kwargs = {"n_steps": N, "gamma": 0.99}
    with pytest.raises(ValueError, match="gamma"):
        OffPAC.load(tmp_path / "model", env=envs("discrete"), replay_buffer_kwargs=kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"replay_buffer_class": NStepReplayBuffer, "replay_buffer_kwargs": {"n_steps": N, "gamma": 0.9}},
        {"replay_buffer_class": NStepBehaviorReplayBuffer, "replay_buffer_kwargs": {"gamma": 0.9}},
        {"n_steps": N, "replay_buffer_kwargs": {"gamma": 0.9}},
    ],
)
def test_another_gamma_is_an_error_that_names_both(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"replay_buffer_kwargs\['gamma'\] must be gamma=0.5 or left out, got 0.9"):
        make(envs("discrete"), gamma=GAMMA, **kwargs)


# ---------------------------------------------------------------- SB3's argument


def test_it_has_sb3s_place_and_default() -> None:
    ours, theirs = (list(inspect.signature(cls).parameters) for cls in (OffPAC, DQN))
    before = "optimize_memory_usage"
    assert ours[ours.index("n_steps") - 1] == theirs[theirs.index("n_steps") - 1] == before
    assert make(envs("discrete")).n_steps == DQN("MlpPolicy", envs("discrete")).n_steps == 1


@pytest.mark.parametrize("n_steps", [0, -1])
def test_it_is_a_positive_number(n_steps: int) -> None:
    with pytest.raises(ValueError, match=f"n_steps must be a whole number of at least 1, got {n_steps}"):
        make(envs("discrete"), n_steps=n_steps)


@pytest.mark.parametrize("cls", [ReplayBuffer, NStepReplayBuffer, BehaviorReplayBuffer])
def test_a_class_of_ones_own_is_warned_of_as_there(cls: Any) -> None:
    said = []
    for algorithm in (DQN, OffPAC):
        with pytest.warns(
            UserWarning, match=r"n_steps=4.* is ignored because a custom `replay_buffer_class`"
        ) as caught:
            model = algorithm("MlpPolicy", envs("discrete"), n_steps=4, replay_buffer_class=cls, device="cpu")
        said.append(str(caught[0].message))
        assert type(model.replay_buffer) is cls
    assert said[0] == said[1]


def test_without_a_class_nothing_is_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = make(envs("discrete"), n_steps=N)
    assert type(model.replay_buffer) is model.replay_buffer_class is NStepBehaviorReplayBuffer


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"optimize_memory_usage": True}, r"n_steps=3 .*optimize_memory_usage must be False"),
        ({"replay_buffer_kwargs": {"n_steps": 5}}, r"replay_buffer_kwargs\['n_steps'\] must be n_steps=3 .*got 5"),
    ],
)
def test_what_contradicts_it(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(envs("discrete"), n_steps=N, **kwargs)


def test_dict_observations_have_no_rewards_of_n_steps() -> None:
    with pytest.raises(ValueError, match=r"n_steps=3 does not support Dict observations, got Dict"):
        make(envs("discrete", observation_space="dict"), n_steps=N)
    for cls in (NStepReplayBuffer, NStepBehaviorReplayBuffer, ReplayBuffer):
        with pytest.raises(
            ValueError, match=rf"replay_buffer_class={cls.__name__} does not support Dict observations, got Dict"
        ):
            make(envs("discrete", observation_space="dict"), replay_buffer_class=cls)


# ---------------------------------------------------------------- with the behavior's log-probs


@pytest.mark.parametrize("action_space", GRADIENTS)
@pytest.mark.parametrize("n_envs", [1, 2])
def test_every_gradient_goes_with_it(action_space: str, n_envs: int) -> None:
    for gradient in GRADIENTS[action_space]:
        model = make(envs(action_space, n_envs), actor_gradient=gradient, n_steps=N, learning_rate=1e-2)
        before = th.nn.utils.parameters_to_vector(model.actor.parameters()).detach().clone()
        model.learn(60)
        assert not th.equal(before, th.nn.utils.parameters_to_vector(model.actor.parameters()))


def test_log_probs_are_those_of_the_sampled_actions() -> None:
    model = filled(actor_gradient="importance", n_steps=N)
    buffer: Any = model.replay_buffer
    samples = buffer.sample(64)
    stored = {tuple(buffer.observations[t, e].ravel()): (t, e) for t in range(buffer.pos) for e in range(2)}
    for observation, action, log_prob in zip(samples.observations, samples.actions, samples.log_probs, strict=True):
        place = stored[tuple(observation.numpy().ravel())]
        assert log_prob.item() == buffer.log_probs[place]
        assert action.item() == buffer.actions[place]
    assert len(set(samples.log_probs.tolist())) > 2


def test_sb3s_buffer_has_no_log_probs_for_importance() -> None:
    with pytest.raises(ValueError, match=r"importance.*got NStepReplayBuffer. .* give None and n_steps"):
        make(envs("discrete"), actor_gradient="importance", **WAYS["SB3's buffer"])


def test_a_copy_keeps_its_steps() -> None:
    model = filled(n_steps=N)
    require_returns_by_hand(copy.deepcopy(model), N, GAMMA)
