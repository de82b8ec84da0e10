"""Proposers for the Python API, with notes as warnings."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from conflayers_cli.api.attached_model import AttachedEngine
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.errors import ConfLayersWarning, InputError
from conflayers_cli.models.loaded_model import LoadedModel
from conflayers_cli.profile.build_proposer import check_store
from conflayers_cli.profile.schema import Profile
from conflayers_cli.search.open_proposer import open_proposer
from conflayers_cli.spec_decode.options import DraftOptions
from conflayers_cli.spec_decode.proposer import Proposer
from conflayers_cli.utils.notices import collect_notices

DraftMethodName: TypeAlias = Literal["skip", "ngram", "mixed", "none"]
ProfileLike: TypeAlias = "str | Path | Profile"


@dataclass(frozen=True)
class LoadedEngine:
    """A model that was loaded for the engine; the interface is that of `AttachedEngine`."""

    loaded: LoadedModel
    decoder: Decoder
    proposers: dict[Hashable, Proposer | None] = field(default_factory=dict)

    def active(self) -> AbstractContextManager[Decoder]:
        return nullcontext(self.decoder)


Engine: TypeAlias = AttachedEngine | LoadedEngine


@contextmanager
def notes_as_warnings(stacklevel: int = 4) -> Iterator[None]:
    """Within: notes become warnings; by default of the caller of the function with the block."""
    notes: list[str] = []
    try:
        with collect_notices(notes):
            yield
    finally:
        for note in notes:
            warnings.warn(note, ConfLayersWarning, stacklevel=stacklevel)


def resolve_lookahead(adaptive_draft_length: bool | None, lookahead: bool | None) -> bool | None:
    """``adaptive_draft_length``, or its old name's value; InputError: both are given."""
    if lookahead is None:
        return adaptive_draft_length
    if adaptive_draft_length is not None:
        raise InputError("lookahead is the old name of adaptive_draft_length: give one of them")
    warnings.warn("lookahead is now adaptive_draft_length", DeprecationWarning, stacklevel=4)
    return lookahead


def get_proposer(
    engine: Engine,
    profile: ProfileLike | None,
    options: DraftOptions,
    force: bool,
    stored: str | None = None,
) -> Proposer | None:
    """The proposer of a profile or its file, the same one at the next call; None: nobody drafts.

    The engine must be active; ``force`` takes a profile of another model of the same depth;
    ``stored``: the argument that names earlier texts to draft from.

    Raises:
        InputError: no such profile, contradictory options, a profile of another model, or no
            n-grams draft from the texts that are ``stored``.
    """
    known = engine.proposers
    if profile is None or isinstance(profile, Profile):
        path, chosen, file = Path("the profile") if profile else None, profile, None
        options.check(path)
    else:
        path = Path(profile)
        options.check(path)
        if (file := (_file_version(path), options)) in known and stored is None:
            return known[file]
        chosen = Profile.load(path)
    if stored is not None:
        check_store(stored, chosen, options)
    key = (chosen and chosen.model_dump_json(), options)
    if key not in known:
        known[key] = open_proposer(engine.loaded, engine.decoder, chosen, path, force, options)
    if file is not None:
        known[file] = known[key]
    return known[key]


def _file_version(path: Path) -> tuple[Hashable, ...]:
    """Changes when the file does; the path alone where there is none."""
    try:
        state = path.stat()
    except OSError:
        return (path,)
    return path.absolute(), state.st_ino, state.st_mtime_ns, state.st_size
