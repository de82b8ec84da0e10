"""Sampling with side candidates: the law is the target's, by rule and end to end.

First the rule alone, on distributions written down by hand; then whole generations of a model whose
law can be enumerated. Rules that are slightly wrong, some of them found in other code, must be
found by the same statistic.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from conflayers_cli.engine.decoder import FULL, Decoder
from conflayers_cli.engine.sampler import Sampler
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode import rejection_sampler as rules
from conflayers_cli.spec_decode.proposer import Context, Draft, Proposer, SkipProposer
from conflayers_cli.spec_decode.rejection_sampler import accept_sampled
from conflayers_cli.spec_decode.tree import SAMPLING_SHAPE, TreeShape
from tests.engine import law as enumerated
from tests.engine.law import PLAN, PROMPT, SETTINGS, VOCABULARY, next_token, remembering, sample
from tests.spec_decode.test_rejection_sampler import CPU, CUT, NEAR, SIZE, P, law
from tests.tiny import chi_square

DRAWS = 6000
# Its draft is a token that P's first two rows never choose; what else it knows is in the leaves.
HOPELESS_P = torch.tensor([[0.0, *row[1:]] for row in P.tolist()]) / (1 - P[:, :1])
HOPELESS_Q = torch.tensor([[0.9999, 2e-5, 1e-5, 3e-5, 3e-5, 1e-5]]).expand(2, -1)

NARROW = torch.tensor([[0.0, 0.9, 0.05, 0.05, 0.0, 0.0], [0.0, 0.0, 0.0, 0.8, 0.1, 0.1]])

Grow = Callable[[Sampler, torch.Tensor, int], tuple[int, list[int]]]


def distinct(sampler: Sampler, q: torch.Tensor, count: int) -> tuple[int, list[int]]:
    """(draft, leaves), all drawn from q in turn without replacement."""
    token = sampler.draw(q)
    rest = q.clone()
    rest[token] = 0.0
    count = min(count, int((rest > 0).sum()))
    return token, sampler.draw_distinct(rest, count) if count else []


def with_replacement(sampler: Sampler, q: torch.Tensor, count: int) -> tuple[int, list[int]]:
    return sampler.draw(q), [sampler.draw(q) for _ in range(count)]


def dropped_by_name(sampler: Sampler, q: torch.Tensor, count: int) -> tuple[int, list[int]]:
    """Leaves are tested only where they turned out to be likely ones."""
    token, leaves = distinct(sampler, q, count)
    return token, [leaf for leaf in leaves if q[leaf] > 0.15]


def best_first(sampler: Sampler, q: torch.Tensor, count: int) -> tuple[int, list[int]]:
    """Leaves drawn rightly, but tried by falling probability."""
    token, leaves = distinct(sampler, q, count)
    return token, sorted(leaves, key=lambda leaf: -float(q[leaf]))


def trees(
    p: torch.Tensor, q: torch.Tensor | None, count: int, grow: Grow = distinct
) -> tuple[Counter[tuple[int, ...]], int, int]:
    """(how often each text of three tokens came out, drafts kept, leaves kept).

    As `test_acceptance.chains`, with up to ``count`` leaves beside each of two drafts.
    """
    sampler = Sampler(SamplingParams(1.0, seed=11), SIZE, CPU)
    counts: Counter[tuple[int, ...]] = Counter()
    kept_drafts = kept_leaves = 0
    for i in range(DRAWS):
        if q is None:  # beforehand, whatever p says
            drafted = [i % SIZE, i // SIZE % SIZE]
            leaves = [[(t + 1 + k) % SIZE for k in range(count)] for t in drafted]
        else:
            grown = [grow(sampler, row, count) for row in q]
            drafted, leaves = [t for t, _ in grown], [side for _, side in grown]
        beside = [place for place, side in enumerate(leaves) for _ in side]
        target = p[[0, 1, 2, *(place + 1 for place in beside)]]
        row, token = accept_sampled(drafted, target, q, sampler, leaves)
        if row <= 2:
            text = [*drafted[:row], token]
            kept_drafts += row
        else:
            place, flat = beside[row - 3], [leaf for side in leaves for leaf in side]
            text = [*drafted[:place], flat[row - 3], token]
            kept_drafts, kept_leaves = kept_drafts + place, kept_leaves + 1
        text += [sampler.draw(p[j]) for j in range(len(text), 3)]
        counts[tuple(text)] += 1
    return counts, kept_drafts, kept_leaves


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("p", "q"),
    [
        pytest.param(P, NEAR, id="near"),
        pytest.param(CUT, NEAR, id="target truncated"),
        pytest.param(P, NARROW, id="draft truncated"),
        pytest.param(P, None, id="certain drafts"),
        pytest.param(CUT, None, id="certain drafts, target truncated"),
        pytest.param(HOPELESS_P, HOPELESS_Q, id="only leaves stand"),
    ],
)
def test_the_law_is_the_targets(p: torch.Tensor, q: torch.Tensor | None, count: int) -> None:
    counts, drafts, leaves = trees(p, q, count)
    assert leaves > 0.05 * DRAWS
    if q is HOPELESS_Q:
        assert drafts < leaves / 100
    assert chi_square(counts, law(p)) > 1e-3


def test_drafts_from_the_target_need_no_leaves() -> None:
    counts, drafts, leaves = trees(P, P[:2], 3)
    assert (drafts, leaves) == (2 * DRAWS, 0)
    assert chi_square(counts, law(P)) > 1e-3


@pytest.mark.parametrize("grow", [with_replacement, dropped_by_name, best_first])
def test_leaves_grown_wrongly_are_found(grow: Grow) -> None:
    counts, _, leaves = trees(P, NEAR, 3, grow)
    assert leaves > 0.05 * DRAWS
    assert chi_square(counts, law(P)) < 1e-6


Refusal = tuple[torch.Tensor, torch.Tensor | None]


def q_as_it_was(p: torch.Tensor, q: torch.Tensor | None, token: int) -> Refusal:
    return rules_after_rejection(p, q, token)[0], q


def q_not_normalised(p: torch.Tensor, q: torch.Tensor | None, token: int) -> Refusal:
    residual, _ = rules_after_rejection(p, q, token)
    assert q is not None
    rest = q.clone()
    rest[token] = 0.0
    return residual, rest


def p_not_normalised(p: torch.Tensor, q: torch.Tensor | None, token: int) -> Refusal:
    assert q is not None
    residual = (p - q).clamp(min=0.0)
    return (residual if residual.sum() > 0 else p), rules_after_rejection(p, q, token)[1]


def p_as_it_was(p: torch.Tensor, q: torch.Tensor | None, token: int) -> Refusal:
    return p, rules_after_rejection(p, q, token)[1]


rules_after_rejection = rules._after_rejection
WRONG = [q_as_it_was, q_not_normalised, p_not_normalised, p_as_it_was]


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_rules_are_found(
    wrong: Callable[[torch.Tensor, torch.Tensor | None, int], Refusal],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rules, "_after_rejection", wrong)
    counts, _, _ = trees(P, NEAR, 3)
    assert chi_square(counts, law(P)) < 1e-6


# End to end


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every leaf accepted."""
    seen: list[int] = []
    move = enumerated.Account.move

    def note(self: enumerated.Account, source: int, target: int) -> None:
        seen.append(target)
        move(self, source, target)

    monkeypatch.setattr(enumerated.Account, "move", note)
    return seen


