"""A server on this machine that behaves as well, or as badly, as a test wants; and rows of the table of weights."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from dataclasses import dataclass, field

import numpy as np
import pytest

import stfm as sf
from stfm import _download
from stfm.weights.registry import WEIGHTS, WeightsSpec

CONTENT = np.random.default_rng(0).bytes(200_000)


@dataclass
class Home:
    """What the server has, how it behaves, and what it was asked."""

    content: bytes = CONTENT
    ranges: bool = True
    etag: str = '"one"'
    status: int = 200
    extra: dict[str, str] = field(default_factory=dict)
    cut_at: list[int] = field(default_factory=list)  # a request each: bytes after which the connection is closed
    hang_at: list[int] = field(default_factory=list)  # a request each: bytes after which nothing comes for a while
    wrong_range: bool = False
    asked: list[dict[str, str]] = field(default_factory=list)
    go_on: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    @property
    def gets(self) -> list[dict[str, str]]:
        return [request for request in self.asked if request["method"] == "GET"]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    home: Home

    def log_message(self, *_arguments):
        """Say nothing."""

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        home = self.home
        home.asked.append(
            {"method": self.command, "path": self.path, **{k.lower(): v for k, v in self.headers.items()}}
        )
        cut = home.cut_at.pop(0) if body and home.cut_at else None
        hang = home.hang_at.pop(0) if body and home.hang_at else None
        status, start = home.status, 0
        asked = self.headers.get("Range")
        if status == 200 and asked and home.ranges and self.headers.get("If-Range", home.etag) == home.etag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            status = 206 if start < len(home.content) else 416
        sent = home.content[start:] if status in (200, 206) else b""
        self.send_response(status)
        if home.etag:
            self.send_header("ETag", home.etag)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start + home.wrong_range}-{len(home.content) - 1}/*")
        if status == 416:
            self.send_header("Content-Range", f"bytes */{len(home.content)}")
        for name, value in home.extra.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        if not body:
            return
        if hang is not None:
            self.wfile.write(sent[:hang])
            self.wfile.flush()
            home.go_on.wait(10)
            sent = sent[hang:]
        try:
            self.wfile.write(sent[:cut])
        except OSError:  # the other side is gone
            cut = 0
        self.close_connection = cut is not None


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_arguments):
        """Say nothing: a client that is killed is part of the test."""


@pytest.fixture
def home():
    """Serve one file under any path."""
    home = Home()
    handler = type("Handler", (_Handler,), {"home": home})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    home.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield home
    home.go_on.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Give an empty cache of its own, with the network allowed, little patience and small steps."""
    monkeypatch.setattr(_download, "PAUSE", 0.01)
    monkeypatch.setattr(_download, "_CHUNK", 4096)
    with sf.settings.override(cache_dir=tmp_path / "cache", offline=False, mirror=None):
        yield tmp_path / "cache"


@pytest.fixture
def sha256():
    return hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def row(monkeypatch):
    """Add rows to the table of weights for one test."""
    WEIGHTS.names()  # fills the table

    def add(name: str, **fields) -> WeightsSpec:
        spec = WeightsSpec(name, "a test", **fields)
        monkeypatch.setitem(WEIGHTS._specs, name, spec)
        return spec

    return add


@pytest.fixture
def script(tmp_path):
    """Return the code of a process that locates one address, in small steps."""

    def code(url: str, sha256: str | None, cache) -> str:
        return (
            "import stfm, stfm._download as d, sys\n"
            "d._CHUNK = 1024\n"
            f"stfm.settings.cache_dir = {json.dumps(str(cache))}\n"
            "stfm.settings.offline = False\n"
            f"path = stfm.weights.locate({url!r}, sha256={sha256!r})\n"
            "sys.stdout.write(str(path))\n"
        )

    return code
