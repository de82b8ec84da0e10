"""A model is attached to the engine: its attention becomes the engine's, its passes run on the
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
from conflayers_cli.kernels.kv_cache import KVCache, LayerSizes
from conflayers_cli.kernels.packed_linear import Packing
from conflayers_cli.models.device import device_of, spread_of
from conflayers_cli.models.peft_modules import unwrapped
from conflayers_cli.models.quantization import rounds_inputs
from conflayers_cli.models.support import refuse_unsupported
from conflayers_cli.skip_plan import SkipPlan

SAMPLE = 16
"""Tokens of the text that ways of running a model are compared by."""

BOTH: frozenset[SubLayer] = frozenset(("attention", "mlp"))
"""The kinds of sub-layers."""

# What a model's forward raises where it takes no such cache, masks or positions.
_FORWARD_ERRORS = (TypeError, ValueError, KeyError, AttributeError, RuntimeError)


@dataclass(frozen=True, eq=False)
class Attachment:
    """A model that runs on the engine's cache and masks.

    Attributes:
        model: the transformers model; of a `PeftModel` the one that runs behind it.
        config: its text config.
        stack: its decoder layers.
        passes: what runs one pass.
        runner: launches passes one by one.
        plain_attention: the name of the attention that transformers would use.
        spread: how the model is spread over several devices; None: it is on one.
        expected: logits ``[1, SAMPLE, V]`` of :func:`sample` by transformers' own forward.
        cache_sizes: of the layers' keys and values; None: each layer allocates where it is.
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
    cache_sizes: list[LayerSizes] | None
    sub_layers: frozenset[SubLayer]

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        """A cache for ``batch`` sequences of up to ``capacity`` positions."""
        cache = KVCache(self.stack.depth, batch, capacity)
        if self.cache_sizes is not None:
            cache.allocate(self.cache_sizes, self.like)
        return cache

    @property
    def like(self) -> torch.Tensor:
        """An empty tensor of the model's dtype, on its device."""
        return torch.empty(0, dtype=self.model.dtype, device=self.passes.device)

    def sample_logits(self) -> torch.Tensor:
        """Logits ``[1, SAMPLE, V]`` of :func:`sample` as passes run now."""
        tokens, positions = sample(self.config.vocab_size)
        return forward(self.runner, tokens, positions, self.new_cache(SAMPLE))


def attach(model: Any, multiple: int) -> Attachment:
    """Have a model's attention go through the engine, and check that passes give its own logits.

    Args:
        model: a transformers causal language model in eval mode, or a `PeftModel` of one.
        multiple: keys are read in extents of a multiple of this many slots.

    Raises:
        InputError: the model can't be decoded exactly this way; the message names the reason.
        ConfLayersError: its logits are NaN or infinite.
    """
    model = unwrapped(model)
    config = model.config.get_text_config()
    refuse_unsupported(model, config)
    stack = LayerStack(model)
    passes = ForwardRunner(model, config, stack)
    runner = Runner(passes, multiple)
    plain_attention = attention.own_attention(model)
    spread = spread_of(model)
    try:
        expected = plain_logits(model, stack, plain_attention)
        check_numbers(model, expected)
        cache = KVCache(stack.depth, 1, SAMPLE)
        check_logits(model, runner, cache, expected)
        return Attachment(
            model=model,
            config=config,
            stack=stack,
            passes=passes,
            runner=runner,
            plain_attention=plain_attention,
            spread=spread,
            expected=expected,
            cache_sizes=None if spread else cache.sizes,
            sub_layers=separable(model, stack, runner),
        )
    except ConfLayersError:
        model.set_attn_implementation(plain_attention)
        raise


