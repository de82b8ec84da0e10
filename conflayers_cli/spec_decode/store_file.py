"""A draft store in a file: safetensors with a version, a checksum and the tokenizer it is for.

A file can change speed only, but what is no store is refused and never overwritten: it may be
something else, named by mistake. Several processes may add to one: each appends what it gained to
what the file holds by then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from conflayers_cli.errors import ConfLayersError, InputError
from conflayers_cli.spec_decode.draft_store import CAPACITY, DraftStore
from conflayers_cli.spec_decode.suffix_index import BORDER
from conflayers_cli.utils.distributed import is_rank0, run_on_rank0
from conflayers_cli.utils.files import check_target, naming_file, write_atomically

FORMAT = "conflayers draft store"
VERSION = "1"
MAX_TOKENS = 2**26
"""In a file that is read: 256 MiB."""
MAX_HEADER = 2**16
LOCK_SECONDS = 30.0
"""Waited for another process that is saving: it takes less than a second."""


@dataclass(frozen=True)
class StoredTexts:
    """What a file holds.

    Attributes:
        tokenizer: fingerprint of the tokenizer whose token ids they are.
        tokens: int32 ``[T]``: texts in the order in which they came, `BORDER` behind each.
    """

    tokenizer: str
    tokens: npt.NDArray[np.int32]

    @property
    def num_texts(self) -> int:
        return int((self.tokens == BORDER).sum())

    def latest(self, count: int) -> StoredTexts:
        """The latest ``count`` tokens alone."""
        held = self.tokens[max(len(self.tokens) - count, 0) :]
        return StoredTexts(self.tokenizer, held)

    @classmethod
    def read(cls, path: Path) -> StoredTexts:
        """Read a file.

        Raises:
            InputError: it is missing, can't be read, or is no undamaged store of this version.
        """
        try:
            if path.stat().st_size > 4 * MAX_TOKENS + MAX_HEADER:
                raise InputError(f"{path}: is larger than any draft store")
            with safe_open(path, framework="np") as file:
                metadata: Mapping[str, str] = file.metadata() or {}
                tokens = file.get_tensor("tokens")
        except OSError as error:
            raise InputError(f"{path}: can't be read: {error.strerror or error}") from None
        except (SafetensorError, ValueError, KeyError, TypeError):
            raise _damaged(path, "is no draft store") from None
        if metadata.get("format") != FORMAT:
            raise _damaged(path, "is no draft store")
        if (version := metadata.get("version")) != VERSION:
            raise InputError(
                f"{path}: is a draft store of version {version!r:.20}, "
                f"this conflayers reads version {VERSION}"
            )
        try:
            tokenizer, checksum = metadata["tokenizer"], metadata["sha256"]
        except KeyError:
            raise _damaged(path, "is a damaged draft store") from None
        if tokens.dtype != np.int32 or tokens.ndim != 1 or checksum != _checksum(tokens):
            raise _damaged(path, "is a damaged draft store")
        return cls(tokenizer, tokens)

    def write(self, path: Path) -> None:
        """Replace a file; errors as of `write_atomically`."""
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer": self.tokenizer,
            "sha256": _checksum(self.tokens),
        }
        write_atomically(path, save({"tokens": np.ascontiguousarray(self.tokens)}, metadata))


class StoreFile:
    """A store kept in a file.

    Args:
        path: the file; it need not be there yet.
        tokenizer: as of `StoredTexts`.
        vocabulary, capacity: as of `DraftStore`; the file holds no more, either.

    Attributes:
        store: what the file held, and what is added.

    Raises:
        InputError: as of `StoredTexts.read`, its folder does not exist, or it is for another
            tokenizer.
    """

    def __init__(
        self, path: Path, tokenizer: str, vocabulary: int, capacity: int = CAPACITY
    ) -> None:
        check_target(path)
        self.path = path
        self._empty = StoredTexts(tokenizer, np.empty(0, np.int32))
        self.store = DraftStore(vocabulary, capacity)
        # All ranks draft from the same: another process may save while they read.
        self.store.load(run_on_rank0(lambda: self._read().tokens))

    def _read(self) -> StoredTexts:
        if not self.path.exists():
            return self._empty
        found = StoredTexts.read(self.path)
        if found.tokenizer != self._empty.tokenizer:
            raise InputError(
                f"{self.path}: is a draft store for another tokenizer; give each model its own"
            )
        return found

    def save(self) -> None:
        """Add to the file what the store has gained; no-op where that is nothing.

        Raises:
            InputError: the file has become something else meanwhile.
            ConfLayersError: it can't be written.
        """
        gained = self.store.take_gained()
        if not len(gained) or not is_rank0():
            return
        with locked(self.path):
            tokens = np.concatenate([self._read().tokens, gained])
            texts = StoredTexts(self._empty.tokenizer, tokens)
            texts.latest(self.store.capacity).write(self.path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within: no other process saves to the store in a file.

    Raises:
        ConfLayersError: another one does so for too long, or there can be no lock.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=LOCK_SECONDS)
    with naming_file(path):
        try:
            lock.acquire()
        except Timeout:  # an OSError, too
            raise ConfLayersError(f"{path}: another process is writing to it") from None
    try:
        yield
    finally:
        lock.release()


def _checksum(tokens: npt.NDArray[np.int32]) -> str:
    return hashlib.sha256(tokens.tobytes()).hexdigest()


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path}: {what}: delete it, or name another file")
