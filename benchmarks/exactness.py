"""How many outputs equal vanilla's, on real prompts, greedy and sampled: all kinds of drafts.

Drafts are made as long as may be, whether that pays or not: costs are given out as nothing. On
smollm2-deep the plan leaves out the planted layers; elsewhere it is a deliberately bad one, so that
most drafts are refused. Every output is compared with the one that vanilla decoding gives alone:

  vanilla, batch   nothing drafted, several prompts at once
  reversed         nothing drafted, the prompts in another order
  one thread       nothing drafted, by one thread
  chain            the skipped layers draft, 6 tokens at a time
  tree             the same with the papers' leaves beside them, one prompt at a time
  ngram            n-grams draft, up to 25 tokens
  mixed            n-grams and the skipped layers draft, up to 25 tokens
  int4             n-grams and the whole model in four bits draft
  adaptive         drafts of the plans that `--adapt conflayers` tries meanwhile
  transformers     `generate`, greedy only

Nothing ends before its budget: what is written behind an end token is compared, too. Speeds are
not the subject here.

    python -m benchmarks.exactness --data spec_bench.jsonl --per-category 4 --output exactness.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import common
from conflayers_cli.bench.hf_baselines import TransformersSystem
from conflayers_cli.bench.output_match import match_outputs
from conflayers_cli.bench.schema import OutputMatch
from conflayers_cli.bench.systems import (
    BenchPrompt,
    EngineSystem,
    PromptRuns,
    Run,
    System,
)
from conflayers_cli.engine.cost_model import CostTable, PassCosts
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.search.online import AdaptiveProposer
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.mixed import MixedProposer
from conflayers_cli.spec_decode.proposer import Proposer, SkipProposer
from conflayers_cli.spec_decode.tree import PAPER_SHAPE

SAMPLINGS = {
    "greedy": SamplingParams(),
    "T 0.3": SamplingParams(0.3, seed=1),
    "T 0.7, top-k 40": SamplingParams(0.7, top_k=40, seed=2),
    "T 1": SamplingParams(1.0, seed=3),
    "T 1, top-p 0.9": SamplingParams(1.0, top_p=0.9, seed=4),
    "T 1.3, min-p 0.05, penalty 1.1": SamplingParams(
        1.3, min_p=0.05, repetition_penalty=1.1, seed=5
    ),
}
BAD_PLAN = SkipPlan.of([3, 7, 9, 12, 20], [7, 12, 15, 21])
CHAIN = 6
FREE = PassCosts(verify={1: 1.0, 64: 1.0}, floor=0.0, attention=0.0, mlp=0.0, context=1)
"""Passes of any width cost the same and drafts nothing: it always pays to draft."""


def plan_for(decoder: Decoder) -> SkipPlan:
    """The planted layers, or the bad plan where nothing is planted (and it fits)."""
    if planted := getattr(decoder.config, "conflayers_planted", None):
        return SkipPlan.of_layers(planted)
    return BAD_PLAN if decoder.depth > 22 else common.bad_plan(decoder.depth)


def eager(
    decoder: Decoder, plan: SkipPlan, *, ngram: bool, rows: int, longest: int
) -> MixedProposer:
    """A drafter that never finds it too dear."""
    table = CostTable({rows: FREE}, decoder.depth)
    return MixedProposer(decoder, plan, table, ngram=ngram, max_tokens=longest)


def alone(decoder: Decoder, plan: SkipPlan) -> dict[str, Proposer]:
    """Who drafts for one prompt at a time."""
    return {
        "chain": SkipProposer(decoder, plan, CHAIN, 0.0),
        "tree": SkipProposer(decoder, plan, CHAIN, 0.0, PAPER_SHAPE),
        "ngram": eager(decoder, SkipPlan(), ngram=True, rows=1, longest=25),
        "mixed": eager(decoder, plan, ngram=True, rows=1, longest=25),
        "int4": eager(decoder, SkipPlan(weights="int4"), ngram=True, rows=1, longest=25),
        "adaptive": AdaptiveProposer(decoder, "conflayers", budget=0.5),
    }


def together(decoder: Decoder, plan: SkipPlan, rows: int) -> dict[str, MixedProposer | None]:
    """Who drafts for several prompts at once."""
    return {
        "vanilla": None,
        "chain": eager(decoder, plan, ngram=False, rows=rows, longest=CHAIN),
        "mixed": eager(decoder, plan, ngram=True, rows=rows, longest=25),
    }


def decode(
    subject: common.Subject,
    prompts: Sequence[BenchPrompt],
    batches: Sequence[int],
    sampling: SamplingParams,
) -> dict[tuple[str, int], list[Run]]:
    """Every output, by arm and batch size."""
    decoder = subject.decoder
    ends: frozenset[int] = frozenset()
    plan = plan_for(decoder)
    vanilla = EngineSystem("vanilla", decoder, None, sampling, ends)
    arms: list[System] = [vanilla]
    arms += [
        EngineSystem(name, decoder, proposer, sampling, ends)
        for name, proposer in alone(decoder, plan).items()
    ]
    if sampling.greedy:
        arms.append(TransformersSystem(decoder, sampling, ends))
    found: dict[tuple[str, int], list[Run]] = {}
    for arm in arms:
        common.say(f"{subject.name} {subject.dtype}: {arm.name}")
        found[arm.name, 1] = arm.run(prompts)
    found["reversed", 1] = vanilla.run(prompts[::-1])[::-1]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found["one thread", 1] = vanilla.run(prompts)
    torch.set_num_threads(threads)
    for rows in (rows for rows in batches if rows > 1):
        for name, proposer in together(decoder, plan, rows).items():
            common.say(f"{subject.name} {subject.dtype}: {name}, batch {rows}")
            batch = EngineSystem(name, decoder, proposer, sampling, ends, rows)
            found[name, rows] = batch.run(prompts)
    return found


def compared(
    subject: common.Subject,
    prompts: Sequence[BenchPrompt],
    arm: Sequence[Run],
    vanilla: Sequence[Run],
    sampling: SamplingParams,
) -> OutputMatch:
    """An arm's outputs against vanilla's alone."""
    pairs = [
        PromptRuns(prompt, {"vanilla": (one,), "arm": (other,)})
        for prompt, one, other in zip(prompts, vanilla, arm, strict=True)
    ]
    return match_outputs(["arm"], pairs, subject.decoder, sampling)["arm"]


def run(subject: common.Subject, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One model in one dtype: a row per way of choosing tokens, arm and batch size."""
    chosen = common.interleave(common.prompts_by_category(options))
    prompts = common.to_bench_prompts(subject, chosen, options.max_new_tokens)
    rows = []
    for name in options.samplings:
        rows += run_sampling(subject, prompts, options.batches, name)
    return rows


