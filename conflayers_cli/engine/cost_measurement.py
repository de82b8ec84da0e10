"""What passes cost on the device at hand, measured."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch

from conflayers_cli.engine.argmax import greedy_tokens
from conflayers_cli.engine.cost_model import Costs
from conflayers_cli.engine.decoder import FULL, Decoder
from conflayers_cli.kernels.kv_cache import EXTENT_MULTIPLE, KVCache
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.utils.distributed import agreed

WIDTHS = (1, 2, 3, 5, 9, 17, 26)
"""Verification widths measured; costs between them are interpolated."""
BATCH_WIDTHS = (1, 2, 5)
"""Those measured however many rows there are; wider ones up to `MOST_TOKENS` in a pass."""
MOST_TOKENS = 64
MOST_LOGITS = 128
"""Tokens of a pass up to which all their logits are computed, as verification does: of more, that
many would be a large part of the memory."""
LONG = 6
"""The longer context that attention's growth is measured at, in usual ones."""
LONG_WIDTH = 9
"""The wider pass measured there."""
STABLE = 0.02
"""Measuring ends as soon as one more round changes no figure by more than this share of it."""
NEARLY_STABLE = 0.1
"""The same once it has taken long."""
LEAST_ROUNDS = 4
LEAST_SHARE = 0.1
"""Of a layer's cost, for either of its sub-layers: that one of them is free is noise."""

SHALLOW = 3
"""A model with no more layers is measured by what the first and the last one cost alone."""
FED = 8
"""Passes launched ahead, or one by one, to see what waiting for the host takes."""

Key = tuple[str, int]


