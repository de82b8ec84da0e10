"""bfloat16: a row's logits have the same bits however many rows run beside it.

That is what makes speculative output equal to vanilla's in half precision, where a single other bit
soon tips one token over to another.
"""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.kernels.attention import attention_forward
from conflayers_cli.kernels.kv_cache import KVCache, round_up_kv_len
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import Context, Draft, SkipProposer
from conflayers_cli.spec_decode.tree import PAPER_SHAPE
from tests import tiny

pytestmark = pytest.mark.usefixtures("without_native")

VOCABULARY = 500
MIDDLE = st.sets(st.integers(1, tiny.DEPTH - 2))


@functools.cache
def decoder(shape: str = "grouped") -> Decoder:
    """Sizes at which the kernels do depend on the number of rows, left to themselves.

    In the grouped model a linear layer gives a single row other bits than one among several; in the
    ungrouped one the attention call does so for rows that are not a multiple of four.
    """
    sizes: dict[str, dict[str, int]] = {
        "grouped": {
            "hidden_size": 192,
            "intermediate_size": 1536,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
        },
        "ungrouped": {"hidden_size": 256, "intermediate_size": 512, "num_key_value_heads": 4},
    }
    more = {"vocab_size": VOCABULARY, "max_position_embeddings": 1024, **sizes[shape]}
    config = LlamaConfig(**{**tiny.LLAMA_LIKE, **more})
    return Decoder(tiny.build(config, dtype=torch.bfloat16, gain=0.5))


@settings(max_examples=15)
@given(
    plan=st.builds(SkipPlan.of, MIDDLE, MIDDLE),
    size=st.integers(1, 12),
    length=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_speculative_output_is_vanillas(plan: SkipPlan, size: int, length: int, seed: int) -> None:
    prompt = tiny.prompt(length, seed, VOCABULARY)
    vanilla = Generation(decoder(), GenerationRequest(prompt, 24))
    proposer = SkipProposer(decoder(), plan, size, 0.0)
    speculative = Generation(decoder(), GenerationRequest(prompt, 24), proposer=proposer)
    tiny.steps_of(vanilla)
    tiny.steps_of(speculative)
    assert speculative.output == vanilla.output


@pytest.mark.parametrize("shape", ["grouped", "ungrouped"])
# Among these are texts that part where the token behind a leaf is taken from the leaf's own pass.
@pytest.mark.parametrize("seed", [0, 95, 103])
def test_trees_leave_no_trace_either(seed: int, shape: str) -> None:
    """A leaf's key lies elsewhere than vanilla's when the token behind it is first guessed."""
    prompt = tiny.prompt(3 + seed % 40, seed, VOCABULARY)
    vanilla = Generation(decoder(shape), GenerationRequest(prompt, 96))
    proposer = SkipProposer(decoder(shape), SkipPlan.of_layers([2]), 6, 0.0, PAPER_SHAPE)
    speculative = Generation(decoder(shape), GenerationRequest(prompt, 96), proposer=proposer)
    tiny.steps_of(vanilla)
    steps = tiny.steps_of(speculative)
    assert speculative.output == vanilla.output
    assert all(step.accepted <= step.drafted for step in steps)
    assert sum(step.leaves for step in steps) > 100


def test_what_follows_a_leaf_is_verified_in_the_next_step() -> None:
    """It opens the next draft, the drafter goes on behind it, and the budget stays exact."""
    vanilla = Generation(decoder(), GenerationRequest([7, 8, 9], 30))
    tiny.steps_of(vanilla)
    text, asked = vanilla.output, []

    class OnlyLeaves:
        name = "leaves"

        def propose(self, context: Context, limit: int) -> Draft:
            at = len(context.tokens) - 3
            asked.append((at, limit))
            right = text[at]
            return Draft(((right + 1) % VOCABULARY,), leaves=((right,),))

    # The leaf itself; then what follows it, and the next leaf, as far as there is room.
    lengths = {3: [1, 1], 4: [1, 2], 5: [1, 2, 1], 6: [1, 2, 2], 30: [1, 2, 2]}
    for count, expected in lengths.items():
        asked.clear()
        one = Generation(decoder(), GenerationRequest([7, 8, 9], count), proposer=OnlyLeaves())
        steps = tiny.steps_of(one)
        assert one.output == text[:count]
        assert [len(step.tokens) for step in steps[1:4]] == expected
        assert all(step.accepted <= step.drafted for step in steps)
        assert all(at + limit == count - 1 for at, limit in asked)


@pytest.mark.parametrize("shape", ["grouped", "ungrouped"])
# 250, 505: beside a border between blocks of keys; alone, rows see fewer keys than together.
@pytest.mark.parametrize("start", [1, 20, 100, 250, 505])
def test_bits_do_not_depend_on_the_number_of_rows(start: int, shape: str) -> None:
    model = decoder(shape)
    tokens = torch.tensor([tiny.prompt(start + 16, 1, VOCABULARY)])
    cache = model.new_cache(start + 16)
    model.prefill(tokens[:, :start], cache)

    def logits(begin: int, count: int) -> torch.Tensor:
        """Of ``count`` tokens in one pass; slots below ``begin`` are filled."""
        positions = torch.arange(start + begin, start + begin + count)[None]
        part = tokens[:, start + begin : start + begin + count]
        return model.forward(part, positions, cache)[0]

    alone = torch.cat([logits(i, 1) for i in range(16)])
    for count in (2, 4, 8, 16):
        for begin in range(0, 16, count):
            together = logits(begin, count)
            assert torch.equal(together, alone[begin : begin + count]), (begin, count)


def attended(
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor], seen: int, tokens: int, extent: int
) -> torch.Tensor:
    """The first query's result, among ``tokens`` that all see the first ``seen`` keys."""
    query, key, value = states
    mask = (torch.arange(extent) < seen).expand(1, 1, tokens, extent)
    out, _ = attention_forward(
        torch.nn.Module(), query[:, :, :tokens], key[:, :, :extent], value[:, :, :extent], mask
    )
    return out[:, 0]


