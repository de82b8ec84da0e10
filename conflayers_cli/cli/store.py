"""``conflayers store``: files of texts to draft from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from conflayers_cli.cli import options
from conflayers_cli.cli.terminal import emit, emit_json
from conflayers_cli.errors import InputError

logger = logging.getLogger(__name__)

HELP = """Build, show and shorten files of texts to draft from.

generate and chat take such a file as --draft-store, and add to it. What is in
it changes how fast a text comes, never the text. It holds prompts and answers
as token ids: keep it as you keep those.

\b
  conflayers store build code.safetensors --model smollm2 src/*.py
  conflayers generate "Add a docstring: ..." --draft-store code.safetensors
  conflayers store show code.safetensors
"""

app = typer.Typer(
    name="store",
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
)
StoreArgument = Annotated[
    Path, typer.Argument(metavar="STORE", help="A draft store.", show_default=False)
]


@app.command()
def build(
    store: StoreArgument,
    texts: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Texts in UTF-8.", show_default=False)
    ],
    model: options.Model = None,
) -> None:
    """Add texts to a store, which is made if it is not there.

    \b
      conflayers store build code.safetensors --model smollm2 src/*.py
    """
    from conflayers_cli.engine.open_model import open_model
    from conflayers_cli.models.load_options import LoadOptions
    from conflayers_cli.spec_decode.open_store import OpenStore

    if model is None:
        raise InputError("whose tokens? give --model MODEL")
    loaded, decoder = open_model(model, LoadOptions())
    with OpenStore(loaded.tokenizer, decoder.vocabulary, store, texts) as opened:
        held = len(opened.store.tokens())
    logger.info(f"{store}: holds {held:,} tokens")


@app.command()
def show(store: StoreArgument, json: options.Json = False) -> None:
    """Say how much a store holds, and for which tokenizer.

    \b
      conflayers store show code.safetensors
    """
    from conflayers_cli.spec_decode.store_file import StoredTexts

    found = StoredTexts.read(store)
    if json:
        emit_json(
            {
                "file": str(store),
                "tokens": len(found.tokens),
                "texts": found.num_texts,
                "tokenizer_sha256": found.tokenizer,
            }
        )
        return
    emit(
        f"{len(found.tokens):,} tokens of {found.num_texts:,} texts\n"
        f"tokenizer {found.tokenizer[:12]}…\n"
    )


@app.command()
def prune(
    store: StoreArgument,
    tokens: Annotated[
        int, typer.Option("--tokens", min=0, metavar="N", help="Tokens kept, the latest ones.")
    ],
) -> None:
    """Drop the earliest texts of a store.

    \b
      conflayers store prune code.safetensors --tokens 100000
    """
    from conflayers_cli.spec_decode.store_file import StoredTexts, locked

    with locked(store):
        found = StoredTexts.read(store)
        kept = found.latest(tokens)
        if len(kept.tokens) < len(found.tokens):
            kept.write(store)
    logger.info(f"{store}: {len(found.tokens):,} tokens, now {len(kept.tokens):,}")
