"""What commands share: the profile and the model's name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conflayers_cli.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from conflayers_cli.profile.schema import Profile


def load_profile(path: Path | None) -> Profile | None:
    """The profile in a file, if one is named; InputError: it can't be read or is no profile."""
    from conflayers_cli.profile.schema import Profile

    return Profile.load(path) if path else None


def model_source(model: str | None, profile: Profile | None) -> str:
    """The name of the model: ``--model``, else the profile's. InputError: neither is given."""
    if model is not None:
        return model
    if profile is None:
        raise InputError(
            "no model: give --profile FILE (what calibrate wrote), "
            "or --model MODEL to decode without one"
        )
    return profile.model.name
