"""Shares of work spread over the workers of a Ray cluster on this machine."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from conflayers_cli.cluster import ray_cluster
from conflayers_cli.cluster.ray_cluster import (
    Cluster,
    WorkerResources,
    allocate_workers,
    parse_cluster,
)
from conflayers_cli.cluster.worker_pool import WorkerInfo, WorkerPool, open_worker_pool
from conflayers_cli.errors import ConfLayersError, InputError
from conflayers_cli.utils.notices import collect_notices

LOCAL = Cluster("local", 2)


@dataclass
class Squares:
    """A worker without a model: it squares numbers, and fails as it is told to."""

    work: Callable[[int], int]
    dtype: str | None
    notes: tuple[str, ...] = ("squaring",)

    @property
    def info(self) -> WorkerInfo:
        return WorkerInfo("here", "abacus", self.dtype or f"dtype-{os.getpid()}", "2.0")

    def __call__(self, share: int) -> tuple[int, int, str]:
        return os.getpid(), self.work(share), self.info.dtype


def opened(work: Callable[[int], int], dtype: str | None) -> Squares:
    return Squares(work, dtype)


def squared(share: int) -> int:
    time.sleep(0.05)
    return share * share


def killed_once(trace: Path, share: int) -> int:
    """Every worker that comes upon share 3 dies, but the second one that does."""
    if share == 3 and not trace.exists():
        trace.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return squared(share)


def deadly(share: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return share


def refusing(dtype: str | None) -> Squares:
    raise InputError("no such model: over-there")


def failing(share: int) -> int:
    raise ZeroDivisionError("by zero")


@pytest.mark.usefixtures("two_cpus")
class TestCrew:
    def results(
        self, opening: Callable[[str | None], Any], shares: range, told: list[str]
    ) -> list[Any]:
        with collect_notices(told), open_worker_pool(LOCAL, opening) as crew:
            return list(crew.results(shares))

    def test_every_share_is_done_once_by_two_workers_in_one_dtype(self) -> None:
        told: list[str] = []
        results = self.results(partial(opened, squared), range(40), told)
        assert sorted(value for _, value, _ in results) == [n * n for n in range(40)]
        assert len({pid for pid, _, _ in results}) == 2
        assert len({dtype for _, _, dtype in results}) == 1
        assert told == ["squaring"]

    def test_what_a_killed_worker_was_at_is_done_again(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        told: list[str] = []
        work = partial(killed_once, tmp_path / "trace")
        results = self.results(partial(opened, work), range(8), told)
        assert (tmp_path / "trace").exists()
        assert sorted(value for _, value, _ in results) == [n * n for n in range(8)]
        assert any("a worker died" in note for note in told)
        assert capfd.readouterr().out == ""

    def test_a_share_that_kills_its_workers_is_given_up(self) -> None:
        with pytest.raises(ConfLayersError, match="died 4 times over the same work") as caught:
            self.results(partial(opened, deadly), range(1), [])
        assert not isinstance(caught.value, InputError)

    def test_a_worker_that_lacks_its_model_ends_it_in_the_models_words(self) -> None:
        with pytest.raises(InputError, match=r"^no such model: over-there$"):
            self.results(refusing, range(4), [])

    def test_a_fault_of_a_worker_is_told_in_one_line(self) -> None:
        with pytest.raises(ConfLayersError, match=r"^a worker failed: .*ZeroDivisionError: by ze"):
            self.results(partial(opened, failing), range(4), [])

    def test_more_workers_than_there_is_room_for_are_refused(self) -> None:
        wide = Cluster("local", 3)
        with (
            pytest.raises(InputError, match="workers 3: the cluster has room for 2"),
            open_worker_pool(wide, partial(opened, squared)),
        ):
            pass

    def test_workers_that_differ_are_told_of(self) -> None:
        told: list[str] = []
        crew = WorkerPool(WorkerResources(2, 1, 0), [], [], several_nodes=True)
        with collect_notices(told):
            for device in ("abacus", "slide rule", "slide rule"):
                info = WorkerInfo("here", device, "float32", "2.0")
                crew._compare(info)
                crew.workers.append(info)
        (note,) = told
        assert "abacus" in note and "slide rule" in note


class TestRoom:
    @pytest.mark.parametrize(
        ("nodes", "workers", "gpus", "room"),
        [
            ([(8, 0)], None, True, WorkerResources(1, 8, 0)),
            ([(8, 0), (4, 0)], None, True, WorkerResources(2, 4, 0)),
            ([(8, 0)], 3, True, WorkerResources(3, 2, 0)),
            (
                [(3, 0), (3, 0)],
                3,
                True,
                WorkerResources(3, 1, 0),
            ),  # two of two CPUs would leave one out
            ([(0, 0), (4, 0)], None, True, WorkerResources(1, 4, 0)),  # a head that does no work
            ([(16, 4), (8, 0)], None, True, WorkerResources(4, 4, 1)),
            ([(16, 4), (8, 0)], 2, True, WorkerResources(2, 8, 1)),
            ([(16, 4), (8, 0)], None, False, WorkerResources(2, 8, 0)),
            ([(2, 4)], None, True, WorkerResources(2, 1, 1)),
        ],
    )
    def test_workers_get_the_cpus_that_leave_room_for_all(
        self, nodes: list[tuple[int, int]], workers: int | None, gpus: bool, room: WorkerResources
    ) -> None:
        assert allocate_workers(nodes, workers, gpus) == room

    @pytest.mark.parametrize(
        ("nodes", "workers", "told"),
        [
            ([(4, 0)], 5, "workers 5: the cluster has room for 4, with a CPU for"),
            ([(16, 2)], 3, "workers 3: the cluster has room for 2, with a CPU and a GPU for"),
            ([(0, 0)], None, "workers 1: the cluster has room for 0"),
        ],
    )
    def test_where_there_is_none_it_is_told(
        self, nodes: list[tuple[int, int]], workers: int | None, told: str
    ) -> None:
        with pytest.raises(InputError, match=told):
            allocate_workers(nodes, workers, True)


class TestFlags:
    def test_without_ray_there_is_no_cluster(self) -> None:
        assert parse_cluster(None, None, device="auto", device_map=None) is None

    def test_on_the_cpu_no_gpu_is_asked_for(self) -> None:
        pytest.importorskip("ray")
        found = [parse_cluster("auto", 2, device=each, device_map=None) for each in ("cpu", "auto")]
        assert found == [Cluster("auto", 2, gpus=False), Cluster("auto", 2, gpus=True)]

    @pytest.mark.parametrize(
        ("address", "more", "told"),
        [
            (None, {}, "workers goes with ray auto"),
            ("auto", {"device_map": "auto"}, "leave device_map out"),
            ("auto", {"device": "cuda:1"}, "device cuda:1: Ray gives every worker a GPU"),
            ("somewhere", {}, "ray somewhere: allowed is auto, local, or HOST:PORT"),
            ("host:0", {}, "ray host:0: allowed is"),
            ("ray://host:10001", {}, "ray ray://host:10001: allowed is"),
        ],
    )
    def test_what_contradicts_itself_is_refused(
        self, address: str | None, more: dict[str, str], told: str
    ) -> None:
        flags: dict[str, Any] = {"device": "auto", "device_map": None, **more}
        with pytest.raises(InputError, match=told):
            parse_cluster(address, 2, **flags)

    def test_beside_torchrun_it_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
        for name, value in {**ranks, "MASTER_PORT": "29500"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(InputError, match="torchrun a part of every layer: use one"):
            parse_cluster("auto", None, device="auto", device_map=None)

    def test_a_missing_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ray_cluster, "find_spec", lambda name: None)
        with pytest.raises(InputError, match=r"ray needs Ray: pip install 'conflayers\[ray\]'"):
            parse_cluster("auto", None, device="auto", device_map=None)


class TestAddress:
    def test_one_that_nobody_listens_at_is_told_at_once(self) -> None:
        with socket.socket() as free:  # bound, not listening
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
            with pytest.raises(InputError, match=f"ray {address}: can't be reached"):
                ray_cluster._probe(address)

    def test_another_service_is_given_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("ray")
        monkeypatch.setattr(ray_cluster, "PROBE_TIMEOUT_S", 4.0)
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
            with pytest.raises(InputError, match=f"ray {address}: no Ray cluster answers there"):
                ray_cluster._probe(address)
