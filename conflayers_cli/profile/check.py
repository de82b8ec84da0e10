"""Whether a profile is this model's, and whether its figures are this device's."""

from __future__ import annotations

import logging
import re
from dataclasses import asdict
from typing import TYPE_CHECKING

from conflayers_cli.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.models.loaded_model import LoadedModel
    from conflayers_cli.profile.schema import Environment, ModelFingerprint, Profile

logger = logging.getLogger(__name__)

_INDEX = re.compile(r"^([a-z]+):\d+")


def fingerprint_of(loaded: LoadedModel) -> ModelFingerprint:
    """What a profile says about this model.

    Raises:
        InputError: the model's configuration lacks a size that a profile needs.
    """
    from pydantic import ValidationError

    from conflayers_cli.models.fingerprint import fingerprint
    from conflayers_cli.profile.schema import ModelFingerprint

    values = fingerprint(loaded.model.config)
    if loaded.sketch is not None:
        values["sketch"] = asdict(loaded.sketch)
    try:
        return ModelFingerprint.model_validate({"name": loaded.name, **values})
    except ValidationError as error:
        missing = ", ".join(".".join(map(str, item["loc"])) for item in error.errors())
        raise InputError(f"{loaded.name}: its configuration has no usable {missing}") from None


def environment_of(loaded: LoadedModel) -> Environment:
    """Where a profile's figures come from: this model, here."""
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
    here = fingerprint_of(loaded)
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
        plans = profile.plans()
        for _, plan, _ in plans:
            decoder.check_plan(plan)
    except InputError as error:
        named = str(error).startswith(str(path))
        raise InputError(str(error) if named else f"{path}: {error}", names=error.names) from None


def _note_weights(here: ModelFingerprint, profile: Profile, path: Path | None) -> None:
    """A note where the profile knows too little of its model, or is of other weights."""
    from conflayers_cli.profile.fingerprint import OTHER

    if profile.model.lacks_sizes:
        logger.warning(
            f"note: {path}: says nothing of its model but the depth, which fits: "
            f"`conflayers profile convert {path} --model {here.name} --in-place` adds the rest"
        )
    apart = here.other_weights(profile.model)
    if apart is None:
        return
    if apart < OTHER:
        logger.warning(
            f"note: {path}: was made for other weights than {here.name}'s, about {apart:.1%} away, "
            "as a fine-tune is: if few drafts are accepted, calibrate anew"
        )
    else:
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
    tuned: tuple[str, ...] = (),
) -> None:
    """A note where what is used of a profile was found on another device, or in another dtype.

    The layers themselves are the model's own matter, and so is how often drafts are accepted. What
    passes cost is measured here wherever it decides.

    Args:
        loaded: the model.
        profile, path: the profile and the file it was read from.
        fixed: drafts are as long as the profile says, whatever passes cost here.
        tuned: what else of it was chosen by what passes cost, in words.
    """
    if profile.environment is None:
        return
    here, there = device_and_dtype(environment_of(loaded)), device_and_dtype(profile.environment)
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
