"""Tiny models by the native library, for its tests."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers as hf

from conflayers_cli.kernels import native_library
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.kernels.native_forward import NativeForward
from conflayers_cli.skip_plan import SkipPlan
from tests import tiny

FAMILIES = ("llama", "mistral", "qwen2", "qwen2-mixed", "qwen3", "phi3", "olmo2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MISSING = native_library.unavailable_reason()
UNITS = () if MISSING else native_library.available_units()
FULL = SkipPlan()
WIDE = {
    **tiny.LLAMA_LIKE,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "vocab_size": 2500,
}
"""Groups of 3 heads, no multiples of a vector's or a panel's size, several slices of logits."""


@functools.cache
def model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    if family == "wide":
        return tiny.build(hf.LlamaConfig(**WIDE), dtype=dtype)
    if family == "wide-window":
        return tiny.build(hf.MistralConfig(**WIDE, sliding_window=150), dtype=dtype)
    return tiny.build(tiny.CONFIGS[family](), dtype=dtype)


@functools.cache
def forward(
    family: str, dtype: torch.dtype = torch.float32, unit: str | None = None
) -> NativeForward:
    made = model(family, dtype)
    return NativeForward(made, made.model.layers, made.config, unit=unit)


def new_cache(family: str, batch: int = 1, capacity: int = 64) -> KVCache:
    return KVCache(model(family).config.num_hidden_layers, batch, capacity)


def tokens_of(family: str, batch: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model(family).config.vocab_size, (batch, width), generator=generator)


def places(batch: int, begin: int, end: int) -> torch.Tensor:
    return torch.arange(begin, end).expand(batch, -1)


def by_modules(family: str, dtype: torch.dtype, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(family, dtype)(tokens).logits
    return logits
