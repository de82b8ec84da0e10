"""`conflayers_generate` against transformers' own loop: the same tokens, the same calls of others'
code, and a model that is as it was.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers.generation import StoppingCriteria, StopStringCriteria

from conflayers_cli import ConfLayersError, GenerateError, InputError, conflayers_generate, release
from conflayers_cli.api import attached_model as borrowing
from conflayers_cli.api import hf_generate as module
from conflayers_cli.api.attached_model import attach
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.batch import Batch
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.sequence import Step
from conflayers_cli.kernels.packed_linear import MergedLinearPart
from conflayers_cli.models.config_fingerprint import config_fingerprint
from conflayers_cli.profile.schema import DraftSettings, ModelFingerprint, Profile, SkipSection
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import Draft, SkipProposer
from tests import tiny
from tests.cli.conftest import byte_tokenizer
from tests.engine import law
from tests.kernels.tape import TapeRecorder

NEW = 24
LOOKED_AT = 2
"""Tokens of a sampled text whose law is looked at: 64 outcomes."""
Ids = list[int]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Costs that are measured are kept in a folder of this run's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONFLAYERS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def model() -> Any:
    return tiny.build(tiny.CONFIGS["llama"]())


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """The steps that are taken."""
    taken: list[Step] = []

    step = Generation.step

    def noted(generation: Generation) -> Step:
        taken.append(step(generation))
        return taken[-1]

    monkeypatch.setattr(Generation, "step", noted)
    return taken


def profile_for(model: Any) -> Profile:
    """Four tokens at once, whatever they cost."""
    return Profile(
        model=ModelFingerprint.model_validate({"name": "tiny", **config_fingerprint(model.config)}),
        skip=SkipSection.of(SkipPlan.of_layers([model.config.num_hidden_layers // 2])),
        draft=DraftSettings(max_tokens=4, stop_probability=0.0, by="skip", lookahead=False),
    )


def asked(model: Any, prompt: Ids, custom: bool, **more: Any) -> Any:
    """What ``generate`` gives, by our loop or its own."""
    ids = torch.tensor([prompt])
    ours: dict[str, Any] = {}
    if custom:
        ours = {"custom_generate": conflayers_generate, "profile": profile_for(model)}
    given = {"max_new_tokens": NEW, "do_sample": False, **ours, **more}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **given)


def both(model: Any, prompt: Ids, **more: Any) -> tuple[Ids, Ids]:
    """(by our loop, by transformers' own), prompt and output."""
    ours, theirs = (asked(model, prompt, custom, **more) for custom in (True, False))
    return ours[0].tolist(), theirs[0].tolist()


def script(monkeypatch: pytest.MonkeyPatch, text: Ids, *, wrong_every: int = 0) -> None:
    """Have up to six tokens of a text drafted, with a wrong one in some places."""

    def propose(tokens: Ids) -> Ids:
        drafted = text[len(tokens) : len(tokens) + 6]
        places = range(len(tokens), len(tokens) + len(drafted))
        return [
            (token + 1) % tiny.VOCABULARY if wrong_every and place % wrong_every == 0 else token
            for place, token in zip(places, drafted, strict=True)
        ]

    monkeypatch.setattr(module, "get_proposer", lambda *_, **__: tiny.Scripted(propose))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy_text_is_that_of_transformers(family: str, steps: list[Step]) -> None:
    model = tiny.build(tiny.CONFIGS[family]())
    ours, theirs = both(model, tiny.prompt(9))
    assert ours == theirs
    assert len(ours) == 9 + NEW
    assert sum(step.drafted for step in steps) > sum(step.accepted for step in steps) > 0


def allowed(row: int, ids: torch.Tensor) -> Ids:
    """A rule of what may follow, by the last token."""
    assert row == 0
    return [token for token in range(tiny.VOCABULARY) if (token + int(ids[-1])) % 3]


class Shift(hf.LogitsProcessor):
    """Somebody's processor: favours a token that depends on the length, and writes in place."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, input_ids.shape[1] % tiny.VOCABULARY] += 2.0
        return scores


PROCESSORS: dict[str, dict[str, Any]] = {
    "repetition penalty": {"repetition_penalty": 1.3},
    "its prompt's": {"encoder_repetition_penalty": 1.5},
    "n-grams": {"no_repeat_ngram_size": 1},
    "the prompt's n-grams": {"encoder_no_repeat_ngram_size": 1},
    "bad words": {"bad_words_ids": [[3], [5, 7], [94], [69, 87]]},
    "sequence bias": {"sequence_bias": [[[3], 2.5], [[5, 7], -3.0]]},
    "least length": {"min_length": 20, "eos_token_id": list(range(50)), "pad_token_id": 0},
    "least new tokens": {"min_new_tokens": 6, "eos_token_id": list(range(50)), "pad_token_id": 0},
    "forced end": {"forced_eos_token_id": 42},
    "decay": {"exponential_decay_length_penalty": (3, 1.4), "eos_token_id": 9, "pad_token_id": 0},
    "suppressed": {"suppress_tokens": list(range(0, 100, 3))},
    "suppressed at the start": {"begin_suppress_tokens": list(range(90))},
    "allowed": {"prefix_allowed_tokens_fn": allowed},
    "guidance": {"guidance_scale": 1.5},
    "normalised": {"renormalize_logits": True},
    "watermark": {"watermarking_config": hf.WatermarkingConfig(bias=4.0, context_width=1)},
    "somebody's": {"logits_processor": hf.LogitsProcessorList([Shift()])},
    "several": {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
        "logits_processor": hf.LogitsProcessorList([Shift()]),
    },
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_are_heeded_at_every_token(name: str, model: Any, steps: list[Step]) -> None:
    prompt = tiny.prompt(9, seed=3)
    ours, theirs = both(model, prompt, **PROCESSORS[name])
    assert ours == theirs
    assert sum(step.drafted for step in steps) > 0
    # a test of a processor that changes nothing could not fail
    assert theirs != both(model, prompt)[1] or name == "normalised"


@pytest.mark.parametrize("name", ["n-grams", "somebody's"])
def test_recorded_passes_heed_processors(
    name: str, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where passes are replayed, tokens that nobody has to look at go from pass to pass."""
    recorded = partial(Decoder, recorder=TapeRecorder())
    monkeypatch.setattr(borrowing, "Decoder", recorded)
    more = {"profile": None, **PROCESSORS[name]}
    given = asked(model, tiny.prompt(9), True, **more)
    assert attach(model).decoder.runner.graphs > 0
    del more["profile"]
    assert torch.equal(given, asked(model, tiny.prompt(9), False, **more))


def test_a_forced_beginning(model: Any) -> None:
    ours, theirs = both(model, [17], forced_bos_token_id=33)
    assert ours == theirs
    assert ours[1] == 33


class Log(hf.LogitsProcessor):
    """Remembers what it was called with, and goes by it."""

    def __init__(self) -> None:
        self.seen: list[Ids] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert scores.dtype == torch.float32
        self.seen.append(input_ids[0].tolist())
        scores[:, :: 1 + len(self.seen) % 3] -= 1.5
        return scores


class LogStop(StoppingCriteria):
    """Stops at its n-th call."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.seen: list[Ids] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **other: Any) -> torch.Tensor:
        self.seen.append(input_ids[0].tolist())
        return torch.tensor([len(self.seen) == self.at])


@pytest.mark.parametrize("wrong_every", [0, 2, 5])
@pytest.mark.parametrize("at", [1, 2, 5, 11, 99])
def test_others_code_is_called_as_by_transformers(
    model: Any, monkeypatch: pytest.MonkeyPatch, steps: list[Step], at: int, wrong_every: int
) -> None:
    """Whatever was drafted, and wherever it stops: what remembers its calls sees the same ones."""
    prompt = tiny.prompt(9)
    calls = {}
    for custom in (False, True):
        log, stop = Log(), LogStop(at)
        given = asked(
            model,
            prompt,
            custom,
            logits_processor=hf.LogitsProcessorList([log]),
            stopping_criteria=hf.StoppingCriteriaList([stop]),
        )
        calls[custom] = given[0].tolist(), log.seen, stop.seen
        if not custom:
            script(monkeypatch, calls[False][0], wrong_every=wrong_every)
    assert calls[True] == calls[False]
    assert len(calls[True][0]) == 9 + min(at, NEW)
    if at > 5:
        assert any(step.accepted > 1 for step in steps) != (wrong_every == 2)


@pytest.mark.parametrize("at", range(1, 9))
def test_criteria_end_accepted_drafts_in_the_middle(
    model: Any, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Without processors, too; drafts of six tokens are all right."""
    prompt = tiny.prompt(9)
    whole = asked(model, prompt, False)[0].tolist()
    script(monkeypatch, whole)
    stop = LogStop(at)
    given = asked(model, prompt, True, stopping_criteria=hf.StoppingCriteriaList([stop]))
    assert given[0].tolist() == whole[: 9 + at]
    assert stop.seen == [whole[: 9 + length] for length in range(1, at + 1)]


@pytest.mark.parametrize("place", range(6))
def test_end_tokens_end_accepted_drafts_in_the_middle(
    model: Any, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    prompt = tiny.prompt(9)
    whole = asked(model, prompt, False)[0].tolist()
    end = whole[9 + place]
    ends = {"eos_token_id": [end], "pad_token_id": 0}
    expected = asked(model, prompt, False, **ends)[0].tolist()
    script(monkeypatch, whole)
    assert asked(model, prompt, True, **ends)[0].tolist() == expected
    assert expected == whole[: whole.index(end, 9) + 1]


def test_lengths(model: Any) -> None:
    prompt = tiny.prompt(9)
    for lengths in ({"max_new_tokens": 1}, {"max_new_tokens": None, "max_length": 14}):
        ours, theirs = both(model, prompt, **lengths)
        assert ours == theirs
        assert len(ours) in (10, 14)


def test_time_is_up_after_a_token(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = tiny.prompt(9)
    whole = asked(model, prompt, False)[0].tolist()
    script(monkeypatch, whole)
    assert asked(model, prompt, True, max_time=1e-9)[0].tolist() == whole[:10]
    assert asked(model, prompt, True, max_time=1e9)[0].tolist() == whole


def test_stop_texts() -> None:
    sizes = {**tiny.LLAMA_LIKE, "vocab_size": 257}
    model = tiny.build(hf.LlamaConfig(**sizes))
    tokenizer = byte_tokenizer(None)
    prompt = tiny.prompt(9)
    whole = asked(model, prompt, False)[0].tolist()
    texts = [tokenizer.decode([token]) for token in whole]
    letter = next(text for text in texts[13:] if text.isascii() and text not in texts[9:13])
    stop = StopStringCriteria(tokenizer, letter)
    ours, theirs = both(model, prompt, stopping_criteria=hf.StoppingCriteriaList([stop]))
    assert ours == theirs == whole[: texts.index(letter, 9) + 1]


class Ear:
    """A streamer that remembers what it heard."""

    def __init__(self) -> None:
        self.heard: list[Ids] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        assert not self.ended
        assert value.device.type == "cpu"
        self.heard.append(value.tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("more", [{}, {"no_repeat_ngram_size": 2}], ids=["plain", "processed"])
def test_a_streamer_hears_every_token_in_order(model: Any, more: dict[str, Any]) -> None:
    ours, theirs = Ear(), Ear()
    given = asked(model, tiny.prompt(9), True, streamer=ours, **more)
    asked(model, tiny.prompt(9), False, streamer=theirs, **more)
    assert ours.heard == theirs.heard == [[given[0, :9].tolist()], *given[0, 9:, None].tolist()]
    assert ours.ended == theirs.ended == 1


def test_a_streamer_may_come_by_partial(model: Any) -> None:
    """For callers between generate and our loop, of which nothing can be known."""
    ears = Ear(), Ear()
    own = partial(conflayers_generate, streamer=ears[0], draft="none")
    ids = torch.tensor([tiny.prompt(9)])
    mask = torch.ones_like(ids)
    model.generate(ids, attention_mask=mask, max_new_tokens=6, custom_generate=own)
    model.generate(ids, attention_mask=mask, max_new_tokens=6, streamer=ears[1])
    assert ears[0].heard == ears[1].heard
    assert ears[0].ended == 1


def test_texts_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {**tiny.LLAMA_LIKE, "vocab_size": 257}
    model = tiny.build(hf.LlamaConfig(**sizes))
    for custom in (True, False):
        asked(model, tiny.prompt(9), custom, streamer=hf.TextStreamer(byte_tokenizer(None)))
    text = capsys.readouterr().out
    assert text[: len(text) // 2] == text[len(text) // 2 :]


def test_scores_and_logits(model: Any) -> None:
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    more = {**wanted, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    ours, theirs = (asked(model, tiny.prompt(9), custom, **more) for custom in (True, False))
    assert torch.equal(ours.sequences, theirs.sequences)
    for name in ("scores", "logits"):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert len(one) == len(other) == NEW
        torch.testing.assert_close(torch.cat(one), torch.cat(other), rtol=1e-4, atol=1e-4)
    plain = asked(model, tiny.prompt(9), True, return_dict_in_generate=True)
    assert plain.scores is plain.logits is None
    assert torch.equal(plain.sequences, asked(model, tiny.prompt(9), False))


def padded(prompts: Sequence[Ids]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[0] * (longest - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
    }


def allowed_in(row: int, ids: torch.Tensor) -> Ids:
    """A rule of what may follow, by the row and the last token, that knows whose the text is."""
    assert int(ids[-1]) < tiny.VOCABULARY and row < 3
    return [token for token in range(tiny.VOCABULARY) if (token + int(ids[-1]) + row) % 3]


class ShiftRows(Shift):
    """Treats each row alone, and says so."""

    rowwise = True


BATCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "penalty": {"repetition_penalty": 1.3},
    "processed": {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
    "the prompts' n-grams": {"encoder_no_repeat_ngram_size": 1},
    "the prompts' penalty": {"encoder_repetition_penalty": 1.5, "no_repeat_ngram_size": 3},
    "allowed": {"prefix_allowed_tokens_fn": allowed_in},
    "somebody's": {"logits_processor": hf.LogitsProcessorList([ShiftRows()])},
    "ends": {"eos_token_id": list(range(12)), "pad_token_id": 99},
    "processed, ends": {
        "eos_token_id": list(range(12)),
        "pad_token_id": 99,
        "suppress_tokens": [50, 51, 52],
        "max_time": 1e9,
    },
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3"])
@pytest.mark.parametrize("name", BATCHES)
def test_batches_with_padding(family: str, name: str) -> None:
    model = tiny.build(tiny.CONFIGS[family]())
    inputs = padded([tiny.prompt(9), tiny.prompt(4, seed=1), tiny.prompt(12, seed=2)])
    more = {"max_new_tokens": NEW, "do_sample": False, **BATCHES[name]}
    own = {"custom_generate": conflayers_generate}
    assert torch.equal(model.generate(**inputs, **more, **own), model.generate(**inputs, **more))


@pytest.mark.parametrize("name", ["plain", "processed", "allowed"])
def test_a_batch_drafts_by_rows(name: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """n-grams pay nowhere on a tiny model: here they draft without asking."""

    class Rows(tiny.Scripted):
        def propose_batch(self, contexts: Sequence[Any], limits: Sequence[int]) -> list[Draft]:
            return [
                self.propose(each, n) if n else Draft()
                for each, n in zip(contexts, limits, strict=True)
            ]

    inputs = padded([tiny.prompt(9), tiny.prompt(4, seed=1)])
    more = {"max_new_tokens": NEW, "do_sample": False, **BATCHES[name]}
    expected = model.generate(**inputs, **more)
    texts = [row.tolist() for row in expected]
    texts[1] = texts[1][5:]  # without its padding

    def propose(tokens: Ids) -> Ids:
        text = next(each for each in texts if each[:3] == tokens[:3])
        return text[len(tokens) : len(tokens) + 3]

    monkeypatch.setattr(module, "get_proposer", lambda *_, **__: Rows(propose))
    accepted = [0, 0]
    take_step = Batch.step

    def noted(batch: Batch) -> list[tuple[int, Step]]:
        decided = take_step(batch)
        for number, step in decided:
            accepted[number] += step.accepted
        return decided

    monkeypatch.setattr(Batch, "step", noted)
    given = model.generate(**inputs, **more, custom_generate=conflayers_generate)
    assert torch.equal(given, expected)
    assert accepted == [17, 17]


def test_several_sequences_of_a_prompt(model: Any) -> None:
    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        more = {"do_sample": True, "num_return_sequences": 3, "profile": None}
        given: torch.Tensor = asked(model, tiny.prompt(9), True, **more)
        return given

    first = drawn(1)
    assert first.shape == (3, 9 + NEW)
    assert len(set(map(tuple, first.tolist()))) == 3
    assert torch.equal(first, drawn(1))
    assert not torch.equal(first, drawn(2))


class Tilt(hf.LogitsProcessor):
    """Somebody's processor that goes by the last token."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + 0.5 * ((torch.arange(scores.shape[1]) + input_ids[:, -1:]) % 3)


LAWS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "the engine's": (
        {"temperature": 0.8, "top_k": 6, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
        [
            hf.RepetitionPenaltyLogitsProcessor(1.2),
            hf.TemperatureLogitsWarper(0.8),
            hf.TopKLogitsWarper(6),
            hf.TopPLogitsWarper(0.9),
            hf.MinPLogitsWarper(0.05),
        ],
    ),
    "others'": (
        {"temperature": 0.8, "top_k": 0, "typical_p": 0.9, "no_repeat_ngram_size": 2},
        [
            hf.NoRepeatNGramLogitsProcessor(2),
            hf.TemperatureLogitsWarper(0.8),
            hf.TypicalLogitsWarper(0.9),
        ],
    ),
    "somebody's": (
        {"temperature": 0.7, "top_k": 5, "logits_processor": hf.LogitsProcessorList([Tilt()])},
        [Tilt(), hf.TemperatureLogitsWarper(0.7), hf.TopKLogitsWarper(5)],
    ),
}


def law_of(processors: Sequence[Any]) -> dict[tuple[int, ...], float]:
    """Of all continuations by `LOOKED_AT` tokens, by transformers alone."""
    chances: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LOOKED_AT):
        longer = {}
        for start, chance in chances.items():
            ids = torch.tensor([law.PROMPT + start])
            with torch.inference_mode():
                logits = law.model()(ids, use_cache=False).logits[:, -1].float()
            scores = hf.LogitsProcessorList(processors)(ids.clone(), logits.clone())
            for token, each in enumerate(torch.softmax(scores.double(), dim=-1)[0].tolist()):
                longer[*start, token] = chance * each
        chances = longer
    return chances


def drawn(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], runs: int
) -> Counter[tuple[int, ...]]:
    """Counts of continuations, with drafts that are drawn from a skipped model."""
    model = copy.deepcopy(law.model())
    monkeypatch.setattr(borrowing, "Decoder", lambda own, exact: law.Remembering(own))
    proposer = SkipProposer(attach(model).decoder, law.PLAN, 2, 0.0)
    monkeypatch.setattr(module, "get_proposer", lambda *_, **__: proposer)
    counts: Counter[tuple[int, ...]] = Counter()
    prompt = list(law.PROMPT)
    torch.manual_seed(5)
    for _ in range(runs):
        # one more than are looked at, so that drafts go beyond them, too
        text = asked(model, prompt, True, do_sample=True, max_new_tokens=LOOKED_AT + 1, **more)
        counts[tuple(text[0, len(prompt) : len(prompt) + LOOKED_AT].tolist())] += 1
    return counts


@pytest.mark.parametrize("name", LAWS)
def test_sampled_text_has_the_law(
    name: str, monkeypatch: pytest.MonkeyPatch, steps: list[Step]
) -> None:
    more, processors = LAWS[name]
    expected = law_of(processors)
    counts = drawn(monkeypatch, more, 600)
    assert tiny.chi_square(counts, expected) > 1e-3
    assert sum(step.drafted for step in steps) > sum(step.accepted for step in steps) > 0


def test_the_law_shows_a_processor_that_is_not_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    more, processors = LAWS["somebody's"]
    counts = drawn(monkeypatch, {**more, "logits_processor": None}, 300)
    assert tiny.chi_square(counts, law_of(processors)) < 1e-6


def condition(model: Any) -> dict[str, Any]:
    """All that a use of the engine could change: what is where, not only what it is worth."""
    return {
        "modules": {name: id(each) for name, each in model.named_modules()},
        "weights": {name: id(each) for name, each in model.named_parameters()},
        "places": {name: each.data_ptr() for name, each in model.named_parameters()},
        "gradients": {name: each.requires_grad for name, each in model.named_parameters()},
        "training": {name: each.training for name, each in model.named_modules()},
        "hooks": {name: len(each._forward_hooks) for name, each in model.named_modules()},
        "attention": model.config._attn_implementation,
        "attributes": vars(model).keys() - {"conflayers_engine"},
        "settings": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
    }


def test_what_the_owner_has_changed_since_stays_so() -> None:
    model = tiny.build(tiny.CONFIGS["llama"]())
    ids = torch.tensor([[5, 6, 7]])
    first = model.generate(ids, custom_generate=conflayers_generate, max_new_tokens=6)
    for kind in ("eager", "sdpa"):
        model.set_attn_implementation(kind)
        again = model.generate(ids, custom_generate=conflayers_generate, max_new_tokens=6)
        assert model.config._attn_implementation == kind
        assert torch.equal(first, again)


def test_autocast_is_refused_in_a_line() -> None:
    model = tiny.build(tiny.CONFIGS["llama"]())
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(GenerateError, match=r"torch\.autocast: .* another text"),
    ):
        model.generate(
            torch.tensor([[5, 6, 7]]), custom_generate=conflayers_generate, max_new_tokens=3
        )


@pytest.mark.parametrize("fault", ["processor", "request"])
def test_after_an_error_the_streamer_is_ended(fault: str) -> None:
    """Another thread reads it until it ends."""
    model, ids = tiny.build(tiny.CONFIGS["llama"]()), torch.tensor([[5, 6, 7]])
    ended: list[bool] = []

    class Streamer(hf.generation.streamers.BaseStreamer):
        def put(self, value: torch.Tensor) -> None: ...

        def end(self) -> None:
            ended.append(True)

    more: dict[str, Any] = {"draft": "nobody"} if fault == "request" else {}
    if fault == "processor":
        more["logits_processor"] = [FailingProcessor()]
    with pytest.raises((GenerateError, ZeroDivisionError)):
        model.generate(
            ids,
            custom_generate=conflayers_generate,
            max_new_tokens=9,
            streamer=Streamer(),
            **more,
        )
    assert ended == [True]


def mixed_model() -> Any:
    """A model that somebody is working on: partly in training, partly frozen, hooked."""
    model = tiny.build(tiny.CONFIGS["llama"]())
    model.config._attn_implementation = "eager"
    model.model.layers[1].train()
    model.model.layers[3].requires_grad_(False)
    model.model.layers[2].register_forward_hook(lambda *_: None)
    return model


class Failing:
    """Fails at its fifth call, whatever it is called as."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *given: Any, **other: Any) -> Any:
        self.calls += 1
        if self.calls == 5:
            raise ZeroDivisionError("somebody's fault")
        return given[-1]

    def put(self, value: torch.Tensor) -> None:
        self(value)

    def end(self) -> None:
        """After the failure, too: whoever reads a streamer would wait for ever."""


class FailingProcessor(Failing, hf.LogitsProcessor): ...


class FailingCriterion(Failing, StoppingCriteria):
    def __call__(self, *given: Any, **other: Any) -> torch.Tensor:
        super().__call__(None)
        return torch.tensor([False])


@pytest.mark.parametrize(
    "given",
    [
        lambda: {},
        lambda: {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
        lambda: {"logits_processor": hf.LogitsProcessorList([FailingProcessor()])},
        lambda: {"stopping_criteria": hf.StoppingCriteriaList([FailingCriterion()])},
        lambda: {"streamer": Failing()},
        lambda: {"num_beams": 2},
        lambda: {"profile": "nowhere.yaml"},
    ],
    ids=["plain", "processed", "processor", "criterion", "streamer", "refused", "no profile"],
)
def test_the_model_is_as_it_was(given: Callable[[], dict[str, Any]]) -> None:
    model = mixed_model()
    before = condition(model)
    prompt = tiny.prompt(9)
    for _ in range(2):  # the first call makes the engine, the second finds it
        more = given()
        fails = any(isinstance(v, Failing) for v in more.values()) or any(
            isinstance(each, Failing) for v in more.values() if isinstance(v, list) for each in v
        )
        error = ZeroDivisionError if fails else GenerateError
        failing = fails or {"num_beams", "profile"} & more.keys()
        with pytest.raises(error) if failing else contextlib.nullcontext():
            asked(model, prompt, True, **more)
        assert condition(model) == before


def test_a_model_that_is_refused_is_as_it_was() -> None:
    sizes = {**tiny.LLAMA_LIKE, "layer_types": ["linear_attention"] * tiny.DEPTH}
    model = tiny.build(tiny.CONFIGS["qwen2"]())
    before = condition(model)
    model.config.layer_types = sizes["layer_types"]
    with pytest.raises(GenerateError, match="layers of the kind linear_attention"):
        asked(model, tiny.prompt(9), True)
    model.config.layer_types = ["full_attention"] * tiny.DEPTH
    assert condition(model) == before


def test_afterwards_a_model_can_be_used_saved_copied_and_trained(
    model: Any, tmp_path: Path
) -> None:
    prompt = tiny.prompt(9)
    expected = asked(model, prompt, False)
    given = asked(model, prompt, True)
    assert torch.equal(given, expected)
    assert torch.equal(asked(model, prompt, False), expected)
    model.save_pretrained(tmp_path / "saved")
    saved = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(asked(saved, prompt, False), expected)
    torch.save(model, tmp_path / "pickle")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "pickle", weights_only=False)):
        assert torch.equal(asked(other, prompt, True), expected)
        assert attach(other).decoder is not attach(model).decoder
    model.train()
    model(torch.tensor([prompt]), labels=torch.tensor([prompt])).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_the_engine_is_made_once_and_again_where_the_model_changes(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def make(model: Any, exact: bool) -> Any:
        made.append(exact)
        return Decoder(model, exact=exact)

    monkeypatch.setattr(borrowing, "Decoder", make)
    prompt = tiny.prompt(9)

    def made_by(**more: Any) -> int:
        before = len(made)
        ours, theirs = both(model, prompt, **more)
        assert ours == theirs
        return len(made) - before

    assert [made_by(), made_by(), made_by(repetition_penalty=1.2)] == [1, 0, 0]
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(3.0)
    assert [made_by(), made_by()] == [1, 0]
    model.model.layers[1].mlp.up_proj.weight.data.mul_(0.5)
    assert [made_by(), made_by()] == [1, 0]
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0).contiguous())
    assert [made_by(), made_by()] == [1, 0]
    model.model.layers[0].mlp.register_forward_hook(lambda _, __, output: 0.5 * output)
    assert [made_by(), made_by()] == [1, 0]
    model.to(torch.float64).to(torch.float32)
    assert [made_by(), made_by()] == [1, 0]
    asked(model, prompt, True, exact=False)
    assert made[-1] is False
    release(model)
    assert not hasattr(model, "conflayers_engine")
    assert made_by() == 1


def test_hooks_are_called_and_heeded(model: Any) -> None:
    """Where somebody listens, or steers, the modules themselves run."""
    prompt = tiny.prompt(9)
    before = asked(model, prompt, False)
    heard: list[int] = []

    def steer(layer: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        heard.append(output.shape[1])
        return output.flip(-1)

    handle = model.model.layers[2].mlp.register_forward_hook(steer)
    ours = asked(model, prompt, True)
    assert sum(heard) > NEW
    assert torch.equal(ours, asked(model, prompt, False))
    assert not torch.equal(ours, before)
    handle.remove()
    assert torch.equal(asked(model, prompt, True), before)
    # one that changes nothing could be passed over unnoticed, were it not for itself
    heard.clear()
    model.model.layers[2].mlp.register_forward_hook(lambda *_: heard.append(1))
    assert torch.equal(asked(model, prompt, True), before)
    first = len(heard)  # some of them by the engine's own checks
    asked(model, prompt, True)
    assert len(heard) - first > NEW / 5


def test_in_place_holds_no_weights_twice_and_gives_them_back(model: Any, tmp_path: Path) -> None:
    prompt = tiny.prompt(9)
    expected = asked(model, prompt, False)
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    given = asked(model, prompt, True, in_place=True)
    assert torch.equal(given, expected)
    packed = [m for m in model.modules() if isinstance(m, MergedLinearPart)]
    if not packed:
        pytest.skip("weights are not packed on this machine")
    assert model.config._attn_implementation != "conflayers"
    assert torch.equal(asked(model, prompt, False), expected)
    held = sum(weight.numel() for weight in model.parameters())
    assert held < sum(weight.numel() for weight in weights.values()) / 2
    release(model)
    assert not any(isinstance(m, MergedLinearPart) for m in model.modules())
    assert weights.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(own, weights[name]) for name, own in model.named_parameters())
    model.save_pretrained(tmp_path / "saved")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, "beam search is asked for"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "assisted generation is asked for"),
    "cache": ({"past_key_values": hf.DynamicCache()}, "past_key_values: the engine has a cache"),
    "attentions": (
        {"return_dict_in_generate": True, "output_attentions": True},
        "output_attentions: only sequences, scores and logits",
    ),
    "states": (
        {"return_dict_in_generate": True, "output_hidden_states": True},
        "output_hidden_states: only",
    ),
    "draft": ({"draft": "luck"}, "draft 'luck': allowed is one of skip, ngram, mixed, none"),
    "no layers": ({"profile": None, "draft": "skip"}, "draft skip leaves out .* give profile FILE"),
    "no file": ({"profile": "nowhere.yaml"}, "nowhere.yaml: there is no such file"),
    "holes": (
        {"attention_mask": torch.tensor([[1, 0, *[1] * 7]])},
        "attention_mask: leaves out tokens that are no padding on the left",
    ),
    "right padding": ({"attention_mask": torch.tensor([[1] * 8 + [0]])}, "padding_side='left'"),
    "positions": ({"position_ids": torch.arange(3, 12)[None]}, "position_ids: tokens stand"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_done_is_said(model: Any, name: str) -> None:
    more, message = REFUSED[name]
    ids = torch.tensor([tiny.prompt(9)])
    given = {"attention_mask": torch.ones_like(ids), "profile": profile_for(model), **more}
    with pytest.raises(ValueError, match=message) as caught:
        model.generate(ids, max_new_tokens=4, custom_generate=conflayers_generate, **given)
    assert isinstance(caught.value, InputError)
    assert "\n" not in str(caught.value)


def test_an_assistant_is_refused(model: Any) -> None:
    with pytest.raises(GenerateError, match="assistant_model: the model drafts for itself"):
        asked(model, tiny.prompt(9), True, assistant_model=copy.deepcopy(model))


def test_embeddings_are_refused(model: Any) -> None:
    states = model.get_input_embeddings()(torch.tensor([tiny.prompt(9)]))
    with pytest.raises(GenerateError, match="inputs_embeds: the engine reads tokens"):
        model.generate(inputs_embeds=states, custom_generate=conflayers_generate, max_new_tokens=4)


def test_other_inputs_are_refused() -> None:
    model = tiny.build(tiny.CONFIGS["gpt2"]())
    kinds = {"token_type_ids": torch.ones((1, 9), dtype=torch.long)}
    with pytest.raises(GenerateError, match="token_type_ids: only tokens go into the model"):
        asked(model, tiny.prompt(9), True, **kinds)


@pytest.mark.parametrize(
    "more, message",
    [
        ({"streamer": Ear()}, "streamer: the texts of a batch"),
        ({"return_dict_in_generate": True, "output_scores": True}, "output_scores.*one text"),
        (
            {"logits_processor": hf.LogitsProcessorList([Shift()])},
            "logits_processor: Shift may depend on how a batch is decoded: one text at a time",
        ),
        ({"guidance_scale": 1.5}, "UnbatchedClassifierFree.* keeps the state of a batch"),
        ({"stopping_criteria": hf.StoppingCriteriaList([LogStop(3)])}, "LogStop may depend"),
        ({"max_time": 9.0}, "eos_token_id: without one"),
        ({"attention_mask": torch.tensor([[1] * 9, [0] * 9])}, "prompt 1 is all padding"),
    ],
)
def test_what_batches_can_not_do_is_said(model: Any, more: dict[str, Any], message: str) -> None:
    inputs = padded([tiny.prompt(9), tiny.prompt(4)])
    given = {**inputs, "max_new_tokens": 4, **more}
    with pytest.raises(GenerateError, match=message):
        model.generate(custom_generate=conflayers_generate, **given)


def test_n_grams_need_no_profile(model: Any) -> None:
    prompt = [*range(5), *range(5)]
    ours = asked(model, prompt, True, draft="ngram", profile=None)
    assert torch.equal(ours, asked(model, prompt, False))
    (proposer,) = attach(model).proposers.values()
    assert proposer is not None
    assert proposer.name == "ngram"


def test_a_profile_from_a_file(model: Any, tmp_path: Path, steps: list[Step]) -> None:
    profile_for(model).save(tmp_path / "own.yaml")
    ours, theirs = both(model, tiny.prompt(9))
    steps.clear()
    given = asked(model, tiny.prompt(9), True, profile=tmp_path / "own.yaml")
    assert given[0].tolist() == ours == theirs
    assert {step.proposer for step in steps} >= {"prefill", "skip"}


@pytest.mark.parametrize("sampled", [False, True])
def test_scores_that_are_no_numbers_are_an_error(model: Any, sampled: bool) -> None:
    prompt = tiny.prompt(8)

    class Spoilt(hf.LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores * float("nan") if input_ids.shape[1] > len(prompt) + 3 else scores

    before = asked(model, prompt, custom=False, max_new_tokens=6)
    with pytest.raises(ConfLayersError, match=r"step 5 .*NaN"):
        asked(
            *(model, prompt, True),
            max_new_tokens=NEW,
            do_sample=sampled,
            logits_processor=hf.LogitsProcessorList([Spoilt()]),
        )
    assert torch.equal(asked(model, prompt, custom=False, max_new_tokens=6), before)
