"""Vanilla decoding against the memory's bandwidth and against `generate`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_bench import Bench
from benchmarks.gpu_models import PlantedModel, random_prompts
from benchmarks.gpu_runs import Decoded, Result, decode, describe_decoder, generate, model_facts
from conflayers_cli.bench.runner import rotated
from conflayers_cli.bench.systems import BenchPrompt, EngineSystem
from conflayers_cli.engine.cost_cache import batch_sizes_up_to
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.graph_runner import clock
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.spec_decode.proposer import BatchProposer
from conflayers_cli.utils.memory import PeakMemory

SHARE = 0.8
"""Of the memory's bandwidth that vanilla decoding is to reach."""
OVER_GENERATE = 4.0
BATCH_PROMPT = 128
STATIC_WARM_UPS = 2
"""Runs in which `generate` compiles, records, and has both behind it."""

Run = Callable[[], Any]


def by_turns(arms: Mapping[str, Run], runs: int) -> dict[str, list[Any]]:
    """What arms give, each once to warm up and then ``runs`` times, by turns."""
    for run in arms.values():
        run()
    found: dict[str, list[Any]] = {name: [] for name in arms}
    for turn in range(runs):
        for name in rotated(list(arms), turn):
            found[name].append(arms[name]())
    return found


def generated(decoder: Decoder, prompts: Sequence[Sequence[int]], count: int) -> float:
    """Seconds of a step of `generate`, eager, as a user would call it."""
    with decoder.plain() as model:
        return generate(model, prompts, count)[1]


def engine_figures(
    bench: Bench, model: PlantedModel, runs: Sequence[Decoded], context: int
) -> Result:
    """Seconds per token, and what share of the memory's bandwidth that is.

    Args:
        runs: vanilla ones.
        context: tokens of the prompt.
    """
    per_token = statistics.median(run.per_token for run in runs)
    steps = [step.seconds / len(step.tokens) for run in runs for step in run.steps]
    middle = context + len(runs[0].output) / 2
    rate = model.step_bytes(middle) / per_token
    return {
        "seconds_per_token": per_token,
        "all": [run.per_token for run in runs],
        "median_step": statistics.median(steps),
        "bytes_per_token": model.step_bytes(middle),
        "bytes_per_second": rate,
        "share_of_ceiling": rate / bench.bandwidth(),
    }


