"""Shared by the benchmarks: prompts by category, drafters, runs by turns, tables, result files."""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice, zip_longest
from pathlib import Path
from typing import Any

from conflayers_cli.bench.runner import BenchResult, measure, run_ratios
from conflayers_cli.bench.systems import (
    BenchPrompt,
    EngineSystem,
    PromptRuns,
)
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.open_model import open_model
from conflayers_cli.generation.prompt_encoding import PromptOptions, encode_prompts
from conflayers_cli.generation.prompts import Prompt, builtin_prompts, read_prompts
from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.models.loaded_model import LoadedModel
from conflayers_cli.profile.build_proposer import as_batch_proposer, build_proposer
from conflayers_cli.profile.check import fingerprint_model
from conflayers_cli.profile.schema import DraftSettings, Profile, SkipSection
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.options import DraftMethod, DraftOptions
from conflayers_cli.spec_decode.proposer import Proposer
from conflayers_cli.utils.environment import describe_environment
from conflayers_cli.utils.files import write_json
from conflayers_cli.utils.statistics import Spread

PROFILES = Path("profiles")
MIN_TOKENS = 5
"""Outputs with fewer tokens after the first say nothing about speed."""
MODELS = ("smollm2", "smollm2-deep")


@dataclass(frozen=True)
class Subject:
    """A model to be measured.

    Attributes:
        profile: its calibrated profile; None: there is none, or it leaves out nothing.
        quantize: the bits that its weights were rounded to.
    """

    loaded: LoadedModel
    decoder: Decoder
    profile: Profile | None
    quantize: str | None = None

    @property
    def name(self) -> str:
        return self.loaded.name

    @property
    def dtype(self) -> str:
        return self.quantize or str(self.loaded.dtype).removeprefix("torch.")


def plain_parser(document: str | None) -> argparse.ArgumentParser:
    """A parser without options, whose ``--help`` shows a script's docstring as it is."""
    return argparse.ArgumentParser(
        description=document,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add ``--output`` and ``--quick``."""
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    parser.add_argument("--quick", action="store_true", help="next to nothing, to see that it runs")


def make_parser(document: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Options of every benchmark.

    Args:
        document: the script's docstring.
        defaults: of ``per_category``, ``max_new_tokens`` and ``runs``, where they differ.
    """
    parser = plain_parser(document)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names or folders")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--profiles",
        type=Path,
        default=PROFILES,
        help="folder with MODEL.yaml, the calibrated profile, for models that have one",
    )
    parser.add_argument(
        "--data", type=Path, help="prompts with categories, as Spec-Bench's; else the package's own"
    )
    parser.add_argument("--categories", nargs="+", help="else the large ones")
    parser.add_argument("--per-category", type=int, default=2, help="prompts of each")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--runs", type=int, default=3, help="of every prompt in every arm")
    add_output(parser)
    parser.set_defaults(**defaults)
    return parser


QUICK: Mapping[str, Any] = {
    "models": ["smollm2"],
    "per_category": 1,
    "max_new_tokens": 8,
    "runs": 1,
}


def parse_options(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, **quick: Any
) -> argparse.Namespace:
    """The options; with ``--quick`` those that are not given are small, as ``quick`` says."""
    return parse_quick(parser, arguments, {**QUICK, **quick})


def parse_quick(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, quick: Mapping[str, Any]
) -> argparse.Namespace:
    """The options; with ``--quick``, ``quick`` are the defaults."""
    if "--quick" in (sys.argv[1:] if arguments is None else arguments):
        parser.set_defaults(**quick)
    return parser.parse_args(arguments)


def open_subject(name: str, options: argparse.Namespace) -> Subject:
    """Load a model, and its profile where the folder has one that leaves out anything."""
    say(f"loading {name}")
    quantize = getattr(options, "quantize", None)
    loaded, decoder = open_model(name, LoadOptions(dtype=options.dtype, quantize=quantize))
    file = options.profiles / f"{Path(name).name}.yaml"
    profile = Profile.load(file) if file.is_file() else None
    return Subject(loaded, decoder, profile if profile and profile.plan else None, quantize)


