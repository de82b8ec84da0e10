"""What ``calibrate`` shows while it works (stderr) and prints in the end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from conflayers_cli.profile.describe import how_it_drafts, in_short, skipped, skips
from conflayers_cli.profile.schema import Profile
from conflayers_cli.search.calibrate import Calibration, Candidate
from conflayers_cli.search.objective import Score
from conflayers_cli.search.problem import Trial
from conflayers_cli.search.validate import Check
from conflayers_cli.utils.progress import stderr_console

logger = logging.getLogger(__name__)

ROWS = 12
"""Latest trials kept in view."""
SILENCE = 20.0
"""Seconds after which a line is written where there is no terminal and nothing else was."""


class Display:
    """What is being done, the best plan so far and the time left: a bar and a table on a terminal;
    elsewhere a line per stage and per improvement, and one at least every `SILENCE` seconds. Until
    :meth:`begin` a terminal shows nothing: loading a model has a bar of its own.

    Args:
        first: what is done before the first stage.
        clock: in seconds.
    """

    def __init__(self, first: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._depth = 0
        self._clock = clock
        self._rows: list[tuple[str, ...]] = []
        self._stage, self._best, self._looks = first, "", ""
        self._begun = self._spoke = clock()
        self._done = 0.0
        self._over = threading.Event()
        self._console = stderr_console()
        self._live: Live | None = None

    def __enter__(self) -> Display:
        if not self._console.is_terminal:
            threading.Thread(target=self._break_silence, daemon=True).start()
        return self

    def begin(self, depth: int) -> None:
        """The model, of so many layers, is there."""
        self._depth = depth
        if self._console.is_terminal:
            self._live = Live(console=self._console, transient=False, get_renderable=self._render)
            self._live.__enter__()

    def __exit__(self, *of_error: Any) -> None:
        self._over.set()
        if self._live:
            self._live.__exit__(*of_error)

    def stage(self, name: str) -> None:
        """A stage begins."""
        self._stage, self._looks = name, ""
        self._begun, self._done = self._clock(), 0.0
        self._say(f"{name} …")

    def looked(self, judged: int, done: float) -> None:
        """Refinement has judged so many plans; ``done``: about which share of it is over."""
        self._looks, self._done = f", {judged} sets judged", max(done, self._done)

    def status(self) -> str:
        """What is being done, for how long, and the time left where it is known."""
        seconds, left = self._clock() - self._begun, ""
        if self._done > 0.05:
            left = f", about {seconds * (1 - self._done) / self._done:.0f} s left"
        return f"{self._stage}{self._looks}: {seconds:.0f} s{left}"

    def _say(self, line: str) -> None:
        """A line where there is no terminal; there the table shows it."""
        if self._live is None:
            self._spoke = self._clock()
            logger.info(line)
        else:
            self._live.refresh()

    def _break_silence(self) -> None:
        while not self._over.wait(SILENCE / 20):
            if self._clock() - self._spoke >= SILENCE * 0.9:
                self._say(f"{self.status()}{f'; {self._best}' if self._best else ''}")

    def trial(self, trial: Trial, best: Trial | None) -> None:
        """A trial of the search is done."""
        row = (
            str(trial.iteration + 1),
            _figures(trial),
            skipped(trial.plan, self._depth),
            _share(trial.acceptance_rate),
            _number(trial.tokens_per_step),
            _times(trial.speedup),
            trial.note,
        )
        self._rows.append(row)
        if best is not None and best is trial:
            self._best = f"best so far: {row[2]} skipped"
            if trial.steps:
                self._best += f", {row[4]} tokens per step"
            if trial.speedup is not None:
                self._best += f", {row[5]} expected"
            if self._live is None:
                self._say(f"set {row[0]}, {row[1]}: {self._best}")

    def better(self, score: Score, judged: int) -> None:
        """Refinement found a better plan after scoring ``judged`` plans."""
        self._best = (
            f"refined after {judged} sets judged: {skipped(score.plan, self._depth)} skipped, "
            f"{f'{score.plan.weights} weights, ' if score.plan.weights else ''}"
            f"agreement {_share(score.agreement)}, {_times(score.speedup)}"
        )
        self._say(f"{self._best} expected")

    def _render(self) -> RenderableType:
        bar = ProgressBar(total=1.0, completed=self._done, width=40, pulse=self._done == 0.0)
        parts: list[RenderableType] = [Text(self.status()), bar]
        if self._rows:
            table = Table()
            for head in ("set", "by", "skipped", "accepted", "tokens/step", "expected", ""):
                table.add_column(head, justify="left" if head in ("", "by", "skipped") else "right")
            for row in self._rows[-ROWS:]:
                table.add_row(*map(Text, row))
            parts.append(table)
        return Group(*parts, Text(self._best))


def summary_lines(profile: Profile, found: Calibration, target: Path | None) -> list[str]:
    """The result in words."""
    plan, depth, candidate = found.plan, profile.model.depth, found.candidate
    expected = candidate.expected
    lines = [f"{profile.model.name}: {found.conclusion}"]
    if found.candidates and plan:
        lines[0] += f" (found by {_label(candidate)})"
    if plan and found.conclusion.startswith("no plan"):
        lines.append("kept all the same: unrefined, the strategy's own set is what was asked for")
    lines.append(
        f"searched {len(found.result.trials)} sets ({found.result.stopped_because}), "
        f"judged {candidate.judged} more in refining; {found.seconds:.0f} s in all"
    )
    if plan:
        lines.append(f"skips {skips(plan, depth)}")
        lines.append(how_it_drafts(profile.draft))
    else:
        lines.append("the profile skips nothing: n-grams found in the text draft, where they pay")
    for each in found.ranges:
        lines.append(
            f"from {each.from_context} tokens of context on skips {skips(each.plan, depth)}"
        )
    if found.check is not None and plan:
        lines.append(
            f"measured without n-grams: {found.check.speedup:.2f}× vanilla, acceptance "
            f"{_share(found.check.acceptance_rate)}, {_number(found.check.tokens_per_step)} tokens "
            f"per step; all of it together {_times(found.check.overall)}, "
            f"expected {_times(expected.speedup if expected else None)}"
        )
    if target:
        lines.append(f"wrote {target}")
    return lines


def strategy_table(found: Calibration, depth: int) -> Table:
    """The result of each of several strategies, the chosen one marked."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    heads = ("expected", "measured", "accepted", "tokens/step", "seconds", "full passes")
    for head in ("", "strategy", "skips"):
        table.add_column(head)
    for head in (*heads, "draft passes"):
        table.add_column(head, justify="right")
    for candidate, check in found.candidates:
        table.add_row(
            "→" if candidate is found.candidate else "",
            _label(candidate),
            in_short(candidate.plan, depth),
            _times(candidate.expected.speedup if candidate.expected else None),
            _times(check.speedup if check else None),
            _share(check.acceptance_rate if check else None),
            _number(check.tokens_per_step if check else None),
            f"{candidate.seconds:.0f}",
            str(candidate.full_passes),
            str(candidate.draft_passes),
        )
    return table


