"""The profile of what was found: by a calibration, or while generating."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from conflayers_cli.generation.prompts import Prompt, fingerprint
from conflayers_cli.models.loaded_model import LoadedModel
from conflayers_cli.profile.check import current_environment, fingerprint_model
from conflayers_cli.profile.describe import skipped
from conflayers_cli.profile.schema import (
    DraftSettings,
    FoundBy,
    Measured,
    Profile,
    PromptsUsed,
    RangeSection,
    SkipSection,
)
from conflayers_cli.profile.tensors import hash_content
from conflayers_cli.search.calibrate import Calibration, Candidate
from conflayers_cli.search.job import CalibrationJob
from conflayers_cli.search.objective import PAPER, DraftParams
from conflayers_cli.search.online import AdaptiveProposer
from conflayers_cli.search.options import AUTO


def tensors_path(profile: Path) -> Path:
    """Where the tensors of a profile are kept: beside it."""
    return profile.with_name(f"{profile.stem}.safetensors")


def calibrated_profile(
    job: CalibrationJob, found: Calibration, path: Path, tensors: bytes | None
) -> Profile:
    """The profile of a calibration.

    Args:
        job, found: the calibration and its result.
        path: where the profile is to be written.
        tensors: what is to be written beside it.
    """
    options, candidate, check = job.options, found.candidate, found.check
    settings = {
        key: " ".join(map(str, value)) if isinstance(value, tuple) else value
        for key, value in asdict(candidate.method).items()  # type: ignore[call-overload]
    }
    settings |= {"refine_limit": options.max_refined, "max_new_tokens": job.max_new_tokens}
    if any(request.truncated for request in job.requests):
        settings["truncate"] = True
    if options.strategy == AUTO:
        settings["budget"] = options.budget_seconds
    expected = candidate.expected if found.plan else None
    measured = check if found.plan else None
    return Profile(
        model=job.fingerprint,
        skip=SkipSection.of(found.plan),
        draft=_draft_section(found.setting, candidate),
        ranges=tuple(
            RangeSection(
                from_context=each.from_context,
                skip=SkipSection.of(each.plan),
                draft=_draft_section(each.setting or PAPER, candidate),
            )
            for each in found.ranges
        )
        or None,
        tensors=tensors_path(path).name if tensors is not None else None,
        tensors_sha256=hash_content(tensors) if tensors is not None else None,
        found_by=FoundBy(
            strategy=candidate.strategy,
            refined=candidate.refined,
            settings=settings,
            seed=options.seed,
            prompts=PromptsUsed(count=len(job.prompts), sha256=fingerprint(job.prompts)),
        ),
        measured=Measured(
            acceptance_rate=measured.acceptance_rate if measured else None,
            tokens_per_step=measured.tokens_per_step if measured else None,
            expected_speedup=expected.speedup if expected else None,
            measured_speedup=measured.speedup if measured else None,
            iterations=len(found.result.trials),
            seconds=found.seconds,
            conclusion=found.conclusion,
        ),
        environment=current_environment(job.loaded),
    )


def _draft_section(setting: DraftParams, found: Candidate) -> DraftSettings:
    """Draft settings for a plan, or for n-grams where no plan pays.

    A plan that was searched for but not refined is drafted with as its paper does.
    """
    skips = setting.max_tokens > 0
    as_paper = skips and not (found.refined or found.by_rule)
    return DraftSettings(
        by="skip" if as_paper else "mixed" if skips else "ngram",
        lookahead=False if as_paper else None,
        max_tokens=setting.max_tokens,
        stop_probability=setting.stop_probability,
        tree=setting.tree.thresholds if setting.tree else None,
    )


def describe_adaptation(adapter: AdaptiveProposer, depth: int) -> str:
    """The result of a search while generating, in one sentence."""
    state = "settled" if adapter.settled else "still searching"
    if adapter.plan:
        gain = adapter.best.speed / adapter.vanilla.speed
        found = f"skipping {skipped(adapter.plan, depth)} decodes at {gain:.2f}× vanilla"
    else:
        found = "nothing tried decodes faster than without drafts"
    return (
        f"adapt: {found} ({state}, {adapter.tried} sets tried); the search took "
        f"{adapter.search_share:.1%} of the time"
    )


def adapted_profile(
    loaded: LoadedModel,
    adapter: AdaptiveProposer,
    prompts: Sequence[Prompt],
    *,
    method: str,
    budget: float,
    seed: int,
) -> Profile:
    """The profile of a search while generating, with the figures measured on the way.

    Args:
        loaded: the model.
        adapter: has searched.
        prompts: what was generated from.
        method, budget, seed: of the search.
    """
    best, plan, model = adapter.best, adapter.plan, fingerprint_model(loaded)
    return Profile(
        model=model,
        skip=SkipSection.of(plan),
        draft=DraftSettings(
            max_tokens=adapter.setting.max_tokens,
            stop_probability=adapter.setting.stop_probability,
        ),
        found_by=FoundBy(
            strategy=method,
            refined=method == "conflayers",
            settings={"on_the_fly": True, "adapt_budget": budget},
            seed=seed,
            prompts=PromptsUsed(count=len(prompts), sha256=fingerprint(prompts)),
        ),
        measured=Measured(
            acceptance_rate=best.accepted / best.drafted if plan and best.drafted else None,
            tokens_per_step=best.tokens / best.steps if plan and best.steps else None,
            expected_speedup=None,
            measured_speedup=best.speed / adapter.vanilla.speed if plan else None,
            iterations=adapter.tried,
            seconds=adapter.search_seconds,
            conclusion=describe_adaptation(adapter, model.depth),
        ),
        environment=current_environment(loaded),
    )
