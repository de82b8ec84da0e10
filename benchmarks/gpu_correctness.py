"""Whether drafted text is vanilla's, and vanilla's is `generate`'s."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks import exactness
from benchmarks.gpu_bench import Bench
from benchmarks.gpu_models import PlantedModel, random_prompts
from benchmarks.gpu_runs import Decoded, Result, decode, describe_decoder, generate, model_facts
from conflayers_cli.bench.agreement import first_difference
from conflayers_cli.bench.systems import BenchPrompt, EngineSystem
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.sampling_params import SamplingParams

PROMPT = 96
TOGETHER = 3
"""Prompts decoded at once; some end before others do."""

Texts = list[tuple[int, ...]]


def float32(bench: Bench, out: Result) -> None:
    """Drafted == vanilla == `generate` in float32, on fewer layers."""
    out["matmul_precision"] = torch.get_float32_matmul_precision()
    _check(bench, out, "float32", bench.model("8b-short", torch.float32))


def bfloat16(bench: Bench, out: Result) -> None:
    """Drafted == vanilla in bfloat16."""
    _check(bench, out, "bfloat16", bench.model("8b"))


def _check(bench: Bench, out: Result, part: str, model: PlantedModel) -> None:
    out["model"] = model_facts(model)
    count = bench.options.tokens
    prompts = random_prompts(model.shape.vocabulary, PROMPT, bench.options.prompts, seed=5)
    vanilla: Texts | None = None
    for runner in bench.runners:
        work = partial(bench.decoder, runner)
        decoder = bench.attempt(part, out, runner, work)
        if decoder is None:
            continue
        found = out[runner] = {"decoder": describe_decoder(decoder)}
        own = [decode(decoder, prompt, count).output for prompt in prompts]
        if vanilla is None:
            vanilla = own
            _against_generate(bench, found, part, runner, decoder, prompts, own)
        else:
            compared = found["vanilla"] = compare(decoder, prompts, own, vanilla)
            _tell(bench, part, f"{runner}, vanilla as by {bench.runners[0]}", compared)
        # What launching does to texts shows in the chain; the others are kept for one runner.
        names = None if runner == bench.runners[0] else {"chain"}
        for name, texts in _drafted(decoder, model, prompts, count, names).items():
            result = bench.attempt(part, found, name, texts)
            if result is not None:
                runs, figures = result
                compared = found[name] = {**compare(decoder, prompts, runs, own), **figures}
                _tell(bench, part, f"{runner}, {name} as vanilla", compared, wanted=True)
        found["decoder"] = describe_decoder(decoder)


def _against_generate(
    bench: Bench,
    found: Result,
    part: str,
    runner: str,
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    own: Texts,
) -> None:
    """Vanilla text against transformers' own, which rounds otherwise in bfloat16."""
    with decoder.plain() as model:
        texts = [tuple(generate(model, [prompt], len(own[0]))[0][0]) for prompt in prompts]
    compared = found["generate"] = compare(decoder, prompts, texts, own)
    _tell(bench, part, f"{runner}, vanilla as generate", compared, wanted=part == "float32")


Work = Callable[[], tuple[Texts, Result]]


def _drafted(
    decoder: Decoder,
    model: PlantedModel,
    prompts: Sequence[Sequence[int]],
    count: int,
    names: set[str] | None,
) -> dict[str, Work]:
    """The ways to draft: alone, and several prompts at once."""
    alone = exactness.alone(decoder, model.plan)
    work: dict[str, Work] = {
        name: partial(_alone, decoder, proposer, prompts, count) for name, proposer in alone.items()
    }
    refused = exactness.alone(decoder, model.bad_plan)["chain"]
    work["chain, bad plan"] = partial(_alone, decoder, refused, prompts, count)
    rounded = exactness.alone(decoder, replace(model.plan, weights="int4"))["chain"]
    work["chain, int4"] = partial(_alone, decoder, rounded, prompts, count)
    together = exactness.together(decoder, model.plan, TOGETHER)
    for name, proposer in together.items():
        arm = EngineSystem(name, decoder, proposer, SamplingParams(), frozenset(), TOGETHER)
        work[f"{name}, batch {TOGETHER}"] = partial(_together, arm, prompts, count)
    return {name: own for name, own in work.items() if names is None or name in names}


def _alone(
    decoder: Decoder, proposer: Any, prompts: Sequence[Sequence[int]], count: int
) -> tuple[Texts, Result]:
    runs: list[Decoded] = [decode(decoder, prompt, count, proposer) for prompt in prompts]
    figures = {
        "drafted": sum(run.drafted for run in runs),
        "accepted": sum(run.accepted for run in runs),
    }
    return [run.output for run in runs], figures


def _together(
    arm: EngineSystem, prompts: Sequence[Sequence[int]], count: int
) -> tuple[Texts, Result]:
    bench_prompts = [
        BenchPrompt(str(number), None, tuple(prompt), count)
        for number, prompt in enumerate(prompts)
    ]
    runs = arm.run(bench_prompts)
    figures = {
        "drafted": sum(run.stats.drafted for run in runs),
        "accepted": sum(run.stats.accepted for run in runs),
    }
    return [run.tokens for run in runs], figures


def compare(
    decoder: Decoder, prompts: Sequence[Sequence[int]], texts: Texts, others: Texts
) -> Result:
    """How many texts are the same; of the others where they part, and how close it was there."""
    parted = []
    for number, (prompt, one, other) in enumerate(zip(prompts, texts, others, strict=True)):
        at = first_difference(one, other)
        if at is not None:
            gap = _gap(decoder, [*prompt, *other[:at]])
            parted.append({"prompt": number, "position": at, "gap": gap})
    return {"matching": len(texts) - len(parted), "total": len(texts), "parted": parted}


def _gap(decoder: Decoder, text: Sequence[int]) -> float:
    """Between the two best logits behind a text."""
    tokens = torch.tensor([list(text)])
    logits = decoder.prefill(tokens, decoder.new_cache(len(text)))
    best = logits[0, -1].float().topk(2).values
    return float(best[0] - best[1])


def _tell(bench: Bench, part: str, figure: str, found: Result, wanted: bool = False) -> None:
    same, total = found["matching"], found["total"]
    gaps = [parted["gap"] for parted in found["parted"]]
    widest = f", widest gap {max(gaps):.2g}" if gaps else ""
    drafted = found.get("drafted")
    of = f", {found['accepted']}/{drafted} accepted" if drafted else ""
    met = same == total if wanted else None
    bench.line(part, figure, f"{same}/{total}{of}{widest}", "all" if wanted else "", met)
