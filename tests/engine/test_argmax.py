"""Logits that are not numbers: an error that names the step, on every path, and never a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from conflayers_cli.engine.argmax import (
    INVALID_TOKEN,
    LogitsError,
    greedy_tokens,
    greedy_with_confidence,
)
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.forward import ModelInput
from conflayers_cli.engine.sampler import Sampler
from conflayers_cli.errors import ConfLayersError
from conflayers_cli.generation.batch import Batch
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.mixed import MixedProposer
from conflayers_cli.spec_decode.proposer import Proposer, SkipProposer
from conflayers_cli.spec_decode.tree import TreeShape
from tests import tiny
from tests.engine.test_graph_runner import free
from tests.kernels.tape import TapeRecorder

NAN, INF = float("nan"), float("inf")
PLAN = SkipPlan.of_layers([1, 3])
TREE = TreeShape(((0.0, 2),))
PROMPT = tiny.prompt(9)
COUNT = 24
CPU = torch.device("cpu")

Make = Callable[[Decoder], Proposer | None]
WAYS: dict[str, Make] = {
    "vanilla": lambda decoder: None,
    "chain": lambda decoder: SkipProposer(decoder, PLAN, 4, 0.0),
    "sure": lambda decoder: SkipProposer(decoder, PLAN, 4, 0.1),
    "tree": lambda decoder: SkipProposer(decoder, PLAN, 4, 0.0, tree=TREE),
    "mixed": lambda decoder: MixedProposer(decoder, PLAN, free()),
    "mixed tree": lambda decoder: MixedProposer(decoder, PLAN, free(), tree=TREE),
    "ahead": lambda decoder: MixedProposer(decoder, PLAN, free(turnaround=9.0)),
    "ngram": lambda decoder: MixedProposer(decoder, None, free()),
}
LAWS = {
    "greedy": SamplingParams(),
    "penalised": SamplingParams(repetition_penalty=1.3),
    "sampled": SamplingParams(temperature=0.8, seed=3),
    "filtered": SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=3),
}


def opened(recorded: bool, dtype: torch.dtype = torch.float32) -> Decoder:
    """A model of its own, which may be damaged."""
    model = tiny.build(tiny.CONFIGS["llama"](), dtype=dtype)
    return Decoder(model, recorder=TapeRecorder() if recorded else None)


def decoded(
    decoder: Decoder, sampling: SamplingParams, proposer: Proposer | None = None
) -> list[int]:
    generation = Generation(decoder, GenerationRequest(PROMPT, COUNT, sampling), proposer=proposer)
    tiny.steps_of(generation)
    return generation.output


def damage(decoder: Decoder, token: int) -> None:
    """From a text's first such token on nothing is a number any more."""
    decoder.model.get_input_embeddings().weight.data[token] = NAN


