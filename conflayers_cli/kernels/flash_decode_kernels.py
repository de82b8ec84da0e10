"""The two Triton kernels of :mod:`conflayers_cli.kernels.flash_decode`, which says what they compute and what its bits hang on.

Importing this needs triton, which comes with the CUDA builds of PyTorch; :mod:`conflayers_cli.kernels.flash_decode` does so at
the first call only.

Strides are given in units that the compiler knows (``…_unit`` elements): so it sees that rows begin
at multiples of 16 bytes without looking at the numbers. For the same reason no argument's value is
"specialised" on: of one model there is one compiled kernel, whatever the tokens, rows and slots.
"""

# Not `from __future__ import annotations`: triton reads the annotations.
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]


def flash_block(
    wanted: tl.tensor,
    split_keys: tl.tensor,
    split_values: tl.tensor,
    start: tl.tensor,
    within: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    position: tl.tensor,
    first: tl.tensor,
    slot: tl.tensor,
    scale: tl.tensor,
    keys_slot: tl.tensor,
    values_slot: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    summed: tl.tensor,
    spoiled: tl.tensor,
    size: tl.constexpr,
    value_size: tl.constexpr,
    padded: tl.constexpr,
    value_padded: tl.constexpr,
    unit: tl.constexpr,
    value_unit: tl.constexpr,
    careful: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """One step of the running softmax: the slots ``within`` a split that begins at ``start``.

    With ``careful``, values that aren't finite are left out of ``summed``, and their weights summed
    in ``spoiled``.
    """
    feature = tl.arange(0, padded)
    value_feature = tl.arange(0, value_padded)
    other = start + within
    held = (other >= begin) & (other < end)
    key_at = split_keys + within[:, None] * (keys_slot * unit) + feature[None, :]
    key = tl.load(key_at, mask=held[:, None] & (feature < size)[None, :], other=0.0)
    value_at = split_values + within[:, None] * (values_slot * value_unit)
    value_at += value_feature[None, :]
    there = held[:, None] & (value_feature < value_size)[None, :]
    value = tl.load(value_at, mask=there, other=0.0)

    score = tl.dot(wanted, tl.trans(key), input_precision="ieee") * scale
    seen = (other[None, :] < position[:, None]) & (other[None, :] >= first[:, None])
    seen = seen | (other[None, :] == slot[:, None])
    score = tl.where(seen, score, float("-inf"))
    higher = tl.maximum(top, tl.max(score, 1))
    # A row that has seen nothing yet: -inf less -inf would be NaN.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    kept = tl.exp2(top - base)
    weight = tl.exp2(score - base[:, None])
    total = total * kept + tl.sum(weight, 1)
    weight = weight.to(value.dtype)
    if careful:
        finite = tl.abs(value) < float("inf")
        odd = tl.where(finite, 0.0, 1.0).to(value.dtype)
        spoiled = tl.dot(weight, odd, spoiled, input_precision="ieee")
        value = tl.where(finite, value, 0.0)
    summed = tl.dot(weight, value, summed * kept[:, None], input_precision="ieee")
    return higher, total, summed, spoiled


block_step = triton.jit(flash_block)


def flash_split(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    positions: tl.tensor,
    slots: tl.tensor,
    sums: tl.tensor,
    tops: tl.tensor,
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
    positions_batch: tl.tensor,
    positions_token: tl.tensor,
    slots_batch: tl.tensor,
    slots_token: tl.tensor,
    shared: tl.constexpr,
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
    """One block of rows over some splits of the slots: each split's sums, top score and total.

    Program ``(i, j, k)``: the ``i``-th ``rows`` rows of key/value head ``j`` (of all sequences one
    after another), and of the splits that these rows see the ``k``-th, and every one as far on
    again as there are programs. A row is a query head of a token, the heads of a token side by
    side.

    Writes, of each split that it reads, float32: ``sums [B, T, Hq, splits, Dv]``, and ``tops`` and
    ``totals [B, T, Hq, splits]``: the values weighted by exp2(score - top), the highest score, and
    the sum of the weights.
    """
    batch = (tl.program_id(1) // shared).to(tl.int64)
    head = tl.program_id(1) % shared
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    token = row // groups
    query_heads = head * groups + row % groups
    live = token < tokens
    own_position = positions + batch * positions_batch + token * positions_token
    position = tl.load(own_position, mask=live, other=0).to(tl.int32)
    own_slot = slots + batch * slots_batch + token * slots_token
    slot = tl.load(own_slot, mask=live, other=0).to(tl.int32)
    feature = tl.arange(0, padded)
    asked = query + batch * (query_batch * unit) + query_heads[:, None] * (query_head * unit)
    asked += token[:, None] * (query_token * unit) + feature[None, :]
    wanted = tl.load(asked, mask=live[:, None] & (feature < size)[None, :], other=0.0)

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
        top = tl.full([rows], float("-inf"), tl.float32)
        total = tl.full([rows], 0.0, tl.float32)
        summed = tl.full([rows, value_padded], 0.0, tl.float32)
        spoiled = tl.full([rows, value_padded], 0.0, tl.float32)
        # Always all blocks of a split: what isn't seen is not read, but computed with.
        for offset in range(0, split_slots, block):
            within = offset + tl.arange(0, block)
            top, total, summed, spoiled = block_step(
                wanted,
                split_keys,
                split_values,
                start,
                within,
                begin,
                end,
                position,
                first,
                slot,
                scale,
                keys_slot,
                values_slot,
                top,
                total,
                summed,
                spoiled,
                size,
                value_size,
                padded,
                value_padded,
                unit,
                value_unit,
                False,
            )
        # No weight at all times infinity is NaN. So where a value isn't finite no row's sum is, and
        # they are made anew, more slowly, so that it comes to those rows alone that see it.
        if tl.max(tl.max(tl.where(tl.abs(summed) < float("inf"), 0, 1), 1), 0) > 0:
            top = tl.full([rows], float("-inf"), tl.float32)
            total = tl.full([rows], 0.0, tl.float32)
            summed = tl.full([rows, value_padded], 0.0, tl.float32)
            for offset in tl.range(0, split_slots, block, num_stages=1):
                within = offset + tl.arange(0, block)
                top, total, summed, spoiled = block_step(
                    wanted,
                    split_keys,
                    split_values,
                    start,
                    within,
                    begin,
                    end,
                    position,
                    first,
                    slot,
                    scale,
                    keys_slot,
                    values_slot,
                    top,
                    total,
                    summed,
                    spoiled,
                    size,
                    value_size,
                    padded,
                    value_padded,
                    unit,
                    value_unit,
                    True,
                )
            summed = tl.where(spoiled == 0.0, summed, float("nan"))

        out = (batch * tokens + token) * (shared * groups) + query_heads
        out = out * splits + split
        tl.store(tops + out, top, mask=live)
        tl.store(totals + out, total, mask=live)
        value_feature = tl.arange(0, value_padded)
        sums_at = sums + out[:, None] * value_size + value_feature[None, :]
        tl.store(sums_at, summed, mask=live[:, None] & (value_feature < value_size)[None, :])


def flash_combine(
    sums: tl.tensor,
    tops: tl.tensor,
    totals: tl.tensor,
    positions: tl.tensor,
    slots: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    capacity: tl.tensor,
    window: tl.tensor,
    splits: tl.tensor,
    positions_batch: tl.tensor,
    positions_token: tl.tensor,
    slots_batch: tl.tensor,
    slots_token: tl.tensor,
    heads: tl.constexpr,
    value_size: tl.constexpr,
    columns: tl.constexpr,
    split_slots: tl.constexpr,
    chunk: tl.constexpr,
) -> None:
    """One row's output, ``columns`` features of it, from the splits that the row itself sees.

    Program ``(i, j)``: row ``i`` of ``[B, T, Hq]``, the ``j``-th features. Splits outside of what
    the row sees have never been written by anyone, or say nothing about it; they are not read.
    """
    row = tl.program_id(0)
    batch = (row // heads) // tokens
    token = (row // heads) % tokens
    own_position = positions + batch.to(tl.int64) * positions_batch + token * positions_token
    position = tl.load(own_position).to(tl.int32)
    own_slot = slots + batch.to(tl.int64) * slots_batch + token * slots_token
    slot = tl.load(own_slot).to(tl.int32)
    first = tl.maximum(position - window + 1, 0)
    begin = tl.maximum(tl.minimum(first, slot), 0)
    end = tl.minimum(tl.maximum(position, slot + 1), capacity)
    stop = (end + split_slots - 1) // split_slots
    feature = tl.program_id(1) * columns + tl.arange(0, columns)
    mine = row.to(tl.int64) * splits

    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.full([1], 0.0, tl.float32)
    summed = tl.full([columns], 0.0, tl.float32)
    for start in range(begin // split_slots, stop, chunk):
        split = start + tl.arange(0, chunk)
        there = split < stop
        chunk_tops = tl.load(tops + mine + split, mask=there, other=float("-inf"))
        chunk_totals = tl.load(totals + mine + split, mask=there, other=0.0)
        sums_at = sums + (mine + split)[:, None] * value_size + feature[None, :]
        wanted = there[:, None] & (feature < value_size)[None, :]
        chunk_sums = tl.load(sums_at, mask=wanted, other=0.0)
        higher = tl.maximum(top, tl.max(chunk_tops, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        kept = tl.exp2(top - base)
        share = tl.exp2(chunk_tops - base)
        total = total * kept + tl.sum(chunk_totals * share, 0)
        summed = summed * kept + tl.sum(chunk_sums * share[:, None], 0)
        top = higher
    result = summed / tl.where(total == 0.0, 1.0, total)
    out_at = out + row.to(tl.int64) * value_size + feature
    tl.store(out_at, result.to(out.dtype.element_ty), mask=feature < value_size)


_POSITIONS = [
    "positions",
    "slots",
    "tokens",
    "capacity",
    "window",
    "splits",
    "positions_batch",
    "positions_token",
    "slots_batch",
    "slots_token",
]
_STRIDES = [
    "query_batch",
    "query_head",
    "query_token",
    "keys_batch",
    "keys_head",
    "keys_slot",
    "values_batch",
    "values_head",
    "values_slot",
]
split_kernel = triton.jit(flash_split, do_not_specialize=_POSITIONS + _STRIDES)
combine_kernel = triton.jit(flash_combine, do_not_specialize=_POSITIONS)
