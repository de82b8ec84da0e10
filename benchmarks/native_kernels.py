"""What passes of the native library cost by width, beside the memory's speed and today's engine.

Random weights in the shapes of SmolLM2-135M and of a 1.07B Llama; everything takes turns. Shown are
the median over all rounds and the least, and ratios of the least: what else the machine does only
adds time. "of memory" is what a pass reads over what a plain reading of memory reaches in the
same time, by as many threads.

    python -m benchmarks.native_kernels --shape smollm2 --engine
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as hf

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.kernels.native_forward import NativeForward
from conflayers_cli.kernels.native_library import (
    available_units,
    read_memory,
    usable_threads,
)
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.utils.environment import processor_name

SHAPES: dict[str, dict[str, int]] = {
    "smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
WIDTHS = (1, 2, 4, 8, 16)
INT4_WIDTHS = (1, 2, 8)
PLAN = SkipPlan()
PROBE = 256 << 20
"""Bytes of the plain reading: well beyond any cache."""


def build(shape: str, dtype: torch.dtype) -> Any:
    """A Llama of a shape, with random weights."""
    config = hf.LlamaConfig(
        **SHAPES[shape], vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=16384
    )
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config, dtype=dtype)
    rotary = type(model.model.rotary_emb)(config=config)
    model = model.to_empty(device="cpu")
    model.model.rotary_emb = rotary
    model.tie_weights()
    small = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.fill_(1)
        else:
            repeats = -(-weight.numel() // small.numel())
            weight.data.copy_(small.repeat(repeats)[: weight.numel()].view_as(weight))
    return model.eval()


def filled_cache(model: Any, context: int) -> KVCache:
    """A cache whose slots hold random numbers."""
    config = model.config
    cache = KVCache(config.num_hidden_layers, 1, context + 64)
    heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    empty = torch.empty((1, heads, 0, size), dtype=model.dtype)
    for layer in cache.layers:
        layer.lazy_initialization(empty, empty)
        layer.keys.normal_()
        layer.values.normal_()
    return cache


def arguments(width: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(49152, (1, width), generator=torch.Generator().manual_seed(width))
    return tokens, torch.arange(context, context + width)[None]


def native_pass(
    forward: NativeForward, cache: KVCache, context: int, width: int, int4: bool
) -> None:
    tokens, positions = arguments(width, context)
    forward.choose(tokens, positions, None, cache, PLAN, 0, int4)


def engine_pass(decoder: Decoder, cache: KVCache, context: int, width: int, plan: SkipPlan) -> None:
    tokens, positions = arguments(width, context)
    decoder.forward(tokens, positions, cache, plan).max(dim=-1)


def measure(
    cases: dict[str, Callable[[], object]], rounds: int, seconds: float
) -> dict[str, tuple[float, float]]:
    """(median, least) milliseconds of each case; they take turns until the time is over."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for run in cases.values():
        run()
    end = time.perf_counter() + seconds
    for _ in range(rounds):
        for name, run in cases.items():
            begin = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - begin))
        if time.perf_counter() > end:
            break
    return {name: (statistics.median(found), min(found)) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--threads", type=int, default=usable_threads())
    parser.add_argument("--unit", choices=available_units())
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--engine", action="store_true", help="today's engine too")
    chosen = parser.parse_args()
    model = build(chosen.shape, getattr(torch, chosen.dtype))
    forward = NativeForward(model, model.model.layers, model.config, unit=chosen.unit)
    forward.threads = chosen.threads
    cache = filled_cache(model, chosen.context)
    memory = torch.ones(PROBE, dtype=torch.uint8)
    cases: dict[str, Callable[[], object]] = {"read": partial(read_memory, memory, chosen.threads)}
    for int4, widths in ((False, chosen.widths), (True, INT4_WIDTHS)):
        for width in widths:
            name = f"{'int4' if int4 else 'own'} {width}"
            cases[name] = partial(native_pass, forward, cache, chosen.context, width, int4)
    own_bytes = forward.nbytes
    native_pass(forward, cache, chosen.context, 1, True)
    int4_bytes = forward.nbytes - own_bytes
    if chosen.engine:
        decoder = Decoder(model)
        for int4, widths in ((False, chosen.widths), (True, INT4_WIDTHS)):
            plan = SkipPlan(weights="int4") if int4 else PLAN
            for width in widths:
                name = f"engine {'int4' if int4 else 'own'} {width}"
                cases[name] = partial(engine_pass, decoder, cache, chosen.context, width, plan)
    found = measure(cases, chosen.rounds, chosen.seconds)
    speed = PROBE / found["read"][1] / 1e6
    shown = f"{chosen.shape}, {chosen.dtype}, context {chosen.context}, {chosen.threads} threads"
    print(f"{processor_name()}: {shown}, {chosen.unit or available_units()[0]}")
    print(f"{'reading':>16} {speed:8.1f} GB/s")
    kv = 2 * sum(y.keys[:, :, : chosen.context].nbytes for y in cache.layers)
    for name, (median, least) in found.items():
        if name == "read":
            continue
        line = (
            f"{name:>16} {median:8.2f} {least:8.2f} ms {least / found['own 1'][1]:6.2f} of a step"
        )
        if not name.startswith("engine") and name.endswith(" 1"):
            read = (int4_bytes if "int4" in name else own_bytes) + kv
            line += f", {read / least / 1e6 / speed:5.0%} of memory"
        print(line)


if __name__ == "__main__":
    main()
