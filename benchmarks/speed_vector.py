"""What is compared on vectorized envs: ours on native ones or EnvPool's, SB3's own on its DummyVecEnv."""

from speed_cases import a2c, kl_penalty, ppo, reinforce
from speed_timing import Case, FloorCase, TrainingCase

CARTPOLE, LANDER = "CartPole-v1", "LunarLander-v3"

CASES: tuple[Case, ...] = (
    TrainingCase("vector-cartpole-64", "Reinforce", reinforce, "A2C", a2c, CARTPOLE, 64, backend="vector"),
    TrainingCase("vector-cartpole-64-ppo", "KLPenaltyPG", kl_penalty, "PPO", ppo, CARTPOLE, 64, backend="vector"),
    FloorCase("floor-cartpole-64", "Reinforce", reinforce, CARTPOLE, 64, "vector"),
    TrainingCase("envpool-lander-64", "Reinforce", reinforce, "A2C", a2c, LANDER, 64, backend="envpool", n_threads=2),
    FloorCase("floor-lander-64", "Reinforce", reinforce, LANDER, 64, "envpool", n_threads=2),
)
