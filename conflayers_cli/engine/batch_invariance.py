"""Batch invariance: a token's logits have the same bits whatever tokens run beside it.

Kernels are chosen by the number of rows (tokens of all sequences together), and may round
differently. On a CPU it is known how many rows a pass has to run for that not to show; on a GPU,
and for quantised weights, it is found by trying.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from conflayers_cli.engine.attach import Attachment, forward
from conflayers_cli.engine.graph_runner import clock as device_clock
from conflayers_cli.kernels.kv_cache import KV_BLOCK
from conflayers_cli.kernels.native_forward import NativeForward
from conflayers_cli.models.peft_modules import mixes_dtypes
from conflayers_cli.models.quantization import quantization_method, rounds_inputs
from conflayers_cli.models.support import exact_positions
from conflayers_cli.utils.distributed import broadcast_rank0, world

CANDIDATES = (1, 2, 4, 8, 16, 32, 64)
"""Minimum numbers of rows tried, the cheapest first."""
PROBED_WIDTHS = (2, 3, 4, 5, 6, 8, 9, 12, 16, 17, 24, 26, 32, 48, 64)
"""Widths of the passes that are compared with passes of one token, those of recorded passes (see
`.graph_runner.WIDTHS`) among them."""
PROBED_TOKENS = 20
"""Tokens that are run one by one to compare with."""
MAX_SLOWDOWN = 1.25
"""A pass of one token may take this many times its time for its bits to be those of wider ones."""
_ROUNDS = 7

Logits = Callable[[int, int, int], torch.Tensor]
"""(minimum number of rows, first token, width) → logits ``[width, V]`` of one text's tokens."""


