"""What passes cost on a device, by their kind, the context and the number of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from conflayers_cli.skip_plan import SkipPlan


@dataclass(frozen=True)
class Costs:
    """Seconds per pass over one row, or over as many as were measured together.

    Attributes:
        verify: full pass by width (tokens per row and pass), at least one entry.
        floor: a draft pass of one token with every layer but the first and the last left out, less
            the two layers: embedding, final norm, logits, and what the host spends.
        attention: one attention sub-layer, one token.
        mlp: one MLP sub-layer, one token.
        context: positions in the cache when measured.
        attention_per_position: what one attention sub-layer takes more for every further position
            in the cache (KnapSpec, arXiv 2602.20217: attention's latency is linear in the context).
        head: the logits of one token, which are part of ``floor``.
        attention_per_position_and_token: what one attention sub-layer takes more for every further
            position, for each token of the width behind the first: it compares each with all.
        int4_attention, int4_mlp, int4_floor: with weights of four bits; 0 where nobody asked.
        turnaround: between two draft passes, for the first one's token to be read and the second
            to be launched; 0 where passes can't be launched ahead.
    """

    verify: Mapping[int, float]
    floor: float
    attention: float
    mlp: float
    context: int
    attention_per_position: float = 0.0
    head: float = 0.0
    attention_per_position_and_token: float = 0.0
    turnaround: float = 0.0
    int4_attention: float = 0.0
    int4_mlp: float = 0.0
    int4_floor: float = 0.0

    @property
    def knows_int4(self) -> bool:
        """Whether passes with weights of four bits were measured."""
        return self.int4_mlp > 0

    def at(self, context: int, depth: int) -> Costs:
        """The costs with ``context`` positions in the cache of a model with ``depth`` layers."""
        positions = context - self.context
        more = max(self.attention_per_position * positions, -self.attention)
        wider = depth * self.attention_per_position_and_token * positions
        verify, slowest = {}, 0.0
        for width in sorted(self.verify):
            # At a shorter context the growth is taken off again: not so much that wider is cheaper.
            seconds = self.verify[width] + depth * more + (width - 1) * wider
            verify[width] = slowest = max(slowest, seconds)
        int4 = max(self.int4_attention + more, 0.0) if self.knows_int4 else 0.0
        attention = self.attention + more
        return replace(
            self, verify=verify, attention=attention, int4_attention=int4, context=context
        )

    def verify_cost(self, width: int) -> float:
        """Seconds of a full pass over ``width`` tokens; linear between measured widths."""
        widths = sorted(self.verify)
        if width <= widths[0]:
            return self.verify[widths[0]]
        for low, high in pairwise(widths):
            if width <= high:
                share = (width - low) / (high - low)
                return self.verify[low] + share * (self.verify[high] - self.verify[low])
        return self.verify[widths[-1]] * width / widths[-1]

    def draft_cost(self, plan: SkipPlan, depth: int, vocabulary_share: float = 1.0) -> float:
        """Seconds of one draft token under a plan, with the logits of so much of the vocabulary."""
        rounded = plan.weights == "int4" and self.knows_int4
        attention, mlp = self.attention, self.mlp
        floor = self.floor - (1.0 - vocabulary_share) * self.head
        if rounded:
            attention, mlp, floor = self.int4_attention, self.int4_mlp, self.int4_floor
        layers = (depth - len(plan.attention)) * attention + (depth - len(plan.mlp)) * mlp
        return max(floor, 0.0) + layers


@dataclass(frozen=True)
class CostTable:
    """What passes cost by the number of rows decoded together.

    Attributes:
        by_batch: costs by rows per pass, at least one entry. A width is a row's own tokens: a pass
            of width w over b rows has b·w tokens.
        depth: the model's layers.
    """

    by_batch: Mapping[int, Costs]
    depth: int

    def at(self, rows: int, context: int) -> Costs:
        """The costs of passes over ``rows`` rows with ``context`` positions in the cache.

        Linear between the numbers of rows measured; outside them those of the nearest.
        """
        sizes = sorted(self.by_batch)
        high = next((size for size in sizes if size >= rows), sizes[-1])
        low = max((size for size in sizes if size <= rows), default=high)
        share = 0.0 if high == low else (rows - low) / (high - low)
        one, other = (self.by_batch[size].at(context, self.depth) for size in (low, high))
        return _between(one, other, share) if share else one


def _between(one: Costs, other: Costs, share: float) -> Costs:
    def mix(a: float, b: float) -> float:
        return a + share * (b - a)

    widths = sorted({*one.verify, *other.verify})
    return Costs(
        verify={w: mix(one.verify_cost(w), other.verify_cost(w)) for w in widths},
        floor=mix(one.floor, other.floor),
        attention=mix(one.attention, other.attention),
        mlp=mix(one.mlp, other.mlp),
        context=one.context,
        attention_per_position=mix(one.attention_per_position, other.attention_per_position),
        head=mix(one.head, other.head),
        attention_per_position_and_token=mix(
            one.attention_per_position_and_token, other.attention_per_position_and_token
        ),
        turnaround=mix(one.turnaround, other.turnaround),
        int4_attention=mix(one.int4_attention, other.int4_attention),
        int4_mlp=mix(one.int4_mlp, other.int4_mlp),
        int4_floor=mix(one.int4_floor, other.int4_floor),
    )
