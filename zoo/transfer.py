"""One file over http(s) into a part file: resumed where it broke, retried with growing pauses, its length checked.

A part file has a note beside it (``NAME.json``): the length and the validator (ETag or date) that the server gave, so
that a later process goes on with the same content or starts again.
"""

import contextlib
import http.client
import http.cookiejar
import json
import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from tqdm import tqdm

TIMEOUT = 30.0  # seconds without a byte
BACK_OFF = (1.0, 2.0, 4.0, 8.0)  # seconds before each new try
LONGEST_WAIT = 60.0  # seconds, whatever a server asks for
PROGRESS = 1 << 20  # bytes more than ever before: the count of tries starts again
CHUNK = 1 << 16
PAGE = 1 << 20  # bytes of a page that are read
PAGES = 3  # pages in front of one file
HEADERS = {"User-Agent": "Mozilla/5.0 (compatible; hawq-zoo)", "Accept-Encoding": "identity"}
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
NOT_SATISFIABLE = 416
WORDS = {401: "it needs a login", 403: "access is not allowed", 404: "it is not there", 410: "it is no longer there"}


class Unavailable(Exception):
    """The file cannot be had now; the message says why, without the name of the file."""


class _Broken(Exception):
    """One try failed in a way that the next may not.  wait: seconds that the server asks for."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Source:
    """Where a file is.

    url: http or https.  page: the address for people.  hosts: domains that redirects and pages may lead to besides
    the one of ``url``; empty for any.  confirmed: from a page in front of the file and its address to the address of
    the file itself, None where there are no such pages.
    """

    url: str
    page: str
    hosts: tuple[str, ...] = ()
    confirmed: Callable[[str, str], str] | None = None

    def check(self, url: str) -> None:
        """Raises Unavailable for an address that this source must not lead to: another host, or no longer https."""
        start, found = urlsplit(self.url), urlsplit(url)
        if found.scheme not in ("https", start.scheme):
            raise Unavailable(f"it leads to {found.scheme}://{found.netloc}, which is not https")
        host = found.hostname or ""
        allowed = not self.hosts or any(host == known or host.endswith(f".{known}") for known in self.hosts)
        if not allowed and found.netloc != start.netloc:
            raise Unavailable(f"it leads to {found.netloc}, which is not a host of {start.netloc}")


def transfer(source: Source, part: Path, label: str) -> None:
    """Bring ``part`` to the complete file, from wherever it stands; label: name of the progress bar.

    Raises Unavailable when the server has no such file or does not deliver it in several tries; what arrived stays in
    ``part`` for another call.  Raises OSError when ``part`` cannot be written.
    """
    opener = urllib.request.build_opener(
        _Redirects(source), urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
    )
    state = _Part(part)
    failures, best = 0, state.size()
    while True:
        try:
            _one_try(opener, source, state, label)
            return
        except _Broken as error:
            failures = 1 if state.size() >= best + PROGRESS else failures + 1
            best = max(best, state.size())
            if failures > len(BACK_OFF):
                raise Unavailable(f"{error}, {failures} times in a row") from error
            time.sleep(max(BACK_OFF[failures - 1], min(error.wait, LONGEST_WAIT)))


def discard(part: Path) -> None:
    """Remove a part file and its note."""
    for path in (part, _Part(part).note):
        path.unlink(missing_ok=True)


class _Part:
    """A part file and the note beside it."""

    def __init__(self, path: Path) -> None:
        self.path, self.note = path, path.with_name(path.name + ".json")

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def known(self) -> dict[str, Any]:
        """{"total": bytes or None, "validator": str or None}; empty where nothing can be continued."""
        if self.size() == 0:
            return {}
        try:
            content = json.loads(self.note.read_text())
            total, validator = content["total"], content["validator"]
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return {"total": total if type(total) is int else None, "validator": validator}

    def restart(self, total: int | None, validator: str | None) -> None:
        """Empty the file and note what the server says of the new content."""
        self.path.write_bytes(b"")
        self.note.write_text(json.dumps({"total": total, "validator": validator}))


class _Redirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, source: Source) -> None:
        self.source = source

    def redirect_request(self, req: Any, fp: Any, *rest: Any) -> urllib.request.Request | None:
        """As urllib does, to allowed addresses."""
        try:
            self.source.check(rest[-1])
        except Unavailable:
            fp.close()
            raise
        return super().redirect_request(req, fp, *rest)


def _one_try(opener: urllib.request.OpenerDirector, source: Source, part: _Part, label: str) -> None:
    known = part.known()
    if known and known["total"] == part.size():
        return
    missing = {}
    if known:
        missing["Range"] = f"bytes={part.size()}-"
        if known["validator"]:
            missing["If-Range"] = known["validator"]
    with _answer(opener, source, missing, part) as (response, first):
        total = _begin(response, known, part)
        _copy(response, first, part, total, label)


@contextlib.contextmanager
def _answer(
    opener: urllib.request.OpenerDirector, source: Source, missing: dict[str, str], part: _Part
) -> Iterator[tuple[http.client.HTTPResponse, bytes]]:
    """The response that carries the file, and its first bytes, behind the pages in front of it.

    missing: headers that ask for a part; pages are asked for whole.
    """
    url, headers = source.url, {} if source.confirmed else missing
    for _ in range(PAGES):
        with _opened(opener, url, headers, source, part) as response:
            first = _read(response, CHUNK)
            if not _is_page(response, first):
                if headers == missing:
                    yield response, first
                    return
                headers = missing
                continue
            page = (first + _read(response, PAGE)).decode("utf-8", "replace")
        if source.confirmed is None:
            raise Unavailable("the server answers with a web page instead of the file")
        url, headers = source.confirmed(page, response.url), missing
        source.check(url)
    raise Unavailable("one page leads to the next and none to the file")


def _opened(
    opener: urllib.request.OpenerDirector, url: str, headers: dict[str, str], source: Source, part: _Part
) -> http.client.HTTPResponse:
    try:
        response: http.client.HTTPResponse = opener.open(
            urllib.request.Request(url, headers=headers),
            timeout=TIMEOUT,
        )
        return response
    except urllib.error.HTTPError as error:
        with error:
            raise _refusal(error, source, part) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise Unavailable(f"the certificate of {urlsplit(url).netloc} is not valid") from error
        if isinstance(error.reason, socket.gaierror) and part.size() == 0:
            raise Unavailable(f"the host {urlsplit(url).netloc} cannot be found; is there a network?") from error
        raise _Broken(f"no connection to {urlsplit(url).netloc} ({error.reason})") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(f"the connection broke ({_words(error)})") from error


def _refusal(error: urllib.error.HTTPError, source: Source, part: _Part) -> Exception:
    """What an error status means."""
    if error.code == NOT_SATISFIABLE:
        part.restart(None, None)
        return _Broken("the server does not know the range that is missing")
    if error.code in TRANSIENT:
        return _Broken(f"the server answers with status {error.code}", _retry_after(error))
    if source.confirmed is not None and error.code == 403:
        with contextlib.suppress(OSError, http.client.HTTPException):
            page = error.read(PAGE).decode("utf-8", "replace")
            try:
                source.confirmed(page, source.url)
            except Unavailable as reason:
                return reason
    return Unavailable(
        f"the server answers with status {error.code}, {WORDS.get(error.code, 'which it does not explain')}"
    )


def _retry_after(error: urllib.error.HTTPError) -> float:
    text = error.headers.get("Retry-After", "")
    return float(text) if re.fullmatch(r"\d{1,6}", text) else 0.0


def _read(response: IO[bytes], count: int) -> bytes:
    try:
        return response.read(count)
    except http.client.IncompleteRead as error:
        raise _Broken("the connection broke") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(f"the connection broke ({_words(error)})") from error


def _words(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _is_page(response: http.client.HTTPResponse, first: bytes) -> bool:
    if response.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
        return True
    return response.status == 200 and first.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html"))


def _begin(response: http.client.HTTPResponse, known: dict[str, Any], part: _Part) -> int | None:
    """Prepare the part file for what the response brings; returns the length of the whole file, None if unknown."""
    length = response.headers.get("Content-Length", "")
    total = int(length) if length.isascii() and length.isdigit() else None
    if response.status != 206:
        etag = response.headers.get("ETag", "")
        validator = etag if etag.startswith('"') else response.headers.get("Last-Modified")
        part.restart(total, validator)
        return total
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", ""))
    if found is None or not known or int(found[1]) != part.size():
        part.restart(None, None)
        raise _Broken("the server sends another part than it was asked for")
    total = None if found[3] == "*" else int(found[3])
    if known["total"] is not None and total is not None and total != known["total"]:
        part.restart(None, None)
        raise _Broken(f"the file changed on the server from {known['total']} to {total} bytes")
    return known["total"] if total is None else total


def _copy(response: http.client.HTTPResponse, first: bytes, part: _Part, total: int | None, label: str) -> None:
    start = part.size()
    bar = tqdm(desc=label, total=total, initial=start, unit="B", unit_scale=True, leave=False, disable=None)
    with bar, open(part.path, "ab") as file:
        chunk = first
        while chunk:
            file.write(chunk)
            bar.update(len(chunk))
            chunk = _read(response, CHUNK)
    if total is not None and part.size() != total:
        got = part.size()
        if got > total:
            part.restart(None, None)
        raise _Broken(f"the transfer ended after {got} of {total} bytes")
