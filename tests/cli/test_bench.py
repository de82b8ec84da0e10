from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from conflayers_cli.bench import runner as measuring
from conflayers_cli.bench.systems import EngineSystem
from conflayers_cli.bench.systems import Run as SystemRun
from conflayers_cli.skip_plan import SkipPlan
from tests.cli.conftest import Run, save_profile, write_prompts

FAST = ("--dtype", "float32", "--device", "cpu", "-n", "8", "--runs", "2")
KEYS = (
    "schema_version model model_hash device dtype environment settings engine arms speedup "
    "speedup_over identical_outputs categories prompts peak_memory_bytes kv_cache_bytes"
)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    return write_prompts(folder / "prompts.jsonl", "one", "two", "three")


def test_document(run: Run, profile: Path, model: Path, prompts: Path) -> None:
    result = run("bench", "-p", profile, "--data", prompts, *FAST, "--json")
    assert (result.code, result.err) == (0, "")
    document = result.document
    assert list(document) == KEYS.split()
    assert document["schema_version"] == 3
    assert (document["model"], document["device"]) == (str(model), "cpu")
    assert document["dtype"] == "float32"
    assert {"python", "torch", "transformers", "conflayers"} <= set(document["environment"])
    assert document["settings"]["prompts"]["count"] == 3
    assert list(document["arms"]) == ["vanilla", "speculative"]
    for arm in document["arms"].values():
        speed = arm["tokens_per_second"]
        assert 0 < speed["min"] <= speed["median"] <= speed["max"]
        assert (arm["tokens"], arm["time_to_first_token_s"] > 0) == (24, True)
    speculative = document["arms"]["speculative"]
    assert speculative["acceptance_rate"] == speculative["accepted"] / speculative["drafted"]
    assert 1 <= speculative["tokens_per_step"] <= 5
    speedup = document["speedup"]
    assert speedup["low"] <= speedup["median"] <= speedup["high"]
    assert document["speedup_over"] == {}
    assert document["identical_outputs"] == {"matching": 3, "total": 3, "divergences": []}
    assert {name: row["prompts"] for name, row in document["categories"].items()} == {
        "c0": 2,
        "c1": 1,
    }
    assert document["kv_cache_bytes"] > 0
    peaks = [arm["peak_memory_bytes"] for arm in document["arms"].values()]
    assert document["peak_memory_bytes"] == max(peaks)


def test_table_goes_to_stdout_and_the_document_to_a_file(
    run: Run, profile: Path, prompts: Path, tmp_path: Path
) -> None:
    result = run("bench", "-p", profile, "--data", prompts, *FAST, "-o", "bench.json")
    assert (result.code, result.err) == (0, "")
    for word in ("vanilla", "speculative", "tokens/s", "speed-up", "3 of 3 outputs", "c0"):
        assert word in result.out
    assert "\x1b" not in result.out
    assert list(json.loads((tmp_path / "bench.json").read_text())) == KEYS.split()


