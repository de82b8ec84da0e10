"""``conflayers profile validate``: whether files are profiles, and fit a model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conflayers_cli.cli import options
from conflayers_cli.cli.flags import in_flags
from conflayers_cli.cli.option_groups import with_groups
from conflayers_cli.cli.terminal import emit, emit_json
from conflayers_cli.engine.open_model import open_model
from conflayers_cli.errors import InputError

if TYPE_CHECKING:
    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.models.loaded_model import LoadedModel

logger = logging.getLogger(__name__)

Files = Annotated[list[Path], typer.Argument(metavar="FILE…", help="Profiles.", show_default=False)]
BAD = 2


@with_groups
def validate(
    *,
    files: Files,
    model: options.Model = None,
    load: options.BriefLoadFlags,
    json: options.Json = False,
) -> None:
    """Check profiles: keys, values, and the tensors beside them.

    Every file gets one line; all are looked at. Ends with exit code 2 if any is
    bad. With --model, each must fit that model, too.

    \b
      conflayers profile validate profiles/*.yaml
      conflayers profile validate deep.yaml --model smollm2-deep
    """
    open_once = cache(lambda: open_model(model, load)) if model is not None else None
    checked = []
    for path in files:
        says, error = _check(path, open_once)
        checked.append({"path": str(path), "ok": error is None, "says": says, "error": error})
        if error is not None:
            logger.error(f"error: {error}")
        elif not json:
            emit(f"{path}: ok ({says})\n")
    ok = all(file["ok"] for file in checked)
    if json:
        emit_json({"schema_version": 1, "ok": ok, "model": model, "files": checked})
    if not ok:
        raise typer.Exit(BAD)


def _check(
    path: Path, open_once: Callable[[], tuple[LoadedModel, Decoder]] | None
) -> tuple[str | None, str | None]:
    """(what the profile is, what is wrong with it), one of them None.

    Args:
        path: its file.
        open_once: loads the model that it must fit; its errors are raised. None: any model.
    """
    from conflayers_cli.profile.check import check_fit
    from conflayers_cli.profile.describe import in_short
    from conflayers_cli.profile.migrations import SCHEMA_VERSION
    from conflayers_cli.profile.schema import Profile
    from conflayers_cli.profile.tensors import read_tensors

    try:
        profile, version = Profile.load_versioned(path)
        tensors = read_tensors(path, profile)
    except InputError as error:
        return None, in_flags(error)
    if open_once is not None:
        loaded, decoder = open_once()
        try:
            check_fit(loaded, decoder, profile, path, force=False)
        except InputError as error:
            return None, in_flags(error)
    parts = [f"schema {version}"] if version != SCHEMA_VERSION else []
    parts += [profile.model.name, f"skips {in_short(profile.plan, profile.model.depth)}"]
    parts += [f"{len(tensors)} tensors beside it"] if profile.tensors else []
    return ", ".join(parts), None
