"""One pass of a model: its tokens and positions, under masks, by its modules or fused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from conflayers_cli.engine.layer_skipping import LayerStack
from conflayers_cli.engine.model_lock import ModelLock
from conflayers_cli.kernels import attention, flash_decode
from conflayers_cli.kernels.fused_forward import AttentionFn, FusedForward, repeat_last
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.kernels.native_forward import NativeForward
from conflayers_cli.models.device import input_device
from conflayers_cli.models.support import attention_kinds, sizes_by_layer
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.utils.distributed import broadcast_rank0

AnyForward = FusedForward | NativeForward
"""What may run passes in place of a model's modules."""
MAX_FLASH_TOKENS = 64
"""Tokens per sequence up to which attention uses the kernel for few queries over a long cache."""


@dataclass(frozen=True)
class ModelInput:
    """The input of a pass, int64.

    Attributes:
        tokens: ``[B, T]``.
        positions: ``[B, P]``. Where P < T the tokens after the P-th repeat it (fused passes only).
        slots: ``[B, P]``, each its token's position or beyond it; None: the positions.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor | None = None

    @property
    def tensors(self) -> list[torch.Tensor]:
        given = [self.tokens, self.positions]
        return given if self.slots is None else [*given, self.slots]

    @property
    def written(self) -> torch.Tensor:
        """The slots that keys and values are written at."""
        return self.positions if self.slots is None else self.slots

    def on(self, device: torch.device) -> ModelInput:
        return ModelInput(*(tensor.to(device, non_blocking=True) for tensor in self.tensors))

    def padded(self, width: int, positions: bool) -> ModelInput:
        """With the last token, and perhaps its position, repeated up to ``width`` tokens."""
        if width <= self.tokens.shape[1]:
            return self
        tokens, *others = self.tensors
        if positions:
            others = [repeat_last(other, width) for other in others]
        return ModelInput(repeat_last(tokens, width), *others)


class ForwardRunner:
    """Runs passes over one model that uses the engine's attention. Nothing in a pass depends on
    values that the host would have to read from the device, so passes on a GPU can be recorded.

    Attributes:
        fused: the forward used instead of the model's own, unless modules are watched.
        groups: query heads per key/value head, as many in every layer; None: layers differ.
        max_groups: the most that a layer has of them.
        windows: attention window by kind of layer, None: it sees everything.
        device: where passes run.
        flash: whether fused passes use the attention kernel for few queries.
        lock: held while a pass runs.
    """

    def __init__(self, model: Any, config: Any, stack: LayerStack) -> None:
        self.fused: AnyForward | None = None
        self.lock: ModelLock = stack.lock
        self._model = model
        self._stack = stack
        heads = sizes_by_layer(config, "num_attention_heads")
        kv_heads = sizes_by_layer(config, "num_key_value_heads") or heads
        same = len(heads) == len(kv_heads) == 1
        self.groups: int | None = heads[0] // kv_heads[0] if same else None
        self.max_groups = max(heads) // min(kv_heads)
        self.windows = _windows(config)
        self.device = input_device(model)
        head_dims = sizes_by_layer(config, "head_dim") or [config.hidden_size // min(heads)]
        unsupported = flash_decode.unsupported_reason(self.device, model.dtype, max(head_dims))
        self.flash = unsupported is None

    @property
    def watched(self) -> bool:
        """Whether modules are observed or changed, so that these must run, and not a graph."""
        return self._stack.watched > 0

    @property
    def by_modules(self) -> bool:
        """Whether the model's own modules run now."""
        return self.fused is None or self.watched

    @contextmanager
    def using(self, fused: AnyForward | None, *, flash: bool) -> Iterator[None]:
        """Within: passes are run by another forward. The lock must be held."""
        before = self.fused, self.flash
        self.fused, self.flash = fused, flash
        try:
            yield
        finally:
            self.fused, self.flash = before

    def reads_filled_part(self, width: int) -> bool:
        """Whether attention in passes of this width only reads filled slots, for any ``kv_len``."""
        return self.flash and not self.by_modules and width <= MAX_FLASH_TOKENS

    def run(
        self, inputs: ModelInput, cache: KVCache, plan: SkipPlan, keep: int, kv_len: int
    ) -> torch.Tensor:
        """Logits ``[B, keep, V]`` of the last ``keep`` tokens (0: of all, ``[B, T, V]``).

        Args:
            inputs: on the model's device.
            cache: filled below the first position of every sequence.
            plan: the sub-layers left out.
            keep: see above.
            kv_len: slots that attention may read; all that are written lie below.
        """
        fused = None if self.watched else self.fused
        if isinstance(fused, NativeForward):
            tokens, positions, slots = inputs.tokens, inputs.positions, inputs.slots
            quantized = plan.weights is not None and self._stack.int4.reason is None
            return fused.run(tokens, positions, slots, cache, plan, keep, quantized)
        cache.set_slots(inputs.written, kv_len)
        if fused is None:
            masks = self._masks(inputs, kv_len)
            with self._stack.without(plan):
                output = self._model(
                    input_ids=inputs.tokens,
                    position_ids=inputs.positions,
                    attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=keep,
                )
            logits: torch.Tensor = output.logits
            return broadcast_rank0(logits)
        attend = self._attention(inputs, kv_len)
        int4 = self._stack.int4 if plan.weights else None
        return fused(inputs.tokens, inputs.positions, attend, cache, plan, keep, int4)

    def _attention(self, inputs: ModelInput, kv_len: int) -> Mapping[str, AttentionFn]:
        """The attention of each kind of layer."""
        if self.reads_filled_part(inputs.positions.shape[1]):
            attend = partial(
                flash_decode.flash_attention, positions=inputs.positions, slots=inputs.slots
            )
            return {kind: partial(attend, window=window) for kind, window in self.windows.items()}
        dtype = self._model.dtype
        return {
            kind: partial(attention.masked_attention, mask=attention.additive_mask(mask, dtype))
            for kind, mask in self._masks(inputs, kv_len).items()
        }

    def _masks(self, inputs: ModelInput, kv_len: int) -> dict[str, torch.Tensor]:
        """What each token sees in each kind of layer, folded (see `.attention.fold_mask`)."""
        positions, slots = inputs.positions, inputs.slots
        every = torch.arange(kv_len, device=positions.device)
        at = positions[:, None, :, None]
        seen = every <= at if slots is None else every < at
        own = None if slots is None else every == slots[:, None, :, None]
        masks = {}
        for kind, window in self.windows.items():
            mask = seen if window is None else seen & (every > at - window)
            mask = mask if own is None else mask | own
            # Where layers differ, each folds it for itself.
            masks[kind] = attention.fold_mask(mask, self.groups) if self.groups else mask
        return masks


def _windows(config: Any) -> dict[str, int | None]:
    """Window by kind of layer (None: sees everything), one entry per kind the model has."""
    window = getattr(config, "sliding_window", None)
    kinds = attention_kinds(config, 1)
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}
