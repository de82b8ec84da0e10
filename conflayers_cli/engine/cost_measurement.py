"""Measuring what passes cost on this device."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from conflayers_cli.engine.argmax import greedy_tokens
from conflayers_cli.engine.cost_model import PassCosts
from conflayers_cli.engine.decoder import FULL, Decoder
from conflayers_cli.engine.graph_runner import clock
from conflayers_cli.kernels.kv_cache import KVCache, round_up_kv_len
from conflayers_cli.skip_plan import SkipPlan, Weights
from conflayers_cli.utils.distributed import broadcast_rank0

WIDTHS = (1, 2, 3, 5, 9, 17, 26)
"""Verification widths measured; costs between them are interpolated."""
BATCH_WIDTHS, MAX_TOKENS = (1, 2, 5), 64
"""Those measured for every batch size; wider ones up to so many tokens in a pass."""
MAX_LOGITS = 128
"""Tokens of a pass up to which all their logits are computed, as verification does: of more, they
would be a large part of the memory."""
LONG = 6
"""The longer context that attention's growth is measured at, in multiples of the usual one."""
LONG_WIDTH = 9
"""The wider pass measured there."""
RUN = 4
"""Draft passes behind each other, as in a draft: the second finds a part of the weights in the
processor's cache, and takes a seventh less."""
STABLE = 0.01
"""Measuring ends as soon as the median of every pass is known to this share."""
NEARLY_STABLE = 0.03
"""The same once it has taken long."""
MIN_ROUNDS = 5
PROBES = 5
"""Rounds that tell whether known costs still hold."""
IMPLAUSIBLE = 0.1
"""Share by which a draft may take more or less of a full pass than is known."""
MIN_SHARE = 0.1
"""Of a layer's cost, for either of its sub-layers: that one of them is free is noise."""
SHALLOW = 3
"""Layers up to which a model's layer cost comes from the first and the last one alone."""
ASYNC_PASSES = 8
"""Passes launched ahead, or one by one, to see what waiting for the host takes."""

Key = tuple[str, int]
"""What a pass is, and its width."""


def measure_costs(
    decoder: Decoder,
    context: int = 256,
    rounds: int = 64,
    *,
    growth: bool = True,
    batch: int = 1,
    seconds: float = 4.0,
    int4: bool = False,
) -> PassCosts:
    """Measure a model's passes, all kinds in each of several rounds. A pass counts by the median of
    its ratios to a pass of one token of the same round: a machine is quick at one moment and slow
    at the next, and all passes of a round meet the same moment.

    Sub-layers' costs come from passes that leave out all middle layers, or all middle MLPs. Where
    sub-layers can't be left out one by one, a layer's cost is split evenly: it then only ever
    counts as a whole. Attention's growth comes from a narrow and a wider pass at a longer context.

    Args:
        decoder: the model.
        context: positions in the cache; fewer where the model takes no such text.
        rounds: measurements of each kind at most; fewer from `MIN_ROUNDS` on, see `STABLE`.
        growth: measure attention at a longer context, too; else it is taken not to grow.
        batch: sequences of every pass.
        seconds: after which it is enough to know the medians nearly (`NEARLY_STABLE`); after three
            times that measuring ends in any case.
        int4: measure drafts with four-bit weights, too, where there are any.
    """
    widths = widths_for(batch)
    bounds = (getattr(decoder.config, "max_position_embeddings", None), decoder.exact_positions)
    bound = min((bound for bound in bounds if bound is not None), default=sys.maxsize)
    max_context = bound - max(widths)
    context = max(1, min(context, max_context))
    # Whole blocks further on: at the same offset in its block, growth shows as it is.
    long = context + round_up_kv_len((LONG - 1) * context)
    if not growth or long > max_context:
        long = context
    cache = _filled_cache(decoder, long + max(widths), batch)
    passes = _passes(decoder, cache, widths, context, long)
    passes |= _draft_passes(decoder, cache, context)
    if int4 and decoder.stack.int4.reason is None:
        passes |= _draft_passes(decoder, cache, context, int4=True)
    typical = _typical(passes, rounds, seconds, decoder.runner.warm_ups)
    return broadcast_rank0(_costs(typical, widths, decoder.depth, context, long))


def widths_for(batch: int) -> tuple[int, ...]:
    """The widths measured for a batch size."""
    return tuple(w for w in WIDTHS if w in BATCH_WIDTHS or w * batch <= MAX_TOKENS or batch == 1)


