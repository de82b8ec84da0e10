"""Whatever is drafted: budgets, end tokens and stop strings hold, and limits are kept to."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conflayers_cli.engine.sampler import Sampler
from conflayers_cli.generation.batch import Batch
from conflayers_cli.generation.generator import TextGenerator
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.generation.sequence import Step
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.mixed import MixedProposer
from conflayers_cli.spec_decode.proposer import Context, Draft, SkipProposer
from conflayers_cli.spec_decode.tree import TreeShape
from tests import tiny
from tests.generation.test_generator import Bytes
from tests.spec_decode import simulated

LENGTH = 24
Pattern = list[tuple[int, bool]]
"""For each step how many tokens are drafted, and whether the last of them is wrong."""
PATTERNS = st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=5)


@functools.cache
def vanilla(length: int, seed: int) -> tuple[int, ...]:
    """What follows a prompt of `tiny.prompt`."""
    prompt = tiny.prompt(length, seed)
    one = Generation(tiny.decoder("llama"), GenerationRequest(prompt, LENGTH))
    tiny.steps_of(one)
    return tuple(one.output)


@dataclass
class Patterned:
    """Drafts what will come, as far as the pattern says; perhaps more than it was asked for.

    Attributes:
        begin: length of the prompt.
        text: what follows it.
        pattern: step by step, from the start again at its end.
        asked: the limits so far, each with the length of the text then.
    """

    begin: int
    text: list[int]
    pattern: Pattern
    leaf: bool = False
    name: str = "patterned"
    asked: list[tuple[int, int]] = field(default_factory=list)

    def propose(self, context: Context, limit: int) -> Draft:
        return self.propose_batch([context], [limit])[0]

    def propose_batch(self, contexts: Sequence[Context], limits: Sequence[int]) -> list[Draft]:
        return [self._draft(*each) for each in zip(contexts, limits, strict=True)]

    def _draft(self, context: Context, limit: int) -> Draft:
        size, wrong = self.pattern[len(self.asked) % len(self.pattern)]
        self.asked.append((limit, len(context.tokens)))
        at = len(context.tokens) - self.begin
        tokens = self.text[at : at + min(size, limit)]
        if not (wrong and tokens):
            return Draft(tuple(tokens))
        right = tokens[-1]
        tokens[-1] = (right + 1) % tiny.VOCABULARY
        leaves = [()] * (len(tokens) - 1) + [(right,)] if self.leaf else []
        return Draft(tuple(tokens), leaves=tuple(leaves))


def cut(text: list[int], ends: frozenset[int], watched: int, budget: int) -> tuple[list[int], str]:
    """(what is to be kept of a text, why it ends): by the first of all that end it."""
    for i, token in enumerate(text):
        if token in ends or i + 1 == watched:
            return text[: i + 1], "stop"
        if i + 1 == budget:
            return text[: i + 1], "length"
    raise AssertionError("the text is too short")


@settings(max_examples=150)
@given(
    length=st.integers(1, 9),
    seed=st.integers(0, 30),
    pattern=PATTERNS,
    leaf=st.booleans(),
    ends=st.sets(st.integers(0, LENGTH - 1), max_size=2),
    watched=st.integers(1, 2 * LENGTH),
    budget=st.integers(1, LENGTH),
    batched=st.booleans(),
)
def test_nothing_is_kept_behind_what_ends_a_text(
    length: int,
    seed: int,
    pattern: Pattern,
    leaf: bool,
    ends: set[int],
    watched: int,
    budget: int,
    batched: bool,
) -> None:
    """Wherever it falls: behind the prompt, within a draft that stands, at a leaf, behind it."""
    prompt = tiny.prompt(length, seed)
    text = list(vanilla(length, seed))
    end_tokens = frozenset(text[i] for i in ends)
    expected, reason = cut(text, end_tokens, watched, budget)
    seen: list[int] = []

    def watch(token: int) -> bool:
        seen.append(token)
        return len(seen) == watched

    proposer = Patterned(length, text, pattern, leaf)
    model, steps = tiny.decoder("llama"), list[Step]()
    if batched:
        request = GenerationRequest(prompt, budget, SamplingParams(), on_token=watch)
        batch = Batch(model, [request], proposer=proposer, end_tokens=end_tokens)
        batch.run()
        (output,), (finish,), (steps,) = batch.outputs, batch.finishes, batch.steps
    else:
        one = Generation(
            model,
            GenerationRequest(prompt, budget, on_token=watch),
            proposer=proposer,
            end_tokens=end_tokens,
        )
        steps = tiny.steps_of(one)
        output, finish = one.output, one.finish
    assert (output, finish, seen) == (expected, reason, expected)
    assert [token for step in steps for token in step.tokens] == expected
    assert all(step.accepted <= min(step.drafted, len(step.tokens)) for step in steps)
    assert [step.finish for step in steps] == [None] * (len(steps) - 1) + [reason]
    for limit, known in proposer.asked:
        assert 1 <= limit == budget - (known - length) - 1  # the last place is the model's own


@settings(max_examples=60)
@given(
    seed=st.integers(0, 9),
    pattern=PATTERNS,
    places=st.lists(st.tuples(st.integers(0, 18), st.integers(1, 4)), max_size=3),
    budget=st.integers(1, 20),
)
def test_a_stop_string_in_the_middle_of_a_draft(
    seed: int, pattern: Pattern, places: list[tuple[int, int]], budget: int
) -> None:
    """The text ends before it, and the tokens with the one that completes it."""
    prompt = tiny.prompt(9, seed)
    tokens = list(vanilla(9, seed))
    text = Bytes().decode(tokens, skip_special_tokens=False)
    stops = tuple(text[at : at + size] for at, size in places)
    done = [
        (n, min(text.find(stop) for stop in stops if stop in text[:n]))
        for n in range(1, budget + 1)
        if any(stop in text[:n] for stop in stops)
    ]
    kept, end = done[0] if done else (budget, budget)
    generator = TextGenerator(
        tiny.decoder("llama"), Plain(), proposer=Patterned(9, tokens, pattern)
    )
    (given,) = generator.generate([GenerationRequest(prompt, budget, stop=stops)])
    assert list(given.token_ids) == tokens[:kept]
    assert given.text == text[:end]
    assert given.finish_reason == ("stop" if done else "length")


class Plain(Bytes):
    """One character a token, special tokens and all."""

    def decode(self, tokens: list[int], *, skip_special_tokens: bool, **other: object) -> str:
        return super().decode(tokens, skip_special_tokens=False)


# Limits


def check_draft(draft: Draft, limit: int, most: int, ends: frozenset[int]) -> None:
    assert len(draft.tokens) <= min(limit, most)
    assert not set(draft.tokens[:-1]) & ends  # nothing is drafted behind an end token


@settings(max_examples=80)
@given(
    layers=st.sets(st.integers(1, 3), min_size=1),
    limit=st.integers(1, 9),
    most=st.integers(1, 9),
    ends=st.integers(0, 4),
    temperature=st.sampled_from([0.0, 1.0]),
    leaves=st.booleans(),
    seed=st.integers(0, 99),
)
def test_chains_keep_to_their_limit_and_end_at_end_tokens(
    layers: set[int],
    limit: int,
    most: int,
    ends: int,
    temperature: float,
    leaves: bool,
    seed: int,
) -> None:
    decoder, text = tiny.decoder("llama"), tiny.prompt(9, seed)
    tree = TreeShape(((0.0, 2),)) if leaves else None
    proposer = SkipProposer(decoder, SkipPlan.of_layers(layers), most, 0.0, tree)

    def draft(end_tokens: frozenset[int]) -> Draft:
        cache = decoder.new_cache(40)
        decoder.prefill(torch.tensor([text[:-1]]), cache)
        sampler = Sampler(
            SamplingParams(temperature, seed=seed), decoder.vocabulary, decoder.device
        )
        return proposer.propose(Context(list(text), cache, sampler, end_tokens), limit)

    whole = draft(frozenset()).tokens
    assert len(whole) == min(limit, most)
    end_tokens = frozenset(whole[ends : ends + 1])
    found = draft(end_tokens)
    check_draft(found, limit, most, end_tokens)
    stop = next((i for i, token in enumerate(whole) if token in end_tokens), len(whole) - 1)
    assert found.tokens == whole[: stop + 1]


@settings(max_examples=80)
@given(
    rows=st.integers(1, 3),
    skip=st.booleans(),
    ngram=st.booleans(),
    most=st.integers(1, 12),
    limits=st.lists(st.integers(0, 14), min_size=1, max_size=9),
    period=st.integers(2, 9),
    ends=st.frozensets(st.integers(0, 8), max_size=2),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 99),
)
def test_it_keeps_to_the_room_and_never_drafts_behind_an_end_token(
    rows: int,
    skip: bool,
    ngram: bool,
    most: int,
    limits: list[int],
    period: int,
    ends: frozenset[int],
    temperature: float,
    seed: int,
) -> None:
    """With drafts so cheap that it goes on as far as it may, in texts that repeat themselves."""
    table = simulated.costs(0.05, 0.001)
    texts = [simulated.random_text(80, simulated.independent(0.9), seed + i) for i in range(rows)]
    for text in texts:
        text.tokens[:] = [text.tokens[i % period] % 9 for i in range(len(text.tokens))]
    plan = simulated.PLAN if skip else None
    model = simulated.Model(texts)
    proposer = MixedProposer(model, plan, table, ngram=ngram, max_tokens=most)  # type: ignore[arg-type]
    sampling = SamplingParams(temperature, seed=seed)
    samplers = [Sampler(sampling, simulated.VOCABULARY, simulated.CPU) for _ in texts]
    known = [list(text.tokens[:12]) for text in texts]
    for at in range(8):
        room = [limits[(at + i) % len(limits)] for i in range(rows)]
        contexts = [
            Context(own, None, sampler, ends)  # type: ignore[arg-type]
            for own, sampler in zip(known, samplers, strict=True)
        ]
        drafts = proposer.propose_batch(contexts, room)
        for text, own, draft, limit in zip(texts, known, drafts, room, strict=True):
            check_draft(draft, limit, most, ends)
            assert len(draft.sources) == len(draft.tokens)
            own += text.tokens[len(own) : len(own) + 1 + at % 3]
