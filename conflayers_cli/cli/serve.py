"""``conflayers serve``: OpenAI's API over a model that drafts for itself."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import Annotated

import typer

from conflayers_cli.cli import options
from conflayers_cli.cli.common import load_profile, model_source
from conflayers_cli.cli.option_groups import OptionGroup, with_groups
from conflayers_cli.engine.open_model import open_model
from conflayers_cli.errors import ConfLayersError, InputError
from conflayers_cli.search.open_proposer import open_proposer
from conflayers_cli.server.options import ServerOptions
from conflayers_cli.utils.distributed import world

logger = logging.getLogger(__name__)

_server_option = partial(typer.Option, rich_help_panel="Server")
_limit_option = partial(typer.Option, rich_help_panel="Limits")

SERVER = OptionGroup(
    host=_server_option(
        "--host", metavar="ADDRESS", help="Where to listen: by default this machine alone."
    ),
    port=_server_option("--port", metavar="PORT", help="0: a free one."),
    served_name=_server_option(
        "--served-name", metavar="NAME", help="The model's name to clients.", show_default=False
    ),
    api_keys=_server_option(
        "--api-key-file",
        metavar="FILE",
        help="Keys, one a line: only who sends one is answered. Keys share no prefix cache and "
        "no drafts.",
        show_default=False,
    ),
    cors_origins=_server_option(
        "--cors-origin",
        metavar="URL",
        help="A site whose pages may use the server (* for all); may be given repeatedly.",
    ),
    batch_size=_limit_option("--batch-size", min=1, metavar="N", help="Texts decoded at once."),
    queue_size=_limit_option(
        "--queue-size",
        min=0,
        metavar="N",
        help="Texts that may wait; beyond, clients are told when to come again (429).",
    ),
    context=_limit_option(
        "--context",
        min=2,
        metavar="N",
        help="Tokens of each text, prompt and answer together, for which memory is set aside at "
        "the start; by default the model's, but no more than 8192.",
    ),
    max_new_tokens=_limit_option(
        "--max-new-tokens", "-n", min=1, metavar="N", help="The most tokens of an answer."
    ),
    max_texts=_limit_option(
        "--max-texts", min=1, metavar="N", help="Texts of one request: prompts times n."
    ),
    max_body=_limit_option("--max-body", min=1, metavar="BYTES", help="The largest request."),
    timeout=_limit_option("--timeout", metavar="SECONDS", help="The most a request may take."),
    drain=_limit_option(
        "--drain", min=0, metavar="SECONDS", help="What running requests get after SIGTERM."
    ),
    prefill_chunk=_limit_option(
        "--prefill-chunk",
        min=1,
        metavar="N",
        help="Prompt tokens read at once between two steps of the other texts.",
    ),
    prefix_cache=_limit_option(
        "--prefix-cache",
        min=0,
        metavar="MIB",
        help="Memory for what was read of earlier texts; 0: every prompt is read whole.",
    ),
    draft_texts=_limit_option(
        "--draft-texts",
        min=0,
        metavar="TOKENS",
        help="Tokens kept of each API key's earlier texts, from which n-grams draft, too "
        "(36 bytes each; of the last 64 keys); 0: none. Rounded down to a power of two.",
    ),
)
ServerFlags = Annotated[ServerOptions, SERVER]


@with_groups
def serve(
    *,
    profile: options.ProfileFile = None,
    model: options.Model = None,
    server: ServerFlags,
    drafting: options.DraftFlags,
    force: options.Force = False,
    load: options.LoadFlags,
) -> None:
    """Serve a model by OpenAI's API; it drafts for itself, and answers are its own.

    With a profile it drafts as that says; without one it finds out what pays.
    Clients give the address with /v1 as their base URL; / is a page to chat on.
    SIGTERM and Ctrl-C end it once running requests have ended. Needs the extra
    serve: pip install '.[serve]'.

    \b
      conflayers serve --profile deep.yaml
      conflayers serve -m smollm2 --port 9000 --api-key-file keys.txt
    """
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfLayersError(
            f"serve needs {error.name}, which is not installed: pip install 'conflayers[serve]'"
        ) from None
    if world().size > 1:
        raise InputError("serve runs in one process, not under torchrun")
    found = load_profile(profile)
    source = model_source(model, found)
    drafting = replace(drafting, batch_size=server.batch_size)
    drafting.check(profile)
    loaded, decoder = open_model(source, load)
    proposer = open_proposer(loaded, decoder, found, profile, force, drafting)

    from conflayers_cli.server import run

    if not drafting.by_ngrams:
        server = replace(server, draft_texts=0)
    service = run.build_service(loaded, decoder, proposer, server)
    run.serve(
        service,
        lambda address: logger.info(
            f"{service.model} on {loaded.device_label}: {address}/v1 (a page to chat: {address}/)"
        ),
    )
