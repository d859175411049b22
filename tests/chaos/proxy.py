"""A proxy between a run and its S3 server that loses, delays, refuses and mangles what it is told.

It listens on 127.0.0.1 in threads of the test's process. Requests go on with the headers that they
came with, so signatures stay right.
"""

from __future__ import annotations

import http.client
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True, slots=True)
class Answer:
    """A made-up answer."""

    status: int
    code: str

    @property
    def body(self) -> bytes:
        """As S3 says it."""
        return f"<Error><Code>{self.code}</Code><Message>no</Message></Error>".encode()


SLOW_DOWN = Answer(503, "SlowDown")
EXPIRED = Answer(403, "ExpiredToken")


@dataclass
class Proxy:
    """What it does with requests; all of it may be changed while it runs.

    ``refuse`` gives an answer instead of the server's, or None. ``lose`` says whether the answer
    to a request is dropped after the server has given it. ``cut`` says after how many bytes of an
    answer's body the connection is reset. ``hold`` says whether a put is kept back: its connection
    ends, and :meth:`release` sends it to the server later.
    """

    target: str
    refuse: Callable[[str, str], Answer | None] = lambda method, path: None
    lose: Callable[[str, str], bool] = lambda method, path: False
    cut: Callable[[str, str], int | None] = lambda method, path: None
    hold: Callable[[str, str], bool] = lambda method, path: False
    drop_header: str = ""
    is_down: bool = False
    requests: list[tuple[str, str]] = field(default_factory=list)
    held: list[Callable[[], int]] = field(default_factory=list)
    endpoint_url: str = ""

    def count(self, pattern: str, method: str = "") -> int:
        """How many requests there were for such a path."""
        return sum(
            1
            for verb, path in list(self.requests)
            if re.search(pattern, path) and (not method or verb == method)
        )

    def release(self) -> list[int]:
        """Send to the server what was held; its answers."""
        held, self.held = self.held, []
        return [send() for send in held]


def first(times: int, pattern: str, method: str = "PUT") -> Callable[[str, str], bool]:
    """True for so many requests of a method for such a path, then never again."""
    lock = threading.Lock()
    left = [times]

    def wanted(verb: str, path: str) -> bool:
        if verb != method or not re.search(pattern, path):
            return False
        with lock:
            left[0] -= 1
            return left[0] >= 0

    return wanted


@contextmanager
def proxied(target: str) -> Iterator[Proxy]:
    """A proxy in front of the server at ``target``."""
    proxy = Proxy(target.removeprefix("http://"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(proxy))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    proxy.endpoint_url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # answers Expect: 100-continue, which S3 clients send

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            method, path = self.command, self.path
            proxy.requests.append((method, path))
            if proxy.is_down:
                self.reset()
                return
            refusal = proxy.refuse(method, path)
            if refusal is not None:
                self.give(refusal.status, [("Content-Type", "application/xml")], refusal.body)
                return
            headers = {
                name: value
                for name, value in self.headers.items()
                if name.lower() not in {"connection", "expect", proxy.drop_header.lower()}
            }

            def send() -> tuple[int, list[tuple[str, str]], bytes]:
                connection = http.client.HTTPConnection(proxy.target, timeout=60)
                try:
                    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
                    for name, value in headers.items():
                        connection.putheader(name, value)
                    connection.endheaders(body or None)
                    answer = connection.getresponse()
                    return answer.status, answer.getheaders(), answer.read()
                finally:
                    connection.close()

            if proxy.hold(method, path):
                proxy.held.append(lambda: send()[0])
                self.reset()
                return
            try:
                status, found, data = send()
            except OSError:
                self.reset()
                return
            if proxy.lose(method, path):
                self.reset()
                return
            self.give(status, found, data, proxy.cut(method, path))

        def give(
            self, status: int, headers: list[tuple[str, str]], data: bytes, cut: int | None = None
        ) -> None:
            self.send_response_only(status)
            length = str(len(data))
            for name, value in headers:
                match name.lower():
                    case "connection" | "transfer-encoding" | "keep-alive":
                        continue
                    case "content-length":
                        length = value  # of a HEAD it is that of the object
                    case _:
                        self.send_header(name, value)
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command == "HEAD":
                return
            if cut is not None and cut < len(data):
                self.wfile.write(data[:cut])
                self.reset()
                return
            self.wfile.write(data)

        def reset(self) -> None:
            """End the connection without a word."""
            self.close_connection = True
            self.wfile.flush()
            self.connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00"
            )
            self.connection.close()

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = forward

        def log_message(self, *_: object) -> None:
            pass

        def handle(self) -> None:
            # A connection that we reset, or that the client left, is nothing to print.
            with suppress(OSError, ValueError):
                super().handle()

        def finish(self) -> None:
            with suppress(OSError, ValueError):
                super().finish()

    return Handler
