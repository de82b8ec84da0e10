"""What a bench ran with, for its results document."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from conflayers_cli.bench.runner import BenchResult
    from conflayers_cli.bench.schema import BenchContext, BenchDocument
    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.generation.prompts import Prompt
    from conflayers_cli.models.loaded_model import LoadedModel
    from conflayers_cli.profile.schema import Profile
    from conflayers_cli.sampling_params import SamplingParams
    from conflayers_cli.skip_plan import SkipPlan
    from conflayers_cli.spec_decode.proposer import Proposer


def bench_context(loaded: LoadedModel, settings: dict[str, Any]) -> BenchContext:
    """The model, the machine and the settings of a bench that is about to run."""
    from conflayers_cli.bench.schema import SCHEMA_VERSION, BenchContext
    from conflayers_cli.models.fingerprint import fingerprint as model_fingerprint
    from conflayers_cli.utils.environment import describe

    return BenchContext(
        schema_version=SCHEMA_VERSION,
        model=loaded.name,
        model_hash=str(model_fingerprint(loaded.model.config)["config_hash"]),
        device=loaded.place,
        dtype=str(loaded.dtype).removeprefix("torch."),
        environment=describe(loaded.device),
        settings=settings,
        engine={},
    )


def hash_prompts(prompts: Sequence[Prompt]) -> list[str]:
    """SHA-256 of each prompt's content."""
    from conflayers_cli.generation.prompts import fingerprint

    return [fingerprint([prompt]) for prompt in prompts]


def results_document(
    result: BenchResult, context: BenchContext, prompts: Sequence[Prompt], decoder: Decoder
) -> BenchDocument:
    """The results document of what was measured."""
    from conflayers_cli.bench.serialize import build_document
    from conflayers_cli.engine.run_info import run_facts

    ran_with = context.model_copy(update={"engine": run_facts(decoder)})
    return build_document(result, ran_with, hash_prompts(prompts))


def bench_settings(
    profile: Profile | None,
    path: Path | None,
    prompts: Sequence[Prompt],
    data: Path | None,
    sampling: SamplingParams,
    drafter: Proposer | None,
) -> dict[str, Any]:
    """What was measured, so that it can be measured again."""
    from conflayers_cli.generation.prompts import fingerprint

    return {
        "profile": str(path) if path else None,
        "skip": profile.skip.model_dump(mode="json", exclude_defaults=True) if profile else None,
        "draft": profile.draft.model_dump(mode="json") if profile else None,
        "ranges": [r.model_dump(mode="json") for r in profile.ranges or ()] if profile else [],
        "data": str(data) if data else None,
        "prompts": {"count": len(prompts), "sha256": fingerprint(prompts)},
        "sampling": asdict(sampling),
        "repeatable_drafts": _repeatable(drafter),
    }


def lossy_settings(plan: SkipPlan, *, drafts: bool) -> dict[str, Any]:
    """What the lossy system skips; and how the other drafts, where it does so with this plan."""
    from conflayers_cli.profile.schema import SkipSection
    from conflayers_cli.search.objective import PAPER

    skip = SkipSection.of(plan).model_dump(mode="json", exclude_defaults=True)
    return {"skip_only": skip, **({"skip": skip, "draft": asdict(PAPER)} if drafts else {})}


def _repeatable(drafter: Proposer | None) -> bool:
    """Whether what is drafted is the same in every run: it depends on nothing that is measured."""
    from conflayers_cli.spec_decode.by_context import ContextLengthProposer
    from conflayers_cli.spec_decode.proposer import SkipProposer

    if isinstance(drafter, ContextLengthProposer):
        return all(_repeatable(each) for _, each in drafter.drafters)
    return drafter is None or (isinstance(drafter, SkipProposer) and drafter.tree is None)
