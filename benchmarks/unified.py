"""Unified Layer Skipping used directly: the measured speed of the skipped model against its target.

For every target S the same prompts are decoded by the whole model and by what the rule leaves of
it, at batch 1 and 8, in turns; tokens are counted behind the prompts. For the speeds nothing ends
before its budget; the outputs compared with the whole model's own are those up to an end token.

    python benchmarks/unified.py --data spec_bench.jsonl --output unified.json
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conflayers_cli.bench.agreement import measure_agreement
from conflayers_cli.engine.decoder import FULL, Decoder
from conflayers_cli.generation.batch import Batch
from conflayers_cli.generation.prompts import Prompt, as_messages, read_prompts
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.models.loaded_model import LoadedModel
from conflayers_cli.models.loader import load_model
from conflayers_cli.models.tokenization import encode
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.utils.environment import describe_environment
from conflayers_cli.utils.files import write_json

TARGETS = (1.25, 1.5, 2.0, 3.0)
WHOLE = 1.0


def chosen(options: argparse.Namespace) -> list[Prompt]:
    """The first prompts of the category, as many as the largest batch has rows."""
    prompts = [p for p in read_prompts(options.data) if p.category == options.category]
    most = max(options.batches)
    if len(prompts) < most:
        raise SystemExit(f"{options.category}: {len(prompts)} prompts, a batch needs {most}")
    return prompts[:most]


def make_requests(
    loaded: LoadedModel, prompts: Sequence[Prompt], max_new_tokens: int
) -> list[GenerationRequest]:
    """The prompts as the model gets them."""
    return [
        GenerationRequest(
            encode(loaded, as_messages(prompt, None), None), max_new_tokens, SamplingParams()
        )
        for prompt in prompts
    ]


def decode(
    decoder: Decoder, requests: Sequence[GenerationRequest], plan: SkipPlan
) -> tuple[float, list[list[int]]]:
    """(tokens per second behind the prompts, outputs); nothing ends before its budget."""
    batch = Batch(decoder, requests, plan=plan)
    batch.run()
    tokens = sum(len(output) - 1 for output in batch.outputs)
    return tokens / batch.decode_seconds, batch.outputs


def ended(output: list[int], end_tokens: frozenset[int]) -> list[int]:
    """An output up to its first end token."""
    end = next((i for i, token in enumerate(output) if token in end_tokens), len(output))
    return output[: end + 1]


def measure(
    decoder: Decoder,
    requests: Sequence[GenerationRequest],
    batch: int,
    repeats: int,
    end_tokens: frozenset[int],
) -> list[dict[str, Any]]:
    """One row per target: its speed over the whole model's in the same turn.

    Who begins changes from turn to turn, so that whatever slows the machine slows all alike.
    """
    plans = {WHOLE: FULL} | {s: SkipPlan.unified(decoder.depth, s) for s in TARGETS}
    speeds: dict[float, list[float]] = {target: [] for target in plans}
    outputs: dict[float, list[list[int]]] = {target: [] for target in plans}
    arms = list(plans)
    for turn in range(repeats):
        part = requests[:batch] if batch > 1 else [requests[turn % len(requests)]]
        first = turn % len(arms)
        for target in [*arms[first:], *arms[:first]]:
            speed, found = decode(decoder, part, plans[target])
            speeds[target].append(speed)
            outputs[target] += [ended(output, end_tokens) for output in found]
    ratios = {
        target: [one / whole for one, whole in zip(speeds[target], speeds[WHOLE], strict=True)]
        for target in TARGETS
    }
    return [
        {
            "target": target,
            "batch": batch,
            "layers_kept": decoder.depth - len(plans[target].layers),
            "depth": decoder.depth,
            "tokens_per_second": statistics.median(speeds[target]),
            "whole_tokens_per_second": statistics.median(speeds[WHOLE]),
            "speedup": statistics.median(ratios[target]),
            "least": min(ratios[target]),
            "most": max(ratios[target]),
            "agreement": measure_agreement(
                list(zip(outputs[WHOLE], outputs[target], strict=True))
            ).model_dump(),
        }
        for target in TARGETS
    ]


def main() -> None:
    """Measure every model and batch; print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="Spec-Bench's prompts (JSONL)")
    parser.add_argument("--category", default="qa")
    parser.add_argument("--models", nargs="+", default=["smollm2-deep", "smollm2"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    options = parser.parse_args()
    prompts = chosen(options)
    results = []
    for name in options.models:
        loaded = load_model(name)
        decoder = Decoder(loaded.model)
        requests = make_requests(loaded, prompts, options.max_new_tokens)
        decode(decoder, requests[:1], FULL)  # warms up
        rows = [
            row
            for batch in options.batches
            for row in measure(decoder, requests, batch, options.repeats, loaded.end_tokens)
        ]
        for row in rows:
            print(
                f"{name:13} S {row['target']:<5g} batch {row['batch']}: keeps "
                f"{row['layers_kept']:2} of {row['depth']}, {row['speedup']:.2f}× "
                f"({row['least']:.2f}–{row['most']:.2f}); tokens equal "
                f"{row['agreement']['equal']:.1%}, ROUGE-2 {row['agreement']['rouge_2']:.2f}",
                flush=True,
            )
        results.append(
            {
                "model": name,
                "dtype": str(loaded.dtype).removeprefix("torch."),
                "environment": describe_environment(loaded.device),
                "prompts": [prompt.id for prompt in prompts],
                "max_new_tokens": options.max_new_tokens,
                "repeats": options.repeats,
                "rows": rows,
            }
        )
    if options.output:
        write_json(options.output, results)


if __name__ == "__main__":
    main()
