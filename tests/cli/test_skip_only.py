"""``--skip-only``, and the lossy arm of ``bench``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.models.loader import load_model
from conflayers_cli.skip_plan import SkipPlan
from tests.cli.conftest import Run, save_profile, write_prompts

LOSSY = ("--skip-only", "--target-speedup", "1.7")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    texts = ("Tell me.", "A somewhat longer prompt than the first one", "x", "Why?", "Go on.")
    return write_prompts(tmp_path / "prompts.jsonl", *texts)


def by_hand(model: Path, prompt: str, count: int, plan: SkipPlan) -> list[int]:
    """The skipped model alone behind a full prefill, token by token."""
    loaded = load_model(str(model), LoadOptions(dtype="float32"))
    decoder = Decoder(loaded.model)
    tokens = loaded.tokenizer(prompt)["input_ids"]
    cache = decoder.new_cache(len(tokens) + count)
    logits = decoder.prefill(torch.tensor([tokens]), cache)
    output = [int(logits.argmax())]
    while len(output) < count and output[-1] not in loaded.end_tokens:
        at = torch.tensor([[len(tokens) + len(output) - 1]])
        logits = decoder.forward(torch.tensor([output[-1:]]), at, cache, plan)
        output.append(int(logits.argmax()))
    return output


def test_is_the_skipped_model_and_says_so(run: Run, model: Path) -> None:
    arguments = ("generate", "Hello", "-m", model, "-n", 20, "--raw", "--dtype", "float32")
    result = run(*arguments, *LOSSY, "--json")
    assert result.code == 0, result.err
    assert "not the model's own" in result.err
    document = result.document
    plan = SkipPlan.unified(5, 1.7)
    assert document["token_ids"] == by_hand(model, "Hello", 20, plan)
    assert document["lossless"] is False
    assert document["skipped"]["attention"] == list(plan.attention)
    own = run(*arguments, "--json").document
    assert own["token_ids"] != document["token_ids"]
    assert "lossless" not in own
    streamed = run(*arguments, *LOSSY, "--stats")
    assert streamed.out == document["text"] + "\n"
    assert "lossy" in streamed.err


def test_a_profiles_layers_can_be_left_out_for_good(run: Run, model: Path, profile: Path) -> None:
    arguments = ("generate", "Hello", "-p", profile, "-n", 12, "--raw", "--dtype", "float32")
    document = run(*arguments, "--skip-only", "--json").document
    assert document["token_ids"] == by_hand(model, "Hello", 12, SkipPlan.of_layers([2]))


@pytest.mark.parametrize("size", [1, 2, 3, 9])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_batch_answers_as_one_by_one(
    run: Run, model: Path, prompts: Path, size: int, temperature: float
) -> None:
    arguments = ("generate", "-m", model, "--data", prompts, "-n", 15, "--dtype", "float32")
    arguments = (*arguments, *LOSSY, "-t", temperature, "--seed", 3)  # type: ignore[assignment]
    alone, together = run(*arguments), run(*arguments, "--batch-size", size)
    assert together.code == 0, together.err
    assert [line["id"] for line in together.lines] == [f"p{i}" for i in range(5)]
    assert [line["token_ids"] for line in together.lines] == [
        line["token_ids"] for line in alone.lines
    ]


def test_resume_does_not_mix_lossy_and_lossless(
    run: Run, model: Path, prompts: Path, tmp_path: Path
) -> None:
    arguments = ("generate", "-m", model, "--data", prompts, "-n", 5, "-o", tmp_path / "o.jsonl")
    assert run(*arguments, "--max-prompts", 2, *LOSSY).code == 0
    refused = run(*arguments, "--resume")
    assert refused.code == 2
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 2
    other = run(*arguments, "--resume", "--skip-only", "--target-speedup", "3")
    assert other.code == 2
    assert run(*arguments, "--resume", *LOSSY, "--batch-size", 2).code == 0
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--skip-only",), "--skip-only needs --target-speedup"),
        (("--target-speedup", "2"), "--target-speedup goes with --skip-only"),
        (("--batch-size", "2"), "--batch-size goes with --data"),
        ((*LOSSY, "--batch-size", "2"), "--batch-size goes with --data"),
        ((*LOSSY, "--batch-size", "0"), "--batch-size"),
        (("--skip-only", "--target-speedup", "0.9"), "--target-speedup 0.9"),
        (("--skip-only", "--target-speedup", "nan"), "--target-speedup nan"),
        ((*LOSSY, "--tree"), "--tree is about drafting"),
        ((*LOSSY, "--adapt", "conflayers"), "--adapt is about drafting"),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    run: Run, model: Path, arguments: tuple[str, ...], told: str
) -> None:
    result = run("generate", "Hello", "-m", model, *arguments)
    assert result.code == 2
    assert told in result.err
    assert result.out == ""


def test_a_profile_that_leaves_nothing_out(run: Run, model: Path, tmp_path: Path) -> None:
    empty = save_profile(tmp_path / "empty.yaml", model, SkipPlan(), max_tokens=0)
    result = run("generate", "Hello", "-p", empty, "--skip-only")
    assert result.code == 2
    assert "leaves nothing out" in result.err
    both = run("generate", "Hello", "-p", empty, *LOSSY)
    assert both.code == 2 and "give one" in both.err


def test_bench_has_a_lossy_arm_with_its_agreement(run: Run, model: Path, prompts: Path) -> None:
    arguments = ("bench", "-m", model, "--target-speedup", 1.7, "--data", prompts, "-n", 16)
    arguments = (*arguments, "--runs", 1, "--warmup", 0, "--dtype", "float32")  # type: ignore[assignment]
    result = run(*arguments, "--json")
    assert result.code == 0, result.err  # what the lossy arm writes is no broken gate
    document = result.document
    assert set(document["arms"]) == {"vanilla", "speculative", "skip-only"}
    assert document["identical_outputs"]["matching"] == 5
    agreement = document["skip_only"]["agreement"]
    assert agreement["prompts"] == 5
    assert 0 <= agreement["equal"] < 1
    assert agreement["first_divergence"] is not None
    assert document["skip_only"]["speedup"]["median"] > 0
    shown = run(*arguments)
    assert "skip-only is lossy" in shown.out and "ROUGE-2" in shown.out
    sampled = run(*arguments, "--json", "-t", 1.0).document
    assert 0 <= sampled["skip_only"]["agreement"]["equal"] < 1


def test_bench_needs_a_profile_or_a_target(run: Run, model: Path) -> None:
    assert "--profile FILE or --model MODEL" in run("bench").err
    assert run("bench", "--target-speedup", 2).code == 2
    bad = run("bench", "-m", model, "--target-speedup", "0.5")
    assert bad.code == 2 and "--target-speedup 0.5" in bad.err


def test_the_help_says_that_it_is_lossy(run: Run) -> None:
    told = " ".join(run("generate", "--help").out.split())
    assert "NOT the model's own" in told.replace("│ │", "").replace("  ", " ")


def test_json_lines_of_lossy_answers_say_so(run: Run, model: Path, prompts: Path) -> None:
    result = run("generate", "-m", model, "--data", prompts, "-n", 3, *LOSSY)
    assert all(json.loads(line)["lossless"] is False for line in result.out.splitlines())
