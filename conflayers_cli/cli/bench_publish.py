"""Publishing a bench's results: files, the terminal, a comparison, and gates."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from conflayers_cli.bench.metrics import TOLERANCE, RegressionMetric
from conflayers_cli.cli.flags import in_flags
from conflayers_cli.cli.terminal import emit_json, emit_rich
from conflayers_cli.errors import ConfLayersError, GateError, InputError
from conflayers_cli.utils.distributed import is_first
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
        json, markdown, csv, plot: files.
        github: a folder, for the two files of github-action-benchmark.
        theme: the ground that the picture is for.
    """

    json: Path | None = None
    markdown: Path | None = None
    csv: Path | None = None
    github: Path | None = None
    plot: Path | None = None
    theme: Theme = Theme.LIGHT

    def check(self) -> None:
        """Refuse what can't be written, before any work is done.

        Raises:
            InputError: two results for one file, no such folder, or no matplotlib to draw with.
        """
        files = [path for path in (self.json, self.markdown, self.csv, self.plot) if path]
        for path in files:
            check_target(path)
        places = [path.resolve() for path in files]
        for number, place in enumerate(places):
            if place in places[:number]:
                raise InputError(f"{files[number]}: is to hold two kinds of results; name another")
        if self.github:
            from conflayers_cli.bench.exporters import check_folder

            check_folder(self.github)
        if self.plot:
            check_plot(self.plot)

    def write(self, results: BenchDocument, comparison: Comparison | None) -> list[ConfLayersError]:
        """Write all that can be written; what went wrong with the others."""
        from conflayers_cli.bench.exporters import csv_text, markdown, write_github

        jobs: list[Callable[[], None]] = []
        if self.json:
            jobs.append(partial(write_json, self.json, results.as_json()))
        if self.markdown:
            jobs.append(partial(write_atomically, self.markdown, markdown(results, comparison)))
        if self.csv:
            jobs.append(partial(write_atomically, self.csv, csv_text(results)))
        if self.github:
            jobs.append(partial(write_github, self.github, results))
        if self.plot:
            jobs.append(partial(_draw, self.plot, self.theme, results))
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
        old: an earlier bench to compare with; None: none.
        old_name: its file.
        tolerance: the share by which a metric may be lower than there.
        judged: the metrics that count; None: the usual ones.
    """

    fail_under: float | None = None
    old: BenchDocument | None = None
    old_name: str = ""
    tolerance: float = TOLERANCE
    judged: Sequence[RegressionMetric] | None = None

    @classmethod
    def read(
        cls,
        fail_under: float | None,
        old: Path | None,
        tolerance: float | None,
        judged: Sequence[RegressionMetric] | None,
    ) -> Gates:
        """As the command line says; reads the earlier bench, before any work is done.

        Raises:
            InputError: it can't be read, or there is none although something is said about it.
        """
        if old is None:
            for flag, given in (("--tolerance", tolerance is not None), ("--judge", judged)):
                if given:
                    raise InputError(f"{flag} is about --compare FILE, which is not given")
            return cls(fail_under)
        from conflayers_cli.bench.load import load_document

        tolerance = TOLERANCE if tolerance is None else tolerance
        return cls(fail_under, load_document(old), str(old), tolerance, judged or None)

    def check(self, context: BenchContext, prompt_hashes: Sequence[str]) -> None:
        """Refuse to measure what can't be compared then; raises InputError."""
        if self.old is None:
            return
        from conflayers_cli.bench.regression import check_comparable

        check_comparable(self.old, self.old_name, context, prompt_hashes)

    def compare(self, results: BenchDocument) -> Comparison | None:
        """With the earlier bench, if there is one; raises InputError as `compare`."""
        if self.old is None:
            return None
        from conflayers_cli.bench.regression import compare

        return compare(
            results,
            self.old,
            self.old_name,
            tolerance=self.tolerance,
            judged=self.judged,
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
        comparison = gates.compare(results)
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
    if broken and is_first():  # the others' clocks say something else
        raise GateError("; ".join(map(in_flags, broken)))


def _draw(path: Path, theme: Theme, results: BenchDocument) -> None:
    from conflayers_cli.bench.plots import bench_figure

    save_plot(path, theme, partial(bench_figure, results))
