"""Attaching a model to the engine: its attention becomes the engine's, its passes run on the
engine's cache and masks, and are compared with the logits that transformers gives by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from conflayers_cli.engine.argmax import INVALID_TOKEN, greedy_tokens
from conflayers_cli.engine.forward import ForwardRunner, ModelInput
from conflayers_cli.engine.graph_runner import Runner
from conflayers_cli.engine.layer_skipping import LayerStack, SubLayer
from conflayers_cli.errors import ConfLayersError, InputError
from conflayers_cli.kernels import attention
from conflayers_cli.kernels.kv_cache import KVCache, KVLayout
from conflayers_cli.kernels.packed_linear import Packing
from conflayers_cli.models.device import describe_spread, input_device
from conflayers_cli.models.peft_modules import unwrap_peft
from conflayers_cli.models.quantization import rounds_inputs
from conflayers_cli.models.support import refuse_unsupported
from conflayers_cli.skip_plan import SkipPlan

SAMPLE_TOKENS = 16
"""Tokens that ways of running a model are compared on."""

BOTH: frozenset[SubLayer] = frozenset(("attention", "mlp"))
"""The kinds of sub-layers."""

FORWARD_ERRORS = (TypeError, ValueError, KeyError, AttributeError, RuntimeError)
"""Raised by forwards that don't support a cache, masks, positions, or weights."""


@dataclass(frozen=True, eq=False)
class Attachment:
    """A model that runs on the engine's cache and masks.

    Attributes:
        model: the transformers model; of a `PeftModel` the one that runs behind it.
        config: its text config.
        stack: its decoder layers.
        passes: runs one pass.
        runner: launches passes one by one.
        plain_attention: the name of the attention that transformers would use.
        spread: how the model is spread over several devices; None: it is on one.
        expected: logits ``[1, SAMPLE_TOKENS, V]`` of :func:`sample_input` by transformers' forward.
        kv_layout: of its caches; None: each layer allocates on its own device.
        sub_layers: the kinds that may be left out one by one; empty: only whole layers may.
    """

    model: Any
    config: Any
    stack: LayerStack
    passes: ForwardRunner
    runner: Runner
    plain_attention: str
    spread: str | None
    expected: torch.Tensor
    kv_layout: KVLayout | None
    sub_layers: frozenset[SubLayer]

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        """A cache for ``batch`` sequences of up to ``capacity`` positions."""
        cache = KVCache(self.stack.depth, batch, capacity)
        if self.kv_layout is not None:
            cache.allocate(self.kv_layout)
        return cache

    def sample_logits(self) -> torch.Tensor:
        """Logits ``[1, SAMPLE_TOKENS, V]`` of :func:`sample_input` as passes run now."""
        tokens, positions = sample_input(self.model)
        return forward(self.runner, tokens, positions, self.new_cache(SAMPLE_TOKENS))


def attach(model: Any, multiple: int) -> Attachment:
    """Have a model's attention go through the engine, and check that passes give its own logits.

    Args:
        model: as for `Decoder`.
        multiple: attention reads a multiple of this many slots.

    Raises:
        InputError: the model can't be decoded exactly this way; the message names the reason.
        ConfLayersError: its logits are NaN or infinite.
    """
    model = unwrap_peft(model)
    config = model.config.get_text_config()
    refuse_unsupported(model, config)
    stack = LayerStack(model)
    passes = ForwardRunner(model, config, stack)
    runner = Runner(passes, multiple)
    plain_attention = attention.original_attention(model)
    spread = describe_spread(model)
    try:
        expected = plain_logits(model, stack, plain_attention)
        layout = check_logits(model, stack, runner, expected)
        return Attachment(
            model=model,
            config=config,
            stack=stack,
            passes=passes,
            runner=runner,
            plain_attention=plain_attention,
            spread=spread,
            expected=expected,
            kv_layout=None if spread else layout,
            sub_layers=find_sub_layers(model, stack, runner),
        )
    except ConfLayersError:
        model.set_attn_implementation(plain_attention)
        raise