@pytest.mark.parametrize("heads", [8, 24])
@pytest.mark.parametrize("further", [0, 300])
def test_attention_bits_do_not_depend_on_rows_or_extent(further: int, heads: int) -> None:
    """One query among others, over the keys it sees and however many unseen ones behind them."""
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, length: int) -> torch.Tensor:
        return torch.randn(1, heads, length, 64, generator=generator).bfloat16()

    for seen in (*range(196, 256, 2), *range(256, 1024, 40)):
        states = draw(heads, 48), draw(8, 2048), draw(8, 2048)
        alone = attended(states, seen, 1, round_up_kv_len(seen))
        for tokens in (1, 2, 5, 16, 48):
            got = attended(states, seen, tokens, round_up_kv_len(seen + further))
            assert torch.equal(got, alone), (seen, tokens)


def test_a_dtype_with_fewer_bits_is_really_in_use() -> None:
    """The tests above would hold trivially in float32; and drafts must not all be right."""
    assert decoder().dtype == torch.bfloat16
    proposer = SkipProposer(decoder(), SkipPlan.of_layers([2]), 4, 0.0)
    generation = Generation(
        decoder(), GenerationRequest(tiny.prompt(20, 0, VOCABULARY), 40), proposer=proposer
    )
    steps = tiny.steps_of(generation)
    assert 0 < sum(step.accepted for step in steps) < sum(step.drafted for step in steps)


def test_without_exactness_passes_are_as_small_as_they_can_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Texts may part then, but not in float32, and each is still what the model says."""
    model = tiny.build(tiny.CONFIGS["llama"](), dtype=torch.bfloat16, gain=0.7)
    loose, prompt = Decoder(model, exact=False), tiny.prompt(30)
    assert (loose.invariance.min_rows, loose.invariance.bitwise) == (1, False)
    asked: list[tuple[int, int]] = []
    right = KVCache.set_slots

    def set_slots(cache: KVCache, slots: torch.Tensor, extent: int) -> None:
        asked.append((slots.shape[1], extent))
        right(cache, slots, extent)

    monkeypatch.setattr(KVCache, "set_slots", set_slots)
    proposer = SkipProposer(loose, SkipPlan.of_layers([2]), 4, 0.0, PAPER_SHAPE)
    generation = Generation(loose, GenerationRequest(prompt, 40), proposer=proposer)
    tiny.steps_of(generation)
    assert len(generation.output) == 40
    assert {extent for _, extent in asked} == {64, 128}


@functools.cache
def of_family(family: str) -> Decoder:
    return Decoder(tiny.build(tiny.CONFIGS[family](), dtype=torch.bfloat16, gain=0.7))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("seed", range(4))
def test_every_family_is_exact(family: str, seed: int) -> None:
    prompt = tiny.prompt(5 + 9 * seed, seed)
    vanilla = Generation(of_family(family), GenerationRequest(prompt, 40))
    proposer = SkipProposer(
        of_family(family), SkipPlan.of_layers([1 + seed % 3]), 3 + 2 * seed, 0.0
    )
    speculative = Generation(of_family(family), GenerationRequest(prompt, 40), proposer=proposer)
    tiny.steps_of(vanilla)
    tiny.steps_of(speculative)
    assert speculative.output == vanilla.output
