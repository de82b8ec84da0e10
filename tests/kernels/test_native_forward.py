"""The native forward gives what the modules give, and the same bits however a text is cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from conflayers_cli.engine.argmax import greedy_tokens
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.kernels.native_choice import Resume
from conflayers_cli.kernels.native_forward import NativeForward
from conflayers_cli.kernels.native_layers import (
    NativeLinear,
    PackFn,
    pack_linears,
    packed_before,
)
from conflayers_cli.kernels.packed_linear import Packing
from conflayers_cli.skip_plan import SkipPlan
from tests import tiny
from tests.kernels import native
from tests.kernels.native import DTYPES, FULL, places, tokens_of

pytestmark = pytest.mark.skipif(native.MISSING is not None, reason=str(native.MISSING))
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.08, torch.bfloat16: 0.6}
LENGTH = 330
NARROW = 8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", [*native.FAMILIES, "wide", "wide-window"])
@pytest.mark.parametrize("unit", native.UNITS)
def test_logits_are_those_of_the_modules(family: str, dtype: torch.dtype, unit: str) -> None:
    forward, tokens = native.forward(family, dtype, unit), tokens_of(family, 2, 40)
    cache = native.new_cache(family, 2)
    logits = forward.run(tokens, places(2, 0, 40), None, cache, FULL, 0)
    expected = native.by_modules(family, dtype, tokens)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=TOLERANCE[dtype])
    if dtype != torch.float32:  # half precision: no further from the truth than the modules are
        truth = native.by_modules(family, torch.float32, tokens)
        error, usual = ((each.float() - truth).norm() for each in (logits, expected))
        assert error < 1.5 * usual


def in_pieces(
    forward: NativeForward, tokens: torch.Tensor, cache: KVCache, width: int, plan: SkipPlan = FULL
) -> torch.Tensor:
    parts = []
    for begin in range(0, tokens.shape[1], width):
        part = tokens[:, begin : begin + width]
        at = places(len(tokens), begin, begin + part.shape[1])
        parts.append(forward.run(part, at, None, cache, plan, 0))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_tokens_of_each_sequence_are_kept(batch: int, keep: int) -> None:
    forward, tokens = native.forward("llama"), tokens_of("llama", batch, 3)
    every = forward.run(
        tokens, places(batch, 0, 3), None, native.new_cache("llama", batch), FULL, 0
    )
    cache = native.new_cache("llama", batch)
    kept = forward.run(tokens, places(batch, 0, 3), None, cache, FULL, keep)
    assert torch.equal(kept, every[:, -keep:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit", native.UNITS)
@pytest.mark.parametrize("int4", [False, True])
def test_bits_do_not_depend_on_width_and_threads(
    dtype: torch.dtype, unit: str, int4: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, tokens = native.forward("wide-window", dtype, unit), tokens_of("wide", 1, LENGTH)
    monkeypatch.setattr(forward, "threads", 1)
    expected = None
    plan = SkipPlan.of([1], [2])
    for number, width in enumerate((64, 1, 2, 3, 5, 7, 8, 11, 300)):
        monkeypatch.setattr(forward, "threads", 1 + number % 3)
        cache, parts = native.new_cache("wide", 1, LENGTH + 512 * (number % 2)), []
        # Narrow passes over the last tokens, which see all the others: each takes as long as any.
        first = 0 if width > NARROW else LENGTH // 64 * 64
        cuts = [*range(0, first, 64), *range(first, LENGTH, width), LENGTH]
        for begin, end in pairwise(cuts):
            at = places(1, begin, end)
            parts.append(forward.run(tokens[:, begin:end], at, None, cache, plan, 0, int4))
        logits = torch.cat(parts, dim=1)
        expected = logits if expected is None else expected
        assert torch.equal(logits, expected), width


@pytest.mark.parametrize("unit", native.UNITS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_do_not_depend_on_neighbours(unit: str, threads: int) -> None:
    forward, tokens = native.forward("wide", torch.bfloat16, unit), tokens_of("wide", 3, 200)
    alone = [in_pieces(forward, row[None], native.new_cache("wide", 1, 200), 64) for row in tokens]
    forward.threads = threads
    cache = native.new_cache("wide", 5, 700)
    together = in_pieces(forward, tokens, cache.view(1, 4), 33)
    assert torch.equal(together, torch.cat(alone))
    forward.threads = None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit", native.UNITS)
def test_what_lies_in_unseen_slots_does_not_matter(dtype: torch.dtype, unit: str) -> None:
    forward, tokens = native.forward("wide-window", dtype, unit), tokens_of("wide", 1, 200)
    expected = in_pieces(forward, tokens, native.new_cache("wide", 1, 300), 50)
    cache = native.new_cache("wide", 1, 300)
    forward.run(tokens[:, :1], places(1, 0, 1), None, cache, FULL, 1)
    for layer in cache.layers:
        layer.keys.fill_(torch.nan)
        layer.values.fill_(torch.inf)
    assert torch.equal(in_pieces(forward, tokens, cache, 50), expected)


@pytest.mark.parametrize("family", ["wide", "wide-window", "mistral"])
def test_a_leaf_sees_the_text_the_chain_and_itself(family: str) -> None:
    """Two alternatives at one position: the second takes a slot behind the chain."""
    forward, tokens = native.forward(family), tokens_of(family, 1, 40)
    begin, chain, leaf = 30, tokens[:, 30:35], torch.tensor([[7]])
    cache = native.new_cache(family, 1, 64)
    forward.run(tokens[:, :begin], places(1, 0, begin), None, cache, FULL, 1)
    at = torch.cat([places(1, begin, begin + 5), torch.tensor([[begin + 2]])], dim=1)
    slots = torch.cat([places(1, begin, begin + 5), torch.tensor([[begin + 5]])], dim=1)
    tree = forward.run(torch.cat([chain, leaf], dim=1), at, slots, cache, FULL, 0)
    plain = native.new_cache(family, 1, 64)
    text = torch.cat([tokens[:, : begin + 2], leaf], dim=1)
    expected = in_pieces(forward, text, plain, 64)[:, -1]
    assert torch.equal(tree[:, -1], expected)
    assert torch.equal(tree[:, :5], in_pieces(forward, tokens[:, : begin + 5], plain, 9)[:, begin:])


@pytest.mark.parametrize("family", native.FAMILIES)
def test_plans_leave_out_what_the_fused_forward_does(family: str) -> None:
    decoder = tiny.decoder(family)
    plan = SkipPlan.of([1, 3], [0, 3, 4])
    tokens = tokens_of(family, 1, 12)
    cache = decoder.new_cache(64)
    expected = decoder.forward(tokens, places(1, 0, 12), cache, plan)
    mine = native.forward(family).run(
        tokens, places(1, 0, 12), None, native.new_cache(family), plan, 0
    )
    torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)
    everything = SkipPlan.of_layers(range(tiny.DEPTH))
    none = native.forward(family).run(
        tokens, places(1, 0, 12), None, native.new_cache(family), everything, 1
    )
    assert none.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit", native.UNITS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_choices_are_what_the_logits_say(dtype: torch.dtype, unit: str, threads: int) -> None:
    forward, tokens = native.forward("wide", dtype, unit), tokens_of("wide", 2, 70)
    forward.threads = threads
    at = places(2, 0, 70)
    for int4 in (False, True):
        args = (tokens, at, None, native.new_cache("wide", 2, 128), FULL, 0, int4)
        logits, choice = forward.run(*args), forward.choose(*args, top=20)
        assert torch.equal(choice.tokens, greedy_tokens(logits))
        assert torch.equal(choice.logits, logits.max(-1).values.float())
        best = torch.softmax(logits.double(), -1).amax(-1)
        torch.testing.assert_close(choice.probs.double(), best, rtol=1e-5, atol=1e-6)
        order = logits.float().sort(dim=-1, descending=True, stable=True)
        assert torch.equal(choice.top_tokens, order.indices[..., :20])
        assert torch.equal(choice.top_logits, order.values[..., :20])
    forward.threads = None


@pytest.mark.parametrize("unit", native.UNITS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_are_noticed(unit: str, bad: float) -> None:
    model = tiny.build(tiny.CONFIGS["llama"]())
    model.lm_head.weight.data[37] = bad  # the sign of its logit is the state's
    forward = NativeForward(model, model.model.layers, model.config, unit=unit)
    tokens, at = tokens_of("llama", 1, 9), places(1, 0, 9)
    for int4 in (False, True):
        args = (tokens, at, None, native.new_cache("llama"), FULL, 0, int4)
        assert torch.equal(forward.choose(*args).tokens, greedy_tokens(forward.run(*args)))
    assert (forward.choose(*args).tokens == -1).any()


def test_an_overflow_in_a_layer_is_noticed_in_four_bits() -> None:
    model = tiny.build(tiny.CONFIGS["llama"]())
    model.model.layers[2].input_layernorm.weight.data[3] = torch.inf
    forward = NativeForward(model, model.model.layers, model.config)
    args = (tokens_of("llama", 1, 4), places(1, 0, 4), None, native.new_cache("llama"), FULL, 0)
    assert (forward.choose(*args, int4=True).tokens == -1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tied_embedding_is_read_from_the_packed_head(dtype: torch.dtype) -> None:
    config = tiny.CONFIGS["llama"]()
    config.tie_word_embeddings = True
    model = tiny.build(config, dtype=dtype)
    tokens = tokens_of("llama", 1, 9)
    args = (tokens, places(1, 0, 9), None)
    plain = model.model.embed_tokens.weight.clone()
    states = model.model.embed_tokens(tokens)

    def logits(pack: PackFn) -> torch.Tensor:
        forward = NativeForward(model, model.model.layers, config, pack)
        return forward.run(*args, native.new_cache("llama"), FULL, 0)

    expected = logits(pack_linears)
    packing = Packing(model, model.model.layers, NativeLinear)
    assert torch.equal(model.model.embed_tokens(tokens), states)
    assert torch.equal(logits(packed_before), expected)
    assert sum(weight.numel() for weight in model.parameters()) < plain.numel()  # held once
    packing.undo()
    assert torch.equal(model.model.embed_tokens.weight, plain)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_does_not_fit_is_refused() -> None:
    forward, cache = native.forward("llama"), native.new_cache("llama")
    tokens, at = tokens_of("llama", 1, 3), places(1, 0, 3)
    for arguments in (
        (tokens + 100, at, None, cache, FULL, 0),
        (tokens, at + cache.capacity - 1, None, cache, FULL, 0),
        (tokens, at, at - 1, cache, FULL, 0),
        (tokens, at[:, :2], None, cache, FULL, 0),
        (tokens.int(), at, None, cache, FULL, 0),
        (tokens, at, None, native.new_cache("llama", 2), FULL, 0),
        (tokens, at, None, cache, FULL, 4),
    ):
        with pytest.raises(ValueError):
            forward.run(*arguments)
    with pytest.raises(ValueError):
        forward.choose(tokens, at, None, cache, FULL, 0, top=33)


@pytest.mark.parametrize("family", ["wide", "qwen3", "olmo2"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit", native.UNITS)
def test_a_pass_goes_on_from_kept_states(family: str, dtype: torch.dtype, unit: str) -> None:
    forward, model = native.forward(family, dtype, unit), native.model(family, dtype)
    tokens, at = tokens_of(family, 1, 300), places(1, 0, 300)  # more than one block
    depth, hidden = model.config.num_hidden_layers, model.config.hidden_size
    states = [torch.zeros((1, 300, hidden), dtype=dtype) for _ in range(2 * depth)]
    cache = native.new_cache(family, 1, 512)
    whole = forward.choose(tokens, at, None, cache, FULL, 0, resume=Resume(states))
    for begin in range(1, 2 * depth):
        resume = Resume([None] * (2 * depth), begin, states[begin])
        rest = forward.choose(tokens, at, None, cache, FULL, 0, resume=resume)
        assert torch.equal(rest.logits, whole.logits), begin
        assert torch.equal(rest.log_sum, whole.log_sum), begin


def test_states_that_do_not_fit_are_refused() -> None:
    forward, tokens, at = native.forward("llama"), tokens_of("llama", 1, 3), places(1, 0, 3)
    depth, hidden = tiny.DEPTH, native.model("llama").config.hidden_size
    fit, wrong = torch.zeros((1, 3, hidden)), torch.zeros((1, 4, hidden))
    for resume in (
        Resume([None]),
        Resume([None] * (2 * depth), 2, None),
        Resume([None] * (2 * depth), 0, fit),
        Resume([None] * (2 * depth), 2, wrong),
        Resume([wrong] * (2 * depth)),
        Resume([fit.double()] * (2 * depth)),
    ):
        with pytest.raises(ValueError, match=r"states|begins"):
            forward.choose(tokens, at, None, native.new_cache("llama"), FULL, 0, resume=resume)
