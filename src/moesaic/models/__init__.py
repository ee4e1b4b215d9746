"""The embedded language model: a small byte-level MoE transformer and how it is read from disk."""

from .byte_lm import ByteLMConfig, ByteMoELM, byte_windows
from .eager import eager_experts
from .loading import heldout_path, load_model, model_path, read_config, save_model

__all__ = [
    "ByteLMConfig",
    "ByteMoELM",
    "byte_windows",
    "eager_experts",
    "heldout_path",
    "load_model",
    "model_path",
    "read_config",
    "save_model",
]
