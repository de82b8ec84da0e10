"""The small operations between a layer's products as Triton kernels, for
:mod:`conflayers_cli.kernels.triton_forward`.

In a short pass each operation is a launch that takes a GPU longer than the computation. Here one
launch each does: residual add and norm; rotation, norms of heads and the writing of keys and
values; activation and gating.

**Bits.** A program computes one row, one head or one piece of a row. Its block size follows from
the model, and the number of rows is an argument that no code is specialised on: one compiled kernel
serves every call for one model. So a row's results have the same bits whatever the number of rows,
its index, and the others. All is computed in float32 and rounded where
:class:`conflayers_cli.kernels.fused_forward.FusedForward` rounds; only sums, square roots and
exponentials come from other implementations and may differ in the last bit.

Importing this needs triton. Calls can be captured in CUDA graphs once each has run (compiling it).
"""

# Not `from __future__ import annotations`: triton reads the annotations.
from typing import NamedTuple

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

from conflayers_cli.kernels.flash_decode import stride_args, stride_unit

MAX_COLUMNS = 1024
"""Features of a row that a program of :func:`silu_and_mul` takes."""
WARPS = 4
MAX_WARPS = 32
WARP_FEATURES = 256
"""Features of a row per warp of :func:`add_norm`: a load of 16 bytes per thread."""


class NormParams(NamedTuple):
    """An RMSNorm: its weight ``[H]``, and the epsilon added to the mean of the squares."""

    weight: torch.Tensor
    epsilon: float


