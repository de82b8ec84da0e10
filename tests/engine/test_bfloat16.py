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

from conflayers_cli.engine.decode import Generation
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.draft import SkipDrafter
from conflayers_cli.engine.plan import SkipPlan
from tests import tiny

VOCABULARY = 500
MIDDLE = st.sets(st.integers(1, tiny.DEPTH - 2))


@functools.cache
def decoder() -> Decoder:
    """Heads as wide as real models have, since kernels are chosen by such sizes."""
    config = LlamaConfig(
        **{
            **tiny.LLAMA_LIKE,
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 1024,
        }
    )
    return Decoder(tiny.build(config, dtype=torch.bfloat16, gain=0.5))


@settings(max_examples=25)
@given(
    plan=st.builds(SkipPlan.of, MIDDLE, MIDDLE),
    size=st.integers(1, 12),
    length=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_speculative_output_is_vanillas(plan: SkipPlan, size: int, length: int, seed: int) -> None:
    prompt = tiny.prompt(length, seed, VOCABULARY)
    vanilla = Generation(decoder(), prompt, max_new_tokens=24)
    drafter = SkipDrafter(decoder(), plan, size, 0.0)
    speculative = Generation(decoder(), prompt, max_new_tokens=24, drafter=drafter)
    tiny.steps_of(vanilla)
    tiny.steps_of(speculative)
    assert speculative.output == vanilla.output


# 250: the rows lie on both sides of the first extent's end, so some see another extent of keys.
@pytest.mark.parametrize("start", [1, 20, 100, 250])
def test_bits_do_not_depend_on_the_number_of_rows(start: int) -> None:
    tokens = torch.tensor([tiny.prompt(start + 16, 1, VOCABULARY)])
    cache = decoder().new_cache(start + 16)
    decoder().prefill(tokens[:, :start], cache)

    def logits(begin: int, count: int) -> torch.Tensor:
        """Of ``count`` tokens in one pass; slots below ``begin`` are filled."""
        positions = torch.arange(start + begin, start + begin + count)[None]
        part = tokens[:, start + begin : start + begin + count]
        return decoder().forward(part, positions, cache)[0]

    alone = torch.cat([logits(i, 1) for i in range(16)])
    for count in (2, 4, 8, 16):
        for begin in range(0, 16, count):
            together = logits(begin, count)
            assert torch.equal(together, alone[begin : begin + count]), (begin, count)


def test_a_dtype_with_fewer_bits_is_really_in_use() -> None:
    """The tests above would hold trivially in float32; and drafts must not all be right."""
    assert decoder().dtype == torch.bfloat16
    drafter = SkipDrafter(decoder(), SkipPlan.of_layers([2]), 4, 0.0)
    generation = Generation(
        decoder(), tiny.prompt(20, 0, VOCABULARY), max_new_tokens=40, drafter=drafter
    )
    steps = tiny.steps_of(generation)
    assert 0 < sum(step.accepted for step in steps) < sum(step.drafted for step in steps)