def sample_input(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and positions ``[1, SAMPLE_TOKENS]`` to compare ways of running a model on, int64.

    From all over the vocabulary: runs of special tokens are chaotic in bfloat16.
    """
    vocabulary = int(model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (1, SAMPLE_TOKENS), generator=generator)
    return tokens, torch.arange(SAMPLE_TOKENS)[None]


@contextmanager
def plain_model(
    model: Any, stack: LayerStack, plain_attention: str, packing: Packing | None
) -> Iterator[Any]:
    """Within: the transformers model with its own attention (by name) and unpacked weights, and no
    passes of other threads; after it, the engine's attention."""
    with stack.lock:
        model.set_attn_implementation(plain_attention)
        try:
            with packing.unpacked() if packing else nullcontext():
                yield model
        finally:
            model.set_attn_implementation(attention.NAME)


def plain_logits(model: Any, stack: LayerStack, plain_attention: str) -> torch.Tensor:
    """Logits ``[1, SAMPLE_TOKENS, V]`` of :func:`sample_input` by transformers' own forward.

    Along the way the stack learns what modules return.

    Raises:
        ConfLayersError: the logits are NaN or infinite.
    """
    tokens = sample_input(model)[0].to(input_device(model))
    plain = plain_model(model, stack, plain_attention, Packing.existing(model))
    with torch.inference_mode(), plain, stack.recording_arity():
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    if bool((greedy_tokens(logits) == INVALID_TOKEN).any()):
        raise ConfLayersError(
            f"{type(model).__name__} gives logits that are NaN or infinite in "
            f"{str(model.dtype).removeprefix('torch.')}, by transformers' own forward: its "
            "weights are damaged, or reach too far for the dtype (try dtype float32)",
            names=("dtype float32",),
        )
    return logits


def check_logits(
    model: Any, stack: LayerStack, runner: Runner, expected: torch.Tensor
) -> KVLayout | None:
    """Compare passes over the sample, in two parts, with transformers' logits ``expected``; returns
    the layout of their cache.

    Raises:
        InputError: the engine's cache and masks don't reproduce the model's own logits.
    """
    tokens, positions = sample_input(model)
    half, name = SAMPLE_TOKENS // 2, type(model).__name__
    cache = KVCache(stack.depth, 1, SAMPLE_TOKENS)
    try:
        forward(runner, tokens[:, :half], positions[:, :half], cache, last_only=True)
        logits = forward(runner, tokens[:, half:], positions[:, half:], cache)
    except FORWARD_ERRORS as error:
        raise InputError(
            f"{name} does not run on this engine's cache and masks: {error}"
        ) from error
    if not logits_match(model, logits, expected[:, half:]):
        raise InputError(
            f"{name} is refused: run step by step with explicit masks and positions it does "
            "not give its own logits, so output could not be guaranteed to be the model's own"
        )
    return cache.layout


def find_sub_layers(model: Any, stack: LayerStack, runner: Runner) -> frozenset[SubLayer]:
    """The sub-layers that may be left out one by one: both kinds where stubs of the two equal a
    layer left out, else none."""
    if None in stack.names.values():
        return frozenset()
    tokens, positions = sample_input(model)
    middle = stack.depth // 2
    caches = [KVCache(stack.depth, 1, SAMPLE_TOKENS) for _ in range(2)]
    skipped = forward(runner, tokens, positions, caches[0], SkipPlan.of_layers([middle]))
    try:
        with stack.stubbed(middle):
            stubbed = forward(runner, tokens, positions, caches[1])
    except FORWARD_ERRORS:
        return frozenset()
    return BOTH if logits_match(model, stubbed, skipped) else frozenset()


def forward(
    runner: Runner,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    cache: KVCache,
    plan: SkipPlan | None = None,
    *,
    min_width: int = 1,
    last_only: bool = False,
) -> torch.Tensor:
    """One pass with the model locked, in inference mode: see `Runner.forward`."""
    inputs, plan = ModelInput(tokens, positions), plan or SkipPlan()
    with torch.inference_mode(), runner.passes.lock:
        return runner.forward(inputs, cache, plan, min_width=min_width, last_only=last_only)


def logits_match(model: Any, one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether logits ``[1, T, V]`` of a model agree but for rounding, at most of the positions.

    Wrong masks or positions move logits by as much as they vary; half-precision rounding by a few
    per cent of that, and more at single tokens, hence the median. So do layers that round their
    inputs to int8.
    """
    exact = model.dtype == torch.float32 and not rounds_inputs(model)
    tolerance = 1e-2 if exact else 0.3
    # Minus infinity is how models rule tokens out.
    ruled_out = one.isneginf() & other.isneginf()
    one, other = one.masked_fill(ruled_out, 0.0), other.masked_fill(ruled_out, 0.0)
    difference = (one.float() - other.float()).pow(2).mean(-1).sqrt()
    spread = other.float().std(-1).clamp(min=1e-6)
    return bool((difference / spread).median() <= tolerance)