def measure_costs(
    decoder: Decoder,
    context: int = 256,
    rounds: int = 16,
    *,
    growth: bool = True,
    batch: int = 1,
    seconds: float = 4.0,
    int4: bool = False,
) -> Costs:
    """Measure a model's passes, all kinds interleaved, each the lower quartile of the rounds.

    Kinds of sub-layers are told apart by passes that leave out all middle layers, or all middle
    MLPs. Where sub-layers can't be left out one by one, a layer's cost is split evenly: it then
    only ever counts as a whole. A narrow and a wider pass over a longer context tell what attention
    takes more there.

    Args:
        decoder: the model.
        context: positions in the cache; fewer where the model takes no such text.
        rounds: measurements of each kind at the most; fewer from `LEAST_ROUNDS` on, see `STABLE`.
        growth: measure attention over a longer context, too; else it is taken not to grow.
        batch: rows of every pass.
        seconds: after which two rounds are enough if they nearly agree, `NEARLY_STABLE`: a large
            model's passes are long, and a stall of the machine is a small part of one. After three
            times that measuring ends in any case.
        int4: measure drafts with weights of four bits, too, where there may be such.
    """
    widths = widths_for(batch)
    room = _room(decoder) - max(widths)
    context = max(1, min(context, room))
    longer = -(-(LONG - 1) * context // EXTENT_MULTIPLE) * EXTENT_MULTIPLE
    # Keys are read in whole extents: at the same place in its extent, growth shows as it is.
    long = context + longer if growth and context + longer <= room else context
    cache = _filled_cache(decoder, long + max(widths), batch)
    passes = _passes(decoder, cache, widths, context, long)
    if int4 and decoder.stack.int4.reason is None:
        passes |= _int4_passes(decoder, cache, context)
    typical = _quartiles(passes, rounds, seconds, decoder.runner.warm_ups)
    return agreed(_costs(typical, widths, decoder.depth, context, long))


def widths_for(batch: int) -> tuple[int, ...]:
    """The widths measured for so many rows."""
    return tuple(w for w in WIDTHS if w in BATCH_WIDTHS or w * batch <= MOST_TOKENS or batch == 1)


def _passes(
    decoder: Decoder, cache: KVCache, widths: tuple[int, ...], context: int, long: int
) -> dict[Key, Callable[[], float]]:
    """What to measure; each call runs it once and gives its seconds."""
    run = partial(_time, decoder, cache)
    middle = range(1, decoder.depth - 1)
    passes: dict[Key, Callable[[], float]] = {
        ("verify", width): partial(run, FULL, context, width) for width in widths
    }
    passes["none", 1] = partial(run, SkipPlan.of_layers(middle), context, 1)
    if decoder.depth > SHALLOW:
        passes["draft", 1] = partial(run, SkipPlan.of_layers([1]), context, 1)
    if len(decoder.sub_layers) == 2:
        passes["no mlp", 1] = partial(run, SkipPlan.of(mlp=middle), context, 1)
    if long > context:
        for width in (1, min(LONG_WIDTH, widths[-1])):
            passes["long", width] = partial(run, FULL, long, width)
    if cache.batch == 1 and decoder.decode_ahead(0, context, cache, SkipPlan.of_layers(middle)):
        for ahead in (1, FED):
            passes["fed", ahead] = partial(_time_fed, decoder, cache, context, ahead)
    head = decoder.model.get_output_embeddings()
    if isinstance(features := getattr(head, "in_features", None), int):
        shape = (cache.batch, decoder.invariance.min_rows, features)
        states = torch.ones(shape, dtype=decoder.dtype, device=decoder.device)
        passes["head", 1] = partial(_time_head, head, states)
    return passes


def _int4_passes(decoder: Decoder, cache: KVCache, context: int) -> dict[Key, Callable[[], float]]:
    """The same for drafts with weights of four bits."""
    run = partial(_time, decoder, cache)
    middle = range(1, decoder.depth - 1)
    found = {
        ("int4", 1): partial(run, SkipPlan(weights="int4"), context, 1),
        ("int4 none", 1): partial(run, SkipPlan.of(middle, middle, weights="int4"), context, 1),
    }
    if len(decoder.sub_layers) == 2:
        without = SkipPlan.of(mlp=middle, weights="int4")
        found["int4 no mlp", 1] = partial(run, without, context, 1)
    return dict(found)


def _quartiles(
    passes: Mapping[Key, Callable[[], float]], rounds: int, seconds: float, warm_ups: int
) -> dict[Key, float]:
    """Lower quartile of each pass over the rounds: what else the machine does only adds time."""
    times: dict[Key, list[float]] = {key: [] for key in passes}
    for _ in range(warm_ups - 1):
        for run in passes.values():
            run()
    begin = time.perf_counter()
    for round_ in range(rounds + 1):
        for key, run in passes.items():
            taken = run()
            if round_:  # the first round warms up, too
                times[key].append(taken)
        if round_ < 2:
            continue
        change = max(map(_last_change, times.values()))
        late = (time.perf_counter() - begin) / seconds if seconds else math.inf
        if agreed(
            (round_ > LEAST_ROUNDS and change <= STABLE)
            or (late > 1 and change <= NEARLY_STABLE)
            or late > 3
        ):
            break
    return {key: sorted(values)[len(values) // 4] for key, values in times.items()}


def _last_change(values: list[float]) -> float:
    """By how much of itself the last value has changed the lower quartile."""
    place = min(len(values) // 4, len(values) - 2)
    now, before = sorted(values)[place], sorted(values[:-1])[place]
    return abs(now - before) / now if now else 0.0


def _room(decoder: Decoder) -> int:
    """Positions that the model takes."""
    bounds = (getattr(decoder.config, "max_position_embeddings", None), decoder.exact_positions)
    return min((int(bound) for bound in bounds if bound is not None), default=sys.maxsize)


@torch.inference_mode()
def _filled_cache(decoder: Decoder, length: int, batch: int) -> KVCache:
    """A cache that holds a short random text, over and over: what it says takes no time to read."""
    cache = decoder.new_cache(length, batch)
    count = min(length, max(WIDTHS))
    positions = torch.arange(count).expand(batch, -1)
    decoder.forward(_text(decoder, batch, count), positions, cache, last_only=True)
    for layer in cache.layers:
        for states in (layer.keys, layer.values):
            for begin in range(count, states.shape[2], count):
                block = states[:, :, begin : begin + count]
                block.copy_(states[:, :, : block.shape[2]])
    return cache


def _text(decoder: Decoder, batch: int, count: int) -> torch.Tensor:
    """Random tokens ``[B, T]``: with one token over and over all rows would meet one expert."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(decoder.vocabulary, (batch, count), generator=generator)


def _costs(
    typical: Mapping[Key, float], widths: tuple[int, ...], depth: int, context: int, long: int
) -> Costs:
    """Costs by kind from the seconds of the passes measured."""
    verify, cheapest = {}, math.inf
    for width in reversed(widths):
        # Noise only adds time, and a wider pass takes no less than a narrower one: where one was
        # measured to, it is the narrower one that was disturbed.
        verify[width] = cheapest = min(cheapest, typical["verify", width])
    inner = max(depth - 2, 1)
    none = min(typical["none", 1], verify[1])
    # Drafts read their keys in smaller extents than passes that decide, so that those tell more.
    full, more = (typical["draft", 1], depth - 3) if depth > SHALLOW else (verify[1], inner)
    layer = max(full - none, 0.0) / more if depth > 2 else 0.0
    floor = max(none - 2 * layer, 0.0)
    mlp = _share_of_mlp(layer, floor + depth * layer - typical.get(("no mlp", 1), math.nan), inner)
    int4_layer = int4_mlp = int4_floor = 0.0
    if ("int4", 1) in typical:
        full, none = typical["int4", 1], min(typical["int4 none", 1], typical["int4", 1])
        int4_layer = (full - none) / inner if depth > 2 else 0.0
        int4_floor = max(none - 2 * int4_layer, 0.0)
        int4_mlp = _share_of_mlp(
            int4_layer, full - typical.get(("int4 no mlp", 1), math.nan), inner
        )
    slope = slope_by_token = 0.0
    if long > context:
        wide = min(LONG_WIDTH, widths[-1])
        places = depth * (long - context)
        narrow, wider = (max(typical["long", w] - verify[w], 0.0) for w in (1, wide))
        slope = narrow / places
        slope_by_token = max(wider - narrow, 0.0) / places / (wide - 1)
    turnaround = 0.0
    if ("fed", FED) in typical:
        turnaround = max(typical["fed", 1] - typical["fed", FED], 0.0) / FED
    head = min(typical.get(("head", 1), 0.0), floor)
    return Costs(
        verify=dict(sorted(verify.items())),
        floor=floor,
        attention=layer - mlp,
        mlp=mlp,
        context=context,
        attention_per_position=slope,
        head=head,
        attention_per_position_and_token=slope_by_token,
        turnaround=turnaround,
        int4_attention=int4_layer - int4_mlp,
        int4_mlp=int4_mlp,
        int4_floor=int4_floor,
    )


def _share_of_mlp(layer: float, saved: float, inner: int) -> float:
    """What of a layer's cost is its MLP's, from what a pass saves without ``inner`` of them.

    Half of it where that was not measured (NaN).
    """
    least = LEAST_SHARE * layer
    return layer / 2 if math.isnan(saved) else min(max(saved / inner, least), layer - least)


def _time(decoder: Decoder, cache: KVCache, plan: SkipPlan, context: int, width: int) -> float:
    tokens = _text(decoder, cache.batch, width)
    positions = torch.arange(context, context + width).expand_as(tokens)
    last_only = tokens.numel() > MOST_LOGITS
    begin = clock(decoder.device)
    logits = decoder.forward(tokens, positions, cache, plan, last_only=last_only)
    greedy_tokens(logits).tolist()
    return clock(decoder.device) - begin


def _time_fed(decoder: Decoder, cache: KVCache, context: int, ahead: int) -> float:
    """Seconds of `FED` draft passes, of which so many are launched before one is read."""
    begin = clock(decoder.device)
    feed = decoder.decode_ahead(0, context, cache, SkipPlan.of_layers(range(1, decoder.depth - 1)))
    if feed is None:
        raise ValueError("passes can't be launched ahead any more")
    for launched in range(FED):
        feed.launch(min(ahead, FED - launched) - feed.ahead)
        feed.read()
    return clock(decoder.device) - begin


@torch.inference_mode()
def _time_head(head: torch.nn.Module, states: torch.Tensor) -> float:
    begin = clock(states.device)
    head(states)
    return clock(states.device) - begin


def clock(device: torch.device) -> float:
    """Seconds now, with the device's queue of work done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
