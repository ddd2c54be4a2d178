"""The metrics port: a small HTTP server in threads of its own, so that a scrape waits for no
request and no request for a scrape."""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

READ_TIMEOUT_S = 10.0


class MetricsServer:
    """Answers `GET /metrics` with what `exposition` returns. Raises OSError where the port is
    taken."""

    def __init__(
        self, host: str, port: int, content_type: str, exposition: Callable[[], bytes]
    ) -> None:
        handler = _handler(content_type, exposition)
        try:
            self._server = ThreadingHTTPServer((host, port), handler)
        except OSError as error:
            raise OSError(f"can't listen on {host}:{port} for metrics: {error.strerror}") from error
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="metrics", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        return self._server.server_port

    def stop(self) -> None:
        """Stop answering scrapes; waits for the loop that does."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _handler(content_type: str, exposition: Callable[[], bytes]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = READ_TIMEOUT_S
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path.partition("?")[0] in ("/metrics", "/"):
                self._send(200, content_type, exposition())
            else:
                self._send(404, "application/json", b'{"error":"want /metrics"}')

        def log_message(self, *_: Any) -> None:
            """Scrapes aren't worth a line each."""

        def _send(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler
