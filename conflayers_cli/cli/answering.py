"""Answering prompts from the command line: one to the terminal, a file of them as JSON lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conflayers_cli.cli.common import EncodedPrompt
from conflayers_cli.cli.terminal import emit, emit_json, note, progress_bar

if TYPE_CHECKING:
    from conflayers_cli.answer import Answer, Summary
    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.engine.draft import Drafter
    from conflayers_cli.engine.model import LoadedModel
    from conflayers_cli.engine.plan import SkipPlan
    from conflayers_cli.engine.sampling import Sampling
    from conflayers_cli.outputs import JsonLines, LineKey
    from conflayers_cli.prompts import Prompt

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Machine:
    """A model ready to answer, and how it is to choose its tokens.

    Attributes:
        loaded, decoder: the model.
        drafter: drafts for it, losslessly; None: nobody.
        sampling: of the first prompt; each has a seed of its own, so that an answer doesn't depend
            on those before it.
        stops: texts that end an answer.
        skipped: layers left out for good, which is lossy; None: none are.
        batch_size: prompts decoded together, where layers are left out for good.
    """

    loaded: LoadedModel
    decoder: Decoder
    drafter: Drafter | None
    sampling: Sampling
    stops: tuple[str, ...]
    skipped: SkipPlan | None = None
    batch_size: int = 1

    @property
    def kept_layers(self) -> list[int]:
        """Layers of which something is left where others are left out for good."""
        gone = set(self.skipped.layers) if self.skipped else set()
        return [layer for layer in range(self.decoder.depth) if layer not in gone]

    def answer(
        self,
        prompts: Sequence[EncodedPrompt],
        index: int = 0,
        on_text: Callable[[str], None] | None = None,
    ) -> list[Answer]:
        """Answer prompts, the first of which is number ``index``; its text goes to ``on_text``."""
        from conflayers_cli.answer import answer, answer_skipped
        from conflayers_cli.engine.batch import BatchRequest

        seeds = range(self.sampling.seed + index, self.sampling.seed + index + len(prompts))
        requests = [
            BatchRequest(prompt.tokens, prompt.max_new_tokens, replace(self.sampling, seed=seed))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        if self.skipped is not None:
            return answer_skipped(
                self.decoder,
                self.loaded.tokenizer,
                requests,
                self.skipped,
                end_tokens=self.loaded.end_tokens,
                stops=self.stops,
                on_text=on_text,
            )
        return [
            answer(
                self.decoder,
                self.loaded.tokenizer,
                request.prompt,
                max_new_tokens=request.max_new_tokens,
                sampling=request.sampling,
                drafter=self.drafter,
                end_tokens=self.loaded.end_tokens,
                stops=self.stops,
                on_text=on_text,
            )
            for request in requests
        ]

    def as_json(self, answer: Answer) -> dict[str, Any]:
        """An answer as JSON takes it; one that is not the model's own says so."""
        document = answer.as_json()
        if self.skipped is not None:
            document["lossless"] = not self.skipped
            document["skipped"] = {"attention": self.skipped.attention, "mlp": self.skipped.mlp}
            document["kept_layers"] = self.kept_layers
        return document


def answer_one(
    machine: Machine, prompt: EncodedPrompt, *, stream: bool, as_json: bool, stats: bool
) -> None:
    """Answer a prompt on standard output: its text as it comes, or one JSON document."""
    streaming = stream and not as_json
    try:
        (answer,) = machine.answer([prompt], on_text=emit if streaming else None)
    except KeyboardInterrupt:
        if streaming:
            emit("\n")
        raise
    if as_json:
        head = {"schema_version": SCHEMA_VERSION, "model": machine.loaded.name}
        emit_json({**head, **machine.as_json(answer)}, indent=None)
    else:
        emit("\n" if streaming else f"{answer.text}\n")
    if stats:
        _tell_stats(machine, answer.stats, 1, answer.prompt_tokens)


def answer_file(
    prompts: Sequence[Prompt],
    keys: Sequence[LineKey],
    output: Path | None,
    resume: bool,
    stats: bool,
    prepare: Callable[[], tuple[Machine, list[EncodedPrompt]]],
) -> None:
    """Answer a file of prompts: a JSON line each, to a file that can be continued, or stdout.

    Args:
        prompts: all of them.
        keys: what tells each one's answer from another's.
        output: the file; None: standard output.
        resume: go on behind the answers that are there.
        stats: say on stderr what it took.
        prepare: loads the model and encodes the prompts, once it is known that there is work.
    """
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
    machine: Machine,
    prompts: Sequence[EncodedPrompt],
    keys: Sequence[LineKey],
    output: JsonLines | None,
    answers: list[Answer],
) -> None:
    """Answer the prompts not yet answered, in order, noting each answer as it is written."""
    # a bar would run into the lines where both go to one terminal
    with progress_bar() if output else nullcontext(_no_progress) as tell:
        begin = output.done if output else 0
        for first in range(begin, len(prompts), machine.batch_size):
            tell(f"prompt {first + 1} of {len(prompts)}", first / len(prompts))
            part = prompts[first : first + machine.batch_size]
            for index, answer in enumerate(machine.answer(part, first), first):
                line = _line(prompts[index], keys[index], machine.as_json(answer))
                if output:
                    output.append(line)
                else:
                    emit_json(line, indent=None)
                answers.append(answer)


def _no_progress(message: str, done: float) -> None:
    """The bar that is not shown."""


def line_keys(prompts: Sequence[Prompt], settings: Sequence[object]) -> list[LineKey]:
    """What tells one answer from another: the prompt, and the settings that decide the answer."""
    import json
    from hashlib import sha256

    from conflayers_cli.outputs import LineKey
    from conflayers_cli.prompts import fingerprint

    decided = json.dumps(settings)
    requests = (f"{fingerprint([prompt])} {decided}" for prompt in prompts)
    return [LineKey(i, sha256(text.encode()).hexdigest()) for i, text in enumerate(requests)]


def _line(prompt: EncodedPrompt, key: LineKey, answer: dict[str, Any]) -> dict[str, Any]:
    head = {
        "index": key.index,
        "id": prompt.id,
        "category": prompt.category,
        "request_sha256": key.request_sha256,
    }
    return {**head, **answer}


def _tell_stats(machine: Machine, stats: Summary, prompts: int, prompt_tokens: int) -> None:
    seconds = stats.prefill_seconds + stats.decode_seconds
    speed = stats.tokens_per_second
    decoding = (
        "nothing decoded behind the first token" if speed is None else f"{speed:.1f} tokens/s"
    )
    which = "" if prompts == 1 else f" for {prompts} prompts"
    reading = prompt_tokens / stats.prefill_seconds if stats.prefill_seconds > 0 else 0.0
    note(f"{stats.tokens} tokens{which} in {seconds:.2f} s; decoding: {decoding}")
    each = " each, of what they took together" if machine.batch_size > 1 else ""
    note(
        f"first token after {stats.prefill_seconds / prompts:.3f} s{each} "
        f"({prompt_tokens} prompt tokens, {reading:.0f} tokens/s)"
    )
    if machine.skipped:
        kept = " ".join(map(str, machine.kept_layers))
        note(f"lossy: decoded with layers {kept} of {machine.decoder.depth} alone")
    elif stats.acceptance_rate is None:
        note("nothing drafted: one token per step")
    else:
        note(
            f"drafted {stats.drafted}, accepted {stats.accepted} ({stats.acceptance_rate:.1%}), "
            f"{stats.tokens_per_step or 0:.2f} tokens per step"
        )
    note(f"{machine.loaded.name} on {machine.loaded.device}; {machine.loaded.dtype_reason}")
