"""Passes are recorded where something records, and keys and values lie in one place."""

from __future__ import annotations

from dataclasses import replace

import pytest

from conflayers_cli.engine.attach import Attachment, attach
from conflayers_cli.engine.graph_runner import GraphRunner, Runner
from conflayers_cli.engine.recording import record, why_not_recorded
from conflayers_cli.kernels.kv_cache import KV_BLOCK
from tests import tiny
from tests.kernels.tape import TapeRecorder


@pytest.fixture(scope="module")
def attached() -> Attachment:
    return attach(tiny.build(tiny.CONFIGS["llama"]()), KV_BLOCK)


def test_the_reason_is_kept(attached: Attachment) -> None:
    tape = TapeRecorder()
    spread, unknown = replace(attached, spread="in two"), replace(attached, kv_layout=None)
    assert why_not_recorded(attached, None, "asked for") == "there are no graphs on cpu"
    assert why_not_recorded(spread, tape, None) == "the model is spread (in two)"
    assert why_not_recorded(unknown, tape, None) == "what keys and values are like is not known"
    assert why_not_recorded(unknown, tape, "asked for") == "asked for"
    assert why_not_recorded(attached, tape, None) is None


def test_what_runs_them(attached: Attachment) -> None:
    runner, pool = record(attached, None, None)
    assert type(runner) is Runner and pool is None
    assert runner.reason == "there are no graphs on cpu"
    runner, pool = record(attached, TapeRecorder(), None)
    assert isinstance(runner, GraphRunner) and runner.reason is None
    assert pool is not None and pool.take(10, 1).buffer.number > 0
    assert runner.multiple == attached.runner.multiple == KV_BLOCK
