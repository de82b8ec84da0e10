"""Attention of a few tokens over a long cache on a GPU, reading only the filled part of it.

"Flash decoding" (Dao, Haziza, Massa, Sizov, 2023): the slots are split among many programs, so that
the whole card reads one sequence's cache at once. Each program keeps a running softmax over its
slots (Milakov & Gimelshein, arXiv 1805.02867), and a second kernel puts the splits together. There
is no mask in memory: positions and slots of the tokens say what each of them sees. Query heads that
share a key/value head are rows of one program; keys and values are never repeated.

Grid, memory and kernels follow from shapes alone, so a call can be captured in a CUDA graph and
replayed at any length of text.

**Bits.** A row's output depends on its own query and on the keys and values that it sees at their
slots, not on the number of tokens and sequences, the other rows, the cache's capacity, or what lies
in slots that it doesn't see:

* Splits and the blocks in them begin at fixed slots, and every block of rows has one size. Sizes
  and strides are arguments that no code is specialised on: one compiled kernel serves every call
  for one model, with one order of additions, and treats all rows of its block alike.
* A split's sums always run over all of its blocks. A row's score at a slot that it doesn't see is
  -inf, whatever was read there: the maximum stays, the factor on the sum so far is exp2(0) = 1, and
  zeros are added. Not having read the slot gives the same.
* Where a value isn't finite the split is summed again without it, in the same steps, so that zero
  weights don't make NaN of it; a row that does see one gets NaN in that feature.
* The combining kernel goes over the splits that the row itself sees, in fixed chunks from the first
  of them on.

A token in another slot than its position's (see `.decoder.Decoder.forward`) finds its own key
elsewhere in that order, and may round otherwise than in the slot of its position.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch

ROWS = 16
"""Rows of a program: the fewest that tensor cores take, and the same for any number of tokens."""
SPLIT = 256
"""Slots of a split. At 512 slots and eight key/value heads 16 programs read, at 16k 512 do. Of four
rows of bfloat16 a split's results are 1/64 of what it reads, of sixteen 1/16."""
CHUNK = 64
"""Splits that the combining kernel takes at once: all of 16k slots."""
MAX_COLUMNS = 64
"""Features of a program of the combining kernel."""
PROGRAMS = 1024
"""Programs beyond which each takes several splits in turn: some eight per processor of an H100. A
cache of 128k slots would else start thousands with nothing to do while the text is short."""
BLOCK_BYTES = 1 << 15
"""Keys and values that a program loads at once."""
MIN_BLOCK, MAX_BLOCK = 16, 64
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256
WARPS = 4
NO_WINDOW = 2**31 - 1

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_THREE_STAGES = 160 << 10
"""Bytes of shared memory per processor (A100, H100 and on) for three blocks in flight."""


def why_no_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton kernels can't run a model on this device in this dtype; None: they can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "the kernels need an NVIDIA GPU"
    if dtype not in _DTYPES:
        return f"the kernels take float32, float16 and bfloat16, not {dtype}"
    if importlib.util.find_spec("triton") is None:
        return "triton isn't installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need a GPU of compute capability 8.0 or later"
    return None


