"""Publishing a bench's results: files, the terminal, a comparison, and gates."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from conflayers_cli.bench.metrics import TOLERANCE, RegressionMetric
from conflayers_cli.cli.flags import in_flags
from conflayers_cli.cli.terminal import emit_json, emit_rich
from conflayers_cli.errors import ConfLayersError, GateError, InputError
from conflayers_cli.utils.distributed import is_rank0
from conflayers_cli.utils.files import check_target, write_atomically, write_json
from conflayers_cli.utils.plotting import Theme, check_plot, save_plot

if TYPE_CHECKING:
    from conflayers_cli.bench.comparison import Comparison
    from conflayers_cli.bench.schema import BenchContext, BenchDocument

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exports:
    """Where the results go beside stdout; None: not there.

    Attributes:
        export_json, export_markdown, export_csv, plot: files.
        export_github: a folder, for the two files of github-action-benchmark.
        plot_theme: the ground that the picture is for.
    """

    export_json: Path | None = None
    export_markdown: Path | None = None
    export_csv: Path | None = None
    export_github: Path | None = None
    plot: Path | None = None
    plot_theme: Theme = Theme.LIGHT

    def check(self) -> None:
        """Refuse what can't be written, before any work is done.

        Raises:
            InputError: two results for one file, no such folder, or no matplotlib to draw with.
        """
        named = (self.export_json, self.export_markdown, self.export_csv, self.plot)
        files = [path for path in named if path]
        for path in files:
            check_target(path)
        seen: set[Path] = set()
        for path in files:
            if path.resolve() in seen:
                raise InputError(f"{path}: is to hold two kinds of results; name another")
            seen.add(path.resolve())
        if self.export_github:
            from conflayers_cli.bench.exporters import check_folder

            check_folder(self.export_github)
        if self.plot:
            check_plot(self.plot)

    def write(self, results: BenchDocument, comparison: Comparison | None) -> list[ConfLayersError]:
        """Write everything that can be written; returns the failures."""
        from conflayers_cli.bench.exporters import csv_text, markdown, write_github
        from conflayers_cli.bench.plots import bench_figure

        jobs: list[Callable[[], None]] = []
        if self.export_json:
            jobs.append(partial(write_json, self.export_json, results.as_json()))
        if self.export_markdown:
            text = markdown(results, comparison)
            jobs.append(partial(write_atomically, self.export_markdown, text))
        if self.export_csv:
            jobs.append(partial(write_atomically, self.export_csv, csv_text(results)))
        if self.export_github:
            jobs.append(partial(write_github, self.export_github, results))
        if self.plot:
            draw = partial(bench_figure, results)
            jobs.append(partial(save_plot, self.plot, self.plot_theme, draw))
        failures = []
        for job in jobs:
            try:
                job()
            except ConfLayersError as error:
                failures.append(error)
        return failures


@dataclass(frozen=True)
class Gates:
    """What has to hold for the command to end with code 0.

    Attributes:
        fail_under: the least speed-up over vanilla; None: any.
        compare: an earlier bench to compare with; None: none.
        tolerance: the share by which a metric may be lower than there.
        judge: the metrics that count; None: the usual ones.
    """

    fail_under: float | None = None
    compare: Path | None = None
    tolerance: float | None = None
    judge: list[RegressionMetric] | None = None

    @cached_property
    def earlier(self) -> BenchDocument | None:
        """The bench to compare with. InputError: it can't be read."""
        from conflayers_cli.bench.load import load_document

        return load_document(self.compare) if self.compare else None

    def check(self) -> None:
        """Read the earlier bench, before any work is done.

        Raises:
            InputError: it can't be read, or there is none although something is said about it.
        """
        about_comparing = {"--tolerance": self.tolerance is not None, "--judge": self.judge}
        for flag, given in about_comparing.items():
            if given and self.earlier is None:
                raise InputError(f"{flag} is about --compare FILE, which is not given")
        _ = self.earlier

    def check_comparable(self, context: BenchContext, prompt_hashes: Sequence[str]) -> None:
        """Raise InputError where what is to be measured can't be compared then."""
        if self.earlier is not None:
            from conflayers_cli.bench.regression import check_comparable

            check_comparable(self.earlier, str(self.compare), context, prompt_hashes)

    def comparison(self, results: BenchDocument) -> Comparison | None:
        """With the earlier bench, if there is one; raises InputError as `compare`."""
        if self.earlier is None:
            return None
        from conflayers_cli.bench.regression import compare

        return compare(
            results,
            self.earlier,
            str(self.compare),
            tolerance=TOLERANCE if self.tolerance is None else self.tolerance,
            judged=self.judge or None,
        )


def publish(results: BenchDocument, exports: Exports, gates: Gates, *, as_json: bool) -> None:
    """Write, show and judge a bench's results, in this order.

    Whatever fails, the results are out first: a comparison that can't be made, or a file that can't
    be written, costs nothing but itself.

    Args:
        results: just measured, or read from a file.
        exports: where they go beside stdout.
        gates: what has to hold.
        as_json: print the document in place of tables.

    Raises:
        InputError: they can't be compared with the earlier ones.
        ConfLayersError: something could not be written.
        GateError: a gate does not hold.
    """
    from conflayers_cli.bench.exporters import append_step_summary, markdown
    from conflayers_cli.bench.regression import broken_gates
    from conflayers_cli.bench.tables import bench_tables

    failures: list[ConfLayersError] = []
    comparison = None
    try:
        comparison = gates.comparison(results)
    except InputError as error:
        failures.append(error)
    if comparison:
        results = results.model_copy(update={"comparison": comparison.as_json()})
    failures += exports.write(results, comparison)
    try:
        append_step_summary(markdown(results, comparison))
    except ConfLayersError as error:
        logger.warning(f"note: {error}", extra={"names": error.names})
    try:
        if as_json:
            emit_json(results.as_json())
        else:
            emit_rich(*bench_tables(results, comparison))
    except ConfLayersError as error:
        failures.append(error)
    broken = broken_gates(results, gates.fail_under, comparison)
    if failures:
        for message in map(in_flags, (*failures[1:], *broken)):
            logger.error(f"error: {message}")
        raise failures[0]
    if broken and is_rank0():  # the others' clocks say something else
        raise GateError("; ".join(map(in_flags, broken)))
