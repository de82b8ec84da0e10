"""How passes are launched: one by one, or recorded once as CUDA graphs and replayed.

A pass over a few tokens of a large model is some hundreds of kernels, each of which takes a modern
GPU less time than the host needs to launch it. A graph is launched as a whole and replays the same
kernels on the same memory. So inputs lie in static buffers, the cache's memory is reused from text
to text (:mod:`conflayers_cli.engine.cache_pool`), and there is a graph per plan, shape, number of
slots read, and memory. A plan that changes needs new graphs; those of the whole model stay.
"""

from __future__ import annotations

import time
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, MutableMapping
from typing import Any

import torch

from conflayers_cli.engine.argmax import greedy_with_confidence
from conflayers_cli.engine.cuda_graphs import DeviceWork, PendingRead, Recorder
from conflayers_cli.engine.forward import ForwardRunner, ModelInput
from conflayers_cli.engine.token_choice import TokenChoice
from conflayers_cli.kernels.kv_cache import KV_BLOCK, BufferView, KVCache, round_up_kv_len
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.utils.error_text import first_line, triton_errors

DRAFT_KV_BLOCK = 64
"""Attention reads a multiple of this many slots where bits don't matter."""
MAX_TOKENS = 256
"""Tokens of a recorded pass, all sequences together: longer ones keep the GPU busy."""
MAX_WIDTH = 64
"""Tokens of each sequence, likewise: wider passes are prompts, each of a length of its own."""
EAGER_FIRST = 2
"""Passes of a kind that run before it is recorded. They set up libraries and compile kernels, and
plans that are tried once or twice are not worth recording."""
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Tokens per sequence of recorded passes: others are padded to the next of these by repeating the
last token, so that a few graphs serve drafts of any length."""
MAX_GRAPHS = 192
"""Graphs kept, the most recently used."""
MAX_COUNTED = 4096
"""Kinds of passes whose uses are counted."""


class Runner:
    """Runs passes one by one, each launched by the host.

    Attributes:
        passes: runs one.
        multiple: attention reads a multiple of this many slots.
        reason: why passes are not recorded; None: they are.
        graphs: the number of recorded passes.
        warm_ups: passes of a kind that run slower than later ones.
    """

    graphs = 0
    warm_ups = 1

    def __init__(self, passes: ForwardRunner, multiple: int, reason: str | None = None) -> None:
        self.passes = passes
        self.reason = reason
        self.device: torch.device = passes.device
        self.multiple = multiple

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

        ``min_width``: tokens per sequence that the pass runs at least; the last one is repeated.
        The others as for `Decoder.forward`.
        """
        batch, wanted = inputs.tokens.shape
        keep = min_width if last_only and wanted >= min_width else 0
        inputs = inputs.padded(self.width_for(wanted, batch), positions=True)
        inputs = inputs.padded(min_width, positions=self.passes.by_modules)
        end = int(inputs.written.max()) + 1
        logits = self.run(inputs, cache, plan, keep, end)
        return logits[:, :wanted][:, -1:] if last_only else logits[:, :wanted]

    def run(
        self, inputs: ModelInput, cache: KVCache, plan: SkipPlan, keep: int, end: int
    ) -> torch.Tensor:
        """As `ForwardRunner.run`, for inputs on any device written below slot ``end``."""
        kv_len = self.kv_len_for(end, cache, inputs.positions.shape[1])
        if plan:  # drafts are guesses, whose bits may depend on how many slots are read
            kv_len = min(kv_len, round_up_kv_len(end, DRAFT_KV_BLOCK))
        return self.passes.run(inputs.on(self.device), cache, plan, keep, kv_len)

    def width_for(self, width: int, batch: int) -> int:
        """Tokens per sequence that a pass over so many is to have."""
        return width

    def kv_len_for(self, end: int, cache: KVCache, width: int) -> int:
        """Slots that attention may read in a pass of so many positions per sequence."""
        return round_up_kv_len(end, self.multiple)

    def forget(self, number: int | None = None) -> None:
        """The memory of this number is released; None: passes run otherwise from now on."""


