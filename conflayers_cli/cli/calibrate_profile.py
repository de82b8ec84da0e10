"""From what a calibration came to, to the profile that tells it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conflayers_cli.cli.strategies import AUTO

if TYPE_CHECKING:
    from conflayers_cli.cli.calibrate_job import CalibrationJob
    from conflayers_cli.profile.schema import DraftSettings, Profile, RangeSection
    from conflayers_cli.search.calibrate import Calibration, Candidate
    from conflayers_cli.search.objective import Setting
    from conflayers_cli.search.problem import RangePlan


def tensors_path(profile: Path) -> Path:
    """Where the per-iteration tensors of a profile go: beside it."""
    return profile.with_name(f"{profile.stem}.safetensors")


def profile_of(
    job: CalibrationJob, done: Calibration, target: Path, tensors: bytes | None
) -> Profile:
    """The profile of a calibration, to be written to ``target``, with these tensors beside it."""
    from conflayers_cli.profile.schema import Profile, SkipSection
    from conflayers_cli.profile.tensors import sha256_of

    return Profile(
        model=job.fingerprint,
        skip=SkipSection.of(done.plan),
        draft=_draft_section(done.setting, done.candidate),
        ranges=tuple(_range_section(each, done) for each in done.ranges) or None,
        tensors=tensors_path(target).name if tensors is not None else None,
        tensors_sha256=sha256_of(tensors) if tensors is not None else None,
        **_provenance(job, done),
    )


def _range_section(each: RangePlan, done: Calibration) -> RangeSection:
    """A plan for longer contexts, as the profile takes it."""
    from conflayers_cli.profile.schema import RangeSection, SkipSection
    from conflayers_cli.search.objective import PAPER

    return RangeSection(
        from_context=each.from_context,
        skip=SkipSection.of(each.plan),
        draft=_draft_section(each.setting or PAPER, done.candidate),
    )


def _draft_section(setting: Setting, found: Candidate) -> DraftSettings:
    """A way of drafting, as the profile takes it.

    Where nothing pays to be left out, n-grams may still draft. A plan that was searched for but not
    refined is kept with its method's own way of drafting.
    """
    from conflayers_cli.profile.schema import DraftSettings

    skips = setting.max_tokens > 0
    own = skips and not (found.refined or found.by_rule)
    return DraftSettings(
        by="skip" if own else "mixed" if skips else "ngram",
        lookahead=False if own else None,
        max_tokens=setting.max_tokens,
        stop_probability=setting.stop_probability,
        tree=setting.tree.rungs if setting.tree else None,
    )


def _provenance(job: CalibrationJob, done: Calibration) -> dict[str, Any]:
    """How it was found, what was measured, and on what."""
    from dataclasses import asdict

    from conflayers_cli.generation.prompts import fingerprint
    from conflayers_cli.profile.check import environment_of
    from conflayers_cli.profile.schema import FoundBy, Measured, PromptsUsed

    options = job.options
    check, pays, expected = done.check, bool(done.plan), done.candidate.expected
    settings = {
        **_plain_settings(asdict(done.candidate.method)),  # type: ignore[call-overload]
        "refine_limit": options.refine,
        "max_new_tokens": job.max_new_tokens,
    }
    if any(prompt.truncated for prompt in job.requests):
        settings["truncate"] = True
    if options.strategy == AUTO:
        settings["budget"] = options.budget
    return {
        "found_by": FoundBy(
            strategy=done.candidate.strategy,
            refined=done.candidate.refined,
            settings=settings,
            seed=options.seed,
            prompts=PromptsUsed(count=len(job.prompts), sha256=fingerprint(job.prompts)),
        ),
        "measured": Measured(
            acceptance_rate=check.acceptance_rate if check and pays else None,
            tokens_per_step=check.tokens_per_step if check and pays else None,
            expected_speedup=expected.speedup if expected and pays else None,
            measured_speedup=check.speedup if check and pays else None,
            iterations=len(done.result.trials),
            seconds=done.seconds,
            conclusion=done.conclusion,
        ),
        "environment": environment_of(job.loaded),
    }


def _plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a profile takes them: single values."""
    return {
        key: " ".join(map(str, value)) if isinstance(value, tuple) else value
        for key, value in settings.items()
    }
