"""What ``generate`` writes: one text to the terminal, or a file of prompts as JSON lines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from conflayers_cli.cli.flags import with_flags
from conflayers_cli.cli.show_drafts import emit_drafts
from conflayers_cli.cli.terminal import emit, emit_json
from conflayers_cli.generation.run import (
    GenerationRun,
    PrepareRun,
    PromptResult,
    RunStats,
    truncation_note,
)
from conflayers_cli.utils.progress import ProgressCallback, no_progress, progress_bar

if TYPE_CHECKING:
    from conflayers_cli.cli.generate_options import FileOptions
    from conflayers_cli.cluster.ray_cluster import Cluster
    from conflayers_cli.generation.prompts import Prompt
    from conflayers_cli.generation.stats import GenerationStats
    from conflayers_cli.utils.files import JsonLines, LineKey

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1


def generate_one(
    prepared: GenerationRun, *, stream: bool, as_json: bool, stats: bool, show_drafts: bool = False
) -> None:
    """Generate from one prompt on standard output: the text as it comes, or one JSON document."""
    streaming = stream and not as_json
    (request,) = prepared.requests
    result = None
    try:
        for response in prepared.generator.stream([request]):
            if streaming and response.text:
                emit_drafts(response) if show_drafts else emit(response.text)
            result = response.result
    except KeyboardInterrupt:
        if streaming:
            emit("\n")
        raise
    if result is None:
        raise RuntimeError("a stream has ended without a result")
    if as_json:
        head = {"schema_version": SCHEMA_VERSION, "model": prepared.loaded.name}
        document = {**head, **truncation_note(request), **prepared.as_json(result)}
        emit_json(document, indent=None)
    else:
        emit("\n" if streaming else f"{result.text}\n")
    _note_unknown_tokens(*prepared.unknown_tokens(result))
    if stats:
        print_stats(prepared.run_stats(), result.stats, 1, result.prompt_tokens)


def generate_file(
    prompts: Sequence[Prompt],
    keys: Sequence[LineKey],
    prepare: PrepareRun,
    file: FileOptions,
    cluster: Cluster | None,
    *,
    stats: bool,
) -> None:
    """Generate from a file of prompts: a JSON line each, to a resumable file or standard output.

    Args:
        prompts: all of them.
        keys: what identifies each request.
        prepare: loads the model and encodes the prompts; called only if there is work.
        file: output, resume and batch size.
        cluster: whose workers do it; None: this process does.
        stats: print statistics on stderr.
    """
    from conflayers_cli.utils.files import JsonLines

    output = JsonLines.open(file.output, keys, resume=file.resume) if file.output else None
    with output or nullcontext():
        done = output.done if output else 0
        if file.resume:
            logger.info(f"{done} of {len(prompts)} prompts are answered already")
        if done == len(prompts):
            return
        lines = _OrderedLines(prompts, keys, output)
        source = _results(prepare, cluster, done, len(prompts), file.size)
        with source as (results, run_stats):
            try:
                # a bar would run into the lines where both go to one terminal
                with progress_bar() if output else nullcontext(no_progress) as on_progress:
                    lines.show_progress(on_progress)
                    for result in results:
                        lines.add(result)
                        lines.show_progress(on_progress)
            except KeyboardInterrupt:
                if output:
                    there = f"{lines.next} of {len(prompts)} prompts are answered"
                    logger.info(f"{there}; --resume goes on from there")
                raise
    written = lines.written
    known = min((result.unknown_tokens[1] for result in written), default=0)
    _note_unknown_tokens(sum(result.unknown_tokens[0] for result in written), known)
    if stats:
        from conflayers_cli.generation.stats import GenerationStats

        total = GenerationStats.total(each.result.stats for each in written)
        read = sum(each.result.prompt_tokens for each in written)
        print_stats(run_stats(), total, len(written), read)


class _OrderedLines:
    """Writes results as JSON lines in the prompts' order; those that come early wait.

    Args:
        prompts, keys: as for `generate_file`.
        output: the file, after the lines that are there; None: standard output.

    Attributes:
        written: the results written, without their documents.
    """

    def __init__(
        self, prompts: Sequence[Prompt], keys: Sequence[LineKey], output: JsonLines | None
    ) -> None:
        self._prompts, self._keys, self._output = prompts, keys, output
        self._begin = output.done if output else 0
        self._waiting: dict[int, PromptResult] = {}
        self.written: list[PromptResult] = []

    @property
    def next(self) -> int:
        """The number of the prompt whose line is to be written next."""
        return self._begin + len(self.written)

    def add(self, result: PromptResult) -> None:
        self._waiting[result.number] = result
        while (index := self.next) in self._waiting:
            line = _line(self._prompts[index], self._keys[index], self._waiting[index].document)
            if self._output:
                self._output.append(line)
            else:
                emit_json(line, indent=None)
            # its document is on the disk
            self.written.append(replace(self._waiting.pop(index), document={}))

    def show_progress(self, on_progress: ProgressCallback) -> None:
        """Report how many prompts are done."""
        done, total = self.next + len(self._waiting), len(self._prompts)
        on_progress(f"{done} of {total} prompts", done / total)


@contextmanager
def _results(
    prepare: PrepareRun, cluster: Cluster | None, begin: int, end: int, batch_size: int
) -> Iterator[tuple[Iterator[PromptResult], Callable[[], RunStats]]]:
    """(results of the prompts ``begin`` to before ``end``, statistics of the run after them)."""
    if cluster is not None:
        from conflayers_cli.cluster.workers import run_on_workers

        with run_on_workers(prepare, cluster, begin, end, batch_size, with_flags) as work:
            yield work
        return
    prepared = prepare()
    yield prepared.results(begin, end), prepared.run_stats


def request_keys(prompts: Sequence[Prompt], settings: Sequence[object]) -> list[LineKey]:
    """A hash for each request: of its prompt and the settings that decide its text."""
    import json
    from hashlib import sha256

    from conflayers_cli.generation.prompts import fingerprint
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


def _note_unknown_tokens(count: int, known: int) -> None:
    """Note tokens beyond the tokenizer's vocabulary, where the model's is larger."""
    if count:
        logger.warning(
            f"note: {count} of the tokens are beyond the tokenizer's {known} and have no text"
        )


def print_stats(run: RunStats, stats: GenerationStats, prompts: int, prompt_tokens: int) -> None:
    """Print statistics: speed, acceptance rate, tokens per step.

    Args:
        run: of the model and how it ran.
        stats: of all texts.
        prompts: how many there were.
        prompt_tokens: how many of their tokens were prefilled.
    """
    seconds = stats.prefill_seconds + stats.decode_seconds
    speed = stats.tokens_per_second
    decoding = (
        "nothing decoded behind the first token" if speed is None else f"{speed:.1f} tokens/s"
    )
    which = "" if prompts == 1 else f" for {prompts} prompts"
    reading = prompt_tokens / stats.prefill_seconds if stats.prefill_seconds > 0 else 0.0
    logger.info(f"{stats.tokens} tokens{which} in {seconds:.2f} s; decoding: {decoding}")
    if run.batch_size > 1:
        logger.info(
            f"up to {run.batch_size} prompts at once; reading one took "
            f"{stats.prefill_seconds / prompts:.3f} s "
            f"({prompt_tokens} prompt tokens, {reading:.0f} tokens/s)"
        )
    else:
        logger.info(
            f"first token after {stats.prefill_seconds / prompts:.3f} s "
            f"({prompt_tokens} prompt tokens, {reading:.0f} tokens/s)"
        )
    if run.lossy:
        logger.info(run.lossy)
    elif stats.acceptance_rate is None:
        logger.info("nothing drafted: one token per step")
    else:
        logger.info(
            f"drafted {stats.drafted}, accepted {stats.accepted} ({stats.acceptance_rate:.1%}), "
            f"{stats.tokens_per_step or 0:.2f} tokens per step"
        )
        if stats.drafted_by:
            logger.info(stats.drafted_by)
    if run.peak_bytes is not None:
        logger.info(f"peak memory over the model's weights: {run.peak_bytes / 2**20:,.0f} MiB")
    for sentence in run.notes:
        logger.info(sentence)
