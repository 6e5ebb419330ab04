"""EnvPool's envs through the adapter. Its random numbers are its own, so that episodes are compared by statistics."""

from typing import Any

import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv

from sb3_pg import Reinforce
from sb3_pg.envs import EnvPoolAdapter, make_vec_env
from sb3_pg.extras import MissingExtraError

SMALL: dict[str, Any] = {"policy_kwargs": {"net_arch": [4]}, "device": "cpu", "seed": 0}


def test_a_missing_envpool_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "envpool", None)
    with pytest.raises(MissingExtraError, match=r'pip install "sb3_pg\[envpool\]"'):
        make_vec_env("CartPole-v1", backend="envpool")


class TestWithEnvPool:
    """What needs it."""

    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        pytest.importorskip("envpool", exc_type=ImportError)

    def test_ended_episodes_are_reset_at_once(self) -> None:
        env: Any = EnvPoolAdapter("CartPole-v1", 4)
        env.seed(1)
        obs, lengths, returns, ended = env.reset(), np.zeros(4, dtype=int), np.zeros(4), 0
        assert obs.dtype == np.float32
        for _ in range(200):
            previous = obs
            obs, rewards, dones, infos = env.step(np.zeros(4, dtype=int))
            lengths, returns = lengths + 1, returns + rewards
            assert (rewards == 1).all()
            for i, info in enumerate(infos):
                if not dones[i]:
                    assert info == {}
                    # pushed to the left: nothing but the same episode's next state
                    assert np.abs(obs[i] - previous[i]).max() < 0.5
                    continue
                ended += 1
                assert (info["episode"]["l"], info["episode"]["r"]) == (lengths[i], returns[i])
                assert 7 < lengths[i] < 12
                assert np.abs(obs[i]).max() <= 0.05  # where CartPole begins
                assert np.abs(info["terminal_observation"][2]) > 0.2  # where it has fallen
                assert not info["TimeLimit.truncated"]
                lengths[i], returns[i] = 0, 0
        assert ended > 60
        env.close()

    def test_a_time_limit_truncates(self) -> None:
        env = EnvPoolAdapter("Pendulum-v1", 2, max_episode_steps=5)
        env.reset()
        for step in range(1, 11):
            _, _, dones, infos = env.step(np.zeros((2, 1), dtype=np.float32))
            assert dones.tolist() == [step % 5 == 0] * 2
            if dones.any():
                assert [info["TimeLimit.truncated"] for info in infos] == [True, True]
                assert [info["elapsed_step"] for info in infos] == [5, 5]
        env.close()

    @pytest.mark.parametrize(
        ("env_id", "mean_within"), [("CartPole-v1", 5.0), ("LunarLander-v3", 50.0), ("Acrobot-v1", 5.0)]
    )
    def test_random_policies_return_what_they_do_elsewhere(self, env_id: str, mean_within: float) -> None:
        def returns(env: VecEnv) -> np.ndarray:
            rng = np.random.default_rng(0)
            env.seed(3)
            env.reset()
            found: list[list[float]] = [[] for _ in range(env.num_envs)]
            while min(map(len, found)) < 30:
                _, _, dones, infos = env.step(rng.integers(0, env.action_space.n, env.num_envs))  # type: ignore[attr-defined]
                for i in np.flatnonzero(dones):
                    found[i].append(infos[i]["episode"]["r"])
            env.close()
            return np.array([episodes[:30] for episodes in found]).ravel()  # equally many of each: no length bias

        ours, theirs = (returns(make_vec_env(env_id, 8, backend)) for backend in ("envpool", "dummy"))
        error = np.hypot(ours.std(), theirs.std()) / np.sqrt(len(ours))
        assert abs(ours.mean() - theirs.mean()) < max(4 * error, 1e-9)
        assert 4 * error < mean_within

    def test_seeds(self) -> None:
        env: Any = make_vec_env("CartPole-v1", 2, "envpool", seed=7)
        first = env.reset()
        assert not np.array_equal(first[0], first[1])
        env.seed(8)
        assert np.array_equal(env.reset()[0], first[1])  # seed + i, as in SB3
        assert not np.array_equal(env.reset()[0], first[1])
        env.close()

    @pytest.mark.parametrize("algorithm", [PPO, Reinforce])
    def test_algorithms_take_them(self, algorithm: Any) -> None:
        env = make_vec_env("CartPole-v1", 4, "envpool", backend_kwargs={"num_threads": 1})
        model = algorithm("MlpPolicy", env, n_steps=16, **SMALL).learn(256)
        assert len(model.ep_info_buffer) > 0
        evaluated: Any = evaluate_policy(model, env, n_eval_episodes=4)
        assert evaluated[0] >= 7
        env.close()

    def test_double_precision_and_bounded_actions(self) -> None:
        env = make_vec_env("InvertedPendulum-v4", 2, "envpool")
        Reinforce("MlpPolicy", env, n_steps=16, **SMALL).learn(64)
        env.close()

    def test_what_it_does_not_have_is_said(self) -> None:
        with pytest.raises(ValueError, match="env_id must be an env of EnvPool, got 'CartPole-v7', did you mean"):
            EnvPoolAdapter("CartPole-v7")
        for wrong, message in (
            ({"batch_size": 1}, "batch_size must be left out, got 1"),
            ({"seed": 3}, "seed must be left out, got 3: call seed"),
            ({"nonsense": 3}, "kwargs must be arguments of EnvPool's CartPole-v1"),
            ({"num_envs": 0}, "num_envs must be at least 1"),
        ):
            with pytest.raises(ValueError, match=message):
                EnvPoolAdapter("CartPole-v1", **{"num_envs": 2, **wrong})
        env = EnvPoolAdapter("CartPole-v1", 2)
        with pytest.raises(ValueError, match="wrapper_class"):
            make_vec_env("CartPole-v1", 2, "envpool", wrapper_class=lambda env: env)
        with pytest.raises(NotImplementedError, match="no attributes"):
            env.set_attr("gravity", 1.0)
        with pytest.raises(NotImplementedError, match="no methods"):
            env.env_method("render")
        env.set_options({"low": 0.0})
        with pytest.raises(ValueError, match="options must be empty"):
            env.reset()
        env.close()
