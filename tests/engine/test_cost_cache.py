"""Costs kept between runs: what is read, what is measured anew, and that nothing here fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conflayers_cli.engine import cost_cache
from conflayers_cli.engine.cost_cache import (
    CachedCosts,
    batch_sizes_up_to,
    cost_table,
    make_model_key,
)
from conflayers_cli.engine.cost_measurement import measure_costs
from conflayers_cli.engine.cost_model import PassCosts
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.utils import environment
from tests import tiny

_VERSIONS: dict[str, str] = environment.versions()
COSTS = PassCosts({1: 2.0, 5: 3.0}, 0.5, 0.25, 0.125, 64, 0.001, 0.0001)


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of rows measured, in order; every time gives costs of its own."""
    sizes: list[int] = []

    def measure(decoder: Decoder, *, batch: int, growth: bool, int4: bool) -> PassCosts:
        assert growth == (batch == 1)
        sizes.append(batch)
        costs = replace(COSTS, floor=COSTS.floor + len(sizes))
        return costs if growth else replace(costs, attention_per_position=0.0)

    monkeypatch.setattr(cost_cache, "measure_costs", measure)
    return sizes


def _table(folder: Path | None, *batches: int, key: str = "model") -> CachedCosts:
    return cost_table(
        tiny.decoder("llama"), batches=batches or (1,), model_key=key, cache_folder=folder
    )


def test_what_was_measured_is_kept(tmp_path: Path, measured: list[int]) -> None:
    first = _table(tmp_path)
    assert first.measured == (1,) and first.cache_error is None
    assert first.path is not None and first.path.parent == tmp_path / "latencies"
    again = _table(tmp_path)
    assert again == replace(first, measured=())
    assert again.table.depth == tiny.DEPTH
    assert measured == [1]
    assert [file.name for file in first.path.parent.iterdir()] == [first.path.name]


def test_only_missing_sizes_are_measured(tmp_path: Path, measured: list[int]) -> None:
    assert _table(tmp_path, 4).measured == (1, 4)  # one row always
    assert _table(tmp_path, 4, 16, 1).measured == (16,)
    assert _table(tmp_path, 1).measured == ()
    assert measured == [1, 4, 16]
    table = _table(tmp_path, 16).table
    assert [table.by_batch[rows].floor for rows in (1, 4, 16)] == [1.5, 2.5, 3.5]


def test_growth_is_in_proportion_to_the_rows(tmp_path: Path) -> None:
    by_batch = _table(tmp_path, 8).table.by_batch
    assert by_batch[8].attention_per_position == pytest.approx(0.008)
    assert by_batch[8].attention_per_position_and_token == pytest.approx(0.0008)
    assert by_batch[1].attention_per_position == 0.001


def test_real_costs_come_back_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(decoder: Decoder, *, batch: int, growth: bool, int4: bool) -> PassCosts:
        return measure_costs(decoder, context=8, rounds=1, batch=batch, growth=growth)

    monkeypatch.setattr(cost_cache, "measure_costs", measure)
    first = _table(tmp_path, 2)
    assert _table(tmp_path, 2).table == first.table


CHANGES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "threads": lambda m: m.setattr(torch, "get_num_threads", lambda: 77),
    "processor": lambda m: m.setattr(environment, "processor_name", lambda: "another"),
    "torch": lambda m: m.setattr(environment, "versions", lambda: {**_VERSIONS, "torch": "99"}),
    "transformers": lambda m: m.setattr(
        environment, "versions", lambda: {**_VERSIONS, "transformers": "99"}
    ),
    "conflayers": lambda m: m.setattr(
        environment, "versions", lambda: {**_VERSIONS, "conflayers": "99"}
    ),
    "format": lambda m: m.setattr(cost_cache, "FORMAT", 99),
    "dtype": lambda m: m.setattr(tiny.decoder("llama"), "dtype", torch.bfloat16),
    "depth": lambda m: m.setattr(tiny.decoder("llama"), "depth", 99),
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_environment_is_measured_anew(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[int]
) -> None:
    before = _table(tmp_path)
    CHANGES[what](monkeypatch)
    assert _table(tmp_path).measured == (1,)
    assert _table(tmp_path).measured == ()
    assert measured == [1, 1]
    monkeypatch.undo()
    # a newer version takes the file of an older one; other machines and settings have their own
    files = len(list((tmp_path / "latencies").iterdir()))
    replaced = what in ("torch", "transformers", "conflayers", "format")
    assert files == (1 if replaced else 2)
    assert before.path is not None and before.path.exists()


def test_another_model_has_a_file_of_its_own(tmp_path: Path) -> None:
    assert _table(tmp_path, key="a").path != _table(tmp_path, key="b").path


def test_the_python_version_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _table(tmp_path)
    monkeypatch.setattr(environment, "versions", lambda: {**_VERSIONS, "python": "99"})
    assert _table(tmp_path).measured == ()


