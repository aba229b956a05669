"""Fine-tuning RoBERTa, which has byte-level pieces: runs, rows and predictions."""

from functools import cache
from pathlib import Path

import msgspec
import pytest
from tokenizers import ByteLevelBPETokenizer

from tests import tiny
from tests.harness import test_finetune
from tests.harness.test_finetune import command, made, pytestmark, rows  # noqa: F401 (fixtures)
from utils.data.tokenizer import load_tokenizer, vocabulary_of


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Returns the folder of a finished pre-training run, like the fixture of that name for other models."""
    root = tmp_path_factory.mktemp("pretrained")
    pieces = tiny.write_pieces(root / "pieces", "roberta")
    folder = write_byte_tokenizer(pieces / "tokenizer")
    tiny.change_meta(pieces, vocabulary=msgspec.structs.asdict(vocabulary_of(load_tokenizer(str(folder)), str(folder))))

    @cache
    def of(method: str, model: str = "roberta") -> Path:
        changes = {**tiny.ENCODER, "model": model, "method": method, "max_step": 4, "eval_interval": 2}
        tiny.completed(tiny.flags(pieces, root / method, **changes))
        return root / method

    return of


def write_byte_tokenizer(folder: Path) -> Path:
    """Writes a tokenizer with the 256 bytes and the frequent pieces of WORDS, in RoBERTa's file format."""
    folder.mkdir()
    tokenizer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator([" ".join(tiny.WORDS)] * 2, vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.save_model(str(folder))
    return folder


@pytest.mark.parametrize("task", ["sst2", "svamp"])
def test_a_run_scores_every_row_at_every_k(task, rows, pretrained, tmp_path):  # noqa: F811
    test_finetune.test_a_run_scores_every_row_at_every_k(task, "smoe_dropout", "roberta", rows, pretrained, tmp_path)


@pytest.mark.parametrize("task", ["sst2", "svamp"])
@pytest.mark.parametrize("method", ["dense", "smoe_dropout"])
def test_predictions_do_not_depend_on_order_batch_or_padding(task, method, rows, pretrained):  # noqa: F811
    test_finetune.test_predictions_do_not_depend_on_order_batch_or_padding(task, method, "roberta", rows, pretrained)


@pytest.mark.parametrize("task", ["sst2", "csqa", "svamp"])
def test_a_row_is_whole_between_its_marks(task, rows, pretrained):  # noqa: F811
    """<s> text </s>, or <s> text </s></s> text </s> for two texts; decoding gives the text back byte for byte."""
    made_task, _ = made(command(task, rows, pretrained("dense")))
    vocabulary, tokenizer = made_task.vocabulary, load_tokenizer(str(pretrained("dense").parent / "pieces" / "tokenizer"))
    for example, row in zip(made_task.corpus.held_out, made_task.read(made_task.corpus.held_out), strict=True):
        texts = (example.question,) if task == "svamp" else example.sequences[-1]
        pieces = (row[0] if task == "svamp" else row[0][-1]).tolist()
        assert pieces[0] == vocabulary.cls and tokenizer.unk_token_id not in pieces
        assert tokenizer.decode(pieces[1:]) == "</s></s>".join(texts) + "</s>"
