"""`conflayers serve`: its options reach the server, and what can't be served is said in a line."""

from __future__ import annotations

import math
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from conflayers_cli.server import run as server
from conflayers_cli.server.schema import CompletionRequest
from tests.cli.conftest import Run, model, own_cache, run, save_model

__all__ = ["model", "own_cache", "run"]  # fixtures


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The services that would have been served."""
    found: list[Any] = []

    def serve(service: Any, on_ready: Any) -> None:
        found.append(service)
        on_ready("http://here:1")

    monkeypatch.setattr(server, "serve", serve)
    return found


def test_options_reach_the_server(run: Run, model: Path, served: list[Any], tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("a-long-key\n")
    result = run(
        "serve", "--model", model, "--draft", "none", "--dtype", "float32", "--batch-size", 3,
        "--context", 300, "--api-key-file", keys, "--served-name", "mine", "--timeout", 5,
        "--drain", "inf",
    )  # fmt: skip

    (service,) = served
    assert (result.code, result.out) == (0, "")
    assert "mine" in result.err and "http://here:1/v1" in result.err
    assert (service.model, service.encoder.context) == ("mine", 300)
    assert (service.options.batch_size, service.options.timeout) == (3, 5)
    assert service.options.drain == math.inf and server.make_server(service)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--context", 100_000), "--context 100000"),
        (("--port", 70_000), "--port 70000"),
        (("--timeout", 0), "--timeout 0"),
        (("--drain", "nan"), "--drain"),
        (("--drain", -1), "--drain"),
        (("--api-key-file", "none.txt"), "none.txt"),
    ],
)
def test_wrong_options(
    run: Run, model: Path, served: list[Any], options: tuple[object, ...], told: str
) -> None:
    result = run("serve", "--model", model, "--draft", "none", "--dtype", "float32", *options)

    assert result.code == 2 and told in result.err and not served


def test_a_port_that_is_taken(run: Run, model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run(
            "serve", "--model", model, "--draft", "none", "--dtype", "float32", "--context", 64,
            "--port", port,
        )  # fmt: skip

    assert result.code == 1 and f":{port}" in result.err


def test_a_models_settings_are_followed(run: Run, served: list[Any], tmp_path: Path) -> None:
    folder = save_model(tmp_path / "own")
    config = hf.GenerationConfig(eos_token_id=256, suppress_tokens=[3], repetition_penalty=1.3)
    config.save_pretrained(folder)
    result = run("serve", "--model", folder, "--draft", "none", "--dtype", "float32")

    (service,) = served
    (request,) = service.encoder.encode(CompletionRequest(prompt="abc"), "")
    assert result.code == 0
    assert request.sampling.repetition_penalty == 1.3
    assert [type(each) for each in request.processors] == [hf.SuppressTokensLogitsProcessor]


def test_without_the_extra(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = run("serve", "--model", model)

    assert result.code == 1 and "pip install 'conflayers[serve]'" in result.err
