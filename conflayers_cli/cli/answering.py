"""Answering prompts from the command line: one to the terminal, a file of them as JSON lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conflayers_cli.cli.common import EncodedPrompt
from conflayers_cli.cli.drafting import rows_drafter
from conflayers_cli.cli.terminal import emit, emit_json, note, progress_bar

if TYPE_CHECKING:
    from conflayers_cli.answer import Answer, Summary
    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.engine.draft import Drafter, RowsDrafter
    from conflayers_cli.engine.memory import PeakMemory
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
        drafter: drafts for it, losslessly; None: nobody. Where prompts are decoded together, it
            has to be one that drafts for rows; else nobody drafts for them.
        sampling: of the first prompt; each has a seed of its own, so that an answer doesn't depend
            on those before it.
        stops: texts that end an answer.
        skipped: layers left out for good, which is lossy; None: none are.
        batch_size: prompts decoded at once.
        memory: watches the memory in use; None: nobody asked.
    """

    loaded: LoadedModel
    decoder: Decoder
    drafter: Drafter | None
    sampling: Sampling
    stops: tuple[str, ...]
    skipped: SkipPlan | None = None
    batch_size: int = 1
    memory: PeakMemory | None = None

    @property
    def kept_layers(self) -> list[int]:
        """Layers of which something is left where others are left out for good."""
        gone = set(self.skipped.layers) if self.skipped else set()
        return [layer for layer in range(self.decoder.depth) if layer not in gone]

    @property
    def rows_drafter(self) -> RowsDrafter | None:
        """Who drafts for prompts that are decoded together, losslessly; None: nobody."""
        return None if self.skipped is not None else rows_drafter(self.drafter)

    def answers(
        self,
        prompts: Sequence[EncodedPrompt],
        begin: int = 0,
        on_text: Callable[[str], None] | None = None,
    ) -> Iterator[tuple[int, Answer]]:
        """Answer prompts from number ``begin`` on: (number, answer), each as soon as it is done.

        The text of the first one goes to ``on_text`` piece by piece.

        Raises:
            LogitsError: an answer can't go on; it names the prompt where there are several.
        """
        from conflayers_cli.engine.best import LogitsError

        try:
            yield from self._answers(prompts, begin, on_text)
        except LogitsError as error:
            if len(prompts) == 1:
                raise
            raise error.of(f"prompt {prompts[begin + (error.number or 0)].id}") from error

    def _answers(
        self,
        prompts: Sequence[EncodedPrompt],
        begin: int,
        on_text: Callable[[str], None] | None,
    ) -> Iterator[tuple[int, Answer]]:
        from conflayers_cli.answer import answer, answer_batch
        from conflayers_cli.engine.batch import BatchRequest
        from conflayers_cli.engine.best import LogitsError
        from conflayers_cli.engine.decoder import FULL

        requests = [
            BatchRequest(
                prompt.tokens,
                prompt.max_new_tokens,
                replace(self.sampling, seed=self.sampling.seed + number),
            )
            for number, prompt in enumerate(prompts[begin:], begin)
        ]
        ends, stops, tokenizer = self.loaded.end_tokens, self.stops, self.loaded.tokenizer
        if self.skipped is not None or self.batch_size > 1:
            together = answer_batch(
                *(self.decoder, tokenizer, requests),
                size=self.batch_size,
                drafter=self.rows_drafter,
                plan=self.skipped or FULL,
                end_tokens=ends,
                stops=stops,
                on_text=on_text,
            )
            for number, done in together:
                yield begin + number, done
            return
        for number, request in enumerate(requests):
            try:
                done = answer(
                    *(self.decoder, tokenizer, request.prompt),
                    max_new_tokens=request.max_new_tokens,
                    sampling=request.sampling,
                    drafter=self.drafter,
                    end_tokens=ends,
                    stops=stops,
                    on_text=on_text,
                )
            except LogitsError as error:
                error.number = number
                raise
            yield begin + number, done

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
        ((_, answer),) = machine.answers([prompt], on_text=emit if streaming else None)
    except KeyboardInterrupt:
        if streaming:
            emit("\n")
        raise
    if as_json:
        head = {"schema_version": SCHEMA_VERSION, "model": machine.loaded.name}
        document = {**head, **_shortened(prompt), **machine.as_json(answer)}
        emit_json(document, indent=None)
    else:
        emit("\n" if streaming else f"{answer.text}\n")
    _tell_textless(machine, [answer])
    if stats:
        tell_stats(machine, answer.stats, 1, answer.prompt_tokens)


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
    _tell_textless(machine, answers)
    if stats:
        total = Summary.total(answer.stats for answer in answers)
        tell_stats(machine, total, len(answers), sum(a.prompt_tokens for a in answers))


