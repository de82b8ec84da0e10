"""Linear maps in place of layers: what they are, and that every way of running them is one."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.stand_in import StandIn
from conflayers_cli.errors import InputError
from conflayers_cli.generation.batch import Batch, BatchRequest
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.mixed import MixedProposer
from tests import tiny
from tests.spec_decode import simulated


@functools.cache
def mapped(family: str, begin: int, end: int, rank: int | None = None) -> StandIn:
    return tiny.stand_in(tiny.decoder(family), begin, end, rank=rank)


def logits(decoder: Decoder, plan: SkipPlan, tokens: list[int]) -> torch.Tensor:
    row = torch.tensor([tokens])
    positions = torch.arange(len(tokens))[None]
    return decoder.forward(row, positions, decoder.new_cache(len(tokens)), plan)


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_map_runs_in_place_of_its_layers(family: str, rank: int | None) -> None:
    """By the modules and fused, the residual stream behind the block is x + W x + b."""
    decoder = tiny.decoder(family)
    stand_in = mapped(family, 1, 3, rank)
    seen: dict[int, torch.Tensor] = {}
    plan = SkipPlan.of(stand_ins=[stand_in])
    with decoder.showing_states([0, 1], lambda layer, states: seen.update({layer: states})):
        logits(decoder, SkipPlan(), tiny.prompt(9))
    entering = seen[1].clone()
    change = entering
    for factor in stand_in.factors:
        change = change @ factor.T
    expected = entering + change + stand_in.bias

    # what the layer behind the block is given, as the modules run
    with decoder.showing_states([3], lambda layer, states: seen.update({layer: states})):
        by_modules = logits(decoder, plan, tiny.prompt(9))
    torch.testing.assert_close(seen[3][:, :9], expected[:, :9], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        logits(decoder, plan, tiny.prompt(9)), by_modules, rtol=1e-3, atol=1e-3
    )
    assert not torch.allclose(
        by_modules, logits(decoder, SkipPlan.of_layers([1, 2]), tiny.prompt(9))
    )


@settings(max_examples=60)
@given(
    family=st.sampled_from(["llama", "gemma2", "gpt2"]),
    block=st.sampled_from([(1, 2), (1, 3), (2, 4), (1, 4)]),
    rank=st.sampled_from([None, 1, 5]),
    others=st.sets(st.integers(1, tiny.DEPTH - 2)),
    size=st.integers(1, 7),
    temperature=st.sampled_from([0.0, 0.0, 0.7]),
    seed=st.integers(0, 100),
)
def test_texts_stay_the_models_own(
    family: str,
    block: tuple[int, int],
    rank: int | None,
    others: set[int],
    size: int,
    temperature: float,
    seed: int,
) -> None:
    """Whatever a map drafts, greedy output is vanilla's; sampled output ends where it should."""
    plan = SkipPlan.of(others, (), [mapped(family, *block, rank)])
    tiny.keeps_its_text(tiny.decoder(family), plan, size, temperature, seed)


def test_in_batches_too() -> None:
    decoder = tiny.decoder("llama")
    plan = SkipPlan.of(stand_ins=[mapped("llama", 1, 3)])
    drafter = MixedProposer(decoder, plan, simulated.costs(0.05, 0.001), ngram=False, max_tokens=5)
    prompts = [tiny.prompt(length, length) for length in (3, 9, 5)]
    batch = Batch(
        decoder, [BatchRequest(p, 16, SamplingParams()) for p in prompts], drafter=drafter
    )
    batch.run()
    assert batch.outputs == [tiny.generated(decoder, prompt, 16) for prompt in prompts]
    assert sum(step.drafted for steps in batch.steps for step in steps) > 0


def test_a_map_for_another_width_is_refused() -> None:
    other = StandIn(1, 3, (torch.zeros(8, 8),), torch.zeros(8))
    with pytest.raises(InputError, match="maps 8 features, and the model has 32"):
        tiny.decoder("llama").check_plan(SkipPlan.of(stand_ins=[other]))


def test_equal_where_the_bits_are() -> None:
    decoder = tiny.decoder("llama")
    one, same = (tiny.stand_in(decoder, 1, 3) for _ in range(2))
    assert one == same and hash(one) == hash(same)
    assert one != tiny.stand_in(decoder, 1, 4)
    assert one != tiny.stand_in(decoder, 1, 3, seed=1)
    plans = {
        SkipPlan.of(stand_ins=[one]),
        SkipPlan.of(stand_ins=[same]),
        SkipPlan.of_layers([1, 2]),
    }
    assert len(plans) == 2
    assert len({plan.key for plan in plans}) == 2


@pytest.mark.parametrize(
    "begin, end, shapes",
    [
        (2, 2, [(4, 4)]),
        (-1, 2, [(4, 4)]),
        (1, 2, [(4, 3)]),
        (1, 2, [(2, 4), (4, 3)]),
        (1, 2, [(2, 3), (4, 2)]),
    ],
)
def test_what_is_no_map(begin: int, end: int, shapes: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="stand"):
        StandIn(begin, end, tuple(torch.zeros(shape) for shape in shapes), torch.zeros(4))


def test_plans_with_maps() -> None:
    decoder = tiny.decoder("llama")
    early, late = tiny.stand_in(decoder, 1, 2), tiny.stand_in(decoder, 2, 4)
    plan = SkipPlan.of([3], [], [late, early])
    assert plan.stand_ins == (early, late)
    assert plan.layers == (1, 2, 3) and plan.replaced == {1, 2, 3}
    with pytest.raises(ValueError, match="different layers"):
        SkipPlan.of(stand_ins=[late, tiny.stand_in(decoder, 3, 4)])
    with pytest.raises(ValueError, match="skipped whole"):
        SkipPlan((1, 2), (1,), (tiny.stand_in(decoder, 1, 3),))
