"""What commands share: the profile, the model's name and the prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conflayers_cli.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from conflayers_cli.generation.prompts import Prompt
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


def read_prompt_file(path: Path | None, max_prompts: int | None) -> list[Prompt]:
    """The first ``max_prompts`` prompts of a file, or of those that come with the package.

    Raises:
        InputError: the file can't be read, or a line of it is no prompt.
    """
    from conflayers_cli.generation.prompts import builtin_prompts, read_prompts

    prompts = builtin_prompts() if path is None else read_prompts(path)
    return prompts[:max_prompts]
