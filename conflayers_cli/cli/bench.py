"""``conflayers bench``: speculative decoding measured against vanilla."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conflayers_cli.cli import options
from conflayers_cli.cli.bench_options import (
    Against,
    BatchSize,
    FailUnder,
    Other,
    Output,
    Runs,
    TargetSpeedup,
    Warmup,
)
from conflayers_cli.cli.common import (
    EncodedPrompt,
    Loading,
    encode_prompts,
    load_profile,
    model_source,
    open_model,
    read_prompt_file,
    sampling_from,
)
from conflayers_cli.cli.drafting import (
    DraftBy,
    LookaheadOption,
    Tree,
    Way,
    drafter_for,
    rows_drafter,
)
from conflayers_cli.cli.skip_only import check_target_speedup, skip_plan
from conflayers_cli.cli.terminal import emit_json, emit_rich, note, progress_bar
from conflayers_cli.engine.parallel import is_first
from conflayers_cli.errors import GateError, InputError
from conflayers_cli.outputs import check_target, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from conflayers_cli.arms import Arm, Case
    from conflayers_cli.bench import BenchResult
    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.engine.draft import Drafter
    from conflayers_cli.engine.model import LoadedModel
    from conflayers_cli.engine.plan import SkipPlan
    from conflayers_cli.engine.sampling import Sampling
    from conflayers_cli.profile import Profile
    from conflayers_cli.prompts import Prompt

HELP = """Measure what a profile gains: vanilla and speculative decoding, side by side.

Both decode the same prompts in turns; without --data those of the package.
The exit code is 3 when a gate does not hold: the speed-up is under
--fail-under, or greedy outputs in float32 are not the same.

\b
  conflayers bench --profile deep.yaml --max-prompts 6
  conflayers bench -p deep.yaml --data prompts.jsonl --against transformers
  conflayers bench -m smollm2 --draft ngram --against prompt-lookup
  conflayers bench -p deep.yaml --fail-under 1.2 --output bench.json
