"""``conflayers bench``: speculative decoding measured against vanilla."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from conflayers_cli.cli import options
from conflayers_cli.cli.common import (
    EncodedPrompt,
    drafter_for,
    encode_prompts,
    load_profile,
    model_source,
    open_model,
    read_prompt_file,
    sampling_from,
)
from conflayers_cli.cli.skip_only import check_target_speedup, skip_plan
from conflayers_cli.cli.terminal import emit_json, emit_rich, note, progress_bar
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
  conflayers bench -p deep.yaml --fail-under 1.2 --output bench.json
  conflayers bench -m smollm2-deep --target-speedup 1.5
"""


class Other(Enum):
    """What else can be measured beside the engine's own two arms."""

    TRANSFORMERS = "transformers"


ProfileFile = Annotated[
    Path | None,
    typer.Option(
        "--profile",
        "-p",
        metavar="FILE",
        help="What calibrate found: the layers to leave out while drafting.",
        rich_help_panel="Model",
        show_default=False,
    ),
]
Runs = Annotated[
    int, typer.Option("--runs", min=1, metavar="N", help="How often each prompt is decoded.")
]
Warmup = Annotated[
    int,
    typer.Option("--warmup", min=0, metavar="N", help="Decodings of each arm that don't count."),
]
Against = Annotated[
    Other | None, typer.Option("--against", help="Measure model.generate of transformers, too.")
]
TargetSpeedup = Annotated[
    float | None,
    typer.Option(
        "--target-speedup",
        metavar="S",
        help="Measure, too, the model with its depth over S layers kept for good (lossy: not the "
        "model's own text). Without --profile these layers draft as well.",
        show_default=False,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write the results there as JSON."),
]
FailUnder = Annotated[
    float | None,
    typer.Option(
        "--fail-under", min=0.0, metavar="X", help="End with code 3 if the speed-up is under X."
    ),
]


def bench(
    profile: ProfileFile = None,
    model: options.Model = None,
    data: options.Data = None,
    max_prompts: options.MaxPrompts = None,
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
    tree: options.Tree = None,
    target_speedup: TargetSpeedup = None,
    system: options.System = None,
    raw: options.Raw = False,
    json: options.Json = False,
    output: Output = None,
    fail_under: FailUnder = None,
    force: options.Force = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    if profile is None and (target_speedup is None or model is None):
        raise InputError(
            "give --profile FILE, or --model MODEL with --target-speedup S; "
            "see 'conflayers bench --help'"
        )
    if profile is None and tree:
        raise InputError("--tree is about a profile's drafts: it goes with --profile FILE")
    check_target_speedup(target_speedup)
    chosen = load_profile(profile) if profile else None
    sampling = sampling_from(temperature, top_p, top_k, min_p, repetition_penalty, seed)
    prompts = read_prompt_file(data, max_prompts)
    if output:
        check_target(output)
    loaded, decoder = open_model(model_source(model, chosen), device, dtype, trust_remote_code)
    drafter = drafter_for(
        loaded, decoder, chosen, profile, force, tree=tree, greedy=sampling.greedy
    )
    skipped = skip_plan(decoder, target_speedup, None) if target_speedup is not None else None
    if chosen is None and skipped:
        drafter = _paper_drafter(decoder, skipped)
    encoded = encode_prompts(loaded, prompts, system=system, raw=raw, max_new_tokens=max_new_tokens)
    arms = _arms(loaded, decoder, drafter, sampling, against, skipped)
    result = _measure(arms, _cases(encoded, seed), decoder, sampling, runs, warmup)
    settings = {
        **_settings(chosen, profile, prompts, data, sampling),
        **(_lossy_settings(skipped, drafts=chosen is None) if skipped is not None else {}),
        "tree": tree,
        "target_speedup": target_speedup,
        "system": system,
        "raw": raw,
        "max_new_tokens": max_new_tokens,
        "runs": runs,
        "warmup": warmup,
    }
    _publish(result, loaded, settings, json, output)
    _check_gates(result, loaded, fail_under)


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
    against: Other | None,
    skipped: SkipPlan | None,
) -> list[Arm]:
    from conflayers_cli.arms import EngineArm, SkipOnlyArm, TransformersArm

    if drafter is None:
        note("note: nothing is left out while drafting, so both arms decode vanilla")
    ends = loaded.end_tokens
    arms: list[Arm] = [
        EngineArm("vanilla", decoder, None, sampling, ends),
        EngineArm("speculative", decoder, drafter, sampling, ends),
    ]
    if skipped is not None:
        arms.append(SkipOnlyArm(decoder, skipped, sampling, ends))
    if against is Other.TRANSFORMERS:
        arms.append(TransformersArm(decoder, sampling, ends))
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
    settings: dict[str, Any],
    as_json: bool,
    output: Path | None,
) -> None:
    from conflayers_cli.environment import describe
    from conflayers_cli.report import BenchContext, bench_json, bench_tables

    dtype = str(loaded.dtype).removeprefix("torch.")
    context = BenchContext(
        loaded.name, str(loaded.device), dtype, describe(loaded.device), settings
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


def _check_gates(result: BenchResult, loaded: LoadedModel, fail_under: float | None) -> None:
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
    if identical and identical.divergences and loaded.dtype == torch.float32:
        parted = ", ".join(divergence.id for divergence in identical.divergences[:5])
        broken.append(
            f"greedy outputs in float32 differ from vanilla's at {len(identical.divergences)} of "
            f"{identical.total} prompts ({parted})"
        )
    if broken:
        raise GateError("; ".join(broken))