def _passes(
    decoder: Decoder, cache: KVCache, widths: tuple[int, ...], context: int, long: int
) -> dict[Key, Callable[[], float]]:
    """Full and asynchronous passes to measure; each call runs one and returns its seconds."""
    run = partial(_time, decoder, cache, FULL)
    passes: dict[Key, Callable[[], float]] = {
        ("verify", width): partial(run, context, width) for width in widths
    }
    if long > context:
        for width in (1, min(LONG_WIDTH, widths[-1])):
            passes["long", width] = partial(run, long, width)
    plan = SkipPlan.of_layers(range(1, decoder.depth - 1))
    if cache.batch == 1 and decoder.decode_ahead(0, context, cache, plan):
        for ahead in (1, ASYNC_PASSES):
            passes["async", ahead] = partial(_time_async, decoder, cache, plan, context, ahead)
    return passes


def _draft_passes(
    decoder: Decoder, cache: KVCache, context: int, *, int4: bool = False
) -> dict[Key, Callable[[], float]]:
    """The same of draft passes, with the model's own weights or with four-bit ones."""
    middle = tuple(range(1, decoder.depth - 1))
    weights: Weights | None = "int4" if int4 else None
    plans = {"none": SkipPlan(middle, middle, weights)}
    if int4:
        plans["full"] = SkipPlan(weights=weights)
    elif decoder.depth > SHALLOW:
        plans["one less"] = SkipPlan.of_layers([1])
    if len(decoder.sub_layers) == 2:
        plans["no mlp"] = SkipPlan((), middle, weights)
    prefix = "int4 " if int4 else ""
    return {
        (prefix + name, 1): partial(_time_draft, decoder, cache, plan, context)
        for name, plan in plans.items()
    }


def costs_hold(decoder: Decoder, known: PassCosts) -> bool:
    """Whether drafts take as much of a full pass as is known.

    False: what is known was measured while something else disturbed one of the two.
    """
    context = min(known.context, (decoder.exact_positions or sys.maxsize) - 1)
    cache = _filled_cache(decoder, context + 1, 1)
    plan = SkipPlan(weights="int4" if known.has_int4 else None)
    if not plan:
        plan = SkipPlan.of_layers(range(1, decoder.depth - 1))
    if not plan:  # two layers: drafts leave out nothing
        return True
    passes: dict[Key, Callable[[], float]] = {
        ("verify", 1): partial(_time, decoder, cache, FULL, context, 1),
        ("draft", 1): partial(_time_draft, decoder, cache, plan, context),
    }
    now = _typical(passes, PROBES, math.inf, decoder.runner.warm_ups)
    ratio = known.draft_cost(plan, decoder.depth) / known.verify_cost(1)
    return broadcast_rank0(
        abs(now["draft", 1] / now["verify", 1] - ratio) <= IMPLAUSIBLE * max(ratio, IMPLAUSIBLE)
    )


def _typical(
    passes: Mapping[Key, Callable[[], float]], rounds: int, seconds: float, warm_ups: int
) -> dict[Key, float]:
    """Each pass's median ratio to a full pass of one token of the same round, times the median of
    that one; there are more rounds while these medians are not known well."""
    times: dict[Key, list[float]] = {key: [] for key in passes}
    for _ in range(warm_ups):
        for run in passes.values():
            run()
    one, begin = times["verify", 1], time.perf_counter()
    ratios: dict[Key, list[float]] = {}
    for round_ in range(rounds):
        for key, run in passes.items():
            times[key].append(run())
        ratios = {
            key: sorted(t / base for t, base in zip(own, one, strict=True))
            for key, own in times.items()
        }
        if not round_:
            continue
        late = (time.perf_counter() - begin) / seconds if seconds else math.inf
        error = max(map(_error, ratios.values()))
        if broadcast_rank0(
            (round_ + 1 >= MIN_ROUNDS and error <= STABLE)
            or (late > 1 and error <= NEARLY_STABLE)
            or late > 3
        ):
            break
    level = statistics.median(one)
    return {key: level * statistics.median(own) for key, own in ratios.items()}