def choose_prompts(
    data: Path | None, categories: Sequence[str] | None, per_category: int
) -> dict[str, list[Prompt]]:
    """The first prompts of each category: those named, else those with half as many prompts as the
    largest at the least (Spec-Bench has some of 40 prompts and some of 5).

    Raises:
        SystemExit: a category that is named has no prompts.
    """
    prompts = read_prompts(data) if data else builtin_prompts()
    sizes = Counter(prompt.category for prompt in prompts if prompt.category)
    largest = max(sizes.values(), default=0)
    names = categories or [name for name, size in sizes.items() if 2 * size >= largest]
    found = {
        name: [prompt for prompt in prompts if prompt.category == name][:per_category]
        for name in names
    }
    if empty := [name for name, own in found.items() if not own]:
        raise SystemExit(f"no prompts of category {', '.join(empty)}")
    return found


def prompts_by_category(
    options: argparse.Namespace, per_category: int | None = None
) -> dict[str, Any]:
    """`choose_prompts` by the options; two categories are enough to see that something runs."""
    count = per_category or options.per_category
    found = choose_prompts(options.data, options.categories, count)
    return dict(islice(found.items(), 2 if options.quick else None))


def interleave(by_category: Mapping[str, Sequence[Prompt]]) -> list[Prompt]:
    """The prompts of all categories in turns."""
    turns = zip_longest(*by_category.values())
    return [prompt for prompt in chain.from_iterable(turns) if prompt is not None]


def to_bench_prompts(
    subject: Subject, prompts: Sequence[Prompt], max_new_tokens: int
) -> list[BenchPrompt]:
    """The prompts as the tool gives them to the model."""
    options = PromptOptions(max_new_tokens=max_new_tokens)
    encoded = encode_prompts(subject.loaded, prompts, options)
    return [
        BenchPrompt(prompt.id, prompt.category, tuple(prompt.prompt), prompt.max_new_tokens)
        for prompt in encoded
    ]


def repeat_prompts(prompts: Sequence[BenchPrompt], count: int) -> list[BenchPrompt]:
    """So many prompts; where there are fewer, they come again."""
    return list(islice(cycle(prompts), count))


