"""The papers' settings: prompts to the letter, cells on a tiny model, results that go on."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import paper_cells, paper_search, paper_tasks, reproduce_papers
from benchmarks.gpu_timing import OutOfTimeError
from benchmarks.paper_figures import FIGURES, published
from benchmarks.paper_tasks import TASKS, PaperTask, Row, built, few_shot, paper_prompts
from benchmarks.reproduce_papers import MODELS, SETTINGS, SHOTS, main
from conflayers_cli.errors import ConfLayersError, InputError
from conflayers_cli.generation.prompts import read_prompts
from conflayers_cli.search.strategies.registry import STRATEGIES
from tests.cli.conftest import save_model, save_profile

ALPACA = "Below is an instruction that describes a task"
REQUEST = "Write a response that appropriately completes the request."
FOUND = [
    ("cnndm", {"article": "Rain fell.\nAll day.", "highlights": "Rain .\nA day ."}),
    ("gsm8k", {"question": "What is 2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}),
    ("wmt14", {"translation": {"de": "Guten Tag.", "en": "Good day."}}),
    ("alpaca", {"instruction": "Name a colour.", "input": "", "output": "Red."}),
]
ASKED = {
    "cnndm": "Article: Rain fell. All day.\nSummary:",
    "gsm8k": "Question: What is 2 + 2?\nAnswer:",
    "wmt14": "German: Guten Tag.\nEnglish:",
    "alpaca": f"{ALPACA}. {REQUEST}\n\n### Instruction:\nName a colour.\n\n### Response:",
}
ANSWERED = {
    "cnndm": " Rain . A day .",
    "gsm8k": " 2 + 2 = <<2+2=4>>4\n#### 4",
    "wmt14": " Good day.",
    "alpaca": "\nRed.",
}


@pytest.mark.parametrize(("name", "row"), FOUND, ids=[name for name, _ in FOUND])
def test_prompts_to_the_letter(name: str, row: Row) -> None:
    task = TASKS[name]
    assert few_shot(task, [], row) == ASKED[name]
    assert few_shot(task, [row, row], row) == (
        f"{ASKED[name]}{ANSWERED[name]}\n\n{ASKED[name]}{ANSWERED[name]}\n\n{ASKED[name]}"
    )


def test_an_instruction_with_an_input_has_the_other_template() -> None:
    row = {"instruction": "Sort.", "input": "b, a", "output": "a, b"}
    assert few_shot(TASKS["alpaca"], [], row) == (
        f"{ALPACA}, paired with an input that provides further context. {REQUEST}\n\n"
        "### Instruction:\nSort.\n\n### Input:\nb, a\n\n### Response:"
    )


def sums(task: PaperTask, part: str) -> Iterator[Row]:
    """Rows of which each is its own."""
    for number in range(300):
        yield {"question": f"{part} {number}?", "answer": f"It is {number}."}


def test_five_shots_from_the_part_for_training_and_no_row_twice() -> None:
    search, figures = built("gsm8k", 5, 0, sums)
    assert len(search) == len(figures) == paper_tasks.KEPT
    heads = {line["prompt"].rsplit("\n\n", 1)[0] for line in (*search, *figures)}
    assert len(heads) == 1  # the same shots before every question
    shots = re.findall(r"^Question: (train \d+)\?\nAnswer: It is (\d+)\.$", heads.pop(), re.M)
    assert len(shots) == 5
    assert all(asked == f"train {answer}" for asked, answer in shots)
    last = [line["prompt"].rsplit("\n\n", 1)[1] for line in (*search, *figures)]
    assert len(set(last)) == len(last)
    assert not {f"Question: {asked}?\nAnswer:" for asked, _ in shots} & set(last)
    assert {text.split()[1] for text in last[: len(search)]} == {"train"}
    assert {text.split()[1] for text in last[len(search) :]} == {"test"}
    assert built("gsm8k", 5, 0, sums) == (search, figures)
    assert built("gsm8k", 5, 1, sums) != (search, figures)


def test_a_data_set_of_one_part_gives_no_row_twice() -> None:
    def rows(task: PaperTask, part: str) -> Iterator[Row]:
        for number in range(250):
            yield {"instruction": f"Say {number}.", "input": "", "output": str(number)}

    search, figures = built("alpaca", 1, 0, rows)
    asked = [line["prompt"].rsplit("### Instruction:\n", 1)[1] for line in (*search, *figures)]
    assert len(asked) == 2 * paper_tasks.KEPT == len(set(asked))


def test_prompts_are_kept_and_then_need_no_hub(tmp_path: Path) -> None:
    made = paper_prompts("gsm8k", 5, 0, tmp_path / "data", sums)

    def none(task: PaperTask, part: str) -> Sequence[Row]:
        raise AssertionError("the hub is asked")

    again = paper_prompts("gsm8k", 5, 0, tmp_path / "data", none)
    assert again == made and made.raw
    assert (made.search[0].id, made.figures[0].category) == ("gsm8k-search-1", "gsm8k")
    assert list(made.search) == read_prompts(tmp_path / "data" / "gsm8k-5shot-seed0-search.jsonl")
    with pytest.raises(AssertionError, match="the hub is asked"):
        paper_prompts("gsm8k", 4, 0, tmp_path / "data", none)


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*where: Any, **how: Any) -> Iterator[Row]:
        asked.append((where, how))
        if how["split"] == "test":
            raise ConnectionError("no\nroute")
        return iter([{"question": "a"}] * (paper_tasks.POOL + 1))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    rows = paper_tasks.hub_rows(TASKS["gsm8k"], "train")
    assert len(list(rows)) == paper_tasks.POOL
    assert asked == [(("openai/gsm8k", "main"), {"split": "train", "streaming": True})]
    with pytest.raises(ConfLayersError, match="openai/gsm8k can't be had from the hub: no route"):
        paper_tasks.hub_rows(TASKS["gsm8k"], "test")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets, give a --data-folder"):
        paper_tasks.hub_rows(TASKS["gsm8k"], "train")


def test_the_settings_are_the_papers() -> None:
    assert len(SETTINGS) == len(MODELS) * len(TASKS) == 24
    assert SHOTS == {"cnndm": 1, "gsm8k": 5, "wmt14": 0, "alpaca": 0}
    assert {(each.max_new_tokens, each.temperature) for each in SETTINGS} == {(512, 0.0)}


def test_published_figures_go_with_their_cells() -> None:
    (exact, over_all) = published("conflayers", "llama-2-13b", "cnndm")
    assert (exact.tokens_per_step, exact.acceptance_rate) == (4.33, 0.972)
    assert exact.text == "4.33 tokens/step, 97.2% accepted"
    assert over_all.text == "up to 1.4×"
    assert published("conflayers", "llama-2-70b", "gsm8k")[0].acceptance_rate == 0.946
    assert all(set(figure.models) <= set(MODELS) for figure in FIGURES)
    assert [each.text for each in published("swift", "qwen2.5-14b", "gsm8k")] == ["1.3–1.6×"]
    assert published("greedy", "llama-2-13b", "cnndm") == []
    known = {*STRATEGIES, paper_search.PUBLISHED}
    assert all(set(figure.strategies) <= known and "arXiv" in figure.source for figure in FIGURES)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A stand-in of Spec-Bench: ten questions in each of two categories."""
    lines = [
        {"question_id": f"{category}-{i}", "category": category, "turns": [f"Tell me of {i}."]}
        for i in range(10)
        for category in ("summarization", "math_reasoning")
    ]
    file = tmp_path / "spec.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return file


