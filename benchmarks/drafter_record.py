"""Record a model's greedy texts, and what drafters could know of them, for `drafter_study`.

Every prompt is decoded by the full model, nothing drafted. Of every output position are recorded
the full model's most likely tokens, which token recycling would have seen there, and the choice
and confidence of a draft pass in four bits. That pass runs over the recorded text in chunks, behind
keys and values of the full model, as in a real draft of so many tokens that are all accepted.

    python -m benchmarks.drafter_record --data spec_bench.jsonl --output recorded.npz
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks import common
from conflayers_cli.bench.systems import BenchPrompt, EngineSystem
from conflayers_cli.engine.decoder import FULL, Decoder
from conflayers_cli.generation.prompts import builtin_prompts, read_prompts
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan

TOP = 8
CHUNK = 6
"""Tokens of a pass over a text that is known: about as long as drafts in four bits are."""
INT4 = SkipPlan(weights="int4")
REPETITIVE = Path(__file__).parent / "data" / "repetitive.jsonl"

Recording = dict[str, npt.NDArray[Any]]


def top_tokens(
    decoder: Decoder, tokens: torch.Tensor, start: int, cache: KVCache, plan: SkipPlan
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """(most likely tokens ``[T, TOP]``, confidences ``[T]`` in the first) behind each token."""
    positions = torch.arange(start, start + tokens.shape[1])[None]
    logits = decoder.forward(tokens, positions, cache, plan)[0].float()
    best = logits.topk(TOP)
    margin = best.values[:, 0] - best.values[:, 1]
    return best.indices.numpy().astype(np.int32), torch.sigmoid(margin).numpy()


def record_text(decoder: Decoder, prompt: Sequence[int], output: Sequence[int]) -> Recording:
    """What passes over a text say of every output position."""
    text = torch.tensor([[*prompt, *output]])
    cache = decoder.new_cache(text.shape[1] + CHUNK)
    begin = len(prompt) - 1  # this token's pass chooses the first one of the output
    if begin:
        decoder.prefill(text[:, :begin], cache)
    found: dict[str, list[npt.NDArray[Any]]] = {"top": [], "draft": [], "confidence": []}
    for start in range(begin, text.shape[1] - 1, CHUNK):
        tokens = text[:, start : min(start + CHUNK, text.shape[1] - 1)]
        drafted, confidence = top_tokens(decoder, tokens, start, cache, INT4)
        top, _ = top_tokens(decoder, tokens, start, cache, FULL)
        for name, values in (("top", top), ("draft", drafted), ("confidence", confidence)):
            found[name].append(values)
    return {name: np.concatenate(values) for name, values in found.items()}


def record(
    subject: common.Subject, prompts: Sequence[BenchPrompt], known: Recording, options: Any
) -> Recording:
    """All prompts that are not known yet; written after each, so that a run can be broken off."""
    vanilla = EngineSystem(
        "vanilla", subject.decoder, None, SamplingParams(), subject.loaded.end_tokens
    )
    for number, prompt in enumerate(prompts):
        key = f"{prompt.category}/{prompt.id}"
        if f"{key}/output" in known:
            continue
        output = vanilla.run([prompt])[0].tokens
        if len(output) < 2:
            continue
        known[f"{key}/prompt"] = np.array(prompt.tokens, np.int32)
        known[f"{key}/output"] = np.array(output, np.int32)
        for name, values in record_text(subject.decoder, prompt.tokens, output).items():
            known[f"{key}/{name}"] = values
        common.show_progress(key, (number + 1) / len(prompts))
        if options.output and (number % 10 == 9 or number == len(prompts) - 1):
            np.savez_compressed(options.output, **known)  # type: ignore[arg-type]
    return known


def all_categories(options: argparse.Namespace) -> list[str]:
    """The categories asked for; else all, those with few prompts as well."""
    prompts = read_prompts(options.data) if options.data else builtin_prompts()
    return options.categories or sorted({each.category for each in prompts if each.category})


def main(arguments: Sequence[str] | None = None) -> None:
    """Record, write."""
    parser = common.make_parser(
        __doc__, models=["smollm2"], dtype="bfloat16", per_category=6, max_new_tokens=128
    )
    options: argparse.Namespace = common.parse_options(parser, arguments)
    subject = common.open_subject(options.models[0], options)
    chosen = common.choose_prompts(options.data, all_categories(options), options.per_category)
    if not options.quick:
        chosen |= common.choose_prompts(REPETITIVE, None, 100)
    prompts = common.to_bench_prompts(subject, common.interleave(chosen), options.max_new_tokens)
    known: Recording = {}
    if options.output and options.output.is_file():
        with np.load(options.output) as file:
            known = dict(file)
    record(subject, prompts, known, options)


if __name__ == "__main__":
    main()
