"""``conflayers chat``: a conversation with a model, which reads only what is new of it."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from conflayers_cli.cli import options
from conflayers_cli.cli.chat_input import Line, from_stdin, from_terminal, read_message
from conflayers_cli.cli.chat_session import Session
from conflayers_cli.cli.common import load_profile, model_source
from conflayers_cli.cli.flags import in_flags
from conflayers_cli.cli.generate_options import Stats
from conflayers_cli.cli.option_groups import with_groups
from conflayers_cli.cli.show_drafts import ShowDrafts
from conflayers_cli.cli.store_options import StoreFlags, StoreSession
from conflayers_cli.cli.text_options import TextFlags
from conflayers_cli.engine.open_model import open_model
from conflayers_cli.errors import InputError
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.search.open_proposer import open_proposer
from conflayers_cli.utils.distributed import world
from conflayers_cli.utils.notices import print_notice
from conflayers_cli.utils.progress import is_terminal

logger = logging.getLogger(__name__)

MaxNewTokens = Annotated[
    int,
    typer.Option("--max-new-tokens", "-n", min=1, metavar="N", help="Most tokens of an answer."),
]
SamplingFlags = Annotated[
    SamplingParams,
    options.SAMPLING.but(
        seed=typer.Option(
            "--seed",
            min=0,
            max=options.MAX_SEED,
            metavar="N",
            help="Seed of sampling. Drawn if not given.",
            rich_help_panel="Sampling",
        )
    ),
]
System = Annotated[
    str | None,
    typer.Option("--system", metavar="TEXT", help="A system message, put first."),
]


@with_groups
def chat(
    *,
    profile: options.ProfileFile = None,
    model: options.Model = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = 1024,
    text: TextFlags,
    stats: Stats = False,
    show_drafts: ShowDrafts = False,
    sampling: SamplingFlags,
    drafting: options.DraftFlags,
    storing: StoreFlags,
    force: options.Force = False,
    load: options.LoadFlags,
) -> None:
    """Talk with a model; each answer is the very one that the whole model would give.

    What was read and said before stays in the cache, so a turn begins at once.
    /help lists the commands in it. Lines that are piped in are messages, too.

    \b
      conflayers chat --profile deep.yaml
      conflayers chat -m smollm2 --draft ngram --temperature 0.7 --stats
      printf 'Hi!\\nAnd you?\\n' | conflayers chat -m smollm2 -n 64
    """
    if world().size > 1:
        raise InputError("chat runs in one process, not under torchrun: generate takes --data")
    stop, template = text.read_stops(), text.read_template()
    found = load_profile(profile)
    source = model_source(model, found)
    sampling.note_unused()
    drafting.check(profile)
    storing.check(drafting, found)
    interactive = is_terminal(sys.stdin)
    line = from_terminal() if interactive else from_stdin()
    loaded, decoder = open_model(source, load)
    if not loaded.has_chat_template:
        raise InputError(f"{loaded.name} has no chat template: generate continues plain text")
    stored = StoreSession(storing, several=drafting.by_ngrams)
    store = stored.begin(loaded, decoder)
    proposer = open_proposer(loaded, decoder, found, profile, force, drafting)

    from conflayers_cli.generation.generator import TextGenerator
    from conflayers_cli.generation.prefix_cache import PrefixCache
    from conflayers_cli.generation.request import with_seed

    generator = TextGenerator(
        decoder,
        loaded.tokenizer,
        end_tokens=loaded.end_tokens,
        proposer=proposer,
        begin=PrefixCache(decoder, loaded.context_length).begin,
        keep_special=text.keep_special_tokens,
        store=store,
    )
    session = Session(
        loaded=loaded,
        generator=generator,
        sampling=with_seed(sampling),
        stop=tuple(stop or ()),
        max_new_tokens=max_new_tokens,
        system=system,
        template=template,
        interactive=interactive,
        show_drafts=show_drafts,
    )
    try:
        _converse(session, line, stats=stats)
    finally:
        stored.end()


def _converse(session: Session, line: Line, *, stats: bool) -> None:
    """Handle messages and commands until they end."""
    if session.interactive:
        where = f"{session.loaded.name} on {session.loaded.device_label}"
        logger.info(f"{where}; /help lists what there is beside messages")
    while (text := read_message(line)) is not None:
        try:
            before = session.latest
            if not session.handle(text):
                break
            if stats and session.latest not in (before, None):
                session.print_stats()
        except InputError as error:
            if not session.interactive:
                raise
            print_notice(f"error: {in_flags(error)}")