def run_sampling(
    subject: common.Subject, prompts: Sequence[BenchPrompt], batches: Sequence[int], sampling: str
) -> list[dict[str, Any]]:
    """The rows of one way of choosing tokens."""
    settings = SAMPLINGS[sampling]
    outputs = decode(subject, prompts, batches, settings)
    vanilla = outputs.pop(("vanilla", 1))
    rows = []
    for (name, size), runs in outputs.items():
        match = compared(subject, prompts, runs, vanilla, settings)
        rows.append(
            {
                "model": subject.name,
                "dtype": subject.dtype,
                "sampling": sampling,
                "arm": name,
                "batch": size,
                "matching": match.matching,
                "total": match.total,
                "tokens": sum(run.stats.tokens for run in runs),
                "drafted": sum(run.stats.drafted for run in runs),
                "accepted": sum(run.stats.accepted for run in runs),
                "divergences": [parted.model_dump() for parted in match.divergences],
            }
        )
    return rows


def line(row: dict[str, Any]) -> list[str]:
    """An arm for people."""
    gaps = [parted["gap"] for parted in row["divergences"]]
    return [
        row["model"],
        row["dtype"],
        row["sampling"],
        row["arm"],
        str(row["batch"]),
        f"{row['matching']}/{row['total']}",
        str(row["tokens"]),
        f"{row['accepted']}/{row['drafted']}",
        f"{max(gaps):.2g}" if gaps else "",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every model in every dtype and print a table."""
    parser = common.make_parser(__doc__, per_category=4, max_new_tokens=128)
    parser.add_argument(
        "--dtypes", nargs="+", default=["bfloat16", "float32"], help="int8, int4: rounded weights"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--samplings", nargs="+", choices=SAMPLINGS, default=list(SAMPLINGS))
    quick = {"dtypes": ["bfloat16"], "batches": [1, 2], "samplings": ["greedy", "T 1"]}
    options = common.parse_options(parser, arguments, **quick)
    rows: list[dict[str, Any]] = []
    for name in options.models:
        for dtype in options.dtypes:
            quantize = dtype if dtype in ("int8", "int4") else None
            options.dtype, options.quantize = ("auto" if quantize else dtype), quantize
            subject = common.open_subject(name, options)
            rows += run(subject, options)
            common.save(options, "exactness", subject, {"rows": rows})
    head = [
        "model",
        "dtype",
        "sampling",
        "arm",
        "batch",
        "identical",
        "tokens",
        "accepted",
        "widest gap",
    ]
    common.print_table(head, map(line, rows))
    for row in rows:
        for parted in row["divergences"]:
            print(*line(row)[:5], parted)


if __name__ == "__main__":
    main()
