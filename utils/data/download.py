"""A file from the network, resumed where it was cut and checked before it counts."""

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
    """A known text is neither here nor downloadable: the one mistake that --fallback mends."""

    def __init__(self, fault: str, remedy: str) -> None:
        super().__init__(f"{fault}: {remedy}")
        self.fault = fault


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# reading sources


def fetch_rest(url: str, part: Path) -> bool:
    """Appends to `part` what it lacks of `url`; True when the server has nothing more. Raises one of NETWORK_ERRORS."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=CONNECT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:
            return True  # nothing after the last byte here; whether these are the right bytes is checked next
        raise
    with response:
        have = have if response.status == 206 else 0  # a server without ranges starts again
        length = response.headers["Content-Length"]
        total = have + int(length) if length else None
        log(f"downloading {url}: {have:,} of {total or 0:,} bytes are here")
        with open(part, "ab" if have else "wb") as file:
            while chunk := response.read(1 << 16):
                have += file.write(chunk)
    return total is None or have >= total


def download(url: str, target: Path, check: Callable[[Path], None], remedy: str) -> None:
    """Brings `url` to `target` through `target`.part, which a later call resumes. `check(path)` raises UserError for a wrong file.

    Raises Unavailable with `remedy`. A part that cannot be completed is kept, one with a wrong content is not.
    """
    part = target.with_name(f"{target.name}.part")
    kept = part.stat().st_size if part.exists() else 0
    for _ in range(DOWNLOAD_ATTEMPTS):
        before = part.stat().st_size if part.exists() else 0
        try:
            if fetch_rest(url, part):
                break
            reason = "the connection was cut"
        except NETWORK_ERRORS as error:
            reason = str(error) if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)
        if not part.exists() or part.stat().st_size <= before:
            raise Unavailable(f"{url} cannot be downloaded ({reason})", remedy)
    else:
        raise Unavailable(f"{url} cannot be downloaded ({reason}; {part.stat().st_size:,} bytes are kept for another try)", remedy)
    try:
        check(part)
    except UserError as error:
        part.unlink()
        if kept:  # the old part may have been the wrong one: once more from the start
            return download(url, target, check, remedy)
        raise Unavailable(f"{url} sent something else ({error})", remedy) from None
    os.replace(part, target)
