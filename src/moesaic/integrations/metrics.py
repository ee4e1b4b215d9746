"""The state of a profiler as metric families of prometheus-client: what `/metrics` shows.

`assets/grafana.json` of this package is a Grafana dashboard for these names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..runtime.counters import ROUTED, ROWS, TILES
from ..runtime.profiler import Profiler

Gauges = Mapping[str, Callable[[], float]]


class Metrics:
    """The state of a profiler as metric families; a collector of prometheus-client.

    Args:
        per_expert: also a series for each expert.
        gauges: further gauges by name (`moesaic_` is put before it), read at every scrape; one that
            raises, such as a counter of a GPU that is gone, is left out and counted.
    """

    def __init__(
        self, profiler: Profiler, *, per_expert: bool = False, gauges: Gauges | None = None
    ) -> None:
        self.profiler, self.per_expert, self.gauges = profiler, per_expert, dict(gauges or {})

    def collect(self) -> Iterator[Any]:
        """The families, after a poll."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        p = self.profiler
        p.poll()
        last, seen = p.last, p.observed
        yield CounterMetricFamily("moesaic_steps", "Steps ended.", value=seen.steps)
        yield CounterMetricFamily("moesaic_step_seconds", "Time of the steps.", value=seen.seconds)
        tokens_per_s = last.tokens_per_s if last else 0.0
        yield GaugeMetricFamily("moesaic_tokens_per_second", "Tokens a second.", tokens_per_s)
        yield from self._totals()
        yield from self._states()
        if self.per_expert:
            yield from self._experts()
        yield CounterMetricFamily(
            "moesaic_merged_samples", "Samples merged because nobody read.", value=p.ring.merged
        )
        for name, read in self.gauges.items():
            try:
                yield GaugeMetricFamily(f"moesaic_{name}", name, read())
            except Exception as error:
                p.failed(name, error)
        failures = CounterMetricFamily("moesaic_profiler_failures", "By part.", labels=["part"])
        for part, number in tuple(p.failures.items()):
            failures.add_metric([part], number)
        yield failures

    def _totals(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily

        p = self.profiler
        lines = (("routed", ROUTED, "Choices of the router."), ("rows", ROWS, "Rows computed."))
        for name, line, text in (*lines, ("tiles", TILES, "Tiles of the task map.")):
            family = CounterMetricFamily(f"moesaic_{name}", text, labels=["layer"])
            for info, total in zip(p.layers, p.totals, strict=True):
                family.add_metric([info.name], int(total[line].sum()))
            yield family
        tokens = CounterMetricFamily("moesaic_tokens", "Tokens of the layer.", labels=["layer"])
        drifts = CounterMetricFamily("moesaic_drifts", "Alarms of drift.", labels=["layer"])
        for info, total, state in zip(p.layers, p.totals, p.observed.states, strict=True):
            rows = max(int(total[ROWS].sum()), int(total[ROUTED].sum()))
            tokens.add_metric([info.name], rows // info.top_k)
            drifts.add_metric([info.name], state.drifts)
        yield from (tokens, drifts)

    def _states(self) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily

        last = self.profiler.last
        families: dict[str, Any] = {
            name: GaugeMetricFamily(f"moesaic_{name}", text, labels=["layer"])
            for name, text in (
                ("balancedness", "Mean over maximum of the experts' rows, last poll."),
                ("hot_experts", "Experts that are hot."),
                ("cold_experts", "Experts that are cold."),
            )
        }
        for layer in last.layers if last else ():
            families["balancedness"].add_metric([layer.name], layer.balancedness)
            families["hot_experts"].add_metric([layer.name], len(layer.hot))
            families["cold_experts"].add_metric([layer.name], len(layer.cold))
        yield from families.values()

    def _experts(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        p, labels = self.profiler, ["layer", "expert"]
        rows = CounterMetricFamily("moesaic_expert_rows", "Rows computed.", labels=labels)
        load = GaugeMetricFamily("moesaic_expert_load", "Smoothed rows a step.", labels=labels)
        for info, total, state in zip(p.layers, p.totals, p.observed.states, strict=True):
            line = total[ROWS] if total[ROWS].any() else total[ROUTED]
            for expert, (n, x) in enumerate(zip(line.tolist(), state.load_E.tolist(), strict=True)):
                rows.add_metric([info.name, str(expert)], n)
                load.add_metric([info.name, str(expert)], x)
        yield from (rows, load)
