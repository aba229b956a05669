"""Read the sources of texts: plain and packed files, archives of splits, downloads, and the source of Python's standard library."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import lzma
import re
import struct
import sys
import sysconfig
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path

from data.dataset import display_path, read_chunks
from utils.data.download import download
from utils.data.meta import CHUNK
from utils.data.sources import PYSTDLIB, TEXTS, Text
from utils.documents import naming, require_space
from utils.errors import UserError

PYSTDLIB_BYTES = 8_000_000  # less than the library of any supported Python, so that every version gives the same size
PYSTDLIB_SKIP = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
PYSTDLIB_LOCAL = re.compile(r"_sysconfigdata|config-|sitecustomize|usercustomize")  # files of this machine, not of the library
PACKED = (".xz", ".gz", ".zip")
# the last three: an encrypted or otherwise unusual zip, and nonsense in the fields of a damaged one
READ_ERRORS = (
    EOFError,
    lzma.LZMAError,
    gzip.BadGzipFile,
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    struct.error,
    RuntimeError,
    ValueError,
    LookupError,
)
RATIO, SMALL = 250, 1 << 30  # a text of more than SMALL bytes that is RATIO times smaller when it is packed is none
PIECE, PIECES = 1 << 16, 64  # characters that are cut into tokens at once, and how many such pieces side by side
PACKING = 1 << 20  # bytes that a packed file may be larger than its content


def read_source(path: Path, suffix: str, most: int | None = None) -> Iterator[bytes]:
    """Yield the text in `path`, unpacked where `suffix` is in PACKED. Raises UserError for a truncated or damaged file, and for one that
    unpacks to more than `most` bytes, by default to more than a text can.
    """
    size = path.stat().st_size
    described, count, most = f"{path} ({size:,} bytes)", 0, max(SMALL, RATIO * size) if most is None else most
    try:
        with naming(path), ExitStack() as stack:
            if suffix == ".zip":
                archive = stack.enter_context(zipfile.ZipFile(path))
                members = [member for member in archive.infolist() if not member.is_dir()]
                if len(members) != 1:
                    raise UserError(f"{described} holds {len(members)} files: give a .zip with exactly one")
                file = stack.enter_context(archive.open(members[0]))
            else:
                file = stack.enter_context({".xz": lzma.open, ".gz": gzip.open}.get(suffix, open)(path, "rb"))
            while chunk := file.read(CHUNK):
                count += len(chunk)
                if suffix in PACKED and count > most:
                    raise UserError(f"{described} unpacks to more than {most:,} bytes: give a file with the text alone")
                yield chunk
    except READ_ERRORS as error:
        raise UserError(f"{described} is not a complete {suffix} file ({error}): get the file again") from None


def read_archive(path: Path, pattern: str) -> Iterator[bytes]:
    """Yield the content of the files in a .zip or .tar.gz whose names match `pattern`, in the order of their names or of the archive.

    UserError for a damaged archive, and for one without such a file.
    """
    found = False
    try:
        with naming(path), ExitStack() as stack:
            if path.suffix == ".zip":
                archive = stack.enter_context(zipfile.ZipFile(path))
                files = (archive.open(name) for name in sorted(archive.namelist()) if re.fullmatch(pattern, name))
            else:
                archive = stack.enter_context(tarfile.open(path, "r|*"))
                files = (archive.extractfile(member) for member in archive if member.isfile() and re.fullmatch(pattern, member.name))
            for file in files:
                found = True
                with file:
                    while chunk := file.read(CHUNK):
                        yield chunk
    except READ_ERRORS as error:
        raise UserError(f"{path} is not a complete archive ({error}): get the file again") from None
    if not found:
        raise UserError(f"{path} holds no file named as {pattern}: get the published archive")


def read_sources(paths: list[Path], published: Text | None = None) -> Iterator[bytes]:
    most = published.bytes + 1 if published else None  # a byte more, so that the refusal is that of another text
    return chain.from_iterable(read_source(path, path.suffix, most) for path in paths)


def stdlib_files(root: Path) -> list[Path]:
    """Return the .py files of the standard library in the order of the sha256 of their relative paths.

    Ordered by name, whole packages would fall into one split (all of xml into test). In hash order the three splits are alike, and
    the order is the same on every machine.
    """
    found = {}
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not PYSTDLIB_SKIP & set(relative.parts) and not PYSTDLIB_LOCAL.match(relative.parts[0]):
            found[hashlib.sha256(relative.as_posix().encode()).digest()] = path
    return [found[key] for key in sorted(found)]


def stdlib_chunks() -> Iterator[bytes]:
    left = PYSTDLIB_BYTES
    for path in stdlib_files(Path(sysconfig.get_path("stdlib"))):
        content = path.read_bytes()[:left]
        yield content
        left -= len(content)
        if not left:
            return


def stdlib_label() -> str:
    return f"Python {sys.version.split()[0]} standard library"


def digest_of(chunks: Iterable[bytes], algorithm: str) -> tuple[int, str]:
    """Return the total size of `chunks` in bytes and their hash in hex."""
    size, digest = 0, hashlib.new(algorithm, usedforsecurity=False)
    for chunk in chunks:
        size += len(chunk)
        digest.update(chunk)
    return size, digest.hexdigest()


def published_file(name: str, data_dir: Path) -> Path:
    """Return the packed or plain file of a published text in the data folder, downloaded where there is none. Raises Unavailable."""
    text = TEXTS[name]
    suffix = Path(text.url).suffix
    target = data_dir / f"{name}{suffix}"

    def check(path: Path) -> None:
        algorithm, _, expected = (text.archive_digest or text.digest).partition(":")
        size, found = digest_of(read_chunks(path) if text.archive_digest else read_source(path, suffix, text.bytes), algorithm)
        if found != expected:
            raise UserError(f"{size:,} bytes with {algorithm} {found}, not {expected}")

    for path in (target, data_dir / name / target.name, data_dir / name / name, data_dir / name):
        if path.is_file():
            return path
    require_space(data_dir, text.bytes)
    remedy = f"put the file at {display_path(target)} by hand, or use --fallback {PYSTDLIB} to prepare Python's own source instead"
    download(text.url, target, check, remedy, text.bytes + PACKING)
    return target


# tokens


def pieces_of(chunks: Iterable[bytes]) -> Iterator[str]:
    """Yield a text in pieces, each of about PIECE characters and cut before a newline or else a space, where hardly any token goes on."""
    decoder, rest = codecs.getincrementaldecoder("utf-8")("replace"), ""
    for chunk in chain(chunks, [b""]):
        rest += decoder.decode(chunk, final=not chunk)
        place = 0
        while len(rest) - place > PIECE:
            at = next((at for space in "\n " if (at := rest.rfind(space, place + 1, place + PIECE)) > 0), place)
            while at > place and rest[at - 1].isspace():  # the first of several
                at -= 1
            end = at if at > place else place + PIECE
            yield rest[place:end]
            place = end
        rest = rest[place:]
    if rest:
        yield rest


def tokens_of(chunks: Iterable[bytes], tokenizer) -> Iterator[list[int]]:
    """Yield the tokens of a text in UTF-8 in order, without special tokens; a wrong byte is read as U+FFFD."""
    pieces = pieces_of(chunks)
    while batch := list(islice(pieces, PIECES)):
        for encoded in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            yield encoded.ids
