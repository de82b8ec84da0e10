"""One plan for short texts, another for long ones."""

import pytest

from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.by_context import ContextLengthProposer
from conflayers_cli.spec_decode.proposer import SkipProposer
from tests import tiny


def test_the_length_of_the_text_decides_who_drafts() -> None:
    decoder = tiny.decoder("llama")
    short, long = (
        SkipProposer(decoder, SkipPlan.of_layers([i]), n, 0.0) for i, n in ((2, 3), (1, 5))
    )
    proposer = ContextLengthProposer(((0, short), (20, None), (30, long)))
    generation = Generation(decoder, GenerationRequest(tiny.prompt(9), 50), proposer=proposer)
    plain = Generation(decoder, GenerationRequest(tiny.prompt(9), 50))
    seen = set()
    generation.step()  # reads the prompt
    while generation.finish is None:
        length = len(generation.tokens)
        step = generation.step()
        seen.add((0 if length < 20 else 1 if length < 30 else 2, step.drafted))
    list(plain)
    assert generation.tokens == plain.tokens
    assert {drafted for part, drafted in seen if part == 0} == {3}
    assert {drafted for part, drafted in seen if part == 1} == {0}
    assert 5 in {drafted for part, drafted in seen if part == 2}


@pytest.mark.parametrize("lengths", [(), (5,), (0, 9, 9), (0, 9, 3)])
def test_lengths_must_ascend_from_nothing(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ascending"):
        ContextLengthProposer(tuple((length, None) for length in lengths))
