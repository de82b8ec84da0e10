"""A stand-in for CUDA graphs on the CPU.

What a function does is recorded operation by operation, with the memory each one reads and
writes, and undone; a replay does the operations again on that memory, whatever has come to be in
it. As with a graph, nothing of the Python around them runs again, Python's values are frozen, and
what needs a value back on the host or brings one along can't be recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conflayers_cli.engine.cuda_graphs import DeviceWork, PendingRead

_FORBIDDEN = {
    "aten::_local_scalar_dense": "a value is read by the host",
    "aten::nonzero": "the size of a result depends on values",
    "aten::lift_fresh": "a tensor is made of the host's values",
    "aten::equal": "a value is read by the host",
}


def _tensors(*values: Any) -> list[torch.Tensor]:
    """Those among an operation's arguments or outputs, lists of them included."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors(*value)
    return found


def _memory(tensors: list[torch.Tensor]) -> set[int]:
    plain = (t for t in tensors if t.layout == torch.strided)
    return {t.untyped_storage().data_ptr() for t in plain}


@dataclass
class _Call:
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    fresh: list[torch.Tensor | None]
    """Its outputs that have memory of their own."""


@dataclass
class Tape(TorchDispatchMode):
    """Records within its context."""

    calls: list[_Call] = field(default_factory=list)
    changed: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if why := _FORBIDDEN.get(func._schema.name):
            raise RuntimeError(f"{func}: {why}")
        given = _tensors(*args, *kwargs.values())
        writes = False
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[place] if place < len(args) else kwargs.get(argument.name)
                self.changed += [(t, t.clone()) for t in _tensors(written)]
                writes = True
        output = func(*args, **kwargs)
        known = _memory(given)
        fresh = [None if _memory([t]) & known else t for t in _tensors(output)]
        # A view of memory that there is already is no work, as it is none of a graph's.
        if writes or any(t is not None for t in fresh):
            self.calls.append(_Call(func, args, kwargs, fresh))
        return output

    def undo(self) -> None:
        """Leave memory as it was; what was computed is nobody's yet."""
        for tensor, before in reversed(self.changed):
            tensor.copy_(before)
        for call in self.calls:
            for own in call.fresh:
                if own is not None and own.layout == torch.strided:
                    own.fill_(float("nan") if own.is_floating_point() else 1)

    @torch.inference_mode()
    def replay(self) -> None:
        for call in self.calls:
            again = _tensors(call.function(*call.args, **call.kwargs))
            for old, new in zip(call.fresh, again, strict=True):
                if old is not None:
                    old.copy_(new)


class TapeRecorder:
    """Records tapes.

    Attributes:
        tapes: how many so far.
    """

    def __init__(self) -> None:
        self.tapes = 0

    def record(self, work: DeviceWork) -> tuple[torch.Tensor, Callable[[], None]]:
        tape = Tape()
        with tape:
            output = work()
        tape.undo()
        self.tapes += 1
        return output, tape.replay

    def send(self, values: torch.Tensor) -> PendingRead:
        kept = values.clone()
        return lambda: kept.tolist()
