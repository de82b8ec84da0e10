"""What was learnt while generating, kept for the next run: one file for each model and device.

A file can change speed only. One that is damaged, foreign, or of another environment is passed
over, and failing to write one is no error; any can be deleted. Runs at the same time replace one
another's files whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conflayers_cli.engine.cost_cache import UNREADABLE, cost_subject, make_model_key
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.errors import ConfLayersError
from conflayers_cli.models import registry
from conflayers_cli.models.loaded_model import LoadedModel
from conflayers_cli.search.adaptive.proposer import Learnt
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.utils.files import write_json

logger = logging.getLogger(__name__)

FORMAT = 1
MAX_FILES = 64
"""Files kept, those used last."""
MAX_BYTES = 1 << 16
"""Of a file that is read."""


class Memory:
    """The file of a model on this device.

    Args:
        loaded, decoder: the model.
        folder: where files are kept; None: our cache folder.
    """

    def __init__(self, loaded: LoadedModel, decoder: Decoder, folder: Path | None = None) -> None:
        self._depth = decoder.depth
        self._subject = {
            "name": loaded.name,
            **cost_subject(decoder, make_model_key(loaded.model)),
        }
        self._folder = folder or registry.cache_folder() / registry.LEARNT_FOLDER
        text = json.dumps(self._subject, sort_keys=True)
        self._path = self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"

    def read(self) -> Learnt | None:
        """What was learnt before; None: nothing, or nothing that can be read."""
        try:
            if self._path.stat().st_size > MAX_BYTES:
                return None
            document = json.loads(self._path.read_text(encoding="utf-8"))
            if document.pop("format") != FORMAT:
                return None
            learnt = _parse(document.pop("learnt"), self._depth)
            return learnt if document == self._subject else None
        except UNREADABLE:
            return None

    def write(self, learnt: Learnt) -> None:
        """Replace the file; where that can't be done, nothing is kept."""
        document = {"format": FORMAT, **self._subject, "learnt": asdict(learnt)}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_json(self._path, document)
            self._forget_oldest()
        except (OSError, ConfLayersError) as error:
            logger.debug(f"what was learnt is not kept: {error}")

    def _forget_oldest(self) -> None:
        files = sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
        for path in files[:-MAX_FILES]:
            with suppress(OSError):  # another run was quicker
                path.unlink()


def _parse(entry: Mapping[str, Any], depth: int) -> Learnt:
    """What a file says; raises one of the errors that `Memory.read` catches."""
    given = entry["plan"]
    plan = SkipPlan(tuple(given["attention"]), tuple(given["mlp"]), given["weights"])
    plan.check(depth)
    verify, draft = (
        {int(width): _number(seconds) for width, seconds in entry[name].items()}
        for name in ("verify", "draft")
    )
    if min([*verify, *draft], default=0) < 1 or not all((*verify.values(), *draft.values())):
        raise ValueError("no costs of passes")
    rate = _number(entry["acceptance"])
    if rate > 1 or type(entry["settled"]) is not bool:
        raise ValueError("no acceptance rate")
    return Learnt(plan, rate, entry["settled"], verify, draft, _number(entry["rounding_seconds"]))


def _number(value: object) -> float:
    if type(value) not in (int, float) or not 0 <= (number := float(value)) < math.inf:  # type: ignore[arg-type]
        raise ValueError("no duration")
    return number
