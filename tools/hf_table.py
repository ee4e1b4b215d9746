"""Run every check of `hf_checks` on every family and write the table of docs/transformers.md.

    python tools/hf_table.py [--families mixtral gpt_oss] [--page docs/transformers.md] [--check]

Each result goes to benchmarks/transformers-families.json at once; `--resume` leaves out what
stands there already. The page gets the table between its two marks. `--check` runs nothing and
compares the page with the file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "transformers-families.json"
BEGIN, END = "<!-- families -->\n", "<!-- end of families -->"
Results = dict[str, dict[str, str]]


def short(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"FAILED {type(error).__name__}: {text}"[:160].replace("|", "/")


def run(family: str) -> dict[str, str]:
    """What every check says of a family."""
    from hf_checks import CHECKS
    from hf_families import layout, tiny_model

    try:
        found = {"layout": layout(tiny_model(family))}
    except Exception as error:
        return {"layout": f"cannot be built: {short(error)}"}
    for name, check in CHECKS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found[name] = check(family)
            except Exception as error:
                found[name] = short(error)
    return found


def table(results: Results) -> str:
    """The table in Markdown."""
    columns = list(dict.fromkeys(name for row in results.values() for name in row))
    lines = ["| family | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for family, row in sorted(results.items()):
        lines.append(f"| {family} | " + " | ".join(row.get(c, "") for c in columns) + " |")
    return "\n".join(lines) + "\n"


def filled(page: str, results: Results) -> str:
    """The page with the table between its marks.

    Raises:
        ValueError: the page has no marks.
    """
    head, mark, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"the page needs the marks {BEGIN.strip()} and {END}")
    return head + mark + table(results) + end + tail


def main(arguments: list[str] | None = None) -> int:
    """Run, write, or check; 1 when the page is stale or a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="*")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "transformers.md")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--check", action="store_true")
    chosen = parser.parse_args(arguments)
    old: Any = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    results: Results = old
    if not chosen.check:
        from hf_families import families
        from transformers import logging

        logging.set_verbosity_error()
        for family in chosen.families or families():
            if chosen.resume and family in results:
                continue
            start = time.perf_counter()
            results[family] = run(family)
            RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", "utf-8")
            print(f"{family} {time.perf_counter() - start:.0f} s {results[family]}", flush=True)
    failed = [f for f, row in results.items() if any(v.startswith("FAILED") for v in row.values())]
    page = chosen.page.read_text("utf-8") if chosen.page.exists() else ""
    new = filled(page, results) if page else page
    if chosen.check:
        print("the page is stale" if page != new else "the page holds what the file holds")
        return int(page != new)
    chosen.page.write_text(new, "utf-8") if page else None
    print(f"{len(results)} families, failed: {failed}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tools"))
    sys.exit(main())
