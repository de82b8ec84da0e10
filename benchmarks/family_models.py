"""Tiny random models of every family of causal decoders that transformers knows.

A family's sizes go by many names. All that a configuration has of them are set to small values
that go together; the rest stays what the family's own defaults say.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers as hf
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 100
DEPTH = 5
WINDOW = 7
MAX_PARAMETERS = 6_000_000

# Not decoders of text by themselves, though transformers lists a class of theirs: encoders,
# decoders that attend to an encoder, models of other media.
# fmt: off
NOT_DECODERS = frozenset(
    (
        "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot",
        "blenderbot-small", "camembert", "data2vec-text", "electra", "ernie", "git", "marian",
        "mbart", "megatron-bert", "mvp", "pegasus", "plbart", "prophetnet", "reformer",
        "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "trocr",
        "whisper", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod",
    )
)
# fmt: on

_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), DEPTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_top_k", "experts_per_token"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim", "head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("sliding_window", "window_size"), WINDOW),
    **dict.fromkeys(("bos_token_id", "eos_token_id"), None),
    "pad_token_id": 0,
    "hidden_size_per_layer_input": 8,
    "tie_word_embeddings": False,
    "max_window_layers": 2,
}
# What some families need beside these: what their defaults don't say, or say of large sizes.
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "cwm": {"bos_token_id": 1, "eos_token_id": 2},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": None,
    },
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gpt_bigcode": {"num_key_value_heads": 1},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16},
    # as published: convolutions with attention between them
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "modernbert-decoder": {"bos_token_id": 1, "eos_token_id": 2},
    "zaya": {"num_experts_per_tok": 1},
}
# Latent attention has as many key heads as query heads once its keys are unpacked.
_LATENT = {"num_key_value_heads": 4}


def families() -> list[str]:
    """The model types that stand for a decoder of text, by name."""
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - NOT_DECODERS
    return sorted(name for name in known if not hf.CONFIG_MAPPING[name].sub_configs)


def tiny_config(family: str) -> Any:
    """A small configuration of a family.

    Raises:
        whatever the family's class raises on sizes that don't go together.
    """
    kind = hf.CONFIG_MAPPING[family]
    defaults = kind()
    known = set(inspect.signature(kind.__init__).parameters) | set(vars(defaults))
    known |= set(kind.attribute_map)
    sizes = {
        name: value
        for name, value in _SIZES.items()
        if name in known and not (name == "sliding_window" and defaults.sliding_window is None)
    }
    latent = _LATENT if "kv_lora_rank" in known else {}
    return kind(**{**sizes, **latent, **_OWN.get(family, {})})


def tiny_model(family: str, seed: int = 0) -> Any:
    """A small random model of a family, float32, in eval mode.

    Weights are drawn large enough for outputs not to settle into one token.
    """
    config = tiny_config(family)
    with torch.device("meta"):
        size = hf.AutoModelForCausalLM.from_config(config).num_parameters()
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size:,} parameters are left at small sizes")
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            spread = 1.0 if "embed" in name else 0.5 if "head" in name else 0.15
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * spread)
    return model.float()
