"""``conflayers generate``: text from a model, drafted and checked by itself."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conflayers_cli.cli import options
from conflayers_cli.cli.adapt import Adaptation
from conflayers_cli.cli.common import load_profile, model_source
from conflayers_cli.cli.generate_options import (
    AUTO,
    AdaptFlags,
    FileFlags,
    FileOptions,
    Prompts,
    SkipOnlyFlags,
    SkipOnlyOptions,
    Stats,
    Stream,
)
from conflayers_cli.cli.generate_output import generate_file, generate_one, request_keys
from conflayers_cli.cli.option_groups import with_groups
from conflayers_cli.cli.show_drafts import ShowDrafts
from conflayers_cli.cli.store_options import StoreFlags, StoreSession
from conflayers_cli.cli.terminal import suppress_failures
from conflayers_cli.cli.text_options import TextFlags
from conflayers_cli.cluster.ray_cluster import Cluster, parse_cluster
from conflayers_cli.engine.open_model import open_model
from conflayers_cli.errors import InputError
from conflayers_cli.generation.prompt_encoding import PromptOptions, encode_prompts
from conflayers_cli.generation.request import with_seed
from conflayers_cli.generation.run import GenerationRun
from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.profile.build_proposer import as_batch_proposer, build_proposer
from conflayers_cli.profile.check import check_fit
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.options import DraftOptions
from conflayers_cli.utils.distributed import run_on_rank0
from conflayers_cli.utils.progress import is_terminal

if TYPE_CHECKING:
    from conflayers_cli.engine.decoder import Decoder
    from conflayers_cli.generation.prompts import Prompt
    from conflayers_cli.profile.schema import Profile

logger = logging.getLogger(__name__)


@with_groups
def generate(
    *,
    prompt: Prompts = None,
    profile: options.ProfileFile = None,
    model: options.Model = None,
    file: FileFlags,
    prompt_options: options.SampledPromptFlags,
    sampling: options.SamplingFlags,
    text: TextFlags,
    stream: Stream = True,
    json: options.Json = False,
    stats: Stats = False,
    show_drafts: ShowDrafts = False,
    drafting: options.DraftFlags,
    storing: StoreFlags,
    adapting: AdaptFlags,
    lossy: SkipOnlyFlags,
    force: options.Force = False,
    load: options.LoadFlags,
) -> None:
    """Generate text: the very text that the whole model would give, only sooner.

    With a profile the model drafts as that says; without one it finds out what
    pays while it generates (--draft none: nothing is drafted). The prompt is an
    argument, standard input, or a file of prompts (--data). Only the answer goes
    to standard output.

    \b
      conflayers generate "Why is the sky blue?" --profile deep.yaml --stats
      git diff | conflayers generate "Explain this change:" - -p deep.yaml
      conflayers generate -p deep.yaml --data prompts.jsonl -o out.jsonl --resume
    """
    continued = prompt_options.continue_final_message
    file.check(prompt, json, continued)
    _check_colours(show_drafts, file, json=json, stream=stream)
    adapting = adapting.resolved(profile, drafting, lossy.skip_only)
    adapting.check(drafting, file.size)
    lossy.check(profile, adapting.adapt, drafting)
    stop = text.read_stops()
    prompt_options = replace(prompt_options, template=text.read_template())
    cluster = _cluster(file, adapting.adapt, load)
    found = load_profile(profile)
    storing.check(
        drafting,
        None if adapting.adapt else found,
        adapting.adapt in (None, AUTO) and not lossy.skip_only and not cluster,
    )
    source = model_source(model, found)
    sampling.note_unused()
    drafting = replace(drafting, batch_size=file.size)
    if not (lossy.skip_only or adapting.adapt):
        drafting.check(profile)
    prompts = _read_prompts(prompt, file, continued)
    job = GenerateJob(
        source=source,
        load=load,
        profile=found,
        profile_path=profile,
        force=force,
        drafting=drafting,
        storing=StoreSession(storing, several=len(prompts) > 1 and drafting.by_ngrams),
        adaptation=(
            Adaptation(adapting, sampling.seed or 0, profile, force) if adapting.adapt else None
        ),
        lossy=lossy,
        prompts=prompts,
        prompt_options=prompt_options,
        sampling=sampling,
        stop=stop,
        keep_special=text.keep_special_tokens,
        stats=stats,
    )
    with job.ended():
        if file.data:
            job.run_file(file, cluster)
        else:
            generate_one(
                job.prepare(), stream=stream, as_json=json, stats=stats, show_drafts=show_drafts
            )


@dataclass(frozen=True)
class GenerateJob:
    """What one command does: what to generate from, with what.

    Attributes:
        source, load: the model, and how it is loaded.
        profile, profile_path, force: the profile, its file, and whether it may be another model's.
        drafting: how drafts are made.
        storing: the store of earlier texts.
        adaptation: the search while generating; None: there is none.
        lossy: what is left out for good.
        prompts, prompt_options: texts, and how they are encoded.
        sampling, stop: how tokens are found, and strings that end a text.
        keep_special: whether special tokens are part of texts.
        stats: measure what ``--stats`` prints.
    """

    source: str
    load: LoadOptions
    profile: Profile | None
    profile_path: Path | None
    force: bool
    drafting: DraftOptions
    storing: StoreSession
    adaptation: Adaptation | None
    lossy: SkipOnlyOptions
    prompts: list[Prompt]
    prompt_options: PromptOptions
    sampling: SamplingParams
    stop: list[str] | None
    keep_special: bool
    stats: bool

    def run_file(self, file: FileOptions, cluster: Cluster | None) -> None:
        """Answer a file of prompts, here or on a cluster."""
        keys = request_keys(self.prompts, self.request_settings())
        # Drawn here, once, and not by each of several workers.
        job = replace(self, sampling=with_seed(self.sampling))
        generate_file(self.prompts, keys, job.prepare, file, cluster, stats=self.stats)

    def prepare(self, dtype: str | None = None) -> GenerationRun:
        """Load the model, build what drafts, encode the prompts."""
        from conflayers_cli.generation.generator import TextGenerator

        loaded, decoder = open_model(
            self.source, replace(self.load, dtype=dtype or self.load.dtype)
        )
        proposer, skipped = None, None
        store = None if self.lossy.skip_only else self.storing.begin(loaded, decoder)
        if self.lossy.skip_only or self.adaptation:
            if self.profile:
                check_fit(loaded, decoder, self.profile, self.profile_path, self.force)
        else:
            proposer = build_proposer(
                loaded, decoder, self.profile, self.profile_path, self.force, self.drafting
            )
        if self.lossy.skip_only:
            skipped = self._skip_plan(decoder)
        if self.adaptation:
            proposer = self.adaptation.begin(loaded, decoder, self.profile)
        memory = None
        if self.stats:
            from conflayers_cli.utils.memory import PeakMemory

            memory = PeakMemory(loaded.device)
            memory.begin()
        requests = encode_prompts(
            loaded, self.prompts, self.prompt_options, self.sampling, self.stop or ()
        )
        size = self.drafting.batch_size
        generator = TextGenerator(
            decoder,
            loaded.tokenizer,
            end_tokens=loaded.end_tokens,
            proposer=as_batch_proposer(proposer) if size > 1 else proposer,
            batch_size=size,
            skip_plan=skipped,
            keep_special=self.keep_special,
            store=store,
        )
        return GenerationRun(loaded, generator, requests, memory)

    def _skip_plan(self, decoder: Decoder) -> SkipPlan:
        """What is left out for good, by the target speed-up or the profile; a warning says so."""
        from conflayers_cli.profile.describe import skipped

        if self.lossy.target_speedup is not None:
            plan = SkipPlan.unified(decoder.depth, self.lossy.target_speedup)
        else:  # without rounded weights: those are for drafts
            plan = replace(self.profile.plan, weights=None) if self.profile else SkipPlan()
            if not plan:
                raise InputError(
                    "--skip-only: the profile leaves nothing out; give --target-speedup S"
                )
        logger.warning(
            f"warning: --skip-only leaves out {skipped(plan, decoder.depth)} for good: "
            "this text is not the model's own"
            if plan
            else f"note: the target is met by all {decoder.depth} layers, so --skip-only leaves "
            "nothing out"
        )
        return plan

    def request_settings(self) -> list[Any]:
        """Everything beside the prompt that decides a text, as plain values for `request_keys`."""
        settings = [
            self.source,
            self.load.device,
            self.load.dtype,
            self.load.exact,
            self.prompt_options.max_new_tokens,
            asdict(self.sampling),
            self.prompt_options.system,
            self.prompt_options.raw,
            self.stop,
        ]
        if self.keep_special:
            settings += ["keep-special-tokens"]
        if self.prompt_options.truncate:
            settings += ["truncate"]
        if self.prompt_options.template:
            settings += ["template", self.prompt_options.template]
        if self.prompt_options.continue_final_message:
            settings += ["continue-final-message"]
        if self.prompt_options.sampling:
            settings += ["sampling", self.prompt_options.sampling]
        if self.load.quantize:
            settings += ["quantize", self.load.quantize]
        if self.load.keep_quantized is not None:
            settings += ["keep-quantized", self.load.keep_quantized]
        if self.lossy.skip_only:
            plan = self.profile.plan if self.profile else None
            settings += ["skip-only", self.lossy.target_speedup, repr(plan)]
        return settings

    @contextmanager
    def ended(self) -> Iterator[None]:
        """Behind it, and behind Ctrl-C, keep the store, report and save what ``--adapt`` found."""
        try:
            yield
        except KeyboardInterrupt:  # it must not cost what was found until then
            with suppress_failures():
                self._end()
            raise
        self._end()

    def _end(self) -> None:
        self.storing.end()
        if self.adaptation:
            self.adaptation.end(self.prompts, show=self.stats)


def _check_colours(show_drafts: bool, file: FileOptions, *, json: bool, stream: bool) -> None:
    if show_drafts and (file.data or json or not stream):
        raise InputError(
            "--show-drafts colours a text as it comes: not with --data, --json, --no-stream"
        )


def _read_prompts(words: Sequence[str] | None, file: FileOptions, continued: bool) -> list[Prompt]:
    if file.data:
        return file.read(keep_answer=continued)
    # only one of torchrun's processes has the standard input
    return [run_on_rank0(lambda: _prompt(words or []))]


def _cluster(file: FileOptions, adapt: str | None, load: LoadOptions) -> Cluster | None:
    """The Ray cluster to use; None: this process."""
    cluster = parse_cluster(file.ray, file.workers, device=load.device, device_map=load.device_map)
    if cluster and not file.data:
        raise InputError("--ray answers a file of prompts: give --data FILE")
    if cluster and adapt not in (None, AUTO):
        raise InputError("--adapt learns from prompt to prompt, in one process: leave --ray out")
    return cluster


def _prompt(words: Sequence[str]) -> Prompt:
    """The prompt of the command line.

    Standard input is read only where `-` asks for it, or no prompt is given and it is no terminal:
    in a shell's ``while read`` loop it belongs to the loop, and reading it would swallow the lines
    still to come.
    """
    from conflayers_cli.generation.prompts import Prompt

    if not words:
        if is_terminal(sys.stdin):
            raise InputError("no prompt: give PROMPT, pipe one in, or name a file with --data")
        words = ["-"]
    piped = _read_stdin() if "-" in words else ""
    text = "\n\n".join(piped if word == "-" else word for word in words)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError("the prompt is not UTF-8 text") from None
    if not text.strip():
        raise InputError("the prompt is empty")
    return Prompt("1", text=text)


def _read_stdin() -> str:
    """All of standard input, without the line end that commands put behind their output."""
    if sys.stdin is None:
        raise InputError("standard input is closed")
    from conflayers_cli.utils.text_files import read_stream

    try:
        text = read_stream(sys.stdin.buffer, "standard input")
    except OSError as error:
        raise InputError(f"standard input can't be read: {error.strerror or error}") from error
    return text.removesuffix("\n").removesuffix("\r")
