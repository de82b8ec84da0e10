"""Options that several commands share: single ones, and groups of them (see `option_groups`)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from conflayers_cli.cli import completion
from conflayers_cli.cli.option_groups import OptionGroup
from conflayers_cli.generation.prompt_encoding import PromptOptions
from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.spec_decode.options import DraftOptions


def utf8(value: Any) -> Any:
    """Refuse an argument that is not UTF-8: Python has half surrogate pairs in place of bytes."""
    for text in value if isinstance(value, list) else [value or ""]:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise typer.BadParameter("is not UTF-8 text") from None
    return value


_model_option = partial(typer.Option, rich_help_panel="Model")
_sampling_option = partial(typer.Option, rich_help_panel="Sampling")
_prompts_option = partial(typer.Option, rich_help_panel="Prompts")
_drafting_option = partial(typer.Option, rich_help_panel="Drafting")
MAX_SEED = 2**32 - 1

Model = Annotated[
    str | None,
    _model_option(
        "--model",
        "-m",
        metavar="MODEL",
        help="smollm2, smollm2-deep, a Hugging Face id, a folder (of a model, or of an adapter of "
        "PEFT) or a .gguf file.",
        autocompletion=completion.model,
    ),
]
ProfileFile = Annotated[
    Path | None,
    _model_option(
        "--profile",
        "-p",
        metavar="FILE",
        help="What calibrate found: the layers to leave out while drafting.",
        autocompletion=completion.files(".yaml", ".yml"),
    ),
]
ProfileArgument = Annotated[
    Path, typer.Argument(metavar="FILE", help="A profile.", show_default=False)
]
Force = Annotated[
    bool,
    _model_option(
        "--force", help="Use the profile although it was made for another model of this depth."
    ),
]
LOAD = OptionGroup(
    device=_model_option(
        "--device",
        metavar="DEVICE",
        help="auto, cpu, cuda, cuda:N or mps.",
        autocompletion=completion.one_of("auto", "cpu", "cuda", "mps"),
    ),
    dtype=_model_option(
        "--dtype",
        metavar="DTYPE",
        help="auto (what is fast on the device), float32, bfloat16 or float16.",
        autocompletion=completion.one_of("auto", "float32", "bfloat16", "float16"),
    ),
    exact=_model_option(
        "--exact/--no-exact",
        help="In half precision, the very text of decoding without drafts. Without, steps are a "
        "few per cent quicker, and texts may differ where two tokens are as good as equal.",
    ),
    compiled=_model_option(
        "--compile",
        help="Compile the model's layers (torch.compile): takes a minute or so the first time, and "
        "is used if a step then measures quicker.",
    ),
    device_map=_model_option(
        "--device-map",
        metavar="auto",
        help="For a model larger than one device: spread its layers over all devices, and over "
        "the host's memory where those are too small. Slower than one device, or than torchrun.",
    ),
    quantize=_model_option(
        "--quantize",
        metavar="BITS",
        help="Load a plain model's weights in fewer bits, int8 or int4 (for native kernels on a "
        "CPU, else by torchao). That is another model, in less memory, and its text another one.",
        autocompletion=completion.one_of("int8", "int4"),
    ),
    keep_quantized=_model_option(
        "--keep-quantized/--no-keep-quantized",
        help="Compute with a GGUF file's weights in the bits that they have there (Q4_0, Q4_1, "
        "Q8_0), or dequantise them. By default what native kernels run quicker.",
    ),
    merge_adapter=_model_option(
        "--merge-adapter/--no-merge-adapter",
        help="Where the model is an adapter of PEFT: add its weights to its base's (as is done if "
        "the base is not quantised), or compute with them beside the base's in every pass.",
    ),
    trust_remote_code=_model_option(
        "--trust-remote-code", help="Run Python code that comes with the model."
    ),
)
LoadFlags = Annotated[LoadOptions, LOAD]
BriefLoadFlags = Annotated[LoadOptions, LOAD.only("device", "dtype", "trust_remote_code")]
PROMPTS = OptionGroup(
    max_new_tokens=typer.Option(
        "--max-new-tokens", "-n", min=1, metavar="N", help="The most tokens produced."
    ),
    system=_prompts_option(
        "--system",
        metavar="TEXT",
        help="A system message, put first (in place of the prompt's own).",
        callback=utf8,
    ),
    raw=_prompts_option(
        "--raw", help="Continue the prompt as it is, without the model's chat template."
    ),
    truncate=_prompts_option(
        "--truncate",
        help="Shorten a prompt that leaves no room for --max-new-tokens in the model's context "
        "(half of it is the most kept free): plain text loses its beginning, a chat's longest "
        "messages their middle.",
    ),
)
PromptFlags = Annotated[PromptOptions, PROMPTS]
SAMPLED_PROMPTS = PROMPTS.but(
    sampling=_sampling_option(
        "--sampling",
        metavar="model",
        help="Choose tokens as the model's generation config says (temperature, top-p and so on).",
    ),
    continue_final_message=_prompts_option(
        "--continue-final-message",
        help="With --data: go on with the assistant's message that each chat ends with. Without, "
        "such messages are taken for answers and left out.",
    ),
)
SampledPromptFlags = Annotated[PromptOptions, SAMPLED_PROMPTS]
SAMPLING = OptionGroup(
    temperature=_sampling_option(
        "--temperature",
        "-t",
        metavar="T",
        help="0 takes the likeliest token every time; above it, tokens are drawn.",
    ),
    top_p=_sampling_option(
        "--top-p", metavar="P", help="Draw from the likeliest tokens that hold this share."
    ),
    top_k=_sampling_option("--top-k", metavar="K", help="Draw from the K likeliest tokens."),
    min_p=_sampling_option(
        "--min-p",
        metavar="P",
        help="Draw from tokens at least this share as likely as the likeliest.",
    ),
    repetition_penalty=_sampling_option(
        "--repetition-penalty",
        metavar="R",
        help="Over 1 makes tokens of the text so far less likely.",
    ),
    seed=_sampling_option(
        "--seed",
        min=0,
        max=MAX_SEED,
        metavar="N",
        help="Seed of sampling: a prompt's text depends on it alone. Drawn if not given.",
    ),
)
SamplingFlags = Annotated[SamplingParams, SAMPLING]
DRAFT = OptionGroup(
    method=_drafting_option(
        "--draft",
        help="The proposer: skip (the profile's skipped layers), ngram (n-grams found in prompt "
        "and output), mixed (both) or none; by default as the profile says, else what pays.",
    ),
    adaptive_draft_length=_drafting_option(
        "--adaptive-draft-length/--no-adaptive-draft-length",
        help="Decide the draft length at every step, by the acceptance rate so far and the costs "
        "of passes, measured here once; without, the profile's max_tokens and stop_probability do.",
    ),
    tree=_drafting_option(
        "--tree/--no-tree",
        help="Draft side candidates beside the chain, as far as they earn their cost; by default "
        "as the profile says.",
    ),
)
DraftFlags = Annotated[DraftOptions, DRAFT]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document instead of text for people.")
]
