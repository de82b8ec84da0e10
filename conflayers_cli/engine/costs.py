"""What passes cost on the device at hand, measured."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from .cache import KVCache
from .decoder import FULL, Decoder
from .plan import SkipPlan

WIDTHS = (1, 2, 3, 5, 9, 17, 26)
"""Verification widths measured; costs between them are interpolated."""
LONG = 6
"""The longer context that attention's growth is measured at, in usual ones."""


@dataclass(frozen=True)
class Costs:
    """Seconds per pass, batch 1.

    Attributes:
        verify: full pass by width (tokens per pass), at least one entry.
        floor: a draft pass of one token with every layer but the first and the last left out, less
            the two layers: embedding, final norm, logits, and what the host spends.
        attention: one attention sub-layer, one token.
        mlp: one MLP sub-layer, one token.
        context: positions in the cache when measured.
        attention_per_position: what one attention sub-layer takes more for every further position
            in the cache (KnapSpec, arXiv 2602.20217: attention's latency is linear in the context).
    """

    verify: Mapping[int, float]
    floor: float
    attention: float
    mlp: float
    context: int
    attention_per_position: float = 0.0

    def at(self, context: int, depth: int) -> Costs:
        """The costs with ``context`` positions in the cache of a model with ``depth`` layers."""
        more = max(self.attention_per_position * (context - self.context), -self.attention)
        verify = {width: seconds + depth * more for width, seconds in self.verify.items()}
        return replace(self, verify=verify, attention=self.attention + more, context=context)

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

    def draft_cost(self, plan: SkipPlan, depth: int) -> float:
        """Seconds of one draft token under a plan."""
        attention = (depth - len(plan.attention)) * self.attention
        return self.floor + attention + (depth - len(plan.mlp)) * self.mlp


def measure_costs(
    decoder: Decoder, context: int = 256, rounds: int = 7, *, growth: bool = True
) -> Costs:
    """Measure a model's passes, all kinds interleaved, each the lower quartile of ``rounds``.

    Kinds of sub-layers are told apart by passes that leave out all middle layers, or all middle
    MLPs. Where sub-layers can't be left out one by one, a layer's cost is split evenly: it then
    only ever counts as a whole. The same passes over a longer context tell what attention takes
    more there.

    Args:
        decoder: the model.
        context: positions in the cache; fewer where the model takes no such text.
        rounds: measurements of each kind.
        growth: measure attention over a longer context, too; else it is taken not to grow.
    """
    room = _room(decoder) - max(WIDTHS)
    context = max(1, min(context, room))
    depth = decoder.depth
    middle = range(1, depth - 1)
    plans = {"full": FULL, "none": SkipPlan.of_layers(middle)}
    if len(decoder.sub_layers) == 2:
        plans["no mlp"] = SkipPlan.of(mlp=middle)
    long = LONG * context if growth and LONG * context <= room else context
    cache = decoder.new_cache(long + max(WIDTHS))
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(decoder.vocabulary, (1, long), generator=generator)
    decoder.prefill(prompt.to(decoder.device), cache)
    passes: list[tuple[tuple[str, str | int], SkipPlan, int, int]] = [
        *((("verify", width), FULL, context, width) for width in WIDTHS),
        *((("plan", name), plan, context, 1) for name, plan in plans.items()),
        *((("long", name), plans[name], long, 1) for name in ("full", "none")),
    ]
    times: dict[tuple[str, str | int], list[float]] = {key: [] for key, *_ in passes}
    for round_ in range(rounds + 1):
        for key, plan, at, width in passes:
            seconds = _time(decoder, cache, plan, at, width)
            if round_:  # the first round warms up
                times[key].append(seconds)
    # The lower quartile: what else the machine does only ever adds time.
    typical = {key: sorted(values)[len(values) // 4] for key, values in times.items()}
    return _costs(typical, depth, context, long)


def _room(decoder: Decoder) -> int:
    """Positions that the model takes."""
    bounds = (getattr(decoder.config, "max_position_embeddings", None), decoder.exact_positions)
    return min((int(bound) for bound in bounds if bound is not None), default=sys.maxsize)


def _costs(
    typical: Mapping[tuple[str, str | int], float], depth: int, context: int, long: int
) -> Costs:
    """Costs by kind from the seconds of the passes measured."""
    inner = max(depth - 2, 1)
    full, none = typical["plan", "full"], typical["plan", "none"]
    layer = max((full - none) / inner, 0.0) if depth > 2 else 0.0
    mlp = layer / 2
    if ("plan", "no mlp") in typical and depth > 2:
        mlp = min(max((full - typical["plan", "no mlp"]) / inner, 0.0), layer)
    slope = 0.0
    if long > context and depth > 2:
        longer = (typical["long", "full"] - typical["long", "none"]) / inner
        slope = max(longer - layer, 0.0) / (long - context)
    verify, slowest = {}, 0.0
    for width in WIDTHS:
        # A wider pass is never really cheaper; a dip is noise that would mislead the search.
        slowest = max(slowest, typical["verify", width])
        verify[width] = slowest
    return Costs(verify, max(none - 2 * layer, 0.0), layer - mlp, mlp, context, slope)


def _time(decoder: Decoder, cache: KVCache, plan: SkipPlan, context: int, width: int) -> float:
    tokens = torch.full((1, width), 1 % decoder.vocabulary, device=decoder.device)
    positions = torch.arange(context, context + width, device=decoder.device)[None]
    begin = clock(decoder.device)
    decoder.forward(tokens, positions, cache, plan).argmax(dim=-1).tolist()
    return clock(decoder.device) - begin


def clock(device: torch.device) -> float:
    """Seconds now, with the device's queue of work done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
