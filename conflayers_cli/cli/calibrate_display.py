"""What ``calibrate`` shows while it works (stderr) and says in the end."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.live import Live
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


class Display:
    """A live table on a terminal; elsewhere a line per stage and per improvement."""

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._rows: list[tuple[str, ...]] = []
        self._stage = ""
        self._best = ""
        console = stderr_console()
        self._live = Live(console=console, transient=False) if console.is_terminal else None

    def __enter__(self) -> Display:
        if self._live:
            self._live.__enter__()
        return self

    def __exit__(self, *of_error: Any) -> None:
        if self._live:
            self._live.__exit__(*of_error)

    def stage(self, name: str) -> None:
        """What begins."""
        self._stage = name
        if self._live is None:
            logger.info(f"{name} …")
        self._redraw()

    def trial(self, trial: Trial, best: Trial | None) -> None:
        """A set of layers was looked at during the search."""
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
                logger.info(f"set {row[0]}, {row[1]}: {self._best}")
        self._redraw()

    def better(self, score: Score, judged: int) -> None:
        """Refinement found a better plan."""
        self._best = (
            f"refined after {judged} sets judged: {skipped(score.plan, self._depth)} skipped, "
            f"{f'{score.plan.weights} weights, ' if score.plan.weights else ''}"
            f"agreement {_share(score.agreement)}, {_times(score.speedup)}"
        )
        if self._live is None:
            logger.info(f"{self._best} expected")
        self._redraw()

    def _redraw(self) -> None:
        if self._live is None:
            return
        table = Table(title=Text(self._stage), caption=Text(self._best), caption_justify="left")
        for head in ("set", "by", "skipped", "accepted", "tokens/step", "expected", ""):
            table.add_column(head, justify="left" if head in ("", "by", "skipped") else "right")
        for row in self._rows[-ROWS:]:
            table.add_row(*map(Text, row))
        self._live.update(table, refresh=True)


def summary_lines(profile: Profile, done: Calibration, target: Path | None) -> list[str]:
    """The answer for people."""
    plan, depth, candidate = done.plan, profile.model.depth, done.candidate
    expected = candidate.expected
    lines = [f"{profile.model.name}: {done.conclusion}"]
    if done.others and plan:
        lines[0] += f" (found by {_label(candidate)})"
    if plan and done.conclusion.startswith("no plan"):
        lines.append("kept all the same: unrefined, the strategy's own set is what was asked for")
    lines.append(
        f"searched {len(done.result.trials)} sets ({done.result.stopped_because}), "
        f"judged {candidate.judged} more in refining; {done.seconds:.0f} s in all"
    )
    if plan:
        lines.append(f"skips {skips(plan, depth)}")
        lines.append(how_it_drafts(profile.draft))
    else:
        lines.append("the profile skips nothing: n-grams found in the text draft, where they pay")
    for each in done.ranges:
        lines.append(
            f"from {each.from_context} tokens of context on skips {skips(each.plan, depth)}"
        )
    if done.check is not None and plan:
        lines.append(
            f"measured without n-grams: {done.check.speedup:.2f}× vanilla, acceptance "
            f"{_share(done.check.acceptance_rate)}, {_number(done.check.tokens_per_step)} tokens "
            f"per step; expected {_times(expected.speedup if expected else None)}"
        )
    if target:
        lines.append(f"wrote {target}")
    return lines


def strategy_table(done: Calibration, depth: int) -> Table:
    """What each of several strategies came to, the chosen one marked."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    heads = ("expected", "measured", "accepted", "tokens/step", "seconds", "full passes")
    for head in ("", "strategy", "skips"):
        table.add_column(head)
    for head in (*heads, "draft passes"):
        table.add_column(head, justify="right")
    for candidate, check in done.others:
        table.add_row(
            "→" if candidate is done.candidate else "",
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
    """A strategy's name, with the target of one that may run with several."""
    target = getattr(candidate.method, "target_speedup", None)
    return candidate.strategy if target is None else f"{candidate.strategy} {target:g}"


def as_document(profile: Profile, done: Calibration, target: Path | None) -> dict[str, Any]:
    """The answer as one JSON document."""
    return {
        "schema_version": 1,
        "path": str(target) if target else None,
        "interrupted": done.interrupted,
        "stopped_because": done.result.stopped_because,
        "conclusion": done.conclusion,
        "profile": profile.model_dump(mode="json", exclude_none=False),
        "candidate": _candidate_json(done.candidate, done.check),
        "refine_judged": done.candidate.judged,
        "strategies": [_candidate_json(each, check) for each, check in done.others],
        "trials": [_trial_json(trial) for trial in done.result.trials],
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


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"