def add_norm(
    x: torch.Tensor, delta: torch.Tensor | None, norm: NormParams, keep: int = 0
) -> torch.Tensor:
    """Add to the residual stream, in place, and norm the sum: RMSNorm(x + delta).

    The sum is rounded to x's dtype before it is normed, as by separate operations.

    Args:
        x: ``[B, T, H]``, contiguous; becomes x + delta for the kept tokens.
        delta: the same shape and dtype; None: nothing is added.
        norm: over the last dimension.
        keep: of how many last tokens, 0: of all. The others are left alone.

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
    padded = triton.next_power_of_2(hidden)
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
            num_warps=max(1, min(MAX_WARPS, padded // WARP_FEATURES)),
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
    norms: tuple[NormParams, NormParams] | None = None,
) -> torch.Tensor:
    """Norm (where there are norms) and rotate each head's queries and keys; write keys and values
    to the cache.

    Args:
        product: ``[B, T, (Hq + 2 Hkv) D]``: a token's queries, keys and values side by side. Only
            the first P tokens of each sequence are used.
        cos: ``[B, P, D]``, or any shape of as many elements in that order; D is even.
        sin: likewise, negated in the first half of the features.
        slots: ``[B, P]`` int64, from 0 up to S; at others nothing is written.
        keys, values: ``[B, Hkv, S, D]``, the cache's memory, written at the slots. The last
            dimension is contiguous; the others' strides are multiples of gcd(D, 16).
        heads: Hq.
        norms: of each head's queries and of each head's keys.

    Returns:
        The rotated queries ``[B, Hq, P, D]``, whose memory is ``[B, P, Hq, D]``.

    Raises:
        ValueError: shapes or strides are others than these.
    """
    batch, positions = slots.shape
    tokens, (kv_heads, capacity, size) = product.shape[1], keys.shape[1:]
    _check(product, cos, sin, slots, keys, values, heads)
    queries = product.new_empty((batch, positions, heads, size))
    if queries.numel() == 0:
        return queries.transpose(1, 2)
    query_norm, key_norm = norms or (NormParams(cos, 0.0), NormParams(cos, 0.0))
    with torch.cuda.device_of(product):
        rotate_and_write_kernel[(batch * positions, heads + 2 * kv_heads)](
            product=product.contiguous(),
            cos=cos.contiguous(),
            sin=sin.contiguous(),
            slots=slots.contiguous(),
            query_weight=query_norm.weight,
            key_weight=key_norm.weight,
            queries=queries,
            keys=keys,
            values=values,
            query_epsilon=query_norm.epsilon,
            key_epsilon=key_norm.epsilon,
            tokens=tokens,
            num_positions=positions,
            capacity=capacity,
            **stride_args("keys", keys),
            **stride_args("values", values),
            heads=heads,
            kv_heads=kv_heads,
            size=size,
            padded=triton.next_power_of_2(size // 2),
            unit=stride_unit(size),
            normed=norms is not None,
            num_warps=1,
        )
    return queries.transpose(1, 2)


def silu_and_mul(product: torch.Tensor) -> torch.Tensor:
    """SiLU(gate) · up; SiLU(gate) is rounded to the dtype first.

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
    columns = min(MAX_COLUMNS, triton.next_power_of_2(inner))
    with torch.cuda.device_of(product):
        silu_and_mul_kernel[(out.numel() // inner, -(-inner // columns))](
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
    (batch, positions), (kv_heads, _, size) = slots.shape, keys.shape[1:]
    if product.shape[0] != batch or product.shape[2] != (heads + 2 * kv_heads) * size:
        raise ValueError(f"product {product.shape}, keys {keys.shape}, {heads} heads")
    if keys.shape[0] != batch or values.shape != keys.shape or size % 2:
        raise ValueError(f"keys {keys.shape}, values {values.shape}, slots {slots.shape}")
    if product.shape[1] < positions or not cos.numel() == sin.numel() == batch * positions * size:
        raise ValueError(f"product {product.shape}, cos {cos.shape}, slots {slots.shape}")
    for name, states in (("keys", keys), ("values", values)):
        if states.stride(3) != 1 or any(step % stride_unit(size) for step in states.stride()[:3]):
            raise ValueError(f"{name} of strides {states.stride()} don't lie at even places")


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
    num_positions: tl.tensor,
    capacity: tl.tensor,
    keys_batch: tl.tensor,
    keys_head: tl.tensor,
    keys_slot: tl.tensor,
    values_batch: tl.tensor,
    values_head: tl.tensor,
    values_slot: tl.tensor,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    size: tl.constexpr,
    padded: tl.constexpr,
    unit: tl.constexpr,
    normed: tl.constexpr,
) -> None:
    """Program ``(i, j)``: the ``i``-th token of all sequences, the ``j``-th head of query, keys and
    values, as two halves, since features that are half a head apart rotate into each other.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    batch = (row // num_positions).to(tl.int64)
    token = row % num_positions
    is_query = head < heads
    is_value = head >= heads + kv_heads
    is_key = (head >= heads) & (head < heads + kv_heads)
    half: tl.constexpr = size // 2
    feature = tl.arange(0, padded)
    live = feature < half
    slot = tl.load(slots + row)
    written = (slot >= 0) & (slot < capacity)
    # `live & is_query` would say the same, but not to the interpreter.
    query_there = tl.where(is_query, live, False)
    key_there = tl.where(is_key & written, live, False)
    value_there = tl.where(is_value & written, live, False)
    angle_at = row.to(tl.int64) * size + feature
    cos_one = tl.load(cos + angle_at, mask=live, other=0.0).to(tl.float32)
    cos_two = tl.load(cos + angle_at + half, mask=live, other=0.0).to(tl.float32)
    sin_one = tl.load(sin + angle_at, mask=live, other=0.0).to(tl.float32)
    sin_two = tl.load(sin + angle_at + half, mask=live, other=0.0).to(tl.float32)
    source = ((batch * tokens + token) * (heads + 2 * kv_heads) + head) * size + feature
    one = tl.load(product + source, mask=live, other=0.0).to(tl.float32)
    two = tl.load(product + source + half, mask=live, other=0.0).to(tl.float32)

    dtype = product.dtype.element_ty
    plain_one, plain_two = one, two
    if normed:
        kept = tl.where(is_key, live, False)
        query_one = tl.load(query_weight + feature, mask=query_there, other=0.0).to(tl.float32)
        query_two = tl.load(query_weight + feature + half, mask=query_there, other=0.0).to(
            tl.float32
        )
        key_one = tl.load(key_weight + feature, mask=kept, other=0.0).to(tl.float32)
        key_two = tl.load(key_weight + feature + half, mask=kept, other=0.0).to(tl.float32)
        mean = tl.sum(one * one + two * two, 0) * (1.0 / size)
        scale = tl.rsqrt(mean + tl.where(is_query, query_epsilon, key_epsilon))
        one = (one * scale).to(dtype).to(tl.float32) * tl.where(is_query, query_one, key_one)
        two = (two * scale).to(dtype).to(tl.float32) * tl.where(is_query, query_two, key_two)
        one = one.to(dtype).to(tl.float32)
        two = two.to(dtype).to(tl.float32)
    rotated_one = (one * cos_one).to(dtype).to(tl.float32) + two * sin_one
    rotated_two = (two * cos_two).to(dtype).to(tl.float32) + one * sin_two

    query_at = queries + (row.to(tl.int64) * heads + head) * size + feature
    tl.store(query_at, rotated_one.to(dtype), mask=query_there)
    tl.store(query_at + half, rotated_two.to(dtype), mask=query_there)
    key_at = batch * keys_batch + (head - heads).to(tl.int64) * keys_head + slot * keys_slot
    key_at = keys + key_at * unit + feature
    tl.store(key_at, rotated_one.to(dtype), mask=key_there)
    tl.store(key_at + half, rotated_two.to(dtype), mask=key_there)
    value_head = (head - heads - kv_heads).to(tl.int64)
    value_at = batch * values_batch + value_head * values_head + slot * values_slot
    value_at = values + value_at * unit + feature
    tl.store(value_at, plain_one.to(dtype), mask=value_there)
    tl.store(value_at + half, plain_two.to(dtype), mask=value_there)


def silu_and_mul_piece(
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
_RUNTIME = ["tokens", "num_positions", "capacity"]
_STRIDES = [f"{name}_{axis}" for name in ("keys", "values") for axis in ("batch", "head", "slot")]
rotate_and_write_kernel = triton.jit(
    rotate_and_write_head, do_not_specialize=[*_RUNTIME, *_STRIDES]
)
silu_and_mul_kernel = triton.jit(silu_and_mul_piece)
