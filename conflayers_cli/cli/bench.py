"""``conflayers bench``: speculative decoding measured against vanilla."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import typer

from conflayers_cli.cli import options
from conflayers_cli.cli.bench_facts import (
    bench_context,
    bench_settings,
    hash_prompts,
    lossy_settings,
    results_document,
)
from conflayers_cli.cli.bench_options import (
    Against,
    Baseline,
    BatchSize,
    Compare,
    ExportCsv,
    ExportGithub,
    ExportJson,
    ExportMarkdown,
    FailUnder,
    Judge,
    Plot,
    PlotTheme,
    Runs,
    Stored,
    TargetSpeedup,
    Tolerance,
    Warmup,
)
from conflayers_cli.cli.bench_publish import Exports, Gates, publish
from conflayers_cli.cli.common import load_profile, model_source, read_prompt_file
from conflayers_cli.cli.option_groups import with_groups
from conflayers_cli.cli.skip_only import check_target_speedup, skip_plan
from conflayers_cli.engine.open_model import open_model
from conflayers_cli.errors import InputError
from conflayers_cli.generation.prompt_encoding import PromptOptions, encode_prompts
from conflayers_cli.profile.build_proposer import (
    build_proposer,
    rows_drafter,
)
from conflayers_cli.utils.plotting import Theme
from conflayers_cli.utils.progress import progress_bar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from conflayers_cli.bench.runner import BenchResult
    from conflayers_cli.bench.systems import BatchedSystem, BenchPrompt, System
    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.generation.request import GenerationRequest
    from conflayers_cli.models.loaded_model import LoadedModel
    from conflayers_cli.sampling_params import SamplingParams
    from conflayers_cli.skip_plan import SkipPlan
    from conflayers_cli.spec_decode.proposer import Proposer

logger = logging.getLogger(__name__)

HELP = """Measure what a profile gains: vanilla and speculative decoding, side by side.

Both decode the same prompts in turns; without --data those of the package.
The exit code is 3 when a gate does not hold: the speed-up is under
--fail-under, a figure is a regression against --compare, or greedy outputs in
float32 are not the same. All results are written before that.

\b
  conflayers bench --profile deep.yaml --max-prompts 6
  conflayers bench -p deep.yaml --data prompts.jsonl --against transformers
  conflayers bench -p deep.yaml --fail-under 1.2 --export-json bench.json
  conflayers bench -p deep.yaml --compare bench.json --tolerance 5%
  conflayers bench --from bench.json --plot bench.pdf
"""


@with_groups
def bench(
    *,
    context: typer.Context,
    profile: options.ProfileFile = None,
    model: options.Model = None,
    data: options.Data = None,
    max_prompts: options.MaxPrompts = None,
    batch_size: BatchSize = 1,
    prompt_options: options.PromptFlags = PromptOptions(max_new_tokens=128),
    runs: Runs = 3,
    warmup: Warmup = 1,
    against: Against = None,
    sampling: options.SamplingFlags,
    drafting: options.DraftFlags,
    target_speedup: TargetSpeedup = None,
    json: options.Json = False,
    stored: Stored = None,
    export_json: ExportJson = None,
    export_markdown: ExportMarkdown = None,
    export_csv: ExportCsv = None,
    export_github: ExportGithub = None,
    plot: Plot = None,
    plot_theme: PlotTheme = Theme.LIGHT,
    fail_under: FailUnder = None,
    compare: Compare = None,
    tolerance: Tolerance = None,
    judge: Judge = None,
    force: options.Force = False,
    load: options.LoadFlags,
) -> None:
    exports = Exports(export_json, export_markdown, export_csv, export_github, plot, plot_theme)
    exports.check()
    gates = Gates.read(fail_under, compare, tolerance, judge)
    if stored is not None:
        _check_measures_nothing(context)
        from conflayers_cli.bench.load import load_document

        publish(load_document(stored), exports, gates, as_json=json)
        return
    if profile is None and (model is None or (target_speedup is None and drafting.method is None)):
        raise InputError(
            "give --profile FILE, or --model MODEL with --draft ngram or --target-speedup S, or "
            "--from FILE; "
            "see 'conflayers bench --help'"
        )
    check_target_speedup(target_speedup)
    _check_together(batch_size, against, target_speedup)
    chosen = load_profile(profile) if profile else None
    sampling.note_unused()
    drafting = replace(drafting, greedy=sampling.greedy, batch_size=batch_size)
    drafting.check(profile)
    prompts = read_prompt_file(data, max_prompts)
    source = model_source(model, chosen)
    loaded, decoder = open_model(source, load)
    drafter = build_proposer(loaded, decoder, chosen, profile, force, drafting)
    skipped = skip_plan(decoder, target_speedup, None) if target_speedup is not None else None
    as_papers = chosen is None and skipped is not None and drafting.method is None
    if skipped and as_papers:
        drafter = _paper_drafter(decoder, skipped)
    encoded = encode_prompts(loaded, prompts, prompt_options)
    if drafter is None:
        logger.warning("note: nothing is left out while drafting, so both arms decode vanilla")
    settings = {
        **bench_settings(chosen, profile, prompts, data, sampling, drafter),
        **(lossy_settings(skipped, drafts=as_papers) if skipped is not None else {}),
        "draft_by": drafting.method.value if drafting.method else None,
        "lookahead": drafting.adaptive_draft_length,
        "tree": drafting.tree,
        "batch_size": batch_size,
        "target_speedup": target_speedup,
        "system": prompt_options.system,
        "raw": prompt_options.raw,
        "truncate": prompt_options.truncate,
        "exact": load.exact,
        "quantize": load.quantize,
        "merge_adapter": load.merge_adapter,
        "compile": load.compiled,
        "device_map": load.device_map,
        "max_new_tokens": prompt_options.max_new_tokens,
        "runs": runs,
        "warmup": warmup,
    }
    ran_with = bench_context(loaded, settings)
    gates.check(ran_with, hash_prompts(prompts))
    bench_prompts = _bench_prompts(encoded, sampling.seed)
    if batch_size > 1:
        batched = _batched_systems(loaded, decoder, drafter, sampling, batch_size)
        result = _measure_batches(batched, bench_prompts, decoder, sampling, runs, warmup)
    else:
        systems = _systems(loaded, decoder, drafter, sampling, against or (), skipped)
        result = _measure(systems, bench_prompts, decoder, sampling, runs, warmup)
    publish(results_document(result, ran_with, prompts, decoder), exports, gates, as_json=json)


_NOT_MEASURING = frozenset(
    {
        "stored",
        "json",
        "export_json",
        "export_markdown",
        "export_csv",
        "export_github",
        "plot",
        "plot_theme",
        "fail_under",
        "compare",
        "tolerance",
        "judge",
    }
)
"""Parameters that may be given beside ``--from``."""


def _check_measures_nothing(context: typer.Context) -> None:
    """Refuse options about measuring beside --from."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        given = source is not None and source.name == "COMMANDLINE"
        if given and parameter.name not in _NOT_MEASURING:
            raise InputError(
                f"{parameter.opts[0]} is about measuring, which --from does not: leave one out"
            )


