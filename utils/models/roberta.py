"""RoBERTa over byte-level pieces (Liu et al. 2019, arXiv 1907.11692), from the transformers library."""

from transformers import RobertaConfig, RobertaForMaskedLM

from utils.data.tokenizer import Vocabulary
from utils.flags.fields import Flags
from utils.models.bert import SIZES, MaskedLM, blocks, forward_flops, hidden_states, sizes, summary, without_head

__all__ = ["SIZES", "blocks", "build", "forward_flops", "hidden_states", "summary", "without_head"]


def build(flags: Flags, vocabulary: Vocabulary) -> MaskedLM:
    positions = max(512, flags.tgt_len) + vocabulary.pad + 1  # positions are counted from pad + 1
    settings = {"max_position_embeddings": positions, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    ids = {"bos_token_id": vocabulary.cls, "eos_token_id": vocabulary.sep}
    return MaskedLM(RobertaForMaskedLM(RobertaConfig(**sizes(flags, vocabulary), **settings, **ids)), "lm_head")
