"""What the GPU benchmark's figures are made of: planted models, timing, and parts that fail."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_kernels, gpu_models, gpu_speculative
from benchmarks.gpu_bench import Bench, plain
from benchmarks.gpu_runs import Decoded
from benchmarks.gpu_shapes import SHAPES, Shape
from benchmarks.gpu_timing import Budget, OutOfTimeError, busy_in, median_seconds, union
from conflayers_cli.generation.sequence import Step

CPU = torch.device("cpu")


def bench_of(*arguments: str) -> Bench:
    return Bench(gpu.parse_options(["--quick", "--device", "cpu", *arguments]))


def step(tokens: int, drafted: int) -> Step:
    return Step(tuple(range(tokens)), drafted, tokens - 1, "skip", 0.1, 0.2, None)


def test_sizes_are_those_of_the_models_named() -> None:
    # Llama 3 8B reads 7.5 G of its 8.03 G weights (the embedding has 0.525 G), Llama 2 13B 12.85 G.
    assert SHAPES["8b"].weights_read == pytest.approx(8.03e9 - 0.525e9, rel=0.001)
    assert SHAPES["13b"].weights_read == pytest.approx(13.016e9 - 0.164e9, rel=0.001)
    assert SHAPES["8b"].numbers_per_position == 2 * 32 * 8 * 128


def test_weights_read_are_those_of_the_model() -> None:
    shape = SHAPES["8b"].small()
    model = gpu_models.make(shape, CPU, torch.float32).model
    total = sum(weight.numel() for weight in model.parameters())
    assert shape.weights_read == total - (shape.vocabulary - 1) * shape.hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_planted_model_speaks_and_its_plan_is_the_right_one(dtype: torch.dtype) -> None:
    made = gpu_models.make(SHAPES["13b"].small(), CPU, dtype)
    planting = made.planting
    assert len(planting.layers) == 3 and set(planting.layers) <= {1, 2, 3, 4}
    assert planting.agreement >= gpu_models.AGREEING
    assert planting.gaps["50 %"] > 0.5 and planting.near_ties < 0.1
    assert planting.repeated < 0.5
    prompts = gpu_models.random_prompts(512, 64, 8, seed=3)
    (other,) = made.bad_plan.layers
    assert {*made.plan.layers, other} == {1, 2, 3, 4}
    wrong = gpu_models._judged(made.model, prompts, (other,), (1.0,))
    assert wrong.agreement < planting.agreement - 0.03


def test_models_are_the_same_every_time() -> None:
    shape, dtype = SHAPES["8b"].small(), torch.bfloat16
    one, other = (gpu_models.make(shape, CPU, dtype) for _ in range(2))
    assert one.planting == other.planting
    assert max(one.planting.factors) < 0.05  # they have been halved
    again = gpu_models.make(shape, CPU, dtype, known=one.planting)
    for weights in zip(*(made.model.parameters() for made in (one, other, again)), strict=True):
        assert all(torch.equal(weights[0], weight) for weight in weights)


def test_planted_layers_are_inner_ones_in_irregular_places() -> None:
    layers, factors = gpu_models.planted_layers(40)
    assert len(set(layers)) == len(factors) == 20
    assert min(layers) >= 1 and max(layers) <= 38
    assert len({b - a for a, b in pairwise(layers)}) > 1
    assert all(0.01 <= factor <= 0.1 for factor in factors)


def test_repetition_is_of_pairs() -> None:
    assert gpu_models.repetition([[1, 2, 3, 4]]) == 0
    assert gpu_models.repetition([[1, 2, 1, 2, 1]]) == 0.5


class Tape:
    """Stands in for a GPU's events and graphs: work takes a second a call, replays as recorded."""

    now = 0.0
    recorded = 0

    def call(self) -> None:
        self.now += 1.0
        self.recorded += 1

    def replay(self) -> None:
        self.now += self.recorded

    @contextmanager
    def record(self, graph: object) -> Iterator[None]:
        self.recorded = 0
        yield
        self.now -= self.recorded

    def event(self, enable_timing: bool) -> Event:
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, tape: Tape) -> None:
        self.tape, self.at = tape, 0.0

    def record(self) -> None:
        self.at = self.tape.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1000


