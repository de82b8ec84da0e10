"""What every test of the suite shares."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import Phase, settings

from conflayers_cli.engine import kernel_choice
from conflayers_cli.kernels import native_loading
from tests import tiny
from tests.cluster.clusters import cluster

# Examples are drawn from a fixed seed, so that what fails on one machine fails on every other; no
# deadline, since how long an example takes says nothing about whether it is right.
# The same inputs on every run: more of them would only be found once.
settings.register_profile("default", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("default")
# For those who only ask whether anything fails (tools/mutants.py): the example stays as found.
settings.register_profile(
    "unshrunk",
    settings.get_profile("default"),
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)

# Nothing here may ask a hub: what is tested is built in memory.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A shell that starts the suite in the background has it ignore Ctrl-C, which is tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def without_native() -> Iterator[None]:
    """As where the native library was not built: PyTorch's kernels run passes."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (kernel_choice, native_loading):
            patch.setattr(module, "unavailable_reason", lambda: "left out by a test")
        tiny.decoder.cache_clear()
        yield
    tiny.decoder.cache_clear()


@pytest.fixture(scope="session")
def two_cpus() -> Iterator[None]:
    """This process drives a Ray cluster of two CPUs, started once for all tests in it."""
    pytest.importorskip("ray")
    with cluster():
        yield
