"""Loading a model and making it ready to be decoded with.

Heavy modules are imported inside the functions, so that the command line's ``--help`` stays quick.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.utils.progress import ProgressCallback, progress_bar

if TYPE_CHECKING:
    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.models.loaded_model import LoadedModel

logger = logging.getLogger(__name__)


def open_model(
    source: str,
    options: LoadOptions | None = None,
    look: Callable[[LoadedModel], None] | None = None,
) -> tuple[LoadedModel, Decoder]:
    """Load a model and make it ready to be decoded with; a bar on stderr shows how far it is.

    Args:
        source: the model's name, folder or file.
        options: how it is loaded and run.
        look: called with the model as it was loaded, before its weights may be packed.

    Raises:
        InputError: no such model, device or dtype; one that can't be spread as wanted; or the model
            can't be decoded exactly.
        ConfLayersError: it does not fit into the memory, or can't be converted.
    """
    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.models.loader import load_model
    from conflayers_cli.utils.out_of_memory import explained

    options = options or LoadOptions()
    short = explained(
        f"the weights of {source}",
        "dtype bfloat16, quantize int8 or int4, or device_map auto takes less",
        names=("dtype bfloat16", "quantize int8", "device_map auto"),
    )
    with progress_bar() as on_progress, short:
        loaded = load_model(
            source,
            device=options.device,
            dtype=options.dtype,
            trust_remote_code=options.trust_remote_code,
            device_map=options.device_map,
            quantize=options.quantize,
            merge_adapter=options.merge_adapter,
            progress=on_progress,
        )
        if look is not None:
            look(loaded)
        decoder = Decoder(loaded.model, exact=options.exact)
        if options.compiled:
            _compile(decoder, on_progress)
    lengths = [n for n in (loaded.context_length, decoder.exact_positions) if n is not None]
    return replace(loaded, context_length=min(lengths, default=None)), decoder


def _compile(decoder: Decoder, on_progress: ProgressCallback) -> None:
    """Have the decoder's forward compiled; what the compiler makes is kept with our own files."""
    from conflayers_cli.engine.compile import compile_forward
    from conflayers_cli.models.registry import COMPILED, cache_folder

    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / COMPILED))
    on_progress("compiling", 0.0)
    compilation = compile_forward(decoder)
    on_progress("compiling", 1.0)
    if not compilation.used:
        logger.warning(f"note: {compilation.reason}")
