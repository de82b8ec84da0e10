"""The journal of a profile's calibration: where it is, and what its first line says."""

from __future__ import annotations

import logging
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conflayers_cli.cli.strategies import identity_of

if TYPE_CHECKING:
    from conflayers_cli.cli.calibrate_job import CalibrationJob
    from conflayers_cli.search.journal import Journal

logger = logging.getLogger(__name__)


def journal_path(profile: Path) -> Path:
    """Where the journal of a profile goes: beside it."""
    return profile.with_name(f"{profile.stem}.journal.jsonl")


def temporary_of(path: Path) -> str:
    """What a file is first written as, beside its place; the same in every run, so that nothing is
    left of those that were killed."""
    return f".conflayers-{sha256(path.name.encode()).hexdigest()[:12]}.tmp"


def open_journal(profile: Path, resume: bool | None) -> Journal:
    """The journal of the profile; a note says what is gone on with.

    Raises:
        InputError, ConfLayersError: as `Journal.open`.
    """
    from conflayers_cli.search.journal import Journal

    journal = Journal.open(journal_path(profile), profile, resume=resume, notify=logger.warning)
    if journal.entries:
        seconds = max(entry.usage.seconds for entry in journal.entries.values())
        logger.info(f"going on with {journal.path}: {seconds:.0f} s of work so far")
    elif resume:
        logger.warning(f"note: there is no {journal.path} to go on with: beginning")
    return journal


def header_of(job: CalibrationJob) -> dict[str, Any]:
    """All that decides what a search measures and how; a journal is gone on with where it is equal.

    Not the model's name, nor the profile's: files may have moved.
    """

    from conflayers_cli.profile.check import environment_of

    tokens = [(request.prompt, request.max_new_tokens) for request in job.requests]
    options = job.options
    return {
        "model": job.fingerprint.model_dump(mode="json", exclude={"name", "sketch"}),
        "weights": job.weights,
        "environment": environment_of(job.loaded).model_dump(mode="json"),
        "quantize": job.loading.quantize,
        "compile": job.loading.compiled,
        "prompts": sha256(repr(tokens).encode()).hexdigest()[:16],
        "strategy": identity_of(options.strategy),
        "settings": {
            **_settings(job),
            "refine_limit": options.refine,
            "tree": options.tree,
            "draft_weights": options.draft_weights.value,
            "max_new_tokens": job.max_new_tokens,
            "budget": options.budget,
            "seed": options.seed,
        },
    }


def _settings(job: CalibrationJob) -> dict[str, Any]:
    """Those of the strategy, or of each of several by its name."""
    from dataclasses import asdict

    each = [asdict(strategy) for strategy in job.strategies]  # type: ignore[call-overload]
    if len(each) == 1:
        settings: dict[str, Any] = each[0]
        return settings
    names = [
        " ".join([strategy.name, *(str(own[k]) for k in ("target_speedup",) if k in own)])
        for strategy, own in zip(job.strategies, each, strict=True)
    ]
    return dict(zip(names, each, strict=True))
