"""Choosing the dtype that a model runs in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig

from conflayers_cli.errors import InputError
from conflayers_cli.utils.error_text import did_you_mean

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
)
SLOWER = 1.1
"""bfloat16 is not chosen from this ratio of times on, a margin beyond noise."""

_BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
_WORKING_SET = 48 * 2**20
"""Bytes of weights that the products read: more than most caches hold."""
_BLOCK = 4 * 2**20
"""Most bytes of weights timed at once."""
_ROUNDS = 5
# A pass of one token runs two rows in half precision (see `BatchInvariance`), and one in float32.
_ROWS = ((torch.float32, 1), (torch.bfloat16, 2))

Measure = Callable[[PreTrainedConfig], float]
MeasureNative = Callable[[PreTrainedConfig], float | None]
"""The same for kernels that need no instructions for bfloat16; None: they don't run the model."""


def check_dtype(spec: str) -> None:
    """Raise InputError unless ``spec`` is ``auto`` or names a dtype."""
    if spec != "auto" and spec not in DTYPES:
        names = ("auto", *DTYPES)
        hint = did_you_mean(spec, names)
        raise InputError(f"unknown dtype {spec!r}: {', '.join(names)}{hint}")


def choose_dtype(
    spec: str,
    device: torch.device,
    config: PreTrainedConfig,
    measure: Measure | None = None,
    native: MeasureNative | None = None,
) -> tuple[torch.dtype, str]:
    """The dtype that ``spec`` (`DTYPES` or ``auto``) names on ``device``, and a sentence on why.

    ``auto`` on a processor is bfloat16 unless what runs takes `SLOWER` of float32's time or more:
    by ``native``, where that gives a figure; else, on a processor with bfloat16 instructions, by
    ``measure`` (by default `measure_bfloat16_ratio`).
    """
    check_dtype(spec)
    if spec != "auto":
        return DTYPES[spec], f"{spec}, as asked for"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return torch.bfloat16, "bfloat16: the GPU computes in it"
        return torch.float16, "float16: the GPU has no bfloat16"
    if device.type == "mps":
        return torch.float16, "float16: usual on MPS"
    ratio = native(config) if native else None
    if ratio is not None:
        found = f"a step's products take {ratio:.2f} of float32's time (measured, native kernels)"
        if ratio >= SLOWER:
            return torch.float32, f"float32: in bfloat16 {found}"
        return torch.bfloat16, f"bfloat16: {found}"
    abilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch >= 2.6
    instructions = next((name for name in _BF16_INSTRUCTIONS if abilities.get(name)), None)
    if instructions is None:
        return torch.float32, "float32: the processor has no bfloat16 instructions"
    ratio = (measure or measure_bfloat16_ratio)(config)
    found = f"a step's products take {ratio:.2f} of float32's time (measured)"
    if ratio >= SLOWER:
        return torch.float32, f"float32: in bfloat16 {found}, despite {instructions} instructions"
    return torch.bfloat16, f"bfloat16: the processor has {instructions} instructions, and {found}"


@torch.inference_mode()
def measure_bfloat16_ratio(config: PreTrainedConfig) -> float:
    """bfloat16's time over float32's for the products of gated MLPs of the model's sizes.

    Both dtypes read the same bytes, twice as many bfloat16 weights, by turns, in blocks of less
    than a millisecond. Compared is the lower quartile of the time per weight, which other work on
    the machine leaves alone, on one thread, as several would wait for each other. Takes 70 ms.
    """
    hidden, inner, layers = _sizes(config)
    size = min(_WORKING_SET, layers * 3 * hidden * inner * torch.float32.itemsize)
    # filled: memory never written to is one page of zeros
    memory = torch.full((size // torch.bfloat16.itemsize,), 0.01, dtype=torch.bfloat16)
    blocks = {dtype: _carve(memory.view(dtype), hidden, inner) for dtype, _ in _ROWS}
    times: dict[torch.dtype, list[float]] = {dtype: [] for dtype, _ in _ROWS}
    with _one_thread():
        for round_ in range(_ROUNDS + 1):
            for dtype, rows in _ROWS:
                found = _times_per_weight(blocks[dtype], rows)
                if round_:  # the first round warms up
                    times[dtype] += found
    one, other = (sorted(times[dtype])[len(times[dtype]) // 4] for dtype, _ in _ROWS)
    return other / one


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _sizes(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Hidden size, intermediate size and number of layers."""
    text = config.get_text_config()

    def size(*names: str) -> int | None:
        values = (getattr(text, name, None) for name in names)
        return next((value for value in values if isinstance(value, int) and value > 0), None)

    hidden = size("hidden_size", "n_embd", "d_model") or 1024
    inner = size("intermediate_size", "ffn_dim", "n_inner", "d_ff") or 4 * hidden
    return hidden, inner, size("num_hidden_layers", "n_layer") or 1


_Blocks = list[tuple[torch.Tensor, torch.Tensor]]


def _carve(memory: torch.Tensor, hidden: int, inner: int) -> _Blocks:
    """Pairs of gate and up ``[2·I, H]`` and down ``[H, I]``, of whole layers or parts of one."""
    most = min(_BLOCK // memory.itemsize, memory.numel()) // (3 * hidden)
    rows = max(1, min(inner, most))
    layer = 3 * hidden * rows
    blocks = []
    for begin in range(0, memory.numel() - layer + 1, layer):
        up, down = memory[begin : begin + layer].split((2 * hidden * rows, hidden * rows))
        blocks.append((up.view(2 * rows, hidden), down.view(hidden, rows)))
    return blocks


def _times_per_weight(blocks: _Blocks, rows: int) -> list[float]:
    """Seconds per weight of the products of ``rows`` rows with each block."""
    states = torch.full((rows, blocks[0][0].shape[1]), 0.1, dtype=blocks[0][0].dtype)
    times = []
    for up, down in blocks:
        begin = time.perf_counter()
        F.linear(F.linear(states, up)[:, : down.shape[1]], down)
        times.append((time.perf_counter() - begin) / (up.numel() + down.numel()))
    return times
