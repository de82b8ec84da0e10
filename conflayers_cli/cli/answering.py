"""Answering prompts from the command line: one to the terminal, a file of them as JSON lines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from conflayers_cli.cli.terminal import emit, emit_json
from conflayers_cli.models.prompt_encoding import EncodedPrompt
from conflayers_cli.spec_decode.build import rows_drafter
from conflayers_cli.utils.progress import no_progress, progress_bar

if TYPE_CHECKING:
    from conflayers_cli.cluster.ray_cluster import Cluster
    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.generation.generate import Answer, Summary
    from conflayers_cli.models.loaded_model import LoadedModel
    from conflayers_cli.prompts import Prompt
    from conflayers_cli.sampling_params import SamplingParams
    from conflayers_cli.skip_plan import SkipPlan
    from conflayers_cli.spec_decode.proposer import BatchProposer, Proposer
    from conflayers_cli.utils.files import JsonLines, LineKey
    from conflayers_cli.utils.memory import PeakMemory

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Facts:
    """What there is to say of a machine when its work is done.

    Attributes:
        batch_size: prompts decoded at once.
        lossy: what was left out for good; None: nothing.
        peak_bytes: the most memory in use over the model's weights; None: nobody watched.
        told: sentences on the model and how it ran.
    """

    batch_size: int
    lossy: str | None
    peak_bytes: int | None
    told: tuple[str, ...]


@dataclass(frozen=True)
class Done:
    """One prompt's answer.

    Attributes:
        number: the prompt's, from 0.
        answer: to it.
        document: what its line says of it.
        without_text: how many of its tokens the tokenizer doesn't know, and how many it does know.
    """

    number: int
    answer: Answer
    document: dict[str, Any]
    without_text: tuple[int, int]


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
    drafter: Proposer | None
    sampling: SamplingParams
    stops: tuple[str, ...]
    skipped: SkipPlan | None = None
    batch_size: int = 1
    memory: PeakMemory | None = None

    def facts(self) -> Facts:
        """What ``--stats`` says of it, as of now."""
        from conflayers_cli.engine.run_info import remarks

        lossy = None
        if self.skipped:
            kept = " ".join(map(str, self.kept_layers))
            lossy = f"lossy: decoded with layers {kept} of {self.decoder.depth} alone"
        loaded = self.loaded
        return Facts(
            batch_size=self.batch_size,
            lossy=lossy,
            peak_bytes=self.memory.peak() if self.memory else None,
            told=(
                f"{loaded.name} on {loaded.place}; {loaded.dtype_reason}",
                *remarks(self.decoder),
            ),
        )

    @property
    def kept_layers(self) -> list[int]:
        """Layers of which something is left where others are left out for good."""
        gone = set(self.skipped.layers) if self.skipped else set()
        return [layer for layer in range(self.decoder.depth) if layer not in gone]

    @property
    def rows_drafter(self) -> BatchProposer | None:
        """Who drafts for prompts that are decoded together, losslessly; None: nobody."""
        return None if self.skipped is not None else rows_drafter(self.drafter)

    def answers(
        self,
        prompts: Sequence[EncodedPrompt],
        begin: int = 0,
        on_text: Callable[[str], None] | None = None,
        end: int | None = None,
    ) -> Iterator[tuple[int, Answer]]:
        """Answer prompts from number ``begin`` on, to before ``end`` where it is given: (number,
        answer), each as soon as it is done.

        The text of the first one goes to ``on_text`` piece by piece.

        Raises:
            LogitsError: an answer can't go on; it names the prompt where there are several.
        """
        from conflayers_cli.engine.argmax import LogitsError

        try:
            yield from self._answers(prompts[:end], begin, on_text)
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
        from conflayers_cli.engine.argmax import LogitsError
        from conflayers_cli.engine.decoder import FULL
        from conflayers_cli.generation.batch import BatchRequest
        from conflayers_cli.generation.generate import answer, answer_batch

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

    def dones(
        self, prompts: Sequence[EncodedPrompt], begin: int = 0, end: int | None = None
    ) -> Iterator[Done]:
        """As :meth:`answers`, with all that a file's line says."""
        for number, answer in self.answers(prompts, begin, end=end):
            document = {**_shortened(prompts[number]), **self.as_json(answer)}
            yield Done(number, answer, document, self.without_text(answer))

    def without_text(self, answer: Answer) -> tuple[int, int]:
        """(tokens of the answer beyond the tokenizer's vocabulary, its size)."""
        from conflayers_cli.generation.detokenizer import without_text

        tokenizer = self.loaded.tokenizer
        return without_text(tokenizer, answer.token_ids), len(tokenizer)

    def as_json(self, answer: Answer) -> dict[str, Any]:
        """An answer as JSON takes it; one that is not the model's own says so."""
        document = answer.as_json()
        if self.skipped is not None:
            document["lossless"] = not self.skipped
            document["skipped"] = {"attention": self.skipped.attention, "mlp": self.skipped.mlp}
            document["kept_layers"] = self.kept_layers
        return document


