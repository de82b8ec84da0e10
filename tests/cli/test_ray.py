"""A file of prompts answered by a cluster: the lines that one process writes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run, finished, save_profile, start, write_prompts
from tests.cluster.clusters import TOKEN, folder, workers

pytest.importorskip("ray")

FAST = ("--dtype", "float32", "--device", "cpu")
RAY = ("--ray", "auto", "--workers", 2)
PATIENCE_S = 300.0


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [f"number {number}, " * (1 + number % 4) for number in range(16)]
    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", *texts)


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of an output, without what times say."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    records = [json.loads(line) for line in text.split("\n")[:-1]]
    return [{k: v for k, v in record.items() if k != "stats"} for record in records]


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.usefixtures("two_cpus")
class TestGenerate:
    def test_a_killed_worker_changes_nothing(
        self, run: Run, profile: Path, prompts: Path, tmp_path: Path
    ) -> None:
        command = ("generate", "-p", profile, "--data", prompts, *FAST, "-n", 120)
        alone, shared = tmp_path / "alone.jsonl", tmp_path / "shared.jsonl"
        assert run(*command, "-o", alone).code == 0
        killed: list[int] = []

        def kill() -> None:
            # all before they have answered anything, so that every line is a restarted worker's;
            # then one at its work, unless the work is done by then
            until(lambda: len(workers()) == 2)
            killed.extend(worker.pid for worker in workers())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
            until(lambda: bool(lines(shared)))
            for worker in workers()[:1]:
                with suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        result = run(*command, "-o", shared, *RAY, "--stats")
        killer.join()
        assert (result.code, result.out, len(killed)) == (0, "", 2)
        assert lines(shared) == lines(alone)
        assert len(lines(shared)) == 16
        assert "a worker died; what it was at was done again" in result.err
        assert "on 1 machine, 1 CPU" in result.err  # of both, or of the one that was back in time

    def test_drawn_texts_and_batches_are_those_of_one_process(
        self, run: Run, model: Path, prompts: Path, tmp_path: Path
    ) -> None:
        drawing = ("-t", 1.2, "--seed", 5, "--batch-size", 2, "-n", 12)
        command = ("generate", "-m", model, "--data", prompts, *FAST, *drawing)
        alone, shared = run(*command), run(*command, *RAY)
        assert shared.code == 0
        without = [[{**line, "stats": None} for line in each.lines] for each in (alone, shared)]
        assert without[0] == without[1]
        assert len({line["text"] for line in without[0]}) > 8

    def test_resume_asks_for_what_is_missing_alone(
        self, run: Run, model: Path, prompts: Path, tmp_path: Path
    ) -> None:
        output = tmp_path / "out.jsonl"
        command = ("generate", "-m", model, "--data", prompts, *FAST, "-n", 5, "-o", output)
        assert run(*command).code == 0
        whole = output.read_text()
        kept = "".join(whole.splitlines(keepends=True)[:14])
        output.write_text(kept + '{"cut off')
        result = run(*command, "--resume", *RAY)
        assert (result.code, output.read_text()[: len(kept)]) == (0, kept)
        assert len(lines(output)) == 16
        assert "14 of 16 prompts are answered already" in result.err

    def test_a_missing_model_is_told_once(self, run: Run, prompts: Path) -> None:
        command = ("generate", "-m", "./missing", "--data", prompts, *FAST)
        alone, shared = run(*command), run(*command, *RAY)
        assert (shared.code, shared.out) == (2, "")
        assert shared.err == alone.err
        assert shared.err.count("\n") == 1 and "./missing" in shared.err

    def test_notes_of_several_workers_are_told_once(
        self, run: Run, model: Path, prompts: Path
    ) -> None:
        command = ("generate", "-m", model, "--data", prompts, *FAST, "--stop", "e", "-n", 9999)
        more = ("--max-prompts", 3, "--skip-only", "--target-speedup", 1.2)
        alone, shared = run(*command, *more), run(*command, *more, *RAY)
        assert (shared.code, shared.err) == (0, alone.err)
        assert "this text is not the model's own" in shared.err
        assert "3 of 3 prompts leave room for" in shared.err

    def test_relative_paths_mean_the_commands_folder(
        self, run: Run, model: Path, prompts: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "here").symlink_to(model)
        result = run("generate", "-m", "./here", "--data", prompts, *FAST, "-n", 3, *RAY)
        assert (result.code, len(result.lines)) == (0, 16)


def test_flags_that_need_each_other_are_told(run: Run, model: Path, prompts: Path) -> None:
    for more, told in (
        (("Hello",), "--ray answers a file of prompts: give --data FILE"),
        (("--data", prompts, "--adapt", "conflayers"), "leave --ray out"),
        (("--data", prompts, "--device-map", "auto"), "leave --device-map out"),
    ):
        result = run("generate", "-m", model, *more, "--ray", "auto")
        assert (result.code, result.out) == (2, "")
        assert told in result.err and result.err.count("\n") == 1


def test_calibrate_has_no_such_option(run: Run, model: Path, prompts: Path) -> None:
    result = run("calibrate", "-m", model, "--data", prompts, *RAY)
    assert (result.code, result.out) == (2, "")
    assert "--ray" in result.err and not list(Path.cwd().glob("*.journal.jsonl"))


def test_ctrl_c_leaves_whole_lines_and_no_workers(
    run: Run, model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    profile = save_profile(tmp_path / "tiny.yaml", model)
    command = ("generate", "-p", profile, "--data", prompts, *FAST, "-n", 400, "-o", output)
    with folder() as place:
        monkeypatch.setenv("RAY_TMPDIR", place)
        monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
        local = ("--ray", "local", "--workers", 1)
        process = start([*command, *local], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            until(lambda: len(lines(output)) >= 2 or process.poll() is not None)
            there = workers(process.pid)
            process.send_signal(signal.SIGINT)
            result = finished(process)
        finally:
            process.kill()
        assert (result.code, result.out, len(there)) == (130, "", 1)
        until(lambda: not any(each.is_running() for each in there))
    written = lines(output)
    assert 2 <= len(written) < 16
    told = r"conflayers: \d+ of 16 prompts are answered; --resume goes on from there\n"
    assert re.fullmatch(f"{told}conflayers: interrupted\n", result.err)
    assert run(*command, "--resume").code == 0
    assert lines(output)[: len(written)] == written
    assert [line["index"] for line in lines(output)] == list(range(16))
