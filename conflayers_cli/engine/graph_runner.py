"""How passes reach the device: one by one, or recorded once as CUDA graphs and replayed.

A pass over a few tokens of a large model is some hundreds of kernels, each of which takes a modern
GPU less time than it takes the host to launch it. A graph is launched as a whole. It replays the
same kernels on the same memory: so what a pass is given lies in static buffers, the cache's memory
is used again from text to text (:mod:`conflayers_cli.engine.cache_pool`), and a graph is kept for every (plan, shape, extent,
memory). A plan that changes needs graphs of its own; those of the whole model stay.
"""

from __future__ import annotations

import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from conflayers_cli.engine.argmax import best_with_probability
from conflayers_cli.engine.forward import ForwardRunner, ModelInput
from conflayers_cli.kernels.kv_cache import EXTENT_MULTIPLE, KVCache, Place, extent_for
from conflayers_cli.models.support import triton_errors
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.utils.error_text import first_line

LOOSE_EXTENT = 64
"""Keys are read in extents of a multiple of this where bits don't matter."""
MOST_TOKENS = 256
"""Tokens of all rows of a pass up to which it is recorded: longer ones keep the GPU busy."""
MOST_WIDTH = 64
"""Tokens of each row, likewise: wider ones are prompts, each of a length of its own."""
EAGER_FIRST = 2
"""Passes of a kind that run as they are before it is recorded. They are what recording has to have
before it (libraries set up, kernels compiled), and plans tried once or twice are not worth it."""
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Tokens a row that recorded passes have: others are made up to the next of these by repeating the
last token, so that a few graphs serve drafts of any length."""
MOST_GRAPHS = 192
"""Graphs kept, the latest used."""
MOST_COUNTED = 4096
"""Kinds of passes whose uses are counted."""

Work = Callable[[], torch.Tensor]
Read = Callable[[], list[float]]


class Recorder(Protocol):
    """Records what a function does on the device, to have it done again."""

    def record(self, work: Work) -> tuple[torch.Tensor, Callable[[], None]]:
        """(the function's output, which every replay overwrites; what replays).

        Raises:
            RuntimeError: it does something that can't be replayed.
        """
        ...

    def send(self, values: torch.Tensor) -> Read:
        """Begin to copy values to the host, behind all work so far; returns what waits for them."""
        ...


class CudaRecorder:
    """Records CUDA graphs, all of them in one memory pool.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None  # PyTorch's handle
        self._anchor: torch.cuda.CUDAGraph | None = None

    def record(self, work: Work) -> tuple[torch.Tensor, Callable[[], None]]:
        with torch.cuda.device(self._device):
            if self._anchor is None:
                # A pool is given up with its last graph, and can't be used again: this one stays.
                self._pool = torch.cuda.graph_pool_handle()
                self._anchor, _ = self._capture(lambda: torch.zeros(1, device=self._device))
            graph, output = self._capture(work)
        return output, graph.replay

    def _capture(self, work: Work) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        # What PyTorch itself sets up at a capture has to be usable outside of inference mode, too.
        # Other threads may allocate meanwhile: only what this one does is of the graph.
        try:
            with (
                torch.inference_mode(False),
                torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
                torch.inference_mode(),
            ):
                output = work()
        except BaseException:
            # PyTorch leaves both as they were in the capture where that can't be ended.
            torch.cuda.set_stream(stream)
            end = getattr(torch._C, "_cuda_endAllocateToPool", None)
            if end is not None:
                with suppress(RuntimeError):
                    end(torch.cuda.current_device(), self._pool)
            raise
        return graph, output

    def send(self, values: torch.Tensor) -> Read:
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))

        def read() -> list[float]:
            event.synchronize()
            return host.tolist()

        return read


@dataclass(frozen=True)
class ForwardSpec:
    """What a pass is but for its tokens.

    Attributes:
        plan: the sub-layers left out.
        keep: of how many last tokens logits are wanted, 0: of all.
    """

    plan: SkipPlan
    keep: int = 0


