"""A Hugging Face decoder, run in full or under a skip plan, on the engine's own cache and masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from conflayers_cli.errors import InputError

from . import attention
from .cache import EXTENT_MULTIPLE, KVCache, LayerSizes, extent_for
from .fused import FAMILIES, FusedForward, Masks
from .layers import LayerStack, SubLayer
from .packing import Packing
from .plan import SkipPlan

FULL = SkipPlan()
PREFILL_CHUNK = 256
"""Prompt tokens per forward at the most: bounds the activations of a long prompt."""
LEAST_CHUNK = 64
LOOSE_EXTENT = 64
"""Keys are read in extents of a multiple of this where bits don't matter."""
MASK_ENTRIES = 1 << 22
"""Tokens times heads per key head times positions of one forward: bounds its mask, as far as chunks
of `LEAST_CHUNK` tokens allow."""

Observer = Callable[[SubLayer, int, torch.Tensor], None]


@dataclass(frozen=True)
class RowRule:
    """How many rows, tokens of all sequences together, a pass runs at the least.

    A linear layer gives a single half-precision row other bits than the same row among several;
    with two or more they agree. A pass of one token therefore runs it twice, which costs the same.
    """

    least: int

    @classmethod
    def for_dtype(cls, dtype: torch.dtype) -> RowRule:
        return cls(1 if dtype == torch.float32 else 2)

    @property
    def bitwise(self) -> bool:
        """Whether a token's logits are to have the same bits in every pass."""
        return self.least > 1