def unsupported_reason(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this attention can't be used for queries, keys and values of a model; None: it can."""
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        return (
            f"supported are heads of {MIN_HEAD_DIM} to {MAX_HEAD_DIM} features, not of {head_dim}"
        )
    return why_no_triton(device, dtype)


def flash_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor | None,
    window: int | None,
    scaling: float,
) -> torch.Tensor:
    """Softmax attention ``[B, T, Hq, Dv]`` of tokens over the slots that each of them sees: those
    below its position, within the window where there is one, and its own.

    Scores, softmax and sums are float32 (no TF32); weights are rounded to the values' dtype.

    Args:
        query: ``[B, Hq, T, D]``.
        keys, values: ``[B, Hkv, S, D]`` and ``[B, Hkv, S, Dv]``; ``Hkv`` divides ``Hq``. The last
            dimension is contiguous, other strides are multiples of gcd(D, 16), and memory begins at
            a multiple of 16 bytes, as in any cache of this engine.
        positions, slots: ``[B, T]`` int64; slots None: the positions.
        window: slots that a token sees, its own position's included; None: all.
        scaling: factor on the scores.

    Raises:
        ValueError: shapes, dtypes or strides are others than these.
    """
    slots = positions if slots is None else slots
    _check(query, keys, values, positions, slots)
    batch, heads, tokens, _ = query.shape
    (kv_heads, capacity), value_size = keys.shape[1:3], values.shape[3]
    out = query.new_empty((batch, tokens, heads, value_size))
    if out.numel() == 0:
        return out
    if _misaligned(query):
        query = query.clone(memory_format=torch.contiguous_format)
    splits = -(-capacity // SPLIT)
    sums = query.new_empty((*out.shape[:3], splits, value_size), dtype=torch.float32)
    maxima = query.new_empty((*out.shape[:3], splits), dtype=torch.float32)
    shared: dict[str, Any] = {
        "sums": sums,
        "maxima": maxima,
        "totals": torch.empty_like(maxima),
        "positions": positions.contiguous(),
        "slots": slots.contiguous(),
        "capacity": capacity,
        "window": NO_WINDOW if window is None else window,
        "splits": splits,
        "split_slots": SPLIT,
        "value_size": value_size,
        "enable_fp_fusion": True,
    }
    blocks = -(-tokens * (heads // kv_heads) // ROWS)
    # Splits are dealt among the programs evenly where all are filled.
    rounds = -(-splits * batch * kv_heads * blocks // PROGRAMS)
    split_kernel, combine_kernel = _kernels()
    with torch.cuda.device_of(query):
        split_kernel[(blocks, batch * kv_heads, -(-splits // rounds))](
            query=query,
            keys=keys,
            values=values,
            scale=scaling * math.log2(math.e),
            tokens=tokens,
            **shared,
            **_split_args(query, keys, values),
        )
        columns = min(MAX_COLUMNS, _padded(value_size))
        combine_kernel[(batch * tokens * heads, -(-value_size // columns))](
            out=out, **shared, heads=heads, columns=columns, chunk=CHUNK, num_warps=WARPS
        )
    return out


def _kernels() -> tuple[Any, Any]:
    """The splitting and the combining kernel. Only here is triton needed."""
    from conflayers_cli.kernels.flash_decode_kernels import combine_kernel, split_kernel

    return split_kernel, combine_kernel


def _split_args(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> dict[str, int]:
    """Strides, and what the splitting kernel is compiled for, which follows from the model."""
    kv_heads, size, value_size = keys.shape[1], keys.shape[3], values.shape[3]
    padded, value_padded = _padded(size), _padded(value_size)
    fitting = BLOCK_BYTES // (2 * max(padded, value_padded) * keys.element_size())
    return {
        **stride_args("query", query, ("batch", "head", "token")),
        **stride_args("keys", keys),
        **stride_args("values", values),
        "kv_heads": kv_heads,
        "groups": query.shape[1] // kv_heads,
        "size": size,
        "padded": padded,
        "value_padded": value_padded,
        "unit": stride_unit(size),
        "value_unit": stride_unit(value_size),
        "rows": ROWS,
        "block": max(MIN_BLOCK, min(MAX_BLOCK, fitting)),
        # Without tensor cores a product is as much work as loading, and takes more registers.
        "num_warps": 2 * WARPS if query.dtype == torch.float32 else WARPS,
        "num_stages": _stages(query.device),
    }


def _stages(device: torch.device) -> int:
    """Blocks of keys and values in flight. Bits don't depend on it."""
    if device.type != "cuda":
        return 2
    properties = torch.cuda.get_device_properties(device)
    return 3 if getattr(properties, "shared_memory_per_block_optin", 0) >= _THREE_STAGES else 2


def _check(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    batch, heads, tokens, size = query.shape
    kv_heads = keys.shape[1]
    if keys.shape[:3] != values.shape[:3] or (keys.shape[0], keys.shape[3]) != (batch, size):
        raise ValueError(f"keys {keys.shape}, values {values.shape} for a query {query.shape}")
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads can't share {kv_heads} key/value heads evenly")
    if positions.shape != (batch, tokens) or slots.shape != (batch, tokens):
        raise ValueError(f"positions {positions.shape}, slots {slots.shape}, query {query.shape}")
    if not query.dtype == keys.dtype == values.dtype or query.dtype not in _DTYPES:
        raise ValueError(f"query {query.dtype}, keys {keys.dtype}, values {values.dtype}")
    for name, states in (("keys", keys), ("values", values)):
        if not MIN_HEAD_DIM <= states.shape[3] <= MAX_HEAD_DIM:
            raise ValueError(f"{name} of {states.shape[3]} features")
        if _misaligned(states):
            raise ValueError(f"{name} of strides {states.stride()} don't lie at even places")


def _misaligned(states: torch.Tensor) -> bool:
    """Whether vectors don't begin where the kernel expects: see :func:`flash_attention`."""
    unit = stride_unit(states.shape[3])
    uneven = any(
        step % unit and size > 1
        for step, size in zip(states.stride()[:3], states.shape, strict=False)
    )
    return uneven or states.stride(3) != 1 or states.data_ptr() % 16 != 0


def stride_args(
    name: str, states: torch.Tensor, axes: tuple[str, ...] = ("batch", "head", "slot")
) -> dict[str, int]:
    """Kernel arguments for the strides of ``[B, H, S, D]``, in units; zero for axes of size 1."""
    unit = stride_unit(states.shape[3])
    steps = zip(axes, states.stride(), states.shape, strict=False)
    return {f"{name}_{axis}": step // unit if size > 1 else 0 for axis, step, size in steps}


def stride_unit(size: int) -> int:
    """Elements that strides of vectors of this size are whole multiples of."""
    return math.gcd(size, 16)


def _padded(size: int) -> int:
    """The next power of two, from 16 on."""
    return 1 << max(size - 1, 15).bit_length()
