"""Attention of every pass, arranged so that a query's bits don't depend on the other queries.

Two things are done to the call that transformers' models make through their attention interface:

* Grouped heads are *folded*: the query heads that share a key/value head become rows of one call,
  ``[B, Hq, T, D] → [B, Hkv, G·T, D]``. Keys and values are never repeated in memory.
* Rows are padded to a multiple of four, and keys are read in multiples of 512 (`KV_BLOCK`) under a
  mask. PyTorch's CPU kernel then gives a row the same bits whatever the number of rows, its index
  among them, and what lies beyond the mask. So speculative bfloat16 output equals vanilla token
  for token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "conflayers"
ROW_MULTIPLE = 4


def folded_rows(tokens: int, groups: int) -> int:
    """Rows of the folded call, padded: ``tokens`` queries of ``groups`` heads per K/V head."""
    return -(-tokens * groups // ROW_MULTIPLE) * ROW_MULTIPLE


def fold_mask(mask: torch.Tensor, groups: int) -> torch.Tensor:
    """A mask ``[B, 1, T, S]`` bool for the folded call: ``[B, 1, folded_rows(T, groups), S]``.

    Padding rows repeat the first row: they must see something, or their softmax would be NaN.
    """
    batch, _, tokens, kv_len = mask.shape
    rows = folded_rows(tokens, groups)
    folded = mask.new_empty((batch, 1, rows, kv_len))
    used = tokens * groups
    folded[:, :, :used].view(batch, groups, tokens, kv_len).copy_(mask.expand(-1, groups, -1, -1))
    if rows > used:
        folded[:, :, used:] = mask[:, :, :1]
    return folded


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' interface calls it.

    Args:
        query, key, value: ``[B, Hq, T, D]``, ``[B, Hkv, S, D]``, ``[B, Hkv, S, Dv]``.
        attention_mask: bool ``[B, 1, T, S]``, or already folded by :func:`fold_mask`; None: causal
            attention over ``S = T`` keys (the model called without a cache).
        scaling, softcap, s_aux, position_bias: as the model's family has them.

    Returns:
        ``[B, T, Hq, Dv]`` and None (no attention weights).

    Raises:
        ValueError: the mask is folded for other groups of heads than these.
    """
    if softcap is not None or s_aux is not None or position_bias is not None:
        return _explicit(query, key, value, attention_mask, scaling, softcap, s_aux, position_bias)
    _, heads, tokens, _ = query.shape
    groups = heads // key.shape[1]
    if attention_mask is None:
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=tokens > 1, scale=scaling, enable_gqa=groups > 1
        )
        return out.transpose(1, 2).contiguous(), None
    rows = attention_mask.shape[-2]
    if rows != folded_rows(tokens, groups):
        if rows != tokens:
            raise ValueError(f"a mask of {rows} rows for {tokens} tokens of {groups} heads each")
        attention_mask = fold_mask(attention_mask, groups)
    out = folded_attention(query, key, value, attention_mask, scaling)
    return out.transpose(1, 2).contiguous(), None  # some families take a view of it


def folded_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """Attention ``[B, Hq, T, Dv]`` with grouped heads folded into rows, and rows padded.

    Shapes as for :func:`attention_forward`; ``mask`` is from :func:`fold_mask`.
    """
    batch, heads, tokens, size = query.shape
    used, rows = tokens * (heads // key.shape[1]), mask.shape[-2]
    folded = query.reshape(batch, key.shape[1], used, size)
    if rows > used:
        folded = F.pad(folded, (0, 0, 0, rows - used))
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return out[:, :, :used].reshape(batch, heads, tokens, value.shape[-1])


def additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as numbers to add, made once for all layers."""
    added = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return added.masked_fill_(mask.logical_not(), float("-inf"))


def masked_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    mask: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """:func:`folded_attention` under a mask from :func:`additive_mask`: ``[B, T, Hq, Dv]``."""
    return folded_attention(query, keys, values, mask, scaling).transpose(1, 2)


def _explicit(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    position_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, None]:
    """Attention in plain steps, softmax in float32, for what PyTorch's kernel lacks: soft-capping
    (Gemma 2), attention sinks (GPT-OSS), position biases (ALiBi).
    """
    batch, heads, tokens, dim = query.shape
    groups, kv_len = heads // key.shape[1], key.shape[2]
    grouped = query.reshape(batch, key.shape[1], groups * tokens, dim)
    scale = dim**-0.5 if scaling is None else scaling
    scores = torch.matmul(grouped, key.transpose(2, 3)).float() * scale
    scores = scores.view(batch, heads, tokens, kv_len)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if position_bias is not None:
        scores = scores + position_bias
    if mask is None:
        # The last query sees all keys, whether there are as many as queries or more.
        mask = torch.ones(tokens, kv_len, dtype=torch.bool, device=query.device)
        mask = mask.tril(kv_len - tokens)
    elif mask.shape[-2] != tokens:  # folded: the first `tokens` rows are one head's own
        mask = mask[:, :, :tokens]
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.float().view(1, -1, 1, 1).expand(batch, -1, tokens, 1)
        weights = torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :kv_len]
    else:
        weights = torch.softmax(scores, dim=-1)
    weights = weights.to(value.dtype).view(batch, key.shape[1], groups * tokens, kv_len)
    out = torch.matmul(weights, value).view(batch, heads, tokens, value.shape[-1])
    return out.transpose(1, 2).contiguous(), None


# transformers finds attention functions by name; its registry is the one place for them.
AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


def original_attention(model: Any) -> str:
    """The attention that transformers would use, also where the engine's is set already."""
    current: str = model.config._attn_implementation
    return current if current != NAME else "sdpa" if model._supports_sdpa else "eager"
