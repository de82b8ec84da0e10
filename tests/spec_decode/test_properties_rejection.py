"""The acceptance rules against naive references: greedy by enumeration, sampled by exact laws.

Of the sampled rule only what it does is used. It is given random numbers of our own making, and
for each candidate the number is searched up to which it is accepted: that is the chance with which
it is. What it draws the last token from is noted in place of drawing. All of these are fractions of
small numbers, so the law of the output can be summed up exactly and compared with the target's.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conflayers_cli.engine.sampler import Sampler
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.spec_decode import rejection_sampler as rules
from conflayers_cli.spec_decode.proposer import Draft
from conflayers_cli.spec_decode.rejection_sampler import accept_greedy, accept_sampled

CPU = torch.device("cpu")
SIZE = 4
PARTS = 4
"""Probabilities are multiples of one over this."""
LARGEST = 300
"""Of the denominators: the fractions are further apart than float32 numbers."""
ALMOST_ONE = 1 - 2**-24
"""The greatest number that a float32 generator gives."""
Law = tuple[Fraction, ...]
Text = tuple[int, ...]

LAWS = [
    tuple(Fraction(part, PARTS) for part in parts)
    for parts in itertools.product(range(PARTS + 1), repeat=SIZE)
    if sum(parts) == PARTS
]


class Asked(Sampler):
    """Gives the numbers it is told to, and notes what is drawn from."""

    def __init__(self, numbers: Sequence[float]) -> None:
        super().__init__(SamplingParams(1.0), SIZE, CPU)
        self.numbers = numbers
        self.laws: list[Law] = []

    def uniform(self, count: int) -> torch.Tensor:
        assert count == len(self.numbers)
        return torch.tensor(self.numbers)

    def draw(self, probabilities: torch.Tensor) -> int:
        shares = (probabilities / probabilities.sum()).tolist()
        self.laws.append(tuple(exact(share) for share in shares))
        return 0


def exact(number: float) -> Fraction:
    return Fraction(number).limit_denominator(LARGEST)


def asked(draft: Draft, target: torch.Tensor, numbers: Sequence[float]) -> tuple[int, Law]:
    """(the row that stands, the law of the token behind it)."""
    sampler = Asked(numbers)
    row, _ = accept_sampled(draft.tokens, target, draft.distribution, sampler, draft.leaves)
    (law,) = sampler.laws  # of one draw
    return row, law


def outcomes(draft: Draft, target: torch.Tensor) -> Iterator[tuple[Fraction, int, Law]]:
    """All that can become of a draft: (chance, the row that stands, the law of what follows)."""
    numbers, reached = [0.0] * draft.width, Fraction(1)
    for place in range(len(draft.tokens)):
        leaves = [i for i in range(len(draft.tokens), draft.width) if draft.parents[i] == place]
        trial, refused, stood = list(numbers), Fraction(1), Fraction(0)
        for candidate in (place, *leaves):
            ends = {place, *(leaf + 1 for leaf in leaves)}  # what gets no further than this place
            rows = {candidate + 1} if candidate in leaves else set(range(draft.width + 1)) - ends
            taken = _chance(draft, target, trial, candidate, rows)
            if candidate == place:
                stood = taken
            elif taken:
                trial[candidate] = 0.0
                yield (reached * refused * taken, *asked(draft, target, trial))
            refused *= 1 - taken
            trial[candidate] = ALMOST_ONE
            if not refused:
                break
        if refused:
            yield (reached * refused, *asked(draft, target, trial))
        reached *= stood
        if not reached:
            return
    yield (reached, *asked(draft, target, numbers))


def _chance(
    draft: Draft, target: torch.Tensor, numbers: list[float], at: int, rows: set[int]
) -> Fraction:
    """With which a candidate is accepted, so that one of these rows stands."""

    def stands(number: float) -> bool:
        trial = [*numbers[:at], number, *numbers[at + 1 :]]
        return asked(draft, target, trial)[0] in rows

    low, high = 0.0, ALMOST_ONE
    if stands(high) or not stands(low):
        return Fraction(int(stands(high)))
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if stands(middle) else (low, middle)
    return exact(low)


class Drawn:
    """Laws of every text's next token, drawn at random: p the target's, q the draft's."""

    def __init__(self, seed: int, length: int) -> None:
        self.length = length
        chance = random.Random(seed)
        texts = [t for n in range(length + 1) for t in itertools.product(range(SIZE), repeat=n)]
        self.p = {text: chance.choice(LAWS) for text in texts}
        self.q = {text: chance.choice(LAWS) for text in texts}

    def target(self, draft: Draft) -> torch.Tensor:
        paths = paths_of(draft)
        return torch.tensor([[float(p) for p in self.p[path]] for path in paths])

    def drafts(self, leaves: int) -> Iterator[tuple[Fraction, Draft]]:
        """All drafts with the chance of each; leaves drawn in turn, without replacement."""
        for tokens in itertools.product(range(SIZE), repeat=self.length):
            laws = [self.q[tokens[:i]] for i in range(self.length)]
            chains = [(Fraction(1), list[Text]())]
            for token, q in zip(tokens, laws, strict=True):
                count = min(leaves, sum(share > 0 for share in q) - 1)
                chains = [
                    (chance * more, [*sides, side])
                    for chance, sides in chains
                    for more, side in _in_turn(q, token, count)
                    if more
                ]
            rows = torch.tensor([[float(share) for share in law] for law in laws])
            for chance, sides in chains:
                yield chance, Draft(tokens, rows, tuple(sides) if leaves else ())

    def summed(self, drafts: Iterator[tuple[Fraction, Draft]]) -> dict[Text, Fraction]:
        """The law of texts one token longer than the drafts, as the rule makes it."""
        total: dict[Text, Fraction] = {}
        for chance, draft in drafts:
            paths = paths_of(draft)
            for more, row, law in outcomes(draft, self.target(draft)):
                for token, share in enumerate(law):
                    self._extend(total, (*paths[row], token), chance * more * share)
        return {text: share for text, share in total.items() if share}

    def _extend(self, total: dict[Text, Fraction], text: Text, chance: Fraction) -> None:
        """What an early refusal leaves open comes from p, as by further steps of decoding."""
        if not chance:
            return
        if len(text) > self.length:
            total[text] = total.get(text, Fraction(0)) + chance
            return
        for token, share in enumerate(self.p[text]):
            self._extend(total, (*text, token), chance * share)

    def law(self) -> dict[Text, Fraction]:
        """The target's, of the same texts."""
        found = {}
        for text in itertools.product(range(SIZE), repeat=self.length + 1):
            share = Fraction(1)
            for i, token in enumerate(text):
                share *= self.p[text[:i]][token]
            found[text] = share
        return {text: share for text, share in found.items() if share}


