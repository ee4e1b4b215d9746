"""Suite overlap: the whole path on a CPU with a driver made of sets; targets from lines."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "hardware"))
from green_double import FakeDriver

from moesaic.bench import overlaps
from moesaic.bench.overlaps import IN_TURN, SIZES, STREAMS, plans_of, way_of
from moesaic.bench.suite import Cell, Context
from moesaic.bench.suites import overlap
from moesaic.bench.suites.overlap import CHOSEN, SUITE, cells
from moesaic.hardware import green
from moesaic.runtime.plan import Curve, MachineSlices

MACHINE = MachineSlices(total_sms=132, slices=16)
ALL = (*SIZES, 132)


def curves(exchange_ms: float, experts_ms: float = 1.0) -> dict[str, Curve]:
    """An exchange that needs 24 SMs, experts that need all."""
    there = [exchange_ms * max(1.0, 24 / n) for n in ALL]
    rest = [132 - n for n in reversed(SIZES)] + [132]
    return {
        "exchange": Curve(work="exchange", sms=ALL, ms=tuple(there), load=exchange_ms),
        "experts": Curve(
            work="experts", sms=tuple(rest), ms=tuple(experts_ms * 132 / n for n in rest),
            load=experts_ms,
        ),
    }  # fmt: skip


def test_policies_hide_an_exchange_worth_hiding() -> None:
    found = {name: way_of(plan) for name, plan in plans_of(curves(0.5), MACHINE).items()}
    assert found["none"] == IN_TURN and found["adaptive"] == found["static"] == "split@16"
    assert way_of(plans_of(curves(0.02), MACHINE)["adaptive"]) == IN_TURN


@pytest.fixture
def run_on_cpu(monkeypatch: pytest.MonkeyPatch):
    """One rank, times from a clock that only counts; gives the lines of a tiny cell."""
    ticks = iter(range(1, 10**6))

    def capture(team, calls):
        out, *_ = [call() for call in calls]
        return SimpleNamespace(
            calls=len(calls), first_output=out, graph=SimpleNamespace(replay=lambda: None)
        )

    monkeypatch.setattr(green.GreenSlice, "stream", property(lambda part: part.handle))
    monkeypatch.setattr(overlaps, "GreenDevice", partial(green.GreenDevice, driver=FakeDriver()))
    monkeypatch.setattr(overlaps, "follow_plan", lambda layer, plan: None)
    monkeypatch.setattr(overlaps, "capture_together", capture)
    monkeypatch.setattr(overlaps, "replay_sampler", lambda team, held: lambda: float(next(ticks)))
    kept: list[Any] = []
    monkeypatch.setattr(Context, "record", lambda self, lines: kept.extend(lines))

    def run() -> list[Any]:
        context = Context(torch.device("cpu"), None, 60.0)  # type: ignore[arg-type]
        overlap.run([Cell("tiny", 6, dtype="float32", clock="overlap")], context)
        return kept

    return run


def test_every_way_is_measured_and_has_the_bits_of_the_batches_in_turn(run_on_cpu) -> None:
    lines = run_on_cpu()
    assert not any(x.get("error") or x.get("wrong") for x in lines), lines[-1]
    ways = {x["impl"] for x in lines if x["clock"] == "overlap"}
    assert {IN_TURN, STREAMS, CHOSEN, *(f"split@{n}" for n in SIZES)} <= ways
    assert len([x for x in lines if x["clock"] == "curve"]) == 2 * (len(SIZES) + 1)


def test_a_wrong_bit_shows(run_on_cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    right = overlaps.beside
    monkeypatch.setattr(
        overlaps, "beside", lambda pair, seats: tuple(x + 1e-3 for x in right(pair, seats))
    )
    assert {x["impl"] for x in run_on_cpu() if x.get("wrong")} >= {STREAMS, "split@8"}


def test_targets_and_page_come_from_the_lines(tmp_path: Path) -> None:
    """Curves promise more than a split keeps: at first it is chosen, told the times it is not."""
    cell = cells()[0]
    stamped = dict.fromkeys(("device", "torch", "triton", "commit", "date"), "x")
    stamped |= {"suite": "overlap", "model": cell.model, "tokens": cell.tokens}

    def line(impl: str, ms: float, **more: Any) -> dict[str, Any]:
        told = {"clock": "overlap", "impl": impl, "ms": ms, "over_in_turn": 3.0 / ms}
        return stamped | told | {"routing": "uniform"} | more

    lines = overlaps.curve_lines(stamped, curves(0.5))
    lines += [line(IN_TURN, 3.0), line(STREAMS, 2.9)]
    lines += [line(f"split@{n}", 6.0, sms=n, other_sms=132 - n) for n in SIZES]
    lines.append(line(CHOSEN, 6.0, reason="because"))
    first, settled, steps, *_, bad = SUITE.summarize(lines)
    assert first.value == pytest.approx(2.9 / 6.0, rel=1e-3) and not first.met
    assert settled.value == pytest.approx(2.9 / 3.0, rel=1e-3) and settled.met and bad.met
    assert 0.9 < (steps.value or 0) < 1.0
    kept = [x | {"ms": 2.4} if x["impl"] in ("split@16", CHOSEN) else x for x in lines]
    assert overlap.fed_back(kept, cell) == ["split@16"] * 32
    assert not SUITE.summarize([line(CHOSEN, 1.0, wrong=True)])[-1].met
    assert SUITE.section is not None
    text, _ = SUITE.section(lines, SUITE.summarize(lines), tmp_path, "h200-x2", "figures")
    assert "because" in text and "split@24" in text and f"{CHOSEN}, told" in text
