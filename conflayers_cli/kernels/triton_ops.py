"""The small operations between a layer's products as Triton kernels, for :mod:`conflayers_cli.kernels.triton_forward`.

Between two products of a pass over a few tokens there is hardly anything to compute, but each
operation is a launch, which takes a GPU longer than the computation. Here one launch each does:
residual add and norm; rotation, norms of heads and the writing of keys and values; activation and
product with what it gates.

**Bits.** A program computes one row, one head or one piece of a row, never several rows together.
Its block has a size that follows from the model, and the numbers of rows are arguments that no code
is specialised on: one compiled kernel serves every call for one model. So a row's results have the
same bits whatever the number of rows, its place among them, and the others. All is computed in
float32 and rounded where :class:`conflayers_cli.kernels.fused_forward.FusedForward` rounds; only sums, square roots and
exponentials come from other implementations, so that results differ in the last bit here and there.

Importing this needs triton, which comes with the CUDA builds of PyTorch. Nothing here reads values
from the device, so that calls can be captured in CUDA graphs once each has run (compiling) before.
"""

# Not `from __future__ import annotations`: triton reads the annotations.
import math
from typing import NamedTuple

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

COLUMNS = 1024
"""Features of a row that a program of :func:`gated` takes, at the most."""
WARPS = 4
ELEMENTS = 256
"""Features of a row for each warp of :func:`add_norm`: a load of 16 bytes for each thread."""
MOST_WARPS = 32


class Norm(NamedTuple):
    """An RMSNorm: its weight ``[H]``, and what is added to the mean of the squares."""

    weight: torch.Tensor
    epsilon: float


