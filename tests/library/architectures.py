"""Tiny models of many architectures, built offline: the data of the architecture matrix (test_architectures.py, docs/architectures.md)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

D, F, LAYERS = 16, 32, 2
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    "vocab_size": 31, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 32, "pad_token_id": 0, **ENDS,
}  # fmt: skip
BERT = {
    "vocab_size": 31, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
BART = {
    "vocab_size": 31, "d_model": D, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": F, "decoder_ffn_dim": F, "max_position_embeddings": 32, "activation_dropout": 0.1,
    "pad_token_id": 0, **ENDS, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
VIT = {"hidden_size": D, "intermediate_size": F, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
AUDIO = {
    **BERT, "conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (4, 4), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "group", "mask_time_prob": 0.0, "apply_spec_augment": False, "layerdrop": 0.0,
}  # fmt: skip
T5 = {
    "vocab_size": 31, "d_model": D, "d_kv": 4, "d_ff": F, "num_layers": LAYERS, "num_decoder_layers": LAYERS, "num_heads": 4,
    "pad_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip
MOE = {**LLAMA, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK = {
    **LLAMA, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "q_lora_rank": 8,
    "num_key_value_heads": 4, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One model class.

    kind: what it reads, a key of `inputs`. model: name of the class in transformers, or a function that builds a model. config: name of the
    class; settings: its arguments, with those of inner configurations as dicts. networks: feed-forward networks that are converted.
    refused: words of the message if it is refused; said: the reason in a few words. needs: packages besides transformers.
    """

    kind: str
    model: str | Callable[[], nn.Module]
    config: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    networks: int = LAYERS
    refused: str | None = None
    said: str = ""
    needs: tuple[str, ...] = ()

    def build(self) -> nn.Module:
        """A model in evaluation mode, every parameter perturbed."""
        torch.manual_seed(0)
        if callable(self.model):
            model = self.model()
        else:
            library = importlib.import_module("transformers")
            model = getattr(library, self.model)(getattr(library, self.config)(**self.settings))
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point() and parameter.requires_grad:  # fixed tables of positions are not saved
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
        return model.eval()

    def inputs(self) -> dict[str, Tensor]:
        """A batch of two."""
        draw = torch.Generator().manual_seed(2)
        ids = torch.randint(3, 30, (2, 7), generator=draw)
        size = self.settings.get("image_size", 16)
        pixels = torch.randn((2, 3, size, size), generator=draw)
        return {
            "text": {"input_ids": ids},
            "pair": {"input_ids": ids, "decoder_input_ids": ids[:, :5]},
            "pixels": {"pixel_values": pixels},
            "audio": {"input_values": torch.randn((2, 320), generator=draw)},
            "mel": {"input_features": torch.randn((2, 8, 40), generator=draw), "decoder_input_ids": ids[:, :5]},
            "spectrum": {"input_values": torch.randn((2, 10, 8), generator=draw)},
            "both": {"input_ids": ids, "pixel_values": pixels},
            "image_text": {"input_ids": torch.cat([torch.full((2, 4), 30), ids], 1), "pixel_values": pixels},
            "timm": {"x": torch.randn((2, 3, 32, 32), generator=draw)},
            "floats": {"x": torch.randn((2, 5, D), generator=draw)},
        }[self.kind]


def _encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 4, F, batch_first=True), LAYERS, enable_nested_tensor=False)


class TorchEncoder(nn.Module):
    """An encoder of torch whose input has a name."""

    def __init__(self):
        super().__init__()
        self.encoder = _encoder()

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