def bad_plan(depth: int, seed: int = 0) -> SkipPlan:
    """A random half of the layers, which nobody would leave out."""
    layers = random.Random(seed).sample(range(1, depth - 1), min(depth // 2, depth - 2))
    return SkipPlan.of_layers(sorted(layers))


def bad_profile(subject: Subject, seed: int = 0) -> Profile:
    """A profile with :func:`bad_plan`, as one written by hand: without anything measured."""
    return Profile(
        model=fingerprint_model(subject.loaded),
        skip=SkipSection.of(bad_plan(subject.decoder.depth, seed)),
        draft=DraftSettings(max_tokens=8, stop_probability=0.3),
    )


def make_proposer(
    subject: Subject, profile: Profile | None, by: DraftMethod | None = None, *, rows: int = 1
) -> Proposer | None:
    """A new drafter, made as the tool makes it, with costs that are measured or known.

    Args:
        subject: the model.
        profile: None: n-grams draft.
        by: who drafts; None: as the profile says.
        rows: prompts decoded at once.
    """
    way = DraftOptions(method=DraftMethod.NGRAM if profile is None else by, batch_size=rows)
    return build_proposer(subject.loaded, subject.decoder, profile, None, False, way)


def compare(
    subject: Subject,
    proposer: Proposer | None,
    prompts: Sequence[BenchPrompt],
    *,
    batch_size: int = 1,
    temperature: float = 0.0,
    runs: int = 3,
    warmup: int = 0,
) -> BenchResult:
    """Vanilla against one drafter, prompt by prompt or several prompts at once, by turns."""
    sampling, decoder = SamplingParams(temperature=temperature, seed=0), subject.decoder
    ends = subject.loaded.end_tokens
    drafts = as_batch_proposer(proposer) if batch_size > 1 else proposer
    systems = [
        EngineSystem("vanilla", decoder, None, sampling, ends, batch_size),
        EngineSystem("speculative", decoder, drafts, sampling, ends, batch_size),
    ]
    return measure(
        systems, prompts, decoder, sampling, batch_size=batch_size, runs=runs, warmup=warmup
    )


def ratios(
    result: BenchResult,
    system: str = "speculative",
    over: str = "vanilla",
    category: str | None = None,
) -> list[float]:
    """Speeds of one system over another, run by run; outputs of next to no tokens are left out."""
    long_enough = [
        prompt
        for prompt in timed(result, category)
        if all(
            run.stats.decode_tokens >= MIN_TOKENS
            for name in (system, over)
            for run in prompt.runs[name]
        )
    ]
    return run_ratios(long_enough, system, over)


def timed(result: BenchResult, category: str | None = None) -> Sequence[PromptRuns]:
    """What speeds are measured of: the queues or prompts, or the prompts of a category."""
    return result.of_category(category) if category else result.queues or result.prompts


def figures(result: BenchResult, system: str, category: str | None = None) -> dict[str, Any]:
    """A system's figures, for the result file: speed, ratio to vanilla, and what it drafted."""
    runs = [run for prompt in timed(result, category) for run in prompt.runs[system]]
    speeds = [speed for run in runs if (speed := run.stats.tokens_per_second)]
    drafted = sum(run.stats.drafted for run in runs)
    steps = sum(run.stats.steps for run in runs)
    return {
        "tokens_per_second": Spread.of(speeds).model_dump(),
        "over_vanilla": Spread.of(ratios(result, system, category=category)).model_dump(),
        "tokens": sum(run.stats.tokens for run in runs),
        "tokens_per_step": sum(run.stats.decode_tokens for run in runs) / steps if steps else None,
        "drafted": drafted,
        "accepted": sum(run.stats.accepted for run in runs),
    }


def matches(result: BenchResult) -> dict[str, dict[str, int]]:
    """How many outputs equal vanilla's, by system, for the result file; empty when sampling."""
    return {
        name: {"matching": match.matching, "total": match.total}
        for name, match in result.matches.items()
    }


def times(value: float | None) -> str:
    """A ratio for people."""
    return "–" if value is None else f"{value:.2f}×"


def spread(values: Sequence[float] | Spread | Mapping[str, float | None]) -> str:
    """Median and range of ratios, for people; also of a `Spread` in a result file."""
    if isinstance(values, Mapping):
        found = Spread(**values)
    else:
        found = values if isinstance(values, Spread) else Spread.of(values)
    if found.median is None:
        return "–"
    return f"{found.median:.2f}× ({found.min:.2f}–{found.max:.2f})"


def print_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on standard output, its first column to the left."""
    lines = [list(map(str, head)), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())
    print(flush=True)


def say(message: str) -> None:
    """How far it is, on standard error."""
    print(message, file=sys.stderr, flush=True)


def show_progress(message: str, done: float) -> None:
    """How far a measurement is, on standard error."""
    say(f"{done:4.0%} {message}")


def describe_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What a benchmark was run with; of files their names, wherever they lie."""
    values = {name: value for name, value in vars(options).items() if name != "output"}

    def named(value: Any) -> Any:
        if isinstance(value, list):
            return [named(each) for each in value]
        return value.name if isinstance(value, Path) else value

    return {name: named(value) for name, value in values.items()}


def save(
    options: argparse.Namespace, name: str, subject: Subject, results: Mapping[str, Any]
) -> None:
    """Write the results so far, where a file is asked for.

    Args:
        options: the settings.
        name: the benchmark's.
        subject: the last model, for the environment.
        results: everything there is.
    """
    if options.output:
        head = {
            "benchmark": name,
            "settings": describe_settings(options),
            "environment": describe_environment(subject.loaded.device),
        }
        write_json(options.output, {**head, **results})
