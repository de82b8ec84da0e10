"""Whether a profile fits a model and the device it runs on."""

from __future__ import annotations

import logging
import re
from dataclasses import asdict
from typing import TYPE_CHECKING

from conflayers_cli.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.models.loaded_model import LoadedModel
    from conflayers_cli.profile.schema import Environment, ModelFingerprint, Profile

logger = logging.getLogger(__name__)

_INDEX = re.compile(r"^([a-z]+):\d+")


def fingerprint_model(loaded: LoadedModel) -> ModelFingerprint:
    """The ``model`` section of a profile for this model.

    Raises:
        InputError: the model's configuration lacks a size that a profile needs.
    """
    from pydantic import ValidationError

    from conflayers_cli.models.config_fingerprint import config_fingerprint
    from conflayers_cli.profile.schema import ModelFingerprint

    values = config_fingerprint(loaded.model.config)
    if loaded.sketch is not None:
        values["sketch"] = asdict(loaded.sketch)
    try:
        return ModelFingerprint.model_validate({"name": loaded.name, **values})
    except ValidationError as error:
        missing = ", ".join(".".join(map(str, item["loc"])) for item in error.errors())
        raise InputError(f"{loaded.name}: its configuration has no usable {missing}") from None


def current_environment(loaded: LoadedModel) -> Environment:
    """The ``environment`` section of a profile for figures measured here."""
    import torch

    from conflayers_cli.profile.schema import Environment
    from conflayers_cli.utils.environment import device_name, versions

    device = device_name(loaded.device)
    return Environment(
        device=f"{device}, {loaded.spread}" if loaded.spread else device,
        dtype=str(loaded.dtype).removeprefix("torch."),
        threads=torch.get_num_threads() if loaded.device.type == "cpu" else None,
        **versions(),
    )


def check_fit(
    loaded: LoadedModel, decoder: Decoder, profile: Profile, path: Path | None, force: bool
) -> None:
    """Refuse a profile of another model; a note where only its weights are other ones.

    Raises:
        InputError: the profile was made for another model, or this one can't run under its plan.
    """
    here = fingerprint_model(loaded)
    difference = here.difference(profile.model)
    if difference:
        problem = f"{path}: was made for another model than {loaded.name}: {difference}"
        if profile.model.depth != decoder.depth:
            raise InputError(problem)
        if not force:
            raise InputError(f"{problem} (force goes on all the same)", names=("force goes",))
        logger.warning(f"warning: {problem}")
    else:
        _note_weights(here, profile, path)
    try:
        for _, plan, _ in profile.plans():
            decoder.check_plan(plan)
    except InputError as error:
        named = str(error).startswith(str(path))
        raise InputError(str(error) if named else f"{path}: {error}", names=error.names) from None


def _note_weights(here: ModelFingerprint, profile: Profile, path: Path | None) -> None:
    """Note where the profile lacks its model's sizes, or was made for other weights."""
    from conflayers_cli.profile.fingerprint import MIN_UNRELATED_DISTANCE

    if profile.model.lacks_sizes:
        logger.warning(
            f"note: {path}: says nothing of its model but the depth, which fits: "
            f"`conflayers profile convert {path} --model {here.name} --in-place` adds the rest"
        )
    apart = here.other_weights(profile.model)
    if apart is not None and apart < MIN_UNRELATED_DISTANCE:
        logger.warning(
            f"note: {path}: was made for other weights than {here.name}'s, about {apart:.1%} away, "
            "as a fine-tune is: if few drafts are accepted, calibrate anew"
        )
    elif apart is not None:
        logger.warning(
            f"warning: {path}: was made for a model that shares nothing with {here.name} but its "
            "sizes: calibrate anew"
        )


def note_other_device(
    loaded: LoadedModel,
    profile: Profile,
    path: Path | None,
    *,
    fixed: bool,
    tuned: Sequence[str],
) -> None:
    """A note where what is used of a profile was tuned on another device, or in another dtype.

    Layers and acceptance rates depend on the model alone; costs are measured here anyway.

    Args:
        loaded: the model.
        profile, path: the profile and the file it was read from.
        fixed: drafts are as long as the profile says, whatever passes cost here.
        tuned: what else of it was chosen by costs, in words.
    """
    if profile.environment is None:
        return
    here = device_and_dtype(current_environment(loaded))
    there = device_and_dtype(profile.environment)
    if here == there:
        return
    if fixed:
        logger.warning(
            f"note: {path}: its draft lengths were tuned for {there}, and this is {here}: "
            "adaptive_draft_length drafts as far as it pays here (in the profile: drop "
            "`lookahead: false`), `conflayers calibrate` tunes anew",
            extra={"names": ("adaptive_draft_length drafts",)},
        )
    elif tuned:
        logger.warning(
            f"note: {path}: its {' and '.join(tuned)} were chosen for {there}, and this is {here}: "
            "`conflayers calibrate` chooses anew"
        )
    elif profile.measured is not None:
        logger.warning(
            f"note: the figures of {path} are of {there}; costs are measured here ({here})"
        )


def device_and_dtype(environment: Environment) -> str:
    """The device and dtype that figures belong to; which of several like devices does not count."""
    device = _INDEX.sub(r"\1", environment.device)
    return f"{device} in {environment.dtype}"


def complete_profile(
    loaded: LoadedModel, decoder: Decoder, profile: Profile, path: Path
) -> Profile:
    """The profile with what it lacks about its model.

    Raises:
        InputError: the profile is another model's.
    """
    from conflayers_cli.profile.schema import Profile

    here, known = fingerprint_model(loaded), profile.model
    missing = [name for name, value in known if value is None]
    if not known.lacks_sizes and "intermediate_size" in missing:
        missing.remove("intermediate_size")  # beside known sizes it says that there is none
    filled = known.model_copy(update={name: getattr(here, name) for name in missing})
    completed = Profile.model_validate({**dict(profile), "model": filled})
    check_fit(loaded, decoder, completed, path, force=False)
    return completed