@pytest.fixture
def arguments(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    monkeypatch.setenv("CONFLAYERS_CACHE", str(tmp_path / "cache"))
    named = ["--models", str(model), "--profiles", str(tmp_path), "--dtype", "float32"]
    local = ["--local", "--data", str(data), "--output", str(tmp_path / "result.json")]
    return ["--quick", "--search-seconds", "1", *named, *local]


def cells_of(tmp_path: Path) -> list[dict[str, Any]]:
    document = json.loads((tmp_path / "result.json").read_text())
    assert document["environment"]["torch"] and document["settings"]["local"]
    found: list[dict[str, Any]] = document["cells"]
    return found


def test_strategies_on_a_tiny_model(
    arguments: list[str],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(paper_search, "REFINE", 3)
    save_profile(tmp_path / "tiny-gsm8k.yaml", model)
    strategies = ["conflayers", "clasp", "unified", "auto", "published"]
    assert main([*arguments, "--tasks", "gsm8k", "--strategies", *strategies]) == 0
    cells = {cell["strategy"]: cell for cell in cells_of(tmp_path)}
    assert list(cells) == strategies[:-1]  # nobody published a set for a model of this name
    for cell in cells.values():
        assert (cell["shots"], cell["max_new_tokens"], cell["temperature"]) == (0, 24, 0)
        assert cell["prompts"]["search"] == ["math_reasoning-0", "math_reasoning-2"]
        assert cell["prompts"]["figures"] == ["math_reasoning-1", "math_reasoning-3"]
        assert {"vanilla", "mixed", "transformers"} <= set(cell["arms"])
        assert all(same == {"matching": 2, "total": 2} for same in cell["identical"].values())
        assert cell["arms"]["vanilla"]["over_transformers"]["median"] > 0
        assert cell["search"]["full_passes"] > 0
    own = {name: cell["plans"]["own"] for name, cell in cells.items()}
    assert (own["conflayers"]["max_tokens"], own["conflayers"]["stop_probability"]) == (25, 0.8)
    assert own["conflayers"]["tree"][0] == [0.95, 3]  # as in the paper
    assert cells["conflayers"]["arms"]["own"]["drafted"] > 0
    assert own["clasp"]["tree"] is None
    assert own["unified"]["mlp"] == own["unified"]["attention"] == [1, 3]  # three of five are kept
    assert cells["clasp"]["published"][0]["speedup"] == "1.3–1.7"
    told = capsys.readouterr().out
    assert re.search(r"gsm8k, clasp .* 1\.3–1\.7×\n", told)


def test_the_published_set_is_taken_as_it_is(
    arguments: list[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_profile(tmp_path / "tiny-wmt14-de-en.yaml", model)
    monkeypatch.setattr(reproduce_papers, "MODELS", {"tiny": str(model)})
    monkeypatch.setattr(reproduce_papers, "SHOTS", {**SHOTS, "wmt14": 2})
    kept = tmp_path / "papers"

    def german(task: PaperTask, part: str) -> Iterator[Row]:
        for number in range(210):
            yield {"translation": {"de": f"{part} {number}", "en": f"{number}"}}

    paper_prompts("wmt14", 2, 0, kept, german)
    given = [*arguments[: arguments.index("--local")], "--output", str(tmp_path / "result.json")]
    given[given.index(str(model))] = "tiny"
    more = ["--data-folder", str(kept), "--tasks", "wmt14", "--strategies", "published"]
    assert main([*given, *more, "--arms", "own"]) == 0
    (cell,) = json.loads((tmp_path / "result.json").read_text())["cells"]
    assert cell["plans"]["own"]["mlp"] == [2] == cell["plans"]["own"]["attention"]
    assert cell["plans"]["own"]["max_tokens"] == 25 and cell["plans"]["own"]["tree"]
    assert (cell["shots"], cell["search"]["seconds"]) == (2, 0)
    assert set(cell["arms"]) == {"vanilla", "own"}
    assert cell["arms"]["own"]["drafted"] > 0
    assert cell["identical"] == {"own": {"matching": 2, "total": 2}}


def test_results_are_gone_on_with(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done: list[tuple[str, str]] = []
    fate: dict[tuple[str, str], BaseException] = {
        ("cnndm", "clasp"): RuntimeError("it broke"),
        ("gsm8k", "clasp"): OutOfTimeError(),
    }

    def run(strategy: str, work: Any, *rest: Any) -> dict[str, Any]:
        if (work.task, strategy) in fate:
            raise fate[work.task, strategy]
        done.append((work.task, strategy))
        found = {"drafted": 4, "accepted": 3, "tokens_per_step": 2.5}
        over = {"over_vanilla": {"median": 1.5, "min": 1.5, "max": 1.5}}
        cell = {"model": work.name, "task": work.task, "strategy": strategy}
        return {**cell, "search": {"seconds": 7}, "arms": {"own": {**found, **over}}}

    monkeypatch.setattr(paper_cells, "run", run)
    given = [*arguments, "--tasks", "cnndm", "gsm8k", "--strategies", "clasp", "greedy"]
    assert main(given) == 1
    assert done == [("cnndm", "greedy")]
    assert [("failed" in cell) for cell in cells_of(tmp_path)] == [True, False]
    assert "RuntimeError: it broke" in cells_of(tmp_path)[0]["failed"]
    out, err = capsys.readouterr()
    assert "the time is used up (--budget)" in err and "RuntimeError: it broke" in err
    assert re.search(r"cnndm, clasp +failed +– +– +– +– +– +1\.3–1\.7×\n", out)
    assert re.search(r"cnndm, greedy +own +1\.50× \(1\.50–1\.50\) +– +75\.0% +2\.50 +7 s +–\n", out)

    assert main(given) == 2
    assert "is there already; --resume goes on with it" in capsys.readouterr().err
    assert main([*given, "--resume", "--prompts", "3"]) == 2
    assert "was measured with another prompts" in capsys.readouterr().err

    fate.clear()
    assert main([*given, "--resume"]) == 0
    assert done[1:] == [("cnndm", "clasp"), ("gsm8k", "clasp"), ("gsm8k", "greedy")]
    assert len(cells_of(tmp_path)) == 4

    for content in ("{}", "[]", "no", '{"cells": [], "settings": 1, "environment": 1}'):
        (tmp_path / "result.json").write_text(content)
        assert main([*given, "--resume"]) == 2
        assert "is no result of this benchmark" in capsys.readouterr().err


def test_an_interruption_ends_it_and_keeps_what_is_done(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*given: Any) -> Any:
        return SimpleNamespace(interrupted=True), None

    monkeypatch.setattr(paper_search, "_searched", interrupted)
    assert main([*arguments, "--tasks", "cnndm"]) == 130
    assert "interrupted; --resume goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--local"], "--local needs prompts with categories: --data FILE"),
        (["--data", "x.jsonl"], "--data is for --local"),
        (["--resume"], "--resume goes on with results: say which by --output FILE"),
        (["--prompts", "0"], "--prompts 0: 1 or more"),
    ],
)
def test_contradictions_are_refused(
    given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(given) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {said}") and err.count("\n") == 1


def test_without_datasets_nothing_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(reproduce_papers, "open_model", None)
    assert main(["--data-folder", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "pip install datasets" in err and err.count("\n") == 1


def test_a_model_that_is_not_there_does_not_keep_the_others_from_running(
    arguments: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*arguments, "--tasks", "cnndm", "--strategies", "unified", "--device-map", "auto"]
    given[given.index(str(model)) : given.index(str(model)) + 1] = ["./none", str(model)]
    assert main(given) == 1
    lost, good = cells_of(tmp_path)
    assert (lost["model"], lost["strategy"]) == ("./none", "all") and "./none" in lost["failed"]
    assert good["model"] == str(model) and good["arms"]["own"]["drafted"] > 0
