"""Recorded passes give what passes run one by one give, bit for bit."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conflayers_cli.engine.cost_model import CostTable, PassCosts
from conflayers_cli.engine.cuda_graphs import DeviceWork
from conflayers_cli.engine.decoder import FULL, Decoder
from conflayers_cli.engine.graph_runner import (
    EAGER_FIRST,
    MAX_GRAPHS,
    WIDTHS,
    GraphRunner,
    bucket_kv_len,
)
from conflayers_cli.generation.batch import Batch
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.kernels.kv_cache import KV_BLOCK, KVCache
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.mixed import MixedProposer
from conflayers_cli.spec_decode.proposer import Proposer, SkipProposer
from conflayers_cli.spec_decode.tree import TreeShape
from tests import tiny
from tests.kernels.tape import TapeRecorder

pytestmark = pytest.mark.usefixtures("without_native")

MIDDLE = st.sets(st.integers(1, tiny.DEPTH - 2))
PLANS = st.builds(SkipPlan.of, MIDDLE, MIDDLE, weights=st.sampled_from([None, "int4"]))
PLAN = SkipPlan.of_layers([1, 3])


def recording(family: str = "llama", dtype: torch.dtype = torch.float32) -> Decoder:
    """A new decoder that records."""
    model = tiny.build(tiny.CONFIGS[family](), dtype=dtype)
    return Decoder(model, recorder=TapeRecorder())


@functools.cache
def recorded(family: str) -> Decoder:
    """One for the whole run, with what other tests have left in it."""
    return recording(family)


def tapes(decoder: Decoder) -> int:
    runner = decoder.runner
    assert isinstance(runner, GraphRunner)
    assert isinstance(runner._recorder, TapeRecorder)
    return runner._recorder.tapes


def free(turnaround: float = 0.0) -> CostTable:
    """Costs that make every draft pay."""
    one = PassCosts(
        {width: 1.0 + 0.001 * width for width in range(1, 30)},
        floor=0.01,
        attention=0.0,
        mlp=0.0,
        context=64,
        turnaround=turnaround,
    )
    return CostTable({1: one}, depth=tiny.DEPTH)


def output(decoder: Decoder, prompt: list[int], count: int = 24, **more: Any) -> list[int]:
    generation = tiny.generation(decoder, prompt, count, **more)
    tiny.steps_of(generation)
    return generation.output


def drafters(decoder: Decoder) -> dict[str, Proposer | None]:
    return {
        "vanilla": None,
        "chain": SkipProposer(decoder, PLAN, 4, 0.0),
        "tree": SkipProposer(decoder, PLAN, 4, 0.0, tree=TreeShape(((0.0, 2),))),
        "mixed": MixedProposer(decoder, PLAN, free()),
        "ahead": MixedProposer(decoder, PLAN, free(turnaround=9.0)),
    }


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family(family: str) -> None:
    """Where a family can't be recorded it says so, and goes on as before."""
    decoder, plain = recording(family), tiny.decoder(family)
    prompt = tiny.prompt(9)
    plan = PLAN
    for _ in range(2):
        assert output(decoder, prompt) == output(plain, prompt)
        proposer = SkipProposer(decoder, plan, 3, 0.0)
        assert output(decoder, prompt, proposer=proposer) == output(plain, prompt)
    if decoder.runner.reason is None:
        assert decoder.runner.graphs > 0
    else:
        assert "recording a pass failed" in decoder.runner.reason
        assert decoder.runner.graphs == 0


def test_most_families_can_be_recorded() -> None:
    refused = set()
    for family in tiny.FAMILIES:
        decoder = recorded(family)
        output(decoder, tiny.prompt(5), 8)
        if decoder.runner.reason is not None:
            refused.add(family)
    assert refused <= {"mixtral", "gpt-oss"}  # experts: which ones run depends on values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["vanilla", "chain", "tree", "mixed", "ahead"])
