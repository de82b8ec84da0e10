"""Trees: how many leaves, which ones, verified in one pass; greedy output stays vanilla's."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.sampler import Sampler
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.sequence import Step
from conflayers_cli.kernels.kv_cache import KV_BLOCK, KVCache
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import Context, Draft, Proposer, SkipProposer
from conflayers_cli.spec_decode.tree import PAPER_SHAPE, TreeShape, leaf_counts
from tests import tiny
from tests.engine.test_lossless import PLANS, SAMPLINGS, assert_cache_is_fresh, output

CPU = torch.device("cpu")
TEXT = tiny.prompt(12, 6)
PLAN = SkipPlan.of_layers([2])
TWO = TreeShape(((0.0, 2),))
SHAPES = st.sampled_from([PAPER_SHAPE, TWO, TreeShape(((0.3, 0), (0.0, 30)))])
# Windows of 7 in Gemma's layers; GPT-2 has learned positions, Mixtral experts.
FAMILIES = ["llama", "mistral", "gemma2", "gemma3", "gpt2", "mixtral"]


# Shapes


@pytest.mark.parametrize(
    "thresholds",
    [
        (),
        ((0.5, 3),),
        ((0.0, 3), (0.5, 1)),
        ((0.5, 3), (0.5, 4), (0.0, 5)),
        ((1.0, 3), (0.0, 5)),
        ((0.5, 3), (-0.1, 5)),
        ((0.0, -1),),
        ((0.0, 1.5),),
        ((0.0, True),),
    ],
)
def test_shapes_that_make_no_sense_are_refused(thresholds: tuple[tuple[float, int], ...]) -> None:
    with pytest.raises(ValueError, match="thresholds"):
        TreeShape(thresholds)


@pytest.mark.parametrize(
    ("top", "leaves"), [(1.0, 3), (0.96, 3), (0.95, 5), (0.8, 8), (0.51, 8), (0.5, 10)]
)
def test_the_papers_counts(top: float, leaves: int) -> None:
    assert PAPER_SHAPE.leaves(top) == leaves
    assert PAPER_SHAPE.max_leaves == 10


# How many leaves stand


def test_without_costs_all_that_are_wanted_stand() -> None:
    chain = [0.97, 0.6, 0.2]
    beside = [[0.01] * 10, [0.2, 0.1, 0.1, 0.0, 0.0], [0.3] + [0.05] * 9]
    assert leaf_counts(chain, beside, PAPER_SHAPE) == (3, 3, 10)
    # The top probability may be another token's than the one drawn.
    assert leaf_counts([], [], PAPER_SHAPE) == ()


def test_numpy_arrays_are_as_good_as_lists() -> None:
    top = np.array([[0.6, 0.3, 0.05, 0.05], [0.9, 0.06, 0.04, 0.0]])
    cost: Callable[[int], float] = lambda width: 1.0 + 0.02 * width  # noqa: E731
    got = leaf_counts(top[:, 0], top[:, 1:], PAPER_SHAPE, cost, 0.3)
    assert got == leaf_counts(top[:, 0].tolist(), top[:, 1:].tolist(), PAPER_SHAPE, cost, 0.3)
    assert all(isinstance(count, int) for count in got)


@st.composite
def drafts(draw: st.DrawFn) -> tuple[list[float], list[list[float]]]:
    """(probabilities of the chain's tokens, and beside each those of others, falling)."""
    chain, beside = [], []
    for _ in range(draw(st.integers(1, 3))):
        parts = draw(st.lists(st.integers(0, 20), min_size=2, max_size=5).filter(any))
        own, *others = (part / sum(parts) for part in parts)
        chain.append(own)
        beside.append(sorted(others, reverse=True))
    return chain, beside


@settings(max_examples=200)
@given(
    draft=drafts(),
    steps=st.lists(st.sampled_from([0.0, 0.0, 0.01, 0.05, 0.3]), min_size=20, max_size=20),
    draft_seconds=st.sampled_from([0.0, 0.3]),
    room=st.none() | st.integers(0, 5),
)
def test_no_other_choice_of_leaves_is_worth_more(
    draft: tuple[list[float], list[list[float]]],
    steps: list[float],
    draft_seconds: float,
    room: int | None,
) -> None:
    """Against all choices there are, under costs that grow in leaps."""
    chain, beside = draft
    shape = TreeShape(((0.7, 1), (0.0, 3)))
    cost = [0.0, *(1.0 + total for total in itertools.accumulate(steps))]
    reach = [1.0, *itertools.accumulate(chain, lambda a, b: a * b)]
    second = (len(chain) * draft_seconds + cost[len(chain) + 1]) / sum(reach)
    limits = [
        min(shape.leaves(max(own, *others)), sum(p > 0 for p in others))
        for own, others in zip(chain, beside, strict=True)
    ]

    def worth(counts: tuple[int, ...]) -> float:
        gain = sum(reach[j] * sum(beside[j][:count]) for j, count in enumerate(counts))
        return gain * second - cost[len(chain) + 1 + sum(counts)]

    got = leaf_counts(chain, beside, shape, cost.__getitem__, draft_seconds, room)
    choices = [
        counts
        for counts in itertools.product(*(range(limit + 1) for limit in limits))
        if room is None or sum(counts) <= room
    ]
    assert got in choices
    assert worth(got) >= max(map(worth, choices)) - 1e-12


def test_where_width_costs_more_than_it_earns_the_tree_is_the_chain() -> None:
    chain, beside = [0.5, 0.5], [[0.3, 0.1], [0.3, 0.1]]
    free, dear = (lambda width: 1.0), (lambda width: float(width))
    assert leaf_counts(chain, beside, TWO, free) == (2, 2)
    assert leaf_counts(chain, beside, TWO, dear) == (0, 0)
    # Four tokens cost no more than eight: beyond the leap there is room for all.
    leap = lambda width: 1.0 if width <= 3 else 1.2  # noqa: E731
    assert leaf_counts(chain, beside, TWO, leap) == (2, 2)
    assert leaf_counts(chain, beside, TreeShape(((0.0, 1),)), lambda w: 1 + (w > 4) / 2) == (1, 0)


# Passes with slots


def prefilled(decoder: Decoder, text: list[int], capacity: int = 64) -> KVCache:
    cache = decoder.new_cache(capacity)
    decoder.prefill(torch.tensor([text]), cache)
    return cache


@pytest.mark.parametrize("family", FAMILIES)
def test_slots_that_are_the_positions_change_nothing(family: str) -> None:
    decoder = tiny.decoder(family)
    tokens, positions = torch.tensor([[3, 4, 5]]), torch.arange(12, 15)[None]
    expected = decoder.forward(tokens, positions, prefilled(decoder, TEXT))
    got = decoder.forward(tokens, positions, prefilled(decoder, TEXT), slots=positions)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_node_sees_its_ancestors_and_itself_only(family: str) -> None:
    """Every node's logits are those of a pass over the text, its ancestors and itself."""
    decoder = tiny.decoder(family)
    draft = Draft((3, 4, 5), leaves=((20, 21), (), (22,)))
    tokens = torch.tensor([[TEXT[-1], *draft.nodes]])
    positions = torch.tensor([[11, 12, 13, 14, 12, 12, 14]])
    cache = prefilled(decoder, TEXT[:-1])
    logits = decoder.forward(tokens, positions, cache, slots=torch.arange(11, 18)[None])[0]
    for row, path in enumerate([[], [3], [3, 4], [3, 4, 5], [20], [21], [3, 4, 22]]):
        alone = decoder.new_cache(64)
        expected = decoder.prefill(torch.tensor([TEXT + path]), alone)[0, -1]
        torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)
    # The last leaf moves to its place: the cache is that of its text.
    cache.move(17, 14)
    for got, want in zip(cache.layers, alone.layers, strict=True):
        torch.testing.assert_close(got.keys[:, :, :15], want.keys[:, :, :15], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            got.values[:, :, :15], want.values[:, :, :15], rtol=1e-4, atol=1e-5
        )