class Prepare(Protocol):
    """Makes a machine and encodes the prompts.

    Args:
        dtype: which the model is loaded in; None: as the command line says.
    """

    def __call__(self, dtype: str | None = None) -> tuple[Machine, list[EncodedPrompt]]: ...


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
    _tell_textless(*machine.without_text(answer))
    if stats:
        tell_stats(machine, answer.stats, 1, answer.prompt_tokens)


def answer_file(
    prompts: Sequence[Prompt],
    keys: Sequence[LineKey],
    output: Path | None,
    resume: bool,
    stats: bool,
    prepare: Prepare,
    cluster: Cluster | None = None,
    batch_size: int = 1,
) -> None:
    """Answer a file of prompts: a JSON line each, to a file that can be continued, or stdout.

    Args:
        prompts: all of them.
        keys: what tells each one's answer from another's.
        output: the file; None: standard output.
        resume: go on behind the answers that are there.
        stats: say on stderr what it took.
        prepare: loads the model and encodes the prompts, once it is known that there is work.
        cluster: whose workers do it; None: this process does.
        batch_size: prompts that a machine decodes at once.
    """
    from conflayers_cli.utils.files import JsonLines

    opened = JsonLines.open(output, keys, resume=resume) if output else None
    with opened or nullcontext():
        done = opened.done if opened else 0
        if resume:
            logger.info(f"{done} of {len(prompts)} prompts are answered already")
        if done == len(prompts):
            return
        written: list[Done] = []
        at_work = _at_work(prepare, cluster, done, len(prompts), batch_size)
        with at_work as (dones, tell_all):
            try:
                _write_answers(dones, prompts, keys, opened, written)
            except KeyboardInterrupt:
                if opened:
                    there = f"{done + len(written)} of {len(prompts)} prompts are answered"
                    logger.info(f"{there}; --resume goes on from there")
                raise
    known = min((done.without_text[1] for done in written), default=0)
    _tell_textless(sum(done.without_text[0] for done in written), known)
    if stats:
        tell_all([done.answer for done in written])


@contextmanager
def _at_work(
    prepare: Prepare, cluster: Cluster | None, begin: int, end: int, batch_size: int
) -> Iterator[tuple[Iterator[Done], Callable[[Sequence[Answer]], None]]]:
    """The answers to come from prompt ``begin`` on, and what says in the end what they took."""
    if cluster is not None:
        from conflayers_cli.cluster.workers import answering_workers

        with answering_workers(prepare, cluster, begin, end, batch_size) as (dones, facts):
            yield dones, partial(_tell_work, facts)
        return
    machine, encoded = prepare()
    yield machine.dones(encoded, begin), partial(_tell_work, machine.facts)


def _tell_work(facts: Callable[[], Facts], answers: Sequence[Answer]) -> None:
    from conflayers_cli.generation.generate import Summary

    total = Summary.total(answer.stats for answer in answers)
    _tell_figures(facts(), total, len(answers), sum(a.prompt_tokens for a in answers))


