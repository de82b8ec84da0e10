"""Sampled output, end to end: three tokens' law against the target's, enumerated.

That drafts leave no trace in a text is tested elsewhere (`test_lossless`); so its law is that of
texts that nobody drafted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from conflayers_cli.engine.sampler import Sampler
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.spec_decode.draft_store import DraftStore
from conflayers_cli.spec_decode.mixed import MixedProposer
from conflayers_cli.spec_decode.proposer import SkipProposer
from tests.engine.law import LENGTH, PLAN, PROMPT, SETTINGS, law, remembering, sample, start_of
from tests.spec_decode.test_mixed import costs
from tests.tiny import chi_square

each_setting = pytest.mark.parametrize("name", SETTINGS)


@each_setting
def test_the_law_is_the_targets(name: str) -> None:
    counts, share = sample(SETTINGS[name], None)
    assert share is None
    assert chi_square(counts, law(SETTINGS[name])) > 1e-4


def test_drafts_change_nothing_of_it() -> None:
    setting = SETTINGS["temperature 0.7"]
    counts, share = sample(setting, SkipProposer(remembering(), PLAN, 2, 0.0))
    assert share is not None and 0.3 < share < 0.95
    assert counts == sample(setting, None)[0]


def test_earlier_texts_change_nothing_of_it() -> None:
    """Drafts of every kind together, with a store that knows some texts to come."""
    setting = SETTINGS["temperature 0.7"]
    store = DraftStore(8, 1024)
    for seed in range(40):
        store.add(np.random.default_rng(seed).integers(0, 8, 12).tolist())
        store.add([*PROMPT, seed % 8, seed // 8 % 8, 3])
    counts, share = sample(setting, MixedProposer(remembering(), PLAN, costs(), prior=0.9), store)
    assert share is not None and 0.05 < share < 0.95
    assert counts == sample(setting, None)[0]


def test_texts_of_one_seed_and_different_prompts_have_nothing_in_common() -> None:
    logits = torch.tensor([[0.0, 1.0, 0.5, -1.0]])
    pairs: Counter[tuple[int, int]] = Counter()
    for seed in range(3000):
        setting = replace(SETTINGS["temperature 0.7"], seed=seed)
        one, other = (
            Sampler(setting, 4, torch.device("cpu"), prompt).choose(logits, 5)[0]
            for prompt in ((1, 2), (2, 1))
        )
        pairs[one, other] += 1
    alone = dict(enumerate(torch.softmax(logits[0] / 0.7, -1).tolist()))
    assert chi_square(pairs, {(a, b): alone[a] * alone[b] for a in alone for b in alone}) > 1e-4


def test_noise_used_at_two_positions_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token by itself has the right law still, three of them have not."""
    choose = Sampler.sample
    monkeypatch.setattr(
        Sampler, "sample", lambda self, scores, at: choose(self, scores, [0 for _ in at])
    )
    setting = SETTINGS["temperature 0.7"]
    counts, _ = sample(setting, None)
    assert chi_square(counts, law(setting)) < 1e-8
    first: Counter[int] = Counter()
    for tokens, count in counts.items():
        first[tokens[0]] += count
    marginal: Counter[int] = Counter()
    for tokens, chance in law(setting).items():
        marginal[tokens[0]] += chance  # type: ignore[assignment]
    assert chi_square(first, marginal) > 1e-4


def test_noise_of_the_drafts_position_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of a verification that takes the random numbers of the draft's first token: the text
    is not what it is without drafts."""
    setting = replace(SETTINGS["temperature 0.7"], seed=3)
    proposer = SkipProposer(remembering(), PLAN, 2, 0.0)

    def starts(count: int = 50) -> list[tuple[int, ...]]:
        return [
            start_of(
                Generation(
                    remembering(),
                    GenerationRequest(PROMPT, LENGTH + 1, replace(setting, seed=seed)),
                    proposer=proposer,
                )
            )[0]
            for seed in range(count)
        ]

    right = starts()
    choose = Sampler.sample
    monkeypatch.setattr(
        Sampler, "sample", lambda self, scores, at: choose(self, scores, [at[0] for _ in at])
    )
    assert starts() != right