def test_the_extent_covers_slots_far_behind() -> None:
    decoder = tiny.decoder("gemma2")
    cache = prefilled(decoder, TEXT, KV_BLOCK + 10)
    tokens, position = torch.tensor([[7]]), torch.tensor([[len(TEXT)]])
    far = decoder.forward(tokens, position, cache, slots=torch.tensor([[KV_BLOCK + 3]]))
    near = decoder.forward(tokens, position, cache)
    torch.testing.assert_close(far, near, rtol=1e-4, atol=1e-4)


def test_moving_touches_one_slot_of_the_layers_in_use() -> None:
    cache = KVCache(2, 2, 10)
    keys, values = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    cache.set_slots(torch.arange(4).expand(2, -1), KV_BLOCK)
    cache.update(keys, values, 1)
    cache.move(3, 1)
    order = [0, 3, 2, 3]
    assert not cache.layers[0].is_initialized
    assert torch.equal(cache.layers[1].keys[:, :, :4], keys[:, :, order])
    assert torch.equal(cache.layers[1].values[:, :, :4], values[:, :, order])


def test_passes_are_counted() -> None:
    decoder = Decoder(tiny.build(tiny.CONFIGS["llama"]()))
    assert (decoder.full_passes, decoder.draft_passes) == (0, 0)
    proposer = SkipProposer(decoder, PLAN, 3, 0.0, TWO)
    steps = tiny.steps_of(Generation(decoder, GenerationRequest(TEXT, 20), proposer=proposer))
    assert decoder.full_passes == len(steps)
    assert decoder.draft_passes == sum(step.drafted for step in steps) > 0


