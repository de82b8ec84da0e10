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
    gpu,
    never_slower,
    speculative,
    step_costs,
    vocabulary,
)
from conflayers_cli.bench.runner import ArmResult, BenchResult, CaseRuns
from conflayers_cli.bench.systems import Case, Run
from conflayers_cli.engine.cost_model import Costs
from conflayers_cli.generation.generate import Summary
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
    name: str, model: Path, profiles: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """A benchmark's result file; two categories, next to no tokens."""
    monkeypatch.setenv("CONFLAYERS_CACHE", str(folder / "cache"))
    output = folder / "result.json"
    arguments = ["--models", str(model), "--profiles", str(profiles), "--output", str(output)]
    script = importlib.import_module(f"benchmarks.{name}")
    script.main(["--quick", "--dtype", "float32", *arguments])
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


@pytest.mark.parametrize("result", ["vanilla"], indirect=True)
def test_vanilla(result: dict[str, Any]) -> None:
    (found,) = result["models"].values()
    for part in ("summarization", "qa", "all"):
        assert found["categories"][part]["vanilla_over"]["transformers-static"]["median"] > 0
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


def test_vocabulary(
    model: Path, profiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "SIZES", (64, 128, 4096))
    (found,) = go("vocabulary", model, profiles, tmp_path, monkeypatch)["models"].values()
    assert len(found["sizes"]) == 2  # the others are larger than the model's
    assert found["sizes"][0]["outside"] >= found["sizes"][1]["outside"]
    assert 0 < found["head_of_draft"] < 1


def test_what_lies_outside_a_part_of_the_vocabulary() -> None:
    texts = [([1, 2], [1, 7, 8, 9]), ([7], [7, 7, 1, 1])]
    assert vocabulary.outside(texts, {1, 9}) == (4 / 8, 2 / 8)


def test_fewer_logits_pay_if_nothing_is_lost_by_them() -> None:
    costs = Costs({1: 10.0, 26: 12.0}, floor=2.0, attention=0.5, mlp=0.5, context=256, head=1.5)
    plan = SkipPlan.of_layers([1, 2])
    whole = vocabulary.speed(costs, plan, 6, 0.9, 1.0)
    assert vocabulary.speed(costs, plan, 6, 0.9, 0.2) > whole
    assert vocabulary.speed(costs, plan, 6, 0.6, 0.2) < whole


@pytest.mark.parametrize("result", ["step_costs"], indirect=True)
def test_step_costs(result: dict[str, Any]) -> None:
    (found,) = result["models"].values()
    kinds = {"draft 1", "first and last layer", "modules 1"}
    assert set(found["seconds"]) == {f"verify {w}" for w in step_costs.WIDTHS} | kinds
    assert all(seconds > 0 for seconds in found["seconds"].values())
    assert found["plan"] == {"attention": [2], "mlp": [2]}
    assert [row["layers"] for row in found["prefix_reuse"]] == [2] * 5


@pytest.mark.parametrize("result", ["exactness"], indirect=True)
def test_exactness(result: dict[str, Any]) -> None:
    rows = {(row["arm"], row["batch"]): row for row in result["rows"]}
    own = {("chain", 1), ("tree", 1), ("mixed", 1), ("vanilla", 2), ("chain", 2), ("mixed", 2)}
    assert set(rows) == own | {("transformers", 1)}
    for which in own:
        assert (rows[which]["matching"], rows[which]["total"]) == (2, 2)
        assert (rows[which]["drafted"] > 0) == (which[0] != "vanilla")


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


def test_quick_is_small_where_nothing_else_is_said() -> None:
    def given(*arguments: str) -> list[Any]:
        options = common.parsed(common.parser_for("x"), arguments)
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
    found = common.chosen(data, None, 2)
    assert {name: [p.id for p in own] for name, own in found.items()} == {
        "big": ["big0", "big1"],
        "half": ["half0", "half1"],
    }
    assert list(common.chosen(data, ["small"], 9)) == ["small"]
    assert [p.id for p in common.mixed_up(common.chosen(data, ["small", "half"], 9))] == (
        ["small0", "half0", "small1", "half1", "small2", "half2", "half3"]
    )
    with pytest.raises(SystemExit, match="no prompts of category other"):
        common.chosen(data, ["big", "other"], 1)


def test_the_bad_plan_is_half_of_the_layers_and_the_same_every_time() -> None:
    plan = common.bad_plan(30)
    plan.check(30)
    assert (len(plan.layers), plan.partial) == (15, ())
    assert common.bad_plan(30) == plan != common.bad_plan(30, seed=1)


def test_cases_come_again_with_other_seeds() -> None:
    cases = [Case("a", None, (1,), 5, 7), Case("b", None, (2,), 5, 8)]
    many = common.as_many(cases, 5)
    assert [(case.id, case.seed) for case in many] == [
        *(("a", 0), ("b", 1), ("a", 2), ("b", 3), ("a", 4)),
    ]


def test_ratios_are_of_neighbouring_runs_of_some_length() -> None:
    def run(tokens: int, speed: float) -> Run:
        return Run((), Summary(0.1, tokens / speed, tokens + 1, tokens, tokens))

    speeds = {"vanilla": (10.0, 40.0), "speculative": (20.0, 60.0)}
    cases = tuple(
        CaseRuns(
            Case(name, name, (1,), 9),
            {arm: tuple(run(tokens, speed) for speed in own) for arm, own in speeds.items()},
        )
        for name, tokens in (("long", common.LEAST_TOKENS), ("short", common.LEAST_TOKENS - 1))
    )
    arms = {name: ArmResult.of(cases, name) for name in speeds}
    result = BenchResult(cases, arms, None, {}, 0)
    assert common.ratios(result) == pytest.approx([2.0, 1.5])
    assert common.ratios(result, category="short") == []
    figures = common.figures(result, "speculative", "long")
    assert figures["tokens_per_second"]["median"] == pytest.approx(40)
    assert figures["over_vanilla"]["median"] == pytest.approx(1.75)
    assert figures["tokens_per_step"] == 1


def test_texts_are_of_their_length_and_begin_differently() -> None:
    assert context.texts_of([[1, 2, 3], [4, 5]], 7, 3) == [
        (1, 2, 3, 4, 5, 1, 2),
        (4, 5, 1, 2, 3, 4, 5),
        (1, 2, 3, 4, 5, 1, 2),
    ]


@pytest.mark.parametrize(
    ("plan", "prefix"),
    [
        (SkipPlan.of_layers([2, 5]), 2 * 3.0),
        (SkipPlan.of(attention=[4], mlp=[3]), 3 * 3.0 + 1.0),
        (SkipPlan.of(attention=[4], mlp=[5]), 4 * 3.0),
    ],
)
def test_prefix_reuse_saves_no_more_than_the_further_tokens_cost(
    plan: SkipPlan, prefix: float
) -> None:
    costs = Costs({1: 40.0, 5: 60.0}, 4.0, 1.0, 2.0, 256)
    found = step_costs.prefix_reuse(costs, plan, 4)
    assert found["seconds"] == pytest.approx(prefix / 40 * 20)
    assert found["of_verification"] == pytest.approx(prefix / 40 * 20 / 60)
    assert step_costs.prefix_reuse(costs, plan, 2)["seconds"] == pytest.approx(prefix / 40 * 10)


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
