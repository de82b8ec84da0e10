"""The whole tool on the real model: calibrate, generate, bench."""

import json
from pathlib import Path

import pytest

from conflayers_cli.cli.main import main
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.models.builtin import ensure_built
from conflayers_cli.models.loaded_model import LoadedModel
from conflayers_cli.models.tokenization import encode
from conflayers_cli.profile.schema import Profile
from conflayers_cli.sampling_params import SamplingParams
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import SkipProposer

pytestmark = pytest.mark.usefixtures("real_cache")
QUESTION = [{"role": "user", "content": "Name three uses of copper, one sentence each."}]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out, captured.err


def planted() -> set[int]:
    config = json.loads((ensure_built("smollm2-deep") / "config.json").read_text())
    return set(config["conflayers_planted"])


def test_calibrate_generate_bench(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    profile = tmp_path / "deep.yaml"
    out, _ = run(
        capsys,
        *("calibrate", "--model", "smollm2-deep", "--output", profile, "--max-prompts", 4),
        *(
            "--strategy",
            "conflayers",
            "--max-iterations",
            3,
            "--search-interval",
            12,
            "--max-new-tokens",
            48,
        ),
        *("--refine-limit", 12, "--json"),
    )
    trials = json.loads(out)["trials"]
    # one threshold finds nearly all of the planted layers and few others (see the worked figures)
    found = set(trials[1]["attention"])
    assert len(found & planted()) >= 24
    assert len(found - planted()) <= 8
    assert Profile.load(profile).model.depth == 60

    asked = ("generate", "Name three metals.", "-n", 24)
    plain, _ = run(capsys, *asked, "--model", "smollm2-deep")
    drafted, stats = run(capsys, *asked, "--profile", profile, "--stats")
    assert drafted == plain
    assert "tokens/s" in stats

    out, _ = run(
        capsys,
        *("bench", "--profile", profile, "--max-prompts", 2, "-n", 16, "--runs", 1),
        *("--warmup", 0, "--against", "transformers", "--json"),
    )
    document = json.loads(out)
    assert set(document["arms"]) == {"vanilla", "speculative", "transformers"}
    same = document["identical_outputs"]
    assert same["matching"] == same["total"] == 2


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(1.0, top_p=0.9, seed=1)])
@pytest.mark.parametrize("plan", [SkipPlan.of_layers([3, 9, 20]), SkipPlan.of([4, 5], [7])])
def test_smollm2_loses_nothing_under_a_bad_plan(
    smollm2: LoadedModel, plan: SkipPlan, sampling: SamplingParams
) -> None:
    decoder = Decoder(smollm2.model)
    request = GenerationRequest(encode(smollm2, QUESTION, None), 24, sampling)
    vanilla = Generation(decoder, request)
    list(vanilla)
    proposer = SkipProposer(decoder, plan, 5, 0.0)
    speculative = Generation(decoder, request, proposer=proposer)
    steps = list(speculative)
    assert speculative.output == vanilla.output
    assert 0 < sum(s.accepted for s in steps) < sum(s.drafted for s in steps)