def add_norm(
    x: torch.Tensor, delta: torch.Tensor | None, norm: Norm, keep: int = 0
) -> torch.Tensor:
    """Add to the residual stream, in place, and norm the sum: RMSNorm(x + delta).

    Sum and normed row are rounded to x's dtype before they go on, as by separate operations.

    Args:
        x: ``[B, T, H]``, contiguous; becomes x + delta where rows are kept.
        delta: the same shape and dtype; None: nothing is added.
        norm: over the last dimension.
        keep: of how many last tokens, 0: of all. The others' rows are left alone.

    Returns:
        ``[B, keep, H]`` (keep 0: ``[B, T, H]``) in x's dtype.

    Raises:
        ValueError: shapes differ, or x is not contiguous.
    """
    batch, tokens, hidden = x.shape
    if not x.is_contiguous() or norm.weight.shape != (hidden,):
        raise ValueError(f"x {x.shape} of strides {x.stride()}, weight {norm.weight.shape}")
    if delta is not None and delta.shape != x.shape:
        raise ValueError(f"delta {delta.shape} for x {x.shape}")
    kept = min(keep, tokens) if keep else tokens
    out = x.new_empty((batch, kept, hidden))
    if out.numel() == 0:
        return out
    padded = _power_of_two(hidden)
    with torch.cuda.device_of(x):
        add_norm_kernel[(batch * kept,)](
            x=x,
            delta=x if delta is None else delta.contiguous(),
            weight=norm.weight,
            out=out,
            epsilon=norm.epsilon,
            tokens=tokens,
            kept=kept,
            hidden=hidden,
            padded=padded,
            added=delta is not None,
            num_warps=max(1, min(MOST_WARPS, padded // ELEMENTS)),
        )
    return out


def rotate_and_write(
    product: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    heads: int,
    norms: tuple[Norm, Norm] | None = None,
) -> torch.Tensor:
    """Rotate queries and keys, each head normed before where there are norms, and write keys and
    values where the cache has them.

    Args:
        product: ``[B, T, (Hq + 2 Hkv) D]``: a token's queries, keys and values side by side. Only
            the first P tokens of each row are used.
        cos: ``[B, P, D]``, or any shape of as many elements in that order; D is even.
        sin: likewise, with the sign turned in the first half of the features.
        slots: ``[B, P]`` int64, from 0 up to S; at others nothing is written.
        keys: ``[B, Hkv, S, D]``, the cache's memory, written at the slots. The last dimension is
            contiguous; the others' strides are multiples of gcd(D, 16).
        values: likewise.
        heads: Hq.
        norms: of each head's queries and of each head's keys.

    Returns:
        The rotated queries ``[B, Hq, P, D]``, whose memory is ``[B, P, Hq, D]``.

    Raises:
        ValueError: shapes or strides are others than these.
    """
    batch, own = slots.shape
    tokens, (shared, capacity, size) = product.shape[1], keys.shape[1:]
    _check(product, cos, sin, slots, keys, values, heads)
    queries = product.new_empty((batch, own, heads, size))
    if queries.numel() == 0:
        return queries.transpose(1, 2)
    query_norm, key_norm = norms or (Norm(cos, 0.0), Norm(cos, 0.0))
    with torch.cuda.device_of(product):
        rotate_and_write_kernel[(batch * own, heads + 2 * shared)](
            product=product.contiguous(),
            cos=cos.contiguous(),
            sin=sin.contiguous(),
            slots=slots,
            query_weight=query_norm.weight,
            key_weight=key_norm.weight,
            queries=queries,
            keys=keys,
            values=values,
            query_epsilon=query_norm.epsilon,
            key_epsilon=key_norm.epsilon,
            tokens=tokens,
            own=own,
            capacity=capacity,
            **_strides("keys", keys),
            **_strides("values", values),
            slots_batch=slots.stride(0),
            slots_token=slots.stride(1),
            heads=heads,
            shared=shared,
            size=size,
            half=size // 2,
            padded=_power_of_two(size // 2),
            unit=_unit(size),
            normed=norms is not None,
            num_warps=1,
        )
    return queries.transpose(1, 2)


def gated(product: torch.Tensor) -> torch.Tensor:
    """SiLU(gate) · up; the former is rounded to the dtype before it multiplies.

    Args:
        product: ``[..., 2 I]``: gate and up side by side.

    Returns:
        ``[..., I]``, contiguous.

    Raises:
        ValueError: the last dimension is odd.
    """
    inner, odd = divmod(product.shape[-1], 2)
    if odd:
        raise ValueError(f"gate and up of {product.shape[-1]} features together")
    out = product.new_empty((*product.shape[:-1], inner))
    if out.numel() == 0:
        return out
    columns = min(COLUMNS, _power_of_two(inner))
    with torch.cuda.device_of(product):
        gated_kernel[(out.numel() // inner, -(-inner // columns))](
            product.contiguous(), out, inner=inner, columns=columns, num_warps=WARPS
        )
    return out


def _check(
    product: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    heads: int,
) -> None:
    (batch, own), (shared, _, size) = slots.shape, keys.shape[1:]
    if product.shape[0] != batch or product.shape[2] != (heads + 2 * shared) * size:
        raise ValueError(f"product {product.shape}, keys {keys.shape}, {heads} heads")
    if keys.shape[0] != batch or values.shape != keys.shape or size % 2:
        raise ValueError(f"keys {keys.shape}, values {values.shape}, slots {slots.shape}")
    if product.shape[1] < own or not cos.numel() == sin.numel() == batch * own * size:
        raise ValueError(f"product {product.shape}, cos {cos.shape}, slots {slots.shape}")
    for name, states in (("keys", keys), ("values", values)):
        if states.stride(3) != 1 or any(step % _unit(size) for step in states.stride()[:3]):
            raise ValueError(f"{name} of strides {states.stride()} don't lie at even places")


def _strides(name: str, states: torch.Tensor) -> dict[str, int]:
    """The kernel's arguments for the strides of a cache's memory, in units that the compiler knows
    (see :mod:`conflayers_cli.kernels.flash_decode_kernels`)."""
    steps = zip(("batch", "head", "slot"), states.stride(), strict=False)
    return {f"{name}_{axis}": step // _unit(states.shape[3]) for axis, step in steps}


def _unit(size: int) -> int:
    return math.gcd(size, 16)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def add_norm_row(
    x: tl.tensor,
    delta: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    epsilon: tl.tensor,
    tokens: tl.tensor,
    kept: tl.tensor,
    hidden: tl.constexpr,
    padded: tl.constexpr,
    added: tl.constexpr,
) -> None:
    """Program ``i``: the ``i``-th of the rows kept."""
    kept_row = tl.program_id(0)
    row = (kept_row // kept) * tokens + (tokens - kept) + kept_row % kept
    column = tl.arange(0, padded)
    live = column < hidden
    at = row.to(tl.int64) * hidden + column
    factor = tl.load(weight + column, mask=live, other=0.0).to(tl.float32)
    value = tl.load(x + at, mask=live, other=0.0)
    if added:
        more = tl.load(delta + at, mask=live, other=0.0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(x + at, value, mask=live)
    exact = value.to(tl.float32)
    mean = tl.sum(exact * exact, 0) * (1.0 / hidden)
    normed = (exact * tl.rsqrt(mean + epsilon)).to(x.dtype.element_ty)
    normed = (normed.to(tl.float32) * factor).to(out.dtype.element_ty)
    tl.store(out + kept_row.to(tl.int64) * hidden + column, normed, mask=live)


def rotate_and_write_head(
    product: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    slots: tl.tensor,
    query_weight: tl.tensor,
    key_weight: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    query_epsilon: tl.tensor,
    key_epsilon: tl.tensor,
    tokens: tl.tensor,
    own: tl.tensor,
    capacity: tl.tensor,
    keys_batch: tl.tensor,
    keys_head: tl.tensor,
    keys_slot: tl.tensor,
    values_batch: tl.tensor,
    values_head: tl.tensor,
    values_slot: tl.tensor,
    slots_batch: tl.tensor,
    slots_token: tl.tensor,
    heads: tl.constexpr,
    shared: tl.constexpr,
    size: tl.constexpr,
    half: tl.constexpr,
    padded: tl.constexpr,
    unit: tl.constexpr,
    normed: tl.constexpr,
) -> None:
    """Program ``(i, j)``: of the ``i``-th token of all rows the ``j``-th head of query, keys and
    values, as two halves, since features that are half a head apart turn into each other.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    batch = (row // own).to(tl.int64)
    token = row % own
    is_query = head < heads
    is_value = head >= heads + shared
    is_key = (head >= heads) & (head < heads + shared)
    feature = tl.arange(0, padded)
    live = feature < half
    slot = tl.load(slots + batch * slots_batch + token * slots_token)
    written = (slot >= 0) & (slot < capacity)
    # `live & is_query` would say the same, but not to the interpreter.
    asked = tl.where(is_query, live, False)
    key_there = tl.where(is_key & written, live, False)
    value_there = tl.where(is_value & written, live, False)
    turn = row.to(tl.int64) * size + feature
    cos_one = tl.load(cos + turn, mask=live, other=0.0).to(tl.float32)
    cos_two = tl.load(cos + turn + half, mask=live, other=0.0).to(tl.float32)
    sin_one = tl.load(sin + turn, mask=live, other=0.0).to(tl.float32)
    sin_two = tl.load(sin + turn + half, mask=live, other=0.0).to(tl.float32)
    source = ((batch * tokens + token) * (heads + 2 * shared) + head) * size + feature
    one = tl.load(product + source, mask=live, other=0.0).to(tl.float32)
    two = tl.load(product + source + half, mask=live, other=0.0).to(tl.float32)

    dtype = product.dtype.element_ty
    plain_one, plain_two = one, two
    if normed:
        kept = tl.where(is_key, live, False)
        query_one = tl.load(query_weight + feature, mask=asked, other=0.0).to(tl.float32)
        query_two = tl.load(query_weight + feature + half, mask=asked, other=0.0).to(tl.float32)
        key_one = tl.load(key_weight + feature, mask=kept, other=0.0).to(tl.float32)
        key_two = tl.load(key_weight + feature + half, mask=kept, other=0.0).to(tl.float32)
        mean = tl.sum(one * one + two * two, 0) * (1.0 / size)
        scale = tl.rsqrt(mean + tl.where(is_query, query_epsilon, key_epsilon))
        one = (one * scale).to(dtype).to(tl.float32) * tl.where(is_query, query_one, key_one)
        two = (two * scale).to(dtype).to(tl.float32) * tl.where(is_query, query_two, key_two)
        one = one.to(dtype).to(tl.float32)
        two = two.to(dtype).to(tl.float32)
    turned_one = (one * cos_one).to(dtype).to(tl.float32) + two * sin_one
    turned_two = (two * cos_two).to(dtype).to(tl.float32) + one * sin_two

    query_at = queries + (row.to(tl.int64) * heads + head) * size + feature
    tl.store(query_at, turned_one.to(dtype), mask=asked)
    tl.store(query_at + half, turned_two.to(dtype), mask=asked)
    key_at = batch * keys_batch + (head - heads).to(tl.int64) * keys_head + slot * keys_slot
    key_at = keys + key_at * unit + feature
    tl.store(key_at, turned_one.to(dtype), mask=key_there)
    tl.store(key_at + half, turned_two.to(dtype), mask=key_there)
    value_head = (head - heads - shared).to(tl.int64)
    value_at = batch * values_batch + value_head * values_head + slot * values_slot
    value_at = values + value_at * unit + feature
    tl.store(value_at, plain_one.to(dtype), mask=value_there)
    tl.store(value_at + half, plain_two.to(dtype), mask=value_there)


def gated_piece(
    product: tl.tensor, out: tl.tensor, inner: tl.constexpr, columns: tl.constexpr
) -> None:
    """Program ``(i, j)``: of the ``i``-th row the ``j``-th ``columns`` features."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * columns + tl.arange(0, columns)
    live = column < inner
    gate_at = product + row * (2 * inner) + column
    gate = tl.load(gate_at, mask=live, other=0.0).to(tl.float32)
    up = tl.load(gate_at + inner, mask=live, other=0.0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(product.dtype.element_ty).to(tl.float32)
    tl.store(out + row * inner + column, (activated * up).to(out.dtype.element_ty), mask=live)


add_norm_kernel = triton.jit(add_norm_row, do_not_specialize=["tokens", "kept"])
rotate_and_write_kernel = triton.jit(
    rotate_and_write_head,
    do_not_specialize=[
        "tokens",
        "own",
        "capacity",
        "slots_batch",
        "slots_token",
        "keys_batch",
        "keys_head",
        "keys_slot",
        "values_batch",
        "values_head",
        "values_slot",
    ],
)
gated_kernel = triton.jit(gated_piece)
