from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

from conflayers_cli.bench.runner import measure
from conflayers_cli.bench.systems import BenchPrompt, EngineSystem, Run
from conflayers_cli.generation.batch import Batch
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.stats import DraftCount, GenerationStats
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.utils.memory import PeakMemory
from conflayers_cli.utils.statistics import Interval, Spread
from tests import tiny

GREEDY = SamplingParams()


@dataclass
class Paced:
    """A system that takes as long as it should and logs when it was called."""

    name: str
    speeds: list[float]
    log: list[str] = field(default_factory=list)

    def run(self, prompts: Sequence[BenchPrompt]) -> list[Run]:
        self.log += [f"{self.name} {prompt.id}" for prompt in prompts]
        speed = self.speeds.pop(0) if len(self.speeds) > 1 else self.speeds[0]
        stats = GenerationStats(0.1, 10 / speed, 11, 10, 5, {"skip": DraftCount(5, 10, 5)})
        return [Run((1, 2, 3), stats, 1000)]


def make_prompts(count: int) -> list[BenchPrompt]:
    return [BenchPrompt(f"p{i}", f"c{i % 2}", (1, 2), 11) for i in range(count)]


def test_systems_take_turns_and_warm_up() -> None:
    log: list[str] = []
    systems = [Paced("vanilla", [1.0], log), Paced("speculative", [2.0], log)]
    told: list[float] = []
    measure(
        systems,
        make_prompts(2),
        tiny.decoder("llama"),
        GREEDY,
        runs=2,
        warmup=1,
        on_progress=lambda message, done: told.append(done),
    )
    v, s = "vanilla", "speculative"
    assert log[:2] == [f"{v} p0", f"{s} p0"]
    assert log[2:6] == [f"{v} p0", f"{s} p0", f"{s} p1", f"{v} p1"]
    assert log[6:] == [f"{s} p0", f"{v} p0", f"{v} p1", f"{s} p1"]
    assert told == [i / 10 for i in range(10)]


def test_figures_are_ratios_of_medians_without_the_warm_up() -> None:
    systems = [
        Paced("vanilla", [999, 10, 10, 30, 10]),
        Paced("speculative", [1, 20, 20, 21, 500, 20]),
    ]
    result = measure(systems, make_prompts(1), tiny.decoder("llama"), GREEDY, runs=3, warmup=1)
    assert result.systems["vanilla"].tokens_per_second == Spread(median=10, min=10, max=10)
    assert result.systems["speculative"].tokens_per_second == Spread(median=20, min=20, max=20)
    assert result.systems["speculative"].stats.acceptance_rate == 0.5
    assert result.systems["speculative"].stats.tokens == 11
    assert result.speedup().median == 2
    assert result.cache_bytes == 1000


def test_speedup_over_prompts_and_by_category() -> None:
    systems = [Paced("vanilla", [1.0]), Paced("speculative", [1.0, 2.0, 3.0, 4.0, 9.0])]
    result = measure(systems, make_prompts(5), tiny.decoder("llama"), GREEDY, runs=1, warmup=0)
    speedup = result.speedup()
    assert speedup.median == pytest.approx(3)
    assert (speedup.low, speedup.high) == pytest.approx((1, 9))
    assert result.categories == ("c0", "c1")
    assert result.speedup(category="c1").median == pytest.approx(3)  # of 2 and 4
    assert result.speedup(category="c1").low is None


def test_interval_needs_ratios() -> None:
    assert Interval.of([]) == Interval(median=None, low=None, high=None)
    assert Interval.of([2.0, 4.0]) == Interval(median=3.0, low=None, high=None)
    assert Interval.of([2.0] * 5) == Interval(median=2.0, low=2.0, high=2.0)
    assert Interval.of([1.0, 2.0, 3.0]) == Interval.of([1.0, 2.0, 3.0])


def test_an_output_that_ends_early_is_a_divergence() -> None:
    class Short(Paced):
        def run(self, prompts: Sequence[BenchPrompt]) -> list[Run]:
            (done,) = super().run(prompts)
            return [Run(done.tokens[:2], done.stats)]

    systems = [Paced("vanilla", [1.0]), Short("speculative", [1.0])]
    result = measure(systems, make_prompts(1), tiny.decoder("llama"), GREEDY, runs=1, warmup=0)
    assert result.matches is not None
    (divergence,) = result.matches["speculative"].divergences
    assert (divergence.position, divergence.vanilla, divergence.other) == (2, 3, None)
    assert divergence.gap >= 0


