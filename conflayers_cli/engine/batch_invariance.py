"""Batch invariance: that a token's logits have the same bits whatever tokens run beside it.

Kernels are chosen by the number of rows, and may round otherwise. How many rows a pass has to run
for that not to show is known on a CPU, and found by trying elsewhere, and for quantised weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from conflayers_cli.engine.attach import Attachment, forward
from conflayers_cli.kernels.kv_cache import EXTENT_MULTIPLE
from conflayers_cli.models.peft_modules import mixes_dtypes
from conflayers_cli.models.quantization import method_of, rounds_inputs
from conflayers_cli.models.support import exact_positions
from conflayers_cli.utils.distributed import agreed, world

CANDIDATES = (1, 2, 4, 8, 16, 32, 64)
"""Least numbers of rows tried, the cheapest first."""
PROBED_WIDTHS = (2, 3, 4, 5, 6, 8, 9, 12, 16, 17, 24, 26, 32, 48, 64)
"""Widths of the passes that are compared with passes of one token, those of recorded passes (see
`.runner.WIDTHS`) among them."""
PROBED_TOKENS = 20
"""Tokens that are run one by one to compare with."""
DEAREST = 1.25
"""A pass of one token may take this many times its time for its bits to be those of wider ones."""
_ROUNDS = 7

Logits = Callable[[int, int, int], torch.Tensor]
"""Logits ``[width, V]`` of the tokens from a place on: (least rows, place, width)."""


@dataclass(frozen=True)
class BatchInvariance:
    """How many rows, tokens of all sequences together, a pass runs at the least.

    Kernels are chosen by the number of rows, and may round otherwise. On a CPU only a single
    half-precision row gets other bits than the same row among several; a pass of one token
    therefore runs it twice, which costs the same. On a GPU there is no such rule to rely on: it is
    found by trying (:func:`probe_min_rows`). Passes up to ``min_rows`` tokens then all have one
    shape.

    Attributes:
        min_rows: how many.
        bitwise: whether a token's logits have the same bits in every pass.
    """

    min_rows: int
    bitwise: bool

    def min_width(self, batch: int) -> int:
        """Tokens of each of ``batch`` rows that a pass runs at the least."""
        return -(-self.min_rows // batch)

    @classmethod
    def for_cpu(cls, dtype: torch.dtype) -> BatchInvariance:
        return NOT_INVARIANT if dtype == torch.float32 else cls(2, bitwise=True)


NOT_INVARIANT = BatchInvariance(1, bitwise=False)
"""Bits don't matter, or nothing keeps them."""


@dataclass(frozen=True)
class Exactness:
    """What holds of a quantised model's greedy text.

    Attributes:
        invariance: how many rows its passes run at the least.
        note: why drafts may change the text where two tokens are nearly as good; None: they don't.
    """

    invariance: BatchInvariance
    note: str | None = None


def find_exactness(attached: Attachment) -> Exactness:
    """What a model's passes have to run for its greedy text to be exact, and whether it can be."""
    model, invariance = attached.model, BatchInvariance.for_cpu(attached.model.dtype)
    quantised = method_of(model.config) is not None
    if quantised or (invariance.bitwise and mixes_dtypes(model)):
        kernels = "quantised kernels" if quantised else "adapter's float32 kernels"
        return agreed(probe_exactness(model, text_logits(attached), kernels=kernels))
    if invariance.bitwise and attached.passes.device.type == "cuda":
        return Exactness(probe_min_rows(text_logits(attached)))
    return Exactness(invariance)


def is_inexact(exactness: Exactness, dtype: torch.dtype) -> bool:
    """Whether drafts may part a model's greedy text from vanilla's, although it was to be exact."""
    wanted = BatchInvariance.for_cpu(dtype).bitwise
    # Of three parts or more it depends on a sum's size which two are added first.
    reordered = wanted and world().size > 2
    broken = wanted and not exactness.invariance.bitwise
    return broken or exactness.note is not None or reordered


