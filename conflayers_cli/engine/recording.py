"""Whether an attached model's passes are recorded, and what then runs them."""

from __future__ import annotations

from conflayers_cli.engine.attach import Attachment
from conflayers_cli.engine.cache_pool import CachePool
from conflayers_cli.engine.cuda_graphs import CudaRecorder, Recorder
from conflayers_cli.engine.graph_runner import GraphRunner, Runner


def why_not_recorded(
    attached: Attachment, recorder: Recorder | None, eager: str | None
) -> str | None:
    """Why passes are launched one by one; None: they can be recorded. ``eager``: see `record`."""
    if recorder is None:
        return f"there are no graphs on {attached.passes.device.type}"
    if attached.spread:
        return f"the model is spread ({attached.spread})"
    if eager is None and attached.kv_layout is None:
        return "what keys and values are like is not known"
    return eager


def record(
    attached: Attachment, recorder: Recorder | None, eager: str | None
) -> tuple[Runner, CachePool | None]:
    """The runner of passes from now on, and the pool of its caches; None: it takes any cache.

    Args:
        attached: the model.
        recorder: None: CUDA graphs where the model is on a GPU.
        eager: why passes are not to be recorded; None: they may be.
    """
    passes, multiple = attached.passes, attached.runner.multiple
    if recorder is None and passes.device.type == "cuda":
        recorder = CudaRecorder(passes.device)
    reason = why_not_recorded(attached, recorder, eager)
    if recorder is None or reason is not None or attached.kv_layout is None:
        return Runner(passes, multiple, reason), None
    runner = GraphRunner(passes, multiple, recorder)
    return runner, CachePool(attached.kv_layout, runner.forget, attached.stack.lock)
