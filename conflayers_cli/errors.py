"""Errors meant for the user: one line that says what is wrong and what to do."""


class ConfLayersError(Exception):
    """A failure while working. The command ends with exit code 1."""

    exit_code = 1


class InputError(ConfLayersError):
    """Wrong usage or bad input: flags, files, models, profiles. Exit code 2."""

    exit_code = 2


class GateError(ConfLayersError):
    """A gate did not hold: ``--fail-under``, or outputs that differ. Exit code 3."""

    exit_code = 3


class ConfLayersWarning(UserWarning):
    """Something worth knowing, from the Python API; the command line says it on stderr."""