def text_logits(attached: Attachment) -> Logits:
    """Runs the tokens of one random text.

    On a GPU across the end of the first extent: how far keys are read may count, too.
    """
    config, on_gpu = attached.config, attached.passes.device.type == "cuda"
    length = max(PROBED_WIDTHS) + PROBED_TOKENS
    bound = exact_positions(config) or getattr(config, "max_position_embeddings", None) or 0
    start = EXTENT_MULTIPLE - PROBED_TOKENS // 2 if on_gpu else 0
    start = start if start + length <= bound else 0
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(int(config.vocab_size), (1, start + length), generator=generator)
    positions = torch.arange(start + length)[None]
    cache = attached.new_cache(start + length)
    if start:
        forward(attached.runner, text[:, :start], positions[:, :start], cache, last_only=True)

    def logits(min_rows: int, place: int, width: int) -> torch.Tensor:
        here = slice(start + place, start + place + width)
        return forward(
            attached.runner, text[:, here], positions[:, here], cache, min_width=min_rows
        )[0]

    return logits


def probe_min_rows(logits: Logits) -> BatchInvariance:
    """The least number of rows with which the same tokens get the same bits in passes of any width.

    Passes over one token each, and passes over many, from the first token on and from a later one
    (so that a row's place among the others changes), are compared bit for bit.

    Args:
        logits: runs the tokens of one text from a place on, on top of those before it.

    Returns:
        `NOT_INVARIANT` where no number of rows does it.
    """
    for least in CANDIDATES:
        if _agrees(logits, least):
            return BatchInvariance(least, bitwise=True)
    return NOT_INVARIANT


def probe_exactness(
    model: Any,
    logits: Logits,
    clock: Callable[[], float] | None = None,
    kernels: str = "quantised kernels",
) -> Exactness:
    """Find out whether a quantised model's rows keep their bits from pass to pass, at what price.

    Or those of a model in half precision whose adapter computes in float32, where products take
    other kernels.

    Args:
        model: the model.
        logits: runs tokens, see `rows.probe_min_rows`.
        clock: seconds now, with the device's work done; None: the real one.
        kernels: what rounds otherwise, where it does.
    """
    if model.dtype == torch.float32 and not rounds_inputs(model):
        return Exactness(NOT_INVARIANT)  # as with every model in float32: see `BatchInvariance`
    if rows_mix(model):
        return _broken(
            "this model's int8 products of a token depend on the tokens beside it "
            "(llm_int8_threshold), so drafts may change the text"
        )
    rule = probe_min_rows(logits)
    if not rule.bitwise:
        return _broken(
            f"this model's {kernels} round otherwise for other numbers of tokens, so drafts may "
            "change the text where two tokens are as good as equal"
        )
    dearer = _ratio(logits, rule.min_rows, clock or partial(_now, model.device))
    if dearer > DEAREST:
        return _broken(
            f"that would take {rule.min_rows} rows a pass, {dearer:.1f} times as long as one with "
            "this model's kernels, so drafts may change the text where two tokens are as good as "
            "equal"
        )
    return Exactness(rule)


def _broken(reason: str) -> Exactness:
    return Exactness(NOT_INVARIANT, f"not exact to the bit: {reason}")


def rows_mix(model: nn.Module) -> bool:
    """Whether a row's products depend on what is in the other rows, not only on how many there are.

    LLM.int8() computes every column in which any row has an outlier in half precision, for all
    rows. Whether there is one hangs on the text, so trying does not find it.
    """
    return any(_threshold(module) > 0 for module in model.modules())


def _threshold(module: Any) -> float:
    """From where on bitsandbytes' int8 takes an input for an outlier; 0: it has none."""
    # PEFT has adapted layers of the same name, without a state of their own.
    state = getattr(module, "state", None) if type(module).__name__ == "Linear8bitLt" else None
    return float(getattr(state, "threshold", 0.0))


def _agrees(logits: Logits, least: int) -> bool:
    alone = torch.stack([logits(least, place, 1)[0] for place in range(PROBED_TOKENS)])
    for width in PROBED_WIDTHS:
        for place in (0, 1):
            count = min(width, PROBED_TOKENS - place)
            among = logits(least, place, width)[:count]
            if not torch.equal(among, alone[place : place + count]):
                return False
    return True


def _ratio(logits: Logits, least: int, clock: Callable[[], float]) -> float:
    """The time of a token's pass of ``least`` rows in that of one row: medians, taken by turns."""
    times: dict[int, list[float]] = {1: [], least: []}
    for round_ in range(_ROUNDS + 1):
        for rows, taken in times.items():
            begin = clock()
            logits(rows, round_ % PROBED_TOKENS, 1)
            seconds = clock() - begin
            if round_:  # the first round warms up
                taken.append(seconds)
    one, many = (sorted(taken)[_ROUNDS // 2] for taken in (times[1], times[least]))
    return many / one if one else 1.0


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