def _error(ordered: Sequence[float]) -> float:
    """The standard error of a median, as a share of it, from the quartiles."""
    count, middle = len(ordered), statistics.median(ordered)
    spread = ordered[-1 - count // 4] - ordered[count // 4]
    return 0.93 * spread / middle / count**0.5 if middle else 0.0


@torch.inference_mode()
def _filled_cache(decoder: Decoder, length: int, batch: int) -> KVCache:
    """A cache filled with a short random text, over and over: values don't change the time."""
    cache = decoder.new_cache(length, batch)
    count = min(length, max(WIDTHS))
    positions = torch.arange(count).expand(batch, -1)
    decoder.forward(_tokens(decoder, batch, count), positions, cache, last_only=True)
    for layer in cache.layers:
        for states in (layer.keys, layer.values):
            for begin in range(count, states.shape[2], count):
                block = states[:, :, begin : begin + count]
                block.copy_(states[:, :, : block.shape[2]])
    return cache


def _tokens(decoder: Decoder, batch: int, count: int) -> torch.Tensor:
    """Random tokens ``[B, T]``: equal ones would all go to the same expert of a mixture."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(decoder.vocabulary, (batch, count), generator=generator)


def _costs(
    typical: Mapping[Key, float], widths: tuple[int, ...], depth: int, context: int, long: int
) -> PassCosts:
    """Costs from the seconds of the passes measured."""
    verify, cheapest = {}, math.inf
    for width in reversed(widths):
        # Noise only adds time, and a wider pass takes no less than a narrower one: where one was
        # measured to, it is the narrower one that was disturbed.
        verify[width] = cheapest = min(cheapest, typical["verify", width])
    inner = max(depth - 2, 1)
    none = min(typical["none", 1], verify[1])
    # Drafts may read fewer slots than verification, so they tell a layer's draft cost better.
    one_less = typical.get(("one less", 1))
    full, more = (verify[1], inner) if one_less is None else (one_less, depth - 3)
    layer = max(full - none, 0.0) / more if depth > 2 else 0.0
    floor = max(none - 2 * layer, 0.0)
    no_mlp = typical.get(("no mlp", 1), math.nan)
    mlp = _mlp_share(layer, floor + depth * layer - no_mlp, inner)
    full = typical.get(("int4 full", 1), 0.0)  # all zeros where that was not measured
    none = min(typical.get(("int4 none", 1), 0.0), full)
    int4_layer = (full - none) / inner if depth > 2 else 0.0
    int4_mlp = _mlp_share(int4_layer, full - typical.get(("int4 no mlp", 1), math.nan), inner)
    slope = slope_by_token = turnaround = 0.0
    if long > context:
        wide = min(LONG_WIDTH, widths[-1])
        positions = depth * (long - context)
        narrow, wider = (max(typical["long", w] - verify[w], 0.0) for w in (1, wide))
        slope = narrow / positions
        slope_by_token = max(wider - narrow, 0.0) / positions / (wide - 1)
    if ("async", 1) in typical:
        waiting = typical["async", 1] - typical["async", ASYNC_PASSES]
        turnaround = max(waiting, 0.0) / ASYNC_PASSES
    return PassCosts(
        verify=dict(sorted(verify.items())),
        floor=floor,
        attention=layer - mlp,
        mlp=mlp,
        context=context,
        attention_per_position=slope,
        attention_per_position_and_token=slope_by_token,
        turnaround=turnaround,
        int4_attention=int4_layer - int4_mlp,
        int4_mlp=int4_mlp,
        int4_floor=max(none - 2 * int4_layer, 0.0),
    )


def _mlp_share(layer: float, saved: float, inner: int) -> float:
    """An MLP's part of a layer's cost, from what a pass saves without ``inner`` (NaN: half)."""
    least = MIN_SHARE * layer
    return layer / 2 if math.isnan(saved) else min(max(saved / inner, least), layer - least)


def _time(decoder: Decoder, cache: KVCache, plan: SkipPlan, context: int, width: int) -> float:
    tokens = _tokens(decoder, cache.batch, width)
    positions = torch.arange(context, context + width).expand_as(tokens)
    begin = clock(decoder.device)
    if tokens.numel() > MAX_LOGITS:
        greedy_tokens(decoder.forward(tokens, positions, cache, plan, last_only=True)).tolist()
    elif plan:
        decoder.greedy_with_confidence(tokens, positions, cache, plan).tolist()
    else:
        decoder.greedy(tokens, positions, cache)
    return clock(decoder.device) - begin


def _time_draft(decoder: Decoder, cache: KVCache, plan: SkipPlan, context: int) -> float:
    """Seconds of a draft pass of one token, among others of the same draft."""
    return sum(_time(decoder, cache, plan, context, 1) for _ in range(RUN)) / RUN


def _time_async(
    decoder: Decoder, cache: KVCache, plan: SkipPlan, context: int, ahead: int
) -> float:
    """Seconds of `ASYNC_PASSES` draft passes, ``ahead`` of them launched before one is read."""
    begin = clock(decoder.device)
    decode = decoder.decode_ahead(0, context, cache, plan)
    if decode is None:
        raise ValueError("passes can't be launched ahead any more")
    for launched in range(ASYNC_PASSES):
        decode.launch(min(ahead, ASYNC_PASSES - launched) - decode.ahead)
        decode.read()
    return clock(decoder.device) - begin
