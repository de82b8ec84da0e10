"""What a bench ran with, for its document."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from conflayers_cli.bench.runner import BenchResult
    from conflayers_cli.bench.serialize import BenchContext
    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.models.loader import LoadedModel
    from conflayers_cli.profile.schema import Profile
    from conflayers_cli.prompts import Prompt
    from conflayers_cli.sampling_params import SamplingParams
    from conflayers_cli.skip_plan import SkipPlan
    from conflayers_cli.spec_decode.proposer import Proposer


def facts_of(
    loaded: LoadedModel, settings: Mapping[str, Any], prompts: Sequence[Prompt]
) -> BenchContext:
    """What is measured, and on what."""
    from conflayers_cli.bench.serialize import BenchContext
    from conflayers_cli.models.loader import fingerprint as model_fingerprint
    from conflayers_cli.prompts import fingerprint
    from conflayers_cli.utils.environment import describe

    return BenchContext(
        model=loaded.name,
        model_hash=str(model_fingerprint(loaded.model.config)["config_hash"]),
        device=loaded.place,
        dtype=str(loaded.dtype).removeprefix("torch."),
        environment=describe(loaded.device),
        settings=settings,
        engine={},
        prompts=[fingerprint([prompt]) for prompt in prompts],
    )


def document_of(result: BenchResult, facts: BenchContext, decoder: Decoder) -> dict[str, Any]:
    """The results as JSON takes them."""
    from conflayers_cli.bench.serialize import bench_json
    from conflayers_cli.engine.run_info import run_facts

    return bench_json(result, replace(facts, engine=run_facts(decoder)))


def settings_of(
    profile: Profile | None,
    path: Path | None,
    prompts: Sequence[Prompt],
    data: Path | None,
    sampling: SamplingParams,
    drafter: Proposer | None,
) -> dict[str, Any]:
    """What was measured, so that it can be measured again."""
    from conflayers_cli.prompts import fingerprint

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
    """What the lossy arm leaves out; and how the other drafts, where it does so with this plan."""
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
