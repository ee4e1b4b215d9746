"""Files of measured choices: the shipped table of a device family and, over it, the user's own.

A file is ``{"device", "torch", "triton", "shapes": {shape: {tokens: row}}, "hopper": {...}}``, with
rows of `tune.Config` under "shapes" and of `hopper.experts.LayerConfig` under "hopper". The user's
file is `configs/<family>.json` in `cache_folder()`; `moesaic tune` writes it. A file that cannot be
read, or a row that cannot run, is refused with one message, never with an error.

>>> over({"a": {"1": 1, "16": 2}}, {"a": {"16": 3}, "b": {"1": 4}})
{'a': {'1': 1, '16': 3}, 'b': {'1': 4}}
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

log = logging.getLogger("moesaic")
Rows = dict[str, dict[str, Any]]
Check = Callable[[str, Any], str | None]


class Tables(NamedTuple):
    """Rows by shape and token count (as text): of the Triton path and of the Hopper path."""

    shapes: Rows
    hopper: Rows


NONE = Tables({}, {})


def cache_folder() -> Path | None:
    """`MOESAIC_CACHE`, else `moesaic` in the user's cache; None for a user without a home."""
    if given := os.environ.get("MOESAIC_CACHE"):
        return Path(given)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moesaic"
    except RuntimeError:
        return None


def user_path(family: str) -> Path | None:
    """The user's table of a device family, there or not."""
    folder = cache_folder()
    return folder / "configs" / f"{family}.json" if folder and family else None


def over(below: Rows, above: Rows) -> Rows:
    """Both, the rows of `above` in place of those of `below` at the same shape and token count."""
    return {key: {**below.get(key, {}), **above.get(key, {})} for key in {**below, **above}}


def _section(rows: Any, name: str, check: Check, problems: list[str]) -> Rows:
    """The rows of one section that can run; the others are told in `problems`."""
    if not isinstance(rows, dict):
        problems.append(f"{name} is not an object")
        return {}
    good: Rows = {}
    for shape, by_tokens in rows.items():
        if not isinstance(by_tokens, dict):
            problems.append(f"{name}/{shape} is not an object")
            continue
        for tokens, row in by_tokens.items():
            counted = tokens.isascii() and tokens.isdigit() and int(tokens) > 0
            wrong = check(shape, row) if counted else "the token count must be a number above 0"
            if wrong:
                problems.append(f"{name}/{shape}/{tokens}: {wrong}")
            else:
                good.setdefault(shape, {})[tokens] = row
    return good


def parse_table(
    text: str, family: str, family_of: Callable[[str], str], checks: Mapping[str, Check]
) -> tuple[Tables, list[str]]:
    """The rows of a file that can run, and what was refused.

    Raises:
        ValueError: it is not JSON, not such a table, or of another device family; says which.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from error
    if not isinstance(document, dict) or not {"shapes", "hopper"} & set(document):
        raise ValueError("it is no table of moesaic (an object with shapes or hopper)")
    device = document.get("device")
    if not isinstance(device, str) or family_of(device) != family:
        raise ValueError(f"it was measured on {device!r}, not on a device of family {family!r}")
    problems: list[str] = []
    found = {
        name: _section(document.get(name, {}), name, check, problems)
        for name, check in checks.items()
    }
    return Tables(found["shapes"], found["hopper"]), problems


def read_table(
    path: Path, family: str, family_of: Callable[[str], str], checks: Mapping[str, Check]
) -> Tables:
    """The rows of the file at `path` that can run; a warning for what is refused, whole or in part.

    No file, no rows.
    """
    remedy = f"delete it or run `moesaic tune` with another --out: {path}"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return NONE
    except (OSError, UnicodeDecodeError) as error:
        log.warning("table of tile choices ignored, it cannot be read (%s); %s", error, remedy)
        return NONE
    try:
        tables, problems = parse_table(text, family, family_of, checks)
    except ValueError as error:
        log.warning("table of tile choices ignored, %s; %s", error, remedy)
        return NONE
    if problems:
        told = "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else "")
        log.warning("%d rows of the table of tile choices ignored: %s; %s", len(problems), told,
                    remedy)  # fmt: skip
    return tables