def _changed(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    def change(document: dict[str, Any]) -> Any:
        document["by_batch"]["1"].update(changes)
        return document

    return change


@pytest.mark.parametrize(
    "damage",
    [
        lambda document: [],
        lambda document: {**document, "by_batch": {}},
        lambda document: {**document, "by_batch": []},
        lambda document: {**document, "by_batch": {"one": document["by_batch"]["1"]}},
        lambda document: {**document, "by_batch": {"4": document["by_batch"]["1"]}},
        lambda document: {**document, "by_batch": {"0": document["by_batch"]["1"]}},
        lambda document: {**document, "more": 1},
        lambda document: {k: v for k, v in document.items() if k != "threads"},
        lambda document: {k: v for k, v in document.items() if k != "by_batch"},
        _changed(verify={}),
        _changed(verify={"2": 1.0}),
        _changed(verify={"1": 0.0, "5": 1.0}),
        _changed(verify={"1": 2.0, "5": 1.0}),
        _changed(verify={"1": -2.0}),
        _changed(verify={"1": float("nan")}),
        _changed(verify={"1": float("inf")}),
        _changed(verify=[2.0]),
        _changed(verify=None),
        _changed(floor=-0.1),
        _changed(floor=float("nan")),
        _changed(floor="0.1"),
        _changed(floor=True),
        _changed(floor=10**400),
        _changed(mlp=None),
        _changed(context=-1),
        _changed(floor=1e300),
        _changed(verify={"1": 1.0, "9" * 400: 2.0}),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_measured_anew(
    damage: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    path = _table(tmp_path).path
    assert path is not None
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    assert _table(tmp_path).measured == (1,)
    assert _table(tmp_path).measured == ()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b"3"])
def test_a_broken_file_is_measured_anew(content: bytes, tmp_path: Path) -> None:
    path = _table(tmp_path).path
    assert path is not None
    path.write_bytes(content)
    assert _table(tmp_path).measured == (1,)
    assert _table(tmp_path).measured == ()


def test_a_cut_file_is_measured_anew(tmp_path: Path) -> None:
    path = _table(tmp_path).path
    assert path is not None
    path.write_bytes(path.read_bytes()[:-40])
    assert _table(tmp_path).measured == (1,)


def test_without_a_place_it_is_measured_every_time(tmp_path: Path, measured: list[int]) -> None:
    for _ in range(2):
        nowhere = _table(None)
        assert nowhere.path is None and nowhere.cache_error is None and nowhere.measured == (1,)
    occupied = tmp_path / "file"
    occupied.write_text("")
    for _ in range(2):
        found = _table(occupied)
        assert found.measured == (1,)
        assert found.cache_error is not None and str(occupied) in found.cache_error
    assert measured == [1] * 4


def test_a_folder_in_the_files_place_is_no_error(tmp_path: Path) -> None:
    path = _table(tmp_path).path
    assert path is not None
    path.unlink()
    path.mkdir()
    found = _table(tmp_path)
    assert found.measured == (1,)
    assert found.cache_error is not None and str(path) in found.cache_error


def test_progress_is_told_only_where_something_is_measured(tmp_path: Path) -> None:
    told: list[float] = []
    for _ in range(2):
        cost_table(
            tiny.decoder("llama"),
            batches=(1, 4),
            model_key="model",
            cache_folder=tmp_path,
            progress=lambda message, done: told.append(done),
        )
    assert told == [0.0, 0.5, 1.0]


def test_keys_tell_models_apart() -> None:
    model = tiny.build(tiny.CONFIGS["llama"]())
    same = tiny.build(tiny.CONFIGS["llama"](), seed=1)
    other = tiny.build(tiny.CONFIGS["qwen2"]())
    assert make_model_key(model) == make_model_key(same) != make_model_key(other)
    same.model.layers[2].mlp.up_proj = torch.nn.Bilinear(1, 1, 1)  # another kind of module
    assert make_model_key(model) != make_model_key(same)


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [(1, (1,)), (2, (1, 2)), (4, (1, 4)), (5, (1, 4, 5)), (16, (1, 4, 16)), (20, (1, 4, 16, 20))],
)
def test_sizes_up_to(rows: int, sizes: tuple[int, ...]) -> None:
    assert batch_sizes_up_to(rows) == sizes


def test_costs_of_a_busier_machine_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[int]
) -> None:
    def table(recheck: bool) -> CachedCosts:
        return cost_table(
            tiny.decoder("llama"), model_key="m", cache_folder=tmp_path, recheck=recheck
        )

    assert table(False).measured == (1,)
    for holds, again in ((True, ()), (False, (1,))):
        monkeypatch.setattr(cost_cache, "costs_hold", lambda decoder, known, ok=holds: ok)
        assert table(True).measured == again
        assert table(False).measured == ()
    assert measured == [1, 1]
