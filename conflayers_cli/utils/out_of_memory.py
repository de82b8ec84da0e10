"""Errors of too little memory: checked before an allocation where possible, else explained.

The system may promise more memory than there is and then kill a process that uses it, so what is
needed is compared with what is free first.
"""

from __future__ import annotations

import errno
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from conflayers_cli.errors import ConfLayersError
from conflayers_cli.utils.memory import container_limit

# Messages of allocators without an exception of their own: PyTorch's on the CPU, oneDNN's, the
# system's through other libraries.
_PHRASES = re.compile(
    r"(can't|cannot|not enough|failed to|could not|unable to) (allocate )?memory"
    r"|out of memory|std::bad_alloc|Storage size calculation overflowed|os error 12\b",
    re.IGNORECASE,
)

# psutil warns where a sandbox hides how much was swapped so far, which is not needed here
warnings.filterwarnings("ignore", "'sin' and 'sout' swap memory stats", RuntimeWarning)


class OutOfMemoryError(ConfLayersError):
    """There is not enough memory; the message says what for."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error or one of its causes says that memory does not suffice."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        ours = isinstance(error, ConfLayersError)  # may quote such a phrase
        if not ours and isinstance(error, Exception) and _PHRASES.search(str(error)):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def available_memory(device: torch.device) -> int | None:
    """Free bytes of a device, swap space included; None: unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + cached
    if device.type != "cpu" or not psutil.LINUX:  # others extend their swap space
        return None
    free = int(psutil.virtual_memory().available + psutil.swap_memory().free)
    limit = container_limit()
    return free if limit is None else min(free, limit)


def check_free_memory(
    needed: int, device: torch.device, what: str, advice: str, names: tuple[str, ...] = ()
) -> None:
    """Raise OutOfMemoryError where ``needed`` bytes are not free; arguments as `explain_oom`."""
    free = available_memory(device)
    if free is not None and needed > free:
        raise OutOfMemoryError(
            f"out of memory: {what} need {format_bytes(needed)}, and {format_bytes(free)} are free "
            f"on {device}: {advice}",
            names=names,
        )


@contextmanager
def explain_oom(
    what: str, advice: str, needed: int | None = None, names: tuple[str, ...] = ()
) -> Iterator[None]:
    """Within: errors of too little memory say what for and what to do.

    Args:
        what: what takes the memory, in the plural.
        advice: what takes less.
        needed: bytes, if known.
        names: of arguments in the advice, as in `ConfLayersError`.

    Raises:
        OutOfMemoryError: in place of such an error.
    """
    try:
        yield
    except OutOfMemoryError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        how_much = "" if needed is None else f" ({format_bytes(needed)})"
        raise OutOfMemoryError(
            f"out of memory: {what}{how_much} don't fit: {advice}", names=names
        ) from error


def format_bytes(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"
