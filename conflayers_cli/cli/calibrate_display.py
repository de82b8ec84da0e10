"""What ``calibrate`` shows while it works (stderr) and says in the end."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from conflayers_cli.cli.terminal import note, stderr_console
from conflayers_cli.engine.plan import SkipPlan
from conflayers_cli.profile import Profile
from conflayers_cli.search.calibrate import Calibration
from conflayers_cli.search.objective import Score
from conflayers_cli.search.task import Trial

ROWS = 12
"""Latest trials kept in view."""


class Display:
    """A live table on a terminal; elsewhere a line per stage and per improvement."""

    def __init__(self, depth: int, max_iterations: int) -> None:
        self._depth = depth
        self._max_iterations = max_iterations
        self._rows: list[tuple[str, ...]] = []
        self._stage = ""
        self._best = ""
        console = stderr_console()
        self._live = Live(console=console, transient=False) if console.is_terminal else None

    def __enter__(self) -> Display:
        if self._live:
            self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.__exit__(kind, error, trace)

    def stage(self, name: str) -> None:
        """What begins."""
        self._stage = name
        if self._live is None:
            note(f"{name} …")
        self._redraw()

    def trial(self, trial: Trial, best: Trial | None) -> None:
        """A set of layers was looked at during the search."""
        row = (
            f"{trial.iteration + 1}/{self._max_iterations}",
            f"{trial.figures.get('lambda', 0.0):+.2f}",
            _skipped(trial.plan, self._depth),
            _share(trial.acceptance_rate),
            _number(trial.tokens_per_step),
            _times(trial.speedup),
            trial.note,
        )
        self._rows.append(row)
        if best is not None and best is trial:
            self._best = f"best so far: {row[2]} skipped, {row[4]} tokens per step, {row[5]}"
            if self._live is None:
                note(f"set {row[0]}, λ {row[1]}: {self._best} expected")
        self._redraw()

    def better(self, score: Score, judged: int) -> None:
        """Refinement found a better plan."""
        self._best = (
            f"refined after {judged} sets judged: {_skipped(score.plan, self._depth)} skipped, "
            f"agreement {_share(score.agreement)}, {_times(score.speedup)}"
        )
        if self._live is None:
            note(f"{self._best} expected")
        self._redraw()

    def _redraw(self) -> None:
        if self._live is None:
            return
        table = Table(title=Text(self._stage), caption=Text(self._best), caption_justify="left")
        for head in ("set", "λ", "skipped", "accepted", "tokens/step", "expected", ""):
            table.add_column(head, justify="left" if head in ("", "skipped") else "right")
        for row in self._rows[-ROWS:]:
            table.add_row(*map(Text, row))
        self._live.update(table, refresh=True)


def summary_lines(profile: Profile, done: Calibration, target: Path) -> list[str]:
    """The answer for people."""
    plan, depth = profile.plan, profile.model.depth
    lines = [
        f"{profile.model.name}: {done.conclusion}",
        f"searched {len(done.result.trials)} sets ({done.result.stopped_because}), "
        f"judged {done.judged} more in refining, in {done.seconds:.0f} s",
    ]
    if plan:
        lines.append(f"skips {_skipped(plan, depth)}: {_names(plan)}")
        lines.append(
            f"drafts up to {profile.draft.max_tokens} tokens, "
            f"stops under probability {profile.draft.stop_probability:g}"
        )
    else:
        lines.append("the profile skips nothing: generate with it decodes plainly")
    if done.check is not None and plan:
        lines.append(
            f"measured: {done.check.speedup:.2f}× vanilla, acceptance "
            f"{_share(done.check.acceptance_rate)}, {_number(done.check.tokens_per_step)} tokens "
            f"per step; expected {_times(done.expected.speedup if done.expected else None)}"
        )
    lines.append(f"wrote {target}")
    return lines


def as_document(profile: Profile, done: Calibration, target: Path) -> dict[str, Any]:
    """The answer as one JSON document."""
    return {
        "schema_version": 1,
        "path": str(target),
        "interrupted": done.interrupted,
        "stopped_because": done.result.stopped_because,
        "conclusion": done.conclusion,
        "profile": profile.model_dump(mode="json", exclude_none=False),
        "candidate": {"attention": done.candidate.attention, "mlp": done.candidate.mlp},
        "refine_judged": done.judged,
        "trials": [_trial_json(trial) for trial in done.result.trials],
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


def _skipped(plan: SkipPlan, depth: int) -> str:
    text = f"{len(plan.layers)} of {depth} layers"
    if plan.partial:
        text += f" and {len(plan.partial)} single sub-layers"
    return text


def _names(plan: SkipPlan) -> str:
    whole = set(plan.layers)
    parts = [" ".join(map(str, plan.layers))] if whole else []
    for name, indices in (("attention", plan.attention), ("mlp", plan.mlp)):
        single = [i for i in indices if i not in whole]
        if single:
            parts.append(f"{name} of {' '.join(map(str, single))}")
    return ", ".join(parts)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"
