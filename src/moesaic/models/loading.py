"""Reading and writing the byte language model: safetensors, data only, everything checked first.

One file holds bf16 tensors named as `ByteMoELM.state_dict()` and, in the header's metadata,
``format``, ``config`` (JSON of `ByteLMConfig`) and whatever the trainer noted. Nothing is
unpickled, and no memory is allocated from a config before names and shapes were compared with the
file.

>>> config = read_config(model_path())
>>> config.num_layers >= 4 and config.num_experts >= 16
True
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .byte_lm import ByteLMConfig, ByteMoELM, ExpertsFn

FORMAT = "moesaic-byte-moe-lm-1"
STORED = (torch.bfloat16, torch.float16, torch.float32)
_ASSETS = Path(__file__).resolve().parent.parent / "assets"


def model_path() -> Path:
    """The embedded model's file."""
    return _ASSETS / "byte_moe_lm.safetensors"


def heldout_path() -> Path:
    """Real text that the embedded model was not trained on."""
    return _ASSETS / "heldout.txt"


def _parse_config(path: Path, metadata: dict[str, str]) -> ByteLMConfig:
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path}: metadata 'format' must be {FORMAT!r}, got {metadata.get('format')!r}; "
            "give a file written by examples/train_moe_lm.py"
        )
    remedy = "write the file again with save_model"
    try:
        raw: Any = json.loads(metadata.get("config", ""))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: metadata 'config' is not JSON ({error}); {remedy}") from error
    known = {field.name: field.type for field in fields(ByteLMConfig)}
    if not isinstance(raw, dict) or raw.keys() != known.keys():
        got = sorted(raw) if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f"{path}: config must hold exactly {sorted(known)}, got {got}; {remedy}")
    for name, value in raw.items():
        wanted = (int, float) if known[name] == "float" else (int,)
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise ValueError(
                f"{path}: config {name} must be {known[name]}, got {value!r}; {remedy}"
            )
    try:
        return ByteLMConfig(**raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {remedy}") from error


def _read(path: Path, *, header_only: bool = False) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file, on the CPU."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the path of a .safetensors model")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = [] if header_only else list(file.keys())
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"{path}: not a complete safetensors file ({first}); copy or download it again"
        ) from error


def _check_tensors(path: Path, tensors: dict[str, Tensor], model: ByteMoELM) -> None:
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    if expected.keys() != tensors.keys():
        missing, extra = sorted(expected.keys() - tensors), sorted(tensors.keys() - expected)
        raise ValueError(
            f"{path}: tensors do not match the config: missing {missing[:3] or 'none'}, "
            f"unexpected {extra[:3] or 'none'}; write the file again with save_model"
        )
    for name, shape in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype not in STORED:
            raise ValueError(
                f"{path}: {name} must be a float tensor of shape {shape}, got {tensor.dtype} "
                f"{tuple(tensor.shape)}; write the file again with save_model"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{path}: {name} holds NaN or infinity; train or copy it again")


def read_config(path: str | os.PathLike[str]) -> ByteLMConfig:
    """The configuration in the header of a model file; raises as `load_model`."""
    where = Path(path)
    return _parse_config(where, _read(where, header_only=True)[0])


def load_model(
    path: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    experts_impl: ExpertsFn | None = None,
) -> ByteMoELM:
    """The model of a file (default: the embedded one), in eval mode and without gradients.

    Args:
        path: a file written by `save_model`.
        dtype: the computing dtype; the file's bf16 is exact in fp32.
        device: where the weights go.
        experts_impl: see `ByteMoELM`.

    Raises:
        OSError: the file is missing or unreadable.
        ValueError: it is truncated, of another format, or its tensors are not those of its config.
    """
    where = model_path() if path is None else Path(path)
    metadata, tensors = _read(where)
    config = _parse_config(where, metadata)
    with torch.device("meta"):
        model = ByteMoELM(config, experts_impl=experts_impl)
    _check_tensors(where, tensors, model)
    state = {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def save_model(
    model: ByteMoELM, path: str | os.PathLike[str], *, notes: dict[str, str] | None = None
) -> None:
    """Write `model` in bf16 with its config; the file appears under its name only when complete.

    Raises:
        OSError: it cannot be written.
    """
    where = Path(path)
    state = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
    }
    config = json.dumps(asdict(model.config), sort_keys=True)
    partial = where.with_name(f"{where.name}.{os.getpid()}.part")
    try:
        save_file(state, partial, metadata={**(notes or {}), "format": FORMAT, "config": config})
        partial.replace(where)
    except SafetensorError as error:
        raise OSError(f"{where}: cannot be written ({error}); free some space") from error
    finally:
        partial.unlink(missing_ok=True)
