"""Adapting on the fly over a stream of prompts that changes its task in the middle.

The stream is decoded once with ``--adapt``'s drafter and once plainly, by turns prompt by prompt,
so that both meet the same moments of the machine. Prints tokens per second by prompt.

    python -m benchmarks.adapt --data spec_bench.jsonl --method conflayers --output adapt.json
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.prompts import Prompt, as_messages, read_prompts
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.models.loaded_model import LoadedModel
from conflayers_cli.models.loader import load_model
from conflayers_cli.models.tokenization import encode
from conflayers_cli.search.online import METHODS, AdaptiveProposer
from conflayers_cli.spec_decode.proposer import Proposer
from conflayers_cli.utils.environment import describe_environment
from conflayers_cli.utils.files import write_json


def parse_options() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="Spec-Bench's prompts (JSONL)")
    parser.add_argument("--model", default="smollm2-deep")
    parser.add_argument("--method", choices=METHODS, default="conflayers")
    parser.add_argument("--tasks", nargs=2, default=["summarization", "math_reasoning"])
    parser.add_argument("--per-task", type=int, default=20)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--budget", type=float, default=0.05)
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    return parser.parse_args()


def decode(
    loaded: LoadedModel,
    decoder: Decoder,
    tokens: Sequence[int],
    proposer: Proposer | None,
    max_new_tokens: int,
) -> tuple[float | None, list[int]]:
    """(tokens per second without the prefill, search included; the output's token ids)."""
    generation = Generation(
        decoder,
        GenerationRequest(tokens, max_new_tokens),
        proposer=proposer,
        end_tokens=loaded.end_tokens,
    )
    steps = list(generation)[1:]
    seconds = sum(step.seconds for step in steps)
    count = sum(len(step.tokens) for step in steps)
    return (count / seconds if count else None), generation.output


def measure(
    loaded: LoadedModel,
    decoder: Decoder,
    adapter: AdaptiveProposer,
    prompt: Prompt,
    max_new_tokens: int,
) -> dict[str, Any]:
    """The figures of one prompt."""
    tokens = encode(loaded, as_messages(prompt, None), None)
    adapted, output = decode(loaded, decoder, tokens, adapter, max_new_tokens)
    vanilla, same = decode(loaded, decoder, tokens, None, max_new_tokens)
    return {
        "id": prompt.id,
        "category": prompt.category,
        "adapted": adapted,
        "vanilla": vanilla,
        "identical": output == same,
        "layers": len(adapter.plan.layers),
        "settled": adapter.settled,
        "tried": adapter.tried,
        "search_share": adapter.search_share,
    }


def line(number: int, row: dict[str, Any]) -> str:
    """A prompt for people."""
    adapted, vanilla = row["adapted"], row["vanilla"]
    ratio = f"{adapted / vanilla:.2f}×" if adapted and vanilla else "–"
    return (
        f"{number:3} {row['category']:16} {adapted or 0:6.1f} {vanilla or 0:6.1f} tokens/s "
        f"{ratio}  {row['layers']} layers, {'settled' if row['settled'] else 'searching'}, "
        f"{row['tried']} tried, search {row['search_share']:.1%}"
    )


def main() -> None:
    """Decode the stream, print, write."""
    options = parse_options()
    loaded = load_model(options.model)
    decoder = Decoder(loaded.model)
    prompts = read_prompts(options.data)
    adapter = AdaptiveProposer(decoder, options.method, budget=options.budget)
    rows: list[dict[str, Any]] = []
    for task in options.tasks:
        for prompt in [p for p in prompts if p.category == task][: options.per_task]:
            rows.append(measure(loaded, decoder, adapter, prompt, options.max_new_tokens))
            print(line(len(rows), rows[-1]), flush=True)
    for begin in range(0, len(rows), 10):
        part = [r for r in rows[begin : begin + 10] if r["adapted"] and r["vanilla"]]
        if part:
            ratio = statistics.median(r["adapted"] / r["vanilla"] for r in part)
            print(f"prompts {begin + 1}–{begin + 10}: {ratio:.2f}× vanilla in the median")
    print(f"identical to vanilla: {sum(r['identical'] for r in rows)} of {len(rows)}")
    if options.output:
        document = {
            "model": options.model,
            "method": options.method,
            "budget": options.budget,
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "environment": describe_environment(loaded.device),
            "rows": rows,
        }
        write_json(options.output, document)


if __name__ == "__main__":
    main()
