"""Proposers for Python callers: who drafts, by what they say and without a word on the terminal."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.errors import ConfLayersWarning, InputError
from conflayers_cli.models.loaded_model import LoadedModel
from conflayers_cli.profile.build_proposer import build_proposer
from conflayers_cli.profile.schema import Profile
from conflayers_cli.spec_decode.options import DraftOptions
from conflayers_cli.spec_decode.proposer import Proposer
from conflayers_cli.utils.notices import collected

DraftBy: TypeAlias = Literal["skip", "ngram", "mixed", "none"]
ProfileLike: TypeAlias = "str | Path | Profile"


class Opened(Protocol):
    """A model with the engine on it."""

    @property
    def loaded(self) -> LoadedModel: ...

    @property
    def decoder(self) -> Decoder: ...

    @property
    def drafters(self) -> dict[Hashable, Proposer | None]:
        """Those made before, which know what was accepted of their drafts."""

    def at_work(self) -> AbstractContextManager[object]:
        """Within: the engine may decode."""


@contextmanager
def in_python(stacklevel: int = 4) -> Iterator[None]:
    """Within: what the command line would note is warned of.

    Args:
        stacklevel: of the warnings; as it is, they are the caller's of the function with the block.
    """
    notes: list[str] = []
    try:
        with collected(notes):
            yield
    finally:
        for note in notes:
            warnings.warn(note, ConfLayersWarning, stacklevel=stacklevel)


def current_name(adaptive_draft_length: bool | None, lookahead: bool | None) -> bool | None:
    """``adaptive_draft_length``, where it may be given by its old name, ``lookahead``.

    Raises:
        InputError: both are given.
    """
    if lookahead is None:
        return adaptive_draft_length
    if adaptive_draft_length is not None:
        raise InputError("lookahead is the old name of adaptive_draft_length: give one of them")
    warnings.warn("lookahead is now adaptive_draft_length", DeprecationWarning, stacklevel=4)
    return lookahead


def drafter_of(
    model: Opened,
    profile: ProfileLike | None,
    options: DraftOptions,
    force: bool,
) -> Proposer | None:
    """Who drafts, None where nobody does; the same one for the same wishes.

    Args:
        model: to be at work.
        profile: a profile or its file.
        options: who drafts, and how far.
        force: take a profile of another model of the same depth.

    Raises:
        InputError: there is no such profile, the options contradict themselves, or the profile does
            not fit.
    """
    known = model.drafters
    if profile is None or isinstance(profile, Profile):
        path, chosen = None if profile is None else Path("the profile"), profile
        options.check(path)
    else:
        path = Path(profile)
        options.check(path)
        if (file := (_version(path), options)) in known:  # it needs not be read again
            return known[file]
        chosen = Profile.load(path)
    key = (chosen and chosen.model_dump_json(), options)
    if key not in known:
        known[key] = build_proposer(model.loaded, model.decoder, chosen, path, force, options)
    if chosen is not profile:
        known[file] = known[key]
    return known[key]


def _version(path: Path) -> tuple[Hashable, ...]:
    """What tells a file from what it was before; its name alone where there is none."""
    try:
        state = path.stat()
    except OSError:
        return (path,)
    return path.absolute(), state.st_ino, state.st_mtime_ns, state.st_size
