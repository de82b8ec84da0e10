"""Errors name arguments, and the command line names its flags in their place."""

from __future__ import annotations

import logging
import pickle

import pytest

from conflayers_cli.cli.flags import in_flags, with_flags
from conflayers_cli.errors import InputError
from conflayers_cli.utils.notices import collect_notices, notices_to_stderr


@pytest.mark.parametrize(
    ("message", "names", "expected"),
    [
        ("lower max_new_tokens", ("max_new_tokens",), "lower --max-new-tokens"),
        ("use exact=False, top_p 1", ("exact=False", "top_p"), "use --no-exact, --top-p 1"),
        ("compiled is slow", ("compiled",), "--compile is slow"),
        ("a CUDA device: leave device out", ("device out",), "a CUDA device: leave --device out"),
        ("device and device_map", ("device", "device_map"), "--device and --device-map"),
        ("out/output.json: another output", ("output",), "out/output.json: another --output"),
        ("output/a: name another output", ("output",), "output/a: name another --output"),
        ("--tree is a flag already", ("tree",), "--tree is a flag already"),
        ("top_p stays without a name", (), "top_p stays without a name"),
    ],
)
def test_names_become_flags(message: str, names: tuple[str, ...], expected: str) -> None:
    assert with_flags(message, names) == expected
    error = InputError(message, names=names)
    assert str(error) == message
    assert in_flags(error) == expected
    assert in_flags(pickle.loads(pickle.dumps(error))) == expected


def test_notes_too(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("conflayers_cli.tests")

    def note() -> None:
        logger.warning("top_p changes nothing", extra={"names": ("top_p",)})

    with notices_to_stderr(with_flags):
        note()
        assert capsys.readouterr().err == "conflayers: --top-p changes nothing\n"
        heard: list[str] = []
        with pytest.raises(ZeroDivisionError), collect_notices(heard):
            note()
            raise ZeroDivisionError
        kept: list[str] = []
        with collect_notices(kept, with_flags):
            note()
    assert heard == ["top_p changes nothing"]
    assert kept == ["--top-p changes nothing"]
    assert capsys.readouterr().err == ""
