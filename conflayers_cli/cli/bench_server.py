"""``bench --server``: its options, and its results as a table or JSON."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conflayers_cli.cli.option_groups import OptionGroup
from conflayers_cli.cli.terminal import emit_json, emit_rich
from conflayers_cli.errors import ConfLayersError, InputError

if TYPE_CHECKING:
    from conflayers_cli.bench.server_schema import Percentiles, ServerBenchDocument
    from conflayers_cli.generation.prompts import Prompt
    from conflayers_cli.sampling_params import SamplingParams

_server_option = partial(typer.Option, rich_help_panel="A server's load")
KEY_VARIABLE = "OPENAI_API_KEY"


@dataclass(frozen=True)
class ServerLoadOptions:
    """Options about a load on a server, each as its flag says."""

    server: str | None = None
    clients: list[int] | None = None
    rate: list[float] | None = None
    requests: int | None = None
    server_model: str | None = None

    def check(self) -> None:
        """Raise InputError for options that don't go together."""
        needing = {
            "--clients": self.clients,
            "--rate": self.rate,
            "--requests": self.requests,
            "--server-model": self.server_model,
        }
        for flag, value in needing.items():
            if value is not None and self.server is None:
                raise InputError(f"{flag} goes with --server URL")
        if any(clients < 1 for clients in self.clients or ()):
            raise InputError("--clients: at least 1")
        if any(not rate > 0 for rate in self.rate or ()):
            raise InputError("--rate: over 0")


SERVER_LOAD = OptionGroup(
    server=_server_option(
        "--server",
        metavar="URL",
        help="Load this server, by OpenAI's API, and measure what its clients see: conflayers "
        f"serve, llama.cpp's, vLLM's. A key is taken from {KEY_VARIABLE}.",
    ),
    clients=_server_option(
        "--clients",
        metavar="N",
        help="Requests kept in flight; may be given repeatedly: a load each (1).",
    ),
    rate=_server_option(
        "--rate",
        metavar="R",
        help="Requests a second, whatever the server does; may be given repeatedly: a load each.",
    ),
    requests=_server_option(
        "--requests", min=1, metavar="N", help="Requests of a load (each prompt once)."
    ),
    server_model=_server_option(
        "--server-model", metavar="NAME", help="The model's name there (the first it names)."
    ),
)
ServerLoadFlags = Annotated[ServerLoadOptions, SERVER_LOAD]


def bench_server(
    options: ServerLoadOptions,
    prompts: list[Prompt],
    sampling: SamplingParams,
    max_new_tokens: int,
    *,
    as_json: bool,
    export_json: Path | None,
) -> None:
    """Measure the loads and publish the results.

    Raises:
        ConfLayersError: there is no HTTP client, or the server answers nothing.
    """
    from conflayers_cli.utils.files import write_json
    from conflayers_cli.utils.progress import progress_bar

    try:
        from conflayers_cli.bench.server_load import ServerLoad, measure_server
    except ModuleNotFoundError as error:
        raise ConfLayersError(
            f"bench --server needs {error.name}, which is not installed: "
            "pip install 'conflayers[serve]'"
        ) from None
    load = ServerLoad(
        url=options.server or "",
        prompts=prompts,
        requests=options.requests or len(prompts),
        clients=options.clients or ([] if options.rate else [1]),
        rates=options.rate or [],
        model=options.server_model,
        key=os.environ.get(KEY_VARIABLE),
        max_new_tokens=max_new_tokens,
        temperature=sampling.temperature,
        seed=sampling.seed or 0,
    )
    with progress_bar() as on_progress:
        document = measure_server(load, on_progress)
    if export_json is not None:
        write_json(export_json, document.as_json())
    if as_json:
        emit_json(document.as_json())
    else:
        _show(document)


def _show(document: ServerBenchDocument) -> None:
    from rich.table import Table

    table = Table(title=f"{document.model} at {document.server}", title_justify="left")
    for name in ("load", "tokens/s", "first token", "between chunks", "a token", "accepted"):
        table.add_column(name, justify="left" if name == "load" else "right")
    for load in document.loads:
        several = "s" if load.clients != 1 else ""
        what = f"{load.clients} client{several}" if load.clients else f"{load.rate:g} requests/s"
        failed = f", {load.failed} of {load.requests} failed" if load.failed else ""
        rate = load.acceptance_rate
        table.add_row(
            what + failed,
            f"{load.tokens_per_second:.1f}",
            _milliseconds(load.time_to_first_token_s),
            _milliseconds(load.between_chunks_s),
            _milliseconds(load.per_token_s),
            "–" if rate is None else f"{rate:.1%}",
        )
    emit_rich(table, "milliseconds: median / 95th / 99th percentile\n")


def _milliseconds(figures: Percentiles) -> str:
    values = (figures.p50, figures.p95, figures.p99)
    return " / ".join("–" if value is None else f"{1000 * value:.0f}" for value in values)
