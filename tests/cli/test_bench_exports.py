"""What becomes of a bench's results: files, comparisons, stored documents, and their order."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from conflayers_cli.bench import exporters
from conflayers_cli.bench import runner as measuring
from conflayers_cli.errors import ConfLayersError
from conflayers_cli.utils import plotting
from tests.benched import bench_document, saved
from tests.cli.conftest import Run, write_prompts

FAST = ("--dtype", "float32", "--device", "cpu", "-n", "8", "--runs", "2")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    return write_prompts(folder / "prompts.jsonl", "one", "two", "three")


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would measure fails."""

    def never(*arguments: Any, **more: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(measuring, "measure", never)


def test_all_that_is_measured_is_written_before_a_gate_fails(
    run: Run, profile: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    result = run(
        *("bench", "-p", profile, "--data", prompts, *FAST, "--json"),
        *("--export-json", "b.json", "--export-markdown", "b.md", "--export-csv", "b.csv"),
        *("--export-github", "github", "--plot", "b.svg", "--fail-under", "1000"),
    )
    assert result.code == 3
    assert result.err.startswith("conflayers: error: --fail-under: the speed-up is ")
    assert result.err.count("\n") == 1
    document = json.loads((tmp_path / "b.json").read_text())
    assert result.document == document
    text = (tmp_path / "b.md").read_text()
    assert "| speculative |" in text
    assert (tmp_path / "summary.md").read_text() == f"{text}\n"
    rows = list(csv.DictReader((tmp_path / "b.csv").open(newline="")))
    assert len(rows) == 3 * 2 * 2
    assert (
        float(rows[0]["tokens_per_second"])
        == (document["prompts"][0]["tokens_per_second"]["vanilla"][0])
    )
    bigger = json.loads((tmp_path / "github" / "customBiggerIsBetter.json").read_text())
    assert bigger[0]["value"] == round(document["speedup"]["median"], 4)
    assert (tmp_path / "b.svg").read_bytes().startswith(b"<?xml")
    assert [prompt["id"] for prompt in document["prompts"]] == ["p0", "p1", "p2"]
    at = document["arms"]["speculative"]["by_position"]["skip"]
    assert sum(at["drafted"]) == document["arms"]["speculative"]["drafted"]
    assert sum(at["accepted"]) == document["arms"]["speculative"]["accepted"]
    split = document["arms"]["speculative"]["decoding"]
    assert min(split["draft_seconds"], split["verify_seconds"]) > 0


def test_what_was_measured_is_compared_with_what_was_stored(
    run: Run, profile: Path, prompts: Path, tmp_path: Path
) -> None:
    arguments = ("bench", "-p", profile, "--data", prompts, *FAST)
    assert run(*arguments, "-o", "old.json").code == 0
    result = run(*arguments, "--compare", "old.json", "--tolerance", "99%", "--json")
    assert (result.code, result.err) == (0, "")
    figures = result.document["comparison"]["figures"]
    assert figures["acceptance"] == {
        **{"old": figures["acceptance"]["new"], "new": figures["acceptance"]["new"]},
        **{"ratio": 1.0, "low": None, "high": None, "judged": True, "verdict": "held"},
    }
    assert (figures["speedup"]["judged"], figures["speed"]["judged"]) == (True, False)
    assert "compared with old.json: 3 prompts" in run(*arguments, "--compare", "old.json").out


def test_a_regression_is_told_and_ends_with_3(run: Run, tmp_path: Path) -> None:
    old = saved(tmp_path / "old.json")
    new = saved(tmp_path / "new.json", [1.5, 1.5, 1.5])
    result = run("bench", "--from", new, "--compare", old, "--export-json", "out.json")
    assert result.code == 3
    assert result.err == (
        f"conflayers: error: --compare: speed-up over vanilla is 0.750 of what it was in {old} "
        "(95 % interval 0.750–0.750), under 0.95\n"
    )
    assert "regression" in result.out
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["comparison"]["figures"]["speedup"]["verdict"] == "regression"
    again = run("bench", "--from", "out.json", "--json")
    assert (again.code, again.document) == (0, json.loads(new.read_text()))
    wide = run("bench", "--from", new, "--compare", old, "--tolerance", "0.3")
    assert (wide.code, wide.err) == (0, "")


@pytest.mark.usefixtures("unmeasured")
def test_stored_results_are_shown_drawn_and_written_anew(run: Run, tmp_path: Path) -> None:
    stored = saved(tmp_path / "old.json", categories=["qa", "qa", "math"])
    result = run("bench", "--from", stored, "--plot", "a.png", "--plot-theme", "dark")
    assert (result.code, result.err) == (0, "")
    for word in ("speculative", "2.00×", "math", "time of a token", "by place in the draft"):
        assert word in result.out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert run("bench", "--from", stored, "--json").document == json.loads(stored.read_text())
    assert run("bench", "--from", stored, "--fail-under", "2.5").code == 3


def test_stored_names_cannot_steer_a_terminal(run: Run, tmp_path: Path) -> None:
    evil = "\x1b[2J\x9b[31m"
    document = bench_document(
        [1.0, 1.0, 1.0],
        categories=[evil, evil, "qa"],
        model=evil,
        device=evil,
        dtype=evil,
        settings={"runs": evil, "exact": evil},
    )
    document["prompts"][0]["id"] = evil
    parted = {"id": evil, "position": 2, "gap": 0.5, "vanilla": 1, "other": 2}
    document["identical_outputs"] = {"matching": 2, "total": 3, "divergences": [parted]}
    speculative = document["arms"]["speculative"]
    speculative["by_position"][evil] = speculative["by_position"]["skip"]
    speculative["by_drafter"][evil] = speculative["by_drafter"]["skip"]
    document["arms"][evil] = document["arms"]["vanilla"]
    document["speedup_over"] = {evil: document["speedup"]}
    (tmp_path / "evil.json").write_text(json.dumps(document))
    good = saved(tmp_path / "good.json")
    for new, old in (("evil.json", good), (good, "evil.json"), ("evil.json", "evil.json")):
        result = run("bench", "--from", new, "--compare", old, "--plot", "a.svg")
        assert result.code in (0, 3)
        assert not {"\x1b", "\x9b"} & set(result.out + result.err)


def test_outputs_that_differ_in_float32_fail_stored_results_too(run: Run, tmp_path: Path) -> None:
    document = bench_document(dtype="float32")
    parted = {"id": "p1", "position": 2, "gap": 0.5, "vanilla": 1, "other": 2}
    document["identical_outputs"] = {"matching": 2, "total": 3, "divergences": [parted]}
    (tmp_path / "old.json").write_text(json.dumps(document))
    result = run("bench", "--from", "old.json")
    assert result.code == 3
    assert "outputs in float32 differ from vanilla's at 1 of 3 prompts (p1)" in result.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--from", "OLD", "-p", "x.yaml"], "--profile is about measuring"),
        (["--from", "OLD", "--runs", "3"], "--runs is about measuring, which --from does not"),
        (["--from", "missing.json"], "missing.json: there is no such file"),
        (["--from", "BROKEN"], "broken.json:1: is not valid JSON"),
        (["-p", "PROFILE", "--compare", "BROKEN"], "broken.json:1: is not valid JSON"),
        (["-p", "PROFILE", "--compare", "OLD"], "is of another model (tiny, configuration"),
        (["-p", "PROFILE", "--tolerance", "5%"], "--tolerance is about --compare FILE"),
        (["-p", "PROFILE", "--judge", "speed"], "--judge is about --compare FILE"),
        (["-p", "PROFILE", "--compare", "OLD", "--tolerance", "5"], "give a share under 1"),
        (["-p", "PROFILE", "--compare", "OLD", "--tolerance", "5%%"], "give a share under 1"),
        (["-p", "PROFILE", "--compare", "OLD", "--tolerance", "nan"], "give a share under 1"),
        (["-p", "PROFILE", "--compare", "OLD", "--judge", "luck"], "'luck' is not one of"),
        (["-p", "PROFILE", "--export-json", "a", "--export-csv", "./a"], "two kinds of results"),
        (["-p", "PROFILE", "--export-github", "no/where"], "does not exist"),
        (["-p", "PROFILE", "--export-markdown", "no/where.md"], "does not exist"),
        (["-p", "PROFILE", "--plot", "a.gif"], "must end with .png, .svg, .pdf"),
    ],
)
@pytest.mark.usefixtures("unmeasured")
def test_bad_input_is_told_before_anything_is_measured(
    run: Run, profile: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    (tmp_path / "broken.json").write_text("{")
    names = {
        "PROFILE": str(profile),
        "BROKEN": "broken.json",
        "OLD": str(saved(tmp_path / "old.json")),
    }
    result = run("bench", *(names.get(word, word) for word in arguments))
    assert (result.code, result.out) == (2, "")
    assert said in result.err
    assert result.err.count("\n") == 1


def test_a_picture_needs_matplotlib(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(plotting, "find_spec", lambda name: None)
    result = run("bench", "--from", saved(tmp_path / "old.json"), "--plot", "a.png")
    assert (result.code, result.out) == (2, "")
    assert "--plot needs matplotlib" in result.err


def test_one_file_that_cannot_be_written_costs_nothing_else(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*arguments: Any) -> None:
        raise ConfLayersError("github: can't be made: No space left on device")

    monkeypatch.setattr(exporters, "write_github", fail)
    stored = saved(tmp_path / "old.json")
    result = run(
        *("bench", "--from", stored, "--export-github", "github", "--plot", "a.png"),
        *("--export-markdown", "a.md", "--fail-under", "9"),
    )
    assert result.code == 1
    assert result.err == (
        "conflayers: error: --fail-under: the speed-up is 2.000, under 9\n"
        "conflayers: error: github: can't be made: No space left on device\n"
    )
    assert "speculative" in result.out
    assert (tmp_path / "a.md").exists() and (tmp_path / "a.png").exists()


def test_a_step_summary_that_cannot_be_written_is_a_note(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "no" / "where"))
    result = run("bench", "--from", saved(tmp_path / "old.json"))
    assert result.code == 0
    assert result.err.startswith("conflayers: note: GITHUB_STEP_SUMMARY: ")


def test_judging_by_speed_elsewhere_is_refused_with_the_results_out(
    run: Run, tmp_path: Path
) -> None:
    old = saved(tmp_path / "old.json", device="cuda")
    new = saved(tmp_path / "new.json")
    result = run("bench", "--from", new, "--compare", old, "--judge", "speed", "-o", "out.json")
    assert result.code == 2
    assert "another machine" in result.err
    assert "speculative" in result.out
    assert (tmp_path / "out.json").exists()