@dataclass(frozen=True)
class BatchInvariance:
    """How many rows a pass runs at least.

    On a CPU only a single half-precision row gets other bits than the same row among several; so a
    pass of one token runs it twice, which costs the same. On a GPU the number is found by trying
    (:func:`probe_min_rows`). Passes up to ``min_rows`` tokens then all have one shape.

    Attributes:
        min_rows: how many.
        bitwise: whether a token's logits have the same bits in every pass.
        any_slot: whether they also have them in any slot of the cache.
    """

    min_rows: int
    bitwise: bool
    any_slot: bool = False

    @property
    def depends_on_slot(self) -> bool:
        """Whether bits matter, and a token in another slot than its position's may have others."""
        return self.bitwise and not self.any_slot

    def min_width(self, batch: int) -> int:
        """Tokens per sequence that a pass over a batch runs at least."""
        return -(-self.min_rows // batch)

    @classmethod
    def for_cpu(cls, dtype: torch.dtype) -> BatchInvariance:
        return NOT_INVARIANT if dtype == torch.float32 else cls(2, bitwise=True)


NOT_INVARIANT = BatchInvariance(1, bitwise=False)
"""Bits don't matter, or nothing keeps them."""
NATIVE = BatchInvariance(1, bitwise=True, any_slot=True)
"""Every sum has one order (see :mod:`conflayers_cli.kernels.native_forward`)."""


@dataclass(frozen=True)
class Exactness:
    """Whether drafts leave a model's greedy text as it is.

    Attributes:
        invariance: how many rows its passes run at least.
        note: why drafts may change the text where two tokens are nearly as good; None: they don't.
    """

    invariance: BatchInvariance
    note: str | None = None


def find_exactness(attached: Attachment) -> Exactness:
    """How many rows a model's passes have to run for its greedy text to be exact, if it can be."""
    if isinstance(attached.passes.fused, NativeForward):
        return Exactness(NATIVE)
    model, invariance = attached.model, BatchInvariance.for_cpu(attached.model.dtype)
    quantised = quantization_method(model.config) is not None
    if quantised or (invariance.bitwise and mixes_dtypes(model)):
        kernels = "quantised kernels" if quantised else "adapter's float32 kernels"
        return broadcast_rank0(probe_exactness(model, text_logits(attached), kernels=kernels))
    if invariance.bitwise and attached.passes.device.type == "cuda":
        return Exactness(probe_min_rows(text_logits(attached)))
    return Exactness(invariance)


def is_inexact(exactness: Exactness, dtype: torch.dtype) -> bool:
    """Whether drafts may change a model's greedy text, although it was to be exact."""
    wanted = BatchInvariance.for_cpu(dtype).bitwise
    # A sum over three ranks or more depends on which two are added first.
    reordered = wanted and world().size > 2
    broken = wanted and not exactness.invariance.bitwise
    return broken or exactness.note is not None or reordered


def text_logits(attached: Attachment) -> Logits:
    """Runs the tokens of one random text; on a GPU across the end of the first `KV_BLOCK`, because
    the number of slots read may count, too."""
    config, on_gpu = attached.config, attached.passes.device.type == "cuda"
    length = max(PROBED_WIDTHS) + PROBED_TOKENS
    bound = exact_positions(config) or getattr(config, "max_position_embeddings", None) or 0
    begin = KV_BLOCK - PROBED_TOKENS // 2 if on_gpu else 0
    begin = begin if begin + length <= bound else 0
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(int(config.vocab_size), (1, begin + length), generator=generator)
    positions = torch.arange(begin + length)[None]
    cache, runner = attached.new_cache(begin + length), attached.runner
    if begin:
        forward(runner, text[:, :begin], positions[:, :begin], cache, last_only=True)

    def logits(min_rows: int, start: int, width: int) -> torch.Tensor:
        here = slice(begin + start, begin + start + width)
        return forward(runner, text[:, here], positions[:, here], cache, min_width=min_rows)[0]

    return logits


def probe_min_rows(logits: Logits) -> BatchInvariance:
    """The smallest number of rows with which the same tokens get the same bits in any pass.

    Passes over one token each, and passes over many, from the first token on and from the second
    (so that a row's index changes), are compared bit for bit.

    `NOT_INVARIANT` where no number of rows does it.
    """
    for min_rows in CANDIDATES:
        if _is_invariant(logits, min_rows):
            return BatchInvariance(min_rows, bitwise=True)
    return NOT_INVARIANT


def probe_exactness(
    model: Any,
    logits: Logits,
    clock: Callable[[], float] | None = None,
    kernels: str = "quantised kernels",
) -> Exactness:
    """Find out whether a quantised model's rows (or those of a half-precision model whose adapter
    computes in float32) keep their bits from pass to pass, and at what price.

    ``clock`` gives seconds, after the device's work (None: the real one); ``kernels`` is the
    messages' name of what may round differently.
    """
    if model.dtype == torch.float32 and not rounds_inputs(model):
        return Exactness(NOT_INVARIANT)  # as with every model in float32: see `BatchInvariance`
    if rows_mix(model):
        return _not_exact(
            "this model's int8 products of a token depend on the tokens beside it "
            "(llm_int8_threshold), so drafts may change the text"
        )
    invariance = probe_min_rows(logits)
    if not invariance.bitwise:
        return _not_exact(
            f"this model's {kernels} round otherwise for other numbers of tokens, so drafts may "
            "change the text where two tokens are as good as equal"
        )
    slowdown = _slowdown(logits, invariance.min_rows, clock or partial(device_clock, model.device))
    if slowdown > MAX_SLOWDOWN:
        return _not_exact(
            f"that would take {invariance.min_rows} rows a pass, {slowdown:.1f} times as long as "
            "one with this model's kernels, so drafts may change the text where two tokens are as "
            "good as equal"
        )
    return Exactness(invariance)


def _not_exact(reason: str) -> Exactness:
    return Exactness(NOT_INVARIANT, f"not exact to the bit: {reason}")


def rows_mix(model: nn.Module) -> bool:
    """Whether a row's products depend on the values of other rows, not only on their number.

    LLM.int8() computes every column in which any row has an outlier (above bitsandbytes'
    ``threshold``; 0: none) in half precision, for all rows. Whether there is one depends on the
    text, so trying does not find it.
    """
    # PEFT has adapted layers of the same name, without a state of their own.
    layers: list[Any] = [m for m in model.modules() if type(m).__name__ == "Linear8bitLt"]
    return any(getattr(getattr(each, "state", None), "threshold", 0.0) > 0 for each in layers)


def _is_invariant(logits: Logits, min_rows: int) -> bool:
    alone = torch.stack([logits(min_rows, start, 1)[0] for start in range(PROBED_TOKENS)])
    for width in PROBED_WIDTHS:
        for start in (0, 1):
            count = min(width, PROBED_TOKENS - start)
            among = logits(min_rows, start, width)[:count]
            if not torch.equal(among, alone[start : start + count]):
                return False
    return True


def _slowdown(logits: Logits, min_rows: int, clock: Callable[[], float]) -> float:
    """Time of a token's pass of ``min_rows`` rows over that of one row: medians, interleaved."""
    times: dict[int, list[float]] = {1: [], min_rows: []}
    for round_ in range(_ROUNDS + 1):
        for rows, taken in times.items():
            begin = clock()
            logits(rows, round_ % PROBED_TOKENS, 1)
            seconds = clock() - begin
            if round_:  # the first round warms up
                taken.append(seconds)
    one, many = (sorted(taken)[_ROUNDS // 2] for taken in (times[1], times[min_rows]))
    return many / one if one else 1.0
