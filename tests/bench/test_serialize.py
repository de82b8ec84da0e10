from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

from rich.console import Console

from conflayers_cli.bench.runner import BenchResult, SystemResult
from conflayers_cli.bench.schema import (
    Agreement,
    BenchContext,
    BenchDocument,
    Divergence,
    OutputMatch,
)
from conflayers_cli.bench.serialize import build_document
from conflayers_cli.bench.systems import BenchPrompt, PromptRuns, Run
from conflayers_cli.bench.tables import bench_tables
from conflayers_cli.generation.positions import AcceptedPerPosition
from conflayers_cli.generation.stats import DraftCount, GenerationStats


def document(bench: BenchResult) -> dict[str, Any]:
    """As it comes back from a file."""
    context = BenchContext(
        schema_version=3,
        model="smollm2",
        model_hash="0f" * 8,
        device="cpu",
        dtype="bfloat16",
        environment={"threads": 2},
        settings={"max_new_tokens": 9},
        engine={"replayed": False},
    )
    hashes = [f"{number:064x}" for number in range(len(bench.prompts))]
    found: dict[str, Any] = json.loads(
        json.dumps(build_document(bench, context, hashes).as_json(), allow_nan=False)
    )
    return found


def result(*, identical: bool = True, categories: tuple[str | None, ...] = ("qa",)) -> BenchResult:
    """Speculative twice as fast as vanilla on every prompt."""
    prompts = []
    for number, category in enumerate(categories):
        vanilla = GenerationStats(0.5, 10.0, 101, 100, 100)
        drafted = GenerationStats(
            prefill_seconds=0.5,
            decode_seconds=5.0,
            tokens=101,
            decode_tokens=100,
            steps=40,
            by_drafter={"skip": DraftCount(40, 80, 60)},
            draft_seconds=2.0,
            by_position={"skip": AcceptedPerPosition((40, 40), (38, 22))},
        )
        runs = {"vanilla": (Run((1,), vanilla),) * 3, "speculative": (Run((1,), drafted),) * 3}
        prompts.append(PromptRuns(BenchPrompt(f"[bold]p{number}\x1b", category, (1,), 9), runs))
    parted = Divergence(id=prompts[0].prompt.id, position=4, gap=0.0125, vanilla=7, other=None)
    match = OutputMatch(matching=int(identical), total=1, divergences=[] if identical else [parted])
    return BenchResult(
        tuple(prompts),
        {name: SystemResult.of(prompts, name) for name in ("vanilla", "speculative")},
        {"speculative": match},
        {"vanilla": 2**29, "speculative": 2**30, "transformers": 2**31},
        2**20,
    )


def shown(bench: BenchResult) -> str:
    console = Console(file=io.StringIO(), width=160)
    with console.capture() as captured:
        for part in bench_tables(BenchDocument.model_validate(document(bench))):
            console.print(part)
    return captured.get()


