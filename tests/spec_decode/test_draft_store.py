"""Earlier texts: what is drafted from them, what is held of them, and that no text changes."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conflayers_cli.generation.generator import TextGenerator
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.draft_store import DraftStore, OwnedStores
from conflayers_cli.spec_decode.mixed import MixedProposer
from conflayers_cli.spec_decode.ngram import Match, NgramMatcher
from conflayers_cli.spec_decode.suffix_index import BORDER
from tests import tiny
from tests.spec_decode.test_mixed import costs, repetitive

COUNT = 24


def store_of(*texts: list[int], vocabulary: int = 1000, capacity: int = 1024) -> DraftStore:
    store = DraftStore(vocabulary, capacity)
    for text in texts:
        store.add(text)
    return store


def matched(text: list[int], store: DraftStore, count: int = 3) -> Match:
    matcher = NgramMatcher(store)
    matcher.update(text)
    return matcher.lookup(text, [], count)


class TestMatches:
    def test_the_longer_one_is_drafted(self) -> None:
        store = store_of([1, 2, 3, 4, 5, 6])
        assert matched([9, 3, 7, 2, 3], store) == Match(2, (4, 5, 6), stored=True)
        assert matched([1, 2, 3, 8, 1, 2, 3], store_of([2, 3, 4])).tokens == (8, 1, 2)

    def test_of_equally_long_ones_what_followed_most_often_then_the_texts_own(self) -> None:
        own = [2, 3, 7, 8, 2, 3]
        assert matched(own, store_of([5, 2, 3, 4])) == Match(2, (7, 8, 2), agreed=False)
        store = store_of([5, 2, 3, 4], [6, 2, 3, 4])
        assert matched(own, store, 1) == Match(2, (4,), agreed=False, stored=True)
        assert matched(own, store_of([5, 2, 3, 7, 9])) == Match(2, (7, 8, 2))

    def test_texts_end(self) -> None:
        store = store_of([1, 2, 3], [4, 5, 6])
        assert matched([9, 1, 2], store) == Match(2, (3,), stored=True)
        assert matched([9, 2, 3], store) == Match()  # nothing followed
        assert matched([9, 3, 4], store) == Match(1, (5, 6), stored=True)  # not across the border

    def test_unknown_ids_are_never_drafted(self) -> None:
        store = store_of([1, 2, 70, 3, -5, 4], vocabulary=60)
        assert matched([9, 1], store) == Match(1, (2,), stored=True)
        assert store.tokens().tolist() == [1, 2, BORDER, 3, BORDER, 4, BORDER]


class TestWhatIsHeld:
    def test_what_texts_begin_with_alike_is_held_once(self) -> None:
        prompt = list(range(200))
        store = store_of([*prompt, 300], [*prompt, 400, 401], [*prompt, 300], [*prompt, 400])
        assert len(store.tokens()) == 202 + 32 + 3
        assert matched([8, 198, 199], store).tokens in ((300,), (400, 401))
        tail = prompt[-20:]
        assert store.find(tail, 2) == (20, [[400, 401], [300]])

    def test_long_parts_are_held_once_wherever_they_are(self) -> None:
        quoted = list(range(100, 300))
        store = store_of([1, 2, *quoted, 3], [4, 5, 6, *quoted, 7, 8], quoted[20:150])
        assert len(store.tokens()) < 203 + 1 + 2 * (3 + 2 * 32 + 32 + 1)
        assert matched([5, 6], store) == Match(2, (100, 101, 102), stored=True)
        assert store.find([298, 299], 2) == (2, [[7, 8], [3]])

    @given(parts=st.lists(st.sampled_from([0, 40, 80, 7]), max_size=12), cut=st.integers(0, 90))
    def test_every_context_of_an_added_text_is_held(self, parts: list[int], cut: int) -> None:
        """With what followed, whatever was held before."""
        text = [token for start in parts for token in range(start, start + 50 + start % 7)]
        store = store_of(text[cut:], text[: cut // 2], text, capacity=4096)
        for end in range(1, len(text)):
            length, found = store.find(text[max(end - 8, 0) : end], 1)
            assert length >= min(end, 8) or text[end - 1] == text[-1]
            assert length < 8 or [text[end]] in found or len(found) >= 8

    def test_the_earliest_go(self) -> None:
        store = store_of(*([i, i + 1, i + 2] for i in range(0, 900, 3)))
        assert len(store.tokens()) == 1024
        assert store.find([0], 1) == (0, [])
        assert store.find([897], 1) == (1, [[898]])

    def test_a_text_longer_than_the_store(self) -> None:
        store = store_of(list(range(900)) * 3)
        assert len(store.tokens()) <= 1024
        assert store.find([5, 6], 2) == (2, [[7, 8]])

    def test_what_was_gained_is_given_once(self) -> None:
        store = DraftStore(1000, 1024)
        store.load(np.array([1, 2, BORDER], np.int32))
        assert not len(store.take_gained())
        store.add([5, 6])
        assert store.take_gained().tolist() == [5, 6, BORDER]
        assert not len(store.take_gained())

    def test_several_threads(self) -> None:
        store = DraftStore(1000, 1024)

        def work(number: int) -> None:
            for i in range(60):
                store.add([number, *range(i, i + 20)])
                _, found = store.find([number, i], 5)
                assert all(0 <= token < 1000 for tokens in found for token in tokens)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(900, 904)))


@functools.cache
def vanilla(prompt: tuple[int, ...], temperature: float) -> list[int]:
    request = GenerationRequest(prompt, COUNT, SamplingParams(temperature, seed=1))
    (result,) = TextGenerator(tiny.decoder("llama")).generate([request])
    return list(result.token_ids)


def adversary(prompt: list[int], temperature: float) -> list[int]:
    """The text to come, but for every fourth token."""
    text = vanilla(tuple(prompt), temperature)
    return prompt + [(t + 1) % tiny.VOCABULARY if i % 4 == 3 else t for i, t in enumerate(text)]


@settings(max_examples=40)
@given(
    filling=st.sampled_from(["nonsense", "adversary", "right", "hostile", "empty"]),
    plan=st.sampled_from([None, SkipPlan.of(mlp=[2])]),
    lengths=st.lists(st.integers(2, 12), min_size=1, max_size=3),
    temperature=st.sampled_from([0.0, 1.0]),
    together=st.booleans(),
    seed=st.integers(0, 20),
)
def test_what_is_in_a_store_changes_no_text(
    filling: str,
    plan: SkipPlan | None,
    lengths: list[int],
    temperature: float,
    together: bool,
    seed: int,
) -> None:
    """Nor does what it gains while texts are decoded, some of them twice."""
    decoder = tiny.decoder("llama")
    prompts = [repetitive(length, seed + i) for i, length in enumerate(lengths)] * 2
    store = DraftStore(decoder.vocabulary, 256)
    rng = np.random.default_rng(seed)
    for prompt in prompts:
        if filling == "nonsense":
            store.add(rng.integers(0, tiny.VOCABULARY, 200).tolist())
        elif filling == "hostile":
            store.add(np.append(rng.integers(-(2**31), 2**31, 50), prompt))
        elif filling == "adversary":
            store.add(adversary(prompt, temperature))
        elif filling == "right":
            store.add(prompt + vanilla(tuple(prompt), temperature))
    generator = TextGenerator(
        decoder,
        proposer=MixedProposer(decoder, plan, costs(), prior=0.9),
        batch_size=2 if together else 1,
        store=store,
    )
    sampling = SamplingParams(temperature, seed=1)
    results = generator.generate(GenerationRequest(p, COUNT, sampling) for p in prompts)
    for prompt, result in zip(prompts, results, strict=True):
        assert list(result.token_ids) == vanilla(tuple(prompt), temperature)


def test_a_text_that_comes_again_is_drafted_from_the_store() -> None:
    decoder, store = tiny.decoder("llama"), DraftStore(tiny.VOCABULARY, 256)
    proposer = MixedProposer(decoder, None, costs())
    generator = TextGenerator(decoder, proposer=proposer, store=store)
    request = GenerationRequest(tiny.prompt(8, 3), COUNT)
    first, again = generator.generate([request, request])
    assert again.token_ids == first.token_ids
    assert "store" not in first.stats.by_drafter
    assert again.stats.by_drafter["store"].accepted > COUNT // 2
    assert again.stats.steps < first.stats.steps / 2


@pytest.mark.parametrize("size", [1, 2])
def test_owners_draft_from_their_own_texts_alone(size: int) -> None:
    decoder, stores = tiny.decoder("llama"), OwnedStores(tiny.VOCABULARY, 256)
    proposer = MixedProposer(decoder, None, costs())
    generator = TextGenerator(decoder, proposer=proposer, batch_size=size)

    def drafters(*owners: str) -> list[bool]:
        """Whether a store drafted the same text, asked for by each owner at once."""
        results = generator.generate(
            GenerationRequest(tiny.prompt(8, 3), COUNT, store=stores.get(owner)) for owner in owners
        )
        assert len({result.token_ids for result in results}) == 1
        return ["store" in result.stats.by_drafter for result in results]

    assert drafters("a") == [False]
    assert drafters("b", "a") == [False, True]
    assert drafters("c", "b") == [False, True]


def test_the_owners_used_last_are_held() -> None:
    stores = OwnedStores(1000, 256, max_owners=2)
    first, second = stores.get("a"), stores.get("b")
    assert stores.get("a") is first
    stores.get("c")
    assert stores.get("a") is first
    assert stores.get("b") is not second
    assert stores.nbytes == 2 * first.nbytes


def test_a_cancelled_text_is_kept_as_far_as_it_came() -> None:
    decoder, store = tiny.decoder("llama"), DraftStore(tiny.VOCABULARY, 256)
    generator = TextGenerator(decoder, store=store)
    number = generator.add(GenerationRequest(tiny.prompt(8, 3), COUNT))
    generator.step()
    generator.step()
    generator.cancel(number)
    assert len(store.tokens()) == 8 + 2 + 1


@pytest.mark.parametrize("capacity", [100, 128])
def test_the_capacity_is_a_power_of_two(capacity: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        DraftStore(10, capacity)
