"""Run every check of `hf_checks` on every family and write the table of docs/transformers.md.

    python tools/hf_table.py [--families mixtral gpt_oss] [--checks LoRA] [--page FILE] [--check]

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
OWN_TESTS = ROOT / "benchmarks" / "transformers-own-tests.json"
BEGIN, END = "<!-- {} -->\n", "<!-- end of {} -->"
Results = dict[str, dict[str, str]]


def short(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"FAILED {type(error).__name__}: {text}"[:160].replace("|", "/")


def run(family: str, checks: list[str] | None = None) -> dict[str, str]:
    """What every check says of a family, or those named."""
    from hf_checks import CHECKS
    from hf_families import layout, tiny_model
    from hf_training import lora

    try:
        found = {"layout": layout(tiny_model(family))}
    except Exception as error:
        return {"layout": f"cannot be built: {short(error)}"}
    for name, check in (CHECKS | {"LoRA": lora}).items():
        if checks is not None and name not in checks:
            continue
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


def own_tests(outcomes: dict[str, dict[str, dict[str, list[str]]]]) -> str:
    """How transformers' generic tests went, with moesaic and with the default, in Markdown."""
    heads = ("family", "passed", "failed", "skipped", "default fails", "only moesaic fails")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for family, both in sorted(outcomes.items()):
        ours, theirs = both["moesaic"], both["default"]
        counts = [str(len(ours[k])) for k in ("passed", "failed", "skipped")]
        only = sorted(set(ours["failed"]) - set(theirs["failed"]))
        words = [", ".join(f"`{n}`" for n in names) or "none" for names in (theirs["failed"], only)]
        lines.append("| " + " | ".join([family, *counts, *words]) + " |")
    return "\n".join(lines) + "\n"


def put(page: str, name: str, text: str) -> str:
    """The page with a text between the marks of a name.

    Raises:
        ValueError: the page has no such marks.
    """
    begin, end = BEGIN.format(name), END.format(name)
    head, mark, rest = page.partition(begin)
    _, found, tail = rest.partition(end)
    if not mark or not found:
        raise ValueError(f"the page needs the marks {begin.strip()} and {end}")
    return head + mark + text + end + tail


def filled(page: str, results: Results) -> str:
    """The page with both tables."""
    page = put(page, "families", table(results))
    if OWN_TESTS.exists():
        page = put(page, "own tests", own_tests(json.loads(OWN_TESTS.read_text("utf-8"))))
    return page


def main(arguments: list[str] | None = None) -> int:
    """Run, write, or check; 1 when the page is stale or a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="*")
    parser.add_argument("--checks", nargs="*", help="columns to make again, others stay")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "transformers.md")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--write", action="store_true", help="run nothing, write the page")
    chosen = parser.parse_args(arguments)
    old: Any = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    results: Results = old
    if not chosen.check and not chosen.write:
        from hf_families import families
        from transformers import logging

        logging.set_verbosity_error()
        for family in chosen.families or families():
            if chosen.resume and family in results:
                continue
            start = time.perf_counter()
            kept = results.get(family, {}) if chosen.checks is not None else {}
            results[family] = kept | run(family, chosen.checks)
            RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", "utf-8")
            print(f"{family} {time.perf_counter() - start:.0f} s {results[family]}", flush=True)
        if chosen.checks is None or "FSDP2" in chosen.checks:
            from hf_training import fsdp2

            for family, words in fsdp2(list(chosen.families or families()), 900.0).items():
                results[family]["FSDP2"] = words
            RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", "utf-8")
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
