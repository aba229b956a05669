"""Tokenizers of BERT, RoBERTa and similar models, loaded with the transformers library, and their vocabulary as a corpus records it."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

from smoe_dropout.files import read_json
from smoe_dropout.options import ConfigError
from utils import documents
from utils.data.meta import META, MOST_PIECES, TOKENIZER, TextMeta, Vocabulary, tokenizer_fault
from utils.errors import UserError

SPECIAL = ("cls", "sep", "mask", "pad")
COMMIT = re.compile("[0-9a-f]{40}")


class Published(NamedTuple):
    """A tokenizer on the hub: the commit that is read, and the sha256 of its vocabulary."""

    revision: str
    vocabulary: str


BERT = Published("86b5e0934494bd15c9632b12f734a8a67f723594", "bd59c6d0c5e87e7f66a76be97a0cb2e161779f41eda5589371819b909da7aaf9")
ROBERTA = Published("e2da8e2f811d1448a5b465c236feacd80ffbac7b", "9a31b2dd23d6dc5446bf24a0b45806d97b2362ff2158b5233628ce72de8100d6")
PUBLISHED = {
    **{"bert-base-uncased": BERT, "google-bert/bert-base-uncased": BERT},
    **{"roberta-base": ROBERTA, "FacebookAI/roberta-base": ROBERTA},
}


def load_tokenizer(name: str):
    """Load a fast tokenizer by its name on the Hugging Face hub, or from a folder that transformers reads: one with vocab.txt (BERT), or
    with vocab.json and merges.txt (RoBERTa), is enough. NAME@REVISION is a version on the hub; the PUBLISHED ones need none.

    Raises UserError where it cannot be loaded, has changed, or lacks what masked language modelling needs.
    """
    from transformers import AutoTokenizer, BertTokenizerFast, RobertaTokenizerFast

    folder, kind, place, revision = Path(name), AutoTokenizer, name, None
    if folder.is_dir():
        _refuse_changed(folder)
        if not (folder / "tokenizer.json").exists():
            files = {path.name for path in folder.iterdir()}
            if not ({"vocab.txt"} <= files or {"vocab.json", "merges.txt"} <= files):
                raise UserError(f"--tokenizer {name} has neither tokenizer.json, nor vocab.txt, nor vocab.json and merges.txt")
            kind = BertTokenizerFast if "vocab.txt" in files else RobertaTokenizerFast
    else:
        place, _, revision = name.partition("@")
        revision = revision or (PUBLISHED[place].revision if place in PUBLISHED else None)
        note_moving("--tokenizer", place, revision)
    try:
        tokenizer = kind.from_pretrained(place, revision=revision or "main", trust_remote_code=False)
    except Exception as error:  # many kinds: of the network, the hub or a parser
        reason = " ".join(str(error).split())[:300]
        remedy = "give a folder with vocab.txt, or with vocab.json and merges.txt"
        raise UserError(f"--tokenizer {name} cannot be loaded ({reason}): {remedy}") from error
    known = tokenizer.get_vocab() if kind is AutoTokenizer else _bare_vocabulary(folder)
    missing = [piece for piece in SPECIAL if getattr(tokenizer, f"{piece}_token") not in known]
    if missing or len(tokenizer) > MOST_PIECES:
        fault = f"has no {', '.join(missing)} piece" if missing else f"has {len(tokenizer):,} pieces, more than {MOST_PIECES:,}"
        raise UserError(f"--tokenizer {name} {fault}: choose one made for masked language modelling")
    if place in PUBLISHED and not folder.is_dir() and vocabulary_of(tokenizer, place).sha256 != PUBLISHED[place].vocabulary:
        raise UserError(f"--tokenizer {name} has other pieces on the hub than the published ones: give a folder with its files")
    return tokenizer


def note_moving(flag: str, name: str, revision: str | None) -> None:
    """Say on stderr that something on the hub is not named by a commit, and may be another the next time."""
    if not COMMIT.fullmatch(revision or ""):
        print(f"note: {flag} {name} may change on the hub: {name}@COMMIT names one version of it", file=sys.stderr)


def _refuse_changed(folder: Path) -> None:
    """Raise UserError if the tokenizer of a prepared text is not the one that the text was prepared with."""
    text = folder.resolve().parent
    if folder.resolve().name == TOKENIZER and (text / META).exists():
        remedy = f"prepare {text} again, or give another with --tokenizer"
        if fault := tokenizer_fault(text, documents.read(text / META, TextMeta, remedy, documents.note_unverified)):
            raise UserError(f"{fault}: {remedy}")


def _bare_vocabulary(folder: Path) -> set[str]:
    """Read the pieces of a folder without tokenizer.json, to which transformers would add special pieces that the model never saw."""
    try:
        if (folder / "vocab.txt").exists():
            return set((folder / "vocab.txt").read_text(encoding="utf-8").split("\n"))
        return set(read_json(folder / "vocab.json"))
    except (ConfigError, UnicodeDecodeError, TypeError) as error:
        raise UserError(f"--tokenizer {folder} cannot be read ({error}): give a folder with undamaged files") from None


def vocabulary_of(tokenizer, name: str) -> Vocabulary:
    """Describe a tokenizer that was loaded as `name`."""
    content = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False).encode()
    ids = {piece: getattr(tokenizer, f"{piece}_token_id") for piece in SPECIAL}
    return Vocabulary(label_of(name), len(tokenizer), hashlib.sha256(content).hexdigest(), **ids)


def label_of(name: str) -> str:
    """The name of a tokenizer, without its folder or its revision."""
    return Path(name).name if Path(name).is_dir() else Path(name.partition("@")[0]).name
