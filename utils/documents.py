"""JSON files of runs, records and prepared data: written atomically with a checksum, verified and validated when read.

A sealed file is an object {"format": 1, ..., "sha256": "..."}: the hash is that of the content between these marks, as compact JSON in its
order, so that the layout of the file does not matter. Files of older versions have neither mark: what they hold is validated only.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
from msgspec import Meta

from smoe_dropout.files import parse_json, read_json
from smoe_dropout.manifest import sha256
from smoe_dropout.options import ConfigError
from utils.errors import UserError

FORMAT = 1
MARKS = ("format", "sha256")
SPACE_MARGIN = 16 << 20  # bytes of disk left free

Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Meta(ge=0)]


class Content(TypedDict):
    """Size and hash of a file, or of its beginning."""

    bytes: Count
    sha256: Sha256


class Damaged(UserError):
    """A file that cannot be used as it is. path: the file; fault: what is wrong with it; remedy: what can be done."""

    def __init__(self, path: Path, fault: str, remedy: str):
        super().__init__(f"{path} {fault}: {remedy}")
        self.path, self.fault, self.remedy = path, fault, remedy


def read(path: Path, schema: Any, remedy: str, unverified: Callable[[Path], Any] | None = None, nullable: bool = False) -> dict[str, Any]:
    """The content of a file without its marks. Damaged unless the checksum is right and the content is of the schema.

    schema: a TypedDict or another type of msgspec for the content. Only numbers that are finite are accepted. unverified: called with the
    path of a file without a checksum. nullable: whether a number may be null, for which older versions wrote Infinity or NaN.
    """
    value = finite(parsed(path, remedy)) if nullable else parsed(path, remedy)
    content = unsealed(value, schema, path, remedy)
    if unverified and not is_sealed(value):
        unverified(path)
    return content


def parsed(path: Path, remedy: str) -> Any:
    """The value of a JSON file as it stands there, neither verified nor validated. Damaged if there is none."""
    try:
        return read_json(path)
    except ConfigError as error:
        raise Damaged(path, str(error).removeprefix(f"{path} "), remedy) from None


def note_unverified(path: Path) -> None:
    """Prints, once for all processes of a run, that a file has no checksum."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {path} has no checksum, as in earlier versions: its content cannot be verified", file=sys.stderr)


def content_of(path: Path) -> Content:
    """Size and hash of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def unsealed(value: Any, schema: Any, path: Path, remedy: str) -> dict[str, Any]:
    """The content of a parsed file, as `read` returns it."""
    if not isinstance(value, dict):
        raise Damaged(path, "is damaged: it is not a JSON object", remedy)
    content = {name: entry for name, entry in value.items() if name not in MARKS}
    if is_sealed(value):
        if value.get("format") != FORMAT:
            raise Damaged(path, f"is damaged: its format is {value.get('format')!r}, not {FORMAT}, as of a later version", remedy)
        if value.get("sha256") != checksum(content):
            raise Damaged(path, "is damaged: its content does not match its checksum", remedy)
    validate(content, schema, path, remedy)
    return content


def validate(content: Any, schema: Any, path: Path, remedy: str) -> None:
    """Damaged, naming the field, unless the content is of the schema and its numbers are finite."""
    if place := next(_not_finite(content, "$"), None):
        raise Damaged(path, f"is damaged: {_field(place)} is not a finite number", remedy)
    try:
        msgspec.convert(content, schema, strict=True)
    except msgspec.ValidationError as error:
        fault, _, place = str(error).partition(" - at `")
        fault = fault.replace("`", "").replace("Expected", "must be", 1).replace("Object missing required field", "lacks")
        raise Damaged(path, f"is damaged: {_field(place.rstrip('`'))} {fault}", remedy) from None


def is_sealed(value: Mapping[str, Any]) -> bool:
    """Return whether a parsed file has a checksum, or part of its marks."""
    return any(mark in value for mark in MARKS)


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content as it is written. A number that is not finite, which JSON has no word for, becomes null."""
    content = finite(dict(content))
    return {"format": FORMAT, **content, "sha256": checksum(content)}


def checksum(content: Mapping[str, Any]) -> str:
    """The sha256, in hex, of the content without marks."""
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def write(path: Path, content: Mapping[str, Any]) -> str:
    """Writes a sealed file and returns its checksum. A kill leaves the old file or the new one; a failure leaves the old one."""
    sealed = seal(content)
    replace(path, (json.dumps(sealed, indent=1) + "\n").encode())
    return sealed["sha256"]


def replace(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Replaces a file atomically, down to the disk."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with naming(path), open(partial, "wb") as file:
            for chunk in [content] if isinstance(content, bytes) else content:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def require_space(folder: Path, size: int, flag: str = "--out") -> None:
    """Raises UserError unless the disk of `folder` has room for `size` bytes; the remedy is another folder by `flag`."""
    free, needed = shutil.disk_usage(folder).free, size + SPACE_MARGIN
    if free < needed:
        folder = folder.parent if folder.suffix == ".tmp" else folder  # one that is being built has a name of its own
        raise UserError(f"{folder} has {free / 1e6:,.0f} MB free, {needed / 1e6:,.0f} MB are needed: make room, or choose another {flag}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives an error of the system that names no file, such as a full disk, the file that is being written."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Flush a file, or the renames within a folder, to disk, where the system can (Windows cannot open a folder)."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def lines(content: bytes, schema: Any, path: Path, remedy: str) -> list[dict[str, Any]]:
    """The objects of a file with one on each line. Damaged, with the line, for one that is not of the schema."""
    found = []
    for number, text in enumerate(content.splitlines(), start=1):
        try:
            found.append(parse_json(text, f"line {number}"))
        except ConfigError as error:
            raise Damaged(path, f"is damaged: {error}", remedy) from None
        validate(finite(found[-1]), schema, Path(f"{path}, line {number},"), remedy)
    return found


def _field(place: str) -> str:
    """$.quality[0].k of msgspec as words."""
    return f"the field '{name}'" if (name := place.removeprefix("$").removeprefix(".")) else "the content"


def _not_finite(value: Any, place: str) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield place
    named = ((f".{key}", one) for key, one in value.items()) if isinstance(value, dict) else ()
    numbered = ((f"[{index}]", one) for index, one in enumerate(value)) if isinstance(value, list) else ()
    for name, one in chain(named, numbered):
        yield from _not_finite(one, place + name)


def finite(value: Any) -> Any:
    """The value of a JSON text with null for numbers that are not finite."""
    if isinstance(value, dict):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
