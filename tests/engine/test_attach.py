"""A model is attached: what is refused, what is learnt of it, and that its attention comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conflayers_cli.engine import attach as attaching
from conflayers_cli.engine.attach import (
    BOTH,
    SAMPLE_TOKENS,
    attach,
    logits_match,
    plain_model,
    sample_input,
)
from conflayers_cli.errors import ConfLayersError, InputError
from conflayers_cli.kernels.attention import NAME
from conflayers_cli.kernels.kv_cache import KV_BLOCK
from tests import tiny


@pytest.fixture
def model() -> Any:
    return tiny.build(tiny.CONFIGS["llama"]())


def attention_of(model: Any) -> str:
    return str(model.config._attn_implementation)


def test_its_passes_give_its_own_logits(model: Any) -> None:
    own = model(input_ids=sample_input(model)[0], use_cache=False).logits
    attached = attach(model, KV_BLOCK)
    assert attention_of(model) == NAME
    torch.testing.assert_close(attached.expected, own)
    torch.testing.assert_close(attached.sample_logits(), own, rtol=1e-4, atol=1e-4)
    assert attached.sub_layers == BOTH
    assert attached.spread is None


def test_caches_have_the_models_sizes(model: Any) -> None:
    attached = attach(model, KV_BLOCK)
    cache = attached.new_cache(SAMPLE_TOKENS, batch=3)
    assert cache.layout == attached.kv_layout is not None
    assert cache.layers[0].keys.shape[0] == 3


def test_plain_within_and_the_engines_behind(model: Any) -> None:
    attached = attach(model, KV_BLOCK)
    with (
        pytest.raises(ZeroDivisionError),
        plain_model(model, attached.stack, attached.plain_attention, None) as plain,
    ):
        assert attention_of(plain) == attached.plain_attention == "sdpa"
        raise ZeroDivisionError
    assert attention_of(model) == NAME


def test_a_model_that_is_refused_has_its_attention(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attaching, "logits_match", lambda model, one, other: False)
    with pytest.raises(InputError, match="it does not give its own logits"):
        attach(model, KV_BLOCK)
    assert attention_of(model) == "sdpa"


def test_a_model_without_numbers_has_its_attention_too(model: Any) -> None:
    model.get_output_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(ConfLayersError, match="logits that are NaN") as caught:
        attach(model, KV_BLOCK)
    assert not isinstance(caught.value, InputError)
    assert attention_of(model) == "sdpa"


def test_only_whole_layers_where_stubs_do_not_equal_one_left_out(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter((True, False))
    monkeypatch.setattr(attaching, "logits_match", lambda model, one, other: next(answers))
    assert attach(model, KV_BLOCK).sub_layers == frozenset()


@pytest.mark.parametrize(("noise", "expected"), [(0.0, True), (1e-3, True), (1.0, False)])
def test_logits_are_similar_but_for_rounding(model: Any, noise: float, expected: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((1, SAMPLE_TOKENS, 50), generator=generator)
    other = logits + noise * torch.randn(logits.shape, generator=generator)
    assert logits_match(model, other, logits) == expected
    for each in (logits, other):
        each[..., 3] = -torch.inf  # ruled out by both
    assert logits_match(model, other, logits) == expected
