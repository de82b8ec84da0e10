"""The ``conflayers`` command: its sub-commands, and how failures are told and end."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from conflayers_cli.cli.bench import HELP as BENCH_HELP
from conflayers_cli.cli.bench import bench
from conflayers_cli.cli.calibrate import HELP as CALIBRATE_HELP
from conflayers_cli.cli.calibrate import calibrate
from conflayers_cli.cli.chat import HELP as CHAT_HELP
from conflayers_cli.cli.chat import chat
from conflayers_cli.cli.doctor import HELP as DOCTOR_HELP
from conflayers_cli.cli.doctor import doctor
from conflayers_cli.cli.flags import in_flags, with_flags
from conflayers_cli.cli.generate import HELP as GENERATE_HELP
from conflayers_cli.cli.generate import generate
from conflayers_cli.cli.interruptions import INTERRUPTED, Interruptions
from conflayers_cli.cli.mistakes import with_hint
from conflayers_cli.cli.models import HELP as MODELS_HELP
from conflayers_cli.cli.models import models
from conflayers_cli.cli.profile import app as profile_app
from conflayers_cli.cli.terminal import discard, emit
from conflayers_cli.errors import ConfLayersError
from conflayers_cli.utils.distributed import Voice
from conflayers_cli.utils.notices import PROGRAM, on_stderr, quiet, say, terminal_safe
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
"""Flags of all commands, which may stand before or behind a command's name."""

HELP = """Decode faster with the model's own layers, losslessly.

It drafts tokens with some layers left out and checks them in one full pass.

First find the layers that a model can do without, then use what was found:

\b
  conflayers calibrate --model smollm2-deep --output deep.yaml
  conflayers generate "Why is the sky blue?" --profile deep.yaml
  conflayers bench --profile deep.yaml
"""


def _current_name(name: str) -> str:
    """Today's name of a flag given by an old one."""
    return RENAMED.get(name, name)


app = typer.Typer(
    name=PROGRAM,
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["--help", "-h"],
        "token_normalize_func": _current_name,
    },
)
app.command(name="calibrate", help=CALIBRATE_HELP)(calibrate)
app.command(name="generate", help=GENERATE_HELP)(generate)
app.command(name="chat", help=CHAT_HELP)(chat)
app.command(name="bench", help=BENCH_HELP)(bench)
app.command(name="models", help=MODELS_HELP)(models)
app.command(name="doctor", help=DOCTOR_HELP)(doctor)
app.add_typer(profile_app)


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
    # transformers imports torchao where it is installed, and what that logs is no matter of ours:
    # kernels for other machines that can't be loaded here, advice on its use of PyTorch.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    arguments, flags = _take_flags(sys.argv[1:] if argv is None else argv)
    voice = Voice()
    with quiet("--quiet" in flags), on_stderr(with_flags), Interruptions() as interruptions:
        code = _run(arguments, "--debug" in flags, voice, interruptions)
        return voice.ended(_flushed(code))


def _take_flags(argv: Sequence[str]) -> tuple[list[str], set[str]]:
    """The arguments without `ANYWHERE`'s flags, and those of them that were given before ``--``."""
    end = argv.index("--") if "--" in argv else len(argv)
    kept = [argument for argument in argv[:end] if argument not in ANYWHERE]
    return [*kept, *argv[end:]], set(argv[:end]) & ANYWHERE


def _run(arguments: list[str], debug: bool, voice: Voice, interruptions: Interruptions) -> int:
    try:
        result = app(arguments, prog_name=PROGRAM, standalone_mode=False)
        interruptions.over()
    except SystemExit as end:  # Typer's and Rich's own ways out
        interruptions.over()
        return end.code if isinstance(end.code, int) else FAILURE
    except KeyboardInterrupt:
        interruptions.over()
        result = INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the last resort: whatever it is, one line tells it
        interruptions.over()
        # A library may have made something else of the interruption of its import.
        if interruptions.number is None and not _aborted(error):
            with voice.failing():
                return _report(error, arguments, debug)
        if debug and sys.stderr is not None:
            traceback.print_exception(error)
        result = INTERRUPTED
    if result == INTERRUPTED:
        say("interrupted" if interruptions.code == INTERRUPTED else "terminated")
        return interruptions.code
    return result if isinstance(result, int) else 0


def _aborted(error: Exception) -> bool:
    """Whether it is what Typer makes of an interruption."""
    return isinstance(error, typer.Abort) and not isinstance(error.__cause__, EOFError)


def _report(error: Exception, arguments: Sequence[str], debug: bool) -> int:
    """Tell the user about a failure; returns the exit code."""
    if debug and sys.stderr is not None:
        told = "".join(traceback.format_exception(error))
        print(terminal_safe(told), file=sys.stderr, end="")  # noqa: T201
    if isinstance(error, ConfLayersError):
        say(f"error: {in_flags(error)}")
        return error.exit_code
    # Typer's usage errors come from click or from Typer's copy of it, by its version: they are
    # told by what they offer.
    if hasattr(error, "format_message"):
        return _report_usage(error, arguments)
    if _out_of_memory(error):
        told = f"out of memory: {_first_line(error)}".removesuffix(": ")
        say(f"error: {told}; {LESS_MEMORY}")
        return FAILURE
    cause = error.__cause__ if isinstance(error, typer.Abort) and error.__cause__ else error
    told = f"{type(cause).__name__}: {_first_line(cause)}".rstrip(": ")
    advice = "" if debug else " (run with --debug for the traceback)"
    say(f"internal error: {told}{advice}")
    return FAILURE


def _report_usage(error: Exception, arguments: Sequence[str]) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        return USAGE  # the help is printed already
    message = str(error.format_message()) if hasattr(error, "format_message") else str(error)
    # not from the error's context, which some errors lack
    command = " ".join([PROGRAM, *_command_of(arguments)])
    message = with_hint(message[:1].lower() + message[1:].rstrip("."))
    say(f"error: {message}; see '{command} --help'")
    return USAGE


def _command_of(arguments: Sequence[str]) -> list[str]:
    """The words that name the command, or as many of them as are known: ``profile show``."""
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
    from conflayers_cli.utils.out_of_memory import is_shortage

    return is_shortage(error)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def _flushed(code: int) -> int:
    """``code``, or a failure where the rest of the output can't be written."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError) as error:
        discard(sys.stdout)
        if code == 0:
            say(f"error: standard output can't be written: {getattr(error, 'strerror', error)}")
            code = FAILURE
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
    except (OSError, ValueError):
        discard(sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
