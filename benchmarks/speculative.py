"""Speculative decoding by category, against vanilla and against what transformers offers.

Systems, by turns at each prompt:
  vanilla        this engine, nothing drafted
  mixed          the profile's layers and n-grams draft, as far as it pays (the default with one)
  skip           the profile's layers alone, as far as it pays
  ngram          n-grams alone, as far as it pays
  fixed          the profile's layers, up to 25 tokens while the confidence is 0.8 (the papers' way)
  transformers, transformers-static, prompt-lookup, early-exit: `generate` in these ways
  NAME-skip, NAME-mixed   the same two with each further profile given, by its file's name

Without a profile (or with an empty one) n-grams are all that drafts.

    python -m benchmarks.speculative --data spec_bench.jsonl --output speculative.json

This engine without drafts over `generate`:

    python -m benchmarks.speculative --data spec_bench.jsonl --runs 3 --max-new-tokens 96 \\
        --arms transformers transformers-static --output vanilla.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from conflayers_cli.bench.hf_baselines import HF_BASELINES, TransformersSystem
from conflayers_cli.bench.runner import BenchResult, measure
from conflayers_cli.bench.systems import EngineSystem, System
from conflayers_cli.profile.schema import Profile
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.search.objective import PAPER
from conflayers_cli.spec_decode.options import DraftMethod
from conflayers_cli.spec_decode.proposer import Proposer, SkipProposer
from conflayers_cli.utils.statistics import Spread

OWN = ("vanilla", "mixed", "skip", "ngram", "fixed")
ARMS = (*OWN, "transformers", "prompt-lookup", "early-exit")


def make_systems(
    subject: common.Subject, wanted: Sequence[str], beside: Sequence[Path] = ()
) -> list[System]:
    """The systems asked for that this model can have; vanilla is always among them."""
    decoder, sampling, ends = subject.decoder, SamplingParams(), subject.loaded.end_tokens
    systems: list[System] = [EngineSystem("vanilla", decoder, None, sampling, ends)]
    for name in dict.fromkeys(wanted):
        if name in HF_BASELINES:
            systems.append(TransformersSystem.baseline(name, decoder, sampling, ends))
        elif name != "vanilla" and (subject.profile or name == "ngram"):
            systems.append(
                EngineSystem(name, decoder, make_proposer(subject, name), sampling, ends)
            )
    for file in beside:
        profile = Profile.load(file)
        for by in (DraftMethod.SKIP, DraftMethod.MIXED):
            proposer = common.make_proposer(subject, profile, by)
            systems.append(
                EngineSystem(f"{file.stem}-{by.value}", decoder, proposer, sampling, ends)
            )
    return systems


def make_proposer(subject: common.Subject, name: str) -> Proposer | None:
    """The drafter of one of the engine's systems, which serves all prompts."""
    if name == "fixed" and subject.profile:
        plan = subject.profile.plan
        return SkipProposer(subject.decoder, plan, PAPER.max_tokens, PAPER.stop_probability)
    if name == "ngram":
        return common.make_proposer(subject, None)
    return common.make_proposer(subject, subject.profile, DraftMethod(name))


def report(result: BenchResult, subject: common.Subject) -> dict[str, Any]:
    """The figures by category and in all; printed as tables."""
    names = list(result.systems)
    best = "mixed" if "mixed" in names else "ngram" if "ngram" in names else "vanilla"
    parts = [*result.categories, None]
    rows: dict[str, dict[str, Any]] = {
        part or "all": {
            "arms": {name: common.figures(result, name, part) for name in names},
            "best": best,
            "best_over": {
                name: Spread.of(common.ratios(result, best, name, part)).model_dump()
                for name in names
                if name != best
            },
        }
        for part in parts
    }
    print(f"{subject.name}, {subject.dtype}: over vanilla, median (range) of runs")
    common.print_table(
        ["category", *names[1:]],
        [
            [part, *(common.spread(row["arms"][name]["over_vanilla"]) for name in names[1:])]
            for part, row in rows.items()
        ],
    )
    print(f"{best} over the others")
    others = [name for name in names if name != best]
    common.print_table(
        ["category", *others],
        [
            [part, *(common.spread(row["best_over"][name]) for name in others)]
            for part, row in rows.items()
        ],
    )
    identical = common.matches(result)
    counts = ", ".join(f"{name} {i['matching']}/{i['total']}" for name, i in identical.items())
    print(f"outputs identical to vanilla's: {counts}\n", flush=True)
    return {"dtype": subject.dtype, "categories": rows, "identical": identical}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = common.make_parser(
        __doc__, max_new_tokens=128, runs=2, models=["smollm2-deep", "smollm2"]
    )
    parser.add_argument("--model", help="one model alone")
    parser.add_argument(
        "--profile", type=Path, help="its profile, in place of the one in the folder"
    )
    parser.add_argument("--beside", type=Path, nargs="*", default=[], help="further profiles")
    parser.add_argument("--arms", nargs="+", choices=[*OWN, *HF_BASELINES], default=list(ARMS))
    options = common.parse_options(parser, arguments)
    names = [options.model] if options.model else options.models
    results: dict[str, Any] = {}
    for name in names:
        subject = open_with(name, options)
        prompts = common.interleave(common.prompts_by_category(options))
        bench_prompts = common.to_bench_prompts(subject, prompts, options.max_new_tokens)
        result = measure(
            make_systems(subject, options.arms, options.beside),
            bench_prompts,
            subject.decoder,
            SamplingParams(),
            runs=options.runs,
            warmup=0 if options.quick else 1,
            on_progress=common.show_progress,
        )
        results[name] = report(result, subject)
        common.save(options, "speculative", subject, {"models": results})


def open_with(name: str, options: argparse.Namespace) -> common.Subject:
    """The model with the profile of the command line, else the folder's."""
    subject = common.open_subject(name, options)
    if options.profile is None:
        return subject
    profile = Profile.load(options.profile)
    return common.Subject(subject.loaded, subject.decoder, profile if profile.plan else None)


if __name__ == "__main__":
    main()
