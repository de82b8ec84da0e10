"""``conflayers generate``: text from a model, drafted and checked by itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from conflayers_cli.cli import options
from conflayers_cli.cli.common import (
    EncodedPrompt,
    drafter_for,
    encode_prompts,
    load_profile,
    model_source,
    open_model,
    read_prompt_file,
    sampling_from,
)
from conflayers_cli.cli.terminal import emit, emit_json, is_terminal, note, progress_bar
from conflayers_cli.errors import InputError

if TYPE_CHECKING:
    from conflayers_cli.answer import Answer, Summary
    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.engine.draft import Drafter
    from conflayers_cli.engine.model import LoadedModel
    from conflayers_cli.engine.sampling import Sampling
    from conflayers_cli.outputs import JsonLines, LineKey
    from conflayers_cli.prompts import Prompt

SCHEMA_VERSION = 1

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
    typer.Option("--stop", metavar="TEXT", help="End before this text; may be given repeatedly."),
]
Stream = Annotated[
    bool, typer.Option("--stream/--no-stream", help="Print the text while it is decoded.")
]
Stats = Annotated[
    bool, typer.Option("--stats", help="Say on stderr how fast it was and what was drafted.")
]


@dataclass(frozen=True)
class _Machine:
    """A model ready to answer, and how it is to choose its tokens."""

    loaded: LoadedModel
    decoder: Decoder
    drafter: Drafter | None
    sampling: Sampling
    stops: tuple[str, ...]

    def answer(
        self, prompt: EncodedPrompt, index: int = 0, on_text: Callable[[str], None] | None = None
    ) -> Answer:
        from conflayers_cli.answer import answer

        # A seed for each prompt, so that an answer doesn't depend on those before it.
        sampling = replace(self.sampling, seed=self.sampling.seed + index)
        return answer(
            self.decoder,
            self.loaded.tokenizer,
            prompt.tokens,
            max_new_tokens=prompt.max_new_tokens,
            sampling=sampling,
            drafter=self.drafter,
            end_tokens=self.loaded.end_tokens,
            stops=self.stops,
            on_text=on_text,
        )


def generate(
    prompt: Prompts = None,
    profile: options.ProfileFile = None,
    model: options.Model = None,
    data: options.Data = None,
    output: Output = None,
    resume: Resume = False,
    max_prompts: options.MaxPrompts = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = 0,
    system: options.System = None,
    raw: options.Raw = False,
    stop: Stop = None,
    stream: Stream = True,
    json: options.Json = False,
    stats: Stats = False,
    force: options.Force = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    _check_flags(prompt, data, output, resume, max_prompts, json)
    if "" in (stop or ()):
        raise InputError("--stop: an empty text would end every answer at once")
    chosen = load_profile(profile) if profile else None
    source = model_source(model, chosen)
    sampling = sampling_from(temperature, top_p, top_k, min_p, repetition_penalty, seed)
    prompts = read_prompt_file(data, max_prompts) if data else [_prompt(prompt or [])]

    def prepare() -> tuple[_Machine, list[EncodedPrompt]]:
        loaded, decoder = open_model(source, device, dtype, trust_remote_code)
        drafter = drafter_for(loaded, decoder, chosen, profile, force)
        machine = _Machine(loaded, decoder, drafter, sampling, tuple(stop or ()))
        return machine, encode_prompts(
            loaded, prompts, system=system, raw=raw, max_new_tokens=max_new_tokens
        )

    if data:
        settings = [source, max_new_tokens, repr(sampling), system, raw, stop]
        if not sampling.greedy and chosen is not None:
            # Drafts don't change the law that an answer is drawn from, but which one is drawn.
            settings += [repr(chosen.plan), repr(chosen.draft)]
        _answer_file(prompts, _keys(prompts, settings), output, resume, stats, prepare)
    else:
        machine, encoded = prepare()
        _answer_one(machine, encoded[0], stream=stream, as_json=json, stats=stats)


def _check_flags(
    prompt: Sequence[str] | None,
    data: Path | None,
    output: Path | None,
    resume: bool,
    max_prompts: int | None,
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
    needing = {"--output": output, "--max-prompts": max_prompts}
    for flag, value in needing.items():
        if value is not None and not data:
            raise InputError(f"{flag} goes with --data, a file of prompts")


def _prompt(words: Sequence[str]) -> Prompt:
    """The prompt of the command line.

    Standard input is read only where `-` asks for it, or no prompt is given and it is no terminal:
    in a shell's ``while read`` loop it belongs to the loop, and reading it would swallow the lines
    still to come.
    """
    from conflayers_cli.prompts import Prompt

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
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError("standard input is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"standard input can't be read: {error.strerror or error}") from error
    return text.removesuffix("\n").removesuffix("\r")


def _answer_one(
    machine: _Machine, prompt: EncodedPrompt, *, stream: bool, as_json: bool, stats: bool
) -> None:
    streaming = stream and not as_json
    try:
        answer = machine.answer(prompt, on_text=emit if streaming else None)
    except KeyboardInterrupt:
        if streaming:
            emit("\n")
        raise
    if as_json:
        head = {"schema_version": SCHEMA_VERSION, "model": machine.loaded.name}
        emit_json({**head, **answer.as_json()}, indent=None)
    else:
        emit("\n" if streaming else f"{answer.text}\n")
    if stats:
        _tell_stats(machine, answer.stats, 1, answer.prompt_tokens)


def _answer_file(
    prompts: Sequence[Prompt],
    keys: Sequence[LineKey],
    output: Path | None,
    resume: bool,
    stats: bool,
    prepare: Callable[[], tuple[_Machine, list[EncodedPrompt]]],
) -> None:
    from conflayers_cli.answer import Summary
    from conflayers_cli.outputs import JsonLines

    opened = JsonLines.open(output, keys, resume=resume) if output else None
    with opened or nullcontext():
        done = opened.done if opened else 0
        if resume:
            note(f"{done} of {len(prompts)} prompts are answered already")
        if done == len(prompts):
            return
        machine, encoded = prepare()
        answers: list[Answer] = []
        try:
            _write_answers(machine, encoded, keys, opened, answers)
        except KeyboardInterrupt:
            if opened:
                there = done + len(answers)
                note(f"{there} of {len(prompts)} prompts are answered; --resume goes on from there")
            raise
    if stats:
        total = Summary.total(answer.stats for answer in answers)
        _tell_stats(machine, total, len(answers), sum(a.prompt_tokens for a in answers))


def _write_answers(
    machine: _Machine,
    prompts: Sequence[EncodedPrompt],
    keys: Sequence[LineKey],
    output: JsonLines | None,
    answers: list[Answer],
) -> None:
    """Answer the prompts not yet answered, in order, noting each answer as it is written."""
    # a bar would run into the lines where both go to one terminal
    with progress_bar() if output else nullcontext(_no_progress) as tell:
        for index in range(output.done if output else 0, len(prompts)):
            tell(f"prompt {index + 1} of {len(prompts)}", index / len(prompts))
            answer = machine.answer(prompts[index], index)
            line = _line(prompts[index], keys[index], answer)
            if output:
                output.append(line)
            else:
                emit_json(line, indent=None)
            answers.append(answer)


def _no_progress(message: str, done: float) -> None:
    """The bar that is not shown."""


def _keys(prompts: Sequence[Prompt], settings: Sequence[object]) -> list[LineKey]:
    """What tells one answer from another: the prompt, and the settings that decide the answer."""
    import json
    from hashlib import sha256

    from conflayers_cli.outputs import LineKey
    from conflayers_cli.prompts import fingerprint

    decided = json.dumps(settings)
    requests = (f"{fingerprint([prompt])} {decided}" for prompt in prompts)
    return [LineKey(i, sha256(text.encode()).hexdigest()) for i, text in enumerate(requests)]


def _line(prompt: EncodedPrompt, key: LineKey, answer: Answer) -> dict[str, Any]:
    head = {
        "index": key.index,
        "id": prompt.id,
        "category": prompt.category,
        "request_sha256": key.request_sha256,
    }
    return {**head, **answer.as_json()}


def _tell_stats(machine: _Machine, stats: Summary, prompts: int, prompt_tokens: int) -> None:
    seconds = stats.prefill_seconds + stats.decode_seconds
    speed = stats.tokens_per_second
    decoding = (
        "nothing decoded behind the first token" if speed is None else f"{speed:.1f} tokens/s"
    )
    which = "" if prompts == 1 else f" for {prompts} prompts"
    reading = prompt_tokens / stats.prefill_seconds if stats.prefill_seconds > 0 else 0.0
    note(f"{stats.tokens} tokens{which} in {seconds:.2f} s; decoding: {decoding}")
    note(
        f"first token after {stats.prefill_seconds / prompts:.3f} s "
        f"({prompt_tokens} prompt tokens, {reading:.0f} tokens/s)"
    )
    if stats.acceptance_rate is None:
        note("nothing drafted: one token per step")
    else:
        note(
            f"drafted {stats.drafted}, accepted {stats.accepted} ({stats.acceptance_rate:.1%}), "
            f"{stats.tokens_per_step or 0:.2f} tokens per step"
        )
    note(f"{machine.loaded.name} on {machine.loaded.device}; {machine.loaded.dtype_reason}")
