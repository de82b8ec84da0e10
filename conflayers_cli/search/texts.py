"""Which texts plans are judged by, and how much memory that takes.

Held at once are the keys and values of the texts, and the hidden states of one plan at every
position judged. With ``n`` texts of ``s`` slots (prompt, answer and draft, in blocks of 512), ``k``
bytes a slot, ``p`` positions in all, ``L`` layers of size ``d`` and ``b`` bytes a number:

    n · s · k  +  2 · L · p · d · b

The first part is kept to half of the memory allowed by judging by fewer texts, the second to a
quarter by keeping states before every second, third, … sub-layer; the rest is for passes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.kernels.kv_cache import round_up_kv_len
from conflayers_cli.search.forced_text import MAX_POSITIONS

NUM_TEXTS = 6
"""Texts that plans are judged by where nothing else is asked for."""
MIN_TEXTS = 2
ANSWER_TOKENS = 512
"""Of each answer that are decoded at the most, for positions spread over it to be judged."""
ENOUGH_SECONDS = 60.0
"""Of a budget: with less time answers end with the positions judged."""
SECONDS_PER_TEXT = 8.0
"""Of a budget: with less time plans are judged by fewer texts."""

TokenIds = tuple[int, ...]


def balanced(
    prompts: Sequence[TokenIds], categories: Mapping[TokenIds, str | None]
) -> list[TokenIds]:
    """The prompts, one of each category in turn."""
    by_category: dict[str | None, list[TokenIds]] = defaultdict(list)
    for prompt in prompts:
        by_category[categories.get(prompt)].append(prompt)
    groups, found = list(by_category.values()), []
    for i in range(max(map(len, groups), default=0)):
        found += [group[i] for group in groups if i < len(group)]
    return found


def num_tokens(max_new_tokens: int, budget: float | None = None) -> int:
    """Tokens of each answer that plans are judged by; ``budget``: seconds for the calibration."""
    hurried = budget is not None and budget < ENOUGH_SECONDS
    return min(max_new_tokens, MAX_POSITIONS + 1 if hurried else ANSWER_TOKENS)


def num_texts(
    decoder: Decoder,
    prompts: Sequence[TokenIds],
    wanted: int,
    memory: int,
    budget: float | None = None,
    *,
    tokens: int = MAX_POSITIONS,
) -> int:
    """How many of the prompts, from the first on, plans are judged by.

    Args:
        decoder: the model.
        prompts: the longest one decides.
        wanted: at most.
        memory: bytes allowed in all; `MIN_TEXTS` may take more.
        budget: seconds for the calibration.
        tokens: of every answer.
    """
    count = min(wanted, len(prompts))
    if budget is not None:
        count = min(count, int(budget / SECONDS_PER_TEXT))
    slot = decoder.kv_bytes_per_slot
    while count > MIN_TEXTS and slot:
        slots = max(map(len, prompts[:count])) + tokens + MAX_POSITIONS
        if count * round_up_kv_len(slots) * slot <= memory // 2:
            break
        count -= 1
    return max(count, min(MIN_TEXTS, len(prompts)))


def states_stride(decoder: Decoder, positions: int, limit: int) -> int:
    """Before every so many sub-layers hidden states can be kept within ``limit`` bytes; 0: none.

    All take ``2 · layers · positions · hidden size`` numbers of the model's dtype.
    """
    hidden = int(decoder.config.hidden_size)
    every = 2 * decoder.depth * positions * hidden * decoder.dtype.itemsize
    if every <= limit:
        return 1
    return min(-(-every // limit), 2 * decoder.depth) if 4 * limit >= every // decoder.depth else 0
