"""Thousands of generations in one process: the same texts every round, and no memory lost.

A fixed set of requests is decoded over and over: one prompt at a time and several at once, greedily
and sampled, drafted by skipping, by n-grams, by both, as a tree, and not at all, with prompts and
answers of many lengths. Every round has to give the first round's texts; who drafts is made anew
each round, so that it draws the same. Memory (resident, freed blocks given back first) and the time
a token takes are noted by round. The verdict is on the slope of memory behind the first rounds, in
MiB per 1,000 generations with a 95 % interval (Theil-Sen, which a few jumps don't move).

    python -m tools.soak --model tiny --generations 2000 --output soak-tiny.json
    python -m tools.soak --model smollm2 --minutes 10 --output soak-smollm2.json
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scipy.stats

from benchmarks import common
from conflayers_cli.engine.cost_model import CostTable, PassCosts
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.open_model import open_model
from conflayers_cli.generation.batch import Batch
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.mixed import MixedProposer
from conflayers_cli.spec_decode.proposer import Proposer, SkipProposer
from conflayers_cli.spec_decode.tree import TreeShape
from conflayers_cli.utils.environment import describe_environment
from conflayers_cli.utils.files import write_json
from conflayers_cli.utils.memory import resident
from tests.cli.conftest import save_model

SETTLING = 0.2
"""Share of the rounds at the beginning in which allocators and caches still grow to their size."""
MAX_SLOPE = 5.0
"""MiB per 1,000 generations that are no leak: below it the interval's lower end has to lie."""
LENGTHS = (3, 17, 60, 130, 300)
ANSWERS = (4, 9, 21, 13, 30)
BATCH_SIZE = 4

Make = Callable[[Decoder, SkipPlan, CostTable], Proposer | None]
WAYS: dict[str, Make] = {
    "vanilla": lambda decoder, plan, costs: None,
    "skip": lambda decoder, plan, costs: SkipProposer(decoder, plan, 4, 0.1),
    "tree": lambda decoder, plan, costs: SkipProposer(
        decoder, plan, 3, 0.1, tree=TreeShape(((0.5, 1), (0.0, 2)))
    ),
    "ngram": lambda decoder, plan, costs: MixedProposer(decoder, None, costs),
    "mixed": lambda decoder, plan, costs: MixedProposer(decoder, plan, costs, max_tokens=8),
}
TOGETHER = ("vanilla", "ngram", "mixed")
"""Ways that draft for several sequences."""


