"""Hidden states read again, against those of transformers' own forward."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers as hf

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.search import states as module
from conflayers_cli.search.corpus import Sample
from conflayers_cli.search.states import PROMPT_WEIGHT, Chunk, Reader
from tests import tiny

CHUNK = 16
SAMPLE = Sample(tuple(tiny.prompt(21, 1)), tuple(tiny.prompt(30, 2)))
OTHER = Sample(tuple(tiny.prompt(5, 3)), tuple(tiny.prompt(9, 4)))
LAYERS = range(tiny.DEPTH + 1)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", CHUNK)


def joined(chunks: list[Chunk], layer: int) -> torch.Tensor:
    return torch.cat([chunk.states[layer] for chunk in chunks])


def own_states(decoder: Decoder, sample: Sample) -> list[torch.Tensor]:
    """Before every layer, and behind the last but before the final norm, as transformers has it."""
    tokens = torch.tensor([[*sample.prompt, *sample.output[:-1]]])
    behind: list[torch.Tensor] = []
    with decoder.plain() as model, torch.inference_mode():
        last = decoder.stack.layers[-1]
        handle = last.register_forward_hook(
            lambda layer, args, out: behind.append(out[0] if isinstance(out, tuple) else out)
        )
        try:
            found = model(tokens, output_hidden_states=True, use_cache=False).hidden_states
        finally:
            handle.remove()
    return [states[0] for states in (*found[: tiny.DEPTH], behind[0])]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_states_are_those_of_the_model_across_chunks(family: str) -> None:
    decoder = tiny.decoder(family)
    reader = Reader(decoder, [SAMPLE], 1000)
    assert reader.tokens == len(SAMPLE.prompt) + len(SAMPLE.output) - 1
    chunks = list(reader.chunks(LAYERS))
    assert [len(chunk.weights) for chunk in chunks] == [CHUNK, CHUNK, CHUNK, 2]
    for layer, expected in enumerate(own_states(decoder, SAMPLE)):
        torch.testing.assert_close(joined(chunks, layer), expected, rtol=1e-4, atol=1e-4)


def test_states_are_kept_as_they_were_shown() -> None:
    """They are copies: later layers and passes may write where they were."""
    reader = Reader(tiny.decoder("llama"), [SAMPLE, OTHER], 1000)
    at_once = [chunk.states[2].clone() for chunk in reader.chunks([2])]
    later = list(reader.chunks([2, 4]))
    assert len(at_once) == len(later)
    for one, other in zip(at_once, later, strict=True):
        assert torch.equal(one, other.states[2])
        assert set(other.states) == {2, 4}


def test_a_prompts_tokens_count_for_less_wherever_it_ends() -> None:
    chunks = list(Reader(tiny.decoder("llama"), [SAMPLE, OTHER], 1000).chunks([1]))
    weights = torch.cat([chunk.weights for chunk in chunks])
    expected = [PROMPT_WEIGHT] * 21 + [1.0] * 29 + [PROMPT_WEIGHT] * 5 + [1.0] * 8
    assert weights.tolist() == expected
    assert all(torch.equal(chunk.weights_from(0), chunk.weights) for chunk in chunks)


@pytest.mark.parametrize(
    "most, of_texts", [(1000, [50, 13]), (55, [50, 5]), (50, [50]), (18, [18]), (0, [])]
)
def test_no_more_tokens_are_read_than_asked_for(most: int, of_texts: list[int]) -> None:
    decoder = tiny.decoder("llama")
    reader = Reader(decoder, [SAMPLE, OTHER], most)
    assert reader.tokens == sum(of_texts)
    chunks = list(reader.chunks([1]))
    assert sum(len(chunk.weights) for chunk in chunks) == reader.tokens
    whole = list(Reader(decoder, [SAMPLE, OTHER], 1000).chunks([1]))
    if chunks:
        read = joined(chunks, 1)
        torch.testing.assert_close(read, joined(whole, 1)[: len(read)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("most, texts", [(1, 1), (50, 1), (51, 2), (None, 2)])
def test_the_first_texts_may_be_enough(most: int | None, texts: int) -> None:
    reader = Reader(tiny.decoder("llama"), [SAMPLE, OTHER], 1000)
    tokens = sum(len(chunk.weights) for chunk in reader.chunks([1], most))
    assert tokens == [50, 63][texts - 1]


def test_tokens_that_a_pass_repeats_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny.decoder("llama")
    reader = Reader(decoder, [SAMPLE, OTHER], 1000)
    expected = list(reader.chunks([0, 3]))
    monkeypatch.setattr(decoder, "_least", lambda batch, plan: CHUNK)
    for one, other in zip(reader.chunks([0, 3]), expected, strict=True):
        assert len(one.weights) == len(one.states[3]) == len(other.weights)
        torch.testing.assert_close(one.states[3], other.states[3], rtol=1e-4, atol=1e-5)


def test_a_text_without_output_is_read_too() -> None:
    reader = Reader(tiny.decoder("llama"), [Sample((5,), ()), Sample((5, 6, 7), ())], 1000)
    assert reader.tokens == 2
    assert [chunk.weights.tolist() for chunk in reader.chunks([0])] == [[PROMPT_WEIGHT] * 2]


@functools.cache
def with_sinks(token: int, layer: int) -> Decoder:
    """A model in which a token's hidden states are huge from a layer on (0: as embedded)."""
    model = tiny.build(hf.LlamaConfig(**tiny.LLAMA_LIKE))
    embedding = model.model.embed_tokens.weight.data
    if layer == 0:
        embedding[token] *= 100
        return Decoder(model)
    # one feature tells the token from all others, and an MLP turns it into a huge one
    embedding[:, 0] = 0.0
    embedding[token] = torch.eye(32)[0] * embedding.norm(dim=-1).median()
    for i, each in enumerate(model.model.layers):
        each.self_attn.o_proj.weight.data[0] = 0.0
        each.mlp.down_proj.weight.data[0] = 0.0
        if i == layer - 1:
            each.mlp.gate_proj.weight.data[7] = torch.eye(32)[0] * 3
            each.mlp.up_proj.weight.data[7] = torch.eye(32)[0] * 3
            each.mlp.down_proj.weight.data[:, 7] = torch.eye(32)[1] * 100
    return Decoder(model)