class Runner:
    """Runs passes one by one, each launched by the host.

    Args:
        passes: what runs one.
        multiple: keys are read in extents of a multiple of this.
        reason: see below.

    Attributes:
        multiple: see above.
        reason: why passes are not recorded; None: they are.
    """

    def __init__(self, passes: ForwardRunner, multiple: int, reason: str | None = None) -> None:
        self.passes = passes
        self.reason = reason
        self.device: torch.device = passes.device
        self.multiple = multiple

    @property
    def graphs(self) -> int:
        """How many passes are recorded at present."""
        return 0

    @property
    def warm_ups(self) -> int:
        """Passes of a kind that run slower than those behind them."""
        return 1

    def forward(
        self,
        inputs: ModelInput,
        cache: KVCache,
        plan: SkipPlan,
        *,
        min_width: int = 1,
        last_only: bool = False,
    ) -> torch.Tensor:
        """Logits ``[B, T, V]`` of the tokens, or ``[B, 1, V]`` of the last one.

        The last token is repeated where the pass has to be wider.

        Args:
            inputs: anywhere; they are brought to the device.
            cache: filled below the first position of every row.
            plan: the sub-layers left out.
            min_width: tokens of each row that the pass runs at the least.
            last_only: compute logits for the last token only.
        """
        batch, wanted = inputs.tokens.shape
        keep = min_width if last_only and wanted >= min_width else 0
        if (width := self.width_for(wanted, batch)) > wanted:
            inputs = inputs.repeated(width, positions=True)
        if width < min_width:
            inputs = inputs.repeated(min_width, positions=self.passes.by_modules)
        end = int(inputs.written.max()) + 1
        logits = self.run(inputs, cache, ForwardSpec(plan, keep), end)
        return logits[:, :wanted][:, -1:] if last_only else logits[:, :wanted]

    def run(self, inputs: ModelInput, cache: KVCache, kind: ForwardSpec, end: int) -> torch.Tensor:
        """Logits as `ForwardRunner.run` gives them, the caller's own.

        Args:
            inputs: anywhere; they are brought to the device.
            cache: filled below the first position of every row.
            kind: of the pass.
            end: the last slot written, plus one.
        """
        extent = self.extent(cache, inputs.positions.shape[1], end)
        if kind.plan:  # drafts are guesses, whose bits may depend on how far keys are read
            extent = min(extent, extent_for(end, LOOSE_EXTENT))
        placed = inputs.on(self.device)
        return self.passes.run(placed, cache, kind.plan, kind.keep, extent)

    def width_for(self, width: int, batch: int) -> int:
        """Tokens a row that a pass over so many is to have."""
        return width

    def extent(self, cache: KVCache, width: int, end: int) -> int:
        """How far attention of a pass of so many positions a row may read."""
        return extent_for(end, self.multiple)

    def forget(self, number: int | None = None) -> None:
        """A cache's memory, of this number, is no more; None: passes run otherwise from now on."""


class _Buffers:
    """Where passes of one shape find what they are given: one block, one copy from the host."""

    def __init__(self, like: ModelInput, device: torch.device) -> None:
        sizes = [tensor.numel() for tensor in like.tensors]
        self._block = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        parts = self._block.split(sizes)
        views = [part.view(t.shape) for part, t in zip(parts, like.tensors, strict=True)]
        self.inputs = ModelInput(*views)

    def put(self, inputs: ModelInput) -> None:
        parts = [tensor.reshape(-1) for tensor in inputs.tensors]
        if len({part.device for part in parts}) > 1:
            parts = [part.to(self._block.device) for part in parts]
        self._block.copy_(torch.cat(parts), non_blocking=True)


class AsyncSequence(Protocol):
    """A row whose passes feed themselves (:class:`conflayers_cli.engine.async_decode.AsyncDecode`), as a runner knows it.

    Attributes:
        cache, kind: of its passes.
        position: where the next one runs its token.
    """

    cache: KVCache
    kind: ForwardSpec
    position: int

    def inputs(self) -> ModelInput:
        """What the next pass is given; asked for where it can't take it from the one before."""
        ...

    def drain(self) -> None:
        """Read all that is under way: the buffers are somebody else's from now on."""
        ...


_Shape = tuple[tuple[int, ...], ...]
_Key = tuple[Place, str, _Shape, ForwardSpec, int]


