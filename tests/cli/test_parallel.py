"""The command on several processes: one voice, one file, one exit code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conflayers_cli.profile.schema import Profile
from tests.cli.conftest import Run, save_model, save_profile, write_prompts
from tests.processes import environment
from tests.ranks import PATIENCE, Ended, run_ranks

LONG = ("--max-new-tokens", 24, "--dtype", "float32")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that two processes can share."""
    return save_model(tmp_path_factory.mktemp("shared") / "tiny", vocab_size=258)


@pytest.fixture(scope="module")
def skips(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Path:
    return save_profile(tmp_path_factory.mktemp("shared") / "tiny.yaml", shared)


def _both(*arguments: object) -> list[Ended]:
    return run_ranks(2, lambda rank: arguments)


def test_torchrun_answers_what_one_process_does(run: Run, skips: Path) -> None:
    arguments = ["generate", "-", "--profile", skips, *LONG]
    alone = run(*arguments, stdin="Once upon a time")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

    ended = subprocess.run(
        [*torchrun, "-m", "conflayers_cli", *map(str, arguments), "--stats"],
        env=environment(),
        input=b"Once upon a time",
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )

    err = ended.stderr.decode()
    assert ended.returncode == 0, err
    assert ended.stdout.decode() == alone.out != "\n"
    (drafted,) = re.findall(r"^conflayers: drafted (\d+)", err, re.MULTILINE)
    assert int(drafted) > 0
    assert " on cpu, a part of every layer on each of 2 processes; float32" in err


def test_a_bad_flag_is_told_once(shared: Path) -> None:
    first, second = _both("generate", "Hello", "--model", shared, "--nonsense")

    assert (first.code, second.code) == (2, 2)
    assert first.err.startswith("conflayers: error: no such option: --nonsense")
    assert first.err.count("\n") == 1
    assert second.err == second.out == first.out == ""


def test_what_the_model_cant_do_is_told_once(tmp_path: Path) -> None:
    narrow = save_model(tmp_path / "narrow", num_key_value_heads=1)

    ended = _both("generate", "Hello", "--model", narrow)

    assert [each.code for each in ended] == [2, 2]
    (line,) = (each.err for each in ended if each.err)  # by whoever came to it first
    assert line.startswith("conflayers: error: ") and line.count("\n") == 1
    assert "1 key/value heads, which 2 processes can't share evenly" in line


def test_a_rank_that_fails_alone_is_heard(shared: Path, tmp_path: Path) -> None:
    models = shared, tmp_path / "nowhere"

    ended = run_ranks(2, lambda rank: ["generate", "Hello", "--model", models[rank], *LONG])

    assert [each.code for each in ended] == [2, 2]
    assert ended[0].err == ""
    assert "nowhere' does not exist" in ended[1].err and ended[1].err.count("\n") == 1


def test_calibrate_writes_one_profile(shared: Path, tmp_path: Path) -> None:
    data = write_prompts(tmp_path / "prompts.jsonl", "One two three", "Why?")
    found = tmp_path / "found.yaml"
    limits = ["--strategy", "conflayers", "--max-iterations", 2, "--refine-limit", 6, "--no-tree"]

    ended = _both(
        *("calibrate", "--model", shared, "--data", data, "--output", found, *limits, *LONG),
    )

    assert [each.code for each in ended] == [0, 0], ended[0].err
    assert ended[1].out == ended[1].err == ""
    assert f"wrote {found}" in ended[0].out
    environment = Profile.load(found).environment
    assert environment is not None
    assert environment.device.endswith("a part of every layer on each of 2 processes")


def test_bench_measures_on_two_processes(shared: Path, skips: Path, tmp_path: Path) -> None:
    data = write_prompts(tmp_path / "prompts.jsonl", "One two three")
    few = ["--runs", 1, "--warmup", 0, *LONG, "--against", "transformers"]

    first, second = _both("bench", "--profile", skips, "--data", data, *few, "--json")

    assert (first.code, second.code) == (0, 0), first.err
    assert second.out == second.err == ""
    document = json.loads(first.out)
    for compared in ("identical_outputs", "identical_to_transformers"):
        assert document[compared]["matching"] == document[compared]["total"] == 1


def test_a_device_map_on_one_device_is_no_matter(run: Run, shared: Path, skips: Path) -> None:
    arguments = ["generate", "Hello", "--profile", skips, *LONG]

    assert run(*arguments, "--device-map", "auto").out == run(*arguments).out
    refused = run(*arguments, "--device-map", "auto", "--device", "cpu")
    assert refused.code == 2 and "give one" in refused.err
    assert run(*arguments, "--device-map", "even").code == 2
