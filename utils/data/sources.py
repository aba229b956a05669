"""Published datasets: where each is downloaded from and how its content is verified. A dataset is added by one entry in TEXTS or ROWS."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

PYSTDLIB = "pystdlib"  # the one text that needs no network: the source of Python's standard library


class Text(NamedTuple):
    """A text with a fixed content. Digests are "algorithm:hex": `digest` of the unpacked text, `archive_digest` of the file at `url`."""

    url: str  # a .zip with one file, .xz, .gz or plain text
    bytes: int
    digest: str
    archive_digest: str | None = None


class Files(NamedTuple):
    """The files of a task below `url`, each with its sha256."""

    url: str
    sha256: dict[str, str]


class Hub(NamedTuple):
    """A dataset on the Hugging Face hub. `line` turns a row with `columns` into a line of the task's files, which begin with `header`."""

    name: str
    config: str | None
    columns: tuple[str, ...]
    header: str
    line: Callable[[dict[str, Any]], str]


def csqa_line(row: dict[str, Any]) -> str:
    """Return the row as it stands in the published file, byte for byte."""
    choices = [{"label": label, "text": text} for label, text in zip(row["choices"]["label"], row["choices"]["text"], strict=True)]
    question = {"question_concept": row["question_concept"], "choices": choices, "stem": row["question"]}
    return json.dumps({"answerKey": row["answerKey"], "id": row["id"], "question": question})


TEXTS = {  # for data/prepare.py
    "enwik8": Text(
        "http://mattmahoney.net/dc/enwik8.zip",
        100_000_000,
        "sha256:2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
        "sha256:547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
    ),
    "text8": Text("http://mattmahoney.net/dc/text8.zip", 100_000_000, "md5:3bea1919949baf155f99411df5fada7e"),
}

SVAMP = "https://raw.githubusercontent.com/arkilpatel/SVAMP/689d7ccac74b9983a2ac7cc3b264f441b99e7c53/data"

ROWS: dict[str, Files | Hub] = {  # for data/prepare_task.py
    "sst2": Hub("nyu-mll/glue", "sst2", ("sentence", "label"), "sentence\tlabel\n", lambda row: f"{row['sentence']}\t{row['label']}"),
    "csqa": Hub("tau/commonsense_qa", None, ("id", "question", "question_concept", "choices", "answerKey"), "", csqa_line),
    "asdiv_a": Files(
        f"{SVAMP}/cv_asdiv-a",
        {
            "fold0/train.csv": "5c711c9150712141bfde68abf5ee4aecb610563325901320aef41e1e5ecf6c84",
            "fold0/dev.csv": "0813a90f336147b1229a6d1d133c29f7e585cb27cafd651976bb94449a4b81c0",
            "fold1/train.csv": "77046a465a3e693b4b241dcbce2fe2cba7c9d3d253201e5e125273f6f95ade8a",
            "fold1/dev.csv": "2432c24452fceb43c76f081342ebcd0e7b0f5776cb2908e621eeb4e2fad3cd17",
            "fold2/train.csv": "25a7e1b542fb6c39181ab6005ec9e1eb68d049f0ca4367c87837d299feef3cd8",
            "fold2/dev.csv": "63da38010296031a123c0bd9cb80701870f1e31fdf06a88442b3ab6500b36b84",
            "fold3/train.csv": "618e38871a3b82b184f47c301cae011b16ba1d0d2062017e51899490d071d846",
            "fold3/dev.csv": "7a45f3d18353e4ea8ffa2d1cb238e80068ad3bb5dbed4303231b3af0836d78e2",
            "fold4/train.csv": "caf82cc29dafe77dda0aac8bf8af5c363c666e0e1480fbaedc47c504384b76fa",
            "fold4/dev.csv": "b9fe1aacddc34ec2caed5e0c35faff2681198431b021d13e16dc2e7c61ec6ecb",
        },
    ),
    "mawps": Files(
        f"{SVAMP}/cv_mawps",
        {
            "fold0/train.csv": "0674253e6099813cefbb1d6eae3d2dc784ab6ebfdaf8755f6ebb4b99fc1f6ebe",
            "fold0/dev.csv": "bad59cff796b01a87363ea970f1fa80c15f56ff5f4388143aadbdc3feaf5f990",
            "fold1/train.csv": "ad8846861202060f2dfcb8423d23218cbf6a4a67010d4d4d939b9df61b2d34b0",
            "fold1/dev.csv": "31362cb8741f9fc11b470b224478902ae27ab762bdd82bcb08a9c945d5947422",
            "fold2/train.csv": "b137a07367e1b3cd9556fae7b9e17fb5e23836e1e6dc9357719049ebc8860c62",
            "fold2/dev.csv": "fae4f08a24a23123612ca5bb960e4f9aa7202c856344a59ab7adea424dfc670d",
            "fold3/train.csv": "fb1e286a94feed24a41c5560095e21a33d61888c7c27a355e6ccef725deaf084",
            "fold3/dev.csv": "5ac76e5559cdde0aa8bcac77eb9af46b9b0230f00661ad0257dbd58a1567a323",
            "fold4/train.csv": "9194364265a42e0f146cc73f514c806c5d322827cd025a474ded33af076837bb",
            "fold4/dev.csv": "1bb9164e6ba93fdc1bffddd8544c20cddc3c195a299b0b6c6893c2a760c3434b",
        },
    ),
    "svamp": Files(
        f"{SVAMP}/mawps-asdiv-a_svamp",
        {
            "train.csv": "c761cdc6390a67a285c6c346a2931f61bc8f47430eceaeb123cc3d0263efa821",
            "dev.csv": "978425fa0820a147a20d3cb305a571d77b8ba0d1ccec4a96dd1470bf0079c338",
        },
    ),
}
