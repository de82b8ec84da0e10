"""``conflayers generate``: text from a model, drafted and checked by itself."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conflayers_cli.cli import adapt as adapting
from conflayers_cli.cli import options, skip_only
from conflayers_cli.cli.answering import answer_file, answer_one, line_keys
from conflayers_cli.cli.common import (
    load_profile,
    model_source,
    read_prompt_file,
)
from conflayers_cli.cli.option_groups import with_groups
from conflayers_cli.cli.terminal import suppress_failures
from conflayers_cli.cluster.ray_cluster import cluster_of
from conflayers_cli.engine.open_model import open_model
from conflayers_cli.errors import InputError
from conflayers_cli.generation.prompt_encoding import encode_prompts
from conflayers_cli.generation.run import Prepared
from conflayers_cli.profile.build_proposer import (
    build_proposer,
    rows_drafter,
)
from conflayers_cli.profile.check import check_fit
from conflayers_cli.utils.distributed import on_first
from conflayers_cli.utils.progress import is_terminal

if TYPE_CHECKING:
    from conflayers_cli.generation.prompts import Prompt

logger = logging.getLogger(__name__)

HELP = """Generate text with a profile: the very text that the whole model would give.

The prompt is an argument, standard input, or a file of prompts (--data).
Only the answer goes to standard output.

\b
  conflayers generate "Why is the sky blue?" --profile deep.yaml --stats
  git diff | conflayers generate "Explain this change:" - -p deep.yaml
  conflayers generate -p deep.yaml --data prompts.jsonl -o out.jsonl --resume
