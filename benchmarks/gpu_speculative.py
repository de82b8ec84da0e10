"""Drafted decoding: its gain, how near the engine comes to what its passes allow, idle time."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.gpu_bench import Bench
from benchmarks.gpu_models import PlantedModel, random_prompts
from benchmarks.gpu_runs import Decoded, Result, decode, describe_decoder, model_facts
from benchmarks.gpu_speed import Run, by_turns
from benchmarks.gpu_timing import back_to_back, profiled
from conflayers_cli.bench.hf_baselines import TransformersSystem
from conflayers_cli.bench.runner import measure
from conflayers_cli.bench.systems import EngineSystem, System
from conflayers_cli.engine.argmax import greedy_tokens
from conflayers_cli.engine.decoder import FULL, Decoder
from conflayers_cli.engine.graph_runner import clock
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.sequence import Step
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import Proposer
from conflayers_cli.utils.statistics import Spread

PROMPT = 128
WARM_PASSES = 4
"""Passes of a kind before it is timed: the engine records those that come again."""
PASSES = 8
GAIN = 1.4
ACCEPTANCE = 0.95
EFFICIENCY = 0.9
SLOWER = 0.98
"""What counts as slower than vanilla: a margin that noise does not cross."""
IDLE = 0.05


def speculative(bench: Bench, out: Result) -> None:
    """Drafted against vanilla decoding of the same prompts, by turns."""
    model = bench.model("13b")
    out["model"] = model_facts(model)
    for runner in bench.runners:
        work = partial(_speculative, bench, model, runner)
        found = bench.attempt("speculative", out, runner, work)
        if found is not None:
            out[runner] = found
            _lines(bench, runner, found)
        bench.save()


def _speculative(bench: Bench, model: PlantedModel, runner: str) -> Result:
    """The figures of one way to launch passes."""
    decoder, count, turns = bench.decoder(runner), bench.options.tokens, bench.options.runs - 1
    prompts = random_prompts(model.shape.vocabulary, PROMPT, bench.options.prompts, seed=7)
    if runner != bench.runners[0]:  # slow, and only there to compare with
        prompts, count, turns = prompts[:1], max(count // 2, 4), 1
    drafters: dict[str, Proposer | None] = {
        "vanilla": None,
        "planted plan": bench.proposer(model.plan, runner=runner),
        "with n-grams": bench.proposer(model.plan, ngram=True, runner=runner),
        "planted plan, int4": bench.proposer(replace(model.plan, weights="int4"), runner=runner),
        "all layers, int4": bench.proposer(SkipPlan(weights="int4"), runner=runner),
        "bad plan": bench.proposer(model.bad_plan, runner=runner),
    }
    # All runs of one arm are of different texts: they are compared with vanilla's text by text.
    arms: dict[str, Run] = {
        name: partial(_all, decoder, prompts, count, proposer)
        for name, proposer in drafters.items()
    }
    found = by_turns(arms, max(turns, 1))
    runs = {name: list(itertools.chain.from_iterable(own)) for name, own in found.items()}
    alone = _passes(decoder, model, _widths(runs["planted plan"]), PROMPT + count // 2)
    result: Result = {"decoder": describe_decoder(decoder), "passes": alone, "arms": {}}
    for name, own in runs.items():
        result["arms"][name] = _figures(own, runs["vanilla"])
    result["efficiency"] = efficiency(runs["planted plan"], runs["vanilla"], alone)
    result["costs"] = asdict(bench.costs(runner=runner).by_batch[1])
    return result


def _all(
    decoder: Decoder, prompts: Iterable[Sequence[int]], count: int, proposer: Proposer | None
) -> list[Decoded]:
    return [decode(decoder, prompt, count, proposer) for prompt in prompts]


def _figures(runs: Sequence[Decoded], vanilla: Sequence[Decoded]) -> Result:
    """One arm's figures, and against vanilla's runs of the same texts."""
    steps = [step for run in runs for step in run.steps]
    drafted = sum(run.drafted for run in runs)
    seconds = sum(run.seconds for run in runs)
    ratios = [one.seconds / own.seconds for own, one in zip(runs, vanilla, strict=True)]
    pairs = list(zip(runs, vanilla, strict=True))
    return {
        "seconds_per_token": statistics.median(run.per_token for run in runs),
        "over_vanilla": Spread.of(ratios).model_dump(),
        "over_vanilla_in_all": sum(run.seconds for run in vanilla) / seconds,
        "identical": sum(own.output == one.output for own, one in pairs),
        "texts": len(runs),
        "drafted": drafted,
        "acceptance": sum(run.accepted for run in runs) / drafted if drafted else None,
        "tokens_per_step": sum(len(step.tokens) for step in steps) / len(steps),
        "drafted_per_step": drafted / len(steps),
        "share_drafting": sum(step.draft_seconds for step in steps) / seconds,
        "share_verifying": sum(step.verify_seconds for step in steps) / seconds,
    }


def _widths(runs: Iterable[Decoded]) -> list[int]:
    """Of the full passes that were run."""
    return sorted({1, *(step.drafted + step.leaves + 1 for run in runs for step in run.steps)})


def _passes(
    decoder: Decoder, model: PlantedModel, widths: Sequence[int], context: int
) -> dict[str, Any]:
    """Seconds of single passes, launched one behind the other without waiting for any.

    So they are what the device itself takes, and no less than that is possible with these passes.
    """
    (text,) = random_prompts(decoder.vocabulary, context, 1, seed=8)
    cache = decoder.new_cache(context + max(widths))
    decoder.prefill(torch.tensor([text]), cache)
    draft = _pass_seconds(decoder, cache, model.plan, context, 1)
    verify = {width: _pass_seconds(decoder, cache, FULL, context, width) for width in widths}
    return {"draft": draft, "verify": verify}


def _pass_seconds(
    decoder: Decoder, cache: KVCache, plan: SkipPlan, context: int, width: int
) -> float:
    (row,) = random_prompts(decoder.vocabulary, width, 1, seed=width)
    tokens = torch.tensor([row])
    positions = torch.arange(context, context + width)[None]

    @torch.inference_mode()
    def run() -> object:
        return greedy_tokens(decoder.forward(tokens, positions, cache, plan))

    back_to_back(decoder.device, run, WARM_PASSES)
    return statistics.median(back_to_back(decoder.device, run, PASSES) for _ in range(3))


def efficiency(
    runs: Sequence[Decoded], vanilla: Sequence[Decoded], passes: Mapping[str, Any]
) -> Result:
    """What was decoded against what its passes take alone.

    Returns:
        ``of_time``: the seconds of the passes that were run, of those that decoding took;
        ``of_speedup``: the measured speed-up over the one that passes alone would give.
    """
    ideal = sum(ideal_seconds(run.steps, passes) for run in runs)
    ideal_vanilla = sum(ideal_seconds(run.steps, passes) for run in vanilla)
    seconds, vanilla_seconds = (sum(run.seconds for run in own) for own in (runs, vanilla))
    return {
        "of_time": ideal / seconds,
        "vanilla_of_time": ideal_vanilla / vanilla_seconds,
        "of_speedup": (vanilla_seconds / seconds) / (ideal_vanilla / ideal),
        "ideal_speedup": ideal_vanilla / ideal,
        "measured_speedup": vanilla_seconds / seconds,
    }


def ideal_seconds(steps: Iterable[Step], passes: Mapping[str, Any]) -> float:
    """What the passes of some steps take by themselves."""
    draft, verify = passes["draft"], passes["verify"]
    return sum(step.drafted * draft + verify[step.drafted + step.leaves + 1] for step in steps)


def _lines(bench: Bench, runner: str, found: Result) -> None:
    wanted = bench.aims(runner)
    planted = found["arms"]["planted plan"]
    name = f"13b {runner}"

    def line(figure: str, value: str, aim: str, met: bool) -> None:
        met_or_not = met if wanted else None
        bench.line("speculative", f"{name}, {figure}", value, aim if wanted else "", met_or_not)

    gain, spread = planted["over_vanilla_in_all"], planted["over_vanilla"]
    value = f"{gain:.2f}× ({spread['min']:.2f}–{spread['max']:.2f})"
    line("over own vanilla", value, f"≥ {GAIN:g}×", gain >= GAIN)
    rate = planted["acceptance"] or 0.0
    value = f"{rate:.1%}, {planted['tokens_per_step']:.2f} tokens a step"
    line("acceptance", value, f"≥ {ACCEPTANCE:.0%}", rate >= ACCEPTANCE)
    near = found["efficiency"]
    value = f"{near['of_time']:.1%} (of the ideal speed-up {near['of_speedup']:.1%})"
    line("engine efficiency", value, f"≥ {EFFICIENCY:.0%}", near["of_time"] >= EFFICIENCY)
    value = f"draft {planted['share_drafting']:.0%}, verify {planted['share_verifying']:.0%}"
    bench.line("speculative", f"{name}, time split", value)
    for arm, figures in found["arms"].items():
        if arm != "vanilla":
            same, over = figures["identical"], figures["over_vanilla_in_all"]
            total = figures["texts"]
            line(f"{arm}, not slower", f"{over:.2f}×", f"≥ {SLOWER:g}×", over >= SLOWER)
            figure = f"{name}, {arm}, identical texts"
            bench.line("speculative", figure, f"{same}/{total}", "all", same == total)


def idle(bench: Bench, out: Result) -> None:
    """How much of a decoding run the device has nothing to do, and what it does in the rest."""
    model, count = bench.model("13b"), 2 * bench.options.tokens
    decoder = bench.decoder()
    (prompt,) = random_prompts(model.shape.vocabulary, PROMPT, 1, seed=9)
    profiled(bench.device, lambda: torch.ones(8, device=bench.device).sum())  # sets itself up
    drafters: dict[str, Proposer | None] = {"vanilla": None, "drafted": bench.proposer(model.plan)}
    for name, proposer in drafters.items():
        decode(decoder, prompt, count, proposer)  # recorded, where passes are
        out[name] = found = _watched(bench, decoder, prompt, count, proposer)
        share = found["profile"]["idle"]
        if share is not None:
            value = f"{share:.1%} of {found['profile']['seconds'] * 1000:.0f} ms"
            met = share < IDLE if bench.aims(bench.runners[0]) else None
            bench.line("idle", f"13b {name}, device idle", value, f"< {IDLE:.0%}", met)
        for kind in found["profile"]["by_name"][:5]:
            value = f"{kind['share']:.1%}, {kind['count']}"
            bench.line("idle", f"13b {name}, {kind['name'][:60]}", value)


def _watched(
    bench: Bench, decoder: Decoder, prompt: Sequence[int], count: int, proposer: Proposer | None
) -> Result:
    """A decoding run under the profiler, behind its prompt, and another one as it is."""
    plain = decode(decoder, prompt, count, proposer)
    generation = Generation(decoder, GenerationRequest(prompt, count), proposer=proposer)
    generation.step()
    steps: list[Step] = []
    begin = clock(bench.device)
    profile = profiled(bench.device, lambda: steps.extend(generation))
    seconds = clock(bench.device) - begin
    return {
        "profile": profile,
        "steps": len(steps),
        "seconds_with_profiler": seconds,
        "drafting": sum(step.draft_seconds for step in plain.steps) / plain.seconds,
        "verifying": sum(step.verify_seconds for step in plain.steps) / plain.seconds,
        "seconds_per_token": plain.per_token,
    }


def smollm2(bench: Bench, out: Result) -> None:
    """Real models of the smallest size: their passes are launched much faster than they run."""
    options = bench.options
    bench.release()
    for folder in options.smollm2:
        subject = common.open_subject(str(folder), options)
        chosen = common.interleave(common.choose_prompts(None, None, 1))[: options.prompts]
        prompts = common.to_bench_prompts(subject, chosen, options.tokens)
        proposer = common.make_proposer(subject, subject.profile)
        greedy, ends = SamplingParams(), subject.loaded.end_tokens
        systems: list[System] = [
            EngineSystem("vanilla", subject.decoder, None, greedy, ends),
            EngineSystem("speculative", subject.decoder, proposer, greedy, ends),
            TransformersSystem(subject.decoder, greedy, ends),
        ]
        result = measure(systems, prompts, subject.decoder, greedy, runs=options.runs)
        found = out[subject.name] = {
            "dtype": subject.dtype,
            "decoder": describe_decoder(subject.decoder),
            "arms": {arm.name: common.figures(result, arm.name) for arm in systems},
            "identical": common.matches(result),
        }
        _smollm2_lines(bench, Path(subject.name).name, found)
        bench.save()


def _smollm2_lines(bench: Bench, name: str, found: Result) -> None:
    for arm, figures in found["arms"].items():
        speed, over = figures["tokens_per_second"]["median"], figures["over_vanilla"]["median"]
        value = "–" if speed is None else f"{speed:.0f} tokens/s, {common.times(over)} vanilla"
        same = found["identical"].get(arm)
        value += f", {same['matching']}/{same['total']} identical" if same else ""
        bench.line("smollm2", f"{name} {arm}", value)
