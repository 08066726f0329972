"""Servers on loopback that tests read shards from, with faults on demand.

Importable as `tests.remote_server`.
"""

from __future__ import annotations

import hashlib
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SLOW_S = 0.3


class Faults:
    """What goes wrong with the requests that are made from now on."""

    def __init__(self) -> None:
        self.plan: list[str] = []
        """Of the next range requests, one each: `503`, `cut`, `short`, `slow`; empty is none."""
        self.always = ""
        """Of all range requests."""
        self.seen: Counter[str] = Counter()
        """Requests by method, with `RANGE` for those of a range."""
        self.bytes = 0
        """Bytes that were sent."""
        self._lock = threading.Lock()

    def next(self) -> str:
        """The next range request's fault."""
        with self._lock:
            self.seen["RANGE"] += 1
            return self.plan.pop(0) if self.plan else self.always


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path
    faults: Faults
    tagged = True

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.faults.seen["HEAD"] += 1
        self._answer(body=False)

    def do_GET(self) -> None:
        self.faults.seen["GET"] += 1
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.root / self.path.lstrip("/")
        if not path.is_file():
            self._head(404, {"Content-Length": "0"})
            return
        data = path.read_bytes()
        etag = f'"{hashlib.md5(data).hexdigest()}"'
        if self.headers.get("If-Match", etag) != etag:
            self._head(412, {"Content-Length": "0"})
            return
        headers = {"Accept-Ranges": "bytes"} | ({"ETag": etag} if self.tagged else {})
        fault, status = "", 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            fault, status = self.faults.next(), 206
            first, last = int(found[1]), min(int(found[2]), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data = data[first : last + 1]
        if fault == "503":
            self._head(503, {"Content-Length": "0"})
            return
        if fault == "slow":
            time.sleep(SLOW_S)
        if fault == "short":
            data = data[: len(data) // 2]
        self._head(status, headers | {"Content-Length": str(len(data))})
        if not body:
            return
        if fault == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return
        self.faults.bytes += len(data)
        self.wfile.write(data)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


@contextmanager
def served(root: Path, *, tagged: bool = True) -> Iterator[tuple[str, Faults]]:
    """Serve a folder with ranges and entity tags; yields its address, and what goes wrong."""
    faults = Faults()
    handler = type("Handler", (_Handler,), {"root": root, "faults": faults, "tagged": tagged})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", faults
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def s3_served(monkeypatch: Any) -> Iterator[tuple[str, Any, Faults]]:
    """Serve S3 by moto; yields a bucket's address, a boto3 client, and what goes wrong.

    Credentials and the service's address stand in the environment, as they do for users.
    """
    import boto3  # and flask-cors, which moto's server imports
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    faults = Faults()
    served = DomainDispatcherApplication(create_backend_app)

    def application(environ: Any, start: Any) -> Any:
        fault = ""
        if environ["REQUEST_METHOD"] == "GET" and "HTTP_RANGE" in environ:
            fault = faults.next()
        if fault == "503":
            start("503 Slow Down", [("Content-Length", "0")])
            return []
        if fault == "slow":
            time.sleep(SLOW_S)
        body = served(environ, start)
        return [b"".join(body)[:100]] if fault == "cut" else body

    server = make_server("127.0.0.1", 0, application, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names = {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test", "DEFAULT_REGION": "us-east-1"}
    names["ENDPOINT_URL"] = f"http://127.0.0.1:{server.server_port}"
    for name, value in names.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="shards")
    try:
        yield "s3://shards", client, faults
    finally:
        server.shutdown()