def _label(candidate: Candidate) -> str:
    """A strategy's name, with its target speed-up if it has one."""
    target = getattr(candidate.method, "target_speedup", None)
    return candidate.strategy if target is None else f"{candidate.strategy} {target:g}"


def to_json(profile: Profile, found: Calibration, target: Path | None) -> dict[str, Any]:
    """The result as one JSON document."""
    return {
        "schema_version": 1,
        "path": str(target) if target else None,
        "interrupted": found.interrupted,
        "stopped_because": found.result.stopped_because,
        "conclusion": found.conclusion,
        "profile": profile.model_dump(mode="json", exclude_none=False),
        "candidate": _candidate_json(found.candidate, found.check),
        "refine_judged": found.candidate.judged,
        "strategies": [_candidate_json(each, check) for each, check in found.candidates],
        "trials": [_trial_json(trial) for trial in found.result.trials],
    }


def _candidate_json(candidate: Candidate, check: Check | None) -> dict[str, Any]:
    return {
        "strategy": candidate.strategy,
        "settings": asdict(candidate.method),  # type: ignore[call-overload]
        "attention": candidate.plan.attention,
        "mlp": candidate.plan.mlp,
        "weights": candidate.plan.weights,
        "refined": candidate.refined,
        "expected_speedup": candidate.expected.speedup if candidate.expected else None,
        "measured_speedup": check.speedup if check else None,
        "acceptance_rate": check.acceptance_rate if check else None,
        "tokens_per_step": check.tokens_per_step if check else None,
        "search_seconds": candidate.seconds,
        "full_passes": candidate.full_passes,
        "draft_passes": candidate.draft_passes,
        "stopped_because": candidate.result.stopped_because,
    }


def _trial_json(trial: Trial) -> dict[str, Any]:
    return {
        "iteration": trial.iteration,
        "attention": trial.plan.attention,
        "mlp": trial.plan.mlp,
        "steps": trial.steps,
        "drafted": trial.drafted,
        "accepted": trial.accepted,
        "acceptance_rate": trial.acceptance_rate,
        "tokens_per_step": trial.tokens_per_step,
        "expected_speedup": trial.speedup,
        "note": trial.note,
        **trial.figures,
    }


_SYMBOLS = {"lambda": "λ"}


def _figures(trial: Trial) -> str:
    """The strategy's own numbers."""
    return ", ".join(f"{_SYMBOLS.get(key, key)} {v:.3g}" for key, v in trial.figures.items())


def _format(form: str) -> Callable[[float | None], str]:
    return lambda value: "–" if value is None else form.format(value)


_share = _format("{:.1%}")
_number = _format("{:.2f}")
_times = _format("{:.2f}×")
