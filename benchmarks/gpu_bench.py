"""What the parts of the GPU benchmark share: models, decoders, texts, results, the time left."""

from __future__ import annotations

import argparse
import gc
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks import common, gpu_models
from benchmarks.gpu_models import PlantedModel, Planting
from benchmarks.gpu_runs import Result, make_decoder
from benchmarks.gpu_shapes import SHAPES, Shape
from benchmarks.gpu_timing import Budget, OutOfTimeError, free, median_seconds, read_memory
from conflayers_cli.engine.cost_cache import cost_table
from conflayers_cli.engine.cost_model import CostTable
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.profile.build_proposer import MAX_DRAFT_TOKENS
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.mixed import MixedProposer
from conflayers_cli.utils.environment import describe_environment
from conflayers_cli.utils.files import write_json

COPIED = 1 << 30
"""Bytes of each of the buffers that are copied to find the memory's bandwidth."""

Found = TypeVar("Found")


@dataclass(frozen=True)
class Line:
    """A figure for the table.

    Attributes:
        wanted: what it is to be, where something is.
        met: whether it is.
    """

    part: str
    figure: str
    value: str
    wanted: str = ""
    met: bool | None = None

    @property
    def cells(self) -> list[str]:
        mark = {None: "", True: "yes", False: "NO"}[self.met]
        return [f"{self.part}: {self.figure}", self.value, self.wanted, mark]