def _write_answers(
    dones: Iterator[Done],
    prompts: Sequence[Prompt],
    keys: Sequence[LineKey],
    output: JsonLines | None,
    written: list[Done],
) -> None:
    """Write the answers as they come, noting each as it is written: in order, so one that is done
    waits for those before it.
    """
    # a bar would run into the lines where both go to one terminal
    with progress_bar() if output else nullcontext(no_progress) as on_progress:
        begin = output.done if output else 0
        waiting: dict[int, Done] = {}
        on_progress(f"{begin} of {len(prompts)} prompts", begin / len(prompts))
        for done in dones:
            waiting[done.number] = done
            while (index := begin + len(written)) in waiting:
                line = _line(prompts[index], keys[index], waiting[index].document)
                if output:
                    output.append(line)
                else:
                    emit_json(line, indent=None)
                written.append(replace(waiting.pop(index), document={}))  # it is on the disk
            count = begin + len(written) + len(waiting)
            on_progress(f"{count} of {len(prompts)} prompts", count / len(prompts))


def line_keys(prompts: Sequence[Prompt], settings: Sequence[object]) -> list[LineKey]:
    """What tells one answer from another: the prompt, and the settings that decide the answer."""
    import json
    from hashlib import sha256

    from conflayers_cli.prompts import fingerprint
    from conflayers_cli.utils.files import LineKey

    decided = json.dumps(settings)
    requests = (f"{fingerprint([prompt])} {decided}" for prompt in prompts)
    return [LineKey(i, sha256(text.encode()).hexdigest()) for i, text in enumerate(requests)]


def _line(prompt: Prompt, key: LineKey, document: dict[str, Any]) -> dict[str, Any]:
    head = {
        "index": key.index,
        "id": prompt.id,
        "category": prompt.category,
        "request_sha256": key.request_sha256,
    }
    return {**head, **document}


def _shortened(prompt: EncodedPrompt) -> dict[str, int]:
    """How many tokens of a prompt were left out, where any were."""
    return {"truncated": prompt.truncated} if prompt.truncated else {}


def _tell_textless(count: int, known: int) -> None:
    """Say so where a model whose vocabulary is larger than its tokenizer's has gone beyond it."""
    if count:
        logger.warning(
            f"note: {count} of the tokens are beyond the tokenizer's {known} and have no text"
        )


def tell_stats(machine: Machine, stats: Summary, prompts: int, prompt_tokens: int) -> None:
    """Say how fast prompts were answered and who drafted.

    Args:
        prompt_tokens: how many of their tokens were read.
    """
    _tell_figures(machine.facts(), stats, prompts, prompt_tokens)


def _tell_figures(facts: Facts, stats: Summary, prompts: int, prompt_tokens: int) -> None:
    seconds = stats.prefill_seconds + stats.decode_seconds
    speed = stats.tokens_per_second
    decoding = (
        "nothing decoded behind the first token" if speed is None else f"{speed:.1f} tokens/s"
    )
    which = "" if prompts == 1 else f" for {prompts} prompts"
    reading = prompt_tokens / stats.prefill_seconds if stats.prefill_seconds > 0 else 0.0
    logger.info(f"{stats.tokens} tokens{which} in {seconds:.2f} s; decoding: {decoding}")
    if facts.batch_size > 1:
        logger.info(
            f"up to {facts.batch_size} prompts at once; reading one took "
            f"{stats.prefill_seconds / prompts:.3f} s "
            f"({prompt_tokens} prompt tokens, {reading:.0f} tokens/s)"
        )
    else:
        logger.info(
            f"first token after {stats.prefill_seconds / prompts:.3f} s "
            f"({prompt_tokens} prompt tokens, {reading:.0f} tokens/s)"
        )
    if facts.lossy:
        logger.info(facts.lossy)
    elif stats.acceptance_rate is None:
        logger.info("nothing drafted: one token per step")
    else:
        logger.info(
            f"drafted {stats.drafted}, accepted {stats.accepted} ({stats.acceptance_rate:.1%}), "
            f"{stats.tokens_per_step or 0:.2f} tokens per step"
        )
        if stats.drafted_by:
            logger.info(stats.drafted_by)
    if facts.peak_bytes is not None:
        logger.info(f"peak memory over the model's weights: {facts.peak_bytes / 2**20:,.0f} MiB")
    for sentence in facts.told:
        logger.info(sentence)
