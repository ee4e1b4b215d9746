"""The table that results go to: read before anything is measured, replaced after every cell."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...kernels.tables import user_path
from ...kernels.tune import device_family
from ..results import write_atomic
from .cell import Result

SECTIONS = {"triton": "shapes", "hopper": "hopper"}


def place(out: Path | None, family: str) -> Path:
    """The file that results go to: `out`, else the user's table of the device family.

    Raises:
        ValueError: there is no such place.
    """
    path = out or user_path(family)
    if path is None:
        raise ValueError("no home directory: set MOESAIC_CACHE or give --out")
    return path


def open_table(path: Path, device: str) -> dict[str, Any]:
    """The table at `path` as it is now, or an empty one.

    Raises:
        ValueError: the file is there and no table of this kind of device.
    """
    remedy = "move it away or choose another --out"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as a table ({error}); {remedy}") from error
    whole = isinstance(document, dict) and all(
        isinstance(rows, dict) and all(isinstance(r, dict) for r in rows.values())
        for rows in (document.get(name, {}) for name in (*SECTIONS.values(), "microseconds"))
    )
    if not whole or not set(SECTIONS.values()) & set(document):
        raise ValueError(f"{path} is no table of moesaic; {remedy}")
    family = device_family(str(document.get("device", "")))
    if family != device_family(device):
        raise ValueError(f"{path} was measured on {document.get('device')!r}; {remedy}")
    return dict(document)


def add(
    table: Mapping[str, Any], stamped: Mapping[str, Any], key: str, result: Result
) -> dict[str, Any]:
    """`table` with the row of a result in place of an older one."""
    new = dict(table) | {name: stamped[name] for name in ("device", "torch", "triton")}
    for section in SECTIONS.values():
        new.setdefault(section, {})
    times = {"layer": round(result.best_us, 2)}
    if result.heuristic_us is not None:
        times["heuristic"] = round(result.heuristic_us, 2)
    section, told = SECTIONS[result.impl], f"{result.impl}/{key}"
    for name, where, value in ((section, key, result.row), ("microseconds", told, times)):
        rows = dict(new.get(name, {}))
        rows[where] = dict(rows.get(where, {})) | {str(result.tokens): value}
        new[name] = rows
    return new


def write(path: Path, table: Mapping[str, Any]) -> None:
    """Replace the file; raises ResultsError as `write_atomic`."""
    write_atomic(path, json.dumps(table, indent=1) + "\n")