@dataclass(frozen=True)
class Request:
    """A prompt, and how it is decode.

    Attributes:
        way: who drafts.
        batch_size: prompts decoded at once: this one and variants of it.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams
    way: str
    batch_size: int


def make_requests(vocabulary: int, context: int) -> list[Request]:
    """The fixed set: every way, greedy and sampled, alone and together, of mixed lengths."""
    found: list[Request] = []
    for sampling in (SamplingParams(), SamplingParams(temperature=0.9, top_p=0.95, seed=5)):
        for way in WAYS:
            for batch_size in (1, BATCH_SIZE) if way in TOGETHER else (1,):
                number = len(found)
                length = min(LENGTHS[number % len(LENGTHS)], context // 2)
                # Repeating itself, so that n-grams draft.
                period = [(number * 7919 + i * 104729) % vocabulary for i in range(12)]
                prompt = tuple(period[i % len(period)] for i in range(length))
                found.append(Request(prompt, ANSWERS[number % 4], sampling, way, batch_size))
    return found


def decode(decoder: Decoder, request: Request, plan: SkipPlan, costs: CostTable) -> list[list[int]]:
    """The texts of one request."""
    proposer: Any = WAYS[request.way](decoder, plan, costs)
    if request.batch_size == 1:
        generation = Generation(
            decoder,
            GenerationRequest(request.prompt, request.max_new_tokens, request.sampling),
            proposer=proposer,
        )
        for _ in generation:
            pass
        return [generation.output]
    variants = [
        GenerationRequest(
            request.prompt[i:] or request.prompt, request.max_new_tokens, request.sampling
        )
        for i in range(request.batch_size)
    ]
    batch = Batch(decoder, variants, size=request.batch_size - 1, proposer=proposer)
    batch.run()
    return batch.outputs


def constant_costs(depth: int) -> CostTable:
    """Made-up costs by which drafting pays, the same on every machine."""
    verify = {width: 1.0 + 0.02 * width for width in range(1, 40)}
    return CostTable({1: PassCosts(verify, 0.1, 0.4 / depth, 0.4 / depth, 64)}, depth)


@dataclass
class Round:
    """What one round over all requests came to.

    Attributes:
        generations: texts decoded until its end, from the beginning.
        resident: bytes behind it; None: nothing tells.
        seconds_per_token: the median over its requests.
        different: requests whose texts were not the first round's.
    """

    generations: int
    resident: int | None
    seconds_per_token: float
    different: list[int]


def soak(
    decoder: Decoder, plan: SkipPlan, requests: Sequence[Request], most: int, minutes: float
) -> list[Round]:
    """Rounds until so many texts are decoded, or the time is up."""
    costs = constant_costs(decoder.depth)
    begin, first, rounds, generations = time.monotonic(), [], list[Round](), 0
    while generations < most and (time.monotonic() - begin) / 60 < minutes:
        taken, different = [], []
        for number, request in enumerate(requests):
            started = time.perf_counter()
            texts = decode(decoder, request, plan, costs)
            taken.append((time.perf_counter() - started) / sum(map(len, texts)))
            generations += len(texts)
            if not rounds:
                first.append(texts)
            elif texts != first[number]:
                different.append(number)
        gc.collect()
        rounds.append(Round(generations, resident(), statistics.median(taken), different))
        if len(rounds) % 10 == 1:
            held = (rounds[-1].resident or 0) / 2**20
            speed = rounds[-1].seconds_per_token * 1e3
            common.say(f"{generations} texts: {held:.1f} MiB, {speed:.2f} ms a token")
    return rounds


def fit_slope(rounds: Sequence[Round]) -> dict[str, float] | None:
    """MiB per 1,000 generations, with its interval; None: too few rounds."""
    behind = [each for each in rounds[int(len(rounds) * SETTLING) :] if each.resident is not None]
    if len(behind) < 4:
        return None
    held = [(each.resident or 0) / 2**20 for each in behind]
    fit = scipy.stats.theilslopes(held, [each.generations / 1000 for each in behind], alpha=0.95)
    return {"slope": float(fit[0]), "low": float(fit[2]), "high": float(fit[3])}


def latency_by_hundred(rounds: Sequence[Round]) -> list[dict[str, float]]:
    """By hundred generations: the median of their rounds' milliseconds a token."""
    parts: dict[int, list[float]] = {}
    for each in rounds:
        parts.setdefault((each.generations - 1) // 100, []).append(each.seconds_per_token)
    return [
        {"generations": 100 * (part + 1), "ms_per_token": 1e3 * statistics.median(found)}
        for part, found in parts.items()
    ]


def judge_rounds(rounds: Sequence[Round], slope: dict[str, float] | None) -> tuple[bool, str]:
    """(whether all is well, what to say)."""
    different = sum(len(each.different) for each in rounds)
    texts = f"{rounds[-1].generations} texts in {len(rounds)} rounds, {different} different"
    if slope is None:
        return not different, f"{texts}; too few rounds to tell about memory"
    figures = (
        f"{slope['slope']:+.2f} MiB per 1,000 texts ({slope['low']:+.2f}–{slope['high']:+.2f})"
    )
    leaks = slope["low"] > MAX_SLOPE
    memory = "memory grows" if leaks else "memory does not grow"
    return not different and not leaks, f"{texts}; {memory}: {figures}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak one model; 1 where texts differ or memory grows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="a name, a folder, or tiny: a random one")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--generations", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=60.0, help="at the most")
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as made:
        tiny = options.model == "tiny"
        source = str(save_model(Path(made) / "tiny")) if tiny else options.model
        loaded, decoder = open_model(source, LoadOptions(dtype=options.dtype))
        plan = SkipPlan.of_layers(range(1, decoder.depth - 1, 4))
        requests = make_requests(decoder.vocabulary, loaded.context_length or 1024)
        rounds = soak(decoder, plan, requests, options.generations, options.minutes)
    slope = fit_slope(rounds)
    passed, verdict = judge_rounds(rounds, slope)
    print(verdict)
    if options.output:
        results = {
            "benchmark": "soak",
            "model": options.model,
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "environment": describe_environment(loaded.device),
            "verdict": verdict,
            "slope_mib_per_1000": slope,
            "curve": [
                {
                    "generations": each.generations,
                    "resident_mib": None if each.resident is None else each.resident / 2**20,
                    "ms_per_token": 1e3 * each.seconds_per_token,
                    "different": each.different,
                }
                for each in rounds
            ],
            "latency": latency_by_hundred(rounds),
        }
        write_json(options.output, results)
    return not passed


if __name__ == "__main__":
    sys.exit(main())
