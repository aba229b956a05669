"""BERT over word pieces (Devlin et al. 2019, arXiv 1810.04805), from the transformers library, without next-sentence prediction."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, PretrainedConfig, PreTrainedModel

from utils.data.tokenizer import Vocabulary
from utils.flags.derive import method_of
from utils.flags.fields import Flags
from utils.flags.models import TRANSFORMERS_FIELDS
from utils.models.flops import expert_flops
from utils.models.registry import Shape

SIZES = ("n_layer", "d_model", "n_head", "d_ff", "d_inner", "tgt_len")


class MaskedLM(nn.Module):
    """A masked language model of transformers that applies its head `head` only to the masked positions."""

    def __init__(self, host: PreTrainedModel, head: str):
        super().__init__()
        self.host, self.head = host, head

    def forward(self, tokens_BT: Tensor, places_BM: Tensor, targets_BM: Tensor, state: None = None) -> tuple[Tensor, None, Tensor]:
        """Losses [B, M] in nats and logits [B, M, V] at the places; `state` is unused."""
        hidden_BTD = self.host.base_model(tokens_BT)[0]
        chosen_BMD = hidden_BTD.gather(1, places_BM[..., None].expand(-1, -1, hidden_BTD.shape[-1]))
        logits_BMV = getattr(self.host, self.head)(chosen_BMD).float()
        losses = F.cross_entropy(logits_BMV.flatten(0, 1), targets_BM.flatten(), reduction="none")
        return losses.view_as(targets_BM), None, logits_BMV


def sizes(flags: Flags, vocabulary: Vocabulary) -> dict:
    """The settings of the transformers configuration."""
    return {field: getattr(flags, name) for name, (field, _) in TRANSFORMERS_FIELDS.items()} | {
        "vocab_size": vocabulary.size,
        "initializer_range": flags.init_std,
        "pad_token_id": vocabulary.pad,
        "attn_implementation": attention(flags),
    }


def attention(flags: Flags) -> str:
    """Eager for methods that read attention probabilities, and on a CPU, where the fused backward pass in bf16 takes six times as long."""
    method = method_of(flags)
    reads_probabilities = method and method.layer and "probabilities" in method.layer.needs
    return "sdpa" if flags.device != "cpu" and torch.cuda.is_available() and not reads_probabilities else "eager"


def build(flags: Flags, vocabulary: Vocabulary) -> MaskedLM:
    return MaskedLM(BertForMaskedLM(BertConfig(**sizes(flags, vocabulary), max_position_embeddings=max(512, flags.tgt_len))), "cls")


def blocks(model: MaskedLM) -> nn.ModuleList:
    return model.host.base_model.encoder.layer


def hidden_states(model: MaskedLM, tokens_NT: Tensor, lengths_N: Tensor) -> Tensor:
    inside_NT = torch.arange(tokens_NT.shape[1], device=tokens_NT.device) < lengths_N[:, None]
    return model.host.base_model(tokens_NT, attention_mask=inside_NT.long())[0]


def summary(hidden_NTD: Tensor, lengths_N: Tensor) -> Tensor:
    """The hidden state of the first position, [CLS]."""
    return hidden_NTD[:, 0]


def without_head(model: MaskedLM) -> MaskedLM:
    delattr(model.host, model.head)
    return model


def forward_flops(model: MaskedLM, shape: Shape, k: int | None) -> int:
    """Operations of one forward pass."""
    c: PretrainedConfig = model.host.config
    tokens, D = shape.rows * shape.positions, c.hidden_size
    attention = 8 * tokens * D**2 + 4 * tokens * shape.positions * D  # four projections; scores and values
    head = 2 * shape.rows * shape.targets * D * (D + c.vocab_size)
    return c.num_hidden_layers * attention + head + expert_flops(model, shape, k, c.num_hidden_layers, 4 * D * c.intermediate_size)
