"""The device itself: its memory's bandwidth, the kernels of a pass, and what bits they give."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu_bench import Bench
from benchmarks.gpu_models import random_prompts
from benchmarks.gpu_runs import Result, describe_decoder
from benchmarks.gpu_shapes import Shape
from benchmarks.gpu_timing import Call, count_copies, free, median_seconds
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.kernels.attention import fold_mask, folded_attention

ROWS = (1, 2, 4, 8, 16, 32)
QUERIES = (1, 5, 9, 17)
"""Tokens of the attention calls that are timed."""
BIT_CONTEXT = 512

Operation = Callable[[int, int], torch.Tensor]
"""(rows, the place among them) → what the operation gives the row under test in that place."""
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(query ``[1, Hq, T, D]``, keys and values ``[1, Hkv, S, D]``) → outputs ``[1, T, Hq, D]``."""
Prepare = Callable[[torch.Tensor, int], Attend]
"""(positions ``[1, T]`` of the queries, S) → what all layers of a pass then call."""


def ceiling(bench: Bench, out: Result) -> None:
    """What the memory gives at the most."""
    out["bytes_per_second"] = bench.bandwidth()
    bench.line("ceiling", "copy, read and written", f"{bench.bandwidth() / 1e12:.3f} TB/s")


# Kernels


def kernels(bench: Bench, out: Result) -> None:
    """Seconds of the products and of attention."""
    for name in ("8b", "13b"):
        found = out[name] = {"products": {}, "attention": {}}
        shape = bench.shape(name)
        for product, (outputs, inputs) in shape.products.items():
            found["products"][product] = timed_product(bench, outputs, inputs)
        for kind, prepare in attentions(bench, shape).items():
            found["attention"][kind] = {}
            for context in bench.options.contexts:
                work = partial(timed_attention, bench, shape, prepare, context)
                timed = bench.attempt("kernels", out, f"{name} {kind} {context}", work)
                found["attention"][kind][str(context)] = timed
        free(bench.device)
        _kernel_lines(bench, name, found)


def timed_product(bench: Bench, outputs: int, inputs: int) -> Result:
    """Seconds and bytes of weights per second, by the number of rows."""
    size = outputs * inputs * torch.bfloat16.itemsize
    weights = [
        _drawn(bench, (outputs, inputs), number) * inputs**-0.5
        for number in range(count_copies(size))
    ]
    found = {}
    for rows in ROWS:
        given = _drawn(bench, (1, rows, inputs), rows)
        calls: list[Call] = [partial(F.linear, given, weight) for weight in weights]
        seconds = median_seconds(bench.device, calls)
        found[str(rows)] = {"seconds": seconds, "bytes_per_second": size / seconds}
    return found


def timed_attention(bench: Bench, shape: Shape, prepare: Prepare, context: int) -> Result:
    """Seconds and bytes of keys and values per second, by the number of tokens."""
    size = 2 * context * shape.shared * shape.size * torch.bfloat16.itemsize
    caches = [
        [_drawn(bench, (1, shape.shared, context, shape.size), 2 * number + i) for i in range(2)]
        for number in range(count_copies(size))
    ]
    found = {}
    for tokens in QUERIES:
        query = _drawn(bench, (1, shape.heads, tokens, shape.size), tokens)
        positions = torch.arange(context - tokens, context, device=bench.device)[None]
        attend = prepare(positions, context)
        calls: list[Call] = [partial(attend, query, *cache) for cache in caches]
        seconds = median_seconds(bench.device, calls)
        found[str(tokens)] = {"seconds": seconds, "bytes_per_second": size / seconds}
    return found


def attentions(bench: Bench, shape: Shape) -> dict[str, Prepare]:
    """The ways to attend that there are here."""
    found: dict[str, Prepare] = {"sdpa": partial(_masked, shape)}
    try:
        flash: Any = importlib.import_module("conflayers_cli.kernels.flash_decode")
    except ImportError:
        return found
    if flash.unsupported_reason(bench.device, torch.bfloat16, shape.size) is None:
        found["flash"] = partial(_flashed, flash.flash_attention)
    return found