def test_every_way_of_drafting(kind: str, dtype: torch.dtype) -> None:
    decoder = recording(dtype=dtype)
    proposer = drafters(decoder)[kind]
    for seed in range(3):
        prompt = tiny.prompt(5 + seed, seed)
        eager = Decoder(decoder.model)
        assert output(decoder, prompt, proposer=proposer) == output(eager, prompt)
    assert tapes(decoder) > 0
    assert decoder.runner.reason is None


@settings(max_examples=40)
@given(
    family=st.sampled_from(["llama", "mistral", "gemma2"]),
    plan=PLANS,
    width=st.integers(1, 9),
    rows=st.integers(1, 3),
    length=st.integers(1, 30),
    treelike=st.booleans(),
    last_only=st.booleans(),
)
def test_logits(
    family: str,
    plan: SkipPlan,
    width: int,
    rows: int,
    length: int,
    treelike: bool,
    last_only: bool,
) -> None:
    """Of the first passes, which run as they are, of the recorded one, and of replays."""
    decoder, plain = recorded(family), tiny.decoder(family)
    generator = torch.Generator().manual_seed(width)
    prompt = torch.randint(tiny.VOCABULARY, (rows, length), generator=generator)
    caches = decoder.new_cache(80, rows), plain.new_cache(80, rows)
    for one, cache in zip((decoder, plain), caches, strict=True):
        one.prefill(prompt, cache)
    slots = torch.arange(length, length + width).expand(rows, -1)
    positions = slots.clone()
    if treelike and width > 1:
        positions[:, -1] -= 1  # beside the one before it
    for _ in range(EAGER_FIRST + 2):
        tokens = torch.randint(tiny.VOCABULARY, (rows, width), generator=generator)
        got, expected = (
            one.forward(
                *(tokens, positions, cache, plan),
                slots=slots if treelike else None,
                last_only=last_only,
            )
            for one, cache in zip((decoder, plain), caches, strict=True)
        )
        # Float32 rows have the same bits only where there are as many of them.
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


def test_bfloat16_logits_to_the_bit() -> None:
    decoder = recording(dtype=torch.bfloat16)
    plain = Decoder(decoder.model)
    prompt = torch.tensor([tiny.prompt(20)])
    caches = decoder.new_cache(80), plain.new_cache(80)
    for one, cache in zip((decoder, plain), caches, strict=True):
        one.prefill(prompt, cache)
    for width in (*range(1, 12), *range(1, 12), *range(1, 12)):
        tokens = torch.tensor([tiny.prompt(width, width)])
        places = torch.arange(20, 20 + width)[None]
        got, expected = (
            one.forward(tokens, places, cache)
            for one, cache in zip((decoder, plain), caches, strict=True)
        )
        assert torch.equal(got, expected)
    widths = {each for each in WIDTHS if each <= 12}
    assert tapes(decoder) == len(widths)


