"""Published datasets: where each is downloaded from and how its content is verified. A dataset is added by one entry in TEXTS or ROWS."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

PYSTDLIB = "pystdlib"  # the one text that needs no network: the source of Python's standard library


class Text(NamedTuple):
    """A text with a fixed content of `bytes`. Digests are "algorithm:hex": `digest` of the text, `archive_digest` of the file at `url`."""

    url: str  # a .zip with one file, .xz, .gz or plain text
    bytes: int
    digest: str
    archive_digest: str | None = None


class Archive(NamedTuple):
    """A text whose splits are files of an archive of `bytes`: patterns of their names, by split. Its words are its symbols."""

    url: str  # a .zip or .tar.gz
    bytes: int
    archive_digest: str
    members: dict[str, str]


class Files(NamedTuple):
    """The files of a task below `url`, each with its sha256."""

    url: str
    sha256: dict[str, str]


class Hub(NamedTuple):
    """A dataset on the Hugging Face hub at the commit `revision`, and the sha256 of the task's files made from it.

    `line` turns a row with `columns` into a line of these files, which begin with `header`.
    """

    name: str
    config: str | None
    revision: str
    sha256: dict[str, str]
    columns: tuple[str, ...]
    header: str
    line: Callable[[dict[str, Any]], str]


def csqa_line(row: dict[str, Any]) -> str:
    """Return the row as it stands in the published file, byte for byte."""
    choices = [{"label": label, "text": text} for label, text in zip(row["choices"]["label"], row["choices"]["text"], strict=True)]
    question = {"question_concept": row["question_concept"], "choices": choices, "stem": row["question"]}
    return json.dumps({"answerKey": row["answerKey"], "id": row["id"], "question": question})


def _wikitext(size: str, bytes: int, sha256: str) -> Archive:
    """WikiText of Merity et al. (2016), already cut into words, rare ones replaced by <unk>."""
    members = {split: rf"wikitext-{size}/wiki\.{split}\.tokens" for split in ("train", "valid", "test")}
    return Archive(f"https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-{size}-v1.zip", bytes, f"sha256:{sha256}", members)


_LM1B = "1-billion-word-language-modeling-benchmark-r13output"

TEXTS: dict[str, Text | Archive] = {  # for data/prepare.py
    "enwik8": Text(
        "https://mattmahoney.net/dc/enwik8.zip",
        100_000_000,
        "sha256:2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
        "sha256:547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
    ),
    "text8": Text("https://mattmahoney.net/dc/text8.zip", 100_000_000, "md5:3bea1919949baf155f99411df5fada7e"),
    "wikitext-2": _wikitext("2", 4_475_746, "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c"),
    "wikitext-103": _wikitext("103", 190_229_076, "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590"),
    "lm1b": Archive(  # Chelba et al. (2013); valid and test as in the script of Transformer-XL, where they are one file
        f"https://www.statmt.org/lm-benchmark/{_LM1B}.tar.gz",
        1_792_209_805,
        "sha256:01ba60381110baf7f189dfd2b8374de371e8c9a340835793f190bdae9e90a34e",
        {
            "train": rf"{_LM1B}/training-monolingual\.tokenized\.shuffled/news\.en-[0-9]+-of-00100",
            "valid": rf"{_LM1B}/heldout-monolingual\.tokenized\.shuffled/news\.en\.heldout-00001-of-00050",
            "test": rf"{_LM1B}/heldout-monolingual\.tokenized\.shuffled/news\.en\.heldout-00000-of-00050",
        },
    ),
}

SVAMP = "https://raw.githubusercontent.com/arkilpatel/SVAMP/689d7ccac74b9983a2ac7cc3b264f441b99e7c53/data"


def _svamp_files(folder: str) -> Files:
    """A folder of arkilpatel/SVAMP, with the digests in svamp.sha256, a file as sha256sum writes it."""
    lines = Path(__file__).with_name("svamp.sha256").read_text().splitlines()
    digests = {path.removeprefix(f"{folder}/"): sha256 for sha256, path in map(str.split, lines) if path.startswith(f"{folder}/")}
    return Files(f"{SVAMP}/{folder}", digests)


ROWS: dict[str, Files | Hub] = {  # for data/prepare_task.py
    "sst2": Hub(
        "nyu-mll/glue",
        "sst2",
        "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c",
        {
            "train.tsv": "48eac26399f8456935f81dd9e3a745c1430adb6c62e233ccfe22db4a0d15d1d1",
            "dev.tsv": "54a9c12c77e402fc14d6a66a506f24d999f596b0176eb777c972cccc2f9cc4b0",
        },
        ("sentence", "label"),
        "sentence\tlabel\n",
        lambda row: f"{row['sentence']}\t{row['label']}",
    ),
    "csqa": Hub(
        "tau/commonsense_qa",
        None,
        "94630fe30dad47192a8546eb75f094926d47e155",
        {
            "train_rand_split.jsonl": "58ffa3c8472410e24b8c43f423d89c8a003d8284698a6ed7874355dedd09a2fb",
            "dev_rand_split.jsonl": "3210497fdaae614ac085d9eb873dd7f4d49b6f965a93adadc803e1229fd8a02a",
        },
        ("id", "question", "question_concept", "choices", "answerKey"),
        "",
        csqa_line,
    ),
    "asdiv_a": _svamp_files("cv_asdiv-a"),
    "mawps": _svamp_files("cv_mawps"),
    "svamp": _svamp_files("mawps-asdiv-a_svamp"),
}
