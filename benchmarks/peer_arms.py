"""The arms of :mod:`.peers`, and the workers that run them for one model."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.peer_models import Prepared
from benchmarks.peer_worker import PeerError, Worker


@dataclass(frozen=True)
class Arm:
    """One way of decoding.

    Attributes:
        engine: of `peer_engines.make_engine`.
        weights: the GGUF file's type, or what ``--quantize`` takes; None: bfloat16.
        drafts: whether something drafts: this engine by the profile, peers by prompt lookup.
    """

    engine: str
    label: str
    weights: str | None = None
    drafts: bool = False

    @property
    def holder(self) -> tuple[str, str | None, bool]:
        """What loads a model: arms with equal ones share a worker."""
        return self.engine, self.weights, self.drafts and self.engine != "conflayers"


ARMS: Mapping[str, Arm] = {
    "llama": Arm("llama.cpp", "llama.cpp"),
    "llama-lookup": Arm("llama.cpp", "llama.cpp, prompt lookup", drafts=True),
    "llama-q8": Arm("llama.cpp", "llama.cpp Q8_0", "q8_0"),
    "llama-q4": Arm("llama.cpp", "llama.cpp Q4_1", "q4_1"),
    "openvino": Arm("openvino", "OpenVINO GenAI"),
    "openvino-lookup": Arm("openvino", "OpenVINO GenAI, prompt lookup", drafts=True),
    "transformers": Arm("transformers", "transformers `generate`"),
    "plain": Arm("conflayers", "conflayers"),
    "drafts": Arm("conflayers", "conflayers, drafts", drafts=True),
    "int8": Arm("conflayers", "conflayers int8", "int8"),
    "int8-drafts": Arm("conflayers", "conflayers int8, drafts", "int8", drafts=True),
    "int4": Arm("conflayers", "conflayers int4", "int4"),
    "int4-drafts": Arm("conflayers", "conflayers int4, drafts", "int4", drafts=True),
    "q4": Arm("conflayers", "conflayers Q4_1", "q4_1"),
    "q4-drafts": Arm("conflayers", "conflayers Q4_1, drafts", "q4_1", drafts=True),
}
LABELS = {name: arm.label for name, arm in ARMS.items()}
DEFAULT_ARMS = tuple(name for name in ARMS if not name.startswith("int"))
LARGE_ARMS = ("llama", "llama-q4", "plain", "drafts")
"""Those of the largest shape, which are held in memory at once."""
DRAFTED = {name: name.removesuffix("-drafts") for name in ARMS if name.endswith("-drafts")}
DRAFTED["drafts"] = "plain"
"""What an arm's texts must be, token for token."""


@dataclass
class Bench:
    """One model's workers.

    Attributes:
        failed: arms that could not be loaded, and why.
    """

    options: argparse.Namespace
    model: Prepared
    workers: dict[Any, Worker] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def arms(self) -> list[str]:
        """Those that run."""
        return [name for name in wanted_arms(self.options, self.model.name) if self.runs(name)]

    def runs(self, name: str) -> bool:
        return ARMS[name].holder in self.workers

    def worker(self, name: str) -> Worker:
        return self.workers[ARMS[name].holder]

    def generate(
        self, name: str, prompt: Sequence[int], budget: int, ends: Sequence[int]
    ) -> dict[str, Any]:
        """One text by an arm; without the end token."""
        arm = ARMS[name]
        more = {"drafts": True} if arm.engine == "conflayers" and arm.drafts else {}
        asked = {"prompt": list(prompt), "budget": budget, "ends": list(ends)}
        found = self.worker(name).call("generate", **asked, **more)
        found["count"] = len(found["tokens"])
        long_enough = found["count"] > common.MIN_TOKENS
        found["rate"] = (found["count"] - 1) / found["rest"] if long_enough else None
        while found["tokens"] and found["tokens"][-1] in ends:
            found["tokens"].pop()
        return found


def wanted_arms(options: argparse.Namespace, model: str) -> Sequence[str]:
    """The arms asked for, or those that a model has by default."""
    chosen: Sequence[str] = options.arms or (LARGE_ARMS if model == "3b" else DEFAULT_ARMS)
    return chosen


def worker_spec(arm: Arm, bench: Bench, length: int) -> tuple[str, dict[str, Any]]:
    """The interpreter and what its worker loads, made if need be.

    Raises:
        PeerError: it can't be made.
    """
    model, python = bench.model, bench.options.peers_venv / "bin/python"
    spec: dict[str, Any] = {"engine": arm.engine, "threads": bench.options.threads}
    if arm.engine == "conflayers":
        profile = str(model.profile) if model.profile else None
        spec |= {"model": model.source, "profile": profile, "quantize": arm.weights}
        if arm.weights == "q4_1":  # the GGUF file's own bits
            spec |= {"model": str(model.gguf("q4_1", python)), "quantize": None}
        return sys.executable, spec
    if arm.engine == "transformers":
        return sys.executable, {**spec, "model": str(model.folder)}
    if not python.exists():
        raise PeerError(f"there is no {python}: python -m benchmarks.peers setup makes it")
    if arm.engine == "llama.cpp":
        spec |= {"context": length, "flash": bench.options.flash}
        spec["model"] = str(model.gguf(arm.weights or "bf16", python))
    else:
        spec["model"] = str(model.openvino(python))
    if arm.drafts:
        spec["lookup"] = True
    return str(python), spec


@contextmanager
def opened(options: argparse.Namespace, model: Prepared, length: int) -> Iterator[Bench]:
    """Within: the arms' workers, loaded; those that can't be are noted.

    ``length``: of the longest text.
    """
    bench = Bench(options, model)
    with ExitStack() as stack, tempfile.TemporaryDirectory() as logs:
        for number, name in enumerate(wanted_arms(options, model.name)):
            arm = ARMS[name]
            if arm.holder in bench.workers:
                continue
            common.say(f"{model.name}: loading {name}")
            try:
                python, spec = worker_spec(arm, bench, length)
                worker = Worker(python, spec, Path(logs) / f"{number}.log")
            except PeerError as error:
                bench.failed[name] = str(error)
                common.say(f"{name}: {error}")
                continue
            bench.workers[arm.holder] = stack.enter_context(worker)
        yield bench