"""


def bench(
    profile: options.ProfileFile = None,
    model: options.Model = None,
    data: options.Data = None,
    max_prompts: options.MaxPrompts = None,
    batch_size: BatchSize = 1,
    max_new_tokens: options.MaxNewTokens = 128,
    runs: Runs = 3,
    warmup: Warmup = 1,
    against: Against = None,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = 0,
    draft: DraftBy = None,
    lookahead: LookaheadOption = None,
    tree: Tree = None,
    target_speedup: TargetSpeedup = None,
    system: options.System = None,
    raw: options.Raw = False,
    json: options.Json = False,
    output: Output = None,
    fail_under: FailUnder = None,
    force: options.Force = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    exact: options.Exact = True,
    compile_: options.Compile = False,
    device_map: options.DeviceMap = None,
    quantize: options.Quantize = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    if profile is None and (model is None or (target_speedup is None and draft is None)):
        raise InputError(
            "give --profile FILE, or --model MODEL with --draft ngram or --target-speedup S; "
            "see 'conflayers bench --help'"
        )
    check_target_speedup(target_speedup)
    _check_together(batch_size, against, target_speedup)
    chosen = load_profile(profile) if profile else None
    sampling = sampling_from(temperature, top_p, top_k, min_p, repetition_penalty, seed)
    way = Way(draft, lookahead, tree, sampling.greedy, batch_size)
    way.check(profile)
    prompts = read_prompt_file(data, max_prompts)
    if output:
        check_target(output)
    source = model_source(model, chosen)
    how = Loading(device, dtype, trust_remote_code, exact, device_map, compile_, quantize)
    loaded, decoder = open_model(source, how)
    drafter = drafter_for(loaded, decoder, chosen, profile, force, way)
    skipped = skip_plan(decoder, target_speedup, None) if target_speedup is not None else None
    papers = chosen is None and skipped is not None and draft is None
    if skipped and papers:
        drafter = _paper_drafter(decoder, skipped)
    encoded = encode_prompts(loaded, prompts, system=system, raw=raw, max_new_tokens=max_new_tokens)
    if drafter is None:
        note("note: nothing is left out while drafting, so both arms decode vanilla")
    cases = _cases(encoded, seed)
    if batch_size > 1:
        result = _measure_batches(
            loaded, decoder, drafter, sampling, batch_size, cases, runs, warmup
        )
    else:
        arms = _arms(loaded, decoder, drafter, sampling, against or (), skipped)
        result = _measure(arms, cases, decoder, sampling, runs, warmup)
    settings = {
        **_settings(chosen, profile, prompts, data, sampling),
        **(_lossy_settings(skipped, drafts=papers) if skipped is not None else {}),
        "draft_by": draft.value if draft else None,
        "lookahead": lookahead,
        "tree": tree,
        "batch_size": batch_size,
        "target_speedup": target_speedup,
        "system": system,
        "raw": raw,
        "exact": exact,
        "quantize": quantize,
        "compile": compile_,
        "device_map": device_map,
        "max_new_tokens": max_new_tokens,
        "runs": runs,
        "warmup": warmup,
    }
    _publish(result, loaded, decoder, settings, json, output)
    if is_first():  # the others' clocks say something else
        _check_gates(result, decoder, fail_under)


def _check_together(
    batch_size: int, against: Sequence[Other] | None, target_speedup: float | None
) -> None:
    """Refuse what is measured with one prompt at a time only."""
    if batch_size == 1:
        return
    for flag, wanted in (("--against", against), ("--target-speedup", target_speedup is not None)):
        if wanted:
            raise InputError(f"{flag} is for one prompt at a time: leave --batch-size out")


def _paper_drafter(decoder: Decoder, plan: SkipPlan) -> Drafter:
    """Drafts with a plan as the papers do, where no profile says how."""
    from conflayers_cli.engine.draft import SkipDrafter
    from conflayers_cli.search.objective import PAPER

    return SkipDrafter(decoder, plan, PAPER.max_tokens, PAPER.stop_probability)


def _lossy_settings(plan: SkipPlan, *, drafts: bool) -> dict[str, Any]:
    """What the lossy arm leaves out; and how the other drafts, where it does so with this plan."""
    from conflayers_cli.profile import SkipSection
    from conflayers_cli.search.objective import PAPER

    skip = SkipSection.of(plan).model_dump(mode="json")
    return {"skip_only": skip, **({"skip": skip, "draft": asdict(PAPER)} if drafts else {})}


def _arms(
    loaded: LoadedModel,
    decoder: Decoder,
    drafter: Drafter | None,
    sampling: Sampling,
    against: Sequence[Other],
    skipped: SkipPlan | None,
) -> list[Arm]:
    from conflayers_cli.arms import EngineArm, SkipOnlyArm
    from conflayers_cli.peers import TransformersArm

    ends = loaded.end_tokens
    arms: list[Arm] = [
        EngineArm("vanilla", decoder, None, sampling, ends),
        EngineArm("speculative", decoder, drafter, sampling, ends),
    ]
    if skipped is not None:
        arms.append(SkipOnlyArm(decoder, skipped, sampling, ends))
    for other in dict.fromkeys(against):
        arms.append(TransformersArm.peer(other.value, decoder, sampling, ends))
    return arms


def _cases(prompts: Sequence[EncodedPrompt], seed: int) -> list[Case]:
    from conflayers_cli.arms import Case

    return [
        Case(prompt.id, prompt.category, prompt.tokens, prompt.max_new_tokens, seed + index)
        for index, prompt in enumerate(prompts)
    ]


def _measure(
    arms: Sequence[Arm],
    cases: Sequence[Case],
    decoder: Decoder,
    sampling: Sampling,
    runs: int,
    warmup: int,
) -> BenchResult:
    from conflayers_cli.bench import measure

    with progress_bar() as tell:
        return measure(arms, cases, decoder, sampling, runs=runs, warmup=warmup, tell=tell)


def _measure_batches(
    loaded: LoadedModel,
    decoder: Decoder,
    drafter: Drafter | None,
    sampling: Sampling,
    batch_size: int,
    cases: Sequence[Case],
    runs: int,
    warmup: int,
) -> BenchResult:
    """Vanilla and drafted decoding of several prompts at once."""
    from conflayers_cli.arms import BatchArm
    from conflayers_cli.bench_batches import measure_batches

    if len(cases) < batch_size:
        note(f"note: {len(cases)} prompts never fill a batch of {batch_size}")
    arms = [
        BatchArm(name, decoder, drafts, batch_size, sampling, loaded.end_tokens)
        for name, drafts in (("vanilla", None), ("speculative", rows_drafter(drafter)))
    ]
    with progress_bar() as tell:
        return measure_batches(arms, cases, decoder, sampling, runs=runs, warmup=warmup, tell=tell)


def _settings(
    profile: Profile | None,
    path: Path | None,
    prompts: Sequence[Prompt],
    data: Path | None,
    sampling: Sampling,
) -> dict[str, Any]:
    """What was measured, so that it can be measured again."""
    from conflayers_cli.prompts import fingerprint

    return {
        "profile": str(path) if path else None,
        "skip": profile.skip.model_dump(mode="json") if profile else None,
        "draft": profile.draft.model_dump(mode="json") if profile else None,
        "ranges": [r.model_dump(mode="json") for r in profile.ranges or ()] if profile else [],
        "data": str(data) if data else None,
        "prompts": {"count": len(prompts), "sha256": fingerprint(prompts)},
        "sampling": asdict(sampling),
    }


def _publish(
    result: BenchResult,
    loaded: LoadedModel,
    decoder: Decoder,
    settings: dict[str, Any],
    as_json: bool,
    output: Path | None,
) -> None:
    from conflayers_cli.engine.remarks import run_facts
    from conflayers_cli.environment import describe
    from conflayers_cli.report import BenchContext, bench_json, bench_tables

    dtype = str(loaded.dtype).removeprefix("torch.")
    context = BenchContext(
        loaded.name, loaded.place, dtype, describe(loaded.device), settings, run_facts(decoder)
    )
    document = bench_json(result, context)
    try:
        if output:
            write_json(output, document)
    finally:  # a file that can't be written after all must not cost the results
        if as_json:
            emit_json(document)
        else:
            emit_rich(*bench_tables(result, context))


def _check_gates(result: BenchResult, decoder: Decoder, fail_under: float | None) -> None:
    """End with the gates' exit code where one does not hold; all results are out by now."""
    import torch

    broken = []
    speedup = result.speedup().median
    if fail_under is not None and speedup is None:
        broken.append("the speed-up could not be measured: no output is longer than one token")
    elif fail_under is not None and speedup is not None and not speedup >= fail_under:
        broken.append(f"the speed-up is {speedup:.3f}, under {fail_under:g}")
    # In half precision a GPU's rounding may part outputs at a near-tie; that is reported only.
    identical = (result.identical or {}).get("speculative")
    exact = decoder.dtype == torch.float32 and not decoder.inexact
    if identical and identical.divergences and exact:
        parted = ", ".join(divergence.id for divergence in identical.divergences[:5])
        broken.append(
            f"greedy outputs in float32 differ from vanilla's at {len(identical.divergences)} of "
            f"{identical.total} prompts ({parted})"
        )
    if broken:
        raise GateError("; ".join(broken))