@dataclass
class Noting:
    """A drafter, and how many leaves stood beside the drafts it made."""

    proposer: Proposer
    leaves: Counter[int] = field(default_factory=Counter)
    name: str = "noting"

    def propose(self, context: Context, limit: int) -> Draft:
        draft = self.proposer.propose(context, limit)
        self.leaves.update(map(len, draft.leaves))
        return draft


def wanting(count: int) -> TreeShape:
    return TreeShape(((0.0, count),))


def skip(
    shape: TreeShape, plan: SkipPlan = PLAN, cost: Callable[[int], float] | None = None
) -> Noting:
    return Noting(SkipProposer(remembering(), plan, 2, 0.0, shape, cost, 0.2))


@pytest.mark.parametrize("name", SETTINGS)
def test_with_a_layer_left_out(name: str, moves: list[int]) -> None:
    counts, _ = sample(SETTINGS[name], skip(SAMPLING_SHAPE))
    assert len(moves) > enumerated.RUNS / 20
    assert chi_square(counts, enumerated.law(SETTINGS[name])) > 1e-3


@pytest.mark.parametrize("count", [1, 3, 10])
def test_with_few_leaves_or_all_there_are(count: int, moves: list[int]) -> None:
    setting, proposer = SETTINGS["temperature 0.7"], skip(wanting(count))
    counts, _ = sample(setting, proposer)
    assert set(proposer.leaves) == {min(count, VOCABULARY - 1)}
    assert len(moves) > enumerated.RUNS / 20
    assert chi_square(counts, enumerated.law(setting)) > 1e-3