def sample(vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and positions ``[1, SAMPLE]`` to compare ways of running a model by, int64.

    From all over the vocabulary: runs of special tokens are chaotic in bfloat16.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(int(vocabulary), (1, SAMPLE), generator=generator)
    return tokens, torch.arange(SAMPLE)[None]


@contextmanager
def plain_model(
    model: Any, stack: LayerStack, plain_attention: str, packing: Packing | None
) -> Iterator[Any]:
    """Within: the transformers model with its own attention and weights; behind it, the engine's.

    Args:
        model: the transformers model.
        stack: its layers; nobody else runs passes meanwhile.
        plain_attention: the name of its attention.
        packing: what was done to its weights, None: nothing.
    """
    with stack.lock:
        model.set_attn_implementation(plain_attention)
        try:
            with packing.unpacked() if packing else nullcontext():
                yield model
        finally:
            model.set_attn_implementation(attention.NAME)


def plain_logits(model: Any, stack: LayerStack, plain_attention: str) -> torch.Tensor:
    """Logits ``[1, SAMPLE, V]`` of :func:`sample` by transformers' own forward.

    The form of what modules return is learnt along the way.
    """
    tokens, _ = sample(model.config.get_text_config().vocab_size)
    plain = plain_model(model, stack, plain_attention, Packing.earlier(model))
    with torch.inference_mode(), plain, stack.learning_shapes():
        logits: torch.Tensor = model(input_ids=tokens.to(device_of(model)), use_cache=False).logits
    return logits


def check_numbers(model: Any, logits: torch.Tensor) -> None:
    """Raise ConfLayersError where logits of the model's own forward are NaN or infinite."""
    if bool((greedy_tokens(logits) == INVALID_TOKEN).any()):
        raise ConfLayersError(
            f"{type(model).__name__} gives logits that are NaN or infinite in "
            f"{str(model.dtype).removeprefix('torch.')}, by transformers' own forward: its "
            "weights are damaged, or reach too far for the dtype (try dtype float32)",
            names=("dtype float32",),
        )


def check_logits(model: Any, runner: Runner, cache: KVCache, expected: torch.Tensor) -> None:
    """Compare passes over the sample, in two parts, with the logits that transformers gives.

    Args:
        model: the transformers model.
        runner: runs the passes.
        cache: empty, for one sequence of `SAMPLE` tokens; filled here.
        expected: logits ``[1, SAMPLE, V]``.

    Raises:
        InputError: the engine's cache and masks don't reproduce the model's own logits.
    """
    tokens, positions = sample(model.config.get_text_config().vocab_size)
    half, name = SAMPLE // 2, type(model).__name__
    try:
        forward(runner, tokens[:, :half], positions[:, :half], cache, last_only=True)
        logits = forward(runner, tokens[:, half:], positions[:, half:], cache)
    except _FORWARD_ERRORS as error:
        raise InputError(
            f"{name} does not run on this engine's cache and masks: {error}"
        ) from error
    if not similar(model, logits, expected[:, half:]):
        raise InputError(
            f"{name} is refused: run step by step with explicit masks and positions it does "
            "not give its own logits, so output could not be guaranteed to be the model's own"
        )


def separable(model: Any, stack: LayerStack, runner: Runner) -> frozenset[SubLayer]:
    """Both kinds of sub-layers where stubs of the two equal a layer left out, else none: then only
    whole layers may be left out."""
    if stack.attention_name is None or stack.mlp_name is None:
        return frozenset()
    tokens, positions = sample(model.config.get_text_config().vocab_size)
    middle = stack.depth // 2
    caches = [KVCache(stack.depth, 1, SAMPLE) for _ in range(2)]
    skipped = forward(runner, tokens, positions, caches[0], SkipPlan.of_layers([middle]))
    try:
        with stack.stubbed(middle):
            stubbed = forward(runner, tokens, positions, caches[1])
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return frozenset()
    return BOTH if similar(model, stubbed, skipped) else frozenset()


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
    with torch.inference_mode(), runner.passes.lock:
        return runner.forward(
            ModelInput(tokens, positions),
            cache,
            plan or SkipPlan(),
            min_width=min_width,
            last_only=last_only,
        )


def similar(model: Any, one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether logits ``[1, T, V]`` of a model agree but for rounding, at most of the positions.

    Wrong masks or positions move logits by as much as they vary; half-precision rounding by a few
    per cent of that, and more at a token here and there, hence the median. So do layers that round
    their inputs to int8.
    """
    exact = model.dtype == torch.float32 and not rounds_inputs(model)
    share = 1e-2 if exact else 0.3
    # Minus infinity is how models rule tokens out.
    out = one.isneginf() & other.isneginf()
    one, other = one.masked_fill(out, 0.0), other.masked_fill(out, 0.0)
    difference = (one.float() - other.float()).pow(2).mean(-1).sqrt()
    spread = other.float().std(-1).clamp(min=1e-6)
    return bool((difference / spread).median() <= share)
