"""Writes ``docs/compatibility.md``: what a model's files can say that changes text, and what
becomes of it. The table is made of what the code reads; a test compares the two.

    python -m tools.compatibility
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import transformers as hf

from conflayers_cli.kernels.fused_forward import FAMILIES
from conflayers_cli.models.generation_settings import REFUSED, SAMPLING_KEYS
from conflayers_cli.models.gguf_settings import (
    ATTRIBUTES,
    BIASES,
    FACTORS,
    LONG_FACTORS,
    ROPE_KEYS,
    SCALE,
    WINDOW,
)
from conflayers_cli.models.gguf_settings import SAMPLING_KEYS as GGUF_SAMPLING
from conflayers_cli.models.gguf_settings import WITHOUT_EFFECT as GGUF_WITHOUT_EFFECT
from conflayers_cli.models.gguf_splits import PRE_TOKENIZERS
from conflayers_cli.models.gguf_tokenizer import READ_KEYS, TEMPLATE, WHOLE
from conflayers_cli.models.gguf_vocabulary import (
    BYTE_LEVEL,
    END_KEYS,
    ENDS,
    NAMED_TOKENS,
    PREFIX,
    SENTENCEPIECE,
    UNIGRAM,
)

TARGET = Path("docs/compatibility.md")

FOLLOWED = {
    "bad_words_ids": "never produced",
    "begin_suppress_tokens": "never the first token",
    "encoder_no_repeat_ngram_size": "the prompt's n-grams never come again",
    "encoder_repetition_penalty": "the prompt's tokens grow likelier",
    "eos_token_id": "ends the text, with those of the config and the tokenizer",
    "exponential_decay_length_penalty": "ends grow likelier",
    "forced_bos_token_id": "forced behind a prompt of one token",
    "forced_eos_token_id": "forced at the end of the budget",
    "min_length": "no end before",
    "min_new_tokens": "no end before",
    "no_repeat_ngram_size": "such n-grams never come twice",
    "remove_invalid_values": "NaN and infinity become numbers",
    "repetition_penalty": "unless `--repetition-penalty` says otherwise",
    "sequence_bias": "added to the scores",
    "stop_strings": "end the text, as `--stop`",
    "suppress_tokens": "never produced",
}
WITHOUT_EFFECT = {
    "not about text: how it is computed": (
        "cache_config cache_implementation compile_config continuous_batching_config "
        "disable_compile low_memory max_cache_len prefill_chunk_size use_cache"
    ),
    "not about text: transformers' own drafts": (
        "assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight "
        "assistant_lookbehind is_assistant max_matching_ngram_size num_assistant_tokens "
        "num_assistant_tokens_schedule prompt_lookup_num_tokens speculation_type "
        "target_lookbehind use_mtp"
    ),
    "not about text: what is given back": (
        "output_attentions output_hidden_states output_logits output_scores "
        "return_dict_in_generate transformers_version"
    ),
    "only for encoders and decoders": "decoder_start_token_id",
    "only with beams, which are not searched": (
        "diversity_penalty early_stopping length_penalty num_beam_groups renormalize_logits"
    ),
    "the tokenizer's is taken": "bos_token_id pad_token_id",
    "`--max-new-tokens` says how long": "max_length max_new_tokens max_time",
    "`--sampling model` samples, else the options say": "do_sample",
}
TOKENIZER = {
    "add_bos_token, post_processor": "as the tokenizer does; a spelt one is not doubled",
    "added_tokens_decoder": "special ones are no part of the text, unless `--keep-special-tokens`",
    "chat_template": "used for every prompt but with `--raw`",
    "clean_up_tokenization_spaces": "followed, but for BPE, as by transformers",
    "eos_token": "ends the text",
    "model_max_length": "not followed: the config's context counts",
}
CONFIG = {
    "eos_token_id": "ends the text",
    "max_position_embeddings": "the context, with `rope_parameters`",
    "rope_parameters, rope_scaling": "as in transformers; `linear`, `dynamic` and `yarn` lengthen "
    "the context; `dynamic` and `longrope` are decoded up to the trained length",
    "sliding_window, layer_types": "as in transformers: full and sliding attention, others refused",
    "tie_word_embeddings": "as in transformers",
}
_GGUF_TOKENIZER = {
    "model": f"{', '.join((BYTE_LEVEL, *SENTENCEPIECE, UNIGRAM))}; others (`bert`) refused",
    "pre": f"followed: {', '.join(sorted(PRE_TOKENIZERS))}; others, and none, noted",
    "tokens": "followed; tokens spelt alike are written alike",
    "token_type": "control and unknown tokens are found as a whole and are no part of the text, "
    "user-defined ones are found as a whole, bytes are for what is in no piece, unused ones are "
    "no text",
    "scores": "the order of merges of `llama`, unless there are merges; likelihoods of `t5`",
    "merges": "followed",
    "add_bos_token": "followed; without it, as llama.cpp does. A chat begins as its template does",
    "add_eos_token": "followed for plain texts",
    "add_sep_token": "noted unless false",
    "add_space_prefix": "followed by `llama` and `t5`: before a text and behind special tokens",
    "remove_extra_whitespaces": "followed by `t5`",
    "precompiled_charsmap": "followed by `t5`",
}
GGUF = {
    **{
        key: _GGUF_TOKENIZER.get(key.removeprefix(PREFIX), "without an effect where a text goes on")
        for key in READ_KEYS
    },
    **dict.fromkeys(NAMED_TOKENS.values(), "followed; noted where there is no such token"),
    **dict.fromkeys(END_KEYS, "ends the text"),
    NAMED_TOKENS["eos_token"]: "ends the text",
    f"tokens {' '.join(sorted(ENDS))}": "end the text, as in llama.cpp, whatever their type; "
    "`<|end|>` not beside `<|call|>`",
    f"{PREFIX}*, others": "named in a note",
    TEMPLATE: "used as a folder's",
    f"{TEMPLATE}.NAME": "used as a folder's of that name",
    WHOLE: "taken instead of tokens and merges",
    **{key: f"`{name}`, by `--sampling model`" for key, name in GGUF_SAMPLING.items()},
    "general.sampling.*, others": "named in a note",
    "general.name": "special tokens of Phi-3 take the white space behind them",
    "general.type": "refused unless `model`",
    "split.count": "refused unless 1: join the parts",
    f"tensor {FACTORS}": "followed",
    f"tensors {', '.join(LONG_FACTORS)}": "refused",
    **{f"tensor {tensor}": f"`{name}`, where there is one" for tensor, name in BIASES.items()},
    "tensor output.weight": "the head; without it the embedding is",
    "tensor token_embd.weight": "the size of the vocabulary, too",
    **{f"ARCH.{key}": "followed, but for `longrope`: refused" for key in ROPE_KEYS},
    "ARCH.rope.dimension_count": "followed, or refused",
    **{f"ARCH.{key}": f"`{name}`, else noted" for key, name in ATTRIBUTES.items()},
    f"ARCH.{SCALE}": "`query_pre_attn_scalar`, else noted",
    f"ARCH.{WINDOW}": "`sliding_window`, else noted",
    **{f"ARCH.{key}": "without an effect, or told by shapes" for key in GGUF_WITHOUT_EFFECT},
    "ARCH.*, read by transformers": "followed, as transformers does",
    "ARCH.*, read by nobody": "named in a note: scales of embeddings, logits and residuals, "
    "shared keys and values, scales of experts",
}


def generation_rows() -> dict[str, str]:
    """What becomes of each key of a generation config."""
    rows = dict(FOLLOWED)
    for name, usual in REFUSED.items():
        rows[name] = f"not followed, noted unless {' or '.join(map(str, usual))}"
    for name in SAMPLING_KEYS:
        rows[name] = "by `--sampling model`"
    for what, names in WITHOUT_EFFECT.items():
        rows |= dict.fromkeys(names.split(), what)
    return rows


def unknown_keys() -> set[str]:
    """Keys of transformers' generation config that the table does not have."""
    public = {name for name in vars(hf.GenerationConfig()) if not name.startswith("_")}
    return public - generation_rows().keys()


def table(rows: dict[str, str]) -> Iterable[str]:
    yield "| key | what becomes of it |"
    yield "|---|---|"
    for key, what in sorted(rows.items()):
        yield f"| `{key}` | {what} |"


def page() -> str:
    """The page."""
    parts = [
        "# What a model's files say, and what becomes of it",
        "",
        "Keys that change text. Made by `python -m tools.compatibility` of what the code reads.",
        f"Native kernels know {', '.join(sorted(FAMILIES))}; other families run by PyTorch"
        " ([families](families.md)).",
    ]
    for head, rows in (
        ("generation_config.json", generation_rows()),
        ("config.json", CONFIG),
        ("tokenizer_config.json", TOKENIZER),
        ("GGUF", GGUF),
    ):
        parts += ["", f"## {head}", "", *table(rows)]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
