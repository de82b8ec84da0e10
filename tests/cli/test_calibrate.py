"""``conflayers calibrate`` on a tiny model: the profile, the answer, and what is refused."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from conflayers_cli.cli.calibrate import default_name
from conflayers_cli.profile.schema import Profile
from tests.cli.conftest import Run, finished, quick_search, save_model, write_prompts
from tests.processes import start

QUICK = quick_search(3, 24, 20)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "prompts.jsonl", *(f"Tell me about {i}." for i in range(5)))


def test_writes_a_profile_that_generate_and_bench_take(
    run: Run, model: Path, prompts: Path, tmp_path: Path
) -> None:
    result = run(
        "calibrate",
        "-m",
        model,
        "--data",
        prompts,
        "-o",
        "found.yaml",
        *QUICK,
        "--dtype",
        "float32",
    )
    assert result.code == 0, result.err
    assert "wrote found.yaml" in result.out
    profile = Profile.load(tmp_path / "found.yaml")
    assert profile.found_by is not None and profile.measured is not None
    assert profile.found_by.strategy == "conflayers"
    assert profile.found_by.prompts.count == 5
    assert profile.measured.iterations == 3
    assert profile.measured.conclusion in result.out
    assert profile.environment is not None and profile.environment.dtype == "float32"
    assert profile.tensors == "found.safetensors"
    assert profile.draft.by == ("mixed" if profile.plan else "ngram")
    assert profile.draft.lookahead is None
    assert "selected" in load_file(tmp_path / "found.safetensors")
    generated = run("generate", "Hello", "-p", "found.yaml", "-n", 5)
    assert generated.code == 0, generated.err


def test_unrefined_keeps_the_papers_own_plan_and_drafting(
    run: Run, model: Path, prompts: Path, tmp_path: Path
) -> None:
    result = run(
        "calibrate", "-m", model, "--data", prompts, "-o", "p.yaml", *QUICK, "--no-refine", "--json"
    )
    assert result.code == 0, result.err
    document = result.document
    profile = Profile.load(tmp_path / "p.yaml")
    assert (profile.draft.max_tokens, profile.draft.stop_probability) == (25, 0.8)
    assert (profile.draft.by, profile.draft.lookahead) == ("skip", False)
    assert profile.plan
    decoded = [trial for trial in document["trials"] if trial["steps"]]
    best = max(decoded, key=lambda trial: trial["accepted"] / trial["steps"])
    assert list(profile.plan.attention) == best["attention"]
    assert document["profile"]["skip"]["mlp"] == best["mlp"]
    assert document["refine_judged"] == 0


def test_the_same_seed_finds_the_same_sets(run: Run, model: Path, prompts: Path) -> None:
    arguments = ("calibrate", "-m", model, "--data", prompts, "-o", "p.yaml", *QUICK, "--json")
    first, second = (run(*arguments, "--seed", 3).document for _ in range(2))
    assert [t["attention"] for t in first["trials"]] == [t["attention"] for t in second["trials"]]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--strategy", "swfit"), "--strategy swfit: there is local"),
        (("--skip-ratio", "2"), "--skip-ratio"),
        (("--output", "nowhere/p.yaml"), "nowhere does not exist"),
        (("--data", "missing.jsonl"), "missing.jsonl"),
        (("--prompt-column", "x"), "--prompt-column goes with --data"),
        (("--max-iterations", "0"), "--max-iterations"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    run: Run, model: Path, arguments: tuple[str, ...], told: str, tmp_path: Path
) -> None:
    result = run("calibrate", "-m", model, *arguments)
    assert result.code == 2
    assert told in result.err and result.err.count("\n") == 1
    assert not list(tmp_path.glob("*.yaml"))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("org/Qwen2.5-7B", "Qwen2.5-7B"),
        ("a/b.Q4_1.gguf", "b.Q4_1"),
        ("smollm2", "smollm2"),
        ("/", "profile"),
    ],
)
def test_a_profile_is_called_after_its_model(model: str, name: str) -> None:
    assert default_name(model) == name


def test_too_shallow_a_model_is_refused(run: Run, prompts: Path, tmp_path: Path) -> None:
    shallow = save_model(tmp_path / "shallow", num_hidden_layers=3)
    result = run("calibrate", "-m", shallow, "--data", prompts, *QUICK)
    assert result.code == 2
    assert "3 layers are too few" in result.err


def test_nothing_but_a_profile_and_its_tensors_is_replaced(
    run: Run, model: Path, prompts: Path, tmp_path: Path
) -> None:
    arguments = ("calibrate", "-m", model, "--data", prompts, *QUICK)
    before = prompts.read_bytes()
    over_prompts = run(*arguments, "-o", prompts)
    assert over_prompts.code == 2 and "is no profile" in over_prompts.err
    assert prompts.read_bytes() == before
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    over_weights = run(*arguments, "-o", "model.yaml")
    assert over_weights.code == 2 and "would be replaced" in over_weights.err
    assert weights.read_bytes() == b"weights"
    assert run(*arguments, "-o", "again.yaml").code == 0
    assert run(*arguments, "-o", "again.yaml").code == 0


def test_ctrl_c_writes_the_best_so_far(model: Path, prompts: Path, tmp_path: Path) -> None:
    target = tmp_path / "cut.yaml"
    arguments = ("calibrate", "-m", model, "--data", prompts, "-o", target, "--patience", 9999)
    endless = (*arguments, "--max-iterations", 99999, "--strategy", "conflayers")
    pipe = subprocess.PIPE
    process = start("conflayers_cli", endless, stdout=pipe, stderr=pipe)
    if process.stderr is None:
        pytest.fail("no stderr")
    line = ""
    while "best so far" not in line:
        line = process.stderr.readline().decode()
        assert line, "the search ended by itself"
    os.kill(process.pid, signal.SIGINT)
    result = finished(process)
    assert result.code == 130, result.err
    assert "interrupted" in result.out
    profile = Profile.load(target)
    assert profile.measured is not None and "interrupted" in profile.measured.conclusion
    assert profile.measured.iterations >= 1


def test_drafts_may_use_rounded_weights(
    run: Run, model: Path, prompts: Path, tmp_path: Path
) -> None:
    """Where they are asked for; by themselves they are for models that they make faster."""
    arguments = ("calibrate", "-m", model, "--data", prompts, "-o", "p.yaml", *QUICK, "--json")
    asked = run(*arguments, "--draft-weights", "int4")
    assert asked.code == 0, asked.err
    assert asked.document["candidate"]["weights"] == "int4"
    assert run(*arguments).document["candidate"]["weights"] is None
    (tmp_path / "int4.yaml").write_text(
        (tmp_path / "p.yaml")
        .read_text(encoding="utf-8")
        .replace("skip:", "skip:\n  weights: int4")
        .replace("by: ngram", "by: skip")
        .replace("max_tokens: 0", "max_tokens: 4"),
        encoding="utf-8",
    )
    profile = Profile.load(tmp_path / "int4.yaml")
    assert profile.plan.weights == "int4"
    vanilla, drafted = (
        run("generate", "Hello", "-m", model, *more, "-n", 12, "--json")
        for more in ((), ("-p", "int4.yaml", "--no-adaptive-draft-length"))
    )
    assert drafted.code == 0, drafted.err
    assert drafted.document["text"] == vanilla.document["text"]
    assert drafted.document["stats"]["drafted"] > 0


@pytest.mark.parametrize(
    "more, expected",
    [
        (("--draft-weights", "int4", "--no-refine"), "not with --no-refine"),
        (("--draft-weights", "int3"), "'int3' is not one of 'auto', 'own', 'int4'"),
    ],
)
def test_weights_that_cant_be(
    run: Run, model: Path, prompts: Path, more: tuple[str, ...], expected: str
) -> None:
    result = run("calibrate", "-m", model, "--data", prompts, "-o", "p.yaml", *more)
    assert result.code == 2
    assert expected in result.err and result.err.count("\n") == 1


def test_where_there_is_no_kernel_it_says_so(
    run: Run, model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from conflayers_cli.kernels import int4_linear

    monkeypatch.setattr(int4_linear, "_try_kernel", lambda device, dtype: "there is no kernel here")
    arguments = ("calibrate", "-m", model, "--data", prompts, "-o", "p.yaml", *QUICK)
    result = run(*arguments, "--draft-weights", "int4")
    assert result.code == 2
    assert result.err.endswith("--draft-weights int4: there is no kernel here\n")