def test_what_is_timed_on_a_gpu_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    tape, nothing = Tape(), SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in {
        "Stream": lambda: nothing,
        "current_stream": lambda: nothing,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": lambda: tape,
        "graph": tape.record,
        "synchronize": lambda: None,
        "Event": tape.event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    assert median_seconds(torch.device("cuda"), [tape.call] * 3) == 1.0


def test_union_counts_what_overlaps_once() -> None:
    assert union([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 4
    assert union([]) == 0


def test_busy_is_what_the_device_did() -> None:
    events: list[dict[str, Any]] = [
        {"cat": "kernel", "name": "a", "ts": 0, "dur": 30},
        {"cat": "kernel", "name": "b", "ts": 20, "dur": 20},
        {"cat": "gpu_memcpy", "name": "c", "ts": 90, "dur": 10},
        {"cat": "cpu_op", "name": "host", "ts": 0, "dur": 500},
        {"cat": "kernel", "name": "no length", "ts": 400},
    ]
    found = busy_in(events, frozenset({"kernel", "gpu_memcpy"}), 2)
    assert found["seconds"] == pytest.approx(100e-6)
    assert found["idle"] == pytest.approx(0.5)
    assert [kind["name"] for kind in found["by_name"]] == ["a", "b"]
    assert busy_in([], frozenset({"kernel"}), 2)["idle"] is None


def test_letters_tell_bits_apart_by_rows_and_place() -> None:
    def one_row_differs(count: int, place: int) -> torch.Tensor:
        return torch.tensor([1.0 if count == 1 else 2.0])

    def last_place_differs(count: int, place: int) -> torch.Tensor:
        return torch.tensor([float(count > 4 and place > 0)])

    assert gpu_kernels.classify_rows(lambda count, place: torch.ones(1)) == ["A"] * 6
    assert gpu_kernels.classify_rows(one_row_differs) == ["A", *"BBBBB"]
    assert gpu_kernels.classify_rows(last_place_differs) == [*"AAA", "AB", "AB", "AB"]


def test_the_row_under_test_is_given_in_its_place() -> None:
    states = torch.arange(5.0)[None, :, None]
    assert gpu_kernels._ordered(states, 4, 2).flatten().tolist() == [1, 2, 0, 3]
    assert gpu_kernels._placed(states, lambda given: given * 2, 4, 2).tolist() == [0]


def test_attention_of_the_kernel_part_is_causal() -> None:
    shape = Shape("tiny", 2, 32, 32, 4, 2, 64)
    attend = gpu_kernels.attentions(bench_of(), shape)["sdpa"](torch.tensor([[2]]), 6)
    query = torch.randn(1, 4, 1, 8, dtype=torch.bfloat16)
    keys, values = (torch.randn(1, 2, 6, 8, dtype=torch.bfloat16) for _ in range(2))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, keys[:, :, :3], values[:, :, :3], enable_gqa=True
    )
    torch.testing.assert_close(attend(query, keys, values), expected.transpose(1, 2))


def test_efficiency_is_of_the_passes_that_were_run() -> None:
    passes = {"draft": 1.0, "verify": {1: 2.0, 3: 3.0}}
    drafted = Decoded((0,) * 7, (step(3, 2), step(2, 2), step(1, 0)), 20.0)
    vanilla = Decoded((0,) * 7, (step(1, 0),) * 6, 15.0)
    found = gpu_speculative.efficiency([drafted], [vanilla], passes)
    assert found["of_time"] == pytest.approx((2 * 5 + 2) / 20)
    assert found["vanilla_of_time"] == pytest.approx(12 / 15)
    assert found["ideal_speedup"] == pytest.approx(1.0)
    assert found["of_speedup"] == pytest.approx(0.75)


def test_a_part_that_fails_keeps_what_it_found_and_the_others_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "result.json"
    bench = bench_of("--output", str(output))

    def fails(bench: Bench, out: dict[str, Any]) -> None:
        out["found"] = float("nan")
        raise RuntimeError("no\nmemory")

    def works(bench: Bench, out: dict[str, Any]) -> None:
        bench.line("works", "figure", "1", "≥ 0", True)

    bench.run("fails", fails, 0)
    bench.run("works", works, 0)
    bench.print()
    parts = json.loads(output.read_text())["parts"]
    assert parts["fails"]["found"] is None
    assert "RuntimeError: no\nmemory" in parts["fails"]["failed"]
    assert "failed" not in parts["works"]
    out = capsys.readouterr().out
    assert "RuntimeError: no memory" in out and "works: figure" in out


def test_a_part_ends_with_the_time() -> None:
    bench = bench_of()
    bench.quick, bench.budget = False, Budget(0.3)

    def long(bench: Bench, out: dict[str, Any]) -> None:
        out["begun"] = True
        time.sleep(20)
        out["ended"] = True

    begin = time.monotonic()
    bench.run("long", long, 0.1)
    bench.run("late", long, 0.1)
    assert time.monotonic() - begin < 10
    assert bench.parts["long"]["begun"] and "ended" not in bench.parts["long"]
    assert "ended_early" in bench.parts["long"]
    assert list(bench.parts["late"]) == ["skipped"]
    with pytest.raises(OutOfTimeError), Budget(0.1).enforced():
        time.sleep(10)


def test_results_are_json() -> None:
    given = {"a": (1.0, float("inf")), 2: Path("/x/y"), "c": torch.float32, "d": True}
    assert plain(given) == {"a": [1.0, None], "2": "y", "c": "torch.float32", "d": True}
