"""The benchmarks on a tiny model: that they run, and that their figures are what they say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import (
    common,
    context,
    defaults,
    gpu,
    never_slower,
    plans,
    speculative,
    step_costs,
)
from conflayers_cli.bench.runner import BenchResult, SystemResult
from conflayers_cli.bench.systems import BenchPrompt, PromptRuns, Run
from conflayers_cli.generation.stats import GenerationStats
from conflayers_cli.skip_plan import SkipPlan
from tests.cli.conftest import save_model, save_profile


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def profiles(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("profiles")
    save_profile(folder / "tiny.yaml", model)
    return folder


def go(
    name: str,
    model: Path,
    profiles: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *more: str,
) -> dict[str, Any]:
    """A benchmark's result file; two categories, next to no tokens."""
    monkeypatch.setenv("CONFLAYERS_CACHE", str(folder / "cache"))
    output = folder / "result.json"
    arguments = ["--models", str(model), "--profiles", str(profiles), "--output", str(output)]
    script = importlib.import_module(f"benchmarks.{name}")
    script.main(["--quick", "--dtype", "float32", *arguments, *more])
    document: dict[str, Any] = json.loads(output.read_text())
    assert document["environment"]["torch"]
    assert document["settings"]["profiles"] == profiles.name
    return document


@pytest.fixture
def result(
    request: pytest.FixtureRequest,
    model: Path,
    profiles: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Any]:
    return go(request.param, model, profiles, tmp_path, monkeypatch)


