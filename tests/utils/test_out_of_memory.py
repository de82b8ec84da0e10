"""Memory that does not suffice: recognised, told, and where possible known before it is asked."""

from __future__ import annotations

import errno
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from conflayers_cli.engine.decoder import MIN_CHUNK, PREFILL_CHUNK, Decoder
from conflayers_cli.errors import ConfLayersError, InputError
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.utils import memory
from conflayers_cli.utils.out_of_memory import (
    OutOfMemoryError,
    available_memory,
    explain_oom,
    is_out_of_memory,
)
from tests import tiny

CPU = torch.device("cpu")


def caused(error: Exception, by: Exception) -> Exception:
    error.__cause__ = by
    return error


ALLOCATOR = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9")


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (ALLOCATOR, True),
        (RuntimeError("could not allocate memory"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("Storage size calculation overflowed with sizes=[1, 2]"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (caused(InputError("cannot read the weights"), ALLOCATOR), True),
        (RuntimeError("shape mismatch"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (InputError("out of memory: use --quantize"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_what_says_that_memory_does_not_suffice(error: BaseException, short: bool) -> None:
    assert is_out_of_memory(error) is short


def test_an_explanation_says_what_for_and_what_to_do() -> None:
    with pytest.raises(OutOfMemoryError) as caught, explain_oom("caches", "use less", 3 * 2**30):
        raise ALLOCATOR
    assert str(caught.value) == "out of memory: caches (3.0 GiB) don't fit: use less"
    assert caught.value.exit_code == 1
    with pytest.raises(OutOfMemoryError, match="caches"), explain_oom("weights", "x"):
        raise caught.value
    with pytest.raises(ZeroDivisionError), explain_oom("caches", "use less"):
        raise ZeroDivisionError


def test_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_CONTAINER_LIMIT", limit)
    monkeypatch.setattr(psutil, "LINUX", False)
    assert available_memory(CPU) is None
    monkeypatch.setattr(psutil, "LINUX", True)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=40 * 1024))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(free=2 * 1024))
    assert available_memory(CPU) == 42 * 1024
    limit.write_text("max\n")
    assert available_memory(CPU) == 42 * 1024
    limit.write_text("10000\n")
    assert available_memory(CPU) == 10_000
    assert available_memory(torch.device("mps")) is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert available_memory(torch.device("cuda")) == 1400


@pytest.mark.parametrize("count", [10**9, 10**15])
def test_an_absurd_cache_is_refused_at_once(count: int) -> None:
    decoder = tiny.decoder("llama")
    begin = time.process_time()
    with pytest.raises(OutOfMemoryError) as caught:
        Generation(decoder, GenerationRequest([1, 2], count))
    assert time.process_time() - begin < 5.0
    # 5 layers, keys and values, 2 heads of 8, float32
    needed = f"need {(count + 2) * 640 / 2**30:,.0f}"[:9]
    told = str(caught.value)
    assert told.startswith(f"out of memory: keys and values of a text of up to {count + 2:,} ")
    assert needed in told and "lower max_new_tokens, or give shorter prompts" in told
    with pytest.raises(OutOfMemoryError, match=r"of 4 texts .*max_new_tokens, batch_size"):
        decoder.new_cache(count, 4)


def test_a_cache_that_cannot_be_allocated_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny.decoder("llama")

    def fail(*arguments: object) -> None:
        raise ALLOCATOR

    monkeypatch.setattr("conflayers_cli.kernels.kv_cache.KVCache.allocate", fail)
    with pytest.raises(OutOfMemoryError, match=r"of up to 1,024 tokens \(1 MiB\) don't fit: lower"):
        decoder.new_cache(1024)


class Short:
    """A runner whose passes of more than some tokens find no memory."""

    def __init__(self, decoder: Decoder, most: int) -> None:
        self._run, self._most = decoder.runner.run, most
        self.widths: list[int] = []

    def __call__(self, inputs: Any, *arguments: Any) -> torch.Tensor:
        self.widths.append(inputs.tokens.shape[1])
        if inputs.tokens.shape[1] > self._most:
            raise ALLOCATOR
        return self._run(inputs, *arguments)


def test_a_prompt_is_read_in_smaller_parts_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = Decoder(tiny.build(tiny.CONFIGS["llama"]()))
    prompt = torch.tensor([tiny.prompt(PREFILL_CHUNK - 20)])
    expected = decoder.prefill(prompt, decoder.new_cache(prompt.shape[1]))
    short = Short(decoder, 100)
    monkeypatch.setattr(decoder.runner, "run", short)
    found = decoder.prefill(prompt, decoder.new_cache(prompt.shape[1]))
    assert short.widths == [236, 128, 64, 64, 64, 44]
    torch.testing.assert_close(found, expected)
    nothing = Short(decoder, MIN_CHUNK - 1)
    monkeypatch.setattr(decoder.runner, "run", nothing)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        decoder.prefill(prompt, decoder.new_cache(prompt.shape[1]))
    assert nothing.widths == [236, 128, 64]


def test_another_failure_of_a_prompt_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(tiny.build(tiny.CONFIGS["llama"]()))
    calls = []

    def fail(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(decoder.runner, "run", fail)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        decoder.prefill(torch.tensor([tiny.prompt(200)]), decoder.new_cache(200))
    assert len(calls) == 1


def test_it_is_an_error_of_ours() -> None:
    assert issubclass(OutOfMemoryError, ConfLayersError)
