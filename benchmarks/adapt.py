"""Adapting on the fly over a stream of prompts that changes its task in the middle.

The stream is decoded once with ``--adapt``'s drafter and once plainly, in turns prompt by prompt,
so that both meet the same moments of the machine. Prints tokens per second by prompt.

    python benchmarks/adapt.py --data spec_bench.jsonl --method conflayers --output adapt.json
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.loop import Generation
from conflayers_cli.models.loader import encode, load_model
from conflayers_cli.prompts import as_messages, read_prompts
from conflayers_cli.search.online import METHODS, AdaptiveProposer
from conflayers_cli.spec_decode.proposer import Proposer
from conflayers_cli.utils.environment import describe
from conflayers_cli.utils.files import write_json


def main() -> None:
    """Decode the stream, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="Spec-Bench's prompts (JSONL)")
    parser.add_argument("--model", default="smollm2-deep")
    parser.add_argument("--method", choices=METHODS, default="conflayers")
    parser.add_argument("--tasks", nargs=2, default=["summarization", "math_reasoning"])
    parser.add_argument("--per-task", type=int, default=20)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--budget", type=float, default=0.05)
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    options = parser.parse_args()
    loaded = load_model(options.model)
    decoder = Decoder(loaded.model)
    prompts = read_prompts(options.data)
    stream = [
        prompt
        for task in options.tasks
        for prompt in [p for p in prompts if p.category == task][: options.per_task]
    ]
    adapter = AdaptiveProposer(decoder, options.method, budget=options.budget)

    def decode(tokens: list[int], drafter: Proposer | None) -> tuple[float | None, list[int]]:
        """Tokens per second behind the prefill, search included; and the text."""
        generation = Generation(
            decoder,
            tokens,
            max_new_tokens=options.max_new_tokens,
            drafter=drafter,
            end_tokens=loaded.end_tokens,
        )
        steps = list(generation)[1:]
        seconds = sum(step.seconds for step in steps)
        count = sum(len(step.tokens) for step in steps)
        return (count / seconds if count else None), generation.output

    rows: list[dict[str, Any]] = []
    for prompt in stream:
        tokens = encode(loaded, as_messages(prompt, None), None)
        adapted, text = decode(tokens, adapter)
        plain, same = decode(tokens, None)
        rows.append(
            {
                "id": prompt.id,
                "category": prompt.category,
                "adapted": adapted,
                "vanilla": plain,
                "identical": text == same,
                "layers": len(adapter.plan.layers),
                "settled": adapter.settled,
                "tried": adapter.tried,
                "search_share": adapter.search_share,
            }
        )
        ratio = f"{adapted / plain:.2f}×" if adapted and plain else "–"
        print(
            f"{len(rows):3} {prompt.category:16} {adapted or 0:6.1f} {plain or 0:6.1f} tokens/s "
            f"{ratio}  {len(adapter.plan.layers)} layers, "
            f"{'settled' if adapter.settled else 'searching'}, {adapter.tried} tried, "
            f"search {adapter.search_share:.1%}",
            flush=True,
        )
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
            "environment": describe(loaded.device),
            "rows": rows,
        }
        write_json(options.output, document)


if __name__ == "__main__":
    main()
