"""A Hugging Face decoder, run in full or under a skip plan, on the engine's own cache and masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from conflayers_cli.engine.argmax import greedy_tokens, read_greedy
from conflayers_cli.engine.attach import attach, plain_model
from conflayers_cli.engine.batch_invariance import (
    NOT_INVARIANT,
    Exactness,
    find_exactness,
    is_inexact,
)
from conflayers_cli.engine.cuda_graphs import Recorder
from conflayers_cli.engine.forward import AnyForward, ModelInput
from conflayers_cli.engine.graph_runner import DRAFT_KV_BLOCK, AsyncDecode, GraphRunner
from conflayers_cli.engine.kernel_choice import choose_kernels, gives_modules_logits
from conflayers_cli.engine.layer_skipping import SubLayer
from conflayers_cli.engine.recording import record
from conflayers_cli.errors import InputError
from conflayers_cli.kernels.kv_cache import KV_BLOCK, KVCache, round_up_kv_len
from conflayers_cli.kernels.native_choice import NativeChoice, Resume
from conflayers_cli.kernels.native_forward import NativeForward
from conflayers_cli.models.support import exact_positions
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.utils.distributed import broadcast_rank0, world
from conflayers_cli.utils.out_of_memory import check_free_memory, explain_oom, is_out_of_memory

FULL = SkipPlan()
PREFILL_CHUNK = 256
"""Prompt tokens per forward at most: bounds the activations of a long prompt."""
DEVICE_PREFILL_CHUNK = 1024
"""The same on a GPU, which is not busy with fewer."""
MIN_CHUNK = 64
LARGE_CACHE = 64 * 2**20
"""Bytes from which on free memory is checked before allocating."""
MASK_ENTRIES = 1 << 22
"""Tokens times heads per key head times positions of one forward: bounds its mask, as far as chunks
of `MIN_CHUNK` tokens allow."""
DEVICE_MASK_ENTRIES = 1 << 26
"""The same on a GPU: 128 MiB."""

if TYPE_CHECKING:
    from conflayers_cli.kernels.compiled_forward import CompileResult

Observer = Callable[[SubLayer, int, torch.Tensor], None]


class Decoder:
    """A causal language model, ready for decoding.

    Its attention goes through :mod:`conflayers_cli.kernels.attention` (see :meth:`plain` for the
    way back). Several threads may use one decoder, each with proposers of its own.

    Args:
        model: a transformers causal language model in eval mode, on its device and in its dtype, or
            a `PeftModel` of one.
        exact: arrange half-precision passes so that a token's logits have the same bits in every
            one of them; without, drafts may part from vanilla at near-ties, and steps are quicker.
        recorder: records passes, to be replayed; None: CUDA graphs where the model is on a GPU.
        eager: why passes are not to be recorded; None: they may be.

    Attributes:
        exact_positions: longest text that can be decoded exactly, None where there is no bound.
        sub_layers: the kinds that may be left out one by one; empty: only whole layers may.
        full_passes, draft_passes: forwards so far, of the whole model and under a plan.
        invariance: how many tokens passes run at least, and whether that keeps bits.
        inexact: passes could not be arranged as ``exact`` asks.
        exactness_note: why, where it lies with quantised weights or an adapter.
        passes, runner: what runs them, and how they are launched.
        disabled_paths: ways of running passes that failed here, and why.
        no_native: why the native library's kernels are not used; empty: they are.
        compilation: the result of compiling the forward; None: not asked for.

    Raises:
        InputError: the model can't be decoded exactly this way; the message names the reason.
        ConfLayersError: its logits are NaN or infinite.
    """

    def __init__(
        self,
        model: Any,
        *,
        exact: bool = True,
        recorder: Recorder | None = None,
        eager: str | None = None,
    ) -> None:
        attached = attach(model, KV_BLOCK if exact else DRAFT_KV_BLOCK)
        kernels = choose_kernels(attached, recorded=recorder is not None)
        attached.passes.fused, attached.passes.flash = kernels.fused, kernels.flash
        exactness = find_exactness(attached) if exact else Exactness(NOT_INVARIANT)
        runner, pool = record(attached, recorder, eager)

        self.model, self.config = attached.model, attached.config
        self.stack, self.passes, self.runner = attached.stack, attached.passes, runner
        self.depth = self.stack.depth
        self.device = self.passes.device
        self.dtype: torch.dtype = self.model.dtype
        self.vocabulary = int(self.config.vocab_size)
        self.exact_positions = exact_positions(self.config)
        self.sub_layers = attached.sub_layers
        self.disabled_paths, self.no_native = kernels.disabled_paths, kernels.no_native
        self.invariance, self.exactness_note = exactness.invariance, exactness.note
        self.inexact = exact and is_inexact(exactness, self.dtype)
        self.compilation: CompileResult | None = None
        self.full_passes = self.draft_passes = 0
        self._attached, self._packing, self._pool = attached, kernels.packing, pool

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        """A cache for ``batch`` sequences of up to ``capacity`` positions.

        Raises:
            ShortageError: there is not enough memory.
        """
        layout, needed = self._attached.kv_layout, None
        if layout is not None:
            slots = round_up_kv_len(capacity) * batch
            needed = layout.elements_per_slot * slots * self.dtype.itemsize
        texts = f"{batch} texts" if batch > 1 else "a text"
        what = f"keys and values of {texts} of up to {capacity:,} tokens"
        rows = ", batch_size" if batch > 1 else ""
        advice = f"lower max_new_tokens{rows}, or give shorter prompts"
        names = ("max_new_tokens", "batch_size")
        if needed is not None and needed >= LARGE_CACHE and self._pool is None:
            check_free_memory(needed, self.device, what, advice, names)
        with explain_oom(what, advice, needed, names):
            if self._pool is not None:
                with self.stack.lock:
                    return self._pool.take(capacity, batch)
            return self._attached.new_cache(capacity, batch)

    @property
    def kv_bytes_per_slot(self) -> int:
        """Bytes of one sequence's keys and values at one position; 0: not known."""
        layout = self._attached.kv_layout
        return layout.elements_per_slot * self.dtype.itemsize if layout else 0

    def chunk_for(self, length: int) -> int:
        """Tokens per forward of a prompt of ``length`` tokens."""
        on_cpu = self.device.type == "cpu"
        entries = MASK_ENTRIES if on_cpu else DEVICE_MASK_ENTRIES
        fitting = entries // (self.passes.max_groups * round_up_kv_len(length))
        return max(MIN_CHUNK, min(PREFILL_CHUNK if on_cpu else DEVICE_PREFILL_CHUNK, fitting))

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
        and its own slot. So alternatives at one position (a tree) can run in one pass: one of them
        in the slot of that position, the others in slots behind all that any token sees.

        Args:
            tokens, positions: int64 ``[B, T]``; best on the CPU, as the slots.
            cache: filled below the first position of every sequence.
            plan: the sub-layers left out.
            slots: int64 ``[B, T]``, each its token's position or beyond it; None: the positions.
            last_only: compute logits for the last token only.

        Returns:
            Logits ``[B, T, V]`` (``[B, 1, V]`` with ``last_only``) in the model's dtype.
        """
        inputs, width = ModelInput(tokens, positions, slots), self._min_width(len(tokens), plan)
        with self.stack.lock:
            self._count(plan)
            return self.runner.forward(inputs, cache, plan, min_width=width, last_only=last_only)

    @torch.inference_mode()
    def choose(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cache: KVCache,
        plan: SkipPlan,
        *,
        slots: torch.Tensor,
        top: int = 0,
        resume: Resume | None = None,
    ) -> NativeChoice | None:
        """What the logits of a pass say (see `forward` and `NativeForward.choose`), in a fraction
        of their memory; None where native kernels don't run passes."""
        native = self.passes.fused
        with self.stack.lock:
            if self.passes.watched or not isinstance(native, NativeForward):
                return None
            self._count(plan)
            int4 = plan.weights is not None and self.stack.int4.reason is None
            return native.choose(
                tokens, positions, slots, cache, plan, 0, int4=int4, top=top, resume=resume
            )

    def greedy(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cache: KVCache,
        plan: SkipPlan = FULL,
        *,
        slots: torch.Tensor | None = None,
    ) -> list[list[int]]:
        """The first of the most likely tokens behind each token of a pass (see `forward`), by
        sequence; `INVALID_TOKEN` where logits are not finite.

        Native kernels choose where they compute: no logits are written.
        """
        given = positions if slots is None else slots
        choice = self.choose(tokens, positions, cache, plan, slots=given)
        if choice is not None:
            chosen = choice.tokens
        else:
            chosen = greedy_tokens(self.forward(tokens, positions, cache, plan, slots=slots))
        found: list[list[int]] = chosen.tolist()
        return found

    def greedy_with_confidence(
        self, tokens: torch.Tensor, positions: torch.Tensor, cache: KVCache, plan: SkipPlan
    ) -> torch.Tensor:
        """As `argmax.read_greedy` of the logits of a pass, likewise: float64 ``[2, B, T]``."""
        two = min(2, self.vocabulary)
        choice = self.choose(tokens, positions, cache, plan, slots=positions, top=two)
        if choice is None:
            return read_greedy(self.forward(tokens, positions, cache, plan))
        best, second = choice.logits.double(), choice.top_logits[..., -1].double()
        return torch.stack([choice.tokens.double(), torch.sigmoid(best - second) + (best - best)])

    def _min_width(self, batch: int, plan: SkipPlan) -> int:
        """Tokens per sequence that a pass runs at least; a draft's bits don't matter."""
        return 1 if plan else self.invariance.min_width(batch)

    def decode_ahead(
        self, token: int, position: int, cache: KVCache, plan: SkipPlan = FULL
    ) -> AsyncDecode | None:
        """Greedy passes over one sequence, the first over ``token``, launched before earlier ones
        are read; None where passes are not recorded: then there is nothing to gain."""
        runner = self.runner
        if not (isinstance(runner, GraphRunner) and runner.records and cache.buffer.number):
            return None
        return AsyncDecode(
            runner,
            cache,
            plan,
            width=self._min_width(1, plan),
            token=token,
            position=position,
            on_launch=partial(self._count, plan),
        )

    def _count(self, plan: SkipPlan) -> None:
        if plan:
            self.draft_passes += 1
        else:
            self.full_passes += 1

    def prefill(
        self, tokens: torch.Tensor, cache: KVCache, *, start: int = 0, plan: SkipPlan = FULL
    ) -> torch.Tensor:
        """Run a prompt, in chunks, after ``start`` filled positions.

        Where a chunk runs out of memory, smaller ones are tried.

        Returns:
            Logits ``[B, 1, V]`` of the last of the tokens ``[B, T]``.
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
                # Several ranks would have to do so together.
                if size <= MIN_CHUNK or world().size > 1 or not is_out_of_memory(error):
                    raise
                size //= 2
            else:
                begin += size
        return logits

    @contextmanager
    def observing(self, observer: Observer) -> Iterator[None]:
        """Within: the observer gets the output ``[B, T, d]``, before the residual add, of every
        sub-layer that runs."""

        def hook(kind: SubLayer, layer: int) -> Callable[..., None]:
            def show(module: nn.Module, args: Any, output: Any) -> None:
                states = output[0] if isinstance(output, tuple) else output
                observer(kind, layer, broadcast_rank0(states.to(self.device)))

            return show

        kinds: tuple[SubLayer, ...] = ("attention", "mlp")
        with self.stack.watching():
            handles = [
                module.register_forward_hook(hook(kind, i))
                for i in range(self.depth)
                for kind in kinds
                if (module := self.stack.output_module(kind, i)) is not None
            ]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    @property
    def kernels(self) -> str:
        """What runs passes: "modules", or a forward's name; the native one's unit and threads."""
        fused = self.passes.fused
        if isinstance(fused, NativeForward):
            return f"native {fused.unit}, {fused.num_threads} threads"
        return "modules" if fused is None else type(fused).__name__

    @property
    def packed(self) -> bool:
        """Whether the weights are packed (see :mod:`conflayers_cli.kernels.packed_linear`)."""
        return self._packing is not None

    def plain(self) -> AbstractContextManager[Any]:
        """Within: the transformers model with its own attention, as ``generate`` would find it."""
        plain_attention = self._attached.plain_attention
        return plain_model(self.model, self.stack, plain_attention, self._packing)

    def agrees(self, fused: AnyForward) -> bool:
        """Whether a fused forward gives the modules' logits (see `gives_modules_logits`)."""
        return gives_modules_logits(self._attached, fused, flash=self.passes.flash)
