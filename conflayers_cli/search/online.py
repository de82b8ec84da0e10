"""Choosing the layers to skip while text is generated: ConfLayers and SWIFT as the papers run them.

An :class:`AdaptiveProposer` is a proposer like any other, so that what is generated stays the
model's own whatever it tries. What it learns carries over from prompt to prompt. It measures how
fast decoding really is, without drafts and with what it tries; time spent on anything but decoding
is kept under a share of the wall time; and it settles: on the fastest plan, or on drafting nothing.

The order of things is written down as a script (:meth:`AdaptiveProposer._script`): a generator that
asks for decode steps with a plan, or for a piece of search work, and is told what came of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from conflayers_cli.engine.cost_measurement import clock
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.kernels.kv_cache import KVCache
from conflayers_cli.search.local_search import Move
from conflayers_cli.search.matchness import Passage, matchness, window_of
from conflayers_cli.search.objective import PAPER, VANILLA, Setting
from conflayers_cli.search.strategies.conflayers import ConfLayers, ConfLayersLoop
from conflayers_cli.search.strategies.swift import Swift, SwiftLoop
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import Context, Draft, SkipProposer
from conflayers_cli.utils.distributed import agreed

Method = Literal["conflayers", "swift"]
METHODS: tuple[Method, ...] = ("conflayers", "swift")

VANILLA_STEPS = 8
"""Plain steps that say how fast decoding is without drafts."""
INTERVAL = 20
"""Decode steps that a set of layers, or a way of drafting, is tried for."""
WINDOW = 48
"""Generated tokens that local changes of a plan are judged by."""
PATIENCE = 5
"""Proposals of the loop in a row that may bring nothing."""
IN_VAIN = 6
"""Local changes in a row that may bring nothing."""
SETTINGS = (PAPER, Setting(4, 0.3), Setting(8, 0.3), Setting(8, 0.5))
"""Ways of drafting tried with the plan found, besides that of the plan started from."""
GAIN = 1.02
"""A predicted or measured speed must be better by this factor to count."""
SLOWED = 0.8
"""Settled decoding that falls under this share of its speed is searched anew."""
WATCHED = 40
"""Steps between two looks at the settled speed."""
PLAIN = 10
"""Such looks before a search that found nothing is repeated the first time."""
COMPARED = 6
"""Such looks before the settled speed is compared with that of plain decoding again."""
HEADROOM = 0.9
"""Share of the budget that is used: a piece of search may take longer than those before it."""


@dataclass(frozen=True)
class Outcome:
    """What some decode steps came to; seconds without the search's own.

    Attributes:
        steps, drafted, accepted, tokens: counts.
        seconds: of the steps, stalls of the machine cut off.
        draft_seconds: the part of it spent drafting.
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
    def of(cls, steps: Sequence[Outcome]) -> Outcome:
        """Several steps as one; a step four times longer than usual counts as a usual one."""
        usual = statistics.median(step.seconds for step in steps) if steps else 0.0
        kept = [
            step if step.seconds <= 4 * usual else replace(step, seconds=usual) for step in steps
        ]
        return cls(
            *(
                sum(getattr(step, name) for step in kept)
                for name in ("steps", "drafted", "accepted", "tokens", "seconds", "draft_seconds")
            )
        )


@dataclass(frozen=True)
class _Seen:
    """What a drafter sees of a generation, as searches take it."""

    tokens: list[int]
    cache: KVCache
    prompt_length: int

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_length :]


@dataclass
class _Decode:
    """A request: decode with a plan until the steps are enough."""

    plan: SkipPlan
    setting: Setting
    enough: Callable[[list[Outcome]], bool]
    taken: list[Outcome] = field(default_factory=list)


@dataclass(frozen=True)
class _Work:
    """A request: a piece of search on the text at hand, once there is time and text for it."""

    run: Callable[[Passage], None]


_Script = Generator[_Decode | _Work, Outcome, None]


