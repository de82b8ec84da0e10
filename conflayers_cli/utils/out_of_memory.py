"""Memory that does not suffice: known before it is asked for where that can be, and told.

The system may promise more memory than there is, and end a process that takes it at its word,
without a message. So what is needed is compared with what there is first.
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

# How allocators put it that have no exception of their own: PyTorch's on the CPU, for sizes that
# are no numbers any more, oneDNN's, the system's through other libraries.
_PHRASES = re.compile(
    r"(can't|cannot|not enough|failed to|could not|unable to) (allocate )?memory"
    r"|out of memory|std::bad_alloc|Storage size calculation overflowed|os error 12\b",
    re.IGNORECASE,
)


# psutil warns where a sandbox hides how much was swapped so far, which nobody asks for here.
warnings.filterwarnings("ignore", "'sin' and 'sout' swap memory stats", RuntimeWarning)


class ShortageError(ConfLayersError):
    """There is not enough memory, and the message says what for."""


def is_shortage(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, says that memory does not suffice."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        ours = isinstance(error, ConfLayersError)  # it quotes, or names flags
        if not ours and isinstance(error, Exception) and _PHRASES.search(str(error)):
            return True
        # what was raised `from None` has dealt with what led to it
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def available(device: torch.device) -> int | None:
    """Bytes that can be had at the most on a device, swap space included; None: nobody knows."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + cached
    if device.type != "cpu" or not psutil.LINUX:  # others make swap space as they need it
        return None
    free = int(psutil.virtual_memory().available + psutil.swap_memory().free)
    limit = container_limit()
    return free if limit is None else min(free, limit)


def check_room(
    needed: int, device: torch.device, what: str, advice: str, names: tuple[str, ...] = ()
) -> None:
    """Raise the error that :func:`explained` raises where so many bytes can't be had."""
    free = available(device)
    if free is not None and needed > free:
        there = f"and {sized(free)} are free on {device}"
        raise ShortageError(
            f"out of memory: {what} need {sized(needed)}, {there}: {advice}", names=names
        )


@contextmanager
def explained(
    what: str, advice: str, needed: int | None = None, names: tuple[str, ...] = ()
) -> Iterator[None]:
    """Within: an error that says that memory does not suffice says what for and what to do.

    Args:
        what: what takes the memory, in the plural.
        advice: what takes less.
        needed: bytes, where they are known.
        names: of arguments in the advice, as those of `ConfLayersError`.

    Raises:
        ShortageError: in the place of such an error.
    """
    try:
        yield
    except ShortageError:
        raise  # it says so already
    except Exception as error:
        if not is_shortage(error):
            raise
        how_much = "" if needed is None else f" ({sized(needed)})"
        raise ShortageError(
            f"out of memory: {what}{how_much} don't fit: {advice}", names=names
        ) from error


def sized(count: int) -> str:
    """Bytes for people."""
    if count >= 2**30:
        return f"{count / 2**30:,.1f} GiB"
    return f"{count / 2**20:,.0f} MiB"
