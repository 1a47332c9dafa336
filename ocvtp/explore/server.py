"""A page for the browsers of this machine, and of no other.

It listens on the loopback address alone. A page of somebody else's whose name was made to lead to
that address (DNS rebinding) says so in the header `Host`, and is refused.
"""

from __future__ import annotations

import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

ADDRESS = "127.0.0.1"
_NAMES = (ADDRESS, "localhost", "[::1]")
_HTTP = 80  # left out of the header by browsers
_SECONDS = 30.0  # that a request may take to come


class PageServer(ThreadingHTTPServer):
    """Gives one page to those who ask for `/`; who asks before `serve_page` waits for it.

    Args:
        port: 0 for any that is free.

    Raises:
        ValueError: if the port is no port, or is taken.
    """

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        if not 0 <= port <= 65535:
            raise ValueError(f"--serve {port}; pass a port up to 65535, or none for a free one.")
        self.page = b""
        self.policy = ""
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            raise ValueError(
                f"--serve {port}: {ADDRESS}:{port} cannot be listened on ({error.strerror}); pass"
                " another port, or none for a free one."
            ) from error

    def server_bind(self) -> None:
        """Without asking a name server for the name of the address."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = ADDRESS, int(self.server_address[1])

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{ADDRESS}:{self.server_port}/"

    @property
    def hosts(self) -> frozenset[str]:
        """What browsers on this machine may call it."""
        ports = [f":{self.server_port}", *([""] if self.server_port == _HTTP else [])]
        return frozenset(name + port for name in _NAMES for port in ports)

    def serve_page(self, page: str, policy: str) -> None:
        """Give the page to all who ask, until Ctrl-C.

        Args:
            page: HTML. policy: its Content-Security-Policy.
        """
        self.page, self.policy = page.encode(), policy
        try:
            self.serve_forever()
        except KeyboardInterrupt:
            pass

    def handle_error(self, request: Any, client_address: Any) -> None:
        """As of every server; that a browser went away is nothing to tell."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    server_version, sys_version = "ocvtp", ""
    timeout = _SECONDS

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        names = [name.strip().lower() for name in self.headers.get_all("Host", [])]
        if len(names) != 1 or names[0] not in self.server.hosts:
            self._refuse(HTTPStatus.FORBIDDEN, f"this is {self.server.url}, by no other name")
        elif self.path.partition("?")[0] != "/":
            self._refuse(HTTPStatus.NOT_FOUND, f"there is one page, {self.server.url}")
        else:
            self._send(HTTPStatus.OK, "text/html", self.server.page)

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self._send(status, "text/plain", f"{why}\n".encode())

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Content-Security-Policy": f"{self.server.policy}; frame-ancestors 'none'",
            "Cache-Control": "no-store",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: there is nothing to see in it."""