class AdaptiveProposer:
    """Drafts with the best plan known, and looks for a better one meanwhile.

    Args:
        decoder: the model.
        method: whose search it is.
        budget: share of the wall time that may be spent on search, over 0, at most 1.
        seed: of SWIFT's random sets.
        start: the plan to start from; by default the balanced set.
        setting: the way of drafting that belongs to it.

    Attributes:
        plan, setting: what is known to be fastest; an empty plan: drafting nothing.
        settled: whether the search has come to an end for now.
        vanilla, best: speeds measured, of decoding without drafts and with the plan.
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
        setting: Setting | None = None,
    ) -> None:
        self._settings = dict.fromkeys([*([setting] if setting else []), *SETTINGS])
        self._decoder = decoder
        self._method = method
        self._budget = budget
        self._seed = seed
        self._start = start or None
        self.plan, self.setting = SkipPlan(), VANILLA
        self.settled = False
        self.vanilla, self.best = Outcome(), Outcome()
        self._tried = 0
        self.search_seconds = 0.0
        self._decode_seconds = 0.0
        self._longest_work = 0.0
        self._pending: tuple[int, int, float, float] | None = None
        self._prompt: tuple[list[int], int] | None = None
        # Made once before any text, so that what can't run is refused before it starts.
        self._loop = self._new_loop(self._start)
        self._run = self._script()
        self._request = next(self._run)

    @property
    def name(self) -> str:
        return "skip"

    @property
    def tried(self) -> int:
        """Sets of layers and changes looked at."""
        at_hand = len(self._loop.trials) if isinstance(self._loop, SwiftLoop) else 0
        return self._tried + at_hand

    @property
    def search_share(self) -> float:
        """Share of the time spent on decode steps and search that went into search.

        Of the wall time, with prompts read and whatever else happens, it is less.
        """
        both = self._decode_seconds + self.search_seconds
        return self.search_seconds / both if both > 0 else 0.0

    def propose(self, context: Context, limit: int) -> Draft:
        """Draft with whatever is being tried; between drafts the search goes on."""
        now = self._now()
        if self._prompt is None or self._prompt[0] is not context.tokens:
            self._prompt, self._pending = (context.tokens, len(context.tokens) - 1), None
        self._note_step(context, now)
        self._work(_Seen(context.tokens, context.cache, self._prompt[1]))
        begin = self._now()
        drafter = self._drafter()
        draft = drafter.propose(context, limit) if drafter else Draft()
        spent = self._now() - begin
        self._pending = (len(context.tokens), len(draft.tokens), begin, spent)
        return draft

    def _now(self) -> float:
        """Seconds; what is tried next depends on them, so all ranks go by one clock."""
        return agreed(clock(self._decoder.device))

    def _drafter(self) -> SkipProposer | None:
        """What decodes the next step; None: it is decoded plainly."""
        request = self._request
        plan, setting = self.plan, self.setting
        if isinstance(request, _Decode):
            plan, setting = request.plan, request.setting
        if not plan or setting.max_tokens == 0:
            return None
        return SkipProposer(self._decoder, plan, setting.max_tokens, setting.stop_probability)

    def _note_step(self, context: Context, now: float) -> None:
        """Add what the step since the last draft brought to the request it was made for."""
        if self._pending is None:
            return
        length, drafted, begin, draft_seconds = self._pending
        self._decode_seconds += now - begin
        if not isinstance(self._request, _Decode):
            return
        tokens = len(context.tokens) - length
        request = self._request
        request.taken.append(
            Outcome(1, drafted, min(tokens - 1, drafted), tokens, now - begin, draft_seconds)
        )
        if request.enough(request.taken):
            self._request = self._run.send(Outcome.of(request.taken))

    def _work(self, passage: Passage) -> None:
        """Do the pieces of search asked for, as far as text and time allow."""
        while isinstance(self._request, _Work):
            if not window_of(passage, WINDOW) or not self._affordable():
                return
            begin = self._now()
            self._request.run(passage)
            spent = self._now() - begin
            self.search_seconds += spent
            self._longest_work = max(0.7 * self._longest_work, spent)
            self._request = self._run.send(Outcome())

    def _affordable(self) -> bool:
        """Whether one more piece of search keeps within the budget."""
        spent = self.search_seconds + self._longest_work
        return spent <= HEADROOM * self._budget * (self._decode_seconds + spent)

    # The script. What it yields is carried out by the methods above.

    def _script(self) -> _Script:
        """Search, settle, watch; search anew where the text has changed its nature."""
        self.vanilla = yield self._steps(SkipPlan(), VANILLA, VANILLA_STEPS)
        # How long a piece of search takes is not known yet; two passes is a fair guess.
        self._longest_work = 2 * self.vanilla.seconds / self.vanilla.steps
        patience = 1
        while True:
            self.settled = False
            found = yield from self._searched()
            yield from self._settled(found)
            self.settled = True
            self._start = found
            # Whoever searched in vain waits longer before the next time.
            patience = 1 if self.plan else 4 * patience
            yield from self._watched(patience)
            self._seed += 1
            self._tried = self.tried
            self._loop = self._new_loop(self._start)

    def _searched(self) -> Generator[_Decode | _Work, Outcome, SkipPlan]:
        loop = self._loop
        if isinstance(loop, SwiftLoop):
            tried: SkipPlan | None = None
            while not loop.stopped_because:
                yield _Work(loop.consider)
                if loop.plan != tried:  # the starting set, or a better one: is it fast?
                    tried = loop.plan
                    outcome = yield self._steps(tried, PAPER, INTERVAL)
                    self._keep_if_faster(tried, PAPER, outcome)
            return loop.plan
        yield from self._paper_loop(loop)
        best = loop.best.plan if loop.best else loop.plan
        yield from self._local_changes(best, self.best, loop)
        return self.plan or best

    def _paper_loop(self, loop: ConfLayersLoop) -> _Script:
        """ConfLayers' own loop; whatever decodes faster than all before is kept at once."""
        while not loop.stopped_because:
            plan = loop.plan

            def over(taken: list[Outcome]) -> bool:
                return loop.observe(taken[-1].drafted, taken[-1].accepted)

            outcome = yield _Decode(plan, PAPER, over)
            self._tried += 1
            self._keep_if_faster(plan, PAPER, outcome)
            yield _Work(loop.propose)

    def _local_changes(self, plan: SkipPlan, outcome: Outcome, loop: ConfLayersLoop) -> _Script:
        """Put layers back, leave further ones out, one at a time, by matchness on the text at hand.

        Confidence says where to begin: a skipped layer with much of it was skipped wrongly most
        likely. (What the papers lack; the refinement of `calibrate`, at a fraction of its passes.)
        """
        if loop.confidence is None:
            return
        rank = [0, *(int(i) + 1 for i in np.argsort(loop.confidence.total))]
        current = plan
        for skipped in (True, False):
            in_vain = 0
            for layer in reversed(rank) if skipped else rank:
                if in_vain >= IN_VAIN:
                    break
                if layer == 0 or (layer in current.layers) is not skipped:
                    continue
                changed = Move(layer, True, True).apply(current)
                if not changed:
                    continue
                gains: list[bool] = []
                yield _Work(self._comparison(current, changed, outcome, gains))
                self._tried += 1
                if gains[0]:
                    current, in_vain = changed, 0
                else:
                    in_vain += 1
        if current != plan:
            after = yield self._steps(current, PAPER, INTERVAL)
            self._keep_if_faster(current, PAPER, after)

    def _comparison(
        self, current: SkipPlan, changed: SkipPlan, outcome: Outcome, gains: list[bool]
    ) -> Callable[[Passage], None]:
        """Work that notes whether a changed plan is predicted to be faster than the current."""

        def compare(passage: Passage) -> None:
            window = window_of(passage, WINDOW)
            speeds = [
                self._predicted(plan, matchness(self._decoder, plan, passage, window), outcome)
                for plan in (current, changed)
            ]
            gains.append(speeds[1] > speeds[0] * (GAIN if len(changed) < len(current) else 1.0))

        return compare

    def _predicted(self, plan: SkipPlan, agreement: float, seen: Outcome) -> float:
        """Tokens per second of a chain of the best length, from times measured while decoding.

        A layer's time follows from that of a plain step and that of a drafted token.
        """
        step = self.vanilla.seconds / self.vanilla.steps
        per_layer = step / self._decoder.depth
        if self.plan and seen.drafted:
            drafted = seen.draft_seconds / seen.drafted
            per_layer = max(2 * (step - drafted) / len(self.plan), 0.0)
        token = max(step - per_layer * len(plan) / 2, 0.05 * step)
        verify = max((seen.seconds - seen.draft_seconds) / seen.steps, step) if seen.steps else step
        alpha = min(agreement, 0.99)
        return max((1 - alpha ** (n + 1)) / (1 - alpha) / (n * token + verify) for n in range(1, 9))

    def _settled(self, found: SkipPlan) -> _Script:
        """Try ways of drafting with the plan found, and plain decoding; keep what is fastest now.

        What was measured before counts no more: of many trials the luckiest looks best.
        """
        self.vanilla = yield self._steps(SkipPlan(), VANILLA, INTERVAL)
        self.plan, self.setting, self.best = SkipPlan(), VANILLA, Outcome()
        for setting in self._settings:
            outcome = yield self._steps(found, setting, INTERVAL)
            self._keep_if_faster(found, setting, outcome)

    def _watched(self, patience: int) -> _Script:
        """Decode with what was settled on until it has become slow, or plain for long."""
        looks = 0
        while True:
            now = yield self._steps(self.plan, self.setting, WATCHED)
            looks += 1
            if not self.plan:
                self.vanilla = now
                if looks >= PLAIN * patience:
                    return
                continue
            slow = now.speed < SLOWED * self.best.speed
            if slow or looks % COMPARED == 0:
                self.vanilla = yield self._steps(SkipPlan(), VANILLA, VANILLA_STEPS)
            if now.speed < self.vanilla.speed:
                self.plan, self.setting, self.best = SkipPlan(), VANILLA, Outcome()
                return
            if slow:
                self.best = now  # what it was worth on another text is no measure any more
                return

    def _keep_if_faster(self, plan: SkipPlan, setting: Setting, outcome: Outcome) -> None:
        if outcome.speed > GAIN * max(self.vanilla.speed, self.best.speed):
            self.plan, self.setting, self.best = plan, setting, outcome

    def _steps(self, plan: SkipPlan, setting: Setting, count: int) -> _Decode:
        return _Decode(plan, setting, lambda taken: len(taken) >= count)

    def _new_loop(self, start: SkipPlan | None) -> ConfLayersLoop | SwiftLoop:
        if self._method == "swift":
            return SwiftLoop(Swift(), self._decoder, self._seed, start=start)
        settings = ConfLayers(search_interval=INTERVAL, patience=PATIENCE)
        return ConfLayersLoop(settings, self._decoder, start=start)