class GraphRunner(Runner):
    """Records passes over few tokens, and replays them; runs the others one by one.

    Where recording fails, it says why (``reason``) and runs all passes one by one from then on.

    Args:
        passes: what runs one.
        multiple: as for `Runner`; extents grow by a third or a half at a time.
        recorder: what records.
    """

    def __init__(self, passes: ForwardRunner, multiple: int, recorder: Recorder) -> None:
        super().__init__(passes, multiple)
        self._recorder = recorder
        self._graphs: OrderedDict[_Key, tuple[torch.Tensor, Callable[[], None]]] = OrderedDict()
        self._uses: Counter[_Key] = Counter()
        self._buffers: dict[tuple[str, _Shape], _Buffers] = {}
        self._launched: weakref.ref[AsyncSequence] | None = None

    @property
    def graphs(self) -> int:
        return len(self._graphs)

    @property
    def warm_ups(self) -> int:
        return EAGER_FIRST + 1

    def width_for(self, width: int, batch: int) -> int:
        wider = next((each for each in WIDTHS if each >= width), width)
        return wider if self.records and wider * batch <= MOST_TOKENS else width

    def extent(self, cache: KVCache, width: int, end: int) -> int:
        """All of the cache where attention reads only what is filled: one graph for any length."""
        if self.passes.reads_filled_part(width):
            return cache.capacity
        return min(bucket_for(end), cache.capacity)

    def run(self, inputs: ModelInput, cache: KVCache, kind: ForwardSpec, end: int) -> torch.Tensor:
        lasting = cache.place.number > 0
        long = inputs.tokens.shape[1] > MOST_WIDTH or inputs.tokens.numel() > MOST_TOKENS
        if long or not (lasting and self.records):
            return super().run(inputs, cache, kind, end)
        extent = self.extent(cache, inputs.positions.shape[1], end)
        buffers = self._buffers_for("pass", inputs)
        buffers.put(inputs)
        given = buffers.inputs

        def work() -> torch.Tensor:
            return self.passes.run(given, cache, kind.plan, kind.keep, extent)

        return self._do((cache.place, "pass", _shape(inputs), kind, extent), work).clone()

    @property
    def records(self) -> bool:
        """Whether passes may be recorded now."""
        return self.reason is None and not self.passes.watched

    def launch(self, row: AsyncSequence) -> Read:
        """Launch the next pass of a row that feeds itself.

        Returns:
            What waits for it, and gives the token it chose and that one's probability.
        """
        like = row.inputs()
        buffers = self._buffers_for("feed", like)
        last = self._launched() if self._launched else None
        if last is not row:
            if last is not None:
                last.drain()
                like = row.inputs()
            buffers.put(like)
            self._launched = weakref.ref(row)
        extent = self.extent(row.cache, like.positions.shape[1], row.position + 1)
        given, cache, kind = buffers.inputs, row.cache, row.kind

        def work() -> torch.Tensor:
            logits = self.passes.run(given, cache, kind.plan, kind.keep, extent)
            chosen = best_with_probability(logits[0, :1])
            given.tokens.copy_(chosen[0].to(torch.int64).expand_as(given.tokens))
            given.positions.add_(1)
            return chosen.flatten()

        key = cache.place, "feed", _shape(like), kind, extent
        return self._recorder.send(self._do(key, work))

    def _do(self, key: _Key, work: Work) -> torch.Tensor:
        """Do the work, or replay it. What is returned is overwritten the next time."""
        if not self.records:
            return work()
        known = self._graphs.get(key)
        if known is None:
            if len(self._uses) >= MOST_COUNTED:
                self._uses.clear()
            self._uses[key] += 1
            if self._uses[key] <= EAGER_FIRST:
                return work()
            errors: tuple[type[Exception], ...] = (RuntimeError, *triton_errors())
            try:
                known = self._recorder.record(work)
            except errors as error:
                self._give_up(error)
                return work()
            self._graphs[key] = known
            del self._uses[key]
            if len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        output, replay = known
        replay()
        return output

    def _give_up(self, error: Exception) -> None:
        self.reason = f"recording a pass failed: {first_line(error)}"
        self._graphs.clear()

    def _buffers_for(self, use: str, like: ModelInput) -> _Buffers:
        key = use, _shape(like)
        if key not in self._buffers:
            self._buffers[key] = _Buffers(like, self.device)
        return self._buffers[key]

    def forget(self, number: int | None = None) -> None:
        # Those not recorded yet, too: what runs otherwise has to be run before it is recorded.
        known: tuple[MutableMapping[_Key, Any], ...] = (self._graphs, self._uses)
        for each in known:
            for key in [key for key in each if number in (None, key[0].number)]:
                del each[key]


def _shape(inputs: ModelInput) -> _Shape:
    return tuple(tuple(tensor.shape) for tensor in inputs.tensors)


def bucket_for(length: int) -> int:
    """The extent, in slots, that holds ``length``: a growing text goes through few of them."""
    blocks = -(-max(length, 1) // EXTENT_MULTIPLE)
    power = 1 << (blocks - 1).bit_length()
    between = power * 3 // 4
    return (between if power >= 4 and blocks <= between else power) * EXTENT_MULTIPLE
