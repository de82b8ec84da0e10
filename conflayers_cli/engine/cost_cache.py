"""What passes cost, measured once per device, model and dtype, and cached.

A file holds the figures of one model on one device. One that is damaged, foreign or of another
environment is measured anew, and failing to write one is no error; any can be deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from conflayers_cli.engine.cost_measurement import costs_hold, measure_costs
from conflayers_cli.engine.cost_model import CostTable, PassCosts
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.errors import ConfLayersError
from conflayers_cli.models import peft_modules, registry
from conflayers_cli.models.config_fingerprint import config_fingerprint
from conflayers_cli.models.device import describe_spread
from conflayers_cli.models.loaded_model import LoadedModel
from conflayers_cli.models.quantization import quantization_key
from conflayers_cli.utils import environment
from conflayers_cli.utils.distributed import broadcast_rank0
from conflayers_cli.utils.files import write_json
from conflayers_cli.utils.progress import ProgressCallback

FORMAT = 11
"""Raised whenever the file changes, or what is measured, or how passes are run."""
UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    OverflowError,
    RecursionError,
)
"""What reading a damaged or foreign JSON file raises; the last two: a number, or brackets, without
end."""
MAX_VALUE = 1e9
"""Seconds of a pass, tokens or positions beyond which a file is damaged."""
BATCH_STEP = 4
"""Factor from one batch size measured to the next; between them costs are interpolated."""


@dataclass(frozen=True)
class CachedCosts:
    """Costs, the file they are in (None: there is no cache folder), the batch sizes measured just
    now, and why these could not be written (None: they were)."""

    table: CostTable
    path: Path | None
    measured: tuple[int, ...]
    cache_error: str | None


def batch_sizes_up_to(batch: int) -> tuple[int, ...]:
    """The batch sizes worth measuring where up to ``batch`` sequences are decoded together."""
    sizes = [1]
    while sizes[-1] * BATCH_STEP < batch:
        sizes.append(sizes[-1] * BATCH_STEP)
    return tuple(sizes) if batch <= 1 else (*sizes, batch)


def get_costs(
    loaded: LoadedModel,
    decoder: Decoder,
    batches: Iterable[int] = (1,),
    progress: ProgressCallback | None = None,
    *,
    int4: bool = False,
    recheck: bool = False,
) -> CachedCosts:
    """The costs of a loaded model's passes, cached in our cache folder: see :func:`cost_table`."""
    return cost_table(
        decoder,
        batches=batches,
        model_key=make_model_key(loaded.model),
        cache_folder=registry.cache_folder(),
        progress=progress,
        int4=int4,
        recheck=recheck,
    )


def make_model_key(model: Any) -> str:
    """A key of what a model's passes cost.

    Its shape, the kinds of modules that it is made of (which show whether weights are packed), its
    quantisation, and the size of its adapter.
    """
    kinds = sorted({type(m).__name__ for m in model.modules() if not list(m.children())})
    known = {**config_fingerprint(model.config), "modules": kinds}
    more = {"quantised": quantization_key(model.config), "adapter": peft_modules.adapter_key(model)}
    given = {name: value for name, value in more.items() if value is not None}
    return json.dumps({**known, **given}, sort_keys=True)


def cost_table(
    decoder: Decoder,
    *,
    batches: Iterable[int] = (1,),
    model_key: str,
    cache_folder: Path | None,
    progress: ProgressCallback | None = None,
    int4: bool = False,
    recheck: bool = False,
) -> CachedCosts:
    """The costs of a model's passes, from the cache or else measured now.

    A batch size of 1 is always among them: attention's growth with the context is measured there,
    and taken to be in proportion to the batch size, since each sequence has keys of its own.

    Args:
        decoder, model_key: the model, see `make_model_key`.
        batches: batch sizes, each at least 1.
        cache_folder: where files are kept; None: nowhere.
        progress: called while measuring.
        int4: drafts with four-bit weights must be known, too, where there are any.
        recheck: costs from the cache must still hold (see `costs_hold`), or are measured anew.
    """
    subject = cost_subject(decoder, model_key)
    path = None if cache_folder is None else _path(cache_folder, subject)
    # All ranks measure together, and use the same figures.
    known = broadcast_rank0({} if path is None else read_costs(path, subject))
    if int4 and decoder.stack.int4.reason is None:
        known = {batch: costs for batch, costs in known.items() if costs.has_int4}
    if recheck and 1 in known and not costs_hold(decoder, known[1]):
        known = {}
    missing = tuple(sorted({1, *batches} - known.keys()))
    for number, batch in enumerate(missing):
        if progress:
            progress("measuring what passes cost", number / len(missing))
        costs = measure_costs(decoder, batch=batch, growth=batch == 1, int4=int4)
        if batch > 1:
            one = known[1]
            by_both = one.attention_per_position_and_token
            costs = replace(
                costs,
                attention_per_position=batch * one.attention_per_position,
                attention_per_position_and_token=batch * by_both,
            )
        known[batch] = costs
    if missing and progress:
        progress("measuring what passes cost", 1.0)
    cache_error = _write(path, subject, known) if path is not None and missing else None
    return CachedCosts(CostTable(known, decoder.depth), path, missing, cache_error)


def cost_subject(decoder: Decoder, model_key: str) -> dict[str, Any]:
    """What the figures are of, and what they depend on."""
    versions = environment.versions()
    spread = describe_spread(decoder.model)
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
        "forward": decoder.kernels,
        "flash": decoder.passes.flash,
        "environment": {name: versions[name] for name in ("conflayers", "torch", "transformers")},
    }


def _path(folder: Path, subject: Mapping[str, Any]) -> Path:
    """One file for all versions of the software: an upgrade replaces what it outdates."""
    lasting = {key: value for key, value in subject.items() if key != "environment"}
    text = json.dumps(lasting, sort_keys=True)
    return folder / registry.COST_FOLDER / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _write(path: Path, subject: Mapping[str, Any], by_batch: Mapping[int, PassCosts]) -> str | None:
    """Write the file, all of it or nothing; returns the reason where that can't be done."""
    document = {
        "format": FORMAT,
        **subject,
        "by_batch": {str(batch): asdict(costs) for batch, costs in sorted(by_batch.items())},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, document)
    except OSError as error:
        return f"{path.parent}: {error.strerror or error}"
    except ConfLayersError as error:
        return str(error)
    return None


def read_costs(path: Path, subject: Mapping[str, Any]) -> dict[int, PassCosts]:
    """The figures of a file by batch size; none where anything in it is not as expected."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
            return {}
        by_batch = document.pop("by_batch")
        if document != subject:
            return {}
        found = {int(batch): _parse(entry) for batch, entry in by_batch.items()}
        # The growth of the others is that of a single sequence.
        return found if min(found) == 1 else {}
    except UNREADABLE:
        return {}


def _parse(entry: Mapping[str, Any]) -> PassCosts:
    """Costs from JSON; raises one of the errors that `read_costs` catches where it holds none."""
    verify = {int(width): seconds for width, seconds in entry["verify"].items()}
    others = {field.name: entry[field.name] for field in fields(PassCosts)[1:]}
    seconds = [verify[width] for width in sorted(verify)]
    for value in (*seconds, *others.values()):
        if type(value) not in (int, float) or not 0 <= value <= MAX_VALUE:
            raise ValueError("no duration")
    if min(verify) != 1 or max(verify) > MAX_VALUE or seconds[0] <= 0 or seconds != sorted(seconds):
        raise ValueError("no costs of passes")
    return PassCosts(verify, **others)
