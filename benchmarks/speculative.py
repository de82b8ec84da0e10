"""Speculative decoding by category, against vanilla and against what transformers offers.

Arms, in turns at each prompt:
  vanilla        this engine, nothing drafted
  mixed          the profile's layers and n-grams draft, as far as it pays (the default with one)
  skip           the profile's layers alone, as far as it pays
  ngram          n-grams alone, as far as it pays
  fixed          the profile's layers, up to 25 tokens while the confidence is 0.8 (the papers' way)
  transformers, transformers-static, prompt-lookup, early-exit: `generate` in these ways
  NAME-skip, NAME-mixed   the same two with each further profile given, by its file's name

Without a profile (or with an empty one) n-grams are all that drafts.

    python -m benchmarks.speculative --data spec_bench.jsonl --output speculative.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import common
from conflayers_cli.bench.hf_baselines import PEERS, TransformersArm
from conflayers_cli.bench.runner import BenchResult, Spread, measure
from conflayers_cli.bench.systems import Arm, EngineArm
from conflayers_cli.profile.schema import Profile
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.search.objective import PAPER
from conflayers_cli.spec_decode.build import By
from conflayers_cli.spec_decode.proposer import Proposer, SkipProposer

OWN = ("vanilla", "mixed", "skip", "ngram", "fixed")
ARMS = (*OWN, "transformers", "prompt-lookup", "early-exit")


def arms_of(
    subject: common.Subject, wanted: Sequence[str], beside: Sequence[Path] = ()
) -> list[Arm]:
    """The arms asked for that this model can have; vanilla is always among them."""
    decoder, sampling, ends = subject.decoder, SamplingParams(), subject.loaded.end_tokens
    arms: list[Arm] = [EngineArm("vanilla", decoder, None, sampling, ends)]
    for name in dict.fromkeys(wanted):
        if name in PEERS:
            arms.append(TransformersArm.peer(name, decoder, sampling, ends))
        elif name != "vanilla" and (subject.profile or name == "ngram"):
            arms.append(EngineArm(name, decoder, drafter_of(subject, name), sampling, ends))
    for file in beside:
        profile = Profile.load(file)
        for by in (By.SKIP, By.MIXED):
            drafter = common.drafter_of(subject, profile, by)
            arms.append(EngineArm(f"{file.stem}-{by.value}", decoder, drafter, sampling, ends))
    return arms


def drafter_of(subject: common.Subject, name: str) -> Proposer | None:
    """The drafter of one of the engine's arms, which serves all prompts."""
    if name == "fixed" and subject.profile:
        plan = subject.profile.plan
        return SkipProposer(subject.decoder, plan, PAPER.max_tokens, PAPER.stop_probability)
    if name == "ngram":
        return common.drafter_of(subject, None)
    return common.drafter_of(subject, subject.profile, By(name))


def report(result: BenchResult, subject: common.Subject) -> dict[str, Any]:
    """The figures by category and in all; printed as tables."""
    names = list(result.arms)
    best = "mixed" if "mixed" in names else "ngram" if "ngram" in names else names[-1]
    parts = [*result.categories, None]
    rows: dict[str, dict[str, Any]] = {
        part or "all": {
            "arms": {name: common.figures(result, name, part) for name in names},
            "best": best,
            "best_over": {
                name: asdict(Spread.of(common.ratios(result, best, name, part)))
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
            [part, *(times_of(row["arms"][name]["over_vanilla"]) for name in names[1:])]
            for part, row in rows.items()
        ],
    )
    print(f"{best} over the others")
    others = [name for name in names if name != best]
    common.print_table(
        ["category", *others],
        [
            [part, *(times_of(row["best_over"][name]) for name in others)]
            for part, row in rows.items()
        ],
    )
    identical = {
        name: {"matching": found.matching, "total": found.total}
        for name, found in (result.identical or {}).items()
    }
    told = ", ".join(f"{name} {i['matching']}/{i['total']}" for name, i in identical.items())
    print(f"outputs identical to vanilla's: {told}\n", flush=True)
    return {"dtype": subject.dtype, "categories": rows, "identical": identical}


def times_of(values: dict[str, float | None]) -> str:
    """A spread from the result file, for people."""
    return common.spread(Spread(values["median"], values["min"], values["max"]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = common.parser_for(
        __doc__, max_new_tokens=128, runs=2, models=["smollm2-deep", "smollm2"]
    )
    parser.add_argument("--model", help="one model alone")
    parser.add_argument(
        "--profile", type=Path, help="its profile, in place of the one in the folder"
    )
    parser.add_argument("--beside", type=Path, nargs="*", default=[], help="further profiles")
    parser.add_argument("--arms", nargs="+", choices=[*OWN, *PEERS], default=list(ARMS))
    options = common.parsed(parser, arguments)
    names = [options.model] if options.model else options.models
    results: dict[str, Any] = {}
    for name in names:
        subject = open_with(name, options)
        prompts = common.mixed_up(common.prompts_of(options))
        cases = common.cases_of(subject, prompts, options.max_new_tokens)
        result = measure(
            arms_of(subject, options.arms, options.beside),
            cases,
            subject.decoder,
            SamplingParams(),
            runs=options.runs,
            warmup=0 if options.quick else 1,
            on_progress=lambda message, done: common.say(f"{done:4.0%} {message}"),
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