"""

Prompts = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PROMPT",
        help="Joined by blank lines where there are several; - stands for standard input.",
        show_default=False,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="FILE", help="With --data: where the JSON lines go, one a prompt."
    ),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="With --output: go on where an interrupted run stopped."),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        "--stop",
        metavar="TEXT",
        help="End before this text; may be given repeatedly.",
        callback=options.utf8,
    ),
]
Stream = Annotated[
    bool, typer.Option("--stream/--no-stream", help="Print the text while it is decoded.")
]
Stats = Annotated[
    bool, typer.Option("--stats", help="Say on stderr how fast it was and what was drafted.")
]


@with_groups
def generate(
    *,
    prompt: Prompts = None,
    profile: options.ProfileFile = None,
    model: options.Model = None,
    data: options.Data = None,
    output: Output = None,
    resume: Resume = False,
    max_prompts: options.MaxPrompts = None,
    batch_size: options.BatchSize = None,
    ray: options.Ray = None,
    workers: options.Workers = None,
    prompt_options: options.PromptFlags,
    sampling: options.SamplingFlags,
    stop: Stop = None,
    stream: Stream = True,
    json: options.Json = False,
    stats: Stats = False,
    drafting: options.DraftFlags,
    adapt: adapting.Adapt = None,
    adapt_budget: adapting.AdaptBudget = None,
    save_profile: adapting.SaveProfile = None,
    skip_only_: skip_only.SkipOnly = False,
    target_speedup: skip_only.TargetSpeedup = None,
    force: options.Force = False,
    load: options.LoadFlags,
) -> None:
    _check_flags(prompt, data, output, resume, max_prompts, batch_size, json)
    adapting.check_flags(adapt, adapt_budget, save_profile, drafting.tree)
    skip_only.check_flags(
        skip_only_,
        target_speedup,
        profile=profile,
        drafting={
            "--adapt": adapt,
            "--draft": drafting.method,
            "--adaptive-draft-length": drafting.adaptive_draft_length,
            "--tree": drafting.tree,
        },
    )
    together = batch_size is not None and batch_size > 1
    if adapt and (together or drafting.method or drafting.adaptive_draft_length is not None):
        flag = (
            "--batch-size"
            if together
            else "--draft"
            if drafting.method
            else "--adaptive-draft-length"
        )
        raise InputError(f"--adapt drafts in its own way, a prompt at a time: leave {flag} out")
    check_stops(stop)
    cluster = cluster_of(ray, workers, device=load.device, device_map=load.device_map)
    if cluster and not data:
        raise InputError("--ray answers a file of prompts: give --data FILE")
    if cluster and adapt:
        raise InputError("--adapt learns from prompt to prompt, in one process: leave --ray out")
    chosen = load_profile(profile) if profile else None
    source = model_source(model, chosen)
    sampling.note_unused()
    drafting = replace(drafting, greedy=sampling.greedy, batch_size=batch_size or 1)
    if not (skip_only_ or adapt):
        drafting.check(profile)
    if data:
        prompts = read_prompt_file(data, max_prompts)
    else:  # standard input is there once, however many processes there are
        prompts = [on_first(lambda: _prompt(prompt or []))]
    learned = adapting.Learned(adapt, adapt_budget, save_profile, sampling.seed) if adapt else None

    def prepare(dtype: str | None = None) -> Prepared:
        from conflayers_cli.generation.generator import TextGenerator

        loaded, decoder = open_model(source, replace(load, dtype=dtype or load.dtype))
        drafter = None
        if skip_only_ or learned:
            if chosen:
                check_fit(loaded, decoder, chosen, profile, force)
        else:
            drafter = build_proposer(loaded, decoder, chosen, profile, force, drafting)
        skipped = None
        if skip_only_:
            skipped = skip_only.skip_plan(decoder, target_speedup, chosen)
            logger.warning(skip_only.warning(skipped, decoder.depth))
        if learned:
            drafter = learned.begin(loaded, decoder, chosen)
        memory = None
        if stats:
            from conflayers_cli.utils.memory import PeakMemory

            memory = PeakMemory(loaded.device)
            memory.begin()
        generator = TextGenerator(
            decoder,
            loaded.tokenizer,
            end_tokens=loaded.end_tokens,
            drafter=rows_drafter(drafter) if together else drafter,
            batch_size=batch_size or 1,
            skip_plan=skipped,
        )
        requests = encode_prompts(loaded, prompts, prompt_options, sampling, stop or ())
        return Prepared(loaded, generator, requests, memory)

    try:
        if data:
            settings = [
                source,
                load.device,
                load.dtype,
                load.exact,
                prompt_options.max_new_tokens,
                asdict(sampling),
                prompt_options.system,
                prompt_options.raw,
                stop,
            ]
            if prompt_options.truncate:
                settings += ["truncate"]
            if load.quantize:
                settings += ["quantize", load.quantize]
            if skip_only_:
                settings += ["skip-only", target_speedup, repr(chosen.plan if chosen else None)]
            elif not sampling.greedy and (chosen is not None or drafting.method or adapt):
                # Drafts don't change the law that an answer is drawn from, but which one is drawn.
                settings += [repr(chosen), adapt, asdict(drafting)]
            answer_file(
                *(prompts, line_keys(prompts, settings), output, resume, stats, prepare),
                *(cluster, batch_size or 1),
            )
        else:
            answer_one(prepare(), stream=stream, as_json=json, stats=stats)
    except KeyboardInterrupt:  # it must not cost what was found until then
        if learned:
            with suppress_failures():
                learned.end(prompts, tell=stats)
        raise
    if learned:
        learned.end(prompts, tell=stats)


def check_stops(stops: Sequence[str] | None) -> None:
    """Raise InputError where a text is none."""
    if "" in (stops or ()):
        raise InputError("--stop: an empty text would end every answer at once")


def _check_flags(
    prompt: Sequence[str] | None,
    data: Path | None,
    output: Path | None,
    resume: bool,
    max_prompts: int | None,
    batch_size: int | None,
    as_json: bool,
) -> None:
    """Refuse flags that contradict each other."""
    if data and prompt:
        raise InputError("a PROMPT and --data: give one of the two")
    if data and as_json:
        raise InputError(
            "--json is one document, and --data gives JSON lines already: leave it out"
        )
    if resume and not output:
        raise InputError("--resume needs the file to go on with: --output FILE")
    needing = {"--output": output, "--max-prompts": max_prompts, "--batch-size": batch_size}
    for flag, value in needing.items():
        if value is not None and not data:
            raise InputError(f"{flag} goes with --data, a file of prompts")


def _prompt(words: Sequence[str]) -> Prompt:
    """The prompt of the command line.

    Standard input is read only where `-` asks for it, or no prompt is given and it is no terminal:
    in a shell's ``while read`` loop it belongs to the loop, and reading it would swallow the lines
    still to come.
    """
    from conflayers_cli.generation.prompts import Prompt

    if not words:
        if is_terminal(sys.stdin):
            raise InputError("no prompt: give PROMPT, pipe one in, or name a file with --data")
        words = ["-"]
    piped = _read_stdin() if "-" in words else ""
    text = "\n\n".join(piped if word == "-" else word for word in words)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError("the prompt is not UTF-8 text") from None
    if not text.strip():
        raise InputError("the prompt is empty")
    return Prompt("1", text=text)


def _read_stdin() -> str:
    """All of standard input, without the line end that commands put behind their output."""
    if sys.stdin is None:
        raise InputError("standard input is closed")
    from conflayers_cli.utils.text_files import read_stream

    try:
        text = read_stream(sys.stdin.buffer, "standard input")
    except OSError as error:
        raise InputError(f"standard input can't be read: {error.strerror or error}") from error
    return text.removesuffix("\n").removesuffix("\r")
