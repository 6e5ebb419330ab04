"""The README's two pictures.

python docs/figures.py                                      # _static/learning_curves.png, from benchmarks/results/
sb3-pg train --algo kl_penalty_pg --env LunarLander-v3 --seed 0
python docs/figures.py logs/kl_penalty_pg/LunarLander-v3_1  # _static/lunar_lander.gif, of that run
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Final

import gymnasium
from PIL import Image
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_pg import KLPenaltyPG
from sb3_pg.reporting.plots import draw
from sb3_pg.reporting.report import learning_curves
from sb3_pg.reporting.scores import read_results

DOCS: Final = Path(__file__).resolve().parent
RESULTS: Final = DOCS.parent / "benchmarks" / "results" / "learning.csv"
LABELS: Final = {
    "trpo": "sb3_pg TRPO",
    "npg": "sb3_pg NPG",
    "contrib_trpo": "sb3-contrib TRPO",
    "ppo": "SB3 PPO",
    "a2c": "SB3 A2C",
}
ENVS: Final = ("Hopper-v4", "HalfCheetah-v4", "Ant-v4")
SOLVED_AT: Final = 200.0
FRAME_EVERY: Final = 5  # env steps
FRAMES_PER_SECOND: Final = 12.5


def curves(path: Path) -> None:
    """Draw learning curves beside the peers'."""
    chosen = [result for result in read_results(RESULTS) if result.env in ENVS and result.label in LABELS]
    chosen.sort(key=lambda result: (ENVS.index(result.env), list(LABELS).index(result.label)))
    named = [replace(result, curve=replace(result.curve, label=LABELS[result.label])) for result in chosen]
    draw(learning_curves(named), labels=LABELS.values()).savefig(path, dpi=75)


def landing(run: Path, path: Path) -> None:
    """Record one episode of a trained policy, the first of return 200 or more, which counts as solved.

    :param run: folder that ``sb3-pg train`` has written
    :param path: the GIF
    """
    env = gymnasium.make("LunarLander-v3", render_mode="rgb_array")
    statistics = VecNormalize.load(str(run / "LunarLander-v3" / "vecnormalize.pkl"), DummyVecEnv([lambda: env]))
    model = KLPenaltyPG.load(run / "LunarLander-v3.zip", device="cpu")
    frames: list[Image.Image] = []
    total, seed = 0.0, 0
    while total < SOLVED_AT:
        obs, _ = env.reset(seed=seed)
        frames, total, done, n_steps = [], 0.0, False, 0
        while not done:
            if n_steps % FRAME_EVERY == 0:
                frame = Image.fromarray(env.render()).resize((300, 200))  # type: ignore[arg-type]
                frames.append(frame.convert("P", palette=Image.Palette.ADAPTIVE, colors=32))
            action, _ = model.predict(statistics.normalize_obs(obs), deterministic=True)
            obs, reward, terminated, truncated, _ = env.step(action)
            total, n_steps, done = total + float(reward), n_steps + 1, terminated or truncated
        print(f"episode {seed}: return {total:.0f}")
        seed += 1
    env.close()
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 / FRAMES_PER_SECOND, loop=0)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        landing(Path(sys.argv[1]), DOCS / "_static" / "lunar_lander.gif")
    else:
        curves(DOCS / "_static" / "learning_curves.png")
