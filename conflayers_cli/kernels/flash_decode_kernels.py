"""The two Triton kernels of :mod:`conflayers_cli.kernels.flash_decode`, which says what they
compute and why a row's bits don't depend on others. Importing this needs triton.

Strides are given in units that the compiler knows (``…unit`` elements), so it sees that vectors
begin at multiples of 16 bytes. No other argument's value is specialised on: one model has one
compiled kernel, whatever the numbers of tokens, sequences and slots.
"""

# Not `from __future__ import annotations`: triton reads the annotations.
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

# A kernel's arguments are single values, hence the long signatures and bodies: parts of a body
# would each have as many.


def sum_split(
    query: tl.tensor,
    kv: tl.tuple,
    view: tl.tuple,
    scale: tl.tensor,
    size: tl.constexpr,
    value_size: tl.constexpr,
    value_padded: tl.constexpr,
    split_slots: tl.constexpr,
    block: tl.constexpr,
    finite_only: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Running softmax over the split whose first slot is ``start``: (maximum, total, weighted sum).

    ``kv``: the split's keys, its values, and the steps from slot to slot in each; ``view``: what
    the rows see. With ``finite_only``, values that aren't finite are left out of the sum, and
    a row that sees one gets NaN in that feature.
    """
    keys, values, key_step, value_step = kv
    start, begin, end, position, first, slot = view
    maximum = tl.full([query.shape[0]], float("-inf"), tl.float32)
    total = tl.full([query.shape[0]], 0.0, tl.float32)
    summed = tl.full([query.shape[0], value_padded], 0.0, tl.float32)
    not_finite = tl.full([query.shape[0], value_padded], 0.0, tl.float32)
    feature = tl.arange(0, query.shape[1])
    value_feature = tl.arange(0, value_padded)
    # Always all blocks of a split: slots that no row sees are not read, but computed with.
    for offset in tl.range(0, split_slots, block, num_stages=1 if finite_only else None):
        within = offset + tl.arange(0, block)
        other = start + within
        held = (other >= begin) & (other < end)
        key_at = keys + within[:, None] * key_step + feature[None, :]
        key = tl.load(key_at, mask=held[:, None] & (feature < size)[None, :], other=0.0)
        value_at = values + within[:, None] * value_step + value_feature[None, :]
        read = held[:, None] & (value_feature < value_size)[None, :]
        value = tl.load(value_at, mask=read, other=0.0)

        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        seen = (other[None, :] < position[:, None]) & (other[None, :] >= first[:, None])
        seen = seen | (other[None, :] == slot[:, None])
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(maximum, tl.max(score, 1))
        # A row that has seen nothing yet: -inf less -inf would be NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        rescale = tl.exp2(maximum - base)
        weight = tl.exp2(score - base[:, None])
        total = total * rescale + tl.sum(weight, 1)
        weight = weight.to(value.dtype)
        if finite_only:
            finite = tl.abs(value) < float("inf")
            odd = tl.where(finite, 0.0, 1.0).to(value.dtype)
            not_finite = tl.dot(weight, odd, not_finite, input_precision="ieee")
            value = tl.where(finite, value, 0.0)
        summed = tl.dot(weight, value, summed * rescale[:, None], input_precision="ieee")
        maximum = higher
    if finite_only:
        summed = tl.where(not_finite == 0.0, summed, float("nan"))
    return maximum, total, summed


sum_split_inlined = triton.jit(sum_split)


def flash_split(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    positions: tl.tensor,
    slots: tl.tensor,
    sums: tl.tensor,
    maxima: tl.tensor,
    totals: tl.tensor,
    scale: tl.tensor,
    tokens: tl.tensor,
    capacity: tl.tensor,
    window: tl.tensor,
    splits: tl.tensor,
    query_batch: tl.tensor,
    query_head: tl.tensor,
    query_token: tl.tensor,
    keys_batch: tl.tensor,
    keys_head: tl.tensor,
    keys_slot: tl.tensor,
    values_batch: tl.tensor,
    values_head: tl.tensor,
    values_slot: tl.tensor,
    kv_heads: tl.constexpr,
    groups: tl.constexpr,
    size: tl.constexpr,
    value_size: tl.constexpr,
    padded: tl.constexpr,
    value_padded: tl.constexpr,
    unit: tl.constexpr,
    value_unit: tl.constexpr,
    rows: tl.constexpr,
    split_slots: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """One block of rows over some splits of the slots: each split's sums, maximum and total.

    A row is a query head of a token, the heads of a token side by side. Program ``(i, j, k)`` takes
    the ``i``-th ``rows`` rows of key/value head ``j`` (of all sequences one after another), and of
    the splits that these rows see the ``k``-th, and every further one in steps of the grid.

    Writes, of each split that it reads, float32: ``sums [B, T, Hq, splits, Dv]``, the values
    weighted by exp2(score - maximum), ``maxima`` of the scores and ``totals`` of the weights, both
    ``[B, T, Hq, splits]``.
    """
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    head = tl.program_id(1) % kv_heads
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    token = row // groups
    query_heads = head * groups + row % groups
    live = token < tokens
    position = tl.load(positions + batch * tokens + token, mask=live, other=0).to(tl.int32)
    slot = tl.load(slots + batch * tokens + token, mask=live, other=0).to(tl.int32)
    feature = tl.arange(0, padded)
    query_at = query + batch * (query_batch * unit) + query_heads[:, None] * (query_head * unit)
    query_at += token[:, None] * (query_token * unit) + feature[None, :]
    own_query = tl.load(query_at, mask=live[:, None] & (feature < size)[None, :], other=0.0)

    first = tl.maximum(position - window + 1, 0)
    begin = tl.maximum(tl.min(tl.where(live, tl.minimum(first, slot), capacity), 0), 0)
    end = tl.minimum(tl.max(tl.where(live, tl.maximum(position, slot + 1), 0), 0), capacity)
    stop = (end + split_slots - 1) // split_slots
    head_keys = keys + batch * (keys_batch * unit) + head.to(tl.int64) * (keys_head * unit)
    head_values = values + batch * (values_batch * value_unit)
    head_values += head.to(tl.int64) * (values_head * value_unit)

    for split in range(begin // split_slots + tl.program_id(2), stop, tl.num_programs(2)):
        start = split * split_slots
        split_keys = head_keys + start.to(tl.int64) * (keys_slot * unit)
        split_values = head_values + start.to(tl.int64) * (values_slot * value_unit)
        kv = split_keys, split_values, keys_slot * unit, values_slot * value_unit
        view = start, begin, end, position, first, slot
        maximum, total, summed = sum_split_inlined(
            own_query, kv, view, scale, size, value_size, value_padded, split_slots, block, False
        )
        # No weight at all times infinity is NaN. So where a value isn't finite no row's sum is, and
        # they are made anew, more slowly, so that only the rows that see it get NaN.
        if tl.max(tl.max(tl.where(tl.abs(summed) < float("inf"), 0, 1), 1), 0) > 0:
            maximum, total, summed = sum_split_inlined(
                own_query, kv, view, scale, size, value_size, value_padded, split_slots, block, True
            )

        out = (batch * tokens + token) * (kv_heads * groups) + query_heads
        out = out * splits + split
        tl.store(maxima + out, maximum, mask=live)
        tl.store(totals + out, total, mask=live)
        value_feature = tl.arange(0, value_padded)
        sums_at = sums + out[:, None] * value_size + value_feature[None, :]
        tl.store(sums_at, summed, mask=live[:, None] & (value_feature < value_size)[None, :])


def flash_combine(
    sums: tl.tensor,
    maxima: tl.tensor,
    totals: tl.tensor,
    positions: tl.tensor,
    slots: tl.tensor,
    out: tl.tensor,
    capacity: tl.tensor,
    window: tl.tensor,
    splits: tl.tensor,
    heads: tl.constexpr,
    value_size: tl.constexpr,
    columns: tl.constexpr,
    split_slots: tl.constexpr,
    chunk: tl.constexpr,
) -> None:
    """One row's output, ``columns`` features of it, from the splits that the row itself sees.

    Program ``(i, j)``: row ``i`` of ``[B, T, Hq]``, the ``j``-th features. Other splits are not
    read: nothing was written there, or it is of other rows.
    """
    row = tl.program_id(0)
    position = tl.load(positions + row // heads).to(tl.int32)
    slot = tl.load(slots + row // heads).to(tl.int32)
    first = tl.maximum(position - window + 1, 0)
    begin = tl.maximum(tl.minimum(first, slot), 0)
    end = tl.minimum(tl.maximum(position, slot + 1), capacity)
    stop = (end + split_slots - 1) // split_slots
    feature = tl.program_id(1) * columns + tl.arange(0, columns)
    own_splits = row.to(tl.int64) * splits

    maximum = tl.full([1], float("-inf"), tl.float32)
    total = tl.full([1], 0.0, tl.float32)
    summed = tl.full([columns], 0.0, tl.float32)
    for start in range(begin // split_slots, stop, chunk):
        split = start + tl.arange(0, chunk)
        read = split < stop
        chunk_maxima = tl.load(maxima + own_splits + split, mask=read, other=float("-inf"))
        chunk_totals = tl.load(totals + own_splits + split, mask=read, other=0.0)
        sums_at = sums + (own_splits + split)[:, None] * value_size + feature[None, :]
        sums_read = read[:, None] & (feature < value_size)[None, :]
        chunk_sums = tl.load(sums_at, mask=sums_read, other=0.0)
        higher = tl.maximum(maximum, tl.max(chunk_maxima, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        rescale = tl.exp2(maximum - base)
        share = tl.exp2(chunk_maxima - base)
        total = total * rescale + tl.sum(chunk_totals * share, 0)
        summed = summed * rescale + tl.sum(chunk_sums * share[:, None], 0)
        maximum = higher
    result = summed / tl.where(total == 0.0, 1.0, total)
    out_at = out + row.to(tl.int64) * value_size + feature
    tl.store(out_at, result.to(out.dtype.element_ty), mask=feature < value_size)


_SHARED = ["positions", "slots", "capacity", "window", "splits"]
_STRIDES = [
    f"{name}_{axis}"
    for name, axes in (
        ("query", ("batch", "head", "token")),
        ("keys", ("batch", "head", "slot")),
        ("values", ("batch", "head", "slot")),
    )
    for axis in axes
]
split_kernel = triton.jit(flash_split, do_not_specialize=[*_SHARED, "tokens", *_STRIDES])
combine_kernel = triton.jit(flash_combine, do_not_specialize=_SHARED)
