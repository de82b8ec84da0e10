"""A Hugging Face decoder, run in full or under a skip plan, on the engine's own cache and masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from subprocess import SubprocessError
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from conflayers_cli.engine.argmax import INVALID_TOKEN, greedy_tokens
from conflayers_cli.engine.async_decode import AsyncDecode
from conflayers_cli.engine.batch_invariance import (
    NOT_INVARIANT,
    PROBED_TOKENS,
    PROBED_WIDTHS,
    BatchInvariance,
    Logits,
    probe_min_rows,
)
from conflayers_cli.engine.cache_pool import CachePool
from conflayers_cli.engine.forward import ForwardRunner, ModelInput
from conflayers_cli.engine.graph_runner import (
    LOOSE_EXTENT,
    CudaRecorder,
    ForwardSpec,
    GraphRunner,
    Recorder,
    Runner,
)
from conflayers_cli.engine.layer_skipping import LayerStack, SubLayer
from conflayers_cli.errors import ConfLayersError, InputError
from conflayers_cli.kernels import attention
from conflayers_cli.kernels.fused_forward import FAMILIES, FusedForward
from conflayers_cli.kernels.kv_cache import EXTENT_MULTIPLE, KVCache, LayerSizes, extent_for
from conflayers_cli.kernels.packed_linear import Packing
from conflayers_cli.kernels.triton_forward import KernelForward
from conflayers_cli.models.device import device_of, spread_of
from conflayers_cli.models.peft_modules import mixes_dtypes, unwrapped
from conflayers_cli.models.quantization import method_of, promise, rounds_inputs
from conflayers_cli.models.support import (
    exact_positions,
    first_line,
    own_attention,
    refuse_unsupported,
    triton_errors,
)
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.utils.distributed import agreed, world
from conflayers_cli.utils.out_of_memory import check_room, explained, is_shortage

FULL = SkipPlan()
PREFILL_CHUNK = 256
"""Prompt tokens per forward at the most: bounds the activations of a long prompt."""
DEVICE_PREFILL_CHUNK = 1024
"""The same on a GPU, which is not busy with fewer."""
LEAST_CHUNK = 64
LARGE_CACHE = 64 * 2**20
"""Bytes from which on it is worth asking first whether there is as much memory."""
MASK_ENTRIES = 1 << 22
"""Tokens times heads per key head times positions of one forward: bounds its mask, as far as chunks
of `LEAST_CHUNK` tokens allow."""

DEVICE_MASK_ENTRIES = 1 << 26
"""The same on a GPU: 128 MiB."""

if TYPE_CHECKING:
    from conflayers_cli.engine.compile import Compilation

# Of our own code, PyTorch and triton, which builds with a C compiler that may not be there.
_NOT_FUSED = (
    *(AttributeError, KeyError, TypeError, ValueError, RuntimeError, ImportError),
    *(OSError, SubprocessError),
)

Observer = Callable[[SubLayer, int, torch.Tensor], None]


class Decoder:
    """A causal language model, ready to be decoded with.

    The model stays the transformers class it is; its attention goes through
    :mod:`conflayers_cli.kernels.attention` as long as this object uses it (see :meth:`plain` for the way back). Several
    threads may decode with one decoder, each with drafters of its own (see :mod:`conflayers_cli.engine.model_lock`).

    Attributes:
        exact_positions: longest text that can be decoded exactly, None where there is no bound.
        sub_layers: the kinds that may be left out one by one; empty: only whole layers may.
        full_passes, draft_passes: forwards so far, of the whole model and under a plan.
        rows: how many rows passes run.
        inexact: passes could not be arranged as ``exact`` asks.
        caveat: why, where it lies with quantised weights or an adapter.
        passes, runner: what runs them, and how they reach the device.
        setbacks: ways of running passes that failed here, and why.
        compilation: what came of having the forward compiled; None: nobody has asked.

    Args:
        model: a transformers causal language model in eval mode, on its device and in its dtype, or
            a `PeftModel` of one.
        exact: arrange half-precision passes so that a token's logits have the same bits in every
            one of them; without, drafts may part from vanilla at near-ties, and steps are quicker.
        recorder: records passes, to be replayed; None: CUDA graphs where the model is on a GPU.
        eager: why passes are not to be recorded; None: they may be.

    Raises:
        InputError: the model can't be decoded exactly this way; the message names the reason.
        ConfLayersError: what it gives is no numbers.
    """

    def __init__(
        self,
        model: Any,
        *,
        exact: bool = True,
        recorder: Recorder | None = None,
        eager: str | None = None,
    ) -> None:
        model = unwrapped(model)
        self.model = model
        self.config = model.config.get_text_config()
        refuse_unsupported(model, self.config)
        self.stack = LayerStack(model)
        self.depth = self.stack.depth
        self.device = device_of(model)
        self.dtype: torch.dtype = model.dtype
        self.vocabulary = int(self.config.vocab_size)
        self.rows = BatchInvariance.for_cpu(self.dtype) if exact else NOT_INVARIANT
        self.passes = ForwardRunner(model, self.config, self.stack)
        multiple = EXTENT_MULTIPLE if exact else LOOSE_EXTENT
        self.runner = Runner(self.passes, multiple)
        self.compilation: Compilation | None = None
        self.setbacks: list[str] = []
        self._spread = spread_of(model)
        self._pool: CachePool | None = None
        self._plain_attention = own_attention(model)
        self.exact_positions = exact_positions(self.config)
        self.full_passes = self.draft_passes = 0
        self._packing = Packing.earlier(model)
        self._cache_sizes: list[LayerSizes] | None = None
        # First of all, while the model's own weights are there: packed ones replace them.
        expected = self._plain_logits()
        if bool((greedy_tokens(expected) == INVALID_TOKEN).any()):
            raise ConfLayersError(
                f"{type(model).__name__} gives logits that are NaN or infinite in "
                f"{str(self.dtype).removeprefix('torch.')}, by transformers' own forward: its "
                "weights are damaged, or reach too far for the dtype (try --dtype float32)"
            )
        self._packing = Packing.of(model, self.stack.layers)
        try:
            self.sub_layers: frozenset[SubLayer] = self._checked(expected)
        except InputError:
            model.set_attn_implementation(self._plain_attention)
            raise
        self.passes.fused = self._fuse()
        wanted = self.rows.bitwise
        self.caveat: str | None = None
        quantised = method_of(model.config) is not None
        if exact and (quantised or (wanted and mixes_dtypes(model))):
            kernels = "quantised kernels" if quantised else "adapter's float32 kernels"
            promised = agreed(promise(model, self._sample_logits(), kernels=kernels))
            self.rows, self.caveat = promised.rows, promised.caveat
        elif wanted and self.device.type == "cuda":
            self.rows = probe_min_rows(self._sample_logits())
        # Of three parts or more it depends on a sum's size which two are added first.
        reordered = wanted and world().size > 2
        self.inexact = (wanted and not self.rows.bitwise) or self.caveat is not None or reordered
        self._record(multiple, recorder, eager)
        self.full_passes = self.draft_passes = 0  # the checks' own don't count

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        """A cache for ``batch`` rows of up to ``capacity`` positions.

        Raises:
            ShortageError: there is not enough memory.
        """
        needed = self._cache_bytes(capacity, batch)
        texts = f"{batch} texts" if batch > 1 else "a text"
        what = f"keys and values of {texts} of up to {capacity:,} tokens"
        rows = ", --batch-size" if batch > 1 else ""
        advice = f"lower --max-new-tokens{rows}, or give shorter prompts"
        if needed is not None and needed >= LARGE_CACHE and self._pool is None:
            check_room(needed, self.device, what, advice)
        with explained(what, advice, needed):
            if self._pool is not None:
                with self.stack.lock:
                    return self._pool.take(capacity, batch)
            cache = KVCache(self.depth, batch, capacity)
            if self._cache_sizes is not None:
                like = torch.empty(0, dtype=self.dtype, device=self.device)
                cache.allocate(self._cache_sizes, like)
            return cache

    def _cache_bytes(self, capacity: int, batch: int) -> int | None:
        """What a cache takes at the least; None before that is known."""
        if self._cache_sizes is None:
            return None
        slot = sum(heads * size for layer in self._cache_sizes for heads, size in layer)
        return slot * extent_for(capacity) * batch * self.dtype.itemsize

    def chunk_for(self, length: int) -> int:
        """Tokens per forward of a prompt of ``length`` tokens."""
        on_cpu = self.device.type == "cpu"
        entries = MASK_ENTRIES if on_cpu else DEVICE_MASK_ENTRIES
        fitting = entries // (self.passes.most_groups * extent_for(length))
        return max(LEAST_CHUNK, min(PREFILL_CHUNK if on_cpu else DEVICE_PREFILL_CHUNK, fitting))

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
            tokens: int64 ``[B, T]``; these and the others are best still in the host's memory.
            positions: int64 ``[B, T]``.
            cache: filled below the first position of every row.
            plan: the sub-layers left out.
            slots: int64 ``[B, T]``, each its token's position or beyond it; None: the positions.
            last_only: compute logits for the last token only.

        Returns:
            Logits ``[B, T, V]`` (``[B, 1, V]`` with ``last_only``) in the model's dtype.
        """
        wanted = tokens.shape[1]
        inputs = ModelInput(tokens, positions, slots)
        with self.stack.lock:
            logits = self._run(inputs, cache, plan, last_only)
        return logits[:, :wanted][:, -1:] if last_only else logits[:, :wanted]

    def _run(
        self, inputs: ModelInput, cache: KVCache, plan: SkipPlan, last_only: bool
    ) -> torch.Tensor:
        """Logits of the tokens, and of those repeated behind them."""
        self._count(plan)
        batch, wanted = inputs.tokens.shape
        least = self._least(batch, plan)
        keep = least if last_only and wanted >= least else 0
        if (width := self.runner.width_for(wanted, batch)) > wanted:
            inputs = inputs.repeated(width, positions=True)
        if width < least:
            inputs = inputs.repeated(least, positions=self.passes.by_modules)
        end = int(inputs.written.max()) + 1
        return self.runner.run(inputs, cache, ForwardSpec(plan, keep), end)

    def _least(self, batch: int, plan: SkipPlan) -> int:
        """Rows of a pass at the least. Drafts are guesses: only what decides has to have the same
        bits in every pass.
        """
        return 1 if plan else -(-self.rows.least // batch)

    def feed(
        self, token: int, position: int, cache: KVCache, plan: SkipPlan = FULL
    ) -> AsyncDecode | None:
        """Greedy passes over one row that the host need not wait for one by one.

        Args:
            token, position: what the first of them runs, and where.
            cache: of this row alone, filled below the position.
            plan: the sub-layers left out.

        Returns:
            None where passes are not recorded: then there is nothing to gain.
        """
        runner = self.runner
        if not (isinstance(runner, GraphRunner) and runner.records and cache.place.number):
            return None
        rows, places = self._least(1, plan), self.passes.by_modules
        count = partial(self._count, plan)
        return AsyncDecode(runner, cache, ForwardSpec(plan), rows, places, token, position, count)

    def _count(self, plan: SkipPlan) -> None:
        if plan:
            self.draft_passes += 1
        else:
            self.full_passes += 1

    def prefill(
        self, tokens: torch.Tensor, cache: KVCache, *, start: int = 0, plan: SkipPlan = FULL
    ) -> torch.Tensor:
        """Run a prompt, in chunks, on top of ``start`` filled positions.

        Where the memory does not suffice for a chunk, smaller ones are tried.

        Args:
            tokens: int64 ``[B, T]``, T ≥ 1, all rows of one length.

        Returns:
            Logits of the last token, ``[B, 1, V]``.
        """
        logits, begin = torch.empty(0), 0
        size = self.chunk_for(start + tokens.shape[1])
        while begin < tokens.shape[1]:
            chunk = tokens[:, begin : begin + size]
            positions = torch.arange(start + begin, start + begin + chunk.shape[1])
            positions = positions.expand(chunk.shape)
            try:
                logits = self.forward(chunk, positions, cache, plan, last_only=True)
            except (RuntimeError, MemoryError) as error:
                # Several processes would have to do so together.
                if size <= LEAST_CHUNK or world().size > 1 or not is_shortage(error):
                    raise
                size //= 2
            else:
                begin += size
        return logits

    @contextmanager
    def observing(self, observer: Observer) -> Iterator[None]:
        """Within: every sub-layer's output ``[B, T, d]``, before the residual add, is shown.

        Sub-layers that a plan leaves out are not shown.
        """

        def hook(kind: SubLayer, layer: int) -> Callable[..., None]:
            def show(module: nn.Module, args: Any, output: Any) -> None:
                states = output[0] if isinstance(output, tuple) else output
                observer(kind, layer, agreed(states.to(self.device)))

            return show

        kinds: tuple[SubLayer, ...] = ("attention", "mlp")
        with self.stack.watching():
            handles = [
                module.register_forward_hook(hook(kind, i))
                for i in range(self.depth)
                for kind in kinds
                if (module := self.stack.output_of(kind, i)) is not None
            ]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    @property
    def packed(self) -> bool:
        """Whether packed weights run in place of the model's own (see :mod:`conflayers_cli.kernels.packed_linear`)."""
        return self._packing is not None

    @contextmanager
    def plain(self) -> Iterator[Any]:
        """Within: the transformers model with its own attention, as ``generate`` would find it."""
        with self.stack.lock:
            self.model.set_attn_implementation(self._plain_attention)
            try:
                with self._packing.unpacked() if self._packing else nullcontext():
                    yield self.model
            finally:
                self.model.set_attn_implementation(attention.NAME)

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
        if not self._spread:  # else every layer allocates where it is
            self._cache_sizes = cache.sizes
        return self._check_stubs(tokens, positions)

    def _fuse(self) -> FusedForward | None:
        """The first way of running passes fused that gives the modules' logits; None: none does."""
        if getattr(self.config, "model_type", None) not in FAMILIES or self._spread:
            return None
        ways: list[tuple[type[FusedForward], bool]] = [(FusedForward, False)]
        if self.passes.flash:
            ways.insert(0, (FusedForward, True))
        if KernelForward.why_not(self.device, self.dtype, self.config) is None:
            ways.insert(0, (KernelForward, self.passes.flash))
        errors: tuple[type[Exception], ...] = (*_NOT_FUSED, *triton_errors())
        for kind, self.passes.flash in ways:
            try:
                forward = kind(self.model, self.stack.layers, self.config)
                if self.agrees(forward):
                    return forward
            except errors as error:
                self.setbacks.append(f"{kind.__name__}: {first_line(error)}")
        return None

    def agrees(self, forward: FusedForward) -> bool:
        """Whether a fused forward gives the logits that the modules give, but for rounding.

        Raises:
            whatever the forward raises.
        """
        tokens, positions = self._sample()
        cache = self.new_cache(tokens.shape[1])
        with self.stack.watching():
            expected = self.forward(tokens, positions, cache)
        before, self.passes.fused = self.passes.fused, forward
        self.runner.forget()
        try:
            return self._close(self.forward(tokens, positions, cache), expected)
        finally:
            self.passes.fused = before
            self.runner.forget()

    def _record(self, multiple: int, recorder: Recorder | None, eager: str | None) -> None:
        """Have passes recorded from now on where that is possible."""
        if recorder is None and self.device.type == "cuda":
            recorder = CudaRecorder(self.device)
        if recorder is None:
            eager = f"there are no graphs on {self.device.type}"
        elif self._spread:
            eager = f"the model is spread ({self._spread})"
        if recorder is None or eager is not None or self._cache_sizes is None:
            self.runner.reason = eager or "what keys and values are like is not known"
            return
        self.runner = GraphRunner(self.passes, multiple, recorder)
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        forget, lock = self.runner.forget, self.stack.lock
        self._pool = CachePool(self.depth, self._cache_sizes, like, forget, lock)

    def _sample_logits(self) -> Logits:
        """Runs the tokens of one random text, for `probe_min_rows`.

        On a GPU across the end of the first extent: how far keys are read may count, too.
        """
        length = max(PROBED_WIDTHS) + PROBED_TOKENS
        room = self.exact_positions or getattr(self.config, "max_position_embeddings", None) or 0
        start = EXTENT_MULTIPLE - PROBED_TOKENS // 2 if self.device.type == "cuda" else 0
        start = start if start + length <= room else 0
        generator = torch.Generator().manual_seed(1)
        text = torch.randint(self.vocabulary, (1, start + length), generator=generator)
        tokens, positions = text[:, start:], torch.arange(start, start + length)[None]
        cache = self.new_cache(start + length)
        if start:
            self.prefill(text[:, :start], cache)

        def logits(least: int, place: int, width: int) -> torch.Tensor:
            self.rows = BatchInvariance(least, bitwise=True)
            here = slice(place, place + width)
            return self.forward(tokens[:, here], positions[:, here], cache)[0]

        return logits

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
        few per cent of that, and more at a token here and there, hence the median. So do layers
        that round their inputs to int8.
        """
        exact = self.dtype == torch.float32 and not rounds_inputs(self.model)
        share = 1e-2 if exact else 0.3
        # Minus infinity is how models rule tokens out.
        out = one.isneginf() & other.isneginf()
        one, other = one.masked_fill(out, 0.0), other.masked_fill(out, 0.0)
        difference = (one.float() - other.float()).pow(2).mean(-1).sqrt()
        spread = other.float().std(-1).clamp(min=1e-6)
        return bool((difference / spread).median() <= share)
