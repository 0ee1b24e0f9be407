"""A partner of the site: an HTTP server for the recipes of the documentation to call."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Partner:
    """Answers every POST, and keeps what it was sent, until it is closed.

    Attributes:
        url: Its address.
        posts: The JSON of each request, and its headers, in their order.
        statuses: What it answers to the next requests; 200 after that.
        answer: The JSON of its answers.
    """

    def __init__(self, statuses: list[int] | None = None, answer: Any = None) -> None:
        self.posts: list[tuple[Any, dict[str, str]]] = []
        self.statuses = statuses or []
        self.answer = answer
        partner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                partner.posts.append((json.loads(body), dict(self.headers)))
                self.send_response(partner.statuses.pop(0) if partner.statuses else 200)
                self.end_headers()
                self.wfile.write(json.dumps(partner.answer).encode())

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the name is the base class's
                """Print nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def close(self) -> None:
        """End the server and its thread."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