def _timm(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: importlib.import_module("timm").create_model(name, **settings)


def _causal(model: str, config: str, **changes: Any) -> Architecture:
    networks = changes.pop("networks", LAYERS)
    return Architecture("text", model, config, {name: value for name, value in {**LLAMA, **changes}.items() if value is not None}, networks)


def _sparse(model: str, config: str, settings: dict[str, Any], kind: str = "text", besides: str = "") -> Architecture:
    said = f"a mixture of experts already, and `sd.adopt` refuses it: {besides}" if besides else "a mixture of experts already: `sd.adopt`"
    return Architecture(kind, model, config, settings, refused="adopt", said=said)


ARCHITECTURES: dict[str, Architecture] = {
    # decoders
    "GPT-2": Architecture(
        "text", "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": 31, "n_embd": D, "n_layer": LAYERS, "n_head": 4, "n_inner": F, "n_positions": 32, **ENDS},
    ),
    "GPT-Neo": Architecture(
        "text", "GPTNeoForCausalLM", "GPTNeoConfig",
        {**BERT, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4,
         **ENDS},
    ),
    "GPT-NeoX": _causal("GPTNeoXForCausalLM", "GPTNeoXConfig"),
    "GPT-J": Architecture(
        "text", "GPTJForCausalLM", "GPTJConfig",
        {"vocab_size": 31, "n_embd": D, "n_layer": LAYERS, "n_head": 4, "n_inner": F, "n_positions": 32, "rotary_dim": 4, **ENDS},
    ),
    "CodeGen": Architecture(
        "text", "CodeGenForCausalLM", "CodeGenConfig",
        {"vocab_size": 31, "n_embd": D, "n_layer": LAYERS, "n_head": 4, "n_inner": F, "n_positions": 32, "rotary_dim": 4, **ENDS},
    ),
    "GPTBigCode": Architecture(
        "text", "GPTBigCodeForCausalLM", "GPTBigCodeConfig",
        {"vocab_size": 31, "n_embd": D, "n_layer": LAYERS, "n_head": 4, "n_inner": F, "n_positions": 32, **ENDS},
    ),
    "OPT": Architecture(
        "text", "OPTForCausalLM", "OPTConfig",
        {**BERT, "ffn_dim": F, "word_embed_proj_dim": D, **ENDS},
    ),
    "BLOOM": Architecture(
        "text", "BloomForCausalLM", "BloomConfig",
        {"vocab_size": 31, "hidden_size": D, "n_layer": LAYERS, "n_head": 4, "hidden_dropout": 0.1, **ENDS},
    ),
    "MPT": Architecture(
        "text", "MptForCausalLM", "MptConfig", {"vocab_size": 31, "d_model": D, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 32},
    ),
    "Falcon": _causal("FalconForCausalLM", "FalconConfig", ffn_hidden_size=F, head_dim=None),
    "Phi-2": _causal("PhiForCausalLM", "PhiConfig"),
    "Phi-3": _causal("Phi3ForCausalLM", "Phi3Config"),
    "Llama": _causal("LlamaForCausalLM", "LlamaConfig", mlp_bias=True),
    "Llama 4 (dense)": _causal("Llama4ForCausalLM", "Llama4TextConfig", moe_layers=[], intermediate_size_mlp=F, no_rope_layers=[1, 1]),
    "Mistral": _causal("MistralForCausalLM", "MistralConfig"),
    "Qwen2": _causal("Qwen2ForCausalLM", "Qwen2Config"),
    "Qwen3": _causal("Qwen3ForCausalLM", "Qwen3Config"),
    "Gemma": _causal("GemmaForCausalLM", "GemmaConfig"),
    "Gemma 2": _causal("Gemma2ForCausalLM", "Gemma2Config"),
    "Gemma 3": _causal("Gemma3ForCausalLM", "Gemma3TextConfig"),
    "Gemma 3n": _causal(
        "Gemma3nForCausalLM", "Gemma3nTextConfig", intermediate_size=[F, F], activation_sparsity_pattern=[0.0, 0.0],
        vocab_size_per_layer_input=31, hidden_size_per_layer_input=8, num_kv_shared_layers=0, laurel_rank=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "Cohere": _causal("CohereForCausalLM", "CohereConfig"),
    "StableLM": _causal("StableLmForCausalLM", "StableLmConfig"),
    "OLMo": _causal("OlmoForCausalLM", "OlmoConfig"),
    "OLMo 2": _causal("Olmo2ForCausalLM", "Olmo2Config"),
    "OLMo 3": _causal("Olmo3ForCausalLM", "Olmo3Config"),
    "Starcoder2": _causal("Starcoder2ForCausalLM", "Starcoder2Config"),
    "Nemotron": _causal("NemotronForCausalLM", "NemotronConfig"),
    "Granite": _causal("GraniteForCausalLM", "GraniteConfig"),
    "SmolLM3": _causal("SmolLM3ForCausalLM", "SmolLM3Config"),
    "GLM": _causal("GlmForCausalLM", "GlmConfig"),
    "GLM-4": _causal("Glm4ForCausalLM", "Glm4Config"),
    "Ministral": _causal("MinistralForCausalLM", "MinistralConfig", layer_types=["full_attention"] * 2),
    "XGLM": Architecture(
        "text", "XGLMForCausalLM", "XGLMConfig",
        {"vocab_size": 31, "d_model": D, "ffn_dim": F, "num_layers": LAYERS, "attention_heads": 4, "max_position_embeddings": 32,
         "activation_dropout": 0.1, "pad_token_id": 0, **ENDS},
    ),
    "BioGPT": _causal("BioGptForCausalLM", "BioGptConfig", activation_dropout=0.1),
    "XLNet": Architecture(
        "text", "XLNetLMHeadModel", "XLNetConfig",
        {"vocab_size": 31, "d_model": D, "n_layer": LAYERS, "n_head": 4, "d_inner": F, "pad_token_id": 0, **ENDS},
    ),
    # encoders
    "BERT": Architecture("text", "BertForMaskedLM", "BertConfig", BERT),
    "BERT, in chunks": Architecture("text", "BertForMaskedLM", "BertConfig", {**BERT, "chunk_size_feed_forward": 7}),
    "RoBERTa": Architecture("text", "RobertaForMaskedLM", "RobertaConfig", BERT),
    "XLM-RoBERTa": Architecture("text", "XLMRobertaForMaskedLM", "XLMRobertaConfig", BERT),
    "DistilBERT": Architecture(
        "text", "DistilBertForMaskedLM", "DistilBertConfig",
        {"vocab_size": 31, "dim": D, "hidden_dim": F, "n_layers": LAYERS, "n_heads": 4, "max_position_embeddings": 32, "pad_token_id": 0},
    ),
    "ELECTRA": Architecture("text", "ElectraForMaskedLM", "ElectraConfig", {**BERT, "embedding_size": D}),
    "DeBERTa-v2": Architecture(
        "text", "DebertaV2ForMaskedLM", "DebertaV2Config", {**BERT, "relative_attention": True, "max_relative_positions": 8},
    ),
    "ALBERT": Architecture("text", "AlbertForMaskedLM", "AlbertConfig", {**BERT, "embedding_size": 8}, networks=1),
    "ModernBERT": Architecture("text", "ModernBertForMaskedLM", "ModernBertConfig", {**BERT, "cls_token_id": 1, "sep_token_id": 2}),
    "XLM": Architecture(
        "text", "XLMWithLMHeadModel", "XLMConfig",
        {"vocab_size": 31, "emb_dim": D, "n_layers": LAYERS, "n_heads": 4, "max_position_embeddings": 32, "n_langs": 1, "pad_index": 0,
         "pad_token_id": 0, **ENDS},
    ),
    "MPNet": Architecture("text", "MPNetForMaskedLM", "MPNetConfig", BERT),
    "Longformer": Architecture(
        "text", "LongformerForMaskedLM", "LongformerConfig", {**BERT, "attention_window": 4, "max_position_embeddings": 64},
    ),
    "MobileBERT": Architecture(
        "text", "MobileBertForMaskedLM", "MobileBertConfig", {**BERT, "embedding_size": D, "intra_bottleneck_size": 8}, networks=8,
    ),
    "Funnel": Architecture(
        "text", "FunnelForMaskedLM", "FunnelConfig",
        {"vocab_size": 31, "block_sizes": [1, 1], "d_model": D, "n_head": 4, "d_head": 4, "d_inner": F, "num_decoder_layers": 1},
        networks=3,
    ),
    "FNet": Architecture("text", "FNetForMaskedLM", "FNetConfig", BERT),
    "ESM": Architecture("text", "EsmForMaskedLM", "EsmConfig", {**BERT, "mask_token_id": 3}),
    # encoder-decoders
    "BART": Architecture("pair", "BartForConditionalGeneration", "BartConfig", BART, networks=4),
    "mBART": Architecture("pair", "MBartForConditionalGeneration", "MBartConfig", BART, networks=4),
    "Pegasus": Architecture("pair", "PegasusForConditionalGeneration", "PegasusConfig", BART, networks=4),
    "Marian": Architecture("pair", "MarianMTModel", "MarianConfig", BART, networks=4),
    "M2M100": Architecture("pair", "M2M100ForConditionalGeneration", "M2M100Config", BART, networks=4),
    "Blenderbot": Architecture("pair", "BlenderbotForConditionalGeneration", "BlenderbotConfig", BART, networks=4),
    "T5": Architecture("pair", "T5ForConditionalGeneration", "T5Config", T5, networks=4),
    "T5 v1.1": Architecture("pair", "T5ForConditionalGeneration", "T5Config", {**T5, "feed_forward_proj": "gated-gelu"}, networks=4),
    "ProphetNet": Architecture(
        "pair", "ProphetNetForConditionalGeneration", "ProphetNetConfig",
        {"vocab_size": 31, "hidden_size": D, "num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": 4,
         "num_decoder_attention_heads": 4, "encoder_ffn_dim": F, "decoder_ffn_dim": F, "max_position_embeddings": 32, "pad_token_id": 0,
         **ENDS, "decoder_start_token_id": 1, "activation_dropout": 0.1},
        networks=4,
    ),
    # speech
    "Whisper": Architecture(
        "mel", "WhisperForConditionalGeneration", "WhisperConfig",
        {**BART, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32, "suppress_tokens": None,
         "begin_suppress_tokens": None},
        networks=4,
    ),
    "wav2vec 2.0": Architecture("audio", "Wav2Vec2ForCTC", "Wav2Vec2Config", {**AUDIO, "activation_dropout": 0.1}),
    "HuBERT": Architecture("audio", "HubertForCTC", "HubertConfig", AUDIO),
    "WavLM": Architecture("audio", "WavLMForCTC", "WavLMConfig", AUDIO),
    "AST": Architecture(
        "spectrum", "ASTModel", "ASTConfig",
        {**VIT, "num_mel_bins": 8, "max_length": 10, "patch_size": 4, "frequency_stride": 4, "time_stride": 4},
    ),
    # vision
    "ViT": Architecture("pixels", "ViTForImageClassification", "ViTConfig", VIT),
    "DeiT": Architecture("pixels", "DeiTForImageClassification", "DeiTConfig", VIT),
    "BEiT": Architecture("pixels", "BeitForImageClassification", "BeitConfig", VIT),
    "DINOv2": Architecture("pixels", "Dinov2Model", "Dinov2Config", {**VIT, "mlp_ratio": 2}),
    "DINOv2 (SwiGLU)": Architecture("pixels", "Dinov2Model", "Dinov2Config", {**VIT, "mlp_ratio": 2, "use_swiglu_ffn": True}),
    "Swin": Architecture(
        "pixels", "SwinForImageClassification", "SwinConfig",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [4, 4], "window_size": 2, "mlp_ratio": 2.0},
    ),
    "ConvNeXt": Architecture(
        "pixels", "ConvNextForImageClassification", "ConvNextConfig",
        {"image_size": 32, "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    ),
    "PoolFormer": Architecture(
        "pixels", "PoolFormerForImageClassification", "PoolFormerConfig",
        {"image_size": 32, "depths": [1, 1], "hidden_sizes": [8, 16], "num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2],
         "padding": [2, 1], "mlp_ratio": 2.0},
    ),
    "wav2vec 2.0 Conformer": Architecture(
        "audio", "Wav2Vec2ConformerForCTC", "Wav2Vec2ConformerConfig", {**AUDIO, "conv_depthwise_kernel_size": 3}, networks=4,
    ),
    "DETR": Architecture(
        "pixels", "DetrForObjectDetection", "DetrConfig",
        {"d_model": D, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
         "encoder_ffn_dim": F, "decoder_ffn_dim": F, "num_queries": 3, "use_timm_backbone": False, "backbone": None,
         "backbone_config": {"model_type": "resnet", "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1]},
         "activation_dropout": 0.1, "image_size": 32},
    ),
    # several towers
    "CLIP": Architecture(
        "both", "CLIPModel", "CLIPConfig", {"text_config": {**BERT, **ENDS}, "vision_config": VIT}, networks=4,
    ),
    "SigLIP": Architecture("both", "SiglipModel", "SiglipConfig", {"text_config": BERT, "vision_config": VIT}, networks=5),
    "LLaVA": Architecture(
        "image_text", "LlavaForConditionalGeneration", "LlavaConfig",
        {"text_config": {**LLAMA, "model_type": "llama"}, "vision_config": {**VIT, "model_type": "clip_vision_model"},
         "image_token_index": 30,
         "vision_feature_layer": -1, "image_seq_length": 4},
        networks=4,
    ),
    # torch and timm
    "nn.TransformerEncoder": Architecture("floats", TorchEncoder),
    "timm ViT": Architecture(
        "timm", _timm("vit_tiny_patch16_224", img_size=32, embed_dim=D, depth=2, num_heads=4, mlp_ratio=2), needs=("timm", "torchvision"),
    ),
    # refused
    "Mixtral": _sparse("MixtralForCausalLM", "MixtralConfig", MOE),
    "OLMoE": _sparse("OlmoeForCausalLM", "OlmoeConfig", MOE),
    "Qwen2-MoE": _sparse("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**MOE, "shared_expert_intermediate_size": F}),
    "Qwen3-MoE": _sparse("Qwen3MoeForCausalLM", "Qwen3MoeConfig", MOE),
    "DeepSeek-V3": _sparse("DeepseekV3ForCausalLM", "DeepseekV3Config", DEEPSEEK),
    "Switch": _sparse(
        "SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig",
        {**T5, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}, "pair",
    ),
    "GPT-OSS": _sparse("GptOssForCausalLM", "GptOssConfig", MOE, besides="it returns a tuple"),
    "NLLB-MoE": _sparse(
        "NllbMoeForConditionalGeneration", "NllbMoeConfig", {**BART, "num_experts": 4, "encoder_sparse_step": 1, "decoder_sparse_step": 1},
        "pair", "its experts have several dropouts",
    ),
    "Jamba": _sparse("JambaForCausalLM", "JambaConfig", {**MOE, "use_mamba_kernels": False}),
    "GraniteMoE": _sparse("GraniteMoeForCausalLM", "GraniteMoeConfig", MOE),
    "Llama 4": _sparse("Llama4ForCausalLM", "Llama4TextConfig", {**MOE, "intermediate_size_mlp": F}, besides="it returns a tuple"),
    "Mamba": Architecture(
        "text", "MambaForCausalLM", "MambaConfig",
        {"vocab_size": 31, "hidden_size": D, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 2}, refused="convolution",
        said="no FFN, a convolution lies between its maps",
    ),
    "SegFormer": Architecture(
        "pixels", "SegformerForImageClassification", "SegformerConfig",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2, "num_attention_heads": [1, 2], "sr_ratios": [2, 1],
         "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]},
        refused="convolution", said="a convolution lies in its FFN",
    ),
    "ConvNeXt V2": Architecture(
        "pixels", "ConvNextV2ForImageClassification", "ConvNextV2Config",
        {"image_size": 32, "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, refused="grn",
        said="a response normalisation lies in its FFN",
    ),
    "LeViT": Architecture(
        "pixels", "LevitModel", "LevitConfig",
        {"image_size": 32, "hidden_sizes": [16, 16], "num_attention_heads": [2, 2], "depths": [1, 1], "key_dim": [8, 8],
         "mlp_ratio": [2, 2], "attention_ratio": [2, 2], "down_ops": [["Subsample", 8, 2, 2, 2, 2], [""]]}, refused="norm",
        said="each map has a batch norm",
    ),
    "Apertus": Architecture("text", "ApertusForCausalLM", "ApertusConfig", LLAMA, refused="XIELU", said="its activation has parameters"),
}  # fmt: skip
