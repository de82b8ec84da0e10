"""Stores in files: what is kept, by several processes, and what is refused."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from conflayers_cli.errors import ConfLayersError, InputError
from conflayers_cli.spec_decode import store_file
from conflayers_cli.spec_decode.store_file import FORMAT, VERSION, StoredTexts, StoreFile, locked
from conflayers_cli.spec_decode.suffix_index import BORDER

TEXT, OTHER = list(range(40, 60)), list(range(70, 90))


def saved(path: Path, *texts: list[int], capacity: int = 1024) -> StoreFile:
    file = StoreFile(path, "bytes", 100, capacity)
    for text in texts:
        file.store.add(text)
    file.save()
    return file


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("stores") / "store"
    saved(path, TEXT, OTHER)
    return path.read_bytes()


def test_a_later_run_finds_what_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "store"
    saved(path, TEXT)
    again = saved(path, OTHER)
    assert again.store.find([41, 42], 2) == (2, [[43, 44]])
    found = StoredTexts.read(path)
    assert found.tokens.tolist() == [*TEXT, BORDER, *OTHER, BORDER]
    assert found.num_texts == 2


def test_runs_at_the_same_time_keep_what_each_gained(tmp_path: Path) -> None:
    path = tmp_path / "store"
    one, two = (StoreFile(path, "bytes", 100) for _ in range(2))
    one.store.add(TEXT)
    two.store.add(OTHER)
    one.save()
    two.save()
    two.save()  # has gained nothing more
    assert StoredTexts.read(path).tokens.tolist() == [*TEXT, BORDER, *OTHER, BORDER]


def test_a_run_that_gains_nothing_writes_nothing(tmp_path: Path) -> None:
    saved(tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_the_file_holds_no_more_than_the_store(tmp_path: Path) -> None:
    path = tmp_path / "store"
    texts = [np.random.default_rng(seed).permutation(99).tolist() for seed in range(8)]
    for text in texts:
        saved(path, text, capacity=256)
    tokens = StoredTexts.read(path).tokens
    assert len(tokens) == 256
    assert tokens.tolist()[-100:] == [*texts[-1], BORDER]


def test_the_same_texts_again_make_the_file_no_longer(tmp_path: Path) -> None:
    path, text = tmp_path / "store", np.random.default_rng(0).permutation(99).tolist()
    for _ in range(3):
        saved(path, text)
    assert StoredTexts.read(path).tokens.tolist() == [*text, BORDER]


def test_it_waits_for_another_process_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_file, "LOCK_SECONDS", 0.05)
    path = tmp_path / "store"
    with locked(path), pytest.raises(ConfLayersError, match="another process"):
        saved(path, TEXT)
    saved(path, TEXT)
    assert StoredTexts.read(path).num_texts == 1


@settings(max_examples=150)
@given(data=st.data())
def test_damage_is_refused_or_does_not_matter(content: bytes, data: st.DataObject) -> None:
    """A changed byte, a file cut short, bytes behind it: an error of one line, or the same tokens
    (where only the header's spelling changed)."""
    kind = data.draw(st.sampled_from(["changed", "cut", "longer"]))
    at = data.draw(st.integers(0, len(content) - 1))
    damaged = bytearray(content)
    if kind == "changed":
        damaged[at] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del damaged[at:]
    else:
        damaged += bytes(1 + at)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        path.write_bytes(damaged)
        try:
            found = StoredTexts.read(path)
        except InputError as error:
            assert "\n" not in str(error)
        else:
            assert found.tokens.tolist() == [*TEXT, BORDER, *OTHER, BORDER]


def test_what_is_no_store_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "thesis.txt"
    path.write_text("years of work")
    with pytest.raises(InputError, match="is no draft store: delete it, or name another file"):
        StoreFile(path, "bytes", 100)
    late = StoreFile(tmp_path / "store", "bytes", 100)
    late.store.add(TEXT)
    (tmp_path / "store").write_text("years of work")
    with pytest.raises(InputError, match="is no draft store"):
        late.save()
    assert (tmp_path / "store").read_text() == "years of work"


@pytest.mark.parametrize(
    ("metadata", "tokens", "message"),
    [
        ({}, [1], "is no draft store"),
        ({"format": "other"}, [1], "is no draft store"),
        ({"format": FORMAT, "version": "2"}, [1], "version '2', this conflayers reads version 1"),
        ({"format": FORMAT, "version": VERSION}, [1], "is a damaged draft store"),
        (
            {"format": FORMAT, "version": VERSION, "tokenizer": "bytes", "sha256": "00"},
            [1],
            "is a damaged draft store",
        ),
    ],
)
def test_other_files_are_named(
    tmp_path: Path, metadata: dict[str, str], tokens: list[int], message: str
) -> None:
    save_file({"tokens": np.array(tokens, np.int32)}, tmp_path / "store", metadata)
    with pytest.raises(InputError, match=message):
        StoreFile(tmp_path / "store", "bytes", 100)


def test_ids_of_a_hostile_file_are_not_drafted(tmp_path: Path) -> None:
    """Its checksum is right, and it names our tokenizer."""
    hostile = np.array([1, 2**31 - 1, -7, 2, 3, BORDER], np.int32)
    StoredTexts("bytes", hostile).write(tmp_path / "store")
    store = StoreFile(tmp_path / "store", "bytes", 100).store
    assert store.tokens().tolist() == [1, BORDER, BORDER, 2, 3, BORDER]


def test_another_tokenizers_store_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "store", TEXT)
    with pytest.raises(InputError, match="for another tokenizer"):
        StoreFile(tmp_path / "store", "words", 100)


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        StoreFile(tmp_path / "no" / "store", "bytes", 100)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with path.open("wb") as file:
        file.truncate(4 * store_file.MAX_TOKENS + store_file.MAX_HEADER + 1)
    with pytest.raises(InputError, match="larger than any draft store"):
        StoredTexts.read(path)
