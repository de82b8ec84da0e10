"""``generate --adapt`` and ``--tree`` from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from conflayers_cli.profile.schema import Profile
from conflayers_cli.skip_plan import SkipPlan
from tests.cli.conftest import Run, save_profile, write_prompts


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "prompts.jsonl", *(f"Tell me about {i}." for i in range(6)))


@pytest.mark.parametrize("method", ["auto", "conflayers", "swift"])
def test_adapting_changes_nothing_but_the_speed(
    run: Run, model: Path, prompts: Path, tmp_path: Path, method: str
) -> None:
    arguments = ("generate", "-m", model, "--data", prompts, "-n", 60, "--dtype", "float32")
    plain = run(*arguments, "--draft", "none")
    adapted = run(
        *(*arguments, "--adapt", method, "--adapt-budget", 0.5, "--stats"),
        *("--save-profile", "learned.yaml"),
    )
    assert adapted.code == 0, adapted.err
    assert [a["token_ids"] for a in adapted.lines] == [p["token_ids"] for p in plain.lines]
    assert sum(line["stats"]["drafted"] for line in adapted.lines) > 0
    assert sum(line["stats"]["drafted"] for line in plain.lines) == 0
    assert "adapt: " in adapted.err and "of the time" in adapted.err
    if not (tmp_path / "learned.yaml").exists():  # how far it gets depends on the machine
        assert "is not written" in adapted.err
        return
    profile = Profile.load(tmp_path / "learned.yaml")
    assert profile.found_by is not None and profile.found_by.strategy == method
    assert profile.measured is not None
    assert profile.measured.iterations > 0 or method == "auto"
    assert run("generate", "Hello", "-p", "learned.yaml", "-n", 5).code == 0


@pytest.mark.parametrize("method", ["auto", "conflayers"])
def test_a_profile_is_where_the_search_starts(run: Run, profile: Path, method: str) -> None:
    result = run("generate", "Hello", "-p", profile, "-n", 40, "--adapt", method, "--json")
    assert result.code == 0, result.err
    assert result.document["stats"]["by_drafter"]["skip"]["drafted"] > 0


def test_a_profile_is_not_lost_for_what_was_not_learned(
    run: Run, model: Path, tmp_path: Path
) -> None:
    path = save_profile(tmp_path / "good.yaml", model, SkipPlan.of_layers([2]))
    before = path.read_bytes()
    arguments = ("generate", "Hello", "-p", path, "-n", 12, "--adapt", "conflayers")
    result = run(*arguments, "--save-profile", path)
    assert result.code == 0, result.err
    assert "is not written" in result.err
    assert path.read_bytes() == before


def test_what_was_learnt_is_kept_unless_it_is_not_wanted(
    run: Run, model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONFLAYERS_CACHE", str(tmp_path / "cache"))
    arguments = ("generate", "-m", model, "--data", prompts, "-n", 120, "--dtype", "float32")
    learning = (*arguments, "--adapt-budget", 1)
    without = run(*learning, "--no-remember")
    assert without.code == 0, without.err
    assert not list(tmp_path.glob("cache/learnt/*"))
    texts = [run(*learning, "--batch-size", size).lines for size in (1, 1, 3)]
    assert all(
        [line["token_ids"] for line in lines] == [line["token_ids"] for line in without.lines]
        for lines in texts
    )
    assert run("models", "--clear", "learnt").code == 0
    assert not list(tmp_path.glob("cache/learnt/*"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--adapt", "magic"), "there is auto, conflayers and swift"),
        (("--draft", "ngram", "--adapt-budget", "0.1"), "--adapt-budget goes with --adapt"),
        (("--draft", "none", "--save-profile", "x.yaml"), "--save-profile goes with --adapt"),
        (("--draft", "ngram", "--no-remember"), "--remember goes with --adapt"),
        (("--adapt", "swift", "--no-remember"), "--remember goes with --adapt auto"),
        (("--adapt", "auto", "--draft", "ngram"), "leave --draft out"),
        (("--adapt-budget", "0"), "over 0, at most 1"),
        (("--save-profile", "no/x.yaml"), "does not exist"),
        (("--adapt", "swift", "--adapt-budget", "0"), "over 0, at most 1"),
        (("--adapt", "swift", "--adapt-budget", "1.5"), "over 0, at most 1"),
        (("--adapt", "swift", "--adapt-budget", "nan"), "over 0, at most 1"),
        (("--adapt", "swift", "--tree"), "leave out --tree"),
        (("--adapt", "swift", "--save-profile", "no/x.yaml"), "does not exist"),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    run: Run, model: Path, arguments: tuple[str, ...], told: str
) -> None:
    result = run("generate", "Hello", "-m", model, *arguments)
    assert result.code == 2
    assert told in result.err
    assert result.out == ""


def test_side_candidates_change_nothing_but_the_steps(
    run: Run,
    model: Path,
    profile: Path,
    tmp_path: Path,
    prompts: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CONFLAYERS_CACHE", str(tmp_path))
    arguments = ("generate", "--data", prompts, "-n", 40, "--dtype", "float32")
    plain = run(*arguments, "-m", model).lines
    asked = run(*arguments, "-p", profile, "--tree")
    assert asked.code == 0, asked.err
    assert len(list(tmp_path.glob("latencies/*.json"))) == 1  # what wider passes cost
    assert [line["token_ids"] for line in asked.lines] == [line["token_ids"] for line in plain]


def test_a_profiles_tree_is_drafted_unless_told_otherwise(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONFLAYERS_CACHE", str(tmp_path))
    path = save_profile(tmp_path / "tree.yaml", model, SkipPlan.of_layers([2]))
    text = path.read_text()
    path.write_text(
        text.replace("stop_probability: 0.0", "stop_probability: 0.0\n  tree: [[0.5, 2], [0.0, 4]]")
    )
    assert Profile.load(path).draft.tree == ((0.5, 2), (0.0, 4))
    arguments = ("generate", "Hello", "-p", path, "-n", 30, "--dtype", "float32", "--json")
    without = run(*arguments, "--no-tree")
    assert not list(tmp_path.glob("latencies/*.json"))
    with_tree = run(*arguments)
    assert len(list(tmp_path.glob("latencies/*.json"))) == 1  # so that leaves earn their cost
    assert with_tree.document["token_ids"] == without.document["token_ids"]


def test_a_plan_by_context_length(run: Run, model: Path, tmp_path: Path) -> None:
    path = save_profile(tmp_path / "ranges.yaml", model, SkipPlan.of_layers([2]), max_tokens=3)
    with path.open("a") as file:
        file.write(
            "ranges:\n"
            "- from_context: 40\n"
            "  skip: {attention: [1], mlp: [1, 3]}\n"
            "  draft: {max_tokens: 2, stop_probability: 0.0}\n"
        )
    arguments = ("generate", "Hello", "-n", 60, "--dtype", "float32", "--json")
    drafted, plain = run(*arguments, "-p", path), run(*arguments, "-m", model)
    assert drafted.code == 0, drafted.err
    assert drafted.document["token_ids"] == plain.document["token_ids"]
    path.write_text(path.read_text().replace("mlp: [1, 3]", "mlp: [1, 4]"))
    refused = run(*arguments, "-p", path)
    assert refused.code == 2 and "ranges.0.skip" in refused.err
