"""A server from its options: the engine, the application, and uvicorn under both."""

from __future__ import annotations

import copy
import logging
import socket
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import PurePath
from time import time
from typing import TYPE_CHECKING

from conflayers_cli.errors import ConfLayersError, InputError
from conflayers_cli.generation.batch import Batch
from conflayers_cli.generation.generator import TextGenerator
from conflayers_cli.generation.prefix_store import PrefixStore
from conflayers_cli.profile.build_proposer import as_batch_proposer
from conflayers_cli.server.answers import Mailbox
from conflayers_cli.server.app import Service, build_app
from conflayers_cli.server.encoding import Encoder
from conflayers_cli.server.guards import KeyRing, read_keys
from conflayers_cli.server.logprobs import TokenNames
from conflayers_cli.server.metrics import Metrics
from conflayers_cli.server.options import DEFAULT_CONTEXT, ServerOptions
from conflayers_cli.server.scheduler import Scheduler
from conflayers_cli.spec_decode.draft_store import OwnedStores

if TYPE_CHECKING:
    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.models.loaded_model import LoadedModel
    from conflayers_cli.server.http_server import BoundedServer
    from conflayers_cli.spec_decode.proposer import Proposer

logger = logging.getLogger(__name__)


def build_service(
    loaded: LoadedModel, decoder: Decoder, proposer: Proposer | None, options: ServerOptions
) -> Service:
    """What serves a model; the memory for all texts is taken here.

    Raises:
        InputError: the proposer can't be served, or the options don't fit the model.
        ConfLayersError: there is not enough memory.
    """
    settings = loaded.settings
    if settings.ignored:
        logger.warning(
            f"note: {', '.join(settings.ignored)} in the generation config of {loaded.name} is "
            "not followed"
        )
    keys = KeyRing(read_keys(options.api_keys) if options.api_keys else None)
    context = _context(loaded, options)
    metrics = Metrics()
    prefixes = PrefixStore(decoder, options.prefix_cache << 20) if options.prefix_cache else None
    if prefixes is not None:
        metrics.prefix_bytes.set_function(lambda: prefixes.bytes)
    stores = None
    if options.draft_texts:
        stores = OwnedStores(decoder.vocabulary, 1 << options.draft_texts.bit_length() - 1)
    generator = TextGenerator(
        decoder,
        loaded.tokenizer,
        end_tokens=loaded.end_tokens,
        proposer=as_batch_proposer(proposer),
        batch_size=options.batch_size,
        new_batch=partial(Batch, chunk=options.prefill_chunk, reserve=context, prefixes=prefixes),
    )
    mailbox = Mailbox()
    scheduler = Scheduler(
        generator,
        slots=options.batch_size,
        max_waiting=options.queue_size,
        shared=keys.count > 1,
        on_step=metrics.count_step,
        flush=mailbox.flush,
    )
    # The engine's thread decodes with the one tokenizer while another thread encodes with the copy.
    own = replace(loaded, tokenizer=copy.deepcopy(loaded.tokenizer))
    name = options.served_name or PurePath(loaded.name).name
    return Service(
        model=name,
        aliases=frozenset({loaded.name}),
        created=int(time()),
        encoder=Encoder(own, context, options.max_new_tokens, stores),
        scheduler=scheduler,
        mailbox=mailbox,
        metrics=metrics,
        options=options,
        keys=keys,
        names=TokenNames(copy.deepcopy(loaded.tokenizer)),
        end_tokens=loaded.end_tokens,
    )


def _context(loaded: LoadedModel, options: ServerOptions) -> int:
    """Positions of each text."""
    most = loaded.context_length
    if options.context is None:
        return min(most or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if most is not None and options.context > most:
        raise InputError(
            f"context {options.context}: {loaded.name} takes {most:,}", names=("context",)
        )
    return options.context


def serve(service: Service, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, behind which running requests get ``drain`` seconds.

    Args:
        on_ready: called with the address once requests are taken.

    Raises:
        ConfLayersError: the address can't be listened at.
    """
    with listen(service.options) as listening:
        host, port = listening.getsockname()[:2]
        on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        make_server(service).run(sockets=[listening])


def make_server(service: Service) -> BoundedServer:
    """uvicorn's server of the application."""
    import uvicorn

    from conflayers_cli.server.http_server import BoundedServer

    config = uvicorn.Config(
        build_app(service),
        http="h11",  # whose limits are set below
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        ws="none",
        h11_max_incomplete_event_size=64 << 10,
    )
    return BoundedServer(config, service.options, service.scheduler.stop)


def listen(options: ServerOptions) -> socket.socket:
    """A socket at the server's address. Raises ConfLayersError where it can't be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as error:
        raise ConfLayersError(
            f"can't listen at {options.host}:{options.port}: {error.strerror or error}",
            names=("host", "port"),
        ) from error
    return listening