# Penalties


@given(
    seen=st.lists(st.integers(0, 19)),
    nodes=st.lists(st.tuples(st.integers(0, 19), st.integers(0, 5)), max_size=6),
    seed=st.integers(0, 1000),
)
def test_rows_are_penalised_for_their_ancestors(
    seen: list[int], nodes: list[tuple[int, int]], seed: int
) -> None:
    setting = SamplingParams(1.0, repetition_penalty=1.4, seed=0)
    drafted = [token for token, _ in nodes]
    parents = [min(parent, row) for row, (_, parent) in enumerate(nodes)]
    logits = torch.randn(len(nodes) + 1, 20, generator=torch.Generator().manual_seed(seed))
    sampler = Sampler(setting, 20, CPU)
    sampler.mark_seen(seen)
    together = sampler.scores(logits, drafted, parents)
    paths = [list(seen)]
    for token, parent in zip(drafted, parents, strict=True):
        paths.append([*paths[parent], token])
    for row, path in enumerate(paths):
        alone = Sampler(setting, 20, CPU)
        alone.mark_seen(path)
        assert torch.equal(together[row], alone.scores(logits[row : row + 1])[0])


# The drafter


def context(decoder: Decoder, sampling: SamplingParams, capacity: int = 64) -> Context:
    """A text whose tokens but the last are in the cache, by the full model."""
    cache = prefilled(decoder, TEXT[:-1], capacity)
    sampler = Sampler(sampling, decoder.vocabulary, decoder.device, TEXT)
    return Context(list(TEXT), cache, sampler)


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_leaves_are_the_next_best_tokens(penalty: float) -> None:
    decoder, sampling = tiny.decoder("llama"), SamplingParams(repetition_penalty=penalty)
    chain = SkipProposer(decoder, PLAN, 5, 0.2).propose(context(decoder, sampling), 20)
    draft = SkipProposer(decoder, PLAN, 5, 0.2, TWO).propose(context(decoder, sampling), 20)
    assert draft.tokens == chain.tokens
    assert chain.leaves == () and chain.width == len(chain.tokens)
    assert draft.width == 3 * len(chain.tokens)
    cache = prefilled(decoder, TEXT[:-1])
    fed = torch.tensor([[TEXT[-1], *draft.tokens[:-1]]])
    logits = decoder.forward(fed, torch.arange(11, 11 + fed.shape[1])[None], cache, PLAN)[0]
    scores = context(decoder, sampling).sampler.scores(logits, draft.tokens[:-1])
    ranked = scores.topk(3).indices.tolist()
    assert [[t, *side] for t, side in zip(draft.tokens, draft.leaves, strict=True)] == ranked


def test_sampled_leaves_are_next_in_the_race() -> None:
    """The token that the race would give without the winner is the first leaf, and so on."""
    decoder, some = tiny.decoder("llama"), 0
    for seed in range(20):
        sampling = SamplingParams(1.0, seed=seed)
        chain = SkipProposer(decoder, PLAN, 5, 0.0).propose(context(decoder, sampling), 20)
        draft = SkipProposer(decoder, PLAN, 5, 0.0, TWO).propose(context(decoder, sampling), 20)
        assert draft.tokens == chain.tokens
        tokens = torch.tensor([[TEXT[-1], *draft.tokens[:-1]]])
        positions = torch.arange(len(TEXT) - 1, len(TEXT) + len(draft.tokens) - 1)[None]
        own = context(decoder, sampling)
        logits = decoder.forward(tokens, positions, own.cache, PLAN)[0].clone()
        for i, (token, side) in enumerate(zip(draft.tokens, draft.leaves, strict=True)):
            for each in (token, *side):
                row = logits[i : i + 1]
                assert own.sampler.choose(row, len(TEXT) + i) == [each]
                row[0, each] = -torch.inf
            some += len(side)
    assert some > 20