@pytest.mark.parametrize("result", ["speculative"], indirect=True)
def test_speculative(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = result["models"].values()
    assert list(found["categories"]) == ["summarization", "qa", "all"]
    whole = found["categories"]["all"]
    names = "vanilla mixed skip ngram fixed transformers prompt-lookup early-exit"
    assert list(whole["arms"]) == names.split()
    assert whole["best"] == "mixed"
    assert all(whole["best_over"][name]["median"] > 0 for name in whole["best_over"])
    assert whole["arms"]["fixed"]["drafted"] > 0
    assert all(same["matching"] == same["total"] == 2 for same in found["identical"].values())


@pytest.mark.parametrize("result", ["never_slower"], indirect=True)
def test_never_slower(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    cells = result["cells"]
    assert len(cells) == 2 * 2 * 2 * 2
    corners = {(c["category"], c["temperature"], c["rows"], c["profile"]) for c in cells}
    assert len(corners) == 16
    assert all(cell["ratio"]["median"] > 0 and len(cell["ratios"]) == 1 for cell in cells)
    worst = min(cell["ratio"]["median"] for cell in cells)
    assert never_slower.least(cells) == next(c for c in cells if c["ratio"]["median"] == worst)


def test_this_engine_without_drafts_over_generate(
    model: Path, profiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ("--arms", "transformers", "transformers-static")
    (found,) = go("speculative", model, profiles, tmp_path, monkeypatch, *wanted)["models"].values()
    for part in ("summarization", "qa", "all"):
        assert found["categories"][part]["best"] == "vanilla"
        assert found["categories"][part]["best_over"]["transformers-static"]["median"] > 0
    assert found["identical"]["transformers"] == {"matching": 2, "total": 2}


@pytest.mark.parametrize("result", ["batch"], indirect=True)
def test_batch(result: dict[str, Any]) -> None:
    rows = result["rows"]
    assert [row["rows"] for row in rows] == [1, 2]
    for row in rows:
        assert row["identical"] == {"matching": 3, "total": 3}
        assert row["arms"]["speculative"]["over_vanilla"]["median"] > 0


@pytest.mark.parametrize("result", ["context"], indirect=True)
def test_context(result: dict[str, Any]) -> None:
    rows = result["rows"]
    assert [row["context"] for row in rows] == [64, 128]
    for row in rows:
        assert row["vanilla_over_transformers"]["median"] > 0
        # five layers, keys and values, of two heads with eight numbers of four bytes
        assert row["kv_used_bytes"] == (row["context"] + 8) * 5 * 2 * 2 * 8 * 4
        assert row["kv_cache_bytes"] >= row["kv_used_bytes"]
        assert row["prefill_seconds"]["mixed"] > 0


@pytest.mark.parametrize("result", ["step_costs"], indirect=True)
def test_step_costs(result: dict[str, Any]) -> None:
    (found,) = result["models"].values()
    kinds = {"draft 1", "first and last layer", "modules 1"}
    assert set(found["seconds"]) == {f"verify {w}" for w in step_costs.WIDTHS} | kinds
    assert all(seconds > 0 for seconds in found["seconds"].values())
    assert found["plan"] == {"attention": [2], "mlp": [2]}


@pytest.mark.parametrize("result", ["exactness"], indirect=True)
def test_exactness(result: dict[str, Any]) -> None:
    rows = {(row["sampling"], row["arm"], row["batch"]): row for row in result["rows"]}
    single = {"reversed", "one thread", "chain", "tree", "ngram", "mixed", "int4", "adaptive"}
    own = {*((arm, 1) for arm in single), ("vanilla", 2), ("chain", 2), ("mixed", 2)}
    both = {(sampling, *each) for sampling in ("greedy", "T 1") for each in own}
    assert set(rows) == both | {("greedy", "transformers", 1)}
    for which in both:
        assert (rows[which]["matching"], rows[which]["total"]) == (2, 2)
        if which[1] not in ("ngram", "adaptive"):
            drafts = which[1] not in ("vanilla", "reversed", "one thread")
            assert (rows[which]["drafted"] > 0) == drafts


def test_gpu(model: Path, profiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONFLAYERS_CACHE", str(tmp_path / "cache"))
    output, names = tmp_path / "result.json", [part.name for part in gpu.PARTS]
    arguments = ["--quick", "--device", "cpu", "--seconds", "600", "--output", str(output)]
    real = ["--smollm2", str(model), "--profiles", str(profiles), "--dtype", "float32"]
    gpu.main([*arguments, *real, "--parts", *names])
    document = json.loads(output.read_text())
    parts = document["parts"]
    assert list(parts) == names
    assert "failed" not in json.dumps(document)
    drafted = "chain", "tree", "mixed", "chain, bad plan", "chain, batch 3", "mixed, batch 3"
    for kind in (*drafted, "vanilla, batch 3", "generate"):
        found = parts["float32"]["eager"][kind]
        assert (found["matching"], found["total"]) == (2, 2)
        assert (found.get("drafted", 0) > 0) == (kind in drafted)
    refused = parts["float32"]["eager"]["chain, bad plan"]
    assert refused["accepted"] < refused["drafted"]
    assert parts["vanilla"]["eager"]["share_of_ceiling"] > 0
    assert parts["vanilla"]["eager"]["over_generate"] > 0
    arms = parts["speculative"]["eager"]["arms"]
    rounded = ["planted plan, int4", "all layers, int4"]
    assert list(arms) == ["vanilla", "planted plan", "with n-grams", *rounded, "bad plan"]
    assert all(arms[name]["identical"] == arms[name]["texts"] > 0 for name in rounded)
    assert arms["vanilla"]["over_vanilla_in_all"] == 1
    assert parts["speculative"]["eager"]["efficiency"]["of_time"] > 0
    assert parts["idle"]["drafted"]["profile"]["work"] > 0
    assert set(parts["contexts"]) > {"48", "64"} and set(parts["batches"]) > {"1", "2"}
    assert parts["compile"]["identical"]
    (real_model,) = (found for key, found in parts["smollm2"].items() if "tiny" in key)
    assert real_model["identical"]["speculative"] == {"matching": 2, "total": 2}


def test_defaults(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of their own, so only what the tool chooses and one other thing are tried."""
    monkeypatch.setenv("CONFLAYERS_CACHE", str(tmp_path / "cache"))
    choices = [defaults.Choice(), defaults.Choice("float32", "PyTorch", 1)]
    monkeypatch.setattr(defaults, "combinations", lambda: choices)
    output = tmp_path / "result.json"
    arguments = ["--quick", "--models", str(model), "--output", str(output)]
    assert defaults.main(arguments) == 0
    chosen, other = json.loads(output.read_text())["models"][str(model)]
    assert chosen["least_ms"] > 0 and other["dtype"] == "float32"
    assert "native" not in other["kernels"]


def test_plans(
    model: Path, profiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONFLAYERS_CACHE", str(tmp_path / "cache"))
    data, output = tmp_path / "prompts.jsonl", tmp_path / "result.json"
    data.write_text(json.dumps({"prompt": "abc", "category": "one"}))
    files = [tmp_path / "before.yaml", tmp_path / "found.yaml"]
    for file in files:
        save_profile(file, model)
    arguments = ["--quick", "--model", str(model), "--data", str(data), "--output", str(output)]
    assert plans.main([*map(str, files), *arguments, "--max-new-tokens", "12"]) == 0
    document = json.loads(output.read_text())
    (row,) = document["rows"]
    assert row["speed"]["before"] == 1.0 and row["speed"]["found"] > 0
    assert document["speed"]["found"]["median"] == row["speed"]["found"]
    with pytest.raises(SystemExit, match="two profiles"):
        plans.main([str(files[0]), *arguments])


def test_quick_is_small_where_nothing_else_is_said() -> None:
    def given(*arguments: str) -> list[Any]:
        options = common.parse_options(common.make_parser("x"), arguments)
        return [options.per_category, options.max_new_tokens, options.models]

    assert given() == [2, 96, list(common.MODELS)]
    assert given("--quick") == [1, 8, ["smollm2"]]
    assert given("--max-new-tokens", "96", "--quick") == [1, 96, ["smollm2"]]


def test_prompts_are_those_of_the_large_categories(tmp_path: Path) -> None:
    sizes = {"big": 8, "half": 4, "small": 3}
    lines = [
        json.dumps({"id": f"{name}{i}", "category": name, "prompt": "x"})
        for name, size in sizes.items()
        for i in range(size)
    ]
    data = tmp_path / "prompts.jsonl"
    data.write_text("\n".join([*lines, json.dumps({"prompt": "none"})]))
    found = common.choose_prompts(data, None, 2)
    assert {name: [p.id for p in own] for name, own in found.items()} == {
        "big": ["big0", "big1"],
        "half": ["half0", "half1"],
    }
    assert list(common.choose_prompts(data, ["small"], 9)) == ["small"]
    assert [p.id for p in common.interleave(common.choose_prompts(data, ["small", "half"], 9))] == (
        ["small0", "half0", "small1", "half1", "small2", "half2", "half3"]
    )
    with pytest.raises(SystemExit, match="no prompts of category other"):
        common.choose_prompts(data, ["big", "other"], 1)


def test_the_bad_plan_is_half_of_the_layers_and_the_same_every_time() -> None:
    plan = common.bad_plan(30)
    plan.check(30)
    assert (len(plan.layers), plan.partial) == (15, ())
    assert common.bad_plan(30) == plan != common.bad_plan(30, seed=1)


def test_prompts_come_again() -> None:
    given = [BenchPrompt("a", None, (1,), 5), BenchPrompt("b", None, (2,), 5)]
    assert [prompt.id for prompt in common.repeat_prompts(given, 5)] == ["a", "b", "a", "b", "a"]


def test_ratios_are_of_neighbouring_runs_of_some_length() -> None:
    def run(tokens: int, speed: float) -> Run:
        return Run((), GenerationStats(0.1, tokens / speed, tokens + 1, tokens, tokens))

    speeds = {"vanilla": (10.0, 40.0), "speculative": (20.0, 60.0)}
    cases = tuple(
        PromptRuns(
            BenchPrompt(name, name, (1,), 9),
            {arm: tuple(run(tokens, speed) for speed in own) for arm, own in speeds.items()},
        )
        for name, tokens in (("long", common.MIN_TOKENS), ("short", common.MIN_TOKENS - 1))
    )
    arms = {name: SystemResult.of(cases, name) for name in speeds}
    result = BenchResult(cases, arms, {}, {}, 0)
    assert common.ratios(result) == pytest.approx([2.0, 1.5])
    assert common.ratios(result, category="short") == []
    figures = common.figures(result, "speculative", "long")
    assert figures["tokens_per_second"]["median"] == pytest.approx(40)
    assert figures["over_vanilla"]["median"] == pytest.approx(1.75)
    assert figures["tokens_per_step"] == 1


def test_texts_are_of_their_length_and_begin_differently() -> None:
    assert context.repeat_to_length([[1, 2, 3], [4, 5]], 7, 3) == [
        (1, 2, 3, 4, 5, 1, 2),
        (4, 5, 1, 2, 3, 4, 5),
        (1, 2, 3, 4, 5, 1, 2),
    ]


def test_further_profiles_have_arms_of_their_own(
    model: Path, profiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONFLAYERS_CACHE", str(tmp_path / "cache"))
    other = save_profile(tmp_path / "other.yaml", model, SkipPlan.of([1], weights="int4"))
    output = tmp_path / "result.json"
    arguments = ["--quick", "--dtype", "float32", "--model", str(model), "--output", str(output)]
    speculative.main(
        [
            *arguments,
            "--profile",
            str(profiles / "tiny.yaml"),
            "--arms",
            "skip",
            "--beside",
            str(other),
        ]
    )
    (found,) = json.loads(output.read_text())["models"].values()
    assert list(found["categories"]["all"]["arms"]) == [
        "vanilla",
        "skip",
        "other-skip",
        "other-mixed",
    ]
    assert all(same["matching"] == same["total"] for same in found["identical"].values())
