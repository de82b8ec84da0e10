"""Attention of a few tokens over a long cache on a GPU, which reads the filled part of it alone.

"Flash decoding" (Dao, Haziza, Massa, Sizov, 2023): the slots are split among many programs, so that
the whole card reads one sequence's cache at once. Each program keeps a running softmax over its
slots (Milakov & Gimelshein, arXiv 1805.02867), and a second kernel puts the splits together. There
is no mask in memory: positions and slots of the tokens say what each of them sees. Query heads that
share a key/value head are rows of one program; keys and values are never repeated.

Nothing on the host looks at a position: grid, memory and kernels follow from shapes alone, so that
a call can be captured in a CUDA graph and replayed at any length of text. Programs of which no row
sees a slot read the positions and end.

**Bits.** A row's output is a function of its own query and of the keys and values that it sees at
their slots, whatever the number of tokens and sequences, the other rows, its place among them, the
capacity of the cache, and what lies in slots that it doesn't see, for these reasons:

* Splits and the blocks in them begin at fixed slots, and every block of rows has one size. All
  sizes and strides are arguments that no code is specialised on: one compiled kernel serves every
  call for one model, with one order of additions in it. It treats all rows of its block alike.
* A split's sums start from nothing and always run over all of its blocks. A row's score at a slot
  that it doesn't see is -inf, whatever was read there: the highest score stays, the factor on what
  has been summed is exp2(0) = 1, and zeros are added. Not having read the slot gives the same.
* Where a value isn't finite the split is summed again without it, in the same steps, so that zero
  weights don't make NaN of it; a row that does see one gets NaN in that feature.
* The combining kernel goes over the splits that the row itself sees, in fixed chunks from the first
  of them on. Other rows have no say in which these are, and it reads no others.

A token in another slot than its position's (see `.decoder.Decoder.forward`) finds its own key
elsewhere in that order, and may round otherwise than in the slot of its position.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch

ROWS = 16
"""Rows of a program: the least that tensor cores take, and the same for any number of tokens."""
SPLIT = 256
"""Slots of a split. At 512 slots and eight key/value heads 16 programs read, at 16k 512 do. Of four
rows of bfloat16 a split's results are 1/64 of what it reads, of sixteen 1/16."""
CHUNK = 64
"""Splits that the combining kernel takes at once: all of 16k slots."""
COLUMNS = 64
"""Features of a program of the combining kernel, at the most."""
PROGRAMS = 1024
"""Programs beyond which each takes several splits in turn: some eight for each processor of an
H100, of which two run at once. A cache of 128k slots would else start thousands that find nothing
to do while the text is short."""
BLOCK_BYTES = 1 << 15
"""Keys and values that a program asks for at once."""
LARGEST_BLOCK, SMALLEST_BLOCK = 64, 16
LEAST_SIZE, LARGEST_SIZE = 16, 256
WARPS = 4
EVERYTHING = 2**31 - 1
"""A window that shuts nothing out."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_AMPERE = (8, 0)
_ROOMY = 160 << 10
"""Bytes of fast memory per processor (A100, H100 and on) with which three blocks are in flight."""


def why_not(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Why this attention can't be used, in words that follow "because"; None: it can be.

    Args:
        device: the model's.
        dtype: of queries, keys and values.
        head_size: features of a key, or of a value.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return "the attention kernel needs an NVIDIA GPU"
    if dtype not in _DTYPES:
        return f"the attention kernel takes float32, float16 and bfloat16, not {_name(dtype)}"
    if not LEAST_SIZE <= head_size <= LARGEST_SIZE:
        return (
            f"the attention kernel takes heads of {LEAST_SIZE} to {LARGEST_SIZE} features, "
            f"not of {head_size}"
        )
    if importlib.util.find_spec("triton") is None:
        return "the attention kernel needs triton, which isn't installed"
    if torch.cuda.get_device_capability(device) < _AMPERE:
        return "the attention kernel needs a GPU of compute capability 8.0 or later"
    return None


def flash_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor | None,
    window: int | None,
    scaling: float,
) -> torch.Tensor:
    """Softmax attention of tokens over the slots of a cache that each of them sees.

    A token sees the slots below its position, within the window where there is one, and its own
    slot. Scores, softmax and sums are float32; half-precision weights are rounded to the values'
    dtype before they multiply them, float32 products are exact ones (no TF32).

    The first call for a model compiles; so let one run before capturing any in a CUDA graph.

    Args:
        query: ``[B, Hq, T, D]``, any strides.
        keys: ``[B, Hkv, S, D]`` in the query's dtype; ``Hkv`` divides ``Hq``. The last dimension is
            contiguous; the others' strides are multiples of gcd(D, 16), and the first element lies
            at a multiple of 16 bytes, as is so in any cache of this engine.
        values: ``[B, Hkv, S, Dv]``, likewise.
        positions: ``[B, T]`` int64.
        slots: ``[B, T]`` int64, from 0 up to S; None: the positions.
        window: so many slots up to and including its position's does a token see; None: all.
        scaling: factor on the scores.

    Returns:
        ``[B, T, Hq, Dv]``, contiguous, in the query's dtype.

    Raises:
        ValueError: shapes, dtypes or strides are others than these.
    """
    if torch.compiler.is_compiling():
        compiled: torch.Tensor = torch.ops.conflayers.flash_attention(
            query, keys, values, positions, slots, window, scaling
        )
        return compiled
    return _attend(query, keys, values, positions, slots, window, scaling)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor | None,
    window: int | None,
    scaling: float,
) -> torch.Tensor:
    slots = positions if slots is None else slots
    _check(query, keys, values, positions, slots)
    batch, heads, tokens, size = query.shape
    shared, capacity, value_size = keys.shape[1], keys.shape[2], values.shape[3]
    out = query.new_empty((batch, tokens, heads, value_size))
    if out.numel() == 0:
        return out
    unit, value_unit = _unit(size), _unit(value_size)
    if _misplaced(query, unit):
        query = query.clone(memory_format=torch.contiguous_format)
    splits = -(-capacity // SPLIT)
    # Memory of their own each: all begin at whole multiples of 16 bytes.
    sums = query.new_empty((*out.shape[:3], splits, value_size), dtype=torch.float32)
    tops = query.new_empty((*out.shape[:3], splits), dtype=torch.float32)
    totals = torch.empty_like(tops)
    blocks = -(-tokens * (heads // shared) // ROWS)
    others = batch * shared * blocks
    window = EVERYTHING if window is None else window
    shown: dict[str, Any] = {
        "positions": positions,
        "slots": slots,
        "tokens": tokens,
        "capacity": capacity,
        "window": window,
        "splits": splits,
        **_strides("positions", positions),
        **_strides("slots", slots),
    }
    split_kernel, combine_kernel = _kernels()
    with torch.cuda.device_of(query):
        split_kernel[(blocks, batch * shared, _programs(splits, others))](
            query=query,
            keys=keys,
            values=values,
            sums=sums,
            tops=tops,
            totals=totals,
            scale=scaling * math.log2(math.e),
            **shown,
            **_strides("query", query, unit),
            **_strides("keys", keys, unit),
            **_strides("values", values, value_unit),
            **_sizes(heads, shared, size, value_size, keys.element_size()),
            num_warps=_warps(query.dtype),
            num_stages=_stages(query.device),
            enable_fp_fusion=True,
        )
        columns = min(COLUMNS, _power_of_two(value_size))
        combine_kernel[(batch * tokens * heads, -(-value_size // columns))](
            sums=sums,
            tops=tops,
            totals=totals,
            out=out,
            **shown,
            heads=heads,
            value_size=value_size,
            columns=columns,
            split_slots=SPLIT,
            chunk=CHUNK,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return out


# A compiler that follows Python through a model sees one operation here, and leaves it alone.
_operation = torch.library.custom_op(
    "conflayers::flash_attention",
    _attend,
    mutates_args=(),
    schema=(
        "(Tensor query, Tensor keys, Tensor values, Tensor positions, Tensor? slots, "
        "int? window, float scaling) -> Tensor"
    ),
)


@_operation.register_fake
def _shape_only(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor | None,
    window: int | None,
    scaling: float,
) -> torch.Tensor:
    batch, heads, tokens, _ = query.shape
    return query.new_empty((batch, tokens, heads, values.shape[3]))


def _kernels() -> tuple[Any, Any]:
    """The splitting and the combining kernel. Only here is triton needed."""
    from conflayers_cli.kernels.flash_decode_kernels import combine_kernel, split_kernel

    return split_kernel, combine_kernel


def _sizes(heads: int, shared: int, size: int, value_size: int, itemsize: int) -> dict[str, int]:
    """What the splitting kernel is compiled for: all of it follows from the model."""
    padded, value_padded = _power_of_two(size), _power_of_two(value_size)
    fitting = BLOCK_BYTES // (2 * max(padded, value_padded) * itemsize)
    return {
        "shared": shared,
        "groups": heads // shared,
        "size": size,
        "value_size": value_size,
        "padded": padded,
        "value_padded": value_padded,
        "unit": _unit(size),
        "value_unit": _unit(value_size),
        "rows": ROWS,
        "split_slots": SPLIT,
        "block": max(SMALLEST_BLOCK, min(LARGEST_BLOCK, fitting)),
    }


def _programs(splits: int, others: int) -> int:
    """Among how many programs each block of rows' splits are dealt, evenly where all are filled."""
    rounds = -(-splits * others // PROGRAMS)
    return -(-splits // rounds)


def _warps(dtype: torch.dtype) -> int:
    """Without tensor cores a product is as much work as reading, and takes more registers."""
    return 2 * WARPS if dtype == torch.float32 else WARPS


def _stages(device: torch.device) -> int:
    """Blocks of keys and values that a program has under way. Bits don't hang on it."""
    if device.type != "cuda":
        return 2
    properties = torch.cuda.get_device_properties(device)
    return 3 if getattr(properties, "shared_memory_per_block_optin", 0) >= _ROOMY else 2


def _check(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    batch, heads, tokens, size = query.shape
    shared = keys.shape[1]
    if keys.shape[:3] != values.shape[:3] or (keys.shape[0], keys.shape[3]) != (batch, size):
        raise ValueError(f"keys {keys.shape}, values {values.shape} for a query {query.shape}")
    if heads % shared:
        raise ValueError(f"{heads} query heads can't share {shared} key/value heads evenly")
    if positions.shape != (batch, tokens) or slots.shape != (batch, tokens):
        raise ValueError(f"positions {positions.shape}, slots {slots.shape}, query {query.shape}")
    if not query.dtype == keys.dtype == values.dtype or query.dtype not in _DTYPES:
        raise ValueError(f"query {query.dtype}, keys {keys.dtype}, values {values.dtype}")
    for name, states in (("keys", keys), ("values", values)):
        width = states.shape[3]
        if not LEAST_SIZE <= width <= LARGEST_SIZE:
            raise ValueError(f"{name} of {width} features")
        if _misplaced(states, _unit(width)):
            raise ValueError(f"{name} of strides {states.stride()} don't lie at even places")


def _misplaced(states: torch.Tensor, unit: int) -> bool:
    """Whether vectors don't lie where the kernel takes them to: see :func:`flash_attention`."""
    uneven = any(step % unit for step in _strides("", states).values())
    return uneven or states.stride(-1) != 1 or states.data_ptr() % 16 != 0


def _strides(name: str, tensor: torch.Tensor, unit: int = 1) -> dict[str, int]:
    """The kernels' arguments for a tensor's strides, in units; zero where not needed.

    Args:
        name: ``query``, ``keys`` or ``values``, whose last dimension is left out, or one of the
            tensors ``[B, T]``.
        tensor: the tensor.
        unit: elements of a unit.
    """
    axes = (
        ("batch", "token")
        if tensor.dim() == 2
        else ("batch", "head", "token" if name == "query" else "slot")
    )
    steps = zip(axes, tensor.stride(), tensor.shape, strict=False)
    return {f"{name}_{axis}": step // unit if size > 1 else 0 for axis, step, size in steps}


def _unit(size: int) -> int:
    """Elements that vectors of this size lie apart in whole multiples of."""
    return math.gcd(size, 16)


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 15).bit_length()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
