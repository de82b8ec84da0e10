"""``--skip-only``: decoding with layers left out for good, which is lossy."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conflayers_cli.errors import InputError

if TYPE_CHECKING:
    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.profile.schema import Profile
    from conflayers_cli.skip_plan import SkipPlan

_PANEL = "Lossy: layers left out for good"

SkipOnly = Annotated[
    bool,
    typer.Option(
        "--skip-only",
        help="Decode with the skipped model alone: faster, but the text is NOT the model's own.",
        rich_help_panel=_PANEL,
    ),
]
TargetSpeedup = Annotated[
    float | None,
    typer.Option(
        "--target-speedup",
        metavar="S",
        help="With --skip-only: keep the model's depth over S layers, evenly spaced; "
        "without it, the profile's layers are left out.",
        rich_help_panel=_PANEL,
        show_default=False,
    ),
]


def check_flags(
    skip_only: bool,
    target_speedup: float | None,
    *,
    profile: Path | None,
    drafting: dict[str, object],
) -> None:
    """Refuse flags that contradict each other.

    Args:
        skip_only, target_speedup, profile: of the command line.
        drafting: flags about drafting with their values, which skipping for good has no use for.

    Raises:
        InputError: the message names the flags.
    """
    if not skip_only:
        if target_speedup is not None:
            raise InputError("--target-speedup goes with --skip-only")
        return
    for flag, given in drafting.items():
        if given is not None:
            raise InputError(f"{flag} is about drafting, and --skip-only drafts nothing")
    if target_speedup is None and profile is None:
        raise InputError(
            "--skip-only needs --target-speedup S, or a --profile that says the layers"
        )
    if target_speedup is not None and profile is not None:
        raise InputError("--target-speedup and --profile: both say which layers; give one")
    check_target_speedup(target_speedup)


def check_target_speedup(target_speedup: float | None) -> None:
    """Refuse a target that is none, before a model is loaded for it.

    Raises:
        InputError: it is under 1 or no finite number.
    """
    if target_speedup is not None and not 1 <= target_speedup < math.inf:
        raise InputError(
            f"--target-speedup {target_speedup:g}: allowed is a finite number from 1 on"
        )


def skip_plan(decoder: Decoder, target_speedup: float | None, profile: Profile | None) -> SkipPlan:
    """What is left out: by the target speed-up, else as the profile says.

    Raises:
        InputError: a target under 1, or a profile that leaves nothing out.
    """
    from conflayers_cli.skip_plan import SkipPlan

    check_target_speedup(target_speedup)
    if target_speedup is not None:
        return SkipPlan.unified(decoder.depth, target_speedup)
    # What is left of the model keeps its weights: rounded ones are for drafts.
    plan = replace(profile.plan, weights=None) if profile is not None else None
    if not plan:
        raise InputError("--skip-only: the profile leaves nothing out; give --target-speedup S")
    return plan


def warning(plan: SkipPlan, depth: int) -> str:
    """What the user must know before reading the text."""
    from conflayers_cli.profile.describe import skipped

    if not plan:  # a target so near 1 that all layers are kept
        return f"note: the target is met by all {depth} layers, so --skip-only leaves nothing out"
    return (
        f"warning: --skip-only leaves out {skipped(plan, depth)} for good: "
        "this text is not the model's own"
    )
