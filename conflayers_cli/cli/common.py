"""What the commands share: where their model, profile and prompts come from.

Options are in :mod:`.options`, output in :mod:`.terminal`. Heavy modules are imported
inside the functions, so that ``--help`` stays quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from conflayers_cli.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from conflayers_cli.generation.prompts import Prompt
    from conflayers_cli.profile.schema import Profile


def load_profile(path: Path) -> Profile:
    """The profile in a file.

    Raises:
        InputError: the file can't be read or is no profile.
    """
    from conflayers_cli.profile.schema import Profile

    return Profile.load(path)


def model_source(model: str | None, profile: Profile | None) -> str:
    """Where the model comes from: ``--model``, else the profile.

    Raises:
        InputError: neither is given.
    """
    if model is not None:
        return model
    if profile is None:
        raise InputError(
            "no model: give profile FILE (what calibrate wrote), "
            "or model MODEL to decode without one",
            names=("profile FILE", "model MODEL"),
        )
    return profile.model.name


def read_prompt_file(path: Path | None, max_prompts: int | None) -> list[Prompt]:
    """The prompts of a file, or those that come with the package; the first ``max_prompts``.

    Raises:
        InputError: the file can't be read, or a line of it is no prompt.
    """
    from conflayers_cli.generation.prompts import builtin_prompts, read_prompts

    prompts = builtin_prompts() if path is None else read_prompts(path)
    return prompts[:max_prompts]