def _in_turn(q: Law, token: int, count: int) -> Iterator[tuple[Fraction, Text]]:
    """The chances of a token and so many others, drawn from q without replacement."""
    others = [t for t in range(SIZE) if t != token]
    for side in itertools.permutations(others, count) if q[token] else ():
        chance, left = q[token], 1 - q[token]
        for leaf in side:
            chance, left = chance * q[leaf] / left if left else Fraction(0), left - q[leaf]
        yield chance, side


def paths_of(draft: Draft) -> list[Text]:
    """The drafted tokens up to each row, that one's own included; row 0 is behind the text."""
    paths: list[Text] = [draft.tokens[:i] for i in range(len(draft.tokens) + 1)]
    for place, side in enumerate(draft.leaves):
        paths += [(*draft.tokens[:place], leaf) for leaf in side]
    return paths


def law_of_one(p: Law, q: Law) -> tuple[Drawn, dict[Text, Fraction]]:
    """One place with these laws, chains of one token: (all laws, what the rule makes of it)."""
    one = Drawn(0, 1)
    one.p[()], one.q[()] = p, q
    return one, one.summed(one.drafts(0))


@pytest.mark.parametrize("p", LAWS, ids=lambda law: " ".join(str(share) for share in law))
def test_one_token_has_the_targets_law_whatever_the_drafts(p: Law) -> None:
    """All p and q there are in quarters: q equal to p, without a token in common, all of q's tokens
    likelier in the target, zeros on either side.
    """
    for q in LAWS:
        one, summed = law_of_one(p, q)
        assert summed == one.law()


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), leaves=st.integers(0, 3))
def test_chains_and_leaves_have_the_targets_law(seed: int, leaves: int) -> None:
    drawn = Drawn(seed, 1 + seed % 2)
    assert drawn.summed(drawn.drafts(leaves)) == drawn.law()


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.lists(st.integers(0, SIZE - 1), min_size=2, max_size=2),
    leaves=st.integers(0, 3),
)
def test_certain_drafts_have_the_targets_law(seed: int, tokens: list[int], leaves: int) -> None:
    """Any draft at all, if it was settled before anything was drawn."""
    drawn = Drawn(seed, 2)
    sides = tuple(tuple((t + 1 + i) % SIZE for i in range(leaves)) for t in tokens)
    draft = Draft(tuple(tokens), None, sides if leaves else ())
    assert drawn.summed(iter([(Fraction(1), draft)])) == drawn.law()


def test_a_rule_that_is_slightly_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A q that keeps the refused token, which only a second candidate feels."""
    right = rules._after_rejection
    monkeypatch.setattr(rules, "_after_rejection", lambda p, q, token: (right(p, q, token)[0], q))
    wrong = [seed for seed in range(30) if (d := Drawn(seed, 1)).summed(d.drafts(3)) != d.law()]
    assert len(wrong) >= 4


# Greedy


@st.composite
def greedy_drafts(draw: st.DrawFn) -> tuple[Draft, list[int]]:
    """(a draft whose candidates for a place all differ, the model's choice at each of its rows)."""
    tokens, leaves = [], []
    for _ in range(draw(st.integers(0, 4))):
        token, *side = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True))
        tokens.append(token)
        leaves.append(tuple(side))
    draft = Draft(tuple(tokens), leaves=tuple(leaves) if draw(st.booleans()) else ())
    best = draw(st.lists(st.integers(0, 3), min_size=draft.width + 1, max_size=draft.width + 1))
    return draft, best


@settings(max_examples=500)
@given(greedy_drafts())
def test_greedy_keeps_the_longest_path_that_agrees(drawn: tuple[Draft, list[int]]) -> None:
    """Of all paths there are, those on which every token is the model's choice behind the last."""
    draft, best = drawn
    agreeing = [0]
    for row in range(1, draft.width + 1):  # parents come first
        parent = draft.parents[row - 1]
        if parent in agreeing and draft.nodes[row - 1] == best[parent]:
            agreeing.append(row)
    longest = max(agreeing, key=lambda row: len(paths_of(draft)[row]))
    assert accept_greedy(draft.tokens, best, draft.leaves) == (longest, best[longest])