class _StaticInputs:
    """Input buffers for passes of one shape: one block, one copy from the host."""

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


_Shape = tuple[tuple[int, ...], ...]
_Key = tuple[BufferView, str, _Shape, SkipPlan, int, int]
"""(memory, use, input shapes, plan, logits kept, slots read)."""


class GraphRunner(Runner):
    """Records passes over few tokens, and replays them; runs the others one by one.

    Where recording fails, ``reason`` says why and all passes run one by one from then on.
    """

    warm_ups = EAGER_FIRST + 1

    def __init__(self, passes: ForwardRunner, multiple: int, recorder: Recorder) -> None:
        super().__init__(passes, multiple)
        self._recorder = recorder
        self._graphs: OrderedDict[_Key, tuple[torch.Tensor, Callable[[], None]]] = OrderedDict()
        self._uses: Counter[_Key] = Counter()
        self._static: dict[tuple[str, _Shape], _StaticInputs] = {}
        self._last_async: weakref.ref[AsyncDecode] | None = None

    @property
    def graphs(self) -> int:  # type: ignore[override]
        return len(self._graphs)

    @property
    def records(self) -> bool:
        """Whether passes may be recorded now."""
        return self.reason is None and not self.passes.watched

    def width_for(self, width: int, batch: int) -> int:
        wider = next((each for each in WIDTHS if each >= width), width)
        return wider if self.records and wider * batch <= MAX_TOKENS else width

    def kv_len_for(self, end: int, cache: KVCache, width: int) -> int:
        """All of the cache where attention reads only what is filled: one graph for any length."""
        if self.passes.reads_filled_part(width):
            return cache.capacity
        return min(bucket_kv_len(end), cache.capacity)

    def run(
        self, inputs: ModelInput, cache: KVCache, plan: SkipPlan, keep: int, end: int
    ) -> torch.Tensor:
        long = inputs.tokens.shape[1] > MAX_WIDTH or inputs.tokens.numel() > MAX_TOKENS
        if long or cache.buffer.number == 0 or not self.records:
            return super().run(inputs, cache, plan, keep, end)
        kv_len = self.kv_len_for(end, cache, inputs.positions.shape[1])
        static = self._static_inputs("pass", inputs)
        static.put(inputs)

        def work() -> torch.Tensor:
            return self.passes.run(static.inputs, cache, plan, keep, kv_len)

        key = cache.buffer, "pass", _shape(inputs), plan, keep, kv_len
        return self._replay(key, work).clone()

    def launch(self, sequence: AsyncDecode) -> PendingRead:
        """Launch the next pass of a sequence whose passes take their token from the one before;
        returns what waits for it, and gives the token it chose and that one's probability."""
        inputs = sequence.inputs()
        static = self._static_inputs("async", inputs)
        last = self._last_async() if self._last_async else None
        if last is not sequence:
            if last is not None:
                last.drain()
                inputs = sequence.inputs()
            static.put(inputs)
            self._last_async = weakref.ref(sequence)
        cache, plan, given = sequence.cache, sequence.plan, static.inputs
        kv_len = self.kv_len_for(sequence.position + 1, cache, inputs.positions.shape[1])

        def work() -> torch.Tensor:
            logits = self.passes.run(given, cache, plan, 0, kv_len)
            chosen = greedy_with_confidence(logits[0, :1])
            given.tokens.copy_(chosen[0].to(torch.int64).expand_as(given.tokens))
            given.positions.add_(1)
            return chosen.flatten()

        key = cache.buffer, "async", _shape(inputs), plan, 0, kv_len
        return self._recorder.send(self._replay(key, work))

    def _replay(self, key: _Key, work: DeviceWork) -> torch.Tensor:
        """Do the work, or replay it. What is returned is overwritten the next time."""
        if not self.records:
            return work()
        graph = self._graphs.get(key)
        if graph is None:
            if len(self._uses) >= MAX_COUNTED:
                self._uses.clear()
            self._uses[key] += 1
            if self._uses[key] <= EAGER_FIRST:
                return work()
            errors: tuple[type[Exception], ...] = (RuntimeError, *triton_errors())
            try:
                graph = self._recorder.record(work)
            except errors as error:
                self.reason = f"recording a pass failed: {first_line(error)}"
                self._graphs.clear()
                return work()
            self._graphs[key] = graph
            del self._uses[key]
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        output, replay = graph
        replay()
        return output

    def _static_inputs(self, use: str, like: ModelInput) -> _StaticInputs:
        key = use, _shape(like)
        if key not in self._static:
            self._static[key] = _StaticInputs(like, self.device)
        return self._static[key]

    def forget(self, number: int | None = None) -> None:
        # Uses, too: what runs otherwise has to run before it is recorded.
        by_key: tuple[MutableMapping[_Key, Any], ...] = (self._graphs, self._uses)
        for each in by_key:
            for key in [key for key in each if number in (None, key[0].number)]:
                del each[key]


