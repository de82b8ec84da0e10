from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conflayers_cli.bench.load import load_document
from conflayers_cli.errors import InputError
from tests.benched import bench_document, saved


def test_a_document_is_read_back_with_all_its_keys(tmp_path: Path) -> None:
    document = {**bench_document(), "a_later_key": 7}
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(document))
    bench = load_document(path)
    assert bench.as_json() == document
    assert bench.speedup.median == 2.0
    assert bench.prompts[2].tokens_per_second["speculative"] == [20.0] * 3


def test_what_is_read_is_written_again_to_the_letter(tmp_path: Path) -> None:
    document = bench_document(categories=["qa", "qa", "maths"])
    document["skip_only"] = {
        "lossless": False,
        "speedup": {"median": 1.5, "low": None, "high": None},
        "agreement": {
            "equal": 0.5,
            "rouge_2": 0.25,
            "first_divergence": 8,
            "identical": 0,
            "prompts": 3,
        },
    }
    document["arms"]["vanilla"]["later"] = {"still": [1, 2.0]}
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({**document, "comparison": {"old": "a.json"}}))
    written = json.dumps(load_document(path).as_json(), sort_keys=True)
    assert written == json.dumps(document, sort_keys=True)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "bench.json:1: is not valid JSON: expecting value"),
        ("{\n\n]", "bench.json:3: is not valid JSON"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"a": NaN}', "a number that is none"),
        ('{"a": 1e999}', "a number that is none"),
        ('{"a": ' + "9" * 9999 + "}", "too many digits"),
        ('{"a": "\\ud800"}', "half a surrogate pair"),
        ("[1]", "is no result of 'conflayers bench'"),
        ('"\\u001b[2J"', "is no result of 'conflayers bench'"),
        ('{"schema_version": 3}', "is no result of 'conflayers bench'"),
        ('{"schema_version": 2, "arms": {}}', "schema_version 2 has no figures of single prompts"),
        ('{"schema_version": true, "arms": {}}', "schema_version true"),
        ('{"schema_version": 4, "arms": {}}', "schema_version 4 is newer than what is read here"),
        ('{"schema_version": 3, "arms": {}}', "model: is missing"),
        ("\0", "NUL byte"),
    ],
)
def test_a_file_that_is_something_else_is_told_in_one_line(
    tmp_path: Path, content: str, said: str
) -> None:
    path = tmp_path / "bench.json"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        load_document(path)
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def _at(document: Any, *keys: str | int, value: Any) -> None:
    *way, last = keys
    for key in way:
        document = document[key]
    document[last] = value


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("speedup", "median"), -1.0, "speedup.median: -1.0 should be greater than"),
        (("speedup", "median"), 1e300, "speedup.median: 1e+300 should be less than"),
        (("speedup", "median"), "2", "speedup.median: '2' should be a valid number"),
        (("arms", "speculative"), [], "arms.speculative: nothing (a list without entries)"),
        (("arms",), {}, "should hold vanilla and speculative"),
        (("prompts",), [], "prompts: "),
        (("prompts", 0, "tokens_per_second", "vanilla"), [0.0], "prompts.0.tokens_per_second"),
        (("prompts", 0, "drafted"), 10**30, "prompts.0.drafted: "),
        (("arms", "speculative", "acceptance_rate"), 1.5, "less than or equal to 1"),
        (
            ("arms", "speculative", "by_position", "skip", "drafted"),
            [1],
            "should have as many entries",
        ),
        (
            ("arms", "speculative", "by_position", "skip", "drafted"),
            [0, 0],
            "should not be more than drafted",
        ),
    ],
)
def test_a_figure_that_cannot_be_is_named(
    tmp_path: Path, keys: tuple[str | int, ...], value: Any, said: str
) -> None:
    document = bench_document()
    _at(document, *keys, value=value)
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(document))
    with pytest.raises(InputError) as caught:
        load_document(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_without_end_is_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conflayers_cli.bench.load.MAX_BYTES", 100)
    with pytest.raises(InputError, match="is too large, allowed are 100 bytes"):
        load_document(saved(tmp_path / "bench.json"))
