"""Tokens of the model's own texts, each in the situation of a first drafted token.

Such a token sees the full model's keys of all that precedes it and its own draft key, which comes
from the hidden state that the layers run so far have made of it. Tokens don't see each other, so
tokens of several texts run side by side, and any number of drafts of them as a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from conflayers_cli.engine.argmax import greedy_tokens
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.layer_skipping import LayerOverride
from conflayers_cli.models.support import sizes_by_layer
from conflayers_cli.search.corpus import Continuation

MAX_BYTES = 512 * 2**20
"""Bound of the memory that one call of a layer, or of the model's head, takes besides the states it
is given; one state of all tokens may exceed it."""
INNER_WIDTHS = 24
"""Bound of a layer's intermediate values, in hidden states of the same dtype: several inner states
of an MLP, each up to four times as wide, and norms in float32."""


class TokenWindow:
    """Tokens spread over texts, with the full model's keys of what precedes them.

    Attributes:
        tokens, positions: what is fed, int64 ``[1, T]``.
        following: the token that the model wrote next, int64 ``[T]``.

    Args:
        decoder: the model.
        continuations: at least one of them with two tokens of output.
        size: how many tokens; fewer where the texts are short.
    """

    def __init__(self, decoder: Decoder, continuations: Sequence[Continuation], size: int) -> None:
        self._decoder = decoder
        texts = [each for each in continuations if len(each.output) >= 2]
        spots = [
            (len(text.prompt) + at, i)
            for i, text in enumerate(texts)
            for at in _spread(len(text.output) - 1, size // len(texts) + (i < size % len(texts)))
        ]
        whole = [(*text.prompt, *text.output) for text in texts]
        device = decoder.device
        self.tokens = torch.tensor([[whole[i][at] for at, i in spots]], device=device)
        self.positions = torch.tensor([[at for at, _ in spots]], device=device)
        self.following = torch.tensor([whole[i][at + 1] for at, i in spots], device=device)
        lengths = [max((at for at, j in spots if j == i), default=0) for i in range(len(texts))]
        self._cache = _PrefixCache(decoder, [whole[i][:n] for i, n in enumerate(lengths) if n])
        self._masks = self._make_masks([i for _, i in spots], lengths)

    @property
    def size(self) -> int:
        """T, the number of tokens."""
        return self.tokens.shape[1]

    @property
    def states_at_once(self) -> int:
        """States ``[T, d]`` that one call of a layer may take within `MAX_BYTES`; 1 at least."""
        config, element = self._decoder.config, self._decoder.dtype.itemsize
        slots = self._cache.slots + self.size
        keys = slots * self._cache.bytes_per_slot
        # Attention in plain steps keeps scores, weights and a copy in float32.
        scores = 3 * 4 * max(sizes_by_layer(config, "num_attention_heads")) * self.size * slots
        inner = INNER_WIDTHS * self.size * int(config.hidden_size) * element
        return max(1, MAX_BYTES // (keys + scores + inner))

    @torch.inference_mode()
    def forward(self, run: LayerOverride) -> None:
        """One pass of the model over the tokens, with ``run`` in place of every layer.

        The layers that it is given take hidden states ``[S, T, d]`` for any S.
        """
        self._model(run, 1, 1)

    @torch.inference_mode()
    def choices(self, states: torch.Tensor) -> torch.Tensor:
        """The tokens that the model's head would choose after ``[S, T, d]``: int64 ``[S, T]``."""
        last, chosen = self._decoder.depth - 1, []
        logits = 4 * 4 * self._decoder.vocabulary * self.size  # capped and cast in float32
        for chunk in states.split(max(1, MAX_BYTES // logits)):

            def give(
                i: int, hidden: torch.Tensor, layer: object, chunk: torch.Tensor = chunk
            ) -> torch.Tensor:
                return chunk if i == last else hidden

            chosen.append(greedy_tokens(self._model(give, len(chunk), 0)))
        return torch.cat(chosen)

    def _model(self, run: LayerOverride, batch: int, logits_to_keep: int) -> torch.Tensor:
        """Logits ``[batch, T or logits_to_keep, V]``."""
        with self._decoder.stack.replacing_layers(run):
            output = self._decoder.model(
                input_ids=self.tokens.expand(batch, -1),
                position_ids=self.positions.expand(batch, -1),
                attention_mask=self._masks,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=logits_to_keep,
            )
        logits: torch.Tensor = output.logits
        return logits

    def _make_masks(
        self, text_of_token: Sequence[int], lengths: Sequence[int]
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """What the tokens see, bool ``[1, 1, T, slots + T]`` by kind of layer: of their own text's
        slots those before them, and behind all texts their own."""
        device = self.positions.device
        own = torch.eye(self.size, dtype=torch.bool, device=device)
        text = torch.tensor(text_of_token, device=device)[:, None]
        slot_text = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]).to(device)
        slots = torch.cat([torch.arange(n) for n in lengths]).to(device)
        at = self.positions[0, :, None]
        before = (slot_text == text) & (slots < at)
        masks = {}
        for kind, window in self._decoder.passes.windows.items():
            seen = before if window is None else before & (slots > at - window)
            masks[kind] = torch.cat([seen, own], dim=1)[None, None]
        return masks if len(masks) > 1 else next(iter(masks.values()))


def _spread(count: int, share: int) -> list[int]:
    """Up to ``share`` of the indices under ``count``, evenly spread."""
    share = min(share, count)
    return [int((k + 0.5) * count / share) for k in range(share)]


class _PrefixLayer(DynamicLayer):
    """The texts' keys and values of one layer, side by side: ``[1, H, slots, D]`` each."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The texts' keys and values, behind them own ones ``[S, H, T, D]``, which aren't kept."""
        shape = (len(key_states), -1, -1, -1)
        return (
            torch.cat([self.keys.expand(shape), key_states], dim=2),
            torch.cat([self.values.expand(shape), value_states], dim=2),
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2] + query_length, 0

    def get_seq_length(self) -> int:
        return 0  # positions are always given to the model, never derived from the cache


class _PrefixCache(Cache):
    """Texts as the full model has read them, the same for every sequence of a batch."""

    def __init__(self, decoder: Decoder, texts: Sequence[Sequence[int]]) -> None:
        caches = []
        for text in texts:
            caches.append(decoder.new_cache(len(text)))
            decoder.prefill(torch.tensor([text], device=decoder.device), caches[-1])
        layers = []
        for of_layer in zip(*(cache.layers for cache in caches), strict=True):
            pairs = list(zip(of_layer, map(len, texts), strict=True))
            keys = torch.cat([layer.keys[:, :, :n] for layer, n in pairs], dim=2)
            values = torch.cat([layer.values[:, :, :n] for layer, n in pairs], dim=2)
            layers.append(_PrefixLayer(keys, values))
        super().__init__(layers=layers)

    @property
    def slots(self) -> int:
        """Positions of all texts together."""
        return int(self.layers[0].keys.shape[2])

    @property
    def bytes_per_slot(self) -> int:
        """Of the widest layer."""
        return max((of.keys.nbytes + of.values.nbytes) // self.slots for of in self.layers)
