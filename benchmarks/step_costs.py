"""What passes cost: by width, under a plan, and against the model's own modules.

Passes run over a filled cache, in turns; lower quartiles over all rounds, since what else the
machine does only adds time. transformers' modules have plain weights and their own dynamic cache.

    python -m benchmarks.step_costs --output step-costs.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks import common
from conflayers_cli.engine.decoder import FULL, Decoder
from conflayers_cli.engine.graph_runner import clock
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.skip_plan import SkipPlan

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 17, 20, 23, 26)
BLOCK = 4
"""Passes of the plain modules behind each other: packing the weights again takes a while."""

Times = dict[str, list[float]]


def tokens_for(decoder: Decoder, width: int) -> torch.Tensor:
    """Random tokens ``[1, T]``."""
    generator = torch.Generator().manual_seed(width)
    tokens = torch.randint(decoder.vocabulary, (1, width), generator=generator)
    return tokens.to(decoder.device)


def run_engine(decoder: Decoder, cache: KVCache, plan: SkipPlan, context: int, width: int) -> float:
    """Seconds of one pass, greedy choice included."""
    tokens = tokens_for(decoder, width)
    positions = torch.arange(context, context + width, device=decoder.device)[None]
    begin = clock(decoder.device)
    if plan:
        decoder.greedy_with_confidence(tokens, positions, cache, plan).tolist()
    else:
        decoder.greedy(tokens, positions, cache)
    return clock(decoder.device) - begin


@torch.inference_mode()
def run_modules(decoder: Decoder, text: torch.Tensor, passes: int) -> list[float]:
    """Seconds of passes of one token by the model's modules, behind a text ``[1, T]``."""
    times = []
    with decoder.plain() as model:
        cache = DynamicCache(config=model.config)
        model(input_ids=text, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = tokens_for(decoder, 1)
        for number in range(passes + 1):
            begin = clock(decoder.device)
            output = model(input_ids=token, past_key_values=cache, use_cache=True)
            output.logits.argmax(dim=-1).tolist()
            if number:  # the first one warms up
                times.append(clock(decoder.device) - begin)
    return times


def make_passes(
    subject: common.Subject, plan: SkipPlan, cache: KVCache, context: int
) -> dict[str, Callable[[], float]]:
    """The engine's passes by name."""
    decoder = subject.decoder
    run = partial(run_engine, decoder, cache)
    nothing = SkipPlan.of_layers(range(1, decoder.depth - 1))
    return {
        **{f"verify {width}": partial(run, FULL, context, width) for width in WIDTHS},
        "draft 1": partial(run, plan, context, 1),
        "first and last layer": partial(run, nothing, context, 1),
    }


def measure(subject: common.Subject, plan: SkipPlan, context: int, rounds: int) -> dict[str, float]:
    """Seconds of every pass, the modules' among them."""
    decoder = subject.decoder
    text = tokens_for(decoder, context)
    cache = decoder.new_cache(context + max(WIDTHS))
    decoder.prefill(text, cache)
    passes = make_passes(subject, plan, cache, context)
    times: Times = {name: [] for name in (*passes, "modules 1")}
    for round_ in range(rounds + 1):
        for name, run in passes.items():
            taken = run()
            if round_:  # the first round warms up
                times[name].append(taken)
        if round_ % BLOCK == 0:
            times["modules 1"] += run_modules(decoder, text, BLOCK)
    return {name: sorted(found)[len(found) // 4] for name, found in times.items()}


def report(subject: common.Subject, plan: SkipPlan, seconds: Mapping[str, float]) -> dict[str, Any]:
    """The figures, printed."""
    one = seconds["verify 1"]
    print(f"{subject.name}, {subject.dtype}: seconds of a pass")
    common.print_table(
        ["pass", "ms", "of a step"],
        [(name, f"{s * 1000:.2f}", f"{s / one:.2f}") for name, s in seconds.items()],
    )
    return {
        "dtype": subject.dtype,
        "plan": {"attention": plan.attention, "mlp": plan.mlp},
        "seconds": dict(seconds),
        "modules_over_engine": seconds["modules 1"] / one,
        "draft_of_step": seconds["draft 1"] / one,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=40)
    options: argparse.Namespace = common.parse_options(parser, arguments, rounds=BLOCK, context=64)
    results: dict[str, Any] = {}
    for name in options.models:
        subject = common.open_subject(name, options)
        # A model without a plan of its own: what half its layers would cost.
        half = SkipPlan.unified(subject.decoder.depth, 2.0)
        plan = subject.profile.plan if subject.profile else half
        seconds = measure(subject, plan, options.context, options.rounds)
        results[name] = report(subject, plan, seconds)
        common.save(options, "step-costs", subject, {"models": results})


if __name__ == "__main__":
    main()
