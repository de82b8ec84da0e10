from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from conflayers_cli.bench.runner import BenchResult, measure, split_queues
from conflayers_cli.bench.systems import BenchPrompt, EngineSystem, Run
from conflayers_cli.engine.cost_model import CostTable, PassCosts
from conflayers_cli.generation.stats import DraftCount, GenerationStats
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.spec_decode.mixed import MixedProposer
from tests import tiny

GREEDY = SamplingParams()


@dataclass
class PacedRows:
    """Decodes each of its queues at the next of its speeds; rows share the time."""

    name: str
    speeds: list[float]
    log: list[str] = field(default_factory=list)
    tokens: tuple[int, ...] = (1, 2, 3)

    def run(self, prompts: Sequence[BenchPrompt]) -> list[Run]:
        self.log.append(f"{self.name} {' '.join(prompt.id for prompt in prompts)}")
        speed = self.speeds.pop(0) if len(self.speeds) > 1 else self.speeds[0]
        stats = GenerationStats(0.1, 10 / speed, 11, 10, 5, {"ngram": DraftCount(5, 10, 5)})
        return [Run(self.tokens, stats, 1000) for _ in prompts]


def make_prompts(count: int) -> list[BenchPrompt]:
    return [BenchPrompt(f"p{i}", "c", (1, 2), 11) for i in range(count)]


def speeds(result: BenchResult, system: str) -> tuple[float | None, ...]:
    found = result.systems[system].tokens_per_second
    return found.median, found.min, found.max


@pytest.mark.parametrize(
    ("prompts", "size", "lengths"),
    [(1, 4, [1]), (11, 2, [11]), (12, 2, [6, 6]), (29, 4, [14, 15]), (96, 16, [48, 48])],
)
def test_queues_are_equal_and_three_batches_long_where_they_can(
    prompts: int, size: int, lengths: list[int]
) -> None:
    given = make_prompts(prompts)
    queues = split_queues(given, size)
    assert [len(queue) for queue in queues] == lengths
    assert [prompt for queue in queues for prompt in queue] == given


def test_queues_are_decoded_in_turns_and_timed_as_wholes() -> None:
    log: list[str] = []
    systems = [
        PacedRows("vanilla", [99.0, 10.0, 30.0, 10.0, 20.0], log),
        PacedRows("speculative", [99.0, 20.0, 30.0, 40.0, 20.0], log),
    ]
    told: list[float] = []
    result = measure(
        systems,
        make_prompts(13),
        tiny.decoder("llama"),
        GREEDY,
        batch_size=2,
        runs=2,
        warmup=1,
        on_progress=lambda message, done: told.append(done),
    )
    one, two = "p0 p1 p2 p3 p4 p5", "p6 p7 p8 p9 p10 p11 p12"
    v, s = "vanilla", "speculative"
    assert log[:2] == [f"{v} p0 p1", f"{s} p0 p1"]
    assert log[2:6] == [f"{v} {one}", f"{s} {one}", f"{s} {two}", f"{v} {two}"]
    assert log[6:] == [f"{s} {one}", f"{v} {one}", f"{v} {two}", f"{s} {two}"]
    assert told == [i / 10 for i in range(10)]
    assert speeds(result, "vanilla") == pytest.approx((15, 10, 30))
    assert speeds(result, "speculative") == pytest.approx((25, 20, 40))
    ratios = result.speedup()  # of 2, 4 in the first queue, 1, 1 in the second
    assert ratios.median == pytest.approx(1.5)
    assert ratios.low is not None
    assert result.systems["vanilla"].stats.tokens == 13 * 11
    assert result.systems["vanilla"].time_to_first_token == pytest.approx(0.1)
    assert (result.batch_size, len(result.queues), len(result.prompts)) == (2, 2, 13)
    assert (result.categories, result.cache_bytes) == ((), 1000)
    assert result.systems["speculative"].stats.by_drafter["ngram"].drafted == 13 * 10


def test_every_prompts_output_is_compared() -> None:
    systems = [PacedRows("vanilla", [1.0]), PacedRows("speculative", [1.0], tokens=(1, 9, 3))]
    greedy = measure(
        systems, make_prompts(3), tiny.decoder("llama"), GREEDY, batch_size=2, runs=1, warmup=0
    )
    assert greedy.matches is not None
    identity = greedy.matches["speculative"]
    assert (identity.matching, identity.total) == (0, 3)
    assert [parted.id for parted in identity.divergences] == ["p0", "p1", "p2"]
    assert identity.divergences[0].position == 1
    drawing = SamplingParams(temperature=1.0, seed=0)
    sampled = measure(
        systems, make_prompts(3), tiny.decoder("llama"), drawing, batch_size=2, runs=1, warmup=0
    )
    assert sampled.matches == greedy.matches


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batch_system_decodes_each_prompt_as_if_alone(temperature: float) -> None:
    decoder, sampling = tiny.decoder("llama"), SamplingParams(temperature=temperature, seed=3)
    given = [
        BenchPrompt(f"p{i}", None, tuple(tiny.prompt(5 + i, seed=i)), 12 + i) for i in range(5)
    ]
    system = EngineSystem("vanilla", decoder, None, sampling, frozenset(), batch_size=2)
    runs = system.run(given)
    alone = EngineSystem("vanilla", decoder, None, sampling, frozenset())
    assert [run.tokens for run in runs] == [run.tokens for run in alone.run(given)]
    assert [run.stats.decode_tokens for run in runs] == [11, 12, 13, 14, 15]
    assert len({run.cache_bytes for run in runs}) == 1
    one = alone.run(given[-1:])[0].cache_bytes  # the longest: 9 and 16 tokens
    assert one is not None
    assert runs[0].cache_bytes == 2 * one
    end = runs[0].tokens[4]
    ended = replace(system, end_tokens=frozenset({end})).run(given)
    assert ended[0].tokens == runs[0].tokens[: runs[0].tokens.index(end) + 1]


def test_batch_system_drafts() -> None:
    decoder = tiny.decoder("llama")
    free = PassCosts({1: 1.0, 30: 1.0}, 0.0, 0.0, 0.0, 1)  # wider passes cost nothing
    proposer = MixedProposer(decoder, None, CostTable({1: free}, decoder.depth))
    given = [BenchPrompt(f"p{i}", None, tuple(tiny.prompt(6, seed=i) * 4), 30) for i in range(3)]
    plain = EngineSystem("vanilla", decoder, None, GREEDY, frozenset(), 2).run(given)
    drafted = EngineSystem("speculative", decoder, proposer, GREEDY, frozenset(), 2).run(given)
    assert [run.tokens for run in drafted] == [run.tokens for run in plain]
    assert sum(run.stats.drafted for run in drafted) > 0
    assert GenerationStats.total(run.stats for run in plain).by_drafter == {}
