"""Every family: the engine gives what transformers gives, with and without drafts."""

from __future__ import annotations

import pytest
import torch

from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import SkipProposer
from tests import tiny

COUNT = 20
LENGTHS = (3, 2 * tiny.WINDOW + 3)
WHOLE = (SkipPlan.of_layers([2]), SkipPlan.of_layers([1, 3]))
PARTIAL = (SkipPlan.of([1], [2, 3]), SkipPlan(attention=(2,)), SkipPlan(mlp=(3,)))
# What is known to have no module of its own for one of the two (OPT: no MLP).
WHOLE_ONLY = {"opt"}
# Which kinds of layers there are, and how far each sees.
WINDOWS: dict[str, dict[str, int | None]] = {
    "mistral": {"sliding_attention": tiny.WINDOW},
    **{
        family: {"sliding_attention": tiny.WINDOW, "full_attention": None}
        for family in ("qwen2-mixed", "gemma2", "gemma3", "gpt-oss")
    },
}

each_family = pytest.mark.parametrize("family", tiny.FAMILIES)


@each_family
def test_logits_are_the_models_own(family: str) -> None:
    decoder = tiny.decoder(family)
    tokens = torch.tensor([tiny.prompt(30, 5)])
    with decoder.plain() as model, torch.inference_mode():
        expected = model(tokens, use_cache=False).logits
    cache = decoder.new_cache(30)
    parts = [
        decoder.forward(tokens[:, a:b], torch.arange(a, b)[None], cache)
        for a, b in ((0, 11), (11, 12), (12, 30))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-4)


@each_family
def test_what_may_be_left_out(family: str) -> None:
    both = frozenset(("attention", "mlp"))
    decoder = tiny.decoder(family)
    assert decoder.sub_layers == (frozenset() if family in WHOLE_ONLY else both)
    assert decoder.passes.windows == WINDOWS.get(family, {"full_attention": None})


@each_family
@pytest.mark.parametrize("length", LENGTHS)
def test_greedy_output_is_generates(family: str, length: int) -> None:
    decoder = tiny.decoder(family)
    prompt = tiny.prompt(length, 7)
    expected = tiny.generated(decoder, prompt, COUNT)
    vanilla = Generation(decoder, GenerationRequest(prompt, COUNT))
    assert all(step.drafted == 0 for step in vanilla)
    assert vanilla.output == expected
    drafted = accepted = 0
    for i, plan in enumerate(WHOLE if family in WHOLE_ONLY else WHOLE + PARTIAL):
        # every plan with drafts of both sizes, one of them behind each prompt
        size = (1, 4)[(i + LENGTHS.index(length)) % 2]
        proposer = SkipProposer(decoder, plan, max_tokens=size, stop_probability=0.0)
        generation = Generation(decoder, GenerationRequest(prompt, COUNT), proposer=proposer)
        for step in generation:
            drafted += step.drafted
            accepted += step.accepted
        assert generation.output == expected, (plan, size)
    # Else nothing was shown: drafts all right or all wrong hide most mistakes.
    assert 0 < accepted < drafted