@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("asked", [[1], [4], list(LAYERS)])
def test_sinks_count_for_nothing_in_blocks_before_and_behind(layer: int, asked: list[int]) -> None:
    """Whichever layers are asked for, and where the token becomes one."""
    sink, place = 99, 18
    prompt, output = ([t % 90 for t in part] for part in (SAMPLE.prompt, SAMPLE.output))
    prompt[place] = sink
    reader = Reader(with_sinks(sink, layer), [Sample(tuple(prompt), tuple(output))], 1000)
    chunks = list(reader.chunks(asked))
    until = torch.cat([chunk.sink_until for chunk in chunks])
    assert [i for i in range(len(until)) if until[i] >= 0] == [place]
    assert until[place] == tiny.DEPTH - 1
    for begin in range(tiny.DEPTH):
        weights = torch.cat([chunk.weights_from(begin) for chunk in chunks])
        assert weights.tolist() == [PROMPT_WEIGHT] * 18 + [0.0] + [PROMPT_WEIGHT] * 2 + [1.0] * 29


def test_what_was_a_sink_counts_again_in_blocks_behind() -> None:
    chunk = Chunk({}, torch.tensor([1.0, 0.25, 1.0]), torch.tensor([-1, 3, 0]))
    assert chunk.weights_from(0).tolist() == [1.0, 0.0, 0.0]
    assert chunk.weights_from(1).tolist() == [1.0, 0.0, 1.0]
    assert chunk.weights_from(3).tolist() == [1.0, 0.0, 1.0]
    assert chunk.weights_from(4).tolist() == [1.0, 0.25, 1.0]