class AsyncDecode:
    """Decode steps of one sequence kept in flight.

    The cache beyond the last token read is undefined: passes launched ahead write keys of tokens
    that may never be part of the text.

    Args:
        runner, plan: of the passes; ``on_launch`` is called at each.
        cache: of this sequence alone, filled below ``position``.
        width: how often each pass runs its token (see `.batch_invariance`).
        token, position: what the next pass runs, and where.
    """

    def __init__(
        self,
        runner: GraphRunner,
        cache: KVCache,
        plan: SkipPlan,
        width: int,
        token: int,
        position: int,
        on_launch: Callable[[], None],
    ) -> None:
        self.cache, self.plan, self.position = cache, plan, position
        self._runner, self._on_launch = runner, on_launch
        self._width, self._positions = width, width if runner.passes.by_modules else 1
        self._last_read = token, position
        self._newest = token  # read from the device, by the caller or not
        self._in_flight: deque[PendingRead] = deque()
        self._drained: deque[TokenChoice] = deque()

    @property
    def ahead(self) -> int:
        """Passes launched, but not read."""
        return len(self._drained) + len(self._in_flight)

    def continues_from(self, token: int, position: int) -> bool:
        """Whether :meth:`read` gives what follows this token at this position."""
        return self._last_read == (token, position)

    def launch(self, count: int = 1) -> None:
        """Launch passes, as long as the cache has slots for what they write."""
        with torch.inference_mode(), self._runner.passes.lock:
            for _ in range(min(count, self.cache.capacity - self.position)):
                self._in_flight.append(self._runner.launch(self))
                self.position += 1
                self._on_launch()

    def read(self) -> TokenChoice:
        """Wait for the oldest pass launched and not read, of which there must be one."""
        with self._runner.passes.lock:  # or another sequence might drain this one meanwhile
            choice = self._drained.popleft() if self._drained else self._receive()
        self._last_read = choice.token, self._last_read[1] + 1
        return choice

    def inputs(self) -> ModelInput:
        """The next pass's input; its token is right where no pass is in flight."""
        tokens = torch.full((1, self._width), self._newest)
        return ModelInput(tokens, torch.full((1, self._positions), self.position))

    def drain(self) -> None:
        """Read all passes in flight."""
        while self._in_flight:
            self._drained.append(self._receive())

    def _receive(self) -> TokenChoice:
        token, confidence = self._in_flight.popleft()()
        self._newest = int(token)
        return TokenChoice(self._newest, confidence)


def _shape(inputs: ModelInput) -> _Shape:
    return tuple(tuple(tensor.shape) for tensor in inputs.tensors)


def bucket_kv_len(length: int) -> int:
    """``length`` rounded up to one of few numbers of slots: powers of two and 3/4 of these."""
    blocks = -(-max(length, 1) // KV_BLOCK)
    power = 1 << (blocks - 1).bit_length()
    between = power * 3 // 4
    return (between if power >= 4 and blocks <= between else power) * KV_BLOCK


def clock(device: torch.device) -> float:
    """Seconds now, after all work queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
