"""Records of prepared data, meta.json of a text and rows.json of a task's rows: what they hold, and the files under their checksums.

Imports neither torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
from msgspec import UNSET, Meta, UnsetType

from smoe_dropout.manifest import sha256
from utils.documents import Content, Count, Sha256

SCHEMA = 1
META, ROWS = "meta.json", "rows.json"
TOKENIZER = "tokenizer"  # the folder of the tokenizer, beside the splits
SPLITS = ("train", "valid", "test")
CHUNK = 1 << 22  # bytes read at once; keeps memory flat for texts of any size
MOST_PIECES = 1 << 16  # a piece is stored as uint16

Version = Annotated[int, Meta(ge=SCHEMA, le=SCHEMA)]
Piece = Annotated[int, Meta(ge=0, lt=MOST_PIECES)]
Name = Annotated[str, Meta(min_length=1)]


class Vocabulary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The word pieces of a tokenizer: `size` ids, the ids of the special pieces, and the sha256 of the mapping from pieces to ids."""

    name: str
    size: Annotated[int, Meta(ge=1, le=MOST_PIECES)]
    sha256: Sha256
    cls: Piece
    sep: Piece
    mask: Piece
    pad: Piece

    def __post_init__(self) -> None:
        if self.special[-1] >= self.size:
            raise ValueError(f"has the special piece {self.special[-1]}, but {self.size} pieces")

    @property
    def special(self) -> list[int]:
        """The ids of the special pieces, ascending."""
        return sorted({self.cls, self.sep, self.mask, self.pad})


class Tokens(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The tokens of a model of the transformers library: `size` ids, and the sha256 of what decides how a text is cut into them.

    first: the id that stands before every sequence, if the tokenizer puts one there.
    """

    name: str
    size: Annotated[int, Meta(ge=1, le=1 << 32)]
    sha256: Sha256
    first: Annotated[int, Meta(ge=0)] | None


class Splits(TypedDict):
    """The files of the splits."""

    train: Content
    valid: Content
    test: Content


class TextMeta(msgspec.Struct):
    """The content of meta.json. files: those of the tokenizer, by their path in the folder; texts of older versions do not record them.
    text_bytes: of the splits of a text of tokens, in UTF-8. learned: how their vocabulary was made from the training text.
    """

    schema: Version
    name: Name
    title: Name
    source: str
    official_text: bool
    splits: Splits
    text: dict[str, int | str] | UnsetType = UNSET
    held_out: Count | UnsetType = UNSET
    symbols: Count | UnsetType = UNSET
    limit: int | UnsetType | None = UNSET
    column: str | UnsetType = UNSET
    vocabulary: Vocabulary | UnsetType = UNSET
    tokens: Tokens | UnsetType = UNSET
    learned: dict[str, str | int | bool | None] | UnsetType = UNSET
    text_bytes: dict[str, Count] | UnsetType = UNSET
    files: dict[str, Content] | UnsetType = UNSET


class RowsMeta(TypedDict):
    """The content of rows.json: the task, where its rows come from, and its files."""

    schema: Version
    task: Name
    source: str
    files: dict[str, Content]


def files_below(folder: Path, inner: str) -> list[str]:
    """The paths of all files in `folder`/`inner`, relative to `folder`, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in (folder / inner).rglob("*") if path.is_symlink() or not path.is_dir())


def fault_of(folder: Path, files: Mapping[str, Mapping[str, Any]], record: str, content: bool) -> str | None:
    """Say which of `files` is not as `record` has it: in its size, and with `content` in its sha256. None if all are."""
    for name, entry in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            return f"{path} {'is missing' if size is None else f'has {size:,} bytes'}, {record} says {entry['bytes']:,} bytes"
        if content and (found := sha256(path)) != entry["sha256"]:
            return f"{path} has sha256 {found}, {record} says {entry['sha256']}"
    return None


def tokenizer_fault(folder: Path, meta: Mapping[str, Any]) -> str | None:
    """Say how the tokenizer of a prepared text differs from the recorded one. None if it does not, or if none is recorded."""
    files = meta.get("files", {})
    more = set(files_below(folder, TOKENIZER)) - files.keys() if files else ()
    unknown = f"{folder} holds {', '.join(sorted(more))}, which {META} does not record" if more else None
    return fault_of(folder, files, META, content=True) or unknown
