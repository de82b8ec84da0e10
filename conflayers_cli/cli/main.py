"""The ``conflayers`` command: its sub-commands, and what failures print and exit with."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from conflayers_cli.cli.bench import bench
from conflayers_cli.cli.calibrate import calibrate
from conflayers_cli.cli.chat import chat
from conflayers_cli.cli.doctor import doctor
from conflayers_cli.cli.flags import in_flags, with_flags
from conflayers_cli.cli.generate import generate
from conflayers_cli.cli.interruptions import INTERRUPTED, Interruptions
from conflayers_cli.cli.mistakes import with_hint
from conflayers_cli.cli.models import models
from conflayers_cli.cli.profile import app as profile_app
from conflayers_cli.cli.serve import serve
from conflayers_cli.cli.store import app as store_app
from conflayers_cli.cli.terminal import discard, emit
from conflayers_cli.errors import ConfLayersError
from conflayers_cli.utils.distributed import RankOutput
from conflayers_cli.utils.notices import (
    PROGRAM,
    notices_to_stderr,
    print_notice,
    quiet,
    terminal_safe,
)
from conflayers_cli.version import __version__

FAILURE = 1
LESS_MEMORY = (
    "a smaller --batch-size, shorter prompts and answers (--max-new-tokens), --dtype bfloat16 or "
    "--quantize take less"
)
USAGE = 2
RENAMED = {"lookahead": "adaptive-draft-length", "no-lookahead": "no-adaptive-draft-length"}
"""Old names of flags, without their dashes, which are taken for one more version."""
ANYWHERE = frozenset({"--debug", "--quiet"})
"""Flags of all commands, allowed before or after a command's name."""

HELP = """Decode faster with the model's own layers, losslessly.

It drafts tokens with some layers left out and checks them in one full pass.

First find the layers that a model can do without, then use what was found:

\b
  conflayers calibrate --model smollm2-deep --output deep.yaml
  conflayers generate "Why is the sky blue?" --profile deep.yaml
  conflayers bench --profile deep.yaml
"""


app = typer.Typer(
    name=PROGRAM,
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["--help", "-h"],
        "token_normalize_func": lambda name: RENAMED.get(name, name),
    },
)
for _command in (calibrate, generate, chat, serve, bench, models, doctor):
    app.command(name=_command.__name__)(_command)
app.add_typer(profile_app)
app.add_typer(store_app)


def _print_version(asked: bool) -> None:
    if asked:
        emit(f"{PROGRAM} {__version__}\n")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and end."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where in the program a failure arose.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Say nothing on stderr but errors: no notes, no bars.")
    ] = False,
) -> None:
    del version, debug, quiet  # dealt with before a command starts


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    0 is success; 1 a failure while working; 2 wrong usage or bad input; 3 a gate that did not
    hold; 130 an interruption, 143 termination (SIGTERM). A failure is one line on stderr.

    Args:
        argv: the arguments without the program's name; those of the process by default.
    """
    # torchao, where transformers imports it, logs about kernels for other machines
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    arguments, flags = _take_flags(sys.argv[1:] if argv is None else argv)
    rank_output = RankOutput()
    with quiet("--quiet" in flags), notices_to_stderr(with_flags), Interruptions() as interruptions:
        code = _run(arguments, "--debug" in flags, rank_output, interruptions)
        return rank_output.common_exit_code(_flushed(code))


def _take_flags(argv: Sequence[str]) -> tuple[list[str], set[str]]:
    """(arguments without `ANYWHERE`'s flags, the flags given); ``--`` ends both."""
    end = argv.index("--") if "--" in argv else len(argv)
    kept = [argument for argument in argv[:end] if argument not in ANYWHERE]
    return [*kept, *argv[end:]], set(argv[:end]) & ANYWHERE


def _run(
    arguments: list[str], debug: bool, rank_output: RankOutput, interruptions: Interruptions
) -> int:
    try:
        result = app(arguments, prog_name=PROGRAM, standalone_mode=False)
        interruptions.over()
    except SystemExit as end:  # raised by Typer and Rich
        interruptions.over()
        return end.code if isinstance(end.code, int) else FAILURE
    except KeyboardInterrupt:
        interruptions.over()
        result = INTERRUPTED
    except Exception as error:  # noqa: BLE001 - every failure ends in one line
        interruptions.over()
        # A library may turn the interruption of its import into another error.
        if interruptions.number is None and not _aborted(error):
            with rank_output.failure_output():
                return _report(error, arguments, debug)
        if debug and sys.stderr is not None:
            traceback.print_exception(error)
        result = INTERRUPTED
    if result == INTERRUPTED:
        print_notice("interrupted" if interruptions.code == INTERRUPTED else "terminated")
        return interruptions.code
    return result if isinstance(result, int) else 0


def _aborted(error: Exception) -> bool:
    """Whether Typer made it of an interruption."""
    return isinstance(error, typer.Abort) and not isinstance(error.__cause__, EOFError)


def _report(error: Exception, arguments: Sequence[str], debug: bool) -> int:
    """Print a failure; returns the exit code."""
    if debug and sys.stderr is not None:
        text = "".join(traceback.format_exception(error))
        print(terminal_safe(text), file=sys.stderr, end="")  # noqa: T201
    if isinstance(error, ConfLayersError):
        print_notice(f"error: {in_flags(error)}")
        return error.exit_code
    # of click or of Typer's copy of it, depending on Typer's version
    if hasattr(error, "format_message"):
        return _report_usage(error, arguments)
    if _out_of_memory(error):
        message = f"out of memory: {_first_line(error)}".removesuffix(": ")
        print_notice(f"error: {message}; {LESS_MEMORY}")
        return FAILURE
    cause = error.__cause__ if isinstance(error, typer.Abort) and error.__cause__ else error
    message = f"{type(cause).__name__}: {_first_line(cause)}".rstrip(": ")
    advice = "" if debug else " (run with --debug for the traceback)"
    print_notice(f"internal error: {message}{advice}")
    return FAILURE


def _report_usage(error: Exception, arguments: Sequence[str]) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        return USAGE  # the help is printed already
    message = str(error.format_message()) if hasattr(error, "format_message") else str(error)
    # not from the error's context, which some errors lack
    command = " ".join([PROGRAM, *_find_command(arguments)])
    message = with_hint(message[:1].lower() + message[1:].rstrip("."))
    print_notice(f"error: {message}; see '{command} --help'")
    return USAGE


def _find_command(arguments: Sequence[str]) -> list[str]:
    """The words that name the command, as far as they are known: ``profile show``."""
    words: list[str] = []
    group: typer.Typer | None = app
    for word in arguments[:2]:
        if group is None:
            break
        commands = [command.name for command in group.registered_commands]
        inner = [each.typer_instance for each in group.registered_groups]
        groups = {each.info.name: each for each in inner if each is not None}
        if word not in commands and word not in groups:
            break
        words.append(word)
        group = groups.get(word)
    return words


def _out_of_memory(error: Exception) -> bool:
    if "torch" not in sys.modules:  # not imported for this
        return isinstance(error, MemoryError)
    from conflayers_cli.utils.out_of_memory import is_out_of_memory

    return is_out_of_memory(error)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def _flushed(code: int) -> int:
    """Flush the output; returns ``code``, or FAILURE where that can't be done."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError) as error:
        discard(sys.stdout)
        if code == 0:
            print_notice(
                f"error: standard output can't be written: {getattr(error, 'strerror', error)}"
            )
            code = FAILURE
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
    except (OSError, ValueError):
        discard(sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
