"""Config fingerprint: a model's architecture and sizes, and a hash of its configuration.

It does not depend on the weights, which :mod:`.weight_sketch` compares, nor on dtype or files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from transformers import PreTrainedConfig

from conflayers_cli.models.support import sizes_by_layer

# Keys of a config that don't change what the layers compute
_VOLATILE = re.compile(
    r"_.*|conflayers_.*|.*_token_id|.*_dropout|.*dropout|.*_pdrop|.*attn_implementation"
    r"|architectures|auto_map|transformers_version|dtype|torch_dtype|use_cache|name_or_path"
    r"|id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params"
    r"|quantization_config|distributed_config|pretraining_tp|initializer_range|gradient_checkpointing"
    r"|output_attentions|output_hidden_states|return_dict|chunk_size_feed_forward|prefix|tokenizer_class"
    r"|max_length|min_length|do_sample|temperature|top_k|top_p|typical_p|num_beams|early_stopping"
    r"|repetition_penalty|length_penalty|no_repeat_ngram_size|bad_words_ids|generation_config"
)

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


def config_fingerprint(config: PreTrainedConfig) -> dict[str, object]:
    """Architecture, sizes, and a hash (16 hexadecimal digits) of what the layers compute.

    The hash changes with any size, activation or rotary setting. For a multimodal model all but
    ``architecture`` is of its text config.
    """
    text = config.get_text_config()
    heads = _first(text, "num_attention_heads")
    architectures = getattr(config, "architectures", None)
    return {
        "architecture": architectures[0] if architectures else type(config).__name__,
        "depth": getattr(text, "num_hidden_layers", None),
        "hidden_size": getattr(text, "hidden_size", None),
        "attention_heads": heads,
        "key_value_heads": _first(text, "num_key_value_heads", "num_kv_heads") or heads,
        "intermediate_size": _first(text, "intermediate_size", "ffn_dim", "n_inner"),
        "vocabulary": getattr(text, "vocab_size", None),
        "config_hash": _config_hash(text),
    }


def _first(config: PreTrainedConfig, *names: str) -> int | None:
    """The first of these sizes that is set, of the first layer where layers differ."""
    return next((sizes[0] for n in names if (sizes := sizes_by_layer(config, n))), None)


def _config_hash(config: PreTrainedConfig) -> str:
    # without defaults: a later transformers that adds a setting then gives the same hash
    content = _canonical(config.to_diff_dict())
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _canonical(value: Any) -> Json:
    if isinstance(value, Mapping):
        items = ((str(k), v) for k, v in value.items())
        return {k: _canonical(v) for k, v in items if not _VOLATILE.fullmatch(k)}
    if isinstance(value, list | tuple):
        return [_canonical(v) for v in value]
    if isinstance(value, float):
        # GGUF has float32 for a config.json's decimal: 9.99999975e-06 for 1e-05
        return float(f"{value:.6g}")
    return value if value is None or isinstance(value, bool | int | str) else str(value)
