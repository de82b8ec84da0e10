"""``--draft-store`` and ``--draft-corpus``: drafts from earlier texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conflayers_cli.cli import completion
from conflayers_cli.cli.option_groups import OptionGroup
from conflayers_cli.errors import InputError
from conflayers_cli.spec_decode.options import DraftOptions

if TYPE_CHECKING:
    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.models.loaded_model import LoadedModel
    from conflayers_cli.profile.schema import Profile
    from conflayers_cli.spec_decode.draft_store import DraftStore
    from conflayers_cli.spec_decode.open_store import OpenStore

_drafting_option = partial(typer.Option, rich_help_panel="Drafting")


@dataclass(frozen=True)
class StoreOptions:
    """Where drafts are looked for beside the text.

    Attributes:
        draft_store: a file with earlier texts, to which those of the run are added.
        draft_corpus: text files.
    """

    draft_store: Path | None = None
    draft_corpus: list[Path] = field(default_factory=list)

    def check(self, drafting: DraftOptions, profile: Profile | None, possible: bool = True) -> None:
        """Raise InputError where nothing would draft by them, with the profile that is used."""
        from conflayers_cli.profile.build_proposer import check_store

        name = "draft_store" if self.draft_store else "draft_corpus"
        if not self.draft_store and not self.draft_corpus:
            return
        if not possible:
            raise InputError(
                f"{name} does not go with --ray, --skip-only, or --adapt conflayers or swift",
                names=(name,),
            )
        check_store(name, profile, drafting)


STORE = OptionGroup(
    draft_store=_drafting_option(
        "--draft-store",
        metavar="FILE",
        help="Draft from earlier texts, too, and keep this run's prompts and answers for the next "
        "ones: pays where texts come again, nearly as they were.",
        autocompletion=completion.files(".safetensors"),
    ),
    draft_corpus=_drafting_option(
        "--draft-corpus",
        metavar="FILE",
        help="A text from which to draft, too, such as source code that answers will quote; may be "
        "given several times.",
    ),
)
StoreFlags = Annotated[StoreOptions, STORE]


class StoreSession:
    """The store of one run of a command.

    Args:
        options: of the command line, checked.
        several: whether several texts are decoded, the later ones of which may draft from the
            earlier ones.
    """

    def __init__(self, options: StoreOptions, *, several: bool) -> None:
        self._options, self._several = options, several
        self._opened: OpenStore | None = None

    def begin(self, loaded: LoadedModel, decoder: Decoder) -> DraftStore | None:
        """The store, filled; None: nothing would ever be in it.

        Raises:
            InputError: the file or a text can't be read, or the store is for another tokenizer.
        """
        from conflayers_cli.spec_decode.open_store import OpenStore

        options = self._options
        if not (options.draft_store or options.draft_corpus or self._several):
            return None
        self._opened = OpenStore(
            loaded.tokenizer, decoder.vocabulary, options.draft_store, options.draft_corpus
        )
        return self._opened.store

    def end(self) -> None:
        """Keep what the run has added; errors as of `StoreFile.save`."""
        if self._opened is not None:
            self._opened.save()