@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(1.0, seed=2)], ids=["greedy", "sampled"]
)
def test_leaves_keep_to_the_room_in_the_cache(sampling: SamplingParams) -> None:
    decoder = tiny.decoder("llama")
    text = tiny.prompt(KV_BLOCK - 10, 1)
    cache = prefilled(decoder, text[:-1], KV_BLOCK)
    sampler = Sampler(sampling, decoder.vocabulary, decoder.device)
    proposer = SkipProposer(decoder, PLAN, 4, 0.0, TreeShape(((0.0, 10),)))
    draft = proposer.propose(Context(text, cache, sampler), 20)
    # Slots of the pending token, the chain, and the leaves: the last one is the cache's last.
    assert len(text) + draft.width == cache.capacity == KV_BLOCK
    proposer = SkipProposer(decoder, PLAN, 10, 0.0, TreeShape(((0.0, 10),)))
    assert proposer.propose(Context(text, cache, sampler), 20).width == 10


def test_costs_reach_the_drafter() -> None:
    decoder = tiny.decoder("llama")
    widths: list[int] = []

    def cost(width: int) -> float:
        widths.append(width)
        return 1.0 if width <= 7 else 100.0

    proposer = SkipProposer(decoder, PLAN, 4, 0.0, PAPER_SHAPE, cost, 0.5)
    draft = proposer.propose(context(decoder, SamplingParams()), 20)
    assert draft.width + 1 == 7
    assert min(widths) == 5


def test_leaves_without_a_place_are_refused() -> None:
    with pytest.raises(ValueError, match="1 sets of leaves for 2 tokens"):
        Draft((1, 2), leaves=((3,),))


# Whole texts


@settings(max_examples=60)
@given(
    family=st.sampled_from(FAMILIES),
    plan=PLANS,
    size=st.integers(1, 9),
    stop=st.sampled_from([0.0, 0.3, 0.8]),
    shape=SHAPES,
    slope=st.none() | st.sampled_from([0.0, 0.01, 0.1]),
    count=st.integers(1, 30),
    length=st.integers(1, 20),
    sampling=SAMPLINGS,
    seed=st.integers(0, 1000),
)
def test_output_is_vanillas(
    family: str,
    plan: SkipPlan,
    size: int,
    stop: float,
    shape: TreeShape,
    slope: float | None,
    count: int,
    length: int,
    sampling: SamplingParams,
    seed: int,
) -> None:
    decoder, prompt = tiny.decoder(family), tiny.prompt(length, seed)
    cost = None if slope is None else lambda width: 1 + slope * width
    proposer = SkipProposer(decoder, plan, size, stop, shape, cost, 0.3)
    got = output(decoder, prompt, count, sampling=sampling, proposer=proposer)
    assert got == output(decoder, prompt, count, sampling=sampling)
    assert len(got) == count


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=1.0, seed=3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_after_every_step(family: str, sampling: SamplingParams) -> None:
    decoder = tiny.decoder(family)
    proposer = SkipProposer(decoder, SkipPlan.of([2], [1, 2]), 4, 0.0, PAPER_SHAPE)
    generation = Generation(
        decoder, GenerationRequest(tiny.prompt(9, 4), 40, sampling), proposer=proposer
    )
    moves = counted_moves(generation)
    for step in generation:
        assert_cache_is_fresh(generation)
        assert 0 <= step.accepted <= step.drafted
        assert len(step.tokens) == min(step.accepted + 1, 40)
    assert len(moves) >= 3  # leaves took the place of drafts


def counted_moves(generation: Generation) -> list[tuple[int, int]]:
    """(source, target) of every key moved from now on: of every leaf accepted."""
    moves, move = [], generation.cache.move

    def note(source: int, target: int) -> None:
        moves.append((source, target))
        move(source, target)

    generation.cache.move = note  # type: ignore[method-assign]
    return moves


def test_leaves_gain_tokens() -> None:
    decoder = tiny.decoder("llama")
    steps: dict[bool, int] = {}
    for tree in (False, True):
        plan = SkipPlan.of_layers([1, 3])
        proposer = SkipProposer(decoder, plan, 4, 0.0, PAPER_SHAPE if tree else None)
        taken = tiny.steps_of(Generation(decoder, GenerationRequest(TEXT, 60), proposer=proposer))
        assert any(step.leaves for step in taken) == tree
        steps[tree] = len(taken)
    assert steps[True] < 0.8 * steps[False]


