"""A chat: its messages, the part of them that the model gets, and its commands."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conflayers_cli.cli.generate_output import print_stats
from conflayers_cli.cli.show_drafts import emit_drafts
from conflayers_cli.cli.terminal import emit
from conflayers_cli.errors import InputError
from conflayers_cli.generation.run import run_stats
from conflayers_cli.utils.error_text import did_you_mean
from conflayers_cli.utils.notices import print_notice

if TYPE_CHECKING:
    from conflayers_cli.generation.generator import TextGenerator
    from conflayers_cli.generation.response import GenerationResult
    from conflayers_cli.models.loaded_model import LoadedModel
    from conflayers_cli.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

HELP = (
    "/help            this",
    "/reset           forget what was said",
    "/system [TEXT]   put TEXT first from now on, or nothing",
    "/retry           have the last message answered anew",
    "/stats           how fast the last answer was, and what was kept of its prompt",
    "/save FILE       write the chat as a JSON line, which --data takes",
    "/exit            end; so do Ctrl-D and Ctrl-C here",
    "Ctrl-C ends an answer that is being written.",
    "A line that ends with \\ goes on in the next; // at the beginning stands for /.",
)
COMMANDS = ("/help", "/reset", "/system", "/retry", "/stats", "/save", "/exit", "/quit")

Message = dict[str, str]


@dataclass
class Session:
    """One chat.

    Attributes:
        loaded, generator: the model, decoding with a prefix cache.
        sampling: of all answers, each of which has random numbers of its own.
        stop: strings that end an answer.
        max_new_tokens: the most tokens of an answer.
        system: the system message; None: there is none.
        template: arguments of the chat template.
        interactive: Ctrl-C ends an answer, not the chat.
        show_drafts: colour answers by who drafted their tokens.
        messages: by user and assistant in turn.
        dropped: how many of the first messages no longer fit into the context.
        answers: how many were begun.
        latest: the last answer; None: there is none.
    """

    loaded: LoadedModel
    generator: TextGenerator
    sampling: SamplingParams
    stop: tuple[str, ...]
    max_new_tokens: int
    system: str | None
    interactive: bool
    template: dict[str, Any] | None = None
    show_drafts: bool = False
    messages: list[Message] = field(default_factory=list)
    dropped: int = 0
    answers: int = 0
    latest: GenerationResult | None = None

    def handle(self, text: str) -> bool:
        """Answer a message or run a command; False ends the chat.

        Raises:
            InputError: there is no such command, or the message can't be given to the model.
            ConfLayersError: a file or the answer can't be written.
        """
        if not text.strip():
            return True
        if text.startswith("/") and not text.startswith("//"):
            name, _, rest = text.strip().partition(" ")
            return self._command(name, rest.strip())
        self.answer(text[1:] if text.startswith("//") else text)
        return True

    def answer(self, text: str) -> None:
        """Answer a message on standard output.

        Ctrl-C ends the answer and keeps its text so far; before the first token, or pressed twice,
        it takes the message back.
        """
        mine: Message = {"role": "user", "content": text}
        tokens, dropped = self._prompt([*self.messages, mine])
        try:
            answer = self._generate(tokens)
        except KeyboardInterrupt:
            emit("\n")
            if not self.interactive:
                raise
            logger.info("interrupted: the message is taken back")
            return
        finally:
            self.answers += 1
        emit("\n")
        self.dropped = dropped
        self.messages += [mine, {"role": "assistant", "content": answer.text}]
        self.latest = answer
        if answer.finish_reason == "length":
            logger.info(f"cut off after {len(answer.token_ids):,} tokens (--max-new-tokens)")

    def print_stats(self) -> None:
        """Print the last answer's statistics."""
        if self.latest is None:
            logger.info("nothing was answered yet")
            return
        total, kept = self.latest.prompt_tokens, self.latest.cached_prompt_tokens
        print_stats(
            run_stats(self.loaded, self.generator, self.sampling),
            self.latest.stats,
            1,
            total - kept,
        )
        logger.info(f"of {total:,} prompt tokens {kept:,} were there from before")

    def _prompt(self, messages: Sequence[Message]) -> tuple[list[int], int]:
        """(token ids of a chat, how many of its first messages are left out of them).

        When the context is full, the oldest turns are dropped until half of it is free, since each
        time the whole prompt is prefilled again.

        Raises:
            InputError: the last message alone is too long, or the chat template refuses the chat.
        """
        begin = self.dropped
        tokens = self._encoded(messages[begin:])
        limit = self.loaded.context_length
        if limit is None or len(tokens) + min(self.max_new_tokens, limit // 4) <= limit:
            return tokens, begin
        while len(messages) - begin > 2 and len(tokens) > limit // 2:
            begin += 2
            tokens = self._encoded(messages[begin:])
        name = self.loaded.name
        if len(tokens) >= limit:
            raise InputError(
                f"the message is too long: {len(tokens):,} tokens, and {name} takes {limit:,}, "
                "the answer included"
            )
        if begin > self.dropped:
            logger.warning(
                f"note: the context of {name} ({limit:,} tokens) is full: the first {begin // 2} "
                f"turns are left out from now on (/reset forgets all)"
            )
        return tokens, begin

    def _encoded(self, messages: Sequence[Message]) -> list[int]:
        from conflayers_cli.models.tokenization import encode

        first = [{"role": "system", "content": self.system}] if self.system is not None else []
        return encode(self.loaded, [*first, *messages], None, self.template)

    def _generate(self, tokens: list[int]) -> GenerationResult:
        from conflayers_cli.generation.request import GenerationRequest

        budget = self.max_new_tokens
        if self.loaded.context_length is not None:
            budget = min(budget, self.loaded.context_length - len(tokens))
        settings = self.loaded.settings
        request = GenerationRequest(
            tokens,
            budget,
            settings.complete(self.sampling),
            (*self.stop, *settings.stops),
            processors=settings.processors(tokens, budget),
            answer=self.answers,
        )
        result = None
        with _stoppable(self.interactive) as stopped:
            for response in self.generator.stream([request]):
                if response.text:
                    emit_drafts(response) if self.show_drafts else emit(response.text)
                result = response.result
                if result is None and stopped():
                    last = self.generator.cancel(response.number)
                    if last is not None:
                        emit(last.text)
                        result = last.result
        if result is None:
            raise RuntimeError("a stream has ended without a result")
        return result

    def _command(self, name: str, rest: str) -> bool:
        if name in ("/exit", "/quit"):
            return False
        commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/reset": self._reset,
            "/system": self._system,
            "/retry": self._retry,
            "/stats": lambda rest: self.print_stats(),
            "/save": self._save,
        }
        if name not in commands:
            hint = did_you_mean(name, COMMANDS)
            raise InputError(f"no such command: {name}{hint} (/help lists them)")
        commands[name](rest)
        return True

    def _help(self, rest: str) -> None:
        for line in HELP:
            print_notice(line)

    def _reset(self, rest: str) -> None:
        self.messages, self.dropped, self.latest = [], 0, None
        logger.info("forgotten")

    def _system(self, rest: str) -> None:
        self.system = rest or None
        logger.info("the system message is " + (f"now: {rest}" if rest else "gone"))

    def _retry(self, rest: str) -> None:
        if not self.messages:
            logger.info("there is nothing to answer yet")
            return
        if self.sampling.greedy:
            logger.warning("note: at --temperature 0 the answer is the same every time")
        *before, mine, theirs = self.messages
        self.messages = list(before)
        try:
            self.answer(mine["content"])
        finally:
            if len(self.messages) == len(before):  # interrupted, or refused
                self.messages = [*before, mine, theirs]

    def _save(self, rest: str) -> None:
        from conflayers_cli.utils.files import write_atomically

        if not rest:
            raise InputError("/save needs a file: /save FILE")
        path = Path(rest).expanduser()
        first = [{"role": "system", "content": self.system}] if self.system is not None else []
        document = {"model": self.loaded.name, "messages": [*first, *self.messages]}
        write_atomically(path, json.dumps(document, ensure_ascii=False) + "\n")
        logger.info(f"wrote {len(self.messages)} messages to {path}")


@contextmanager
def _stoppable(wanted: bool) -> Iterator[Callable[[], bool]]:
    """Within, if wanted: Ctrl-C takes effect between two steps.

    During the first step, the prefill, it raises KeyboardInterrupt at once; so does a second one.

    Yields:
        Whether to stop; to be called after every step.
    """
    if not wanted:
        yield lambda: False
        return
    import signal
    from types import FrameType

    begun = pressed = False

    def interrupted(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed or not begun:
            raise KeyboardInterrupt
        pressed = True

    def stopped() -> bool:
        nonlocal begun
        begun = True
        return pressed

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
