"""Tokens of the model's own texts, each in the situation of a first drafted token.

Such a token sees the full model's keys of all that precedes it and its own draft key, which comes
from the hidden state that the layers run so far have made of it. Tokens don't see each other, so
tokens of several texts run side by side, and any number of drafts of them as rows of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from conflayers_cli.engine.argmax import greedy_tokens
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.engine.layer_skipping import InPlace
from conflayers_cli.models.support import sizes_by_layer
from conflayers_cli.search.corpus import Sample

MOST_BYTES = 512 * 2**20
"""Bound, in bytes, of what one call of a layer, or of the model's head, makes besides the states it
is given; as far as one state of all tokens fits."""
INNER_WIDTHS = 24
"""What a layer makes of a hidden state at once, at the most, in hidden states of the same dtype:
an MLP's inner ones, of up to four times the width and several at a time, and norms in float32."""


class Window:
    """Tokens spread over texts, with the full model's keys of what precedes them.

    Attributes:
        tokens, positions: what is fed, int64 ``[1, T]``.
        following: the token that the model wrote next, int64 ``[T]``.

    Args:
        decoder: the model.
        samples: texts it wrote, at least one of them with two tokens of output.
        size: how many tokens; fewer where the texts are short.
    """

    def __init__(self, decoder: Decoder, samples: Sequence[Sample], size: int) -> None:
        self._decoder = decoder
        texts = [sample for sample in samples if len(sample.output) >= 2]
        spots = [
            (len(texts[row].prompt) + at, row)
            for row, share in enumerate(_shares(size, len(texts)))
            for at in _spread(len(texts[row].output) - 1, share)
        ]
        whole = [(*text.prompt, *text.output) for text in texts]
        device = decoder.device
        self.tokens = torch.tensor([[whole[row][at] for at, row in spots]], device=device)
        self.positions = torch.tensor([[at for at, _ in spots]], device=device)
        self.following = torch.tensor([whole[row][at + 1] for at, row in spots], device=device)
        lengths = [max((at for at, r in spots if r == row), default=0) for row in range(len(texts))]
        self._cache = _PrefixCache(decoder, [whole[r][:n] for r, n in enumerate(lengths) if n])
        self._masks = self._make_masks([row for _, row in spots], lengths)

    @property
    def size(self) -> int:
        """T, the tokens there are."""
        return self.tokens.shape[1]

    @property
    def states_at_once(self) -> int:
        """States ``[T, d]`` that one call of a layer may take within `MOST_BYTES`; 1 at least."""
        config, element = self._decoder.config, self._decoder.dtype.itemsize
        slots = self._cache.slots + self.size
        keys = slots * self._cache.bytes_per_slot
        # Attention in plain steps keeps scores, weights and a copy in float32.
        scores = 3 * 4 * max(sizes_by_layer(config, "num_attention_heads")) * self.size * slots
        inner = INNER_WIDTHS * self.size * int(config.hidden_size) * element
        return max(1, MOST_BYTES // (keys + scores + inner))

    @torch.inference_mode()
    def forward(self, run: InPlace) -> None:
        """One pass of the model over the tokens, with ``run`` in place of every layer.

        The layers that it is given take hidden states ``[S, T, d]`` for any S.
        """
        self._model(run, 1, 1)

    @torch.inference_mode()
    def choices(self, states: torch.Tensor) -> torch.Tensor:
        """The tokens that the model's head would choose after ``[S, T, d]``: int64 ``[S, T]``."""
        last, chosen = self._decoder.depth - 1, []
        logits = 4 * 4 * self._decoder.vocabulary * self.size  # capped and cast in float32
        for chunk in states.split(max(1, MOST_BYTES // logits)):

            def give(
                i: int, hidden: torch.Tensor, layer: object, chunk: torch.Tensor = chunk
            ) -> torch.Tensor:
                return chunk if i == last else hidden

            chosen.append(greedy_tokens(self._model(give, len(chunk), 0)))
        return torch.cat(chosen)

    def _model(self, run: InPlace, rows: int, logits_to_keep: int) -> torch.Tensor:
        """Logits ``[rows, T or logits_to_keep, V]``."""
        with self._decoder.stack.in_place(run):
            output = self._decoder.model(
                input_ids=self.tokens.expand(rows, -1),
                position_ids=self.positions.expand(rows, -1),
                attention_mask=self._masks,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=logits_to_keep,
            )
        logits: torch.Tensor = output.logits
        return logits

    def _make_masks(
        self, rows: Sequence[int], lengths: Sequence[int]
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """What the tokens see, bool ``[1, 1, T, slots + T]`` by kind of layer: of their own text's
        slots those before them, and behind all texts their own."""
        device = self.positions.device
        own = torch.eye(self.size, dtype=torch.bool, device=device)
        text = torch.tensor(rows, device=device)[:, None]
        slot_text = torch.cat([torch.full((n,), r) for r, n in enumerate(lengths)]).to(device)
        slots = torch.cat([torch.arange(n) for n in lengths]).to(device)
        at = self.positions[0, :, None]
        before = (slot_text == text) & (slots < at)
        masks = {}
        for kind, window in self._decoder.passes.windows.items():
            seen = before if window is None else before & (slots > at - window)
            masks[kind] = torch.cat([seen, own], dim=1)[None, None]
        return masks if len(masks) > 1 else next(iter(masks.values()))


def _shares(size: int, texts: int) -> list[int]:
    """``size`` divided as evenly as can be."""
    return [size // texts + (i < size % texts) for i in range(texts)]


def _spread(count: int, share: int) -> list[int]:
    """Up to ``share`` of the indices under ``count``, evenly spread."""
    share = min(share, count)
    return [int((k + 0.5) * count / share) for k in range(share)]


class _PrefixLayer(CacheLayerMixin):
    """The texts' keys and values of one layer, side by side: ``[1, H, slots, D]`` each."""

    is_compileable = False
    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is ever missing."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The texts' keys and values, behind them own ones ``[S, H, T, D]``, which aren't kept."""
        rows = (len(key_states), -1, -1, -1)
        return (
            torch.cat([self.keys.expand(rows), key_states], dim=2),
            torch.cat([self.values.expand(rows), value_states], dim=2),
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2] + query_length, 0

    def get_seq_length(self) -> int:
        return 0  # positions are always given to the model, never derived from the cache

    def get_max_length(self) -> int:
        return self.keys.shape[2]


class _PrefixCache(Cache):
    """Texts as the full model has read them, the same for every row of a pass."""

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
        """How many positions the texts have, all together."""
        return int(self.layers[0].keys.shape[2])

    @property
    def bytes_per_slot(self) -> int:
        """What one position of the widest layer takes, in bytes."""
        return max((of.keys.nbytes + of.values.nbytes) // self.slots for of in self.layers)
