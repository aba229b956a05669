"""Download a file: resumed after a cut connection, limited in size, and checked before it is accepted."""

from __future__ import annotations

import http.client
import os
import signal
import ssl
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError, URLError

from utils.documents import naming
from utils.errors import UserError

CONNECT_SECONDS = 10
DOWNLOAD_ATTEMPTS = 5
SLOWEST, PATIENCE = 1000, 30  # a server that sends less of a file, in bytes a second, is given up: judged each time so many have passed
NETWORK_ERRORS = (URLError, TimeoutError, ConnectionError, ssl.SSLError, http.client.HTTPException, ValueError)  # last: of a wrong URL


class Unavailable(UserError):
    """A file that cannot be downloaded. `fault`: why, without the remedy."""

    def __init__(self, fault: str, remedy: str, kept: int = 0) -> None:
        super().__init__(f"{fault}{f'; {kept:,} bytes are kept, rerun to resume' if kept else ''}: {remedy}")
        self.fault = fault


class TooLarge(Exception):
    """A server sends more than the file can have."""


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https, and from http to http; never to another scheme, nor from https to http."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if newurl.partition(":")[0].lower() not in ("https", req.type):
            raise URLError(f"it redirects to {newurl}, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@contextmanager
def _watched(received: Callable[[], int]) -> Iterator[None]:
    """Raise URLError in the body, also while it waits, once a server sends too little of a file. For the main thread only.

    Without effect where there is no SIGALRM, as on Windows.
    """
    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = received()

    def judge(*_) -> None:
        nonlocal before
        if 0 <= received() - before < SLOWEST * PATIENCE:  # less than nothing: the file was begun anew
            raise URLError(f"it sends fewer than {SLOWEST:,} bytes a second")
        before = received()

    signal.signal(signal.SIGALRM, judge)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def log(line: str) -> None:
    """Print a line to stderr."""
    if sys.stderr is not None:  # else it would go to stdout
        print(line, file=sys.stderr, flush=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _append(url: str, part: Path, limit: int) -> bool:
    """Append the missing bytes of `url` to `part`; return whether it is complete. Raises TooLarge, or one of NETWORK_ERRORS."""
    have = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with _watched(lambda: have):
        try:
            response = urllib.request.build_opener(_SafeRedirects).open(request, timeout=CONNECT_SECONDS)
        except HTTPError as error:
            if error.code == 416 and have:
                return True  # the server has no further bytes; the content is checked by the caller
            raise
        with response:
            have = have if response.status == 206 else 0  # a server without ranges starts from 0
            length = response.headers.get("Content-Length", "")
            total = have + int(length[:20]) if length.isascii() and length.isdigit() else None
            log(f"downloading {url}: {have:,} of {f'{total:,}' if total else 'unknown'} bytes received")
            if (total or 0) > limit:
                raise TooLarge
            with naming(part), open(part, "ab" if have else "wb") as file:
                while chunk := response.read1(1 << 16):
                    have += file.write(chunk)
                    if have > limit:
                        raise TooLarge
    return total is None or have >= total


def download(url: str, target: Path, check: Callable[[Path], None], remedy: str, limit: int) -> None:
    """Download `url` to `target` through `target`.part, from which a later call resumes. `check(path)` raises UserError for a wrong file.

    Raises Unavailable with `remedy`. An incomplete part is kept, one with wrong content or with more than `limit` bytes is deleted.
    """
    part, complete, fault = target.with_name(f"{target.name}.part"), False, None
    resumed = _size(part) > 0
    for _ in range(DOWNLOAD_ATTEMPTS):
        before, reason = _size(part), "the connection was cut"
        try:
            complete = _append(url, part, limit)
        except TooLarge:
            fault = f"is larger than {limit:,} bytes, the most that {target.name} can have"
        except NETWORK_ERRORS as error:
            said = error if isinstance(error, HTTPError) else getattr(error, "reason", None) or getattr(error, "strerror", None)
            reason = " ".join(str(said or error).split())[:200]
        if complete or fault or _size(part) <= before:
            break
    if complete:
        try:
            check(part)
            return os.replace(part, target)
        except UserError as error:
            fault = f"returned unexpected content ({error})"
    if fault or not _size(part):
        part.unlink(missing_ok=True)
    if fault and resumed:  # the old part may be wrong: try once from the start
        return download(url, target, check, remedy, limit)
    raise Unavailable(f"{url} {fault or f'cannot be downloaded ({reason})'}", remedy, _size(part))