def _write_answers(
    machine: Machine,
    prompts: Sequence[EncodedPrompt],
    keys: Sequence[LineKey],
    output: JsonLines | None,
    answers: list[Answer],
) -> None:
    """Answer the prompts not yet answered, noting each answer as it is written: in order, so one
    that is done waits for those before it.
    """
    # a bar would run into the lines where both go to one terminal
    with progress_bar() if output else nullcontext(_no_progress) as tell:
        begin = output.done if output else 0
        waiting: dict[int, Answer] = {}
        tell(f"{begin} of {len(prompts)} prompts", begin / len(prompts))
        for number, done in machine.answers(prompts, begin):
            waiting[number] = done
            while (index := begin + len(answers)) in waiting:
                answer = waiting.pop(index)
                line = _line(prompts[index], keys[index], machine.as_json(answer))
                if output:
                    output.append(line)
                else:
                    emit_json(line, indent=None)
                answers.append(answer)
            count = begin + len(answers) + len(waiting)
            tell(f"{count} of {len(prompts)} prompts", count / len(prompts))


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
    return {**head, **_shortened(prompt), **answer}


def _shortened(prompt: EncodedPrompt) -> dict[str, int]:
    """How many tokens of a prompt were left out, where any were."""
    return {"truncated": prompt.truncated} if prompt.truncated else {}


def _tell_textless(machine: Machine, answers: Sequence[Answer]) -> None:
    """Say so where a model whose vocabulary is larger than its tokenizer's has gone beyond it."""
    from conflayers_cli.engine.text import without_text

    tokenizer = machine.loaded.tokenizer
    count = sum(without_text(tokenizer, answer.token_ids) for answer in answers)
    if count:
        known = len(tokenizer)
        note(f"note: {count} of the tokens are beyond the tokenizer's {known} and have no text")


def tell_stats(machine: Machine, stats: Summary, prompts: int, prompt_tokens: int) -> None:
    """Say how fast prompts were answered and who drafted.

    Args:
        prompt_tokens: how many of their tokens were read.
    """
    from conflayers_cli.engine.remarks import remarks

    seconds = stats.prefill_seconds + stats.decode_seconds
    speed = stats.tokens_per_second
    decoding = (
        "nothing decoded behind the first token" if speed is None else f"{speed:.1f} tokens/s"
    )
    which = "" if prompts == 1 else f" for {prompts} prompts"
    reading = prompt_tokens / stats.prefill_seconds if stats.prefill_seconds > 0 else 0.0
    note(f"{stats.tokens} tokens{which} in {seconds:.2f} s; decoding: {decoding}")
    if machine.batch_size > 1:
        note(
            f"up to {machine.batch_size} prompts at once; reading one took "
            f"{stats.prefill_seconds / prompts:.3f} s "
            f"({prompt_tokens} prompt tokens, {reading:.0f} tokens/s)"
        )
    else:
        note(
            f"first token after {stats.prefill_seconds / prompts:.3f} s "
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
        if stats.drafted_by:
            note(stats.drafted_by)
    peak = machine.memory.peak() if machine.memory else None
    if peak is not None:
        note(f"peak memory over the model's weights: {peak / 2**20:,.0f} MiB")
    note(f"{machine.loaded.name} on {machine.loaded.place}; {machine.loaded.dtype_reason}")
    for remark in remarks(machine.decoder):
        note(remark)
