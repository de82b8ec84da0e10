"""How many threads decode: measured by the passes themselves when a model is opened.

More threads than the memory's bandwidth feeds only wait for each other, and so do the two of one
core. Bits don't depend on the number (see :mod:`conflayers_cli.kernels.native_forward`).
"""

from __future__ import annotations

import time

import torch

from conflayers_cli.engine.attach import Attachment
from conflayers_cli.kernels.native_forward import NativeForward
from conflayers_cli.kernels.native_library import usable_threads
from conflayers_cli.skip_plan import SkipPlan

_SECONDS, _PASSES = 0.1, 20
"""At most, for each number of threads, where two passes don't take longer."""
_MARGIN = 1.25
"""Half as many threads must be quicker by this, twice: other work on the machine makes one thread
look better for a while, and to go on with too few costs more than a few too many do."""
_UNDISTURBED = 0.9
"""Share of the time in which all threads must have had a processor: with less, others are at work,
and which number is best without them can't be told."""


def choose_threads(attached: Attachment, native: NativeForward) -> int | None:
    """Half as many threads as can run, or a quarter, … as long as that is quicker; None: all.

    Compared are passes over one token of the model, by the least of several. On a machine that is
    busy with other work it is all.
    """
    usable = best = usable_threads()

    def halving_pays() -> bool:
        (all_, share), (half, _) = (
            _pass_seconds(attached, native, count) for count in (best, best // 2)
        )
        return share >= _UNDISTURBED and half * _MARGIN < all_

    while best > 1 and halving_pays() and halving_pays():
        best //= 2
    return None if best == usable else best


def _pass_seconds(attached: Attachment, native: NativeForward, threads: int) -> tuple[float, float]:
    """(least seconds of a pass, share of the time in which every thread had a processor)."""
    cache = attached.new_cache(1)
    token = torch.zeros((1, 1), dtype=torch.int64)
    before, native.threads = native.threads, threads
    least, begin, passes = float("inf"), time.perf_counter(), 0
    used = time.process_time()
    try:
        with attached.stack.lock:
            while passes < 3 or (passes < _PASSES and time.perf_counter() < begin + _SECONDS):
                start = time.perf_counter()
                native.run(token, token, None, cache, SkipPlan(), 1)
                passes += 1
                if passes > 1:  # the first one warms up
                    least = min(least, time.perf_counter() - start)
    finally:
        native.threads = before
    seconds = time.perf_counter() - begin
    return least, (time.process_time() - used) / seconds / threads