class Bench:
    """One run of the benchmark.

    Args:
        options: the settings.

    Attributes:
        parts: results by part.
        budget: the time left.
        device: where everything runs.
        quick: whether sizes are next to nothing.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.quick: bool = options.quick
        self.device = torch.device(options.device)
        self.budget = Budget(options.seconds)
        self.parts: dict[str, Result] = {}
        self._lines: list[Line] = []
        self._model: tuple[tuple[str, torch.dtype], PlantedModel] | None = None
        self._plantings: dict[tuple[str, torch.dtype], Planting] = {}
        self._decoders: dict[tuple[str, bool], Decoder] = {}
        self._tables: dict[tuple[str, bool], CostTable] = {}
        self._bandwidth: float | None = None

    @property
    def runners(self) -> tuple[str, ...]:
        """The ways to launch passes that there are here, what is meant to be used first."""
        return ("graphs", "eager") if self.device.type == "cuda" else ("eager",)

    def aims(self, runner: str) -> bool:
        """Whether speeds are to be what they are wanted to be: on a GPU, the way it is meant."""
        return self.device.type == "cuda" and runner == self.runners[0]

    def shape(self, name: str) -> Shape:
        shape = SHAPES[name]
        return shape.small() if self.quick else shape

    def model(self, name: str, dtype: torch.dtype = torch.bfloat16) -> PlantedModel:
        """A planted model; the one before it is given up, there is room for one."""
        if self._model is not None and self._model[0] == (name, dtype):
            return self._model[1]
        self.release()
        begin = time.perf_counter()
        known = self._plantings.get((name, dtype))
        made = gpu_models.make(self.shape(name), self.device, dtype, known=known)
        self._plantings[name, dtype] = made.planting
        free(self.device)
        self._model = (name, dtype), made
        common.say(
            f"made {name} in {dtype} in {time.perf_counter() - begin:.1f} s: the planted layers "
            f"agree at {made.planting.agreement:.1%}, near-ties {made.planting.near_ties:.1%}"
        )
        return made

    def decoder(self, runner: str | None = None, compiled: bool = False) -> Decoder:
        """The model behind the engine, passes launched in a certain way."""
        key = (runner or self.runners[0], compiled)
        if key not in self._decoders:
            if self._model is None:
                raise RuntimeError("there is no model yet")
            self._decoders[key] = make_decoder(self._model[1].model, *key)
        return self._decoders[key]

    def costs(
        self, rows: Sequence[int] = (1,), runner: str | None = None, compiled: bool = False
    ) -> CostTable:
        """What a decoder's passes cost, measured as the tool does."""
        key = (runner or self.runners[0], compiled)
        known = self._tables.get(key)
        if known is None or not {1, *rows} <= set(known.by_batch):
            decoder = self.decoder(*key)
            found = cost_table(decoder, batches=rows, model_key="", cache_folder=None, int4=True)
            self._tables[key] = known = found.table
        return known

    def proposer(
        self, plan: SkipPlan, *, ngram: bool = False, rows: Sequence[int] = (1,), **which: Any
    ) -> MixedProposer:
        """Drafts as the tool does: as far as it pays, by what was measured.

        Args:
            plan: what it leaves out.
            ngram: whether n-grams draft, too.
            rows: how many are decoded together.
            which: of the decoders.
        """
        decoder, table = self.decoder(**which), self.costs(rows, **which)
        return MixedProposer(decoder, plan, table, ngram=ngram, max_tokens=MAX_DRAFT_TOKENS)

    def release(self) -> None:
        """Give up the model and all that hangs on it."""
        self._tables.clear()
        self._decoders.clear()
        self._model = None
        gc.collect()
        free(self.device)

    def bandwidth(self) -> float:
        """Bytes per second, read and written, of a large copy on the device."""
        if self._bandwidth is None:
            size = 1 << 20 if self.quick else COPIED
            pairs = [
                [torch.ones(size, dtype=torch.uint8, device=self.device) for _ in range(2)]
                for _ in range(2)
            ]
            copies = [lambda one=one, other=other: other.copy_(one) for one, other in pairs]
            self._bandwidth = 2 * size / median_seconds(self.device, copies, rounds=9)
            del pairs, copies
            free(self.device)
        return self._bandwidth

    def attempt(self, part: str, out: Result, name: str, work: Callable[[], Found]) -> Found | None:
        """What the work gives; None, with the reason in the results, where it fails."""
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - the others are to be measured all the same
            out.setdefault(name, {})["failed"] = traceback.format_exc()
            self.line(part, name, f"failed: {first_line(error)}")
            return None

    def run(self, name: str, part: Callable[[Bench, Result], None], seconds: float) -> None:
        """Run a part; whatever becomes of it, what it found is kept.

        Args:
            name, part: the part.
            seconds: without as many left it is not begun.
        """
        out = self.parts[name] = {}
        if self.budget.left < seconds * (0.0 if self.quick else 1.0):
            self._end(name, out, "skipped", f"{max(self.budget.left, 0):.0f} s are left")
            self.save()
            return
        common.say(f"{name} … ({self.budget.left:.0f} s left)")
        begin = time.perf_counter()
        try:
            with self.budget.enforced():
                part(self, out)
        except OutOfTimeError as error:
            self._end(name, out, "ended early", str(error))
        except Exception as error:  # noqa: BLE001 - the other parts are to run all the same
            out["failed"] = traceback.format_exc()
            self._end(name, out, "failed", first_line(error))
            error.__traceback__ = None  # it would hold on to the part's memory
            self.release()
        out["seconds"] = time.perf_counter() - begin
        out["memory"] = read_memory(self.device)
        self.save()

    def _end(self, name: str, out: Result, how: str, why: str) -> None:
        out.setdefault(how.replace(" ", "_"), why)
        self.line(name, how, why)

    def line(
        self, part: str, figure: str, value: str, wanted: str = "", met: bool | None = None
    ) -> None:
        """Record a figure for the table, and print it."""
        line = Line(part, figure, value, wanted, met)
        self._lines.append(line)
        common.say("  " + "  ".join(cell for cell in line.cells if cell))

    def save(self) -> None:
        """Write all results so far, where a file is asked for."""
        if self.options.output is None:
            return
        document = {
            "benchmark": "gpu",
            "settings": common.describe_settings(self.options),
            "environment": describe_environment(self.device),
            "parts": self.parts,
            "table": [asdict(line) for line in self._lines],
        }
        write_json(self.options.output, plain(document))

    def print(self) -> None:
        """The table, on standard output."""
        head = ["figure", "value", "wanted", "met"]
        common.print_table(head, (line.cells for line in self._lines))


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a table."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:110]


def plain(value: Any) -> Any:
    """A result as JSON takes it: figures that are none become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [plain(own) for own in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return value.name
    return value if value is None or isinstance(value, bool | int | str) else str(value)
