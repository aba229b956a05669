"""Finished runs of train.py, to be measured again: opened and verified without importing torch."""

from pathlib import Path
from typing import Any, NamedTuple

from utils.checkpoints.run_files import RESULT, config_sha256, read_config, read_result
from utils.data.corpus import Corpus
from utils.errors import UserError
from utils.flags.declare import flags_from
from utils.flags.fields import Flags
from utils.flags.models import MODELS


class Finished(NamedTuple):
    """A finished run of train.py. identity: its config_sha256."""

    folder: Path
    identity: str
    flags: Flags
    record: dict[str, Any]
    corpus: Corpus


def open_finished(folder: Path) -> Finished:
    """Raises UserError unless the folder is a finished run of train.py, with its data."""
    config = read_config(folder)
    identity, flags = config_sha256(config), flags_from(config, Flags)
    record = read_result(folder, identity)
    if record is None or "task" in config:
        fault = "is missing" if record is None else "is of finetune.py"
        raise UserError(f"{folder / RESULT} {fault}: only a finished run of train.py can be measured")
    corpus = Corpus.open(flags.data, MODELS[flags.model].reads)
    corpus.verify()
    if config.get("data_fingerprint", corpus.fingerprint) != corpus.fingerprint:
        raise UserError(f"{flags.data} does not hold the {corpus.unit} of the run in {folder}: put the run's data there again")
    return Finished(folder, identity, flags, record, corpus)
