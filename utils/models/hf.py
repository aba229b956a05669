"""Any causal language model of the transformers library, or for fine-tuning any encoder or decoder, as its folder has it: dense, or
converted by smoe_dropout.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from smoe_dropout import moe_layers
from smoe_dropout.hf.described import described, entries_of
from smoe_dropout.hf.loading import read_config
from smoe_dropout.options import ConfigError
from utils.checkpoints.origin import open_source
from utils.checkpoints.run_files import MODEL
from utils.data.meta import Tokens
from utils.errors import UserError
from utils.flags.derive import method_of
from utils.flags.fields import FinetuneFlags, Flags
from utils.flags.models import TRANSFORMERS_FIELDS
from utils.models.bert import attention
from utils.models.flops import expert_flops
from utils.models.registry import Shape

SIZES = ("n_layer", "d_model", "n_head", "d_ff", "d_inner")


class CausalLM(nn.Module):
    """A model of transformers as `host`, called as model(tokens, targets, state)."""

    def __init__(self, host: nn.Module):
        super().__init__()
        self.host = host

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor, state: None = None) -> tuple[Tensor, None, Tensor]:
        """Losses [B, T] in nats and logits [B, T, V]; `state` is unused."""
        logits_BTV = self.host(tokens_BT, use_cache=False).logits.float()
        losses = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none")
        return losses.view_as(targets_BT), None, logits_BTV


def build(flags: Flags, vocabulary: Tokens | None = None) -> CausalLM:
    """The model with the weights of its folder. UserError for one without a head that predicts the next token, unless it is fine-tuned."""
    tunes = isinstance(flags, FinetuneFlags)
    given, made = Path(flags.checkpoint if tunes else flags.start_from), Path(flags.work_dir or "") / MODEL
    source = open_source(made if made.is_dir() and not given.exists() else given)
    folder, method = source.weights.parent, method_of(flags)
    if method and method.layer and source.flags.get("method") != method.name:
        raise UserError(f"--method {method.name} has layers of its own, which {source.path} has not: convert a model with this method")
    config, _ = read_config(folder, {})
    for name in ("dropout", "dropatt"):
        if hasattr(config, field := TRANSFORMERS_FIELDS[name][0]):
            setattr(config, field, getattr(flags, name))
    length, flag = (flags.max_length, "max_length") if tunes else (flags.tgt_len, "tgt_len")
    if length > (most := source.flags.get("max_length", length)):
        raise UserError(f"--{flag} {length} must be at most the {most} positions of {source.path}")
    if entries := entries_of(config):
        own = {"freeze_router": flags.freeze_gate, "balance_loss": flags.load_balance, "backend": flags.expert_backend}
        config = described(config, [entries[0] | own])
    classes = [str(name) for name in config.architectures or []]
    if not tunes and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in classes):
        raise UserError(f"{source.path} holds a {' or '.join(classes)}, which is no causal language model: use finetune.py for it")
    kind = AutoModel if tunes else AutoModelForCausalLM
    try:
        host = kind.from_pretrained(folder, config=config, dtype=torch.float32, attn_implementation=attention(flags))
    except (ConfigError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"the checkpoint {source.path} cannot be loaded: {' '.join(str(error).split())}") from None
    size = host.get_input_embeddings().weight.shape[0]
    if vocabulary is not None and vocabulary.size > size:
        raise UserError(f"{source.path} has {size:,} tokens, and the tokenizer of {vocabulary.name} {vocabulary.size:,}: give its own")
    return CausalLM(host)


def blocks(model: CausalLM) -> nn.ModuleList:
    """The first list of as many modules as the configuration has layers."""
    layers = model.host.config.get_text_config().num_hidden_layers
    return next(part for part in model.host.modules() if isinstance(part, nn.ModuleList) and len(part) == layers)


def hidden_states(model: CausalLM, tokens_NT: Tensor, lengths_N: Tensor) -> Tensor:
    inside_NT = torch.arange(tokens_NT.shape[1], device=tokens_NT.device) < lengths_N[:, None]
    more = {"use_cache": False} if hasattr(model.host.config, "use_cache") else {}
    return model.host(tokens_NT, attention_mask=inside_NT.long(), **more)[0]


def summary(hidden_NTD: Tensor, lengths_N: Tensor) -> Tensor:
    """The mean of the hidden states of each row's tokens, without padding, as sentence encoders are pooled (arXiv 1908.10084)."""
    inside_NT1 = (torch.arange(hidden_NTD.shape[1], device=hidden_NTD.device) < lengths_N[:, None])[..., None]
    return (hidden_NTD * inside_NT1).sum(1) / lengths_N[:, None]


def without_head(model: CausalLM) -> CausalLM:
    """Without the layer that some encoders have for their first position."""
    if getattr(model.host, "pooler", None) is not None:
        model.host.pooler = None
    return model


def forward_flops(model: CausalLM, shape: Shape, k: int | None) -> int:
    """Operations of one forward pass: of every matrix outside the experts and embeddings, of attention, and of the experts."""
    config, experts = model.host.config.get_text_config(), {id(part) for _, layer in moe_layers(model) for part in layer.modules()}
    outside = [part for part in model.host.modules() if id(part) not in experts and not isinstance(part, nn.Embedding)]
    matrices = sum(own.numel() for part in outside for own in part.parameters(recurse=False) if own.dim() == 2)
    head = model.host.get_output_embeddings()
    head = 0 if head is None else head.weight.numel()
    tokens, targets = shape.rows * shape.positions, shape.positions if shape.targets is None else shape.targets
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    attended = 4 * tokens * shape.positions * width * config.num_hidden_layers
    return 2 * tokens * (matrices - head) + 2 * shape.rows * targets * head + attended + expert_flops(model, shape, k, 0, 0)
