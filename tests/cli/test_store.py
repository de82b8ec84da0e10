"""``--draft-store``, ``--draft-corpus`` and ``conflayers store``."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from conflayers_cli.profile import build_proposer
from conflayers_cli.profile.schema import Profile
from tests.cli.conftest import Run, save_profile, write_prompts
from tests.spec_decode.test_mixed import costs

PROMPT = "one two three four five six"


@pytest.fixture(autouse=True)
def drafts_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of a tiny model are too quick for drafts to pay, so costs are made up."""
    monkeypatch.setattr(build_proposer, "costs_for", lambda *_, **__: costs())


def drafters(document: dict[str, Any]) -> set[str]:
    """Who drafted an answer."""
    return set(document["stats"]["by_drafter"])


def test_a_second_run_drafts_from_the_first(run: Run, model: Path, tmp_path: Path) -> None:
    store = tmp_path / "store.safetensors"
    command = ("generate", PROMPT, "-m", model, "-n", "24", "--draft", "ngram", "--json")
    plain = run(*command).document
    first = run(*command, "--draft-store", store).document
    second = run(*command, "--draft-store", store).document
    assert plain["text"] == first["text"] == second["text"]
    assert "store" not in drafters(plain) | drafters(first)
    assert "store" in drafters(second)
    shown = run("store", "show", store, "--json").document
    assert shown["texts"] == 1
    assert shown["tokens"] > 24


def test_prompts_of_a_file_draft_from_one_another(run: Run, model: Path, tmp_path: Path) -> None:
    data = write_prompts(tmp_path / "prompts.txt", PROMPT, PROMPT)
    one, two = run("generate", "--data", data, "-m", model, "-n", "24", "--draft", "ngram").lines
    assert one["text"] == two["text"]
    assert "store" not in drafters(one)
    assert "store" in drafters(two)


def test_a_corpus_is_drafted_from(run: Run, model: Path, tmp_path: Path) -> None:
    command = ("generate", PROMPT, "-m", model, "-n", "24", "--draft", "ngram", "--raw", "--json")
    plain = run(*command).document
    corpus = tmp_path / "corpus.txt"
    known = "".join(itertools.takewhile(str.isascii, plain["text"]))
    assert len(known) > 5
    corpus.write_text(PROMPT + known)
    found = run(*command, "--draft-corpus", corpus).document
    assert found["text"] == plain["text"]
    assert "store" in drafters(found)


def test_build_show_and_prune(run: Run, model: Path, tmp_path: Path) -> None:
    store, text = tmp_path / "store", tmp_path / "a.txt"
    text.write_text("a text of bytes")
    built = run("store", "build", store, text, "--model", model)
    assert (built.code, built.out) == (0, "")
    assert "16 tokens" in built.err
    assert run("store", "show", store).out.startswith("16 tokens of 1 texts\n")
    assert run("store", "prune", store, "--tokens", "6").code == 0
    assert run("store", "show", store, "--json").document["tokens"] == 6
    run("store", "build", store, text, "--model", model)
    assert run("store", "show", store, "--json").document["texts"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--draft-store", "s", "--draft", "none"), "--draft-store is about n-grams"),
        (("--draft-corpus", "c", "--draft", "none"), "--draft-corpus is about n-grams"),
        (("--draft-store", "s", "--adapt", "conflayers"), "--draft-store does not go with"),
        (("--draft-corpus", "missing.txt"), "missing.txt: there is no such file"),
        (("--draft-store", "no/store"), "no/store: the folder"),
    ],
)
def test_mistakes(run: Run, model: Path, arguments: tuple[str, ...], message: str) -> None:
    found = run("generate", PROMPT, "-m", model, "-n", "2", *arguments)
    assert (found.code, found.out) == (2, "")
    assert message in found.err
    assert len(found.err.splitlines()) == 1


@pytest.mark.parametrize("by", ["skip", "none"])
def test_a_profile_by_which_no_n_grams_draft(
    run: Run, model: Path, tmp_path: Path, by: str
) -> None:
    profile = save_profile(tmp_path / "p.yaml", model)
    found = Profile.load(profile)
    settings = found.draft.model_copy(update={"by": by})
    found.model_copy(update={"draft": settings}).save(profile)
    command = ("generate", PROMPT, "-m", model, "-p", profile, "-n", "2")
    refused = run(*command, "--draft-store", tmp_path / "s")
    assert (refused.code, refused.out) == (2, "")
    assert "--draft-store is about n-grams, which don't draft by this profile" in refused.err
    assert "give --draft mixed" in refused.err
    assert len(refused.err.splitlines()) == 1
    assert run(*command, "--draft-store", tmp_path / "s", "--draft", "mixed").code == 0


def test_a_damaged_store_is_one_line(run: Run, model: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.write_text("no store")
    for arguments in (
        ("generate", PROMPT, "-m", model, "--draft-store", store),
        ("store", "show", store),
        ("store", "prune", store, "--tokens", "1"),
    ):
        found = run(*arguments)
        assert (found.code, found.out) == (2, "")
        assert f"{store}: is no draft store" in found.err