class Decoder:
    """A causal language model, ready to be decoded with.

    The model stays the transformers class it is; its attention goes through
    :mod:`.attention` as long as this object uses it (see :meth:`plain` for the way back).

    Attributes:
        exact_positions: longest text that can be decoded exactly, None where there is no bound.
        sub_layers: the kinds that may be left out one by one; empty: only whole layers may.
        full_passes, draft_passes: forwards so far, of the whole model and under a plan.

    Args:
        model: a transformers causal language model in eval mode, on its device and in its dtype.
        exact: arrange half-precision passes so that a token's logits have the same bits in every
            one of them; without, drafts may part from vanilla at near-ties, and steps are quicker.

    Raises:
        InputError: the model can't be decoded exactly this way; the message names the reason.
    """

    def __init__(self, model: Any, *, exact: bool = True) -> None:
        self.model = model
        self.config = model.config.get_text_config()
        _refuse_unsupported(model, self.config)
        self.stack = LayerStack(model)
        self.depth = self.stack.depth
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.vocabulary = int(self.config.vocab_size)
        self.rows = RowRule.for_dtype(self.dtype) if exact else RowRule(1)
        self._extent_multiple = EXTENT_MULTIPLE if exact else LOOSE_EXTENT
        heads = int(self.config.num_attention_heads)
        self._groups = heads // int(getattr(self.config, "num_key_value_heads", None) or heads)
        self._windows = _windows(self.config, self.depth)
        self._plain_attention = _own_attention(model)
        self.exact_positions = _exact_positions(self.config)
        self.full_passes = self.draft_passes = 0
        self._packing = Packing.earlier(model)
        self._fused: FusedForward | None = None
        self._cache_sizes: list[LayerSizes] | None = None
        # First of all, while the model's own weights are there: packed ones replace them.
        expected = self._plain_logits()
        self._packing = Packing.of(model, self.stack.layers)
        try:
            self.sub_layers: frozenset[SubLayer] = self._checked(expected)
        except InputError:
            model.set_attn_implementation(self._plain_attention)
            raise
        self._fused = self._fuse()
        self.full_passes = self.draft_passes = 0  # the checks' own don't count

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        """A cache for ``batch`` rows of up to ``capacity`` positions."""
        cache = KVCache(self.depth, batch, capacity)
        if self._cache_sizes is not None:
            like = torch.empty(0, dtype=self.dtype, device=self.device)
            cache.allocate(self._cache_sizes, like)
        return cache

    def chunk_for(self, length: int) -> int:
        """Tokens per forward of a prompt of ``length`` tokens."""
        fitting = MASK_ENTRIES // (self._groups * extent_for(length))
        return max(LEAST_CHUNK, min(PREFILL_CHUNK, fitting))

    def check_plan(self, plan: SkipPlan) -> None:
        """Raise InputError unless this model can run under the plan."""
        try:
            plan.check(self.depth)
        except ValueError as error:
            raise InputError(f"skip plan does not fit the model: {error}") from error
        if plan.partial and len(self.sub_layers) < 2:
            raise InputError(
                "this model's sub-layers can't be left out one by one, only whole layers; "
                f"layers {', '.join(map(str, plan.partial))} name just one of the two"
            )

    @torch.inference_mode()
    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cache: KVCache,
        plan: SkipPlan = FULL,
        *,
        slots: torch.Tensor | None = None,
        last_only: bool = False,
    ) -> torch.Tensor:
        """One pass. Keys and values are written at the tokens' slots, by default their positions.

        A token sees the slots below its position (those within the window, where a layer has one)
        and its own slot. So tokens that are alternatives to each other can run in one pass: one of
        them in the slot of their position, the others in slots behind all that anyone sees.

        Args:
            tokens: int64 ``[B, T]``.
            positions: int64 ``[B, T]``.
            cache: filled below the first position of every row.
            plan: the sub-layers left out.
            slots: int64 ``[B, T]``, each its token's position or beyond it; None: the positions.
            last_only: compute logits for the last token only.

        Returns:
            Logits ``[B, T, V]`` (``[B, 1, V]`` with ``last_only``) in the model's dtype.
        """
        if plan:
            self.draft_passes += 1
        else:
            self.full_passes += 1
        batch, wanted = tokens.shape
        # Drafts are guesses: only what decides has to have the same bits in every pass.
        least = 1 if plan or batch > 1 else self.rows.least
        keep = least if last_only and wanted >= least else 0
        fused = None if self.stack.watched else self._fused
        if wanted < least:
            tokens = _repeated(tokens, least)
            if fused is None:
                positions = _repeated(positions, least)
                slots = None if slots is None else _repeated(slots, least)
        written = positions if slots is None else slots
        extent = extent_for(int(written.max()) + 1, self._extent_multiple)
        cache.announce(written, extent)
        masks = self._masks(positions, slots, extent)
        run = self._by_modules if fused is None else fused
        logits = run(tokens, positions, masks, cache, plan, keep)
        return logits[:, :wanted][:, -1:] if last_only else logits[:, :wanted]

    def _by_modules(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        masks: Masks,
        cache: KVCache,
        plan: SkipPlan,
        keep: int,
    ) -> torch.Tensor:
        with self.stack.without(plan):
            output = self.model(
                input_ids=tokens,
                position_ids=positions,
                attention_mask=masks,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=keep,
            )
        logits: torch.Tensor = output.logits
        return logits

    def prefill(
        self, tokens: torch.Tensor, cache: KVCache, *, start: int = 0, plan: SkipPlan = FULL
    ) -> torch.Tensor:
        """Run a prompt, in chunks, on top of ``start`` filled positions.

        Args:
            tokens: int64 ``[B, T]``, T ≥ 1, all rows of one length.

        Returns:
            Logits of the last token, ``[B, 1, V]``.
        """
        logits = torch.empty(0)
        size = self.chunk_for(start + tokens.shape[1])
        for begin in range(0, tokens.shape[1], size):
            chunk = tokens[:, begin : begin + size]
            positions = torch.arange(
                start + begin, start + begin + chunk.shape[1], device=self.device
            ).expand(chunk.shape)
            logits = self.forward(chunk, positions, cache, plan, last_only=True)
        return logits

    @contextmanager
    def observing(self, observer: Observer) -> Iterator[None]:
        """Within: every sub-layer's output ``[B, T, d]``, before the residual add, is shown.

        Sub-layers that a plan leaves out are not shown.
        """

        def hook(kind: SubLayer, layer: int) -> Callable[..., None]:
            def show(module: nn.Module, args: Any, output: Any) -> None:
                observer(kind, layer, output[0] if isinstance(output, tuple) else output)

            return show

        kinds: tuple[SubLayer, ...] = ("attention", "mlp")
        handles = [
            module.register_forward_hook(hook(kind, i))
            for i in range(self.depth)
            for kind in kinds
            if (module := self.stack.output_of(kind, i)) is not None
        ]
        try:
            with self.stack.watching():
                yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def plain(self) -> Iterator[Any]:
        """Within: the transformers model with its own attention, as ``generate`` would find it."""
        self.model.set_attn_implementation(self._plain_attention)
        try:
            with self._packing.unpacked() if self._packing else nullcontext():
                yield self.model
        finally:
            self.model.set_attn_implementation(attention.NAME)

    def _masks(self, positions: torch.Tensor, slots: torch.Tensor | None, extent: int) -> Masks:
        every = torch.arange(extent, device=positions.device)
        at = positions[:, None, :, None]
        seen = every <= at if slots is None else every < at
        own = None if slots is None else every == slots[:, None, :, None]
        masks = {}
        for kind, window in self._windows.items():
            mask = seen if window is None else seen & (every > at - window)
            mask = mask if own is None else mask | own
            masks[kind] = attention.fold_mask(mask, self._groups)
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _plain_logits(self) -> torch.Tensor:
        """Logits ``[1, T, V]`` of the sample by the model as transformers runs it."""
        tokens, _ = self._sample()
        with torch.inference_mode(), self.plain() as model, self.stack.learning_shapes():
            logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
        return logits

    def _checked(self, expected: torch.Tensor) -> frozenset[SubLayer]:
        """:meth:`_self_check`; a model that fails it with packed weights is given its own back."""
        try:
            return self._self_check(expected)
        except InputError:
            if self._packing is None:
                raise
            self._packing.undo()
            self._packing = None
            return self._self_check(expected)

    def _self_check(self, expected: torch.Tensor) -> frozenset[SubLayer]:
        """Compare with the logits that transformers gives; find out what may be left out.

        Returns:
            Both sub-layer kinds where stubs of the two equal the skipped layer, else an empty set:
            then only whole layers may be skipped.

        Raises:
            InputError: the engine's cache and masks don't reproduce the model's own logits.
        """
        tokens, positions = self._sample()
        count = tokens.shape[1]
        cache = self.new_cache(count)
        name = type(self.model).__name__
        try:
            half = count // 2
            self.prefill(tokens[:, :half], cache)
            logits = self.forward(tokens[:, half:], positions[:, half:], cache)
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise InputError(
                f"{name} does not run on this engine's cache and masks: {error}"
            ) from error
        if not self._close(logits, expected[:, half:]):
            raise InputError(
                f"{name} is refused: run step by step with explicit masks and positions it does "
                "not give its own logits, so output could not be guaranteed to be the model's own"
            )
        self._cache_sizes = cache.sizes
        return self._check_stubs(tokens, positions)

    def _fuse(self) -> FusedForward | None:
        """The fused forward where the model has one that gives its modules' logits."""
        if getattr(self.config, "model_type", None) not in FAMILIES:
            return None
        tokens, positions = self._sample()
        cache = self.new_cache(tokens.shape[1])
        expected = self.forward(tokens, positions, cache)
        try:
            self._fused = FusedForward(self.model, self.stack.layers, self.config)
            logits = self.forward(tokens, positions, cache)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
            return None
        return self._fused if self._close(logits, expected) else None

    def _sample(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and positions ``[1, T]`` to compare ways of running the model by.

        From all over the vocabulary: runs of special tokens are chaotic in bfloat16.
        """
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.vocabulary, (1, 16), generator=generator).to(self.device)
        return tokens, torch.arange(16, device=self.device)[None]

    def _check_stubs(self, tokens: torch.Tensor, positions: torch.Tensor) -> frozenset[SubLayer]:
        if self.stack.attention_name is None or self.stack.mlp_name is None:
            return frozenset()
        middle = self.depth // 2
        skipped = self.forward(
            tokens, positions, self.new_cache(tokens.shape[1]), SkipPlan.of_layers([middle])
        )
        try:
            with self.stack.stubbed(middle):
                stubbed = self.forward(tokens, positions, self.new_cache(tokens.shape[1]))
        except (TypeError, ValueError, AttributeError, RuntimeError):
            return frozenset()
        return frozenset(("attention", "mlp")) if self._close(stubbed, skipped) else frozenset()

    def _close(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        """Whether logits ``[1, T, V]`` agree but for rounding, at most of the positions.

        Wrong masks or positions move logits by as much as they vary; half-precision rounding by a
        few per cent of that, and more at a token here and there, hence the median.
        """
        share = 1e-2 if self.dtype == torch.float32 else 0.3
        difference = (one.float() - other.float()).pow(2).mean(-1).sqrt()
        spread = other.float().std(-1).clamp(min=1e-6)
        return bool((difference / spread).median() <= share)


def _repeated(row: torch.Tensor, width: int) -> torch.Tensor:
    """``[B, T]`` with the last column repeated up to ``[B, width]``."""
    return torch.cat([row, row[:, -1:].expand(-1, width - row.shape[1])], dim=1)


def _refuse_unsupported(model: Any, config: Any) -> None:
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(f"{name} is an encoder-decoder model; only decoders can be decoded here")
    kinds = set(getattr(config, "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
    }
    if kinds:
        raise InputError(
            f"{name} has layers of the kind {', '.join(sorted(kinds))}, whose state can't be "
            "rolled back token by token; only full and sliding-window attention can be exact"
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise InputError(f"{name} does not use transformers' attention interface; not supported")


def _own_attention(model: Any) -> str:
    """The attention that transformers would use, also where an earlier Decoder set the engine's."""
    current: str = model.config._attn_implementation
    if current != attention.NAME:
        return current
    return "sdpa" if model._supports_sdpa else "eager"


def _exact_positions(config: Any) -> int | None:
    """Length up to which a token's keys don't depend on the pass that made them; None: unbounded.

    "dynamic" and "longrope" rotations turn all tokens of a pass by angles that depend on its last
    position once that lies beyond the trained length: drafts checked together, or a prompt read in
    chunks, would not get the angles that transformers gives them.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    by_kind = rope.values() if all(isinstance(v, dict) for v in rope.values()) else [rope]
    lengths = [
        entry.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
        for entry in by_kind
        if entry.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(map(int, lengths), default=None)


def _windows(config: Any, depth: int) -> dict[str, int | None]:
    """Window by kind of layer (None: sees everything), one entry per kind the model has."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * depth
    return {kind: window if kind == "sliding_attention" else None for kind in dict.fromkeys(kinds)}
