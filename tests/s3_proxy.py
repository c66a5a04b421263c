"""A proxy in front of the S3 server that lets some requests fail, drawn from a seed, and counts what goes through."""

from __future__ import annotations

import contextlib
import http.client
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"


class Proxy(ThreadingHTTPServer):
    """Forwards to `target` (port on 127.0.0.1); of the requests the share `failing` gets a 503, or its connection is
    cut before or after the server did what was asked."""

    daemon_threads = True

    def __init__(self, target: int, failing: float = 0.0, seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.failing, self.random = target, failing, random.Random(seed)
        self.requests = self.failures = self.bytes_sent = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fate(self) -> str:
        with self.lock:
            self.requests += 1
            failed = self.random.random() < self.failing
            self.failures += failed
            return self.random.choice(["503", "before", "after"]) if failed else "forward"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"
    timeout = 10  # an idle connection is closed

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing."""

    def forward(self) -> None:
        body = self._body()
        fate = self.server.fate()
        if fate == "503":
            self._answer(503, [("Content-Type", "application/xml")], SLOW_DOWN)
            return
        if fate != "before":
            upstream = http.client.HTTPConnection("127.0.0.1", self.server.target, timeout=60)
            try:
                upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                        upstream.putheader(name, value)
                if body or self.command in ("PUT", "POST"):
                    upstream.putheader("Content-Length", str(len(body)))
                upstream.endheaders(body)
                answer = upstream.getresponse()
                content = answer.read()
            except OSError:
                fate = "after"  # the server itself is away
            finally:
                upstream.close()
        if fate != "forward":
            self.close_connection = True
            return
        kept = [item for item in answer.getheaders() if item[0].lower() not in ("transfer-encoding", "connection")]
        self._answer(answer.status, kept, content)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD" and status not in (204, 304):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        with self.server.lock:
            self.server.bytes_sent += len(content)


@contextlib.contextmanager
def proxied(target: int, failing: float = 0.0, seed: int = 0) -> Iterator[Proxy]:
    """A proxy that runs in a thread of this process."""
    proxy = Proxy(target, failing, seed)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        thread.join()
        proxy.server_close()