@pytest.mark.parametrize("name", ["temperature 0.7", "top-p 0.8", "top-k 5"])
def test_with_leaves_trimmed_by_cost(name: str, moves: list[int]) -> None:
    """How many stand depends on what the draft was sure of, and must not show in the output."""

    def cost(width: int) -> float:
        return 1.0 + 0.03 * width + 0.1 * (width > 5)

    proposer = skip(SAMPLING_SHAPE, cost=cost)
    counts, _ = sample(SETTINGS[name], proposer)
    assert len(proposer.leaves) > 3  # none at some places, several at others
    assert 0 in proposer.leaves
    assert len(moves) > 20
    assert chi_square(counts, enumerated.law(SETTINGS[name])) > 1e-3


def test_where_drafts_are_the_targets_leaves_are_idle(moves: list[int]) -> None:
    setting = SETTINGS["top-p 0.8"]
    counts, share = sample(setting, skip(wanting(3), FULL))
    assert share is not None and share > 0.999
    assert chi_square(counts, enumerated.law(setting)) > 1e-3


@dataclass
class Hopeless:
    """Drafts what the target never says; the rest of what it has goes into the leaves."""

    setting: SamplingParams
    certain: bool
    name: str = "hopeless"

    def propose(self, context: Context, limit: int) -> Draft:
        text, tokens = tuple(context.tokens), list[int]()
        rows, leaves = list[torch.Tensor](), list[tuple[int, ...]]()
        for _ in range(min(limit, 2)):
            p = next_token(text, self.setting)
            token = int(p.argmin())
            assert p[token] == 0
            q = torch.linspace(1.0, 2.0, VOCABULARY) * 1e-6
            q[token] = 1.0
            q /= q.sum()
            side = torch.arange(VOCABULARY)[torch.arange(VOCABULARY) != token].tolist()
            if not self.certain:
                token, side = distinct(context.sampler, q, 4)
            tokens.append(token)
            rows.append(q)
            leaves.append(tuple(side[:4]))
            text = (*text, token)
        return Draft(tuple(tokens), None if self.certain else torch.stack(rows), tuple(leaves))


@pytest.mark.parametrize(
    ("name", "certain"), [("top-p 0.8", False), ("top-k 5", False), ("top-p 0.8", True)]
)
def test_where_only_leaves_decide(name: str, certain: bool, moves: list[int]) -> None:
    counts, _ = sample(SETTINGS[name], Hopeless(SETTINGS[name], certain))
    assert len(moves) > enumerated.RUNS / 5
    assert chi_square(counts, enumerated.law(SETTINGS[name])) > 1e-3


@pytest.mark.parametrize("wrong", [q_not_normalised, p_as_it_was])
def test_wrong_rules_show_in_the_output(
    wrong: Callable[[torch.Tensor, torch.Tensor | None, int], Refusal],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rules, "_after_rejection", wrong)
    setting = SETTINGS["temperature 0.7"]
    counts, _ = sample(setting, skip(wanting(3)))
    assert chi_square(counts, enumerated.law(setting)) < 1e-6


@pytest.mark.parametrize("name", SETTINGS)
def test_the_remembering_decoder_changes_nothing(name: str, moves: list[int]) -> None:
    plain = Decoder(copy.deepcopy(enumerated.model()))
    for seed in range(20):
        setting = SamplingParams(**{**vars(SETTINGS[name]), "seed": seed})
        outputs = []
        for decoder in (plain, remembering()):
            proposer = SkipProposer(decoder, PLAN, 3, 0.0, SAMPLING_SHAPE)
            one = Generation(decoder, GenerationRequest(PROMPT, 8, setting), proposer=proposer)
            outputs.append([(step.tokens, step.leaves) for step in one])
        assert outputs[0] == outputs[1]
    assert moves