def vanilla(bench: Bench, out: Result) -> None:
    """Batch 1 behind a prompt of medium length: the engine's ways against `generate`."""
    model = bench.model("8b")
    out["model"] = model_facts(model)
    context, count = bench.options.contexts[0], bench.options.tokens
    (prompt,) = random_prompts(model.shape.vocabulary, context, 1, seed=6)
    memory = PeakMemory(bench.device)
    decoders: dict[str, Decoder] = {}
    for runner in bench.runners:
        decoder = bench.attempt("vanilla", out, runner, partial(bench.decoder, runner))
        if decoder is not None:
            decoders[runner] = decoder
            memory.begin()
            decode(decoder, prompt, count)
            out[f"peak_memory_over_weights, {runner}"] = memory.peak()
    arms: dict[str, Run] = {
        name: partial(decode, decoder, prompt, count) for name, decoder in decoders.items()
    }
    plain = bench.decoder(next(iter(decoders)))
    arms["generate"] = partial(generated, plain, [prompt], max(count // 2, 2))
    found = by_turns(arms, bench.options.runs)
    eager = out["generate"] = {"seconds_per_token": statistics.median(found.pop("generate"))}
    for name, runs in found.items():
        figures = engine_figures(bench, model, runs, context)
        figures["over_generate"] = eager["seconds_per_token"] / figures["seconds_per_token"]
        out[name] = {**figures, "decoder": describe_decoder(decoders[name])}
        vanilla_lines(bench, "vanilla", f"8b {name}", figures, wanted=bench.aims(name))


def vanilla_lines(
    bench: Bench, part: str, name: str, figures: Result, wanted: bool = False
) -> None:
    """Speed, share of the ceiling, and ratio to `generate` where it is there."""
    share, seconds = figures["share_of_ceiling"], figures["seconds_per_token"]
    met = share >= SHARE if wanted else None
    value = f"{share:.1%} ({seconds * 1000:.2f} ms a token)"
    bench.line(part, f"{name}, of the ceiling", value, f"≥ {SHARE:.0%}" if wanted else "", met)
    if over := figures.get("over_generate"):
        met = over >= OVER_GENERATE if wanted else None
        aim = f"≥ {OVER_GENERATE:g}×" if wanted else ""
        bench.line(part, f"{name}, over generate", f"{over:.2f}×", aim, met)


def contexts(bench: Bench, out: Result) -> None:
    """Vanilla, drafted, and `generate` behind longer and longer texts."""
    model = bench.model("8b")
    count = max(bench.options.tokens // 2, 4)
    decoder, proposer = bench.decoder(), bench.proposer(model.plan)
    for context in bench.options.contexts:
        (prompt,) = random_prompts(model.shape.vocabulary, context, 1, seed=context)
        arms: dict[str, Run] = {
            "vanilla": partial(decode, decoder, prompt, count),
            "speculative": partial(decode, decoder, prompt, count, proposer),
            "generate": partial(generated, decoder, [prompt], max(count // 2, 2)),
        }
        found = by_turns(arms, max(bench.options.runs - 1, 1))
        figures = engine_figures(bench, model, found["vanilla"], context)
        seconds = statistics.median(found["generate"])
        figures["over_generate"] = seconds / figures["seconds_per_token"]
        pairs = zip(found["vanilla"], found["speculative"], strict=True)
        speedup = statistics.median(one.per_token / other.per_token for one, other in pairs)
        same = all(run.output == found["vanilla"][0].output for run in found["speculative"])
        out[str(context)] = {
            "vanilla": figures,
            "generate": {"seconds_per_token": seconds},
            "speculative": {"over_vanilla": speedup, "identical": same},
        }
        vanilla_lines(bench, "contexts", f"8b at {context}", figures)
        value = f"{speedup:.2f}×, {'the same text' if same else 'ANOTHER text'}"
        bench.line("contexts", f"8b at {context}, drafted over vanilla", value)
        bench.save()


def batches(bench: Bench, out: Result) -> None:
    """Tokens per second of several prompts at once."""
    model, count = bench.model("8b"), max(bench.options.tokens // 2, 4)
    decoder, sizes = bench.decoder(), bench.options.batches
    for size in sizes:
        prompts = random_prompts(model.shape.vocabulary, BATCH_PROMPT, size, seed=size)
        proposer = bench.proposer(model.plan, rows=batch_sizes_up_to(max(sizes)))
        arms: dict[str, Run] = {
            "vanilla": partial(_batch_speed, decoder, None, prompts, count),
            "speculative": partial(_batch_speed, decoder, proposer, prompts, count),
            "generate": partial(_generate_speed, decoder, prompts, max(count // 2, 2)),
        }
        found = by_turns(arms, max(bench.options.runs - 1, 1))
        speeds = {name: statistics.median(own) for name, own in found.items()}
        pairs = zip(found["vanilla"], found["speculative"], strict=True)
        over = statistics.median(other / one for one, other in pairs)
        out[str(size)] = {"tokens_per_second": speeds, "over_vanilla": over}
        values = ", ".join(f"{name} {speed:.0f}" for name, speed in speeds.items())
        bench.line("batches", f"8b batch {size}, tokens/s", values)
        bench.line("batches", f"8b batch {size}, drafted over vanilla", f"{over:.2f}×")
        bench.save()


def _batch_speed(
    decoder: Decoder, proposer: BatchProposer | None, prompts: Sequence[Sequence[int]], count: int
) -> float:
    """Tokens per second, prompts' passes left out."""
    bench_prompts = [
        BenchPrompt(str(number), None, tuple(prompt), count)
        for number, prompt in enumerate(prompts)
    ]
    system = EngineSystem(
        "batch", decoder, proposer, SamplingParams(), frozenset(), batch_size=len(prompts)
    )
    runs = system.run(bench_prompts)
    tokens = sum(run.stats.decode_tokens for run in runs)
    return tokens / sum(run.stats.decode_seconds for run in runs)


def _generate_speed(decoder: Decoder, prompts: Sequence[Sequence[int]], count: int) -> float:
    return len(prompts) / generated(decoder, prompts, count)


def compiled(bench: Bench, out: Result) -> None:
    """The engine's compiled layers against its plain ones, vanilla, batch 1.

    Nothing is compiled but on a GPU: elsewhere this only shows that the part runs.
    """
    model, on_gpu = bench.model("8b"), bench.device.type == "cuda"
    begin = clock(bench.device)
    decoders = {"plain": bench.decoder(), "compiled": bench.decoder(compiled=on_gpu)}
    out["construction_seconds"] = clock(bench.device) - begin
    context, count = bench.options.contexts[0], bench.options.tokens
    (prompt,) = random_prompts(model.shape.vocabulary, context, 1, seed=6)
    begin = clock(bench.device)
    decode(decoders["compiled"], prompt, count)
    out["first_run_seconds"] = clock(bench.device) - begin
    arms: dict[str, Run] = {
        name: partial(decode, decoder, prompt, count) for name, decoder in decoders.items()
    }
    found = by_turns(arms, bench.options.runs)
    for name, runs in found.items():
        figures = engine_figures(bench, model, runs, context)
        out[name] = {**figures, "decoder": describe_decoder(decoders[name])}
        vanilla_lines(bench, "compile", f"8b {name}", figures)
    same = found["plain"][0].output == found["compiled"][0].output
    out["identical"] = same
    seconds = out["construction_seconds"] + out["first_run_seconds"]
    bench.line("compile", "construction and first run", f"{seconds:.0f} s")
    bench.line("compile", "the same text as without", "yes" if same else "no")


def generate_compiled(bench: Bench, out: Result) -> None:
    """`generate` with a static cache, which transformers compiles on a GPU.

    Its runs follow one another, on weights that stay where they are: exchanging them would have it
    compile again. The engine decodes before and behind them.
    """
    model, count = bench.model("8b"), bench.options.tokens
    context = bench.options.contexts[0]
    decoder = bench.decoder()
    (prompt,) = random_prompts(model.shape.vocabulary, context, 1, seed=6)
    engine = partial(decode, decoder, prompt, count)
    runs = [engine(), engine()][1:]
    with decoder.plain() as own:
        begin = clock(bench.device)
        static = partial(generate, own, [prompt], count, cache_implementation="static")
        for _ in range(STATIC_WARM_UPS):
            static()
        out["warm_up_seconds"] = clock(bench.device) - begin
        times = [static()[1] for _ in range(bench.options.runs)]
    runs += [engine(), engine()][1:]
    seconds = statistics.median(times)
    figures = engine_figures(bench, model, runs, context)
    over = seconds / figures["seconds_per_token"]
    out |= {"seconds_per_token": seconds, "all": times, "engine": figures, "engine_over": over}
    if bench.device.type == "cuda":
        torch.compiler.reset()
    share = model.step_bytes(context + count / 2) / seconds / bench.bandwidth()
    value = f"{share:.1%} of the ceiling ({seconds * 1000:.2f} ms a token)"
    bench.line("generate-compiled", "8b generate, static and compiled", value)
    bench.line("generate-compiled", "8b this engine over it", f"{over:.2f}×")
