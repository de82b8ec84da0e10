"""``conflayers bench``: speculative decoding measured against vanilla."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from conflayers_cli.cli import bench_options, options
from conflayers_cli.cli.bench_publish import Exports, Gates, publish
from conflayers_cli.cli.bench_server import SERVER_LOAD, ServerLoadFlags, bench_server
from conflayers_cli.cli.common import load_profile, model_source
from conflayers_cli.cli.data_options import DATA, DataFlags
from conflayers_cli.cli.option_groups import with_groups
from conflayers_cli.errors import InputError
from conflayers_cli.generation.prompt_encoding import PromptOptions

if TYPE_CHECKING:
    from conflayers_cli.bench.job import BenchRequest


@with_groups
def bench(
    *,
    context: typer.Context,
    profile: options.ProfileFile = None,
    model: options.Model = None,
    file: DataFlags,
    batch_size: bench_options.BatchSize = 1,
    prompt_options: options.PromptFlags = PromptOptions(max_new_tokens=128),
    measuring: bench_options.MeasureFlags,
    sampling: options.SamplingFlags,
    drafting: options.DraftFlags,
    json: options.Json = False,
    stored: bench_options.Stored = None,
    exports: bench_options.ExportFlags,
    gates: bench_options.GateFlags,
    loading: ServerLoadFlags,
    force: options.Force = False,
    load: options.LoadFlags,
) -> None:
    """Measure what a profile gains: vanilla and speculative decoding, side by side.

    Both decode the same prompts in turns; without --data those of the package.
    The exit code is 3 when a gate does not hold: the speed-up is under
    --fail-under, a figure is a regression against --compare, or outputs in
    float32 are not the same. All results are written before that.

    \b
      conflayers bench --profile deep.yaml --max-prompts 6 --against transformers
      conflayers bench -p deep.yaml --fail-under 1.2 --export-json bench.json
      conflayers bench -p deep.yaml --compare bench.json --tolerance 5%
      conflayers bench --from bench.json --plot bench.pdf
      conflayers bench --server http://127.0.0.1:8000 --clients 1 --clients 8
    """
    exports.check()
    gates.check()
    loading.check()
    if stored is not None:
        _check_allowed(context, _FOR_STORED, "about measuring, which --from does not")
        return _publish_stored(stored, exports, gates, as_json=json)
    if loading.server is not None:
        _check_allowed(context, _FOR_SERVER, "not about a server's load")
        budget, to = prompt_options.max_new_tokens, exports.export_json
        return bench_server(loading, file.read(), sampling, budget, as_json=json, export_json=to)
    measuring.check(profile, model, batch_size)
    found = load_profile(profile)
    sampling.note_unused()
    drafting = replace(drafting, batch_size=batch_size)
    drafting.check(profile)

    from conflayers_cli.bench.job import BenchRequest

    request = BenchRequest(
        model=model_source(model, found),
        load=load,
        profile=found,
        profile_path=profile,
        force=force,
        prompts=file.read(),
        data=file.data,
        prompt_options=prompt_options,
        sampling=sampling,
        drafting=drafting,
        batch_size=batch_size,
        runs=measuring.runs,
        warmup=measuring.warmup,
        against=[baseline.value for baseline in measuring.against or ()],
        target_speedup=measuring.target_speedup,
    )
    _measure(request, exports, gates, as_json=json)


_FOR_STORED = frozenset(
    {"stored", "json", *bench_options.EXPORTS.options, *bench_options.GATES.options}
)
_FOR_SERVER = frozenset(
    {"json", "export_json", "max_new_tokens", "temperature", "seed"}
    | {*SERVER_LOAD.options, *DATA.options}
)


def _measure(request: BenchRequest, exports: Exports, gates: Gates, *, as_json: bool) -> None:
    from conflayers_cli.bench.job import BenchJob

    job = BenchJob.open(request)
    ran_with = job.context()
    gates.check_comparable(ran_with, request.prompt_hashes)
    publish(job.measure(ran_with), exports, gates, as_json=as_json)


def _publish_stored(stored: Path, exports: Exports, gates: Gates, *, as_json: bool) -> None:
    from conflayers_cli.bench.load import load_document

    publish(load_document(stored), exports, gates, as_json=as_json)


def _check_allowed(context: typer.Context, allowed: frozenset[str], reason: str) -> None:
    """Refuse options that change nothing beside --from or --server."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        given = source is not None and source.name == "COMMANDLINE"
        if given and parameter.name not in allowed:
            raise InputError(f"{parameter.opts[0]} is {reason}: leave one out")