@dataclass
class Missing:
    """Drafts the coming text, but for one token that stands among its leaves only."""

    text: list[int]
    start: int
    size: int
    miss: int
    place: int = 1
    name: str = "missing"

    def propose(self, context: Context, limit: int) -> Draft:
        at = len(context.tokens) - self.start
        tokens = self.text[at : at + min(self.size, limit)]
        leaves: list[tuple[int, ...]] = [()] * len(tokens)
        if self.miss < len(tokens):
            right = tokens[self.miss]
            tokens[self.miss] = (right + 1) % tiny.VOCABULARY
            side = [(right + 2 + i) % tiny.VOCABULARY for i in range(2)]
            side.insert(self.place, right)
            leaves[self.miss] = tuple(side)
        return Draft(tuple(tokens), leaves=tuple(leaves))


def missing(size: int, miss: int, count: int = 24, place: int = 1) -> tuple[list[int], Proposer]:
    text = output(tiny.decoder("llama"), TEXT, count + 10)
    return text[:count], Missing(text, len(TEXT), size, miss, place)


def steps_with(proposer: Proposer, count: int = 24, **more: Any) -> tuple[Generation, list[Step]]:
    generation = tiny.generation(tiny.decoder("llama"), TEXT, count, proposer=proposer, **more)
    return generation, tiny.steps_of(generation)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(("size", "miss"), [(1, 0), (4, 0), (4, 2), (4, 3)])
def test_an_accepted_leaf_brings_the_token_behind_it(size: int, miss: int, place: int) -> None:
    text, proposer = missing(size, miss, place=place)
    generation, steps = steps_with(proposer)
    assert generation.output == text
    whole = [step for step in steps if step.drafted == size]  # the last ones find less room
    assert len(whole) > 3
    for step in whole:
        assert (step.leaves, step.accepted, len(step.tokens)) == (3, miss + 1, miss + 2)


@pytest.mark.parametrize("count", range(2, 12))
def test_the_budget_is_exact(count: int) -> None:
    text, proposer = missing(4, 3, count)
    generation, steps = steps_with(proposer, count)
    assert generation.output == text
    assert generation.finish == "length"
    assert all(len(step.tokens) == step.accepted + 1 for step in steps)


@pytest.mark.parametrize("at", range(1, 8))
def test_an_end_token_cuts_what_follows(at: int) -> None:
    """As an accepted leaf, before one, or right behind it."""
    text, proposer = missing(4, 2)
    end = text[at]
    generation, steps = steps_with(proposer, end_tokens=frozenset([end]))
    assert generation.output == text[: text.index(end) + 1]
    assert generation.finish == "stop"
    assert all(step.accepted <= len(step.tokens) for step in steps)


def test_watch_sees_every_token_once() -> None:
    text, proposer = missing(4, 2)
    seen: list[int] = []

    def watch(token: int) -> bool:
        seen.append(token)
        return False

    generation, _ = steps_with(proposer, on_token=watch)
    assert seen == generation.output == text


@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(1.0, seed=2)], ids=["greedy", "sampled"]
)
def test_to_the_last_slot_and_the_last_learned_position(sampling: SamplingParams) -> None:
    """Chain and leaves find their slots, and no position the model hasn't learned is asked for."""
    for family, length in (("gpt2", 256), ("llama", KV_BLOCK)):
        decoder = tiny.decoder(family)
        prompt = tiny.prompt(length - 30, 2)
        proposer = SkipProposer(decoder, PLAN, 25, 0.0, PAPER_SHAPE)
        got = output(decoder, prompt, 30, sampling=sampling, proposer=proposer)
        assert len(got) == 30
        assert got == output(decoder, prompt, 30, sampling=sampling)


def test_a_leaf_that_only_opens_the_next_draft_must_earn_its_cost_by_that() -> None:
    chain, beside = (0.5, 0.5, 0.5), [(0.4, 0.05)] * 3
    cheap = leaf_counts(chain, beside, PAPER_SHAPE, lambda width: 10 + 0.5 * width, 1.0)
    dear = leaf_counts(
        chain, beside, PAPER_SHAPE, lambda width: 10 + 0.5 * width, 1.0, only_draft=True
    )
    assert sum(cheap) > 0
    assert sum(dear) == 0
    free = leaf_counts(chain, beside, PAPER_SHAPE, lambda width: 10.0, 1.0, only_draft=True)
    assert free == (2, 2, 2)
