"""Long texts: vanilla against `generate`, drafted against vanilla, and memory, by context length.

Contexts are prompts' texts one behind the other, cut to length; a few tokens are decoded behind
each, whatever they say. (They often repeat what is there, so n-grams draft more than elsewhere:
that column says that drafting goes on to work, not what it gains on real texts.) Memory is the peak
of one vanilla run over the model's weights, against its keys and values: those of the text, and
those that there is room for, which is allotted in blocks.

    python -m benchmarks.context --data spec_bench.jsonl --output context.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

from benchmarks import common
from conflayers_cli.bench.hf_baselines import TransformersSystem
from conflayers_cli.bench.runner import measure
from conflayers_cli.bench.systems import BenchPrompt, EngineSystem, System
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.prompts import plain_text
from conflayers_cli.models.tokenization import encode
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.utils.memory import PeakMemory
from conflayers_cli.utils.statistics import Spread

MIB = 2**20


def repeat_to_length(
    pieces: Sequence[Sequence[int]], length: int, count: int
) -> list[tuple[int, ...]]:
    """So many texts of so many tokens, each begun with another piece."""
    texts = []
    for first in range(count):
        start = first % len(pieces)
        tokens = (token for piece in cycle([*pieces[start:], *pieces[:start]]) for token in piece)
        texts.append(tuple(islice(tokens, length)))
    return texts


def prompts_at(
    subject: common.Subject, pieces: Sequence[Sequence[int]], length: int, options: Any
) -> list[BenchPrompt]:
    """The texts of a length, output included where the model has no room for more."""
    limit = subject.loaded.context_length
    room = length if limit is None else min(length, limit - options.max_new_tokens)
    texts = repeat_to_length(pieces, room, options.per_category)
    return [
        BenchPrompt(f"{length}-{i}", None, text, options.max_new_tokens)
        for i, text in enumerate(texts)
    ]


def compare(
    subject: common.Subject, prompts: Sequence[BenchPrompt], memory: PeakMemory, runs: int
) -> dict[str, Any]:
    """The figures at one length."""
    decoder, greedy = subject.decoder, SamplingParams()
    none: frozenset[int] = frozenset()  # what the text says does not matter
    proposer = common.make_proposer(subject, subject.profile)
    vanilla = EngineSystem("vanilla", decoder, None, greedy, none)
    memory.begin()
    cache_bytes = vanilla.run(prompts[:1])[0].cache_bytes
    peak = memory.peak()
    systems: list[System] = [vanilla, EngineSystem("mixed", decoder, proposer, greedy, none)]
    systems.append(TransformersSystem(decoder, greedy, none))
    result = measure(systems, prompts, decoder, greedy, runs=runs, warmup=0)
    over = Spread.of(common.ratios(result, "vanilla", "transformers"))
    return {
        "model": subject.name,
        "dtype": subject.dtype,
        "context": len(prompts[0].tokens),
        "arms": {arm.name: common.figures(result, arm.name) for arm in systems},
        "prefill_seconds": {
            name: found.time_to_first_token for name, found in result.systems.items()
        },
        "vanilla_over_transformers": over.model_dump(),
        "peak_memory_bytes": peak,
        "kv_cache_bytes": cache_bytes,
        "kv_used_bytes": (len(prompts[0].tokens) + prompts[0].max_new_tokens)
        * position_bytes(decoder),
    }


def position_bytes(decoder: Decoder) -> int:
    """What the keys and values of one position take."""
    config = decoder.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(2 * decoder.depth * heads * size * decoder.dtype.itemsize)


def line(row: dict[str, Any]) -> list[str]:
    """A length for people."""
    over, mixed = row["vanilla_over_transformers"], row["arms"]["mixed"]["over_vanilla"]
    peak, cache = row["peak_memory_bytes"], row["kv_cache_bytes"]
    speed = row["arms"]["vanilla"]["tokens_per_second"]["median"]
    prefill = row["prefill_seconds"]
    return [
        row["model"],
        str(row["context"]),
        "–" if speed is None else f"{speed:.1f}",
        common.spread(over),
        common.spread(mixed),
        f"{prefill['vanilla']:.2f} s",
        f"{prefill['transformers']:.2f} s",
        "–" if peak is None else f"{peak / MIB:.0f} MiB",
        f"{row['kv_used_bytes'] / MIB:.1f} of {cache / MIB:.1f} MiB",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = common.make_parser(__doc__, per_category=1, max_new_tokens=32, runs=3)
    parser.add_argument(
        "--contexts", nargs="+", type=int, default=[256, 512, 1024, 2048, 4096, 8192]
    )
    options: argparse.Namespace = common.parse_options(parser, arguments, contexts=[64, 128])
    chosen = common.interleave(common.prompts_by_category(options, 10**6))
    rows: list[dict[str, Any]] = []
    for name in options.models:
        subject = common.open_subject(name, options)
        memory = PeakMemory(subject.decoder.device)
        pieces = [encode(subject.loaded, None, plain_text(prompt)) for prompt in chosen]
        warm = prompts_at(subject, pieces, 64, options)
        common.compare(subject, None, warm[:1], runs=1)
        for length in options.contexts:
            prompts = prompts_at(subject, pieces, length, options)
            rows.append(compare(subject, prompts, memory, options.runs))
            common.say("  ".join(line(rows[-1])))
            common.save(options, "context", subject, {"rows": rows})
    head = ["model", "context", "vanilla/s", "over generate", "mixed over vanilla"]
    common.print_table(
        [*head, "prefill", "generate's", "peak memory", "keys and values"], map(line, rows)
    )


if __name__ == "__main__":
    main()
