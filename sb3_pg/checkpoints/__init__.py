"""Saved files, including those of earlier layouts of the package, and checkpoints of runs."""

from sb3_pg.checkpoints.atomic import write_atomically
from sb3_pg.checkpoints.folder import latest_checkpoint
from sb3_pg.checkpoints.model_file import read_buffer, read_model, write_buffer, write_model
from sb3_pg.checkpoints.random_states import unchanged_random_state
from sb3_pg.checkpoints.resume import ResumeCallback

__all__ = [
    "ResumeCallback",
    "latest_checkpoint",
    "read_buffer",
    "read_model",
    "unchanged_random_state",
    "write_atomically",
    "write_buffer",
    "write_model",
]
