"""One pass of a model: its tokens in their places, under masks, by its modules or fused."""

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
from conflayers_cli.kernels.fused_forward import Attend, FusedForward, repeated
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.models.device import device_of
from conflayers_cli.models.support import sizes_by_layer
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.utils.distributed import agreed

MOST_FLASHED = 64
"""Tokens a row up to which attention goes through the kernel for few queries over a long cache."""


@dataclass(frozen=True)
class ModelInput:
    """What a pass is given, int64.

    Attributes:
        tokens: ``[B, T]``.
        positions: ``[B, P]``. Where P < T the tokens behind the P-th repeat it (fused passes only).
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

    def repeated(self, width: int, positions: bool) -> ModelInput:
        """With the last token repeated up to ``width``, in its own place or without one."""
        tokens = repeated(self.tokens, width)
        if not positions:
            return ModelInput(tokens, self.positions, self.slots)
        slots = None if self.slots is None else repeated(self.slots, width)
        return ModelInput(tokens, repeated(self.positions, width), slots)


class ForwardRunner:
    """Runs passes over one model. Nothing in one depends on values that the host would have to read
    from the device, so passes on a GPU can be recorded.

    Args:
        model: a transformers causal language model that uses the engine's attention.
        config: its text config.
        stack: its layers.

    Attributes:
        fused: the forward to use in place of the model's own, unless modules are watched.
        groups: query heads per key/value head, as many in every layer; None: layers differ.
        most_groups: the most that a layer has of them.
        windows: of each kind of layer, None where it sees everything.
        device: where passes run.
        flash: whether fused passes use the attention kernel for few queries.
    """

    def __init__(self, model: Any, config: Any, stack: LayerStack) -> None:
        self.fused: FusedForward | None = None
        self._model = model
        self._stack = stack
        heads = sizes_by_layer(config, "num_attention_heads")
        shared = sizes_by_layer(config, "num_key_value_heads") or heads
        same = len(heads) == len(shared) == 1
        self.groups: int | None = heads[0] // shared[0] if same else None
        self.most_groups = max(heads) // min(shared)
        self.windows = _windows(config, stack.depth)
        self.device = device_of(model)
        self.flash = flash_decode.why_not(self.device, model.dtype, _head_size(config)) is None

    @property
    def watched(self) -> bool:
        """Whether somebody is at work on the modules, so that these must run, one by one."""
        return self._stack.watched > 0

    @property
    def lock(self) -> ModelLock:
        """Held while a pass runs."""
        return self._stack.lock

    @property
    def by_modules(self) -> bool:
        """Whether the model's own modules run now."""
        return self.fused is None or self.watched

    @contextmanager
    def using(self, fused: FusedForward | None, *, flash: bool) -> Iterator[None]:
        """Within: passes are run by another forward. Nobody else may run any meanwhile."""
        before = self.fused, self.flash
        self.fused, self.flash = fused, flash
        try:
            yield
        finally:
            self.fused, self.flash = before

    def reads_filled_part(self, width: int) -> bool:
        """Whether attention of passes of so many tokens a row reads no more of the cache than is
        filled, whatever the extent it is given."""
        return self.flash and not self.by_modules and width <= MOST_FLASHED

    def run(
        self, inputs: ModelInput, cache: KVCache, plan: SkipPlan, keep: int, extent: int
    ) -> torch.Tensor:
        """Logits ``[B, keep, V]`` of the last ``keep`` tokens (0: of all, ``[B, T, V]``).

        Args:
            inputs: on the model's device.
            cache: filled below the first position of every row.
            plan: the sub-layers left out.
            keep: see above.
            extent: slots that attention may read; all that are written lie below.
        """
        cache.announce(inputs.written, extent)
        fused = self.fused
        if fused is None or self.watched:
            return self._by_modules(inputs, self._masks(inputs, extent), cache, plan, keep)
        attend = self._attend(inputs, extent)
        int4 = self._stack.int4 if plan.weights else None
        return fused(inputs.tokens, inputs.positions, attend, cache, plan, keep, int4)

    def _attend(self, inputs: ModelInput, extent: int) -> Mapping[str, Attend]:
        """The attention of each kind of layer."""
        if self.reads_filled_part(inputs.positions.shape[1]):
            attend = partial(
                flash_decode.flash_attention, positions=inputs.positions, slots=inputs.slots
            )
            return {kind: partial(attend, window=window) for kind, window in self.windows.items()}
        dtype = self._model.dtype
        return {
            kind: partial(attention.added_attention, mask=attention.added_mask(mask, dtype))
            for kind, mask in self._masks(inputs, extent).items()
        }

    def _by_modules(
        self,
        inputs: ModelInput,
        masks: Mapping[str, torch.Tensor],
        cache: KVCache,
        plan: SkipPlan,
        keep: int,
    ) -> torch.Tensor:
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
        return agreed(logits)

    def _masks(self, inputs: ModelInput, extent: int) -> dict[str, torch.Tensor]:
        """What each token sees in each kind of layer, folded (see `.attention.fold_mask`)."""
        positions, slots = inputs.positions, inputs.slots
        every = torch.arange(extent, device=positions.device)
        at = positions[:, None, :, None]
        seen = every <= at if slots is None else every < at
        own = None if slots is None else every == slots[:, None, :, None]
        masks = {}
        for kind, window in self.windows.items():
            mask = seen if window is None else seen & (every > at - window)
            mask = mask if own is None else mask | own
            # where layers differ, each folds it for itself
            masks[kind] = attention.fold_mask(mask, self.groups) if self.groups else mask
        return masks


def _head_size(config: Any) -> int:
    """The largest, where layers differ."""
    sizes = sizes_by_layer(config, "head_dim")
    return max(sizes) if sizes else config.hidden_size // int(config.num_attention_heads)


def _windows(config: Any, depth: int) -> dict[str, int | None]:
    """Window by kind of layer (None: sees everything), one entry per kind the model has."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * depth
    return {kind: window if kind == "sliding_attention" else None for kind in dict.fromkeys(kinds)}
