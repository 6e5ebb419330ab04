"""SB3's callbacks with these algorithms: evaluate, stop at a score, and look at the gradient's noise."""

from tempfile import TemporaryDirectory

from stable_baselines3.common.callbacks import EvalCallback, StopTrainingOnRewardThreshold
from stable_baselines3.common.env_util import make_vec_env

from sb3_pg import GradientDiagnosticsCallback, Reinforce

if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        evaluation = EvalCallback(
            make_vec_env("CartPole-v1", n_envs=5),
            callback_on_new_best=StopTrainingOnRewardThreshold(475, verbose=1),
            best_model_save_path=folder,
            eval_freq=500,
            n_eval_episodes=20,
        )
        model = Reinforce("MlpPolicy", make_vec_env("CartPole-v1", n_envs=8), seed=0, device="cpu", verbose=1)
        model.learn(100_000, callback=[evaluation, GradientDiagnosticsCallback(every=10)])
        best = Reinforce.load(f"{folder}/best_model")
        print(f"stopped after {model.num_timesteps:,} env steps, at {evaluation.best_mean_reward:.0f}")
        print(f"the best policy acts: {best.predict(model.observation_space.sample())[0]}")
