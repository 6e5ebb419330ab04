"""Saved files, including those of earlier layouts of the package."""

from sb3_pg.checkpoints.renamed_modules import renamed_modules

__all__ = ["renamed_modules"]