def test_what_is_returned_stays_as_it_is() -> None:
    decoder = recording()
    cache = decoder.new_cache(32)
    passes = [
        decoder.forward(torch.tensor([[token]]), torch.tensor([[0]]), cache)
        for token in (3, 4, 5, 3, 4, 5)
    ]
    assert tapes(decoder) == 1
    for one, other in zip(passes[:3], passes[3:], strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(passes[0], passes[1])


def test_a_changed_plan_leaves_the_whole_models_graphs() -> None:
    decoder = recording()
    prompt = tiny.prompt(6)
    for _ in range(EAGER_FIRST + 2):
        output(decoder, prompt, proposer=SkipProposer(decoder, PLAN, 3, 0.0))
    before = tapes(decoder)
    output(decoder, prompt, proposer=SkipProposer(decoder, PLAN, 3, 0.0))
    assert tapes(decoder) == before  # nothing new in the same text
    other = SkipPlan.of_layers([2])
    cache = decoder.new_cache(64)
    for _ in range(EAGER_FIRST + 1):
        decoder.forward(torch.tensor([[1]]), torch.tensor([[0]]), cache, other)
    assert tapes(decoder) == before + 1
    decoder.forward(torch.tensor([[1]]), torch.tensor([[0]]), cache, FULL)
    assert tapes(decoder) == before + 1


def test_passes_tried_once_or_twice_are_not_recorded() -> None:
    decoder = recording()
    cache = decoder.new_cache(64)
    for layer in range(1, tiny.DEPTH - 1):
        for _ in range(EAGER_FIRST):
            plan = SkipPlan.of_layers([layer])
            decoder.forward(torch.tensor([[1]]), torch.tensor([[0]]), cache, plan)
    assert tapes(decoder) == 0


def test_only_the_latest_graphs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conflayers_cli.engine.graph_runner.MAX_GRAPHS", 2)
    decoder = recording()
    cache = decoder.new_cache(64)

    def run(width: int) -> None:
        tokens = torch.arange(width)[None]
        decoder.forward(tokens, tokens, cache)

    for width in (1, 2, 3):
        for _ in range(EAGER_FIRST + 1):
            run(width)
    assert (tapes(decoder), decoder.runner.graphs) == (3, 2)
    run(3)
    run(2)
    assert tapes(decoder) == 3  # these were kept
    assert MAX_GRAPHS > 2


def test_long_passes_are_not_recorded() -> None:
    decoder = recording()
    for seed in range(4):
        output(decoder, tiny.prompt(70, seed), 1)
    assert tapes(decoder) == 0


class _Refuses(TapeRecorder):
    def record(self, work: DeviceWork) -> tuple[torch.Tensor, Callable[[], None]]:
        raise RuntimeError("no graph for you\nand a long story")


def test_what_cant_be_recorded_is_run_and_told() -> None:
    decoder = Decoder(tiny.build(tiny.CONFIGS["llama"]()), recorder=_Refuses())
    proposer = MixedProposer(decoder, PLAN, free(turnaround=9.0))
    prompt = tiny.prompt(9)
    expected = output(tiny.decoder("llama"), prompt)
    assert output(decoder, prompt) == expected
    assert output(decoder, prompt, proposer=proposer) == expected
    assert decoder.runner.reason == "recording a pass failed: no graph for you"
    assert decoder.decode_ahead(1, 0, decoder.new_cache(9)) is None


def test_reasons_for_running_one_by_one() -> None:
    model = tiny.build(tiny.CONFIGS["llama"]())
    assert Decoder(model).runner.reason == "there are no graphs on cpu"
    asked = Decoder(model, recorder=TapeRecorder(), eager="asked for")
    assert asked.runner.reason == "asked for"
    assert asked.decode_ahead(1, 0, asked.new_cache(9)) is None


def test_observers_see_every_pass() -> None:
    """Replays run no modules; so while somebody watches them nothing is replayed."""
    decoder = recording()
    prompt = tiny.prompt(8)
    expected = output(decoder, prompt)
    seen: list[int] = []
    generation = Generation(decoder, GenerationRequest(prompt, 12))
    for number, _ in enumerate(generation):
        if number == 5:
            break
    with decoder.observing(lambda kind, layer, out: seen.append(layer)):
        generation.step()
    assert len(seen) == 2 * tiny.DEPTH
    tiny.steps_of(generation)
    assert generation.output == expected[:12]


def test_batches() -> None:
    decoder, plain = recording(), tiny.decoder("llama")
    requests = [
        GenerationRequest(tiny.prompt(4 + 3 * i, i), 6 + 5 * i, SamplingParams()) for i in range(5)
    ]
    for proposer in (None, MixedProposer(decoder, PLAN, free())):
        batch = Batch(decoder, requests, size=3, proposer=proposer)
        batch.run()
        for request, tokens in zip(requests, batch.outputs, strict=True):
            assert tokens == output(plain, list(request.prompt), request.max_new_tokens)
    assert tapes(decoder) > 0


@given(length=st.integers(1, 200_000))
def test_buckets(length: int) -> None:
    bucket = bucket_kv_len(length)
    assert bucket >= length
    assert bucket % KV_BLOCK == 0
    assert bucket_kv_len(bucket) == bucket
    assert bucket <= max(KV_BLOCK, 2 * length)


def test_extents_are_few() -> None:
    assert len({bucket_kv_len(length) for length in range(1, 131_072)}) <= 2 * 9
    assert [bucket_kv_len(n) // KV_BLOCK for n in (1, 513, 1025, 1537, 2049, 3073)] == [
        *(1, 2, 3, 4, 6, 8)
    ]


class TestFeed:
    """Passes that feed themselves."""

    @staticmethod
    def begun(decoder: Decoder, prompt: list[int]) -> tuple[KVCache, int]:
        """A cache with a prompt, and the first token behind it."""
        cache = decoder.new_cache(60)
        logits = decoder.prefill(torch.tensor([prompt]), cache)
        return cache, int(logits[0, -1].argmax())

    @pytest.mark.parametrize("ahead", [1, 2, 5])
    @pytest.mark.parametrize("plan", [FULL, PLAN], ids=["full", "plan"])
    def test_is_greedy_decoding(self, ahead: int, plan: SkipPlan) -> None:
        decoder, plain = recorded("llama"), tiny.decoder("llama")
        prompt = tiny.prompt(7, 3)
        cache, first = self.begun(decoder, prompt)
        other, same = self.begun(plain, prompt)
        assert first == same
        feed = decoder.decode_ahead(first, len(prompt), cache, plan)
        assert feed is not None
        token = first
        for place in range(len(prompt), len(prompt) + 20):
            assert feed.continues_from(token, place)
            feed.launch(ahead - feed.ahead)
            choice = feed.read()
            logits = plain.forward(torch.tensor([[token]]), torch.tensor([[place]]), other, plan)
            token = int(logits[0, -1].argmax())
            assert choice.token == token
            first, second = logits[0, -1].double().topk(2).values
            assert choice.confidence == pytest.approx(
                float(torch.sigmoid(first - second)), rel=1e-4
            )

    def test_rows_that_take_turns(self) -> None:
        decoder = recording()
        prompts = [tiny.prompt(6, seed) for seed in range(3)]
        expected = [output(tiny.decoder("llama"), prompt, 20) for prompt in prompts]
        generations = [Generation(decoder, GenerationRequest(prompt, 20)) for prompt in prompts]
        while any(generation.finish is None for generation in generations):
            for number, generation in enumerate(generations):
                for _ in range(1 + number):
                    if generation.finish is None:
                        generation.step()
        assert [generation.output for generation in generations] == expected

    def test_stays_within_the_cache(self) -> None:
        decoder = recording()
        cache = decoder.new_cache(10)
        feed = decoder.decode_ahead(1, cache.capacity - 2, cache)
        assert feed is not None
        feed.launch(5)
        assert feed.ahead == 2

    def test_the_drafter_may_come_and_go(self) -> None:
        """What was launched ahead before it came is of another place of the text."""
        decoder = recording()
        prompt = tiny.prompt(7)
        expected = output(tiny.decoder("llama"), prompt, 30)
        generation = Generation(decoder, GenerationRequest(prompt, 30))
        proposer = SkipProposer(decoder, SkipPlan.of(mlp=[2]), 3, 0.0)
        for number, _ in enumerate(generation):
            generation.proposer = proposer if number in (3, 4, 9) else None
        assert generation.output == expected

    def test_no_more_passes_than_tokens(self) -> None:
        decoder = recording()
        passes = decoder.full_passes
        output(decoder, tiny.prompt(5), 9)
        assert decoder.full_passes - passes == 1 + 8

    def test_drafting_ahead_saves_what_it_promises(self) -> None:
        """Where turning round costs more than a pass, the next one is begun before it is asked for;
        what it drafted is used."""
        decoder = recording()
        prompt = tiny.prompt(9)
        expected = output(tiny.decoder("llama"), prompt, 40)
        counts = {}
        for turnaround in (0.0, 9.0):
            costs = free(turnaround=turnaround)
            proposer = MixedProposer(decoder, SkipPlan.of(mlp=[2]), costs, ngram=False)
            before = decoder.draft_passes
            generation = Generation(decoder, GenerationRequest(prompt, 40), proposer=proposer)
            steps = tiny.steps_of(generation)
            assert generation.output == expected
            counts[turnaround] = (
                decoder.draft_passes - before,
                sum(step.drafted for step in steps),
            )
        assert counts[9.0][0] > counts[0.0][0]  # some were for nothing
        assert counts[9.0][1] == counts[0.0][1] > 0  # the drafts are the same

    def test_sampled_rows_have_none(self) -> None:
        decoder = recording()
        plain = tiny.decoder("llama")
        for sampling in (
            SamplingParams(temperature=0.8, seed=3),
            SamplingParams(repetition_penalty=1.3),
        ):
            prompt = tiny.prompt(9)
            proposer = MixedProposer(decoder, PLAN, free(turnaround=9.0))
            got = output(decoder, prompt, sampling=sampling, proposer=proposer)
            same = MixedProposer(plain, PLAN, free())
            assert got == output(plain, prompt, sampling=sampling, proposer=same)


class TestPool:
    """Memory that serves one text after another."""

    def test_memory_comes_back(self) -> None:
        decoder = recording()
        cache = decoder.new_cache(100)
        number, keys = cache.buffer.number, cache.layers[0].keys.data_ptr()
        cache.layers[0].keys.fill_(7)
        del cache
        again = decoder.new_cache(90)
        assert again.buffer.number == number
        assert again.layers[0].keys.data_ptr() == keys
        assert not again.layers[0].keys.any()

    def test_it_may_be_taken_in_inference_mode_first(self) -> None:
        decoder = recording()
        with torch.inference_mode():
            number = decoder.new_cache(100).buffer.number
        cache = decoder.new_cache(100)
        assert cache.buffer.number == number
        cache.layers[0].keys.fill_(7)

    def test_two_caches_at_once_have_memory_of_their_own(self) -> None:
        decoder = recording()
        one, other = decoder.new_cache(100), decoder.new_cache(100)
        assert one.buffer.number != other.buffer.number
        assert one.layers[0].keys.data_ptr() != other.layers[0].keys.data_ptr()

    def test_a_view_holds_on_to_it(self) -> None:
        decoder = recording()
        cache = decoder.new_cache(100, 3)
        view, number = cache.view(1, 3), cache.buffer.number
        assert view.buffer == (number, 1, 3)
        assert view.view(1, 2).buffer == (number, 2, 3)
        del cache
        gc.collect()
        assert decoder.new_cache(100, 3).buffer.number != number

    def test_longer_texts_take_other_memory_and_give_up_the_graphs(self) -> None:
        decoder = recording()
        prompt = tiny.prompt(6)
        for _ in range(2):
            output(decoder, prompt)
        assert decoder.runner.graphs > 0
        big = decoder.new_cache(5 * KV_BLOCK)
        assert big.capacity == 6 * KV_BLOCK
        assert decoder.runner.graphs == 0
        assert output(decoder, prompt) == output(tiny.decoder("llama"), prompt)

    def test_memory_much_too_long_is_not_taken(self) -> None:
        decoder = recording()
        number = decoder.new_cache(100 * KV_BLOCK).buffer.number
        assert decoder.new_cache(10).buffer.number != number


def test_kinds_of_passes_are_told_apart() -> None:
    """A pass under a plan, or with fewer logits, has a recording of its own."""
    decoder = recording()
    tokens = torch.tensor([[1, 2]])
    cache = decoder.new_cache(8)
    for number, (plan, last_only) in enumerate([(FULL, False), (PLAN, False), (FULL, True)], 1):
        for _ in range(EAGER_FIRST + 1):
            decoder.forward(tokens, torch.tensor([[0, 1]]), cache, plan, last_only=last_only)
        assert tapes(decoder) == number
