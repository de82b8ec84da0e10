"""The number of threads is the one that measures quickest."""

from __future__ import annotations

import pytest

from conflayers_cli.engine import native_threads
from conflayers_cli.engine.attach import attach
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.kernels.native_forward import NativeForward
from tests import tiny
from tests.kernels import native

pytestmark = pytest.mark.skipif(native.MISSING is not None, reason=str(native.MISSING))


@pytest.mark.parametrize(
    ("seconds", "busy", "chosen"),
    [
        ({8: 1.0, 4: 1.9}, 0.0, None),
        ({8: 1.0, 4: 0.9}, 0.0, None),  # no more than noise
        ({8: 1.0, 4: 0.7, 2: 1.1}, 0.05, 4),
        ({8: 1.0, 4: 0.7, 2: 0.5, 1: 0.3}, 0.0, 1),
        ({8: 1.0, 4: 0.7, 2: 0.5, 1: 0.3}, 0.2, None),  # others have a part of the processors
    ],
)
def test_fewer_threads_run_where_they_are_quicker(
    seconds: dict[int, float], busy: float, chosen: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_threads, "usable_threads", lambda: 8)
    now, used = [0.0], [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr("time.process_time", lambda: used[0])

    class Timed:
        threads: int | None = None

        def run(self, *_: object) -> None:
            threads = self.threads or 8
            now[0] += seconds[threads]
            used[0] += seconds[threads] * threads * (1 - busy)

    timed = Timed()
    attached = attach(tiny.build(tiny.CONFIGS["llama"]()), 64)
    assert native_threads.choose_threads(attached, timed) == chosen  # type: ignore[arg-type]
    assert timed.threads is None


def test_models_are_opened_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "conflayers_cli.engine.kernel_choice.choose_threads", lambda attached, forward: 3
    )
    forward = Decoder(tiny.build(tiny.CONFIGS["llama"]())).passes.fused
    assert isinstance(forward, NativeForward) and forward.num_threads == 3