def _masked(shape: Shape, positions: torch.Tensor, extent: int) -> Attend:
    every = torch.arange(extent, device=positions.device)
    mask = fold_mask(every <= positions[:, None, :, None], shape.heads // shape.shared)
    added = torch.zeros(mask.shape, dtype=torch.bfloat16, device=mask.device)
    added.masked_fill_(mask.logical_not(), float("-inf"))

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        scaling = query.shape[-1] ** -0.5
        return folded_attention(query, keys, values, added, scaling).transpose(1, 2)

    return attend


def _flashed(flash_attention: Any, positions: torch.Tensor, extent: int) -> Attend:
    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return flash_attention(
            query,
            keys,
            values,
            positions=positions,
            slots=None,
            window=None,
            scaling=query.shape[-1] ** -0.5,
        )

    return attend


def _kernel_lines(bench: Bench, name: str, found: Result) -> None:
    for product, by_rows in found["products"].items():
        rates = [f"{own['bytes_per_second'] / bench.bandwidth():.0%}" for own in by_rows.values()]
        rows = ", ".join(by_rows)
        bench.line("kernels", f"{name} {product}, {rows} rows, of the ceiling", " ".join(rates))
    for kind, by_context in found["attention"].items():
        for context, by_tokens in by_context.items():
            if by_tokens:
                times = [f"{own['seconds'] * 1e6:.1f}" for own in by_tokens.values()]
                figure = f"{name} {kind} at {context}, {', '.join(by_tokens)} tokens, µs"
                bench.line("kernels", figure, " ".join(times))


# Bits


def rows(bench: Bench, out: Result) -> None:
    """Whether a row has the same bits among how many rows soever, and in which place."""
    model = bench.model("8b")
    operations = dict(_operations(bench, model.shape, model.model))
    for runner in bench.runners:
        decoder = bench.attempt("rows", out, runner, partial(bench.decoder, runner))
        if decoder is not None:
            operations[f"whole pass, {runner}"] = partial(_pass_row, decoder, _filled(decoder))
            out[f"decoder, {runner}"] = describe_decoder(decoder)
    head = "letters by " + ", ".join(map(str, ROWS)) + " rows"
    for name, operation in operations.items():
        letters = bench.attempt("rows", out, name, partial(classify_rows, operation))
        if letters is not None:
            out[name] = letters
            same = len(set("".join(letters))) == 1
            bench.line("rows", f"{name}, {head}", " ".join(letters), "" if same else "A alone")


def classify_rows(operation: Operation) -> list[str]:
    """For every number of rows a letter for the bits that the row has; the same bits, the same
    letter. Two letters where its bits depend on its place, first or last.
    """
    known: list[torch.Tensor] = []
    found = []
    for count in ROWS:
        letters = []
        for place in dict.fromkeys((0, count - 1)):
            row = operation(count, place).clone()
            number = next((i for i, own in enumerate(known) if torch.equal(own, row)), len(known))
            if number == len(known):
                known.append(row)
            letters.append(chr(ord("A") + number))
        found.append("".join(dict.fromkeys(letters)))
    return found


def _operations(bench: Bench, shape: Shape, model: Any) -> Iterator[tuple[str, Operation]]:
    """Each kind of operation of a pass."""
    for name, (outputs, inputs) in shape.products.items():
        weight = _drawn(bench, (outputs, inputs), 7) * inputs**-0.5
        states = _drawn(bench, (1, max(ROWS), inputs), 8)
        yield name, partial(_placed, states, partial(F.linear, weight=weight))
    states = _drawn(bench, (1, max(ROWS), shape.hidden), 9)
    yield "norm", partial(_placed, states, model.get_decoder().norm)
    sizes = (1, shape.shared, BIT_CONTEXT, shape.size)
    keys, values = (_drawn(bench, sizes, number) for number in (10, 11))
    states = _drawn(bench, (1, max(ROWS), shape.heads * shape.size), 12)
    for kind, prepare in attentions(bench, shape).items():
        yield kind, partial(_attention_row, shape, prepare, states, keys, values)


def _placed(states: torch.Tensor, work: Any, count: int, place: int) -> torch.Tensor:
    """What the first of some states ``[1, N, d]`` gets among ``count`` of them, in its place."""
    with torch.no_grad():
        result: torch.Tensor = work(_ordered(states, count, place))
    return result[0, place]


def _ordered(states: torch.Tensor, count: int, place: int) -> torch.Tensor:
    others = states[:, 1:count]
    return torch.cat([others[:, :place], states[:, :1], others[:, place:]], dim=1)


def _attention_row(
    shape: Shape,
    prepare: Prepare,
    states: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    count: int,
    place: int,
) -> torch.Tensor:
    """The row is at the same position in every pass, as a token does."""
    query = _ordered(states, count, place).view(1, count, shape.heads, shape.size).transpose(1, 2)
    begin = BIT_CONTEXT // 2 - place
    positions = torch.arange(begin, begin + count, device=query.device)[None]
    return prepare(positions, keys.shape[2])(query, keys, values)[0, place]


def _filled(decoder: Decoder) -> tuple[list[int], Any]:
    """A text of the length that is wanted and a bit more, and a cache that is filled with it."""
    (text,) = random_prompts(decoder.vocabulary, BIT_CONTEXT // 2 + max(ROWS), 1, seed=4)
    cache = decoder.new_cache(len(text) + max(ROWS))
    decoder.prefill(torch.tensor([text]), cache)
    return text, cache


def _pass_row(
    decoder: Decoder, filled: tuple[list[int], Any], count: int, place: int
) -> torch.Tensor:
    """Logits of the same token of a text among others, those before and behind it."""
    text, cache = filled
    begin = BIT_CONTEXT // 2 - place
    tokens = torch.tensor([text[begin : begin + count]])
    positions = torch.arange(begin, begin + count)[None]
    for _ in range(4):  # recorded, where passes are
        logits = decoder.forward(tokens, positions, cache)
    return logits[0, place]


def _drawn(bench: Bench, sizes: Sequence[int], seed: int) -> torch.Tensor:
    """Normal numbers in bfloat16."""
    generator = torch.Generator(device=bench.device).manual_seed(seed)
    made = torch.empty(tuple(sizes), dtype=torch.bfloat16, device=bench.device)
    return made.normal_(generator=generator)
