"""``conflayers doctor``: whether all works here, in a form to paste into an issue."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conflayers_cli.cli import options
from conflayers_cli.cli.terminal import emit, emit_json
from conflayers_cli.errors import ConfLayersError
from conflayers_cli.utils.notices import one_line
from conflayers_cli.utils.progress import progress_bar

if TYPE_CHECKING:
    from conflayers_cli.doctor.check_result import CheckResult

SCHEMA_VERSION = 1


def doctor(json: options.Json = False) -> None:
    """Look whether all works on this machine: versions, devices, files, decoding.

    A tiny random model is decoded plainly and with drafts, and on a GPU in every
    way there is. What is printed can be pasted into an issue: it names no home.
    The exit code is 1 when something that should work does not.

    \b
      conflayers doctor
      conflayers doctor --json
    """
    from conflayers_cli.doctor.checks import run_checks

    with progress_bar() as on_progress:
        findings = run_checks(on_progress)
    problems = [finding.problem for finding in findings if finding.problem]
    if json:
        found = [finding.as_json() for finding in findings]
        emit_json({"schema_version": SCHEMA_VERSION, "well": not problems, "findings": found})
    else:
        emit(_report(findings))
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ConfLayersError(f"{count} found: {'; '.join(problems)}")


def _report(findings: list[CheckResult]) -> str:
    """Markdown that is plain text, too."""
    lines = []
    for section in dict.fromkeys(finding.section for finding in findings):
        lines.append(f"**{section}**")
        for finding in findings:
            if finding.section == section:
                lines.append(f"- {finding.name}: {one_line(finding.message)}")
                if finding.problem:
                    lines.append(f"  - PROBLEM: {one_line(finding.problem)}")
                if finding.advice:
                    lines.append(f"  - advice: {one_line(finding.advice)}")
        lines.append("")
    well = not any(finding.problem for finding in findings)
    lines.append("all is well" if well else "not all is well, see PROBLEM")
    return "\n".join(lines) + "\n"
