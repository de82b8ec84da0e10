"""Errors meant for the user: one line that says what is wrong and what to do."""

from __future__ import annotations

from collections.abc import Iterable


class ConfLayersError(Exception):
    """A failure while working, exit code 1.

    Messages name arguments (``max_new_tokens``, ``exact=False``), which the command line shows as
    its flags (see `conflayers_cli.cli.flags`).

    Args:
        message: one line.
        names: the arguments' names as written in the message, with following words where the same
            word also means something else: ``device out`` in "leave device out".
    """

    exit_code = 1

    def __init__(self, message: object = "", *, names: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.names = tuple(names)


class InputError(ConfLayersError):
    """Wrong usage or bad input: arguments, files, models, profiles. Exit code 2."""

    exit_code = 2


class GateError(ConfLayersError):
    """A gate did not hold: a speed-up under ``fail_under``, or outputs that differ. Exit code 3."""

    exit_code = 3


class ConfLayersWarning(UserWarning):
    """Something worth knowing, from the Python API; the command line says it on stderr."""
