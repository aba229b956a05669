"""SST-2 (Socher et al. 2013, as in GLUE): one sentence, negative (0) or positive (1). Imports no torch."""

import csv
from collections.abc import Iterator

from utils.data.rows import Choice, File, Kind, shown, table


def sentences(file: File) -> Iterator[Choice]:
    """The rows of a TSV file with the columns sentence and label."""
    for line, row in table(file, ("sentence", "label"), delimiter="\t", quoting=csv.QUOTE_NONE):  # quotes are text here
        label = row["label"]
        if not row["sentence"].strip():
            file.refuse(f"line {line}, column sentence", f"{shown(row['sentence'])} is not text")
        if label not in ("0", "1"):
            fault = "the label is missing" if not label.strip() else f"{shown(label)} is neither 0 nor 1"
            file.refuse(f"line {line}, column label", fault + (", it marks a test file without labels" if label == "-1" else ""))
        yield Choice(((row["sentence"],),), int(label))


SST2 = Kind("SST-2", ("train.tsv", "dev.tsv"), ((67_349, 872),), sentences, labels=2)
