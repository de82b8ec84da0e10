"""Options of ``conflayers bench`` alone, as annotated types for Typer."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from conflayers_cli.bench.metrics import RegressionMetric
from conflayers_cli.errors import InputError
from conflayers_cli.utils.plotting import Theme

_EXPORTS = "Results"
_GATES = "Gates (exit code 3)"


class Baseline(Enum):
    """Hugging Face baselines (see `bench.hf_baselines.HF_BASELINES`)."""

    TRANSFORMERS = "transformers"
    STATIC = "transformers-static"
    PROMPT_LOOKUP = "prompt-lookup"
    EARLY_EXIT = "early-exit"


Runs = Annotated[
    int, typer.Option("--runs", min=1, metavar="N", help="How often each prompt is decoded.")
]
Warmup = Annotated[
    int,
    typer.Option("--warmup", min=0, metavar="N", help="Decodings of each arm that don't count."),
]
Against = Annotated[
    list[Baseline] | None,
    typer.Option(
        "--against",
        help="Measure model.generate of transformers, too: plain, with a static cache, with prompt "
        "lookup (10 tokens), or drafting by an early exit at half the depth; may be given "
        "repeatedly.",
        show_default=False,
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(
        "--batch-size",
        min=1,
        metavar="N",
        help="Prompts decoded at once, in both arms; one that ends makes room for the next.",
    ),
]
TargetSpeedup = Annotated[
    float | None,
    typer.Option(
        "--target-speedup",
        metavar="S",
        help="Measure, too, the model with its depth over S layers kept for good (lossy: not the "
        "model's own text). Without --profile these layers draft as well.",
        show_default=False,
    ),
]
Stored = Annotated[
    Path | None,
    typer.Option(
        "--from",
        metavar="FILE",
        help="Measure nothing: show, export, draw and compare the results in this JSON file.",
        rich_help_panel=_EXPORTS,
    ),
]
ExportJson = Annotated[
    Path | None,
    typer.Option(
        "--export-json",
        "--output",
        "-o",
        metavar="FILE",
        help="Write the results there as JSON: what --json prints, and --from and --compare read.",
        rich_help_panel=_EXPORTS,
    ),
]
ExportMarkdown = Annotated[
    Path | None,
    typer.Option(
        "--export-markdown",
        metavar="FILE",
        help="Write the tables there as Markdown. In a GitHub job they go to its summary, too.",
        rich_help_panel=_EXPORTS,
    ),
]
ExportCsv = Annotated[
    Path | None,
    typer.Option(
        "--export-csv",
        metavar="FILE",
        help="Write a line for every prompt, arm and run there.",
        rich_help_panel=_EXPORTS,
    ),
]
ExportGithub = Annotated[
    Path | None,
    typer.Option(
        "--export-github",
        metavar="FOLDER",
        help="Write customBiggerIsBetter.json and customSmallerIsBetter.json there, each for that "
        "tool of github-action-benchmark.",
        rich_help_panel=_EXPORTS,
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        metavar="FILE",
        help="Draw the results there, as .png, .svg or .pdf (needs matplotlib).",
        rich_help_panel=_EXPORTS,
    ),
]


PlotTheme = Annotated[
    Theme,
    typer.Option(
        "--plot-theme", help="The ground that the picture is for.", rich_help_panel=_EXPORTS
    ),
]
FailUnder = Annotated[
    float | None,
    typer.Option(
        "--fail-under",
        min=0.0,
        metavar="X",
        help="Fail if the speed-up is under X.",
        rich_help_panel=_GATES,
    ),
]
Compare = Annotated[
    Path | None,
    typer.Option(
        "--compare",
        metavar="FILE",
        help="Compare with an earlier --export-json of the same model and prompts, and fail if a "
        "figure is a regression: lower by more than --tolerance, and surely lower (the 95 % "
        "interval of new/old, prompt by prompt, is below 1).",
        rich_help_panel=_GATES,
    ),
]


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


Tolerance = Annotated[
    float | None,
    typer.Option(
        "--tolerance",
        parser=_share,
        metavar="SHARE",
        help="By how much a figure may be lower than in --compare, as 5% or 0.05.",
        show_default="5%",
        rich_help_panel=_GATES,
    ),
]


Judge = Annotated[
    list[RegressionMetric] | None,
    typer.Option(
        "--judge",
        help="What --compare fails by: the speed-up over vanilla, the share of accepted drafts, or "
        "tokens/s (on the same machine only); may be given repeatedly. By default the speed-up "
        "and, with --no-adaptive-draft-length, acceptance.",
        rich_help_panel=_GATES,
        show_default=False,
    ),
]
