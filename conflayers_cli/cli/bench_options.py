"""Options of ``bench`` alone, and which of them go together."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from conflayers_cli.cli.bench_publish import Exports, Gates
from conflayers_cli.cli.option_groups import OptionGroup
from conflayers_cli.errors import InputError
from conflayers_cli.skip_plan import check_target_speedup

_export_option = partial(typer.Option, rich_help_panel="Results")
_gate_option = partial(typer.Option, rich_help_panel="Gates (exit code 3)")


class Baseline(Enum):
    """Hugging Face baselines (see `bench.hf_baselines.HF_BASELINES`)."""

    TRANSFORMERS = "transformers"
    STATIC = "transformers-static"
    PROMPT_LOOKUP = "prompt-lookup"
    EARLY_EXIT = "early-exit"


@dataclass(frozen=True)
class MeasureOptions:
    """Options about measuring, each as its flag says."""

    runs: int = 3
    warmup: int = 1
    against: list[Baseline] | None = None
    target_speedup: float | None = None

    def check(self, profile: Path | None, model: str | None, batch_size: int) -> None:
        """Raise InputError where there is nothing to measure, or options don't go together."""
        target = self.target_speedup
        if profile is None and model is None:
            raise InputError(
                "give --profile FILE or --model MODEL, or --from FILE; see "
                "'conflayers bench --help'"
            )
        check_target_speedup(target)
        if batch_size == 1:
            return
        given = {"--against": bool(self.against), "--target-speedup": target is not None}
        for flag in (flag for flag, wanted in given.items() if wanted):
            raise InputError(f"{flag} is for one prompt at a time: leave --batch-size out")


BatchSize = Annotated[
    int,
    typer.Option(
        "--batch-size",
        min=1,
        metavar="N",
        help="Prompts decoded at once, in both arms; one that ends makes room for the next.",
    ),
]
MEASURE = OptionGroup(
    runs=typer.Option("--runs", min=1, metavar="N", help="How often each prompt is decoded."),
    warmup=typer.Option(
        "--warmup", min=0, metavar="N", help="Warm-up runs of each arm, not counted."
    ),
    against=typer.Option(
        "--against",
        help="Measure model.generate of transformers, too: plain, with a static cache, with prompt "
        "lookup (10 tokens), or drafting by an early exit at half the depth; may be given "
        "repeatedly.",
    ),
    target_speedup=typer.Option(
        "--target-speedup",
        metavar="S",
        help="Measure, too, the model with its depth over S layers kept for good (lossy: not the "
        "model's own text). Without --profile these layers draft as well.",
    ),
)
MeasureFlags = Annotated[MeasureOptions, MEASURE]
Stored = Annotated[
    Path | None,
    _export_option(
        "--from",
        metavar="FILE",
        help="Measure nothing: show, export, draw and compare the results in this JSON file.",
    ),
]
EXPORTS = OptionGroup(
    export_json=_export_option(
        "--export-json",
        "--output",
        "-o",
        metavar="FILE",
        help="Write the results there as JSON: what --json prints, and --from and --compare read.",
    ),
    export_markdown=_export_option(
        "--export-markdown",
        metavar="FILE",
        help="Write the tables there as Markdown. In a GitHub job they go to its summary, too.",
    ),
    export_csv=_export_option(
        "--export-csv", metavar="FILE", help="Write a line for every prompt, arm and run there."
    ),
    export_github=_export_option(
        "--export-github",
        metavar="FOLDER",
        help="Write customBiggerIsBetter.json and customSmallerIsBetter.json there, each for that "
        "tool of github-action-benchmark.",
    ),
    plot=_export_option(
        "--plot",
        metavar="FILE",
        help="Draw the results there, as .png, .svg or .pdf (needs matplotlib).",
    ),
    plot_theme=_export_option("--plot-theme", help="The page that the picture is for."),
)
ExportFlags = Annotated[Exports, EXPORTS]


def _share(text: str) -> float:
    """ "5%" or "0.05" as a number."""
    digits, percent, rest = text.strip().partition("%")
    try:
        share = float(digits) / (100 if percent else 1)
    except ValueError:
        share = -1.0
    if rest or not 0 <= share < 1:
        raise InputError(f"--tolerance {text}: give a share under 1, as 5% or 0.05")
    return share


GATES = OptionGroup(
    fail_under=_gate_option(
        "--fail-under", min=0.0, metavar="X", help="Fail if the speed-up is under X."
    ),
    compare=_gate_option(
        "--compare",
        metavar="FILE",
        help="Compare with an earlier --export-json of the same model and prompts, and fail if a "
        "figure is a regression: lower by more than --tolerance, and surely lower (the 95 % "
        "interval of new/old, prompt by prompt, is below 1).",
    ),
    tolerance=_gate_option(
        "--tolerance",
        parser=_share,
        metavar="SHARE",
        help="By how much a figure may be lower than in --compare, as 5% or 0.05.",
        show_default="5%",
    ),
    judge=_gate_option(
        "--judge",
        help="What --compare fails by: the speed-up over vanilla, the acceptance rate, or tokens/s "
        "(on the same machine only); may be given repeatedly. By default the speed-up "
        "and, with --no-adaptive-draft-length, acceptance.",
    ),
)
GateFlags = Annotated[Gates, GATES]