def late(output: list[int]) -> int:
    """Where in a text a token stands that is not in it before, nor in the prompt, late."""
    new = [i for i, token in enumerate(output) if token not in {*PROMPT, *output[:i]}]
    return max(i for i in new if i < COUNT - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_one_bad_logit_is_enough(bad: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 1000, generator=generator).to(dtype)
    scores[1, 777] = bad
    scores[2] = -INF
    scores[3, 5:] = -INF  # how models rule tokens out
    best = greedy_tokens(scores).tolist()
    assert best[0] == int(scores[0].argmax()) and best[3] == int(scores[3, :5].argmax())
    assert best[1:3] == [INVALID_TOKEN, INVALID_TOKEN]
    tokens, chances = greedy_with_confidence(scores)
    assert chances.isnan().tolist() == [False, True, True, False]
    assert all(0 <= token < 1000 for token in tokens.tolist())
    for law in LAWS.values():
        chosen = Sampler(law, 1000, CPU).choose(scores, 0, [0, 1, 2])
        assert [token == INVALID_TOKEN for token in chosen] == [False, True, True, False]
        assert chosen[3] < 5


@pytest.mark.parametrize("temperature", [1e-10, 1e-46, 1e-300])
def test_a_tiny_temperature_is_greedy_and_no_error(temperature: float) -> None:
    scores = torch.tensor([[-3e4, 6e4, 5.99e4, -INF]])
    sampler = Sampler(SamplingParams(temperature=temperature, seed=0), 4, CPU)
    assert sampler.choose(scores, 0) == [1]


@pytest.mark.parametrize("penalty", [1e-300, 1e-39, 1e300])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_extreme_penalty_is_no_error(penalty: float, temperature: float) -> None:
    settings = SamplingParams(temperature, repetition_penalty=penalty, seed=0)
    sampler = Sampler(settings, 4, CPU, [0, 1, 2])
    scores = torch.tensor([[0.0, 5.0, -5.0, 1.0]])
    assert sampler.choose(scores, 3) == [1 if penalty < 1 else 3]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("recorded", [False, True], ids=["eager", "recorded"])
def test_the_step_is_named(way: str, law: str, recorded: bool) -> None:
    decoder, sampling = opened(recorded), LAWS[law]
    if sampling.greedy:
        output = decoded(decoder, sampling)
        place = late(output)
        damage(decoder, output[place])
    else:  # what is drawn depends on what was drafted: let the prompt end in numbers
        place = -1
        damage(decoder, PROMPT[-1])
    for _ in range(2):  # recorded passes are replayed the second time
        with pytest.raises(LogitsError) as caught:
            decoded(decoder, sampling, WAYS[way](decoder))
        said = f"the logits of step {place + 2} (position {len(PROMPT) + place}) are NaN"
        assert str(caught.value).startswith(said)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("way", WAYS)
def test_a_sampled_text_never_goes_on_behind_the_bad_token(way: str) -> None:
    decoder = opened(recorded=False)
    damaged = set(range(0, tiny.VOCABULARY, 3)) - set(PROMPT)
    for token in damaged:
        damage(decoder, token)
    for seed in range(8):
        generation = Generation(
            decoder,
            GenerationRequest(PROMPT, COUNT, SamplingParams(temperature=1.0, seed=seed)),
            proposer=WAYS[way](decoder),
        )
        with pytest.raises(LogitsError) as caught:
            tiny.steps_of(generation)
        assert f"step {len(generation.output) + 1} " in str(caught.value)
        bad = [token in damaged for token in generation.output]
        assert bad.count(True) == 1 and bad[-1]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bad_token_that_is_only_drafted_changes_nothing(law: str, dtype: torch.dtype) -> None:
    """Masked, it makes the logits before it NaN all the same, in the pass that verifies it."""
    decoder, sampling = opened(recorded=False, dtype=dtype), LAWS[law]
    plain = decoded(decoder, sampling)
    bad = next(token for token in range(tiny.VOCABULARY) if token not in {*PROMPT, *plain})
    damage(decoder, bad)
    wrong = tiny.Scripted(lambda text: [bad, bad])
    assert decoded(decoder, sampling, wrong) == plain

    def right_then_wrong(text: list[int]) -> list[int]:
        return [*plain[len(text) - len(PROMPT) :][:2], bad]

    assert decoded(decoder, sampling, tiny.Scripted(right_then_wrong)) == plain


def spoil_drafts(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Passes under a plan give NaN, and leave it in the cache; returns how many did, as a list."""
    tiny.through_logits(decoder, monkeypatch)
    run, spoilt = decoder.passes.run, []

    def spoiling(
        inputs: ModelInput, cache: KVCache, plan: SkipPlan, keep: int, extent: int
    ) -> torch.Tensor:
        logits = run(inputs, cache, plan, keep, extent)
        if plan:
            spoilt.append(1)
            for layer in cache.layers:
                for row, written in enumerate(inputs.written):
                    layer.keys[row, :, written] = NAN
                    layer.values[row, :, written] = NAN
            return torch.full_like(logits, NAN)
        return logits

    monkeypatch.setattr(decoder.passes, "run", spoiling)
    return spoilt


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("way", ["chain", "sure", "tree", "mixed", "mixed tree", "ahead"])
@pytest.mark.parametrize("recorded", [False, True], ids=["eager", "recorded"])
def test_drafts_that_are_no_numbers_are_none(
    way: str, law: str, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, sampling = opened(recorded), LAWS[law]
    plain = decoded(decoder, sampling)
    spoilt = spoil_drafts(decoder, monkeypatch)
    generation = Generation(
        decoder, GenerationRequest(PROMPT, COUNT, sampling), proposer=WAYS[way](decoder)
    )
    steps = tiny.steps_of(generation)
    assert spoilt
    assert not any("skip" in (step.sources or (step.proposer,)) for step in steps)
    assert generation.output == plain


def batch_of(
    decoder: Decoder, prompts: list[list[int]], way: str, sampling: SamplingParams, size: int = 3
) -> Batch:
    proposer: Any = WAYS[way](decoder)
    requests = [GenerationRequest(prompt, COUNT, sampling) for prompt in prompts]
    return Batch(decoder, requests, size=size, proposer=proposer)


@pytest.mark.parametrize("law", ["greedy", "penalised"])
@pytest.mark.parametrize("way", ["vanilla", "mixed", "ngram"])
def test_a_batch_names_the_text(way: str, law: str) -> None:
    decoder, sampling = opened(recorded=False), LAWS[law]
    prompts = [tiny.prompt(5, 1), tiny.prompt(7, 2), PROMPT, tiny.prompt(4, 4)]
    batch = batch_of(decoder, prompts, way, sampling)
    batch.run()
    outputs = batch.outputs
    elsewhere = {token for i in (0, 1, 3) for token in (*prompts[i], *outputs[i])}
    place = next(
        i
        for i, token in enumerate(outputs[2])
        if i > 3 and token not in {*elsewhere, *PROMPT, *outputs[2][:i]}
    )
    damage(decoder, outputs[2][place])
    with pytest.raises(LogitsError) as caught:
        batch_of(decoder, prompts, way, sampling).run()
    assert caught.value.number == 2
    assert f"step {place + 2} (position {len(PROMPT) + place})" in str(caught.value)
    assert str(caught.value.for_prompt("prompt x")).startswith("prompt x: the logits of step")


def test_a_batch_names_the_text_whose_prompt_is_bad() -> None:
    decoder = opened(recorded=False)
    prompts = [[1, 2, 3], [4, 5, 6]]
    damage(decoder, 5)
    with pytest.raises(LogitsError, match=r"step 1 \(position 2\)") as caught:
        batch_of(decoder, prompts, "vanilla", SamplingParams()).run()
    assert caught.value.number == 1


@pytest.mark.parametrize("law", LAWS)
def test_drafts_of_a_batch_that_are_no_numbers(law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, sampling = opened(recorded=False), LAWS[law]
    prompts = [tiny.prompt(5, 1), tiny.prompt(7, 2), PROMPT]
    plain = batch_of(decoder, prompts, "vanilla", sampling)
    plain.run()
    spoilt = spoil_drafts(decoder, monkeypatch)
    batch = batch_of(decoder, prompts, "mixed", sampling)
    batch.run()
    assert spoilt
    assert batch.outputs == plain.outputs


class Wrong:
    """Proposes one token for every row, as a certain draft."""

    name = "wrong"

    def __init__(self, token: int) -> None:
        self.token = token

    def propose_batch(self, contexts: Any, limits: Any) -> Any:
        from conflayers_cli.spec_decode.proposer import Draft

        return [Draft((self.token,)[:limit]) for limit in limits]


@pytest.mark.parametrize("law", LAWS)
def test_a_bad_token_that_is_only_drafted_in_a_batch(law: str) -> None:
    decoder, sampling = opened(recorded=False), LAWS[law]
    prompts = [tiny.prompt(5, 1), tiny.prompt(7, 2), PROMPT]
    plain = batch_of(decoder, prompts, "vanilla", sampling)
    plain.run()
    known = {t for prompt in (*prompts, *plain.outputs) for t in prompt}
    bad = next(token for token in range(tiny.VOCABULARY) if token not in known)
    damage(decoder, bad)
    requests = [GenerationRequest(prompt, COUNT, sampling) for prompt in prompts]
    batch = Batch(decoder, requests, proposer=Wrong(bad))
    batch.run()
    assert all(bad not in output and len(output) == COUNT for output in batch.outputs)
    assert batch.outputs == plain.outputs


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("name", ["layers.2.mlp.down_proj", "lm_head", "embed_tokens"])
def test_a_model_that_gives_no_numbers_is_told_when_it_is_opened(name: str, bad: float) -> None:
    model = tiny.build(tiny.CONFIGS["llama"]())
    module = next(m for path, m in model.named_modules() if path.endswith(name))
    module.weight.data[:] = bad
    with pytest.raises(ConfLayersError, match="LlamaForCausalLM gives logits that are NaN") as told:
        Decoder(model)
    assert told.value.exit_code == 1


def test_float16_that_overflows_is_told() -> None:
    model = tiny.build(tiny.CONFIGS["llama"](), dtype=torch.float16)
    model.lm_head.weight.data *= 60_000
    with pytest.raises(ConfLayersError, match=r"float16.*dtype float32"):
        Decoder(model)


def test_minus_infinity_rules_tokens_out() -> None:
    """As of models whose vocabulary is padded: neither refused nor an error."""
    model = tiny.build(tiny.CONFIGS["llama"]())
    head = model.lm_head
    head.register_forward_hook(lambda module, args, out: out.index_fill(-1, torch.arange(50), -INF))
    decoder = Decoder(model)
    for law in LAWS.values():
        for way in ("vanilla", "chain", "mixed"):
            output = decoded(decoder, law, WAYS[way](decoder))
            assert len(output) == COUNT and min(output) >= 50
