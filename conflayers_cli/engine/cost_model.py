"""What passes cost on a device, by kind, context length and batch size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import pairwise

from conflayers_cli.skip_plan import SkipPlan


@dataclass(frozen=True)
class PassCosts:
    """Seconds per pass at one batch size and context length.

    Attributes:
        verify: full pass by width (tokens per sequence), at least one entry.
        floor: a draft pass of one token without any layer: embedding, final norm, logits, host.
        attention: one attention sub-layer, one token.
        mlp: one MLP sub-layer, one token.
        context: positions in the cache when measured.
        attention_per_position: added to one attention sub-layer by every further position in the
            cache (KnapSpec, arXiv 2602.20217: attention's latency is linear in the context).
        attention_per_position_and_token: added to that for each token of the width after the first.
        turnaround: between two draft passes, for the first one's token to be read and the second
            to be launched; 0 where passes can't be launched ahead.
        int4_attention, int4_mlp, int4_floor: with four-bit weights; 0 where not measured.
    """

    verify: Mapping[int, float]
    floor: float
    attention: float
    mlp: float
    context: int
    attention_per_position: float = 0.0
    attention_per_position_and_token: float = 0.0
    turnaround: float = 0.0
    int4_attention: float = 0.0
    int4_mlp: float = 0.0
    int4_floor: float = 0.0

    @property
    def has_int4(self) -> bool:
        """Whether passes with four-bit weights were measured."""
        return self.int4_mlp > 0

    def at(self, context: int, depth: int) -> PassCosts:
        """The costs with ``context`` positions in the cache of a model with ``depth`` layers."""
        positions = context - self.context
        more = max(self.attention_per_position * positions, -self.attention)
        wider = depth * self.attention_per_position_and_token * positions
        verify, slowest = {}, min(self.floor, *self.verify.values())
        for width in sorted(self.verify):
            # At a shorter context growth is subtracted, but not so much that wider gets cheaper.
            seconds = self.verify[width] + depth * more + (width - 1) * wider
            verify[width] = slowest = max(slowest, seconds)
        int4 = max(self.int4_attention + more, 0.0) if self.has_int4 else 0.0
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
                return _mix(self.verify[low], self.verify[high], share)
        return self.verify[widths[-1]] * width / widths[-1]

    def draft_cost(self, plan: SkipPlan, depth: int) -> float:
        """Seconds of one draft token under a plan."""
        attention, mlp, floor = self.attention, self.mlp, self.floor
        if plan.weights == "int4" and self.has_int4:
            attention, mlp, floor = self.int4_attention, self.int4_mlp, self.int4_floor
        return floor + (depth - len(plan.attention)) * attention + (depth - len(plan.mlp)) * mlp


@dataclass(frozen=True)
class CostTable:
    """What passes cost by batch size.

    Attributes:
        by_batch: costs by batch size, at least one entry. A pass of width w over b sequences has
            b·w tokens.
        depth: the model's layers.
    """

    by_batch: Mapping[int, PassCosts]
    depth: int

    def at(self, batch: int, context: int) -> PassCosts:
        """The costs of passes over ``batch`` sequences with ``context`` positions in the cache.

        Linear between the batch sizes measured; outside them those of the nearest.
        """
        sizes = sorted(self.by_batch)
        high = next((size for size in sizes if size >= batch), sizes[-1])
        low = max((size for size in sizes if size <= batch), default=high)
        one, other = (self.by_batch[size].at(context, self.depth) for size in (low, high))
        if low == high:
            return one
        share = (batch - low) / (high - low)
        widths = sorted({*one.verify, *other.verify})
        mixed = {
            field.name: _mix(getattr(one, field.name), getattr(other, field.name), share)
            for field in fields(PassCosts)
            if field.name not in ("verify", "context")
        }
        verify = {w: _mix(one.verify_cost(w), other.verify_cost(w), share) for w in widths}
        return PassCosts(verify=verify, context=context, **mixed)


def _mix(one: float, other: float, share: float) -> float:
    return one + share * (other - one)
