from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from conflayers_cli.bench.exporters import (
    CSV_COLUMNS,
    append_step_summary,
    check_folder,
    csv_text,
    github,
    markdown,
    write_github,
)
from conflayers_cli.bench.regression import compare
from conflayers_cli.bench.schema import BenchDocument
from conflayers_cli.errors import ConfLayersError, InputError
from tests.benched import bench_document, checked


def test_markdown_holds_the_tables_and_what_it_ran_with() -> None:
    text = markdown(checked([1.0, 2.0, 3.0], categories=["qa", "qa", "math"]))
    lines = text.splitlines()
    assert lines[0] == r"### tiny on cpu, bfloat16: 3 prompts, up to 101 new tokens, 3 runs"
    assert "| arm | tokens/s | min–max | first token |" in text
    assert "| vanilla | 10.0 | 10.0–10.0 | 500 ms | 303 | – | 1.00 | – | – |" in lines
    assert "| math | 1 | 10.0 | 30.0 | 75.0% | 2.50 | 3.00× |" in lines
    assert "- speculative: 3 of 3 outputs identical to vanilla's" in lines
    assert "- processor: A processor" in lines
    for table in ("arm", "category"):
        begin = next(i for i, line in enumerate(lines) if line.startswith(f"| {table} |"))
        cells = [line.count(" | ") for line in lines[begin : begin + 3]]
        assert len(set(cells)) == 1
        assert lines[begin - 1] == ""


def test_markdown_holds_the_comparison() -> None:
    new, old = checked([1.0, 1.0, 1.0]), checked()
    text = markdown(new, compare(new, old, "old.json"))
    assert "#### compared with old.json: 3 prompts, tolerance 5 %" in text
    assert ("| speed-up over vanilla | 2.00× | 1.00× | 0.500 | 0.500–0.500 | regression |") in text
    assert "(held, not judged)" in text


def test_names_cannot_break_out_of_the_markdown() -> None:
    names = ["a | b", "<script>x</script>\n# c", "[x](http://e) `d` **e**"]
    text = markdown(checked([1.0] * 3, categories=names, model="<b>*m*"))
    assert "<script" not in text and "<b>" not in text
    assert "| a \\| b | 1 |" in text
    assert r"\[x\](http://e) \`d\` \*\*e\*\*" in text
    assert "\n# c" not in text


def test_csv_has_a_line_for_every_run() -> None:
    names = ['say "a, b"', None, None]
    rows = list(csv.DictReader(io.StringIO(csv_text(checked([1.0, 2.0, 4.0], categories=names)))))
    assert tuple(rows[0]) == CSV_COLUMNS
    assert len(rows) == 3 * 2 * 3
    assert rows[0] == {
        "prompt": "p0",
        "category": 'say "a, b"',
        "arm": "vanilla",
        "run": "1",
        "tokens_per_second": "10.0",
        "prompt_tokens": "3",
        "tokens": "",
        "drafted": "",
        "accepted": "",
    }
    last = rows[-1]
    assert (last["arm"], last["run"], last["tokens_per_second"]) == ("speculative", "3", "40.0")
    assert (last["tokens"], last["drafted"], last["accepted"]) == ("101", "80", "60")


def test_csv_of_a_batch_has_its_queues() -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text(checked([2.0], together=True)))))
    assert [row["tokens_per_second"] for row in rows] == ["10.0"] * 3 + ["20.0"] * 3


def test_figures_for_github_are_sorted_by_which_way_is_better() -> None:
    bigger, smaller = github(checked([1.0, 2.0, 4.0]))
    values = {entry["name"]: (entry["value"], entry["unit"]) for entry in (*bigger, *smaller)}
    assert values == {
        "speed-up over vanilla": (2.0, "×"),
        "decoding, vanilla": (10.0, "tokens/s"),
        "decoding, speculative": (20.0, "tokens/s"),
        "accepted drafts": (75.0, "%"),
        "tokens per step": (2.5, "tokens"),
        "first token, vanilla": (500.0, "ms"),
        "first token, speculative": (500.0, "ms"),
        "peak memory over the weights, vanilla": (1.0, "MiB"),
        "peak memory over the weights, speculative": (2.0, "MiB"),
    }
    assert [entry["name"].split(",")[0] for entry in smaller] == [
        *("first token", "first token"),
        *("peak memory over the weights", "peak memory over the weights"),
    ]
    assert bigger[0]["range"] == "1–4"
    assert "3 prompts" in bigger[0]["extra"]


def test_a_figure_that_is_missing_is_left_out_for_github() -> None:
    document = bench_document()
    document["arms"]["speculative"]["acceptance_rate"] = None
    document["arms"]["vanilla"]["peak_memory_bytes"] = None
    bigger, smaller = github(BenchDocument.model_validate(document))
    names = [entry["name"] for entry in (*bigger, *smaller)]
    assert "accepted drafts" not in names
    assert "peak memory over the weights, vanilla" not in names
    assert all(isinstance(entry["value"], float) for entry in (*bigger, *smaller))


def test_the_files_for_github(tmp_path: Path) -> None:
    folder = tmp_path / "github"
    write_github(folder, checked())
    write_github(folder, checked())  # replaced
    assert sorted(path.name for path in folder.iterdir()) == [
        "customBiggerIsBetter.json",
        "customSmallerIsBetter.json",
    ]
    for path in folder.iterdir():
        for entry in json.loads(path.read_text()):
            assert (
                {"name", "unit", "value", "extra"}
                <= set(entry)
                <= {*("name", "unit", "value", "extra", "range")}
            )


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: is a file, a folder is needed"):
        check_folder(tmp_path / "file")
    with pytest.raises(InputError, match=r"where: the folder .* does not exist"):
        check_folder(tmp_path / "no" / "where")
    (tmp_path / "customBiggerIsBetter.json").mkdir()
    with pytest.raises(InputError, match=r"customBiggerIsBetter\.json: is a folder"):
        check_folder(tmp_path)


def test_a_step_summary_is_added_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    append_step_summary("nothing")
    path = tmp_path / "summary.md"
    path.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))
    append_step_summary("one\n")
    append_step_summary("two\n")
    assert path.read_text() == "before\none\n\ntwo\n\n"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))
    with pytest.raises(ConfLayersError, match=r"GITHUB_STEP_SUMMARY: .*: can't be written"):
        append_step_summary("three")
