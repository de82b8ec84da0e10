"""Sampled output, end to end: three tokens' law against the target's, enumerated."""

from __future__ import annotations

import copy

import pytest

from conflayers_cli.engine.decoder import FULL, Decoder
from conflayers_cli.generation import sequence
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import SkipProposer
from tests import tiny
from tests.engine.law import (
    PLAN,
    PROMPT,
    SETTINGS,
    TRUNCATED,
    accept_without_residual,
    law,
    model,
    next_token,
    remembering,
    sample,
    start_of,
)
from tests.tiny import chi_square


def skip(plan: SkipPlan, stop_probability: float = 0.0) -> SkipProposer:
    return SkipProposer(remembering(), plan, max_tokens=2, stop_probability=stop_probability)


each_setting = pytest.mark.parametrize("name", SETTINGS)


@each_setting
def test_with_a_layer_left_out(name: str) -> None:
    counts, share = sample(SETTINGS[name], skip(PLAN))
    assert share is not None and 0.2 < share < 0.95
    assert chi_square(counts, law(SETTINGS[name])) > 1e-4


def test_with_chains_that_end_at_unlikely_tokens() -> None:
    """How far a draft goes depends on what was drawn, and must not show in the output."""
    setting = SETTINGS["temperature 0.7"]
    counts, _ = sample(setting, skip(PLAN, stop_probability=0.4))
    assert chi_square(counts, law(setting)) > 1e-4


@each_setting
def test_all_drafts_accepted(name: str) -> None:
    """Drafts by the full model itself: q is p, but for the rounding of other passes."""
    counts, share = sample(SETTINGS[name], skip(FULL))
    assert share is not None and share > 0.999
    assert chi_square(counts, law(SETTINGS[name])) > 1e-4


@pytest.mark.parametrize("name", TRUNCATED)
def test_all_drafts_refused(name: str) -> None:
    """The draft is the least likely token, which the target cuts away."""

    def least(text: list[int]) -> list[int]:
        first = int(next_token(tuple(text), SETTINGS[name]).argmin())
        return [first, int(next_token((*text, first), SETTINGS[name]).argmin())]

    counts, share = sample(SETTINGS[name], tiny.Scripted(least))
    assert share == 0
    assert chi_square(counts, law(SETTINGS[name])) > 1e-4


def test_without_drafts() -> None:
    counts, share = sample(SETTINGS["temperature 0.7"], None)
    assert share is None
    assert chi_square(counts, law(SETTINGS["temperature 0.7"])) > 1e-4


def test_a_wrong_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sample with the residual replaced by p itself."""
    monkeypatch.setattr(sequence, "accept_sampled", accept_without_residual)
    counts, _ = sample(SETTINGS["temperature 0.7"], skip(PLAN))
    assert chi_square(counts, law(SETTINGS["temperature 0.7"])) < 1e-8


@each_setting
def test_the_remembering_decoder_changes_nothing(name: str) -> None:
    """With equal seeds, the decoder itself says the same, step by step."""
    plain = Decoder(copy.deepcopy(model()))
    for seed in range(10):
        setting = SamplingParams(**{**vars(SETTINGS[name]), "seed": seed})
        starts = [
            start_of(
                Generation(
                    decoder,
                    GenerationRequest(PROMPT, 4, setting),
                    proposer=SkipProposer(decoder, PLAN, 2, 0.0),
                )
            )
            for decoder in (plain, remembering())
        ]
        assert starts[0] == starts[1]
