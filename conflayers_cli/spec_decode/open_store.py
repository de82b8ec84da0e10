"""Earlier texts that a run drafts from: those of a file, of a corpus, and the run's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conflayers_cli.models.tokenization import plain_tokens, tokenizer_fingerprint
from conflayers_cli.spec_decode.draft_store import DraftStore
from conflayers_cli.spec_decode.store_file import StoreFile
from conflayers_cli.utils.text_files import read_text


class OpenStore:
    """A draft store in use; as a context manager it is saved at the end.

    Args:
        tokenizer: of the model, a transformers one.
        vocabulary: as of `DraftStore`.
        file: with the texts of earlier runs, to which those of this one are added; it need not be
            there yet. None: texts are kept in memory alone.
        corpus: text files that are added at once.

    Attributes:
        store: what is held.

    Raises:
        InputError: as of `StoreFile`, or a text can't be read.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocabulary: int,
        file: Path | None = None,
        corpus: Sequence[Path] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._file = None
        if file is not None:
            self._file = StoreFile(file, tokenizer_fingerprint(tokenizer), vocabulary)
        self.store: DraftStore = self._file.store if self._file else DraftStore(vocabulary)
        self.add_files(corpus)

    def add_files(self, corpus: Sequence[Path]) -> None:
        """Add text files; InputError: one can't be read."""
        for path in corpus:
            self.store.add(plain_tokens(self._tokenizer, read_text(path)))

    def save(self) -> None:
        """Add to the file, if there is one, what was gained; errors as of `StoreFile.save`."""
        if self._file is not None:
            self._file.save()

    def __enter__(self) -> OpenStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.save()
