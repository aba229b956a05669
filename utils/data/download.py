"""Download a file: resumed after a cut connection, and checked before it is accepted."""

from __future__ import annotations

import http.client
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from utils.errors import UserError

CONNECT_SECONDS = 10
DOWNLOAD_ATTEMPTS = 5
NETWORK_ERRORS = (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException)


class Unavailable(UserError):
    """A file that cannot be downloaded. `fault`: why, without the remedy."""

    def __init__(self, fault: str, remedy: str, kept: int = 0) -> None:
        super().__init__(f"{fault}{f'; {kept:,} bytes are kept, rerun to resume' if kept else ''}: {remedy}")
        self.fault = fault


def log(line: str) -> None:
    """Print a line to stderr."""
    print(line, file=sys.stderr, flush=True)


def _append(url: str, part: Path) -> bool:
    """Append the missing bytes of `url` to `part`; return whether it is complete. Raises one of NETWORK_ERRORS."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=CONNECT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:
            return True  # the server has no further bytes; the content is checked by the caller
        raise
    with response:
        have = have if response.status == 206 else 0  # a server without ranges starts from 0
        length = response.headers["Content-Length"]
        total = have + int(length) if length else None
        log(f"downloading {url}: {have:,} of {f'{total:,}' if total else 'unknown'} bytes received")
        with open(part, "ab" if have else "wb") as file:
            while chunk := response.read(1 << 16):
                have += file.write(chunk)
    return total is None or have >= total


def download(url: str, target: Path, check: Callable[[Path], None], remedy: str) -> None:
    """Download `url` to `target` through `target`.part, from which a later call resumes. `check(path)` raises UserError for a wrong file.

    Raises Unavailable with `remedy`. An incomplete part is kept, one with wrong content is deleted.
    """
    part = target.with_name(f"{target.name}.part")
    resumed = part.exists() and part.stat().st_size > 0
    for _ in range(DOWNLOAD_ATTEMPTS):
        before = part.stat().st_size if part.exists() else 0
        try:
            if _append(url, part):
                break
            reason = "the connection was cut"
        except NETWORK_ERRORS as error:
            reason = str(error) if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)
        if not part.exists() or part.stat().st_size <= before:
            raise Unavailable(f"{url} cannot be downloaded ({reason})", remedy)
    else:
        raise Unavailable(f"{url} cannot be downloaded ({reason})", remedy, kept=part.stat().st_size)
    try:
        check(part)
    except UserError as error:
        part.unlink()
        if resumed:  # the old part may be wrong: try once from the start
            return download(url, target, check, remedy)
        raise Unavailable(f"{url} returned unexpected content ({error})", remedy) from None
    os.replace(part, target)
