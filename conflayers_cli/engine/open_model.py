"""Loading a model and making it ready for decoding.

Heavy modules are imported inside functions, so that the command line's ``--help`` stays quick.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.utils.progress import progress_bar

if TYPE_CHECKING:
    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.models.loaded_model import LoadedModel

logger = logging.getLogger(__name__)


def open_model(
    source: str,
    options: LoadOptions | None = None,
    on_loaded: Callable[[LoadedModel], None] | None = None,
) -> tuple[LoadedModel, Decoder]:
    """Load a model and make it ready for decoding; stderr shows a progress bar.

    ``on_loaded`` is called with the model before its weights may be packed.

    Raises:
        InputError: no such model, device or dtype; the model can't be spread as asked, or can't be
            decoded exactly.
        ConfLayersError: it does not fit into memory, or can't be converted.
    """
    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.kernels.native_loading import NativeLibrary
    from conflayers_cli.models.loader import load_model
    from conflayers_cli.models.registry import COMPILE_FOLDER, cache_folder
    from conflayers_cli.utils.out_of_memory import explain_oom

    options = options or LoadOptions()
    oom_message = explain_oom(
        f"the weights of {source}",
        "dtype bfloat16, quantize int8 or int4, or device_map auto takes less",
        names=("dtype bfloat16", "quantize int8", "device_map auto"),
    )
    with progress_bar() as on_progress, oom_message:
        loaded = load_model(source, options, progress=on_progress, native=NativeLibrary())
        if on_loaded is not None:
            on_loaded(loaded)
        decoder = Decoder(loaded.model, exact=options.exact)
        if options.compiled:
            from conflayers_cli.engine.compile import compile_forward

            folder = str(cache_folder() / COMPILE_FOLDER)
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)
            on_progress("compiling", 0.0)
            compilation = compile_forward(decoder)
            on_progress("compiling", 1.0)
            if not compilation.used:
                logger.warning(f"note: {compilation.reason}")
    lengths = [n for n in (loaded.context_length, decoder.exact_positions) if n is not None]
    return replace(loaded, context_length=min(lengths, default=None)), decoder
