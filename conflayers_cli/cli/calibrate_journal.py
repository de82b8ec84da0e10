"""What makes a calibration survive its end: its journal, and a signal that ends it like Ctrl-C."""

from __future__ import annotations

import logging
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conflayers_cli.cli.strategies import identity_of

if TYPE_CHECKING:
    from conflayers_cli.cli.calibrate import Work
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

    journal = Journal.open(journal_path(profile), profile, resume=resume, tell=logger.warning)
    if journal.entries:
        seconds = journal.entries[-1].meter.seconds
        logger.info(f"going on with {journal.path}: {seconds:.0f} s of work so far")
    elif resume:
        logger.warning(f"note: there is no {journal.path} to go on with: beginning")
    return journal


def header_of(work: Work) -> dict[str, Any]:
    """All that decides what a search measures and how; a journal is gone on with where it is equal.

    Not the model's name, nor the profile's: files may have moved.
    """

    from conflayers_cli.profile_check import environment_of

    tokens = [(request.prompt, request.max_new_tokens) for request in work.encoded]
    return {
        "model": work.fingerprint.model_dump(mode="json", exclude={"name", "sketch"}),
        "weights": work.weights,
        "environment": environment_of(work.loaded).model_dump(mode="json"),
        "quantize": work.quantize,
        "compile": work.compiled,
        "prompts": sha256(repr(tokens).encode()).hexdigest()[:16],
        "strategy": identity_of(work.name),
        "settings": {
            **_settings(work),
            "refine_limit": work.refine,
            "tree": work.tree,
            "draft_weights": work.draft_weights.value,
            "max_new_tokens": work.max_new_tokens,
            "budget": work.budget,
            "seed": work.seed,
        },
    }


def _settings(work: Work) -> dict[str, Any]:
    """Those of the strategy, or of each of several by its name."""
    from dataclasses import asdict

    each = [asdict(strategy) for strategy in work.strategies]  # type: ignore[call-overload]
    if len(each) == 1:
        settings: dict[str, Any] = each[0]
        return settings
    names = [
        " ".join([strategy.name, *(str(own[k]) for k in ("target_speedup",) if k in own)])
        for strategy, own in zip(work.strategies, each, strict=True)
    ]
    return dict(zip(names, each, strict=True))
