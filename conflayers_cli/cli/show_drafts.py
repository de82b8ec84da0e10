"""``--show-drafts``: tokens coloured by who drafted them, as on the server's page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from conflayers_cli.cli.terminal import emit_styled

if TYPE_CHECKING:
    from conflayers_cli.generation.response import GenerationResponse

ShowDrafts = Annotated[
    bool,
    typer.Option(
        "--show-drafts",
        help="Colour the text on a terminal: green drafted by the model itself, yellow by n-grams, "
        "cyan by earlier texts, plain what the whole model decided without a draft.",
    ),
]
STYLES = {"ngram": "yellow", "store": "cyan"}
DRAFTED = "green"


def emit_drafts(response: GenerationResponse) -> None:
    """Write what a step made certain of a text, each token in the colour of who drafted it."""
    by = response.step.drafters if response.step else ()
    styles = [None if name == "model" else STYLES.get(name, DRAFTED) for name in by]
    styles += [None] * (len(response.pieces) - len(styles))
    pieces = zip(response.pieces, styles, strict=False)
    emit_styled([(piece, style) for piece, style in pieces if piece])
