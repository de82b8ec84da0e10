"""What passes cost, measured once per device, model and dtype, and kept beside the built-in models.

A file holds the figures of one model on one device, with what they were measured on and with. It is
only ever a short cut: one that is damaged, foreign or of another environment is measured anew, and
one that can't be written is done without. Deleting it has everything measured again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from conflayers_cli.engine.cost_measurement import measure_costs
from conflayers_cli.engine.cost_model import Costs, CostTable
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.errors import ConfLayersError
from conflayers_cli.models import peft_modules, registry
from conflayers_cli.models.device import spread_of
from conflayers_cli.models.fingerprint import fingerprint
from conflayers_cli.models.loaded_model import LoadedModel
from conflayers_cli.models.quantization import signature
from conflayers_cli.utils import environment
from conflayers_cli.utils.distributed import agreed
from conflayers_cli.utils.files import write_json
from conflayers_cli.utils.progress import ProgressCallback

FORMAT = 8
"""Raised whenever the file changes, or what is measured, or how passes are run."""
STRIDE = 4
"""From one number of rows measured to the next; between them costs are interpolated."""


@dataclass(frozen=True)
class Latencies:
    """Measured costs, and where they are kept.

    Attributes:
        table: the costs.
        path: the file they are kept in, or would be; None: there is no place for one.
        measured: the numbers of rows measured just now; empty: all were known.
        unkept: why what was measured could not be kept; None: it could, or nothing was measured.
    """

    table: CostTable
    path: Path | None
    measured: tuple[int, ...]
    unkept: str | None


def sizes_up_to(rows: int) -> tuple[int, ...]:
    """The numbers of rows worth measuring where up to ``rows`` are decoded together."""
    sizes = [1]
    while sizes[-1] * STRIDE < rows:
        sizes.append(sizes[-1] * STRIDE)
    return tuple(sizes) if rows <= 1 else (*sizes, rows)


def costs_of(
    loaded: LoadedModel,
    decoder: Decoder,
    batches: Iterable[int] = (1,),
    progress: ProgressCallback | None = None,
    *,
    int4: bool = False,
) -> Latencies:
    """The costs of a loaded model's passes, from the cache folder as far as they are known."""
    return cost_table(
        decoder,
        batches=batches,
        model_key=key_of(loaded.model),
        cache_folder=registry.cache_folder(),
        progress=progress,
        int4=int4,
    )


def key_of(model: Any) -> str:
    """What tells a model from those whose passes cost something else.

    Its shape, the kinds of modules that it is made of, which say whether weights are packed, how
    its weights are quantised, and how much of an adapter stands beside them.
    """
    kinds = sorted({type(m).__name__ for m in model.modules() if not list(m.children())})
    known = {**fingerprint(model.config), "modules": kinds}
    more = {"quantised": signature(model.config), "adapter": peft_modules.signature(model)}
    told = {name: value for name, value in more.items() if value is not None}
    return json.dumps({**known, **told}, sort_keys=True)


def cost_table(
    decoder: Decoder,
    *,
    batches: Iterable[int] = (1,),
    model_key: str,
    cache_folder: Path | None,
    progress: ProgressCallback | None = None,
    int4: bool = False,
) -> Latencies:
    """The costs of a model's passes, read where they were measured before, else measured now.

    One row is always among the numbers of rows: how attention grows with the context is measured
    there, and taken to be in proportion to the rows, each of which reads keys of its own.

    Args:
        decoder: the model.
        batches: numbers of rows to have measured, each at least 1.
        model_key: tells the model from others, see `key_of`.
        cache_folder: where files are kept between runs; None: nowhere.
        progress: told about measuring.
        int4: those of drafts with weights of four bits must be known, too, where there may be such.
    """
    subject = _subject(decoder, model_key)
    path = None if cache_folder is None else _path(cache_folder, subject)
    # All ranks measure together, and go by the same figures.
    known = agreed({} if path is None else _read(path, subject))
    if int4 and decoder.stack.int4.reason is None:
        known = {rows: costs for rows, costs in known.items() if costs.knows_int4}
    missing = tuple(sorted({1, *batches} - known.keys()))
    for number, rows in enumerate(missing):
        if progress:
            progress("measuring what passes cost", number / len(missing))
        known[rows] = measure_costs(decoder, batch=rows, growth=rows == 1, int4=int4)
        if rows > 1:
            known[rows] = _grown(known[rows], known[1], rows)
    if missing and progress:
        progress("measuring what passes cost", 1.0)
    unkept = _keep(path, subject, known) if path is not None and missing else None
    return Latencies(CostTable(known, decoder.depth), path, missing, unkept)


def _grown(costs: Costs, one: Costs, rows: int) -> Costs:
    return replace(
        costs,
        attention_per_position=rows * one.attention_per_position,
        attention_per_position_and_token=rows * one.attention_per_position_and_token,
    )


def _subject(decoder: Decoder, model_key: str) -> dict[str, Any]:
    """What the figures are of, and what they depend on."""
    versions = environment.versions()
    spread = spread_of(decoder.model)
    return {
        **({"spread": spread} if spread else {}),
        "model": model_key,
        "depth": decoder.depth,
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "device": environment.device_name(decoder.device),
        "processors": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "rows": decoder.invariance.min_rows,
        "recorded": decoder.runner.reason is None,
        "forward": type(decoder.passes.fused).__name__,
        "flash": decoder.passes.flash,
        "environment": {name: versions[name] for name in ("conflayers", "torch", "transformers")},
    }


def _path(folder: Path, subject: Mapping[str, Any]) -> Path:
    """One file for all versions of the software: what an upgrade outdates it replaces."""
    lasting = {key: value for key, value in subject.items() if key != "environment"}
    text = json.dumps(lasting, sort_keys=True)
    return folder / registry.LATENCIES / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _keep(path: Path, subject: Mapping[str, Any], by_batch: Mapping[int, Costs]) -> str | None:
    """Write the file, all of it or nothing; the reason where that can't be done."""
    document = {
        "format": FORMAT,
        **subject,
        "by_batch": {str(rows): asdict(costs) for rows, costs in sorted(by_batch.items())},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, document)
    except OSError as error:
        return f"{path.parent}: {error.strerror or error}"
    except ConfLayersError as error:
        return str(error)
    return None


def _read(path: Path, subject: Mapping[str, Any]) -> dict[int, Costs]:
    """The figures of a file by rows; none where it is not wholly what it should be."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
            return {}
        by_batch = document.pop("by_batch")
        if document != subject:
            return {}
        found = {int(rows): _costs(entry) for rows, entry in by_batch.items()}
        # The growth of the others is that of one row.
        return found if min(found) == 1 else {}
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        OverflowError,  # a number without end
        RecursionError,  # brackets without end
    ):
        return {}


def _costs(entry: Mapping[str, Any]) -> Costs:
    """Costs from JSON.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, OverflowError: they are not in it, or can't
            be costs.
    """
    verify = {int(width): _number(seconds) for width, seconds in entry["verify"].items()}
    ordered = [verify[width] for width in sorted(verify)]
    if min(verify) != 1 or ordered[0] <= 0 or ordered != sorted(ordered):
        raise ValueError("no costs of passes")
    names = (field.name for field in fields(Costs) if field.name not in ("verify", "context"))
    others = {name: _number(entry[name]) for name in names}
    return Costs(verify, context=int(_number(entry["context"])), **others)


def _number(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError("no number")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError("no duration")
    return value
