"""Whether an attached model's passes are recorded, and what they then run on."""

from __future__ import annotations

from conflayers_cli.engine.attach import Attachment
from conflayers_cli.engine.cache_pool import CachePool
from conflayers_cli.engine.graph_runner import CudaRecorder, GraphRunner, Recorder, Runner


def why_not_recorded(
    attached: Attachment, recorder: Recorder | None, eager: str | None
) -> str | None:
    """Why passes are launched one by one; None: they can be recorded.

    Args:
        attached: the model.
        recorder: what would record; None: there is nothing that does.
        eager: why they are not to be recorded, whatever could be; None: they may be.
    """
    if recorder is None:
        return f"there are no graphs on {attached.passes.device.type}"
    if attached.spread:
        return f"the model is spread ({attached.spread})"
    if eager is None and attached.cache_sizes is None:
        return "what keys and values are like is not known"
    return eager


def record(
    attached: Attachment, recorder: Recorder | None, eager: str | None
) -> tuple[Runner, CachePool | None]:
    """What runs passes from now on, and what gives out the caches that it reads and writes.

    Args:
        attached: the model.
        recorder: records passes, to be replayed; None: CUDA graphs where the model is on a GPU.
        eager: why passes are not to be recorded; None: they may be.

    Returns:
        (runner, pool); the pool is None where passes are launched one by one, on any cache.
    """
    passes = attached.passes
    if recorder is None and passes.device.type == "cuda":
        recorder = CudaRecorder(passes.device)
    reason = why_not_recorded(attached, recorder, eager)
    if recorder is None or reason is not None or attached.cache_sizes is None:
        return Runner(passes, attached.runner.multiple, reason), None
    runner = GraphRunner(passes, attached.runner.multiple, recorder)
    pool = CachePool(
        depth=attached.stack.depth,
        sizes=attached.cache_sizes,
        like=attached.like,
        forget=runner.forget,
        lock=attached.stack.lock,
    )
    return runner, pool
