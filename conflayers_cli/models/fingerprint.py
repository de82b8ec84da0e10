"""What identifies a model's shape, however its weights are stored, and whatever their dtype."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from transformers import PreTrainedConfig

from conflayers_cli.models.support import sizes_by_layer

# Keys of a config that don't change what the layers compute, or only how they are run or trained.
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


def fingerprint(config: PreTrainedConfig) -> dict[str, object]:
    """What identifies a model's shape: architecture, sizes, and a hash of the config.

    The hash (16 hexadecimal digits) covers what the layers compute. It is the same however the
    model was stored and whichever dtype it runs in, and changes with any size, activation or rotary
    setting. For a multimodal model all but ``architecture`` is about its text part.
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
    """The first of the sizes that is set. Families differ in their names for one thing.

    Where layers differ in it, the first layer's: how they differ is the hash's matter.
    """
    return next((sizes[0] for n in names if (sizes := sizes_by_layer(config, n))), None)


def _config_hash(config: PreTrainedConfig) -> str:
    # Only what differs from the class's defaults: a later transformers that knows one more setting
    # then gives the same hash.
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
        # GGUF keeps float32, a config.json the decimal: 9.99999975e-06 and 1e-05 are one number.
        return float(f"{value:.6g}")
    return value if value is None or isinstance(value, bool | int | str) else str(value)
