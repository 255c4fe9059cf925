"""A server on this machine that imitates Google Drive, archives to serve, and a guard: nothing else is contacted."""

import io
import os
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from zoo import transfer
from zoo.manifest import Own, Published

HERE = "127.0.0.1"
ETAG = '"the-only-version"'

# What Drive shows in front of a large file, and when too many people asked for one (shortened to what matters).
CONFIRM = """<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body>\
<p class="uc-warning-subcaption">resnet18.tar.gz (86M) is too large for Google to scan for viruses.</p>\
<form id="download-form" action="{action}" method="get"><input type="submit" value="Download anyway"/>\
<input type="hidden" name="id" value="{id}"><input type="hidden" name="export" value="download">\
<input type="hidden" name="confirm" value="t"></form></body></html>"""
QUOTA = """<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head><body>
<p class="uc-error-caption">Sorry, you can&#39;t view or download this file at this time.</p>
<p class="uc-error-subcaption">Too many users have viewed or downloaded this file recently.</p></body></html>"""
PAGE = "<!doctype html><html><head><title>Log in</title></head><body>Welcome to the hotel's network</body></html>"


class Handler(BaseHTTPRequestHandler):
    """One request; what it answers is up to the server's list of answers."""

    server: "FakeDrive"
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.close_connection = True
        with self.server.lock:
            self.server.requests.append((self.path, self.headers.get("Range")))
            answer = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        answer(self)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def query(self, key: str) -> str | None:
        return parse_qs(urlsplit(self.path).query).get(key, [None])[0]

    def head(self, status: int, length: int | None, kind: str = "application/octet-stream", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Connection", "close")
        self.end_headers()

    def page(self, text: str, status: int = 200) -> None:
        self.head(status, len(text.encode()), "text/html; charset=utf-8")
        self.wfile.write(text.encode())


Answer = Callable[[Handler], None]


class FakeDrive(ThreadingHTTPServer):
    """content: the file.  answers: one for each request, the last for all that follow.  requests: (path, Range)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__((HERE, 0), Handler)
        self.lock = threading.Lock()
        self.content = b""
        self.answers: list[Answer] = [whole]
        self.requests: list[tuple[str, str | None]] = []

    @property
    def endpoint(self) -> str:
        return f"http://{HERE}:{self.server_address[1]}/uc"

    @property
    def ranges(self) -> list[str | None]:
        return [asked for _, asked in self.requests]


def _asked(handler: Handler) -> int | None:
    """First byte that a request asks for, None for the whole file."""
    text = handler.headers.get("Range")
    if text is None or handler.headers.get("If-Range", ETAG) != ETAG:
        return None
    return int(text.removeprefix("bytes=").removesuffix("-"))


def _send(handler: Handler, share: float) -> None:
    """The file, or the part that was asked for, of which only a share arrives."""
    content, start = handler.server.content, _asked(handler)
    if start is None:
        start = 0
        handler.head(200, len(content), ETag=ETAG)
    else:
        part = f"bytes {start}-{len(content) - 1}/{len(content)}"
        handler.head(206, len(content) - start, ETag=ETAG, Content_Range=part)
    body = content[start:]
    handler.wfile.write(body[: int(len(body) * share)])


def whole(handler: Handler) -> None:
    _send(handler, 1)


def cut(handler: Handler) -> None:
    _send(handler, 0.5)


def without_ranges(handler: Handler) -> None:
    content = handler.server.content
    handler.head(200, len(content))
    handler.wfile.write(content)


def cut_without_ranges(handler: Handler) -> None:
    content = handler.server.content
    handler.head(200, len(content))
    handler.wfile.write(content[: len(content) // 2])


def too_long(handler: Handler) -> None:
    """Announces ten bytes more than there are."""
    handler.head(200, len(handler.server.content) + 10)
    handler.wfile.write(handler.server.content)


def too_short(handler: Handler) -> None:
    """Announces half of what there is."""
    handler.head(200, len(handler.server.content) // 2)
    handler.wfile.write(handler.server.content)


def without_length(handler: Handler) -> None:
    handler.head(200, None)
    handler.wfile.write(handler.server.content)


def confirm(handler: Handler) -> None:
    if handler.query("confirm") == "t":
        whole(handler)
    else:
        handler.page(CONFIRM.format(action="/download", id=handler.query("id")))


def quota(handler: Handler) -> None:
    handler.page(QUOTA)


def html(handler: Handler) -> None:
    handler.page(PAGE)


def disguised_html(handler: Handler) -> None:
    handler.head(200, len(PAGE))
    handler.wfile.write(PAGE.encode())


def leading_away(handler: Handler) -> None:
    handler.page(CONFIRM.format(action="https://example.org/download", id="x"))


def redirecting_away(handler: Handler) -> None:
    handler.head(302, 0, Location="http://example.org/file")


def status(code: int, **headers: str) -> Answer:
    return lambda handler: handler.head(code, 0, **headers)


ANSWERS: dict[str, Answer] = {
    answer.__name__: answer
    for answer in (
        *(whole, cut, without_ranges, cut_without_ranges, too_long, too_short, without_length),
        *(confirm, quota, html, disguised_html, leading_away, redirecting_away),
    )
}


@pytest.fixture
def answer() -> Callable[..., Answer]:
    """answer("cut"), answer(404): what the server does with one request."""
    return lambda name, **headers: status(name, **headers) if isinstance(name, int) else ANSWERS[name]


@pytest.fixture
def drive_server() -> Iterator[FakeDrive]:
    with FakeDrive() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def only_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections to other hosts fail the test; no proxy and no cache of the user is used; retries do not wait."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def guarded(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX or address[0] == HERE, f"a test contacts {address}"
        connect(self, address)

    def guarded_look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        assert host == HERE, f"a test looks up {host}"
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_look_up)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("HAWQ_ZOO_DIR", raising=False)
    monkeypatch.setattr(transfer, "BACK_OFF", (0.0,) * len(transfer.BACK_OFF))


@pytest.fixture
def entry() -> Published:
    """A row as in the manifest, of a file that only the server of the test has."""
    return Published("net_uniform8", "resnet18", "uniform8", "W8A8", 1.0, 2.0, 3.0, 70.0, drive_id="0123456789abcdef")


Member = tuple[str, bytes | str | None]


@pytest.fixture
def tar_gz() -> Callable[..., bytes]:
    return make_archive


def make_archive(*members: tarfile.TarInfo | tuple[str, bytes], mode: str = "w:gz") -> bytes:
    """An archive of files given as (name, content), or of anything given as TarInfo."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


@pytest.fixture(scope="session")
def weights() -> bytes:
    """Content of a checkpoint; to the store they are bytes, which do not compress."""
    return os.urandom(300_000)


@pytest.fixture
def good(weights: bytes) -> bytes:
    """An archive as the zoo has them: a folder with the checkpoint and what else its author left in it."""
    return make_archive(
        ("net/log.log", b"epoch 1"), ("net/quantized_checkpoint.pth.tar", b"1"), ("net/checkpoint.pth.tar", weights)
    )


@pytest.fixture
def zoo_dir(tmp_path: Path) -> Path:
    """A cache folder that does not exist yet."""
    return tmp_path / "cache" / "zoo"


@pytest.fixture
def own_entry() -> Own:
    """An entry of our own whose file does not exist."""
    return Own(
        name="own_net",
        arch="digits",
        scheme="uniform8",
        file="net.safetensors",
        sha256="0" * 64,
        bytes=5,
        size_mib=0.25,
        bops_g=0.5,
        top1=97.5,
        images=360,
        trained_on="digits of scikit-learn",
        recipe="own_net, short",
        seed=0,
        control_top1=98.0,
        machine="a CPU, 1 thread",
        versions={"torch": "2.11.0"},
        commit="abc1234",
        command="python -m zoo train own_net",
        log="net.log",
    )