def test_json() -> None:
    found = document(result(identical=False))
    assert found["arms"]["vanilla"] == {
        "tokens_per_second": {"median": 10.0, "min": 10.0, "max": 10.0},
        "time_to_first_token_s": 0.5,
        "tokens": 101,
        "tokens_per_step": 1.0,
        "peak_memory_bytes": 2**29,
        "decoding": {"tokens": 300, "steps": 300, "draft_seconds": 0, "verify_seconds": 30.0},
    }
    assert found["arms"]["speculative"] == {
        "tokens_per_second": {"median": 20.0, "min": 20.0, "max": 20.0},
        "time_to_first_token_s": 0.5,
        "tokens": 101,
        "tokens_per_step": 2.5,
        "peak_memory_bytes": 2**30,
        "decoding": {"tokens": 300, "steps": 120, "draft_seconds": 6.0, "verify_seconds": 9.0},
        "acceptance_rate": 0.75,
        "drafted": 80,
        "accepted": 60,
        "by_drafter": {"skip": {"steps": 40, "drafted": 80, "accepted": 60}},
        "by_position": {"skip": {"drafted": [40, 40], "accepted": [38, 22]}},
    }
    assert found["prompts"] == [
        {
            "id": "[bold]p0\x1b",
            "category": "qa",
            "sha256": "0" * 64,
            "prompt_tokens": 1,
            "tokens": 101,
            "steps": 40,
            "drafted": 80,
            "accepted": 60,
            "tokens_per_second": {"vanilla": [10.0] * 3, "speculative": [20.0] * 3},
        }
    ]
    assert found["speedup"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    (divergence,) = found["identical_outputs"]["divergences"]
    assert divergence["position"] == 4
    assert divergence["gap"] == 0.0125
    assert found["categories"]["qa"]["speedup"] == 2.0
    assert found["peak_memory_bytes"] == 2**30  # of the engine, not of transformers


def test_memory_is_not_claimed_where_nothing_tells() -> None:
    bench = replace(result(), peak_memory={})
    assert document(bench)["peak_memory_bytes"] is None
    assert "peak memory" not in shown(bench)
    alone = replace(result(), peak_memory={"vanilla": 2**22})
    assert "peak memory over the model's weights: 4 MiB; keys and values: 1 MiB" in shown(alone)
    compared = result()
    systems = {**compared.systems, "transformers": compared.systems["vanilla"]}
    prompts = tuple(
        replace(prompt, runs={**prompt.runs, "transformers": prompt.runs["vanilla"]})
        for prompt in compared.prompts
    )
    text = shown(replace(compared, systems=systems, prompts=prompts))
    assert "1,024 MiB (transformers: 2,048 MiB); keys" in text


def test_table_holds_the_figures() -> None:
    text = shown(result())
    for figure in ("10.0", "20.0", "500 ms", "75.0%", "2.50", "2.00×", "2.00–2.00", "1,024 MiB"):
        assert figure in text
    assert "1 of 1 outputs identical" in text


def test_bars_tell_where_time_goes_and_how_far_drafts_hold() -> None:
    text = shown(result())
    assert "vanilla     ████████████████ 100.0 ms\n" in text
    assert "speculative ████████         50.0 ms (drafting 20.0, verifying 30.0)\n" in text
    assert "skip        █▅ 95% of 40 … 55% of 40\n" in text
    plain = result()
    nobody = replace(plain.systems["speculative"].stats, by_position={})
    systems = {**plain.systems, "speculative": replace(plain.systems["speculative"], stats=nobody)}
    assert "by place in the draft" not in shown(replace(plain, systems=systems))


def test_divergences_are_listed_and_names_are_harmless() -> None:
    text = shown(result(identical=False))
    assert "[bold]p0\ufffd: from token 4 on (7 and None" in text
    assert "0.013" in text
    assert "\x1b" not in text


def test_categories_are_listed_where_there_are_several() -> None:
    assert "category" not in shown(result())
    text = shown(result(categories=("qa", "[red]maths", None)))
    assert "qa" in text
    assert "[red]maths" in text


def lossy(agreement: Agreement | None) -> BenchResult:
    """A third arm, one and a half times as fast as vanilla."""
    plain = result()
    skipping = GenerationStats(0.5, 10.0, 151, 150, 150)
    prompts = tuple(
        replace(prompt, runs={**prompt.runs, "skip-only": (Run((2,), skipping),) * 3})
        for prompt in plain.prompts
    )
    systems = {
        name: SystemResult.of(prompts, name) for name in ("vanilla", "speculative", "skip-only")
    }
    return replace(plain, prompts=prompts, systems=systems, agreement=agreement)


def test_the_lossy_system_is_reported_with_its_agreement() -> None:
    bench = lossy(
        Agreement(equal=0.625, rouge_2=0.41, first_divergence=7.5, identical=1, prompts=4)
    )
    found = document(bench)
    assert found["skip_only"] == {
        "lossless": False,
        "speedup": {"median": 1.5, "low": 1.5, "high": 1.5},
        "agreement": {
            "equal": 0.625,
            "rouge_2": 0.41,
            "first_divergence": 7.5,
            "identical": 1,
            "prompts": 4,
        },
    }
    assert found["arms"]["skip-only"]["tokens_per_second"]["median"] == 15.0
    assert found["speedup"]["median"] == 2.0
    text = shown(bench)
    for figure in ("1.50×", "lossy", "62.5%", "ROUGE-2 0.41", "1 of 4 outputs", "at token 8 in"):
        assert figure in text
    assert "1 of 1 outputs identical" in text  # the speculative arm's own line
    assert "skip_only" not in document(result())
    assert "lossy" not in shown(result())


def test_outputs_that_all_agree_part_nowhere() -> None:
    text = shown(
        lossy(Agreement(equal=1.0, rouge_2=1.0, first_divergence=None, identical=4, prompts=4))
    )
    assert "4 of 4 outputs the same\n" in text
    assert "part at" not in text


def test_an_agreement_that_is_not_known_is_left_out() -> None:
    bench = lossy(None)
    assert document(bench)["skip_only"]["agreement"] is None
    assert "lossy" in shown(bench)
    assert "ROUGE-2" not in shown(bench)


def test_prompts_without_a_category() -> None:
    assert document(result(categories=(None,)))["categories"] == {}


def test_who_drafted_is_told_where_several_did() -> None:
    plain = result()
    assert "drafted by" not in shown(plain)
    both = {"skip": DraftCount(40, 60, 45), "ngram": DraftCount(9, 20, 15)}
    stats = replace(plain.systems["speculative"].stats, by_drafter=both)
    systems = {**plain.systems, "speculative": replace(plain.systems["speculative"], stats=stats)}
    bench = replace(plain, systems=systems)
    assert "drafted by: skip 60 (75.0% accepted), ngram 20 (75.0% accepted)" in shown(bench)
    figures = document(bench)["arms"]["speculative"]["by_drafter"]
    assert figures["ngram"] == {"steps": 9, "drafted": 20, "accepted": 15}


def test_baselines_are_told_by_their_names() -> None:
    plain = result()
    theirs = GenerationStats(0.5, 20.0, 101, 100, 100)
    prompts = tuple(
        replace(prompt, runs={**prompt.runs, "early-exit": (Run((1,), theirs),) * 3})
        for prompt in plain.prompts
    )
    systems = {**plain.systems, "early-exit": SystemResult.of(prompts, "early-exit")}
    matches = {
        **plain.matches,
        "early-exit": OutputMatch(matching=1, total=1, divergences=[]),
    }
    bench = replace(
        plain, prompts=prompts, systems=systems, matches=matches, peak_memory={"early-exit": 5}
    )
    found = document(bench)
    assert found["speedup_over"] == {"early-exit": {"median": 4.0, "low": 4.0, "high": 4.0}}
    assert found["identical_to"]["early-exit"]["matching"] == 1
    assert found["peak_memory_bytes"] is None
    assert "identical_to_transformers" not in found
    text = shown(bench)
    assert "speed-up over transformers' early exit: 4.00× (4.00–4.00)" in text
    assert "early-exit: 1 of 1 outputs identical to vanilla's" in text


def test_batches_are_told() -> None:
    plain = result(categories=("qa", "maths", "qa"))
    queue = PromptRuns(plain.prompts[0].prompt, plain.prompts[0].runs)
    bench = replace(plain, queues=(queue, queue), batch_size=4)
    found = document(bench)
    assert found["batch_size"] == 4
    speeds = {"vanilla": [10.0] * 3, "speculative": [20.0] * 3}
    assert [queue["tokens_per_second"] for queue in found["queues"]] == [speeds, speeds]
    assert [prompt["tokens_per_second"] for prompt in found["prompts"]] == [{}, {}, {}]
    assert found["categories"] == {}
    text = shown(bench)
    assert "3 prompts, 4 at once in 2 queues, up to 9 new tokens" in text
    assert "maths" not in text
    assert "batch_size" not in document(plain)
    assert "at once" not in shown(plain)
