"""The attention call against softmax attention written out in float64."""

from __future__ import annotations

import pytest
import torch

from conflayers_cli.kernels.attention import attention_forward, fold_mask, folded_rows

BATCH, DIM, VALUE_DIM, EXTENT = 2, 8, 6, 32
CAP = 3.0


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    *,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Head by head, row by row, as the formula says: ``[B, T, Hq, Dv]`` float64."""
    batch, heads, tokens, _ = query.shape
    groups = heads // key.shape[1]
    out = torch.zeros(batch, tokens, heads, value.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            keys, values = key[b, h // groups].double(), value[b, h // groups].double()
            for t in range(tokens):
                scores = keys @ query[b, h, t].double() * scale
                if softcap is not None:
                    scores = torch.tanh(scores / softcap) * softcap
                if bias is not None:
                    scores = scores + bias[0, h, t].double()
                weights = torch.where(mask[b, 0, t], scores.exp(), 0.0)
                total = weights.sum()
                if sinks is not None:
                    total = total + sinks[h].double().exp()
                out[b, t, h] = weights @ values / total
    return out


def inputs(heads: int, kv_heads: int, tokens: int) -> tuple[torch.Tensor, ...]:
    """Query, key, value, and a mask in which every row sees another, ragged set of keys."""
    generator = torch.Generator().manual_seed(heads * 100 + kv_heads * 10 + tokens)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    query = draw(BATCH, heads, tokens, DIM)
    key, value = draw(BATCH, kv_heads, EXTENT, DIM), draw(BATCH, kv_heads, EXTENT, VALUE_DIM)
    mask = draw(BATCH, 1, tokens, EXTENT) > 0
    mask[..., 0] = True  # something to see in every row
    return query, key, value, mask


HEADS = pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 2), (3, 1)])
TOKENS = pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8])
FOLDED = pytest.mark.parametrize("folded", [False, True], ids=["plain mask", "folded mask"])


@HEADS
@TOKENS
@FOLDED
def test_fused_call(heads: int, kv_heads: int, tokens: int, folded: bool) -> None:
    query, key, value, mask = inputs(heads, kv_heads, tokens)
    expected = reference(query, key, value, mask, 0.3)
    given = fold_mask(mask, heads // kv_heads) if folded else mask
    got, weights = attention_forward(torch.nn.Module(), query, key, value, given, scaling=0.3)
    assert weights is None
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@HEADS
@TOKENS
@FOLDED
@pytest.mark.parametrize("extra", ["softcap", "sinks", "position bias", "all"])
def test_explicit_call(heads: int, kv_heads: int, tokens: int, folded: bool, extra: str) -> None:
    query, key, value, mask = inputs(heads, kv_heads, tokens)
    generator = torch.Generator().manual_seed(1)
    sinks = torch.randn(heads, generator=generator) if extra in ("sinks", "all") else None
    bias = (
        torch.randn(1, heads, tokens, EXTENT, generator=generator)
        if extra in ("position bias", "all")
        else None
    )
    softcap = CAP if extra in ("softcap", "all") else None
    expected = reference(query, key, value, mask, 0.9, softcap=softcap, sinks=sinks, bias=bias)
    got, _ = attention_forward(
        torch.nn.Module(),
        query,
        key,
        value,
        fold_mask(mask, heads // kv_heads) if folded else mask,
        scaling=0.9,
        softcap=softcap,
        s_aux=sinks,
        position_bias=bias,
    )
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@HEADS
@TOKENS
@pytest.mark.parametrize("softcap", [None, CAP])
def test_no_mask_is_plain_causal_attention_with_the_usual_scale(
    heads: int, kv_heads: int, tokens: int, softcap: float | None
) -> None:
    query, key, value, _ = inputs(heads, kv_heads, tokens)
    key, value = key[:, :, :tokens], value[:, :, :tokens]
    causal = torch.ones(BATCH, 1, tokens, tokens, dtype=torch.bool).tril()
    expected = reference(query, key, value, causal, DIM**-0.5, softcap=softcap)
    got, _ = attention_forward(torch.nn.Module(), query, key, value, None, softcap=softcap)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@TOKENS
@pytest.mark.parametrize("groups", [1, 2, 3, 5])
def test_folded_masks_repeat_by_head_and_pad_with_the_first_row(tokens: int, groups: int) -> None:
    mask = inputs(groups, 1, tokens)[3]
    folded = fold_mask(mask, groups)
    rows = folded_rows(tokens, groups)
    assert rows % 4 == 0
    assert 0 <= rows - tokens * groups < 4
    assert folded.shape == (BATCH, 1, rows, EXTENT)
    for row in range(rows):
        source = row % tokens if row < tokens * groups else 0
        assert torch.equal(folded[:, :, row], mask[:, :, source])


@pytest.mark.parametrize("softcap", [None, CAP])
def test_one_query_without_a_mask_sees_all_keys(softcap: float | None) -> None:
    """As transformers means it when it leaves out the mask of a single token on its own cache."""
    query, key, value, _ = inputs(4, 2, 1)
    everything = torch.ones(BATCH, 1, 1, EXTENT, dtype=torch.bool)
    expected = reference(query, key, value, everything, DIM**-0.5, softcap=softcap)
    got, _ = attention_forward(torch.nn.Module(), query, key, value, None, softcap=softcap)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_mask_folded_for_other_groups_is_refused() -> None:
    """It would be read as one of other tokens."""
    query, keys = torch.randn(1, 8, 3, 8), torch.randn(1, 2, 5, 8)
    mask = fold_mask(torch.ones(1, 1, 3, 5, dtype=torch.bool), 1)

    with pytest.raises(ValueError, match="rows for 3 tokens of 4 heads"):
        attention_forward(torch.nn.Module(), query, keys, keys, mask)
