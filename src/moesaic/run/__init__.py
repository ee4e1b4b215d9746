"""The main job: real text through a MoE language model, twice, and what happened."""

from .command import main

__all__ = ["main"]