def _check_together(
    batch_size: int, against: Sequence[Baseline] | None, target_speedup: float | None
) -> None:
    """Refuse what is measured with one prompt at a time only."""
    if batch_size == 1:
        return
    for flag, wanted in (("--against", against), ("--target-speedup", target_speedup is not None)):
        if wanted:
            raise InputError(f"{flag} is for one prompt at a time: leave --batch-size out")


def _paper_drafter(decoder: Decoder, plan: SkipPlan) -> Proposer:
    """Drafts with a plan as the as_papers do, where no profile says how."""
    from conflayers_cli.search.objective import PAPER
    from conflayers_cli.spec_decode.proposer import SkipProposer

    return SkipProposer(decoder, plan, PAPER.max_tokens, PAPER.stop_probability)


def _systems(
    loaded: LoadedModel,
    decoder: Decoder,
    drafter: Proposer | None,
    sampling: SamplingParams,
    against: Sequence[Baseline],
    skipped: SkipPlan | None,
) -> list[System]:
    from conflayers_cli.bench.hf_baselines import TransformersSystem
    from conflayers_cli.bench.systems import EngineSystem, SkipOnlySystem

    ends = loaded.end_tokens
    systems: list[System] = [
        EngineSystem("vanilla", decoder, None, sampling, ends),
        EngineSystem("speculative", decoder, drafter, sampling, ends),
    ]
    if skipped is not None:
        systems.append(SkipOnlySystem(decoder, skipped, sampling, ends))
    for baseline in dict.fromkeys(against):
        systems.append(TransformersSystem.baseline(baseline.value, decoder, sampling, ends))
    return systems


def _bench_prompts(prompts: Sequence[GenerationRequest], seed: int) -> list[BenchPrompt]:
    from conflayers_cli.bench.systems import BenchPrompt

    return [
        BenchPrompt(
            prompt.id, prompt.category, tuple(prompt.prompt), prompt.max_new_tokens, seed + index
        )
        for index, prompt in enumerate(prompts)
    ]


def _measure(
    systems: Sequence[System],
    prompts: Sequence[BenchPrompt],
    decoder: Decoder,
    sampling: SamplingParams,
    runs: int,
    warmup: int,
) -> BenchResult:
    from conflayers_cli.bench.runner import measure

    with progress_bar() as on_progress:
        return measure(
            systems, prompts, decoder, sampling, runs=runs, warmup=warmup, on_progress=on_progress
        )


def _batched_systems(
    loaded: LoadedModel,
    decoder: Decoder,
    drafter: Proposer | None,
    sampling: SamplingParams,
    batch_size: int,
) -> list[BatchedSystem]:
    from conflayers_cli.bench.systems import BatchedEngineSystem

    return [
        BatchedEngineSystem(name, decoder, drafts, batch_size, sampling, loaded.end_tokens)
        for name, drafts in (("vanilla", None), ("speculative", rows_drafter(drafter)))
    ]


def _measure_batches(
    systems: Sequence[BatchedSystem],
    prompts: Sequence[BenchPrompt],
    decoder: Decoder,
    sampling: SamplingParams,
    runs: int,
    warmup: int,
) -> BenchResult:
    from conflayers_cli.bench.batched import measure_batches

    if len(prompts) < (size := systems[0].size):
        logger.warning(f"note: {len(prompts)} prompts never fill a batch of {size}")
    with progress_bar() as on_progress:
        return measure_batches(
            systems, prompts, decoder, sampling, runs=runs, warmup=warmup, on_progress=on_progress
        )
