"""Options that several commands share: single ones, and groups of them (see `option_groups`)."""

from __future__ import annotations

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


_MODEL = "Model"
_SAMPLING = "Sampling"
_PROMPTS = "Prompts"
_DRAFTING = "Drafting"
MAX_SEED = 2**32 - 1

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="smollm2, smollm2-deep, a Hugging Face id, a folder (of a model, or of an adapter of "
        "PEFT) or a .gguf file.",
        autocompletion=completion.model,
        rich_help_panel=_MODEL,
    ),
]
ProfileFile = Annotated[
    Path | None,
    typer.Option(
        "--profile",
        "-p",
        metavar="FILE",
        help="What calibrate found: the layers to leave out while drafting.",
        autocompletion=completion.files(".yaml", ".yml"),
        rich_help_panel=_MODEL,
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Use the profile although it was made for another model of this depth.",
        rich_help_panel=_MODEL,
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="FILE",
        help="Prompt file: JSONL (prompt, messages, turns or conversations) or a prompt a line.",
        autocompletion=completion.files(".jsonl", ".json", ".jsonlines", ".ndjson", ".txt"),
        rich_help_panel=_PROMPTS,
    ),
]
MaxPrompts = Annotated[
    int | None,
    typer.Option(
        "--max-prompts",
        min=1,
        metavar="N",
        help="Use only the first N prompts.",
        rich_help_panel=_PROMPTS,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        min=1,
        metavar="N",
        help="With --data: prompts decoded at once (1); one that ends makes room for the next.",
        rich_help_panel=_PROMPTS,
        show_default=False,
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="auto|ADDRESS",
        help="Spread the prompts over the workers of a Ray cluster (HOST:PORT; auto: this "
        "machine's, or one started here for the run), each with the whole model.",
        rich_help_panel=_PROMPTS,
        show_default=False,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        metavar="N",
        help="With --ray: how many workers; by default one per GPU, without GPUs one per machine.",
        rich_help_panel=_PROMPTS,
        show_default=False,
    ),
]
LOAD = OptionGroup(
    device=typer.Option(
        "--device",
        metavar="DEVICE",
        help="auto, cpu, cuda, cuda:N or mps.",
        autocompletion=completion.one_of("auto", "cpu", "cuda", "mps"),
        rich_help_panel=_MODEL,
    ),
    dtype=typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="auto (what is fast on the device), float32, bfloat16 or float16.",
        autocompletion=completion.one_of("auto", "float32", "bfloat16", "float16"),
        rich_help_panel=_MODEL,
    ),
    exact=typer.Option(
        "--exact/--no-exact",
        help="In half precision, the very text of decoding without drafts. Without, steps are a "
        "few per cent quicker, and texts may part where two tokens are as good as equal.",
        rich_help_panel=_MODEL,
    ),
    compiled=typer.Option(
        "--compile",
        help="Compile the model's layers (torch.compile): takes a minute or so the first time, and "
        "is used if a step then measures quicker.",
        rich_help_panel=_MODEL,
    ),
    device_map=typer.Option(
        "--device-map",
        metavar="auto",
        help="For a model larger than one device: spread its layers over all devices, and over "
        "the host's memory where those are too small. Slower than one device, or than torchrun.",
        rich_help_panel=_MODEL,
        show_default=False,
    ),
    quantize=typer.Option(
        "--quantize",
        metavar="BITS",
        help="Load a plain model's weights in fewer bits, int8 or int4 (needs torchao). That is "
        "another model, in less memory, and its text another one.",
        autocompletion=completion.one_of("int8", "int4"),
        rich_help_panel=_MODEL,
        show_default=False,
    ),
    merge_adapter=typer.Option(
        "--merge-adapter/--no-merge-adapter",
        help="Where the model is an adapter of PEFT: add its weights to its base's (as is done if "
        "the base is not quantised), or compute with them beside the base's in every pass.",
        rich_help_panel=_MODEL,
        show_default=False,
    ),
    trust_remote_code=typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the model.",
        rich_help_panel=_MODEL,
    ),
)
LoadFlags = Annotated[LoadOptions, LOAD]
BriefLoadFlags = Annotated[LoadOptions, LOAD.only("device", "dtype", "trust_remote_code")]
PROMPTS = OptionGroup(
    max_new_tokens=typer.Option(
        "--max-new-tokens", "-n", min=1, metavar="N", help="The most tokens produced."
    ),
    system=typer.Option(
        "--system",
        metavar="TEXT",
        help="A system message, put first (in place of the prompt's own).",
        callback=utf8,
        rich_help_panel=_PROMPTS,
    ),
    raw=typer.Option(
        "--raw",
        help="Continue the prompt as it is, without the model's chat template.",
        rich_help_panel=_PROMPTS,
    ),
    truncate=typer.Option(
        "--truncate",
        help="Shorten a prompt that leaves no room for --max-new-tokens in the model's context "
        "(half of it is the most kept free): plain text loses its beginning, a chat's longest "
        "messages their middle.",
        rich_help_panel=_PROMPTS,
    ),
)
PromptFlags = Annotated[PromptOptions, PROMPTS]
SAMPLING = OptionGroup(
    temperature=typer.Option(
        "--temperature",
        "-t",
        metavar="T",
        help="0 takes the likeliest token every time; above it, tokens are drawn.",
        rich_help_panel=_SAMPLING,
    ),
    top_p=typer.Option(
        "--top-p",
        metavar="P",
        help="Draw from the likeliest tokens that hold this share.",
        rich_help_panel=_SAMPLING,
    ),
    top_k=typer.Option(
        "--top-k",
        metavar="K",
        help="Draw from the K likeliest tokens.",
        rich_help_panel=_SAMPLING,
    ),
    min_p=typer.Option(
        "--min-p",
        metavar="P",
        help="Draw from tokens at least this share as likely as the likeliest.",
        rich_help_panel=_SAMPLING,
    ),
    repetition_penalty=typer.Option(
        "--repetition-penalty",
        metavar="R",
        help="Over 1 makes tokens of the text so far less likely.",
        rich_help_panel=_SAMPLING,
    ),
    seed=typer.Option(
        "--seed",
        min=0,
        max=MAX_SEED,
        metavar="N",
        help="Of the random numbers; prompt i of a file uses N + i.",
        rich_help_panel=_SAMPLING,
    ),
)
SamplingFlags = Annotated[SamplingParams, SAMPLING]
DRAFT = OptionGroup(
    method=typer.Option(
        "--draft",
        help="Who drafts: the profile's skipped layers, n-grams found in prompt and output, both "
        "(mixed), or nobody; by default as the profile says, else nobody.",
        rich_help_panel=_DRAFTING,
        show_default=False,
    ),
    adaptive_draft_length=typer.Option(
        "--adaptive-draft-length/--no-adaptive-draft-length",
        help="Draft as long as it pays, by what was accepted so far and by what passes cost here "
        "(measured once); without, up to the profile's max_tokens and stop_probability.",
        rich_help_panel=_DRAFTING,
        show_default=False,
    ),
    tree=typer.Option(
        "--tree/--no-tree",
        help="Draft side candidates beside the chain, as far as they earn their cost; by default "
        "as the profile says.",
        rich_help_panel=_DRAFTING,
        show_default=False,
    ),
)
DraftFlags = Annotated[DraftOptions, DRAFT]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document instead of text for people.")
]