@dataclass
class Lossy(Paced):
    """Writes something else than the systems that only take their time."""

    def run(self, prompts: Sequence[BenchPrompt]) -> list[Run]:
        (done,) = super().run(prompts)
        return [Run((1, 9, 3), done.stats)]


def test_the_lossy_system_is_compared_by_agreement_and_not_by_identity() -> None:
    systems = [Paced("vanilla", [10.0]), Paced("speculative", [20.0]), Lossy("skip-only", [15.0])]
    result = measure(systems, make_prompts(4), tiny.decoder("llama"), GREEDY, runs=1, warmup=0)
    assert result.matches is not None
    assert list(result.matches) == ["speculative"]
    assert result.agreement is not None
    assert result.agreement.equal == pytest.approx(2 / 3)
    assert (result.agreement.first_divergence, result.agreement.identical) == (1, 0)
    assert result.speedup(system="skip-only") == Interval(median=1.5, low=1.5, high=1.5)
    assert result.speedup() == Interval(median=2.0, low=2.0, high=2.0)
    assert result.speedup(system="skip-only", category="c1").median == 1.5


def test_sampled_texts_are_compared_but_with_transformers() -> None:
    names = ("vanilla", "speculative", "transformers")
    systems = [Paced(name, [1.0]) for name in names]
    drawing = SamplingParams(temperature=1.0, seed=0)
    result = measure(systems, make_prompts(2), tiny.decoder("llama"), drawing, runs=1, warmup=0)
    assert list(result.matches) == ["speculative"]
    plain = measure(systems[:2], make_prompts(2), tiny.decoder("llama"), GREEDY, runs=1, warmup=0)
    assert plain.agreement is None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_skip_only_system_decodes_with_its_plan_its_seed_and_its_ends(temperature: float) -> None:
    decoder, plan = tiny.decoder("llama"), SkipPlan.of_layers([1, 3])
    sampling = SamplingParams(temperature=temperature, seed=4)
    prompt = BenchPrompt("p", None, tuple(tiny.prompt(9)), 20)
    request = GenerationRequest(prompt.tokens, 20, sampling)
    batch = Batch(decoder, [request], plan=plan)
    batch.run()
    lossy = EngineSystem("skip-only", decoder, None, sampling, frozenset(), skip_plan=plan)
    (done,) = lossy.run([prompt])
    assert [list(done.tokens)] == batch.outputs
    (whole,) = EngineSystem("vanilla", decoder, None, sampling, frozenset()).run([prompt])
    assert done.tokens[0] == whole.tokens[0]  # decided by the whole model
    assert done.tokens != whole.tokens
    assert (done.stats.tokens, done.stats.decode_tokens, done.stats.steps) == (20, 19, 19)
    assert done.stats.prefill_seconds > 0
    assert done.stats.decode_seconds > 0
    assert done.cache_bytes == whole.cache_bytes
    end = done.tokens[5]
    (ended,) = replace(lossy, end_tokens=frozenset({end})).run([prompt])
    assert ended.tokens == done.tokens[: done.tokens.index(end) + 1]


@pytest.mark.skipif(PeakMemory(torch.device("cpu")).peak() is None, reason="nothing tells here")
def test_memory_is_told_apart_by_system() -> None:
    class Greedy(Paced):
        def run(self, prompts: Sequence[BenchPrompt]) -> list[Run]:
            torch.ones(64 * 2**20, dtype=torch.uint8)  # gone again at once
            return super().run(prompts)

    systems = [Paced("vanilla", [1.0]), Greedy("speculative", [1.0]), Paced("transformers", [1.0])]
    result = measure(systems, make_prompts(1), tiny.decoder("llama"), GREEDY, runs=2, warmup=0)
    peaks = [result.peak_memory[system.name] for system in systems]
    assert peaks[1] > 60 * 2**20
    assert max(peaks[0], peaks[2]) < 30 * 2**20