def test_a_file_that_cannot_be_written_does_not_cost_the_results(
    run: Run, monkeypatch: pytest.MonkeyPatch, profile: Path, prompts: Path
) -> None:
    def fail(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    result = run("bench", "-p", profile, "--data", prompts, *FAST, "-o", "bench.json")
    assert result.code == 1
    assert "speculative" in result.out
    assert "bench.json: can't be written: No space left on device" in result.err


def test_against_transformers(run: Run, profile: Path, prompts: Path) -> None:
    arguments = ("-p", profile, "--data", prompts, *FAST, "--against", "transformers")
    document = run("bench", *arguments, "--json").document
    assert document["arms"]["transformers"]["tokens"] == 24
    assert document["speedup_over"]["transformers"]["median"] > 0
    assert document["identical_to_transformers"]["matching"] == 3
    assert "over transformers' generate" in run("bench", *arguments).out


def test_against_all_that_transformers_has(run: Run, profile: Path, prompts: Path) -> None:
    names = ["transformers", "prompt-lookup", "early-exit", "transformers-static"]
    against = [word for name in [*names, "early-exit"] for word in ("--against", name)]
    result = run("bench", "-p", profile, "--data", prompts, *FAST, *against, "--json")
    assert result.code == 0
    document = result.document
    assert list(document["arms"]) == ["vanilla", "speculative", *names]
    assert list(document["speedup_over"]) == names
    assert {name: found["matching"] for name, found in document["identical_to"].items()} == (
        dict.fromkeys(names, 3)
    )
    assert all(document["arms"][name]["tokens"] == 24 for name in names)
    assert document["identical_to_transformers"] == document["identical_to"]["transformers"]


@pytest.mark.parametrize("by", ["ngram", "skip", "mixed"])
def test_several_at_once(run: Run, profile: Path, prompts: Path, by: str) -> None:
    arguments = ("-p", profile, "--data", prompts, *FAST, "--batch-size", 2, "--draft", by)
    result = run("bench", *arguments, "--json")
    assert (result.code, result.err) == (0, "")
    document = result.document
    assert (document["batch_size"], len(document["queues"])) == (2, 1)
    assert document["settings"]["batch_size"] == 2
    assert document["identical_outputs"] == {"matching": 3, "total": 3, "divergences": []}
    assert document["speedup"]["median"] > 0
    assert document["categories"] == {}
    for arm in document["arms"].values():
        assert arm["tokens"] == 24
        assert arm["tokens_per_second"]["min"] > 0
    assert "3 prompts, 2 at once, up to 8" in run("bench", *arguments).out


def test_a_batch_that_is_never_full_is_told(run: Run, profile: Path, prompts: Path) -> None:
    result = run("bench", "-p", profile, "--data", prompts, *FAST, "--batch-size", 4, "--json")
    assert result.err == "conflayers: note: 3 prompts never fill a batch of 4\n"


@pytest.mark.parametrize(
    "flags",
    [
        ("--tree",),
        ("--no-adaptive-draft-length",),
        ("--target-speedup", "2"),
        ("--against", "transformers"),
    ],
)
def test_what_is_for_one_prompt_at_a_time_is_refused_in_batches(
    run: Run, profile: Path, flags: tuple[str, ...]
) -> None:
    result = run("bench", "-p", profile, "-m", "no-such-model", "--batch-size", 2, *flags)
    assert (result.code, result.out) == (2, "")
    assert f"{flags[0]} is for one prompt at a time: leave --batch-size out" in result.err
    assert result.err.count("\n") == 1


def test_a_peer_that_cannot_run_is_named(
    run: Run, monkeypatch: pytest.MonkeyPatch, profile: Path, prompts: Path
) -> None:
    from transformers.generation import candidate_generator

    def fail(*arguments: Any, **more: Any) -> None:
        raise ValueError("no lookup for you")

    monkeypatch.setattr(candidate_generator.PromptLookupCandidateGenerator, "get_candidates", fail)
    arguments = ("-p", profile, "--data", prompts, *FAST, "--against", "prompt-lookup")
    result = run("bench", *arguments)
    assert (result.code, result.out) == (2, "")
    assert "prompt-lookup: transformers can't decode this model so: no lookup for you" in result.err


def test_sampled_texts_are_compared_but_with_transformers(
    run: Run, profile: Path, prompts: Path
) -> None:
    drawing = ("-t", "0.8", "--top-k", "9", "--repetition-penalty", "1.1")
    arguments = ("-p", profile, "--data", prompts, *FAST, *drawing, "--against", "transformers")
    document = run("bench", *arguments, "--json").document
    same = document["identical_outputs"]
    assert same["matching"] == same["total"] > 0
    assert document["identical_to_transformers"] is None
    sampling = document["settings"]["sampling"]
    assert (sampling["temperature"], sampling["seed"]) == (0.8, 0)


def test_an_empty_plan_is_measured_all_the_same(
    run: Run, model: Path, prompts: Path, tmp_path: Path
) -> None:
    empty = save_profile(tmp_path / "empty.yaml", model, SkipPlan())
    result = run("bench", "-p", empty, "--data", prompts, *FAST, "--json")
    assert "both arms decode vanilla" in result.err
    speculative = result.document["arms"]["speculative"]
    assert (speculative["drafted"], speculative["acceptance_rate"]) == (0, None)


def test_without_a_profile_the_target_says_what_drafts(
    run: Run, model: Path, prompts: Path
) -> None:
    arguments = ("-m", model, "--data", prompts, *FAST, "--target-speedup", "1.7")
    document = run("bench", *arguments, "--json").document
    plan = {"attention": [1, 3], "mlp": [1, 3]}  # of five layers 0, 2 and 4 are kept
    settings = document["settings"]
    assert (settings["target_speedup"], settings["profile"]) == (1.7, None)
    assert (settings["skip_only"], settings["skip"]) == (plan, plan)
    assert (settings["draft"]["max_tokens"], settings["draft"]["stop_probability"]) == (25, 0.8)
    assert document["arms"]["speculative"]["drafted"] > 0


def test_a_target_that_keeps_every_layer_drafts_nothing(
    run: Run, model: Path, prompts: Path
) -> None:
    arguments = ("-m", model, "--data", prompts, *FAST, "--target-speedup", "1")
    result = run("bench", *arguments, "--json")
    assert "both arms decode vanilla" in result.err
    assert result.document["arms"]["speculative"]["drafted"] == 0


def test_with_a_profile_the_target_is_the_lossy_arms_alone(
    run: Run, profile: Path, prompts: Path
) -> None:
    arguments = ("-p", profile, "--data", prompts, *FAST, "--target-speedup", "1.7")
    settings = run("bench", *arguments, "--json").document["settings"]
    assert settings["skip_only"] == {"attention": [1, 3], "mlp": [1, 3]}
    assert settings["skip"] == {"attention": [2], "mlp": [2]}
    assert settings["draft"]["max_tokens"] == 4


@pytest.mark.parametrize("target", ["0.99", "0", "-2", "nan", "inf"])
def test_a_target_that_is_none_is_refused_before_a_model_is_loaded(run: Run, target: str) -> None:
    result = run("bench", "-m", "no-such-model", f"--target-speedup={target}")
    assert (result.code, result.out) == (2, "")
    assert f"--target-speedup {target}: allowed is" in result.err


def test_side_candidates_need_a_profile(run: Run) -> None:
    result = run("bench", "-m", "no-such-model", "--target-speedup", "2", "--tree")
    assert result.code == 2
    assert "--tree" in result.err


def test_the_prompts_of_the_package_are_the_default(run: Run, profile: Path) -> None:
    document = run("bench", "-p", profile, *FAST, "--runs", 1, "--max-prompts", 2, "--json")
    assert document.document["settings"]["data"] is None
    assert document.document["settings"]["prompts"]["count"] == 2


def test_one_prompt_has_its_runs_for_an_interval(run: Run, profile: Path, prompts: Path) -> None:
    one = ("-p", profile, "--data", prompts, "--max-prompts", 1, *FAST, "--json", "--runs")
    assert run("bench", *one, 1).document["speedup"]["low"] is None
    assert run("bench", *one, 3).document["speedup"]["low"] is not None


class TestGates:
    def test_fail_under(self, run: Run, profile: Path, prompts: Path, tmp_path: Path) -> None:
        arguments = ("bench", "-p", profile, "--data", prompts, *FAST, "--json", "--fail-under")
        missed = run(*arguments, "1000", "-o", "bench.json")
        assert missed.code == 3
        assert missed.document == json.loads((tmp_path / "bench.json").read_text())
        assert re.fullmatch(
            r"conflayers: error: --fail-under: the speed-up is \d+\.\d+, under 1000\n", missed.err
        )
        assert run(*arguments, "0").code == 0

    def test_fail_under_without_a_figure(self, run: Run, profile: Path, prompts: Path) -> None:
        short = ("-n", 1, "--fail-under", "0.1", "--json")
        result = run("bench", "-p", profile, "--data", prompts, *FAST, *short)
        assert result.code == 3
        assert result.document["speedup"] == {"median": None, "low": None, "high": None}
        assert "could not be measured" in result.err

    @pytest.mark.parametrize(("dtype", "code"), [("float32", 3), ("bfloat16", 0)])
    def test_outputs_that_differ(
        self,
        run: Run,
        monkeypatch: pytest.MonkeyPatch,
        profile: Path,
        prompts: Path,
        dtype: str,
        code: int,
    ) -> None:
        honest = EngineSystem.run

        def wrong(system: EngineSystem, queue: Any) -> list[SystemRun]:
            done = honest(system, queue)
            if system.name != "speculative" or queue[0].id != "p1":
                return done
            (run,) = done
            tokens = (*run.tokens[:3], (run.tokens[3] + 1) % 256, *run.tokens[4:])
            return [SystemRun(tokens, run.stats, run.cache_bytes)]

        monkeypatch.setattr(EngineSystem, "run", wrong)
        result = run("bench", "-p", profile, "--data", prompts, *FAST, "--dtype", dtype, "--json")
        assert result.code == code
        identical = result.document["identical_outputs"]
        assert (identical["matching"], identical["total"]) == (2, 3)
        (divergence,) = identical["divergences"]
        assert (divergence["id"], divergence["position"]) == ("p1", 3)
        assert divergence["gap"] > 0
        assert divergence["other"] == (divergence["vanilla"] + 1) % 256
        assert ("outputs in float32 differ" in result.err) == (code == 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-p", "missing.yaml"], "missing.yaml: there is no such file"),
        (["-p", "PROFILE", "--data", "missing.jsonl"], "missing.jsonl: there is no such file"),
        (["-p", "PROFILE", "--strict"], "--strict goes with --data"),
        (["-p", "PROFILE", "-o", "no/where.json"], "does not exist"),
        (["-p", "PROFILE", "-t", "-1"], "--temperature"),
        (["-p", "PROFILE", "--runs", "0"], "--runs"),
    ],
)
def test_bad_input_is_told_before_anything_is_measured(
    run: Run, monkeypatch: pytest.MonkeyPatch, profile: Path, arguments: list[str], said: str
) -> None:
    def never(*arguments: Any, **more: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(measuring, "measure", never)
    given = [str(profile) if word == "PROFILE" else word for word in arguments]
    result = run("bench", *given)
    assert (result.code, result.out) == (2, "")
    assert said in result.err
    assert result.err.count("\n") == 1
