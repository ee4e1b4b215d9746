"""A Prometheus endpoint of a watched job: `serve(profiler)`, then scrape `/metrics`.

The server runs on a thread of its own, and a scrape polls the profiler: no other thread is needed.
Series of single experts are opt-in, for a large model has thousands of them. Whatever fails is
counted in `moesaic_profiler_failures_total`; the layers notice nothing.

    with serve(profiler, port=9464, per_expert=True) as server:
        print(server.url)
"""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from ..runtime.profiler import Profiler
from .metrics import Gauges, Metrics


class Server:
    """A running endpoint; `close` ends it."""

    def __init__(self, http: ThreadingHTTPServer) -> None:
        self._http = http
        host, port = http.server_address[:2]
        self.url = f"http://{host!s}:{port}/metrics"
        self._thread = threading.Thread(target=http.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer no more and free the port."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def serve(
    profiler: Profiler,
    *,
    port: int = 9464,
    host: str = "127.0.0.1",
    per_expert: bool = False,
    gauges: Gauges | None = None,
) -> Server:
    """Serve the metrics of a profiler over HTTP, from a thread of its own; port 0 takes a free one.

    Raises:
        ImportError: prometheus-client is missing.
        OSError: the port is taken.
    """
    try:
        from prometheus_client import CollectorRegistry, generate_latest
    except ImportError as error:
        raise ImportError(
            "the Prometheus endpoint needs prometheus-client; pip install 'moesaic[monitoring]'"
        ) from error
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Metrics(profiler, per_expert=per_expert, gauges=gauges))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.split("?")[0] != "/metrics":
                self.send_error(404, "see /metrics")
                return
            try:
                body = generate_latest(registry)
            except Exception as error:
                profiler.failed("prometheus", error)
                self.send_error(500, "the profiler could not be read; its log says why")
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Scrapes are no news."""

    return Server(ThreadingHTTPServer((host, port), Handler))
