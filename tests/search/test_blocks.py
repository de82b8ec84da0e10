"""Which runs of layers are looked at, and the maps fitted for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.search import blocks as module
from conflayers_cli.search.blocks import Block, Fitter, candidates, neighbours
from conflayers_cli.search.corpus import Sample
from conflayers_cli.search.ridge import RIDGE, Moments
from conflayers_cli.search.states import Chunk, Reader
from tests import tiny

SIZE, DEPTH = 6, 7
PLENTY = 1 << 30
MATRIX = 8 * SIZE**2
"""Bytes of one matrix of sums."""
BLOCKS: list[Block] = [(1, 3), (1, 5), (2, 6), (3, 6), (4, 6)]


class Readings:
    """A reader of made-up hidden states, which counts how often they are read."""

    def __init__(self, lengths: Sequence[int], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.asked: list[tuple[tuple[int, ...], int | None]] = []
        self.texts = [self._chunk(length, generator) for length in lengths]
        self.tokens = sum(lengths)

    def _chunk(self, length: int, generator: torch.Generator) -> Chunk:
        states = [torch.randn(length, SIZE, generator=generator)]
        for _ in range(DEPTH):
            drawn = torch.randn(length, SIZE, generator=generator)
            states.append(states[-1] + 0.5 * drawn + 0.2 * states[-1].roll(1, 1))
        weights = torch.rand(length, generator=generator)
        return Chunk(dict(enumerate(states)), weights, torch.full((length,), -1))

    def chunks(self, layers: Sequence[int], most_tokens: int | None = None) -> Iterator[Chunk]:
        self.asked.append((tuple(layers), most_tokens))
        seen = 0
        for chunk in self.texts:
            if most_tokens is not None and seen >= most_tokens:
                return
            seen += len(chunk.weights)
            states = {layer: chunk.states[layer] for layer in layers}
            yield Chunk(states, chunk.weights, chunk.sink_until)


def fitter(reader: Readings, memory: int = PLENTY, rank: int | None = None) -> Fitter:
    decoder = SimpleNamespace(
        depth=DEPTH,
        config=SimpleNamespace(hidden_size=SIZE),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    return Fitter(cast(Decoder, decoder), cast(Reader, reader), rank, memory)


@pytest.mark.parametrize("memory", [PLENTY, 4 * MATRIX])
def test_similarity_is_the_mean_cosine(memory: int) -> None:
    reader = Readings([5, 12, 30])
    reader.texts[1].sink_until[3] = 2
    found = fitter(reader, memory).similarity()
    weights = torch.cat([chunk.weights for chunk in reader.texts]).double().numpy()
    weights[5 + 3] = 0.0
    for begin in range(DEPTH + 1):
        for end in range(begin + 1, DEPTH + 1):
            one, other = (
                torch.cat([chunk.states[layer] for chunk in reader.texts]).double().numpy()
                for layer in (begin, end)
            )
            lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
            expected = weights @ ((one * other).sum(1) / lengths) / weights.sum()
            assert float(found[begin, end]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("memory", [PLENTY, 4 * MATRIX])
def test_similarity_is_taken_from_the_first_texts(
    memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SIMILARITY_TOKENS", 20)
    few, all_of_them = (fitter(Readings([10] * count), memory).similarity() for count in (2, 5))
    assert torch.equal(few, all_of_them)


def test_the_run_that_changes_least_for_every_length() -> None:
    similarity = torch.zeros(21, 21)
    planted = {2: (7, 9), 3: (1, 4), 4: (15, 19), 5: (6, 11)}
    for run in planted.values():
        similarity[run] = 0.5
    similarity[0, 3] = similarity[17, 20] = similarity[3, 2] = 1.0  # first, last, backwards
    found = {end - begin: (begin, end) for begin, end in candidates(similarity)}
    assert list(found) == [2, 3, 4, 5, 6, 8, 10, 13, 17]
    assert {length: found[length] for length in planted} == planted
    free = {end - begin: (begin, end) for begin, end in candidates(similarity, frozenset([8, 16]))}
    assert free[3] == (1, 4)
    assert free[2] != (7, 9) and 10 not in free


@given(
    depth=st.integers(1, 40),
    taken=st.frozensets(st.integers(0, 40), max_size=6),
    seed=st.integers(0, 9),
)
def test_candidates_are_free_inner_layers(depth: int, taken: frozenset[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.rand(depth + 1, depth + 1, generator=generator)
    found = candidates(similarity, taken)
    free = [layer not in taken for layer in range(1, depth - 1)]
    longest = max((len(run) for run in "".join("x "[not f] for f in free).split()), default=0)
    lengths = [end - begin for begin, end in found]
    assert lengths == sorted(set(lengths))
    assert bool(found) == (longest >= 2)
    assert max(lengths, default=0) <= longest
    for begin, end in found:
        assert set(range(begin, end)) <= set(range(1, depth - 1)) - taken
        runs = [(i, i + end - begin) for i in range(1, depth - (end - begin))]
        for run in runs:
            if not taken & set(range(*run)):
                assert similarity[run] <= similarity[begin, end]


@given(
    depth=st.integers(4, 24),
    taken=st.frozensets(st.integers(0, 24), max_size=4),
    data=st.data(),
)
def test_neighbours_are_free_inner_layers(
    depth: int, taken: frozenset[int], data: st.DataObject
) -> None:
    begin = data.draw(st.integers(1, depth - 3))
    end = data.draw(st.integers(begin + 2, depth - 1))
    found = neighbours((begin, end), depth, taken)
    assert (begin, end) not in found and len(set(found)) == len(found)
    for first, last in found:
        assert last - first >= 2
        assert set(range(first, last)) <= set(range(1, depth - 1)) - taken
        assert abs(first - begin) + abs(last - end) <= 2
    # and none is forgotten that could be had
    grown = (begin, end + 1)
    assert (grown in found) == (end + 1 <= depth - 1 and not taken & set(range(*grown)))
    shrunk = (begin + 1, end)
    assert (shrunk in found) == (end - begin > 2 and not taken & set(range(*shrunk)))
    moved = (begin - 1, end - 1)
    assert (moved in found) == (begin > 1 and not taken & set(range(*moved)))


@pytest.mark.parametrize("rank", [None, 2])
def test_maps_are_the_ridge_solution_of_their_block(rank: int | None) -> None:
    reader = Readings([20, 33])
    maps = fitter(reader, rank=rank).maps(BLOCKS)
    assert list(maps) == BLOCKS
    for (begin, end), stand_in in maps.items():
        moments = Moments(SIZE, [end])
        for chunk in reader.texts:
            moments.add(chunk.states[begin], {end: chunk.states[end]}, chunk.weights)
        expected = moments.fit(end, rank, RIDGE)
        assert (stand_in.begin, stand_in.end, stand_in.rank) == (begin, end, rank)
        for one, other in zip(stand_in.factors, expected.factors, strict=True):
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(stand_in.bias, expected.bias)


@pytest.mark.parametrize("blocks", [1, 2, 3, 100])
def test_held_or_read_anew_the_maps_are_the_same(blocks: int) -> None:
    """And no more blocks are fitted in one reading than there is room for."""
    held, anew = Readings([20, 33]), Readings([20, 33])
    for reader in (held, anew):
        # one token grows huge before layer 2, another only before layer 5
        for place, layer in ((3, 2), (11, 5)):
            for i in range(layer, DEPTH + 1):
                reader.texts[0].states[i][place] *= 500
            reader.texts[0].sink_until[place] = DEPTH - 1
    one, other = fitter(held), fitter(anew, 2 * MATRIX * blocks)
    other.kept = False
    assert one.kept
    assert other.most_blocks == blocks
    assert one.maps(BLOCKS) == other.maps(BLOCKS)
    assert len(held.asked) == 1
    groups = [BLOCKS[i : i + blocks] for i in range(0, len(BLOCKS), blocks)]
    expected = [tuple(sorted({layer for run in group for layer in run})) for group in groups]
    assert [layers for layers, _ in anew.asked] == expected


def test_sinks_are_not_fitted_to() -> None:
    plain, with_sink = Readings([20, 33]), Readings([20, 33])
    chunk = with_sink.texts[1]
    chunk.sink_until[5] = DEPTH - 1
    for layer in range(3, DEPTH + 1):
        chunk.states[layer][5] *= 500
    plain.texts[1].weights[5] = 0.0
    expected, found = (fitter(reader).maps(BLOCKS) for reader in (plain, with_sink))
    for block in BLOCKS:
        torch.testing.assert_close(found[block].factors, expected[block].factors)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_states_are_held_where_there_is_room(count: int) -> None:
    reader = Readings([10] * count)
    need = 10 * count * (DEPTH + 1) * SIZE * 4
    assert fitter(reader, need).kept
    assert not fitter(reader, need - 1).kept
    assert fitter(reader, 0).most_blocks == 1


def test_a_map_is_fitted_once_until_it_is_forgotten() -> None:
    reader = Readings([20])
    work = fitter(reader, 100 * MATRIX)
    work.kept = False
    first = work.maps([(1, 3), (2, 5), (1, 3)])
    assert len(reader.asked) == 1 and list(first) == [(1, 3), (2, 5)]
    again = work.maps([(2, 5), (1, 3)])
    assert len(reader.asked) == 1
    assert all(again[block] is first[block] for block in first)
    work.forget([(2, 5), (3, 6)])
    assert work.maps([(2, 5)])[2, 5] is first[2, 5]
    assert len(reader.asked) == 1
    after = work.maps([(1, 3), (2, 5)])
    assert reader.asked[-1] == ((1, 3), None) and len(reader.asked) == 2
    assert after[1, 3] is not first[1, 3] and after == first


def test_a_real_models_maps_stand_in_for_its_layers() -> None:
    """From reading to map: what the map gives is nearer to what the layers gave than their mean."""
    decoder = tiny.decoder("llama")
    samples = [Sample(tuple(tiny.prompt(60, i)), tuple(tiny.prompt(60, 90 + i))) for i in range(4)]
    reader = Reader(decoder, samples, 10_000)
    held, anew = Fitter(decoder, reader, None, PLENTY), Fitter(decoder, reader, None, 0)
    assert held.kept and not anew.kept
    maps = held.maps([(1, 3), (2, 4)])
    assert maps == anew.maps([(1, 3), (2, 4)])
    for (begin, end), stand_in in maps.items():
        left = whole = 0.0
        for chunk in reader.chunks([begin, end]):
            states = chunk.states[begin]
            change = chunk.states[end] - states
            given = stand_in.on(torch.device("cpu"), torch.float32, False)(states) - states
            left += float((change - given).square().sum())
            whole += float((change - change.mean(0)).square().sum())
        assert left < 0.8 * whole
