"""Saved files: how those of earlier layouts of the package are read."""

from sb3_pg.checkpoints.renamed_modules import renamed_modules

__all__ = ["renamed_modules"]
