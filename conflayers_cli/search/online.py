"""Choosing the layers to skip while text is generated: ConfLayers and SWIFT as the papers run them.

An :class:`AdaptiveProposer` is a proposer like any other, so the output stays the model's own
whatever it tries. What it learns carries over from prompt to prompt. It measures how fast decoding
is without drafts and with what it tries, keeps the time spent on search under a share of the wall
time, and settles on the fastest plan, or on drafting nothing.

The order of things is a script (:meth:`AdaptiveProposer._script`): a generator that yields requests
for decode steps with a plan, or for a piece of search, and is sent the measurements.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from conflayers_cli.engine.decoder import FULL, Decoder
from conflayers_cli.engine.graph_runner import clock
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.search.local_search import Move
from conflayers_cli.search.matchness import SequenceView, matchness, window_size
from conflayers_cli.search.objective import PAPER, VANILLA, DraftParams
from conflayers_cli.search.strategies.conflayers import ConfLayers, ConfLayersLoop
from conflayers_cli.search.strategies.swift import Swift, SwiftLoop
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import Context, Draft, SkipProposer
from conflayers_cli.utils.distributed import broadcast_rank0

Method = Literal["conflayers", "swift"]
METHODS: tuple[Method, ...] = ("conflayers", "swift")

VANILLA_STEPS = 8  # steps that measure the speed without drafts
INTERVAL = 20  # decode steps that a set of layers, or a way of drafting, is tried for
WINDOW = 48  # generated tokens that local changes of a plan are judged by
PATIENCE = 5  # ConfLayers' proposals in a row without improvement that end its search
MAX_FAILED_CHANGES = 6  # local changes in a row without improvement that end that search
SETTINGS = (PAPER, DraftParams(4, 0.3), DraftParams(8, 0.3), DraftParams(8, 0.5))
"""Ways of drafting tried with the plan found, besides that of the plan started from."""
MIN_GAIN = 1.02  # ratio by which a predicted or measured speed must be better to count
SLOWDOWN = 0.8  # when settled decoding falls under this share of its speed, the search starts anew
CHECK_INTERVAL = 40  # steps between two checks of the settled speed
VANILLA_CHECKS = 10  # such checks before a search that found nothing is repeated the first time
COMPARE_CHECKS = 6
"""Such checks before the settled speed is compared with that of vanilla decoding again."""
HEADROOM = 0.9
"""Share of the budget that is used: a piece of search may take longer than those before it."""


@dataclass(frozen=True)
class DecodeStats:
    """Counts and seconds of some decode steps, without the time of the search.

    ``draft_seconds`` is the part of ``seconds`` spent drafting.
    """

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0
    seconds: float = 0.0
    draft_seconds: float = 0.0

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @classmethod
    def sum(cls, steps: Sequence[DecodeStats]) -> DecodeStats:
        """Several steps as one; one that takes over four times the median counts as the median."""
        median = statistics.median(step.seconds for step in steps) if steps else 0.0
        kept = [s if s.seconds <= 4 * median else replace(s, seconds=median) for s in steps]
        return cls(**{name: sum(getattr(s, name) for s in kept) for name in cls.__annotations__})


@dataclass(frozen=True)
class _ContextView:
    """The sequence a proposer is given, as a `SequenceView`."""

    tokens: list[int]
    cache: KVCache
    prompt_length: int

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_length :]


@dataclass
class _DecodeRequest:
    """Decode with a plan until ``is_done(steps)``."""

    plan: SkipPlan
    setting: DraftParams
    is_done: Callable[[list[DecodeStats]], bool]
    steps: list[DecodeStats] = field(default_factory=list)


_SearchRequest = Callable[[SequenceView], Any]
"""A piece of search to run on the current sequence, once there is time and text for it."""
_Script = Generator[_DecodeRequest | _SearchRequest, Any, None]


class AdaptiveProposer:
    """Drafts with the best plan known, and looks for a better one meanwhile.

    Args:
        decoder: the model.
        method: whose search it is.
        budget: share of the wall time that may be spent on search, over 0, at most 1.
        seed: of SWIFT's random sets.
        start: the plan to start from; None: the method's own.
        setting: the way of drafting that belongs to it.

    Attributes:
        plan, setting: the fastest known; an empty plan: no drafts.
        settled: whether the search has ended for now.
        vanilla, best: measurements without drafts and with the plan.
        search_seconds: time spent on search.

    Raises:
        InputError: SWIFT without scikit-learn, or a model too shallow.
    """

    def __init__(
        self,
        decoder: Decoder,
        method: Method,
        *,
        budget: float = 0.05,
        seed: int = 0,
        start: SkipPlan | None = None,
        setting: DraftParams | None = None,
    ) -> None:
        self._settings = dict.fromkeys([*([setting] if setting else []), *SETTINGS])
        self._decoder = decoder
        self._method = method
        self._budget = budget
        self._seed = seed
        self.plan, self.setting = SkipPlan(), VANILLA
        self.settled = False
        self.vanilla, self.best = DecodeStats(), DecodeStats()
        self._tried = 0
        self.search_seconds = 0.0
        self._decode_seconds = 0.0
        self._longest_piece = 0.0
        self._pending: tuple[int, int, float, float] | None = None
        self._prompt: tuple[list[int], int] | None = None
        # Made before any text, so that what can't run is refused before it starts.
        self._loop = self._new_loop(start or None)
        self._run = self._script()
        self._request = next(self._run)

    @property
    def name(self) -> str:
        return "skip"

    @property
    def tried(self) -> int:
        """Sets of layers and changes looked at."""
        return self._tried + (len(self._loop.trials) if isinstance(self._loop, SwiftLoop) else 0)

    @property
    def search_share(self) -> float:
        """Share of the time of decode steps and search together that went into search."""
        both = self._decode_seconds + self.search_seconds
        return self.search_seconds / both if both > 0 else 0.0

    def propose(self, context: Context, limit: int) -> Draft:
        """Draft with the plan being tried; before that, the search goes on."""
        now = self._now()
        if self._prompt is None or self._prompt[0] is not context.tokens:
            self._prompt, self._pending = (context.tokens, len(context.tokens) - 1), None
        self._note_step(context, now)
        self._search(_ContextView(context.tokens, context.cache, self._prompt[1]))
        begin = self._now()
        proposer = self._proposer()
        draft = proposer.propose(context, limit) if proposer else Draft()
        spent = self._now() - begin
        self._pending = (len(context.tokens), len(draft.tokens), begin, spent)
        return draft

    def _now(self) -> float:
        """Seconds; all ranks use one clock, since what is tried next depends on it."""
        return broadcast_rank0(clock(self._decoder.device))

    def _proposer(self) -> SkipProposer | None:
        """The proposer of the next step; None: no draft."""
        request = self._request if isinstance(self._request, _DecodeRequest) else self
        plan, setting = request.plan, request.setting
        if not plan or setting.max_tokens == 0:
            return None
        return SkipProposer(self._decoder, plan, setting.max_tokens, setting.stop_probability)

    def _note_step(self, context: Context, now: float) -> None:
        """Add the step since the last draft to the request it was made for."""
        if self._pending is None:
            return
        length, drafted, begin, draft_seconds = self._pending
        self._decode_seconds += now - begin
        request = self._request
        if not isinstance(request, _DecodeRequest):
            return
        tokens = len(context.tokens) - length
        accepted = min(tokens - 1, drafted)
        request.steps.append(DecodeStats(1, drafted, accepted, tokens, now - begin, draft_seconds))
        if request.is_done(request.steps):
            self._request = self._run.send(DecodeStats.sum(request.steps))

    def _search(self, sequence: SequenceView) -> None:
        """Run the pieces of search requested, as far as text and time allow."""
        while not isinstance(self._request, _DecodeRequest):
            if not window_size(sequence, WINDOW) or not self._affordable():
                return
            begin = self._now()
            result = self._request(sequence)
            spent = self._now() - begin
            self.search_seconds += spent
            self._longest_piece = max(0.7 * self._longest_piece, spent)
            self._request = self._run.send(result)

    def _affordable(self) -> bool:
        """Whether one more piece of search keeps within the budget."""
        spent = self.search_seconds + self._longest_piece
        return spent <= HEADROOM * self._budget * (self._decode_seconds + spent)

    # The script. What it yields is carried out by the methods above.

    def _script(self) -> _Script:
        """Search, settle, watch; search anew where the text has changed its nature."""
        self.vanilla = yield _decode_for(VANILLA_STEPS)
        # How long a piece of search takes is not known yet; two passes is a fair guess.
        self._longest_piece = 2 * self.vanilla.seconds / self.vanilla.steps
        patience = 1
        while True:
            self.settled = False
            found = yield from self._find_plan()
            yield from self._settle(found)
            self.settled = True
            # After a search in vain the next one has to wait longer.
            patience = 1 if self.plan else 4 * patience
            yield from self._watch(patience)
            self._seed += 1
            self._tried = self.tried
            self._loop = self._new_loop(found)

    def _find_plan(self) -> Generator[_DecodeRequest | _SearchRequest, Any, SkipPlan]:
        loop = self._loop
        if isinstance(loop, SwiftLoop):
            tried: SkipPlan | None = None
            while not loop.stopped_because:
                yield loop.consider
                if loop.plan != tried:  # the starting set, or a better one: is it fast?
                    tried = loop.plan
                    yield from self._try(tried, PAPER)
            return loop.plan
        yield from self._run_conflayers(loop)
        best = loop.best.plan if loop.best else loop.plan
        yield from self._local_changes(best, self.best, loop)
        return self.plan or best

    def _run_conflayers(self, loop: ConfLayersLoop) -> _Script:
        """ConfLayers' own loop; whatever decodes faster than all before is kept at once."""
        while not loop.stopped_because:
            plan = loop.plan
            stats = yield _DecodeRequest(
                plan, PAPER, lambda steps: loop.observe(steps[-1].drafted, steps[-1].accepted)
            )
            self._tried += 1
            self._keep_if_faster(plan, PAPER, stats)
            yield loop.propose

    def _local_changes(self, plan: SkipPlan, stats: DecodeStats, loop: ConfLayersLoop) -> _Script:
        """Put layers back, skip further ones, one at a time, by matchness on the current sequence.

        Skipped layers with high confidence come first: they were most likely skipped wrongly.
        (Not in the papers; the refinement of `calibrate`, at a fraction of its passes.)
        """
        if loop.confidence is None:
            return
        ranked = [int(i) + 1 for i in np.argsort(loop.confidence.total)]
        current = plan
        for skipped in (True, False):
            failed = 0
            for layer in reversed(ranked) if skipped else ranked:
                if failed >= MAX_FAILED_CHANGES:
                    break
                if (layer in current.layers) is not skipped:
                    continue
                changed = Move(layer, True, True).apply(current)
                if not changed:
                    continue
                is_faster = yield partial(self._is_faster, changed, current, stats)
                self._tried += 1
                if is_faster:
                    current, failed = changed, 0
                else:
                    failed += 1
        if current != plan:
            yield from self._try(current, PAPER)

    def _is_faster(
        self, changed: SkipPlan, current: SkipPlan, stats: DecodeStats, sequence: SequenceView
    ) -> bool:
        """Whether a changed plan is predicted to be faster, by matchness on a sequence."""
        window = window_size(sequence, WINDOW)
        before, after = (
            self._predict_speed(plan, matchness(self._decoder, plan, sequence, window), stats)
            for plan in (current, changed)
        )
        return after > before * (MIN_GAIN if len(changed) < len(current) else 1.0)

    def _predict_speed(self, plan: SkipPlan, agreement: float, stats: DecodeStats) -> float:
        """Tokens per second of a chain of the best length, from times measured while decoding.

        A layer's time follows from that of a vanilla step and that of a drafted token.
        """
        step = self.vanilla.seconds / self.vanilla.steps
        per_layer = step / self._decoder.depth
        if self.plan and stats.drafted:
            drafted = stats.draft_seconds / stats.drafted
            per_layer = max(2 * (step - drafted) / len(self.plan), 0.0)
        token = max(step - per_layer * len(plan) / 2, 0.05 * step)
        verify = step
        if stats.steps:
            verify = max((stats.seconds - stats.draft_seconds) / stats.steps, step)
        alpha = min(agreement, 0.99)
        return max((1 - alpha ** (n + 1)) / (1 - alpha) / (n * token + verify) for n in range(1, 9))

    def _settle(self, found: SkipPlan) -> _Script:
        """Try ways of drafting with the plan found, and vanilla; keep what is fastest now.

        Earlier measurements don't count: of many trials the luckiest looks best.
        """
        self.vanilla = yield _decode_for(INTERVAL)
        self.plan, self.setting, self.best = SkipPlan(), VANILLA, DecodeStats()
        for setting in self._settings:
            yield from self._try(found, setting)

    def _watch(self, patience: int) -> _Script:
        """Decode with the settled plan until it has become slow; vanilla for a number of checks."""
        checks = 0
        while True:
            now = yield _decode_for(CHECK_INTERVAL, self.plan, self.setting)
            checks += 1
            if not self.plan:
                self.vanilla = now
                if checks >= VANILLA_CHECKS * patience:
                    return
                continue
            slow = now.speed < SLOWDOWN * self.best.speed
            if slow or checks % COMPARE_CHECKS == 0:
                self.vanilla = yield _decode_for(VANILLA_STEPS)
            if now.speed < self.vanilla.speed:
                self.plan, self.setting, self.best = SkipPlan(), VANILLA, DecodeStats()
                return
            if slow:
                self.best = now  # its speed on another text is no measure any more
                return

    def _try(self, plan: SkipPlan, setting: DraftParams) -> _Script:
        """Decode with a plan for an interval, and keep it if it is faster."""
        stats = yield _decode_for(INTERVAL, plan, setting)
        self._keep_if_faster(plan, setting, stats)

    def _keep_if_faster(self, plan: SkipPlan, setting: DraftParams, stats: DecodeStats) -> None:
        if stats.speed > MIN_GAIN * max(self.vanilla.speed, self.best.speed):
            self.plan, self.setting, self.best = plan, setting, stats

    def _new_loop(self, start: SkipPlan | None) -> ConfLayersLoop | SwiftLoop:
        if self._method == "swift":
            return SwiftLoop(Swift(), self._decoder, self._seed, start=start)
        settings = ConfLayers(search_interval=INTERVAL, patience=PATIENCE)
        return ConfLayersLoop(settings, self._decoder, start=start)


def _decode_for(
    count: int, plan: SkipPlan = FULL, setting: DraftParams = VANILLA
) -> _DecodeRequest:
    """Decode ``count`` steps; without drafts by default."""
    return _DecodeRequest(plan, setting, lambda steps: len(steps) >= count)
