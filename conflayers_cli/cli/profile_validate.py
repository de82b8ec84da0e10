"""``conflayers profile validate``: whether files are profiles, and fit a model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from conflayers_cli.cli import options
from conflayers_cli.cli.flags import in_flags
from conflayers_cli.cli.option_groups import with_groups
from conflayers_cli.cli.terminal import emit, emit_json
from conflayers_cli.errors import InputError

if TYPE_CHECKING:
    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.models.load_options import LoadOptions
    from conflayers_cli.models.loaded_model import LoadedModel
    from conflayers_cli.profile.schema import Profile

logger = logging.getLogger(__name__)

HELP = """Check profiles: keys, values, and the tensors beside them.

Every file gets one line; all are looked at. Ends with exit code 2 if any is
bad. With --model, each must fit that model, too.

\b
  conflayers profile validate profiles/*.yaml
  conflayers profile validate deep.yaml --model smollm2-deep
"""

Files = Annotated[list[Path], typer.Argument(metavar="FILE…", help="Profiles.", show_default=False)]
BAD = 2


@dataclass(frozen=True)
class _Verdict:
    """What came of one file: in words if it is good, else what is wrong with it."""

    path: Path
    good: str | None
    error: str | None = None


@with_groups
def validate(
    *,
    files: Files,
    model: options.Model = None,
    load: options.BriefLoadFlags,
    json: options.Json = False,
) -> None:
    checker = _Checker(model, load)
    verdicts = []
    for path in files:
        verdicts.append(verdict := checker.judge(path))
        if verdict.error is not None:
            logger.error(f"error: {verdict.error}")
        elif not json:
            emit(f"{path}: ok ({verdict.good})\n")
    if json:
        emit_json(_document(verdicts, model))
    if any(verdict.error is not None for verdict in verdicts):
        raise typer.Exit(BAD)


class _Checker:
    """Looks at files; the model is loaded when the first profile asks for it.

    Args:
        model: that they must fit; None: any.
        how: it is loaded.
    """

    def __init__(self, model: str | None, how: LoadOptions) -> None:
        self._model = model
        self._how = how
        self._opened: tuple[LoadedModel, Decoder] | None = None

    def judge(self, path: Path) -> _Verdict:
        """Raises InputError or ConfLayersError where the model itself can't be loaded."""
        try:
            profile, version, tensors = _read(path)
        except InputError as error:
            return _Verdict(path, None, in_flags(error))
        if self._model is not None and self._opened is None:
            from conflayers_cli.engine.open_model import open_model

            self._opened = open_model(self._model, self._how)
        try:
            self._check_fit(profile, path)
        except InputError as error:
            return _Verdict(path, None, in_flags(error))
        return _Verdict(path, _told(profile, version, tensors))

    def _check_fit(self, profile: Profile, path: Path) -> None:
        if self._opened is not None:
            from conflayers_cli.profile.check import check_fit

            check_fit(*self._opened, profile, path, force=False)


def _read(path: Path) -> tuple[Profile, int, int]:
    """(the profile, its file's schema version, how many tensors lie beside it)."""
    from conflayers_cli.profile.schema import Profile
    from conflayers_cli.profile.tensors import read_tensors

    profile, version = Profile.load_versioned(path)
    tensors = read_tensors(path, profile)
    profile.plans()  # what stands in for layers is there, and is what it should be
    return profile, version, len(tensors)


def _told(profile: Profile, version: int, tensors: int) -> str:
    from conflayers_cli.profile.describe import in_short
    from conflayers_cli.profile.migrations import SCHEMA_VERSION

    older = [f"schema {version}"] if version != SCHEMA_VERSION else []
    beside = [f"{tensors} tensors beside it"] if profile.tensors else []
    skips = f"skips {in_short(profile.plan, profile.model.depth)}"
    return ", ".join([*older, profile.model.name, skips, *beside])


def _document(verdicts: list[_Verdict], model: str | None) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "ok": all(verdict.error is None for verdict in verdicts),
        "model": model,
        "files": [
            {
                "path": str(verdict.path),
                "ok": verdict.error is None,
                "says": verdict.good,
                "error": verdict.error,
            }
            for verdict in verdicts
        ],
    }
