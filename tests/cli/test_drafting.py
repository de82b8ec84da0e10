"""``--draft`` and ``--adaptive-draft-length``: who drafts, by command line and profile."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.errors import InputError
from conflayers_cli.kernels import int4_linear
from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.models.loaded_model import LoadedModel
from conflayers_cli.models.loader import load_model
from conflayers_cli.profile.build_proposer import as_batch_proposer, build_proposer
from conflayers_cli.profile.schema import DraftSettings, Profile
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.by_context import ContextLengthProposer
from conflayers_cli.spec_decode.mixed import MixedProposer
from conflayers_cli.spec_decode.options import DraftMethod, DraftOptions
from conflayers_cli.spec_decode.proposer import SkipProposer
from tests.cli.conftest import Run, save_profile, write_prompts

REPEATING = "one two three four five six, one two three four five six, one two three"


@pytest.fixture(scope="module")
def loaded(model: Path) -> LoadedModel:
    return load_model(str(model), LoadOptions(device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def decoder(loaded: LoadedModel) -> Decoder:
    return Decoder(loaded.model)


def profile_with(path: Path, model: Path, plan: SkipPlan, **draft: Any) -> Profile:
    saved = Profile.load(save_profile(path, model, plan))
    settings = {"max_tokens": 4, "stop_probability": 0.5, **draft}
    return saved.model_copy(update={"draft": DraftSettings(**settings)})


SKIPS, SKIPS_NOTHING = SkipPlan.of_layers([2]), SkipPlan()


@pytest.mark.parametrize(
    ("plan", "draft", "way", "name"),
    [
        (SKIPS, {}, DraftOptions(), "mixed"),
        (SKIPS, {"by": "skip"}, DraftOptions(), "skip"),
        (SKIPS, {"by": "mixed"}, DraftOptions(method=DraftMethod.SKIP), "skip"),
        (SKIPS, {"by": "skip"}, DraftOptions(method=DraftMethod.MIXED), "mixed"),
        (SKIPS, {"by": "none"}, DraftOptions(), None),
        (SKIPS, {}, DraftOptions(method=DraftMethod.NONE), None),
        (SKIPS, {"max_tokens": 0}, DraftOptions(), None),
        (SKIPS, {"max_tokens": 0}, DraftOptions(method=DraftMethod.SKIP), None),
        (SKIPS, {}, DraftOptions(method=DraftMethod.NGRAM), "ngram"),
        (SKIPS_NOTHING, {"by": "ngram"}, DraftOptions(), "ngram"),
        (SKIPS_NOTHING, {"by": "mixed"}, DraftOptions(), "ngram"),
        (SKIPS_NOTHING, {}, DraftOptions(), None),
        (SKIPS_NOTHING, {}, DraftOptions(method=DraftMethod.MIXED), "ngram"),
        (SKIPS_NOTHING, {}, DraftOptions(method=DraftMethod.NGRAM), "ngram"),
    ],
)
def test_who_drafts(
    loaded: LoadedModel,
    decoder: Decoder,
    model: Path,
    tmp_path: Path,
    plan: SkipPlan,
    draft: dict[str, Any],
    way: DraftOptions,
    name: str | None,
) -> None:
    profile = profile_with(tmp_path / "p.yaml", model, plan, **draft)
    proposer = build_proposer(loaded, decoder, profile, tmp_path / "p.yaml", False, way)
    assert (proposer.name if proposer else None) == name
    assert proposer is None or isinstance(proposer, MixedProposer)


@pytest.mark.parametrize(
    ("draft", "way", "fixed"),
    [
        ({"by": "skip", "lookahead": False}, DraftOptions(), True),
        ({"by": "skip", "lookahead": False}, DraftOptions(adaptive_draft_length=True), False),
        ({"by": "skip", "lookahead": False}, DraftOptions(method=DraftMethod.MIXED), False),
        ({"by": "skip", "lookahead": False}, DraftOptions(batch_size=4), False),
        ({"by": "skip"}, DraftOptions(adaptive_draft_length=False), True),
        ({"by": "skip"}, DraftOptions(), False),
    ],
)
def test_how_far(
    loaded: LoadedModel,
    decoder: Decoder,
    model: Path,
    tmp_path: Path,
    draft: dict[str, Any],
    way: DraftOptions,
    fixed: bool,
) -> None:
    profile = profile_with(tmp_path / "p.yaml", model, SKIPS, **draft)
    proposer = build_proposer(loaded, decoder, profile, tmp_path / "p.yaml", False, way)
    assert isinstance(proposer, SkipProposer if fixed else MixedProposer)
    if isinstance(proposer, SkipProposer):
        assert (proposer.max_tokens, proposer.stop_probability) == (4, 0.5)
        with pytest.raises(InputError, match="one prompt at a time"):
            as_batch_proposer(proposer)
    else:
        assert as_batch_proposer(proposer) is proposer


def test_a_fixed_length_means_skipping_alone(
    loaded: LoadedModel, decoder: Decoder, model: Path, tmp_path: Path
) -> None:
    """Where the profile says mixed, drafts of a fixed length are still as long as it says."""
    profile = profile_with(tmp_path / "p.yaml", model, SKIPS, by="mixed")
    way = DraftOptions(adaptive_draft_length=False)
    proposer = build_proposer(loaded, decoder, profile, tmp_path / "p.yaml", False, way)
    assert isinstance(proposer, SkipProposer)


def test_each_range_has_its_drafter(
    loaded: LoadedModel, decoder: Decoder, model: Path, tmp_path: Path
) -> None:
    path = save_profile(tmp_path / "ranges.yaml", model, SKIPS, lookahead=None)
    with path.open("a") as file:
        file.write(
            "ranges:\n- from_context: 60\n  skip: {attention: [1], mlp: []}\n"
            "  draft: {max_tokens: 2, stop_probability: 0.0, by: skip, lookahead: false}\n"
        )
    profile = Profile.load(path)
    proposer = build_proposer(loaded, decoder, profile, path, False, DraftOptions())
    assert isinstance(proposer, ContextLengthProposer)
    kinds = [type(each) for _, each in proposer.proposers]
    assert kinds == [MixedProposer, SkipProposer]
    together = build_proposer(loaded, decoder, profile, path, False, DraftOptions(batch_size=2))
    assert isinstance(together, ContextLengthProposer)
    assert [type(each) for _, each in together.proposers] == [MixedProposer, MixedProposer]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--draft", "skip"), "--profile FILE, or --draft ngram"),
        (("--draft", "mixed"), "--profile FILE, or --draft ngram"),
        (("--no-adaptive-draft-length",), "there are none"),
        (("--tree",), "there are none"),
        (("--draft", "ngram", "--no-adaptive-draft-length"), "not with --draft ngram"),
        (("--draft", "ngram", "--tree"), "there are none"),
        (("--draft", "none", "--adaptive-draft-length"), "nobody drafts"),
        (
            ("--draft", "none", "--lookahead"),
            "--adaptive-draft-length is about drafts",
        ),  # old names
        (("--draft", "ngram", "--no-lookahead"), "--no-adaptive-draft-length drafts as"),
        (("--draft", "everything"), "'everything' is not one of"),
        (("--adapt", "conflayers", "--draft", "ngram"), "leave --draft out"),
        (
            ("--adapt", "conflayers", "--no-adaptive-draft-length"),
            "leave --adaptive-draft-length out",
        ),
        (("--skip-only", "--target-speedup", "2", "--draft", "ngram"), "--draft is about drafting"),
    ],
)
def test_flags_that_do_not_go_together(
    run: Run, model: Path, arguments: tuple[str, ...], told: str
) -> None:
    result = run("generate", "Hello", "-m", model, *arguments)
    assert result.code == 2
    assert told in result.err
    assert result.out == ""


def test_none_with_what_is_about_drafts(run: Run, profile: Path) -> None:
    result = run("generate", "Hello", "-p", profile, "--draft", "none", "--tree")
    assert result.code == 2
    assert "--tree is about drafts by skipped layers" in result.err


def test_batches_draft_chains_whatever_the_profile_says(
    loaded: LoadedModel, decoder: Decoder, model: Path, tmp_path: Path
) -> None:
    profile = profile_with(tmp_path / "p.yaml", model, SKIPS, tree=((0.0, 3),))
    proposers = [
        build_proposer(
            loaded, decoder, profile, tmp_path / "p.yaml", False, DraftOptions(batch_size=rows)
        )
        for rows in (1, 2)
    ]
    assert [each._tree is not None for each in proposers if isinstance(each, MixedProposer)] == [
        True,
        False,
    ]


@pytest.mark.parametrize("flag", ["--tree", "--no-adaptive-draft-length"])
def test_what_does_not_go_with_batches(run: Run, profile: Path, tmp_path: Path, flag: str) -> None:
    data = write_prompts(tmp_path / "prompts.jsonl", "Hello", "world")
    result = run("generate", "--data", data, "-p", profile, "--batch-size", 2, flag)
    assert result.code == 2
    assert flag in result.err and "leave --batch-size out" in result.err


def test_every_drafter_gives_the_same_text(
    run: Run, model: Path, profile: Path, tmp_path: Path
) -> None:
    arguments = ("generate", REPEATING, "-n", 60, "--dtype", "float32", "--json")
    plain = run(*arguments, "-m", model, "--draft", "none").document
    assert plain["stats"]["drafted"] == 0
    adaptive = run(*arguments, "-m", model, "--adaptive-draft-length").document
    assert adaptive["token_ids"] == plain["token_ids"]
    ngram = run(*arguments, "-m", model, "--draft", "ngram").document
    assert set(ngram["stats"]["by_drafter"]) <= {"ngram"}
    ways = [("--draft", by.value) for by in DraftMethod] + [("--no-adaptive-draft-length",)]
    for way in ways:
        result = run(*arguments, "-p", profile, *way)
        assert result.document["token_ids"] == plain["token_ids"], way
    assert ngram["token_ids"] == plain["token_ids"]


def test_exactness_can_be_given_up(run: Run, model: Path, tmp_path: Path) -> None:
    data = write_prompts(tmp_path / "prompts.jsonl", "Hello", REPEATING)
    arguments = ("generate", "--data", data, "-m", model, "-n", 20, "--dtype", "bfloat16")
    first = run(*arguments, "--max-prompts", 1, "--no-exact", "-o", "out.jsonl")
    assert first.code == 0, first.err
    assert run(*arguments, "--no-exact", "-o", "out.jsonl", "--resume").code == 0
    refused = run(*arguments, "-o", "out.jsonl", "--resume")
    assert refused.code == 2  # another arithmetic: these may be other texts
    benched = run(
        "bench",
        "-m",
        model,
        "--draft",
        "ngram",
        "--no-exact",
        "--max-prompts",
        1,
        "-n",
        8,
        "--runs",
        1,
        "--dtype",
        "bfloat16",
        "--json",
    )
    assert benched.document["settings"]["exact"] is False


def test_costs_are_measured_once(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("CONFLAYERS_CACHE", str(cache))
    arguments = ("generate", REPEATING, "-n", 8, "-m", model, "--draft", "ngram")
    assert run(*arguments).code == 0
    (file,) = cache.glob("latencies/*.json")
    before = file.stat().st_mtime_ns
    assert json.loads(file.read_text())["by_batch"].keys() == {"1"}
    assert run(*arguments).code == 0
    assert file.stat().st_mtime_ns == before


def test_a_cache_that_cannot_be_written_is_done_without(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("CONFLAYERS_CACHE", str(tmp_path / "file"))
    result = run("generate", "Hello", "-n", 4, "-m", model, "--draft", "ngram")
    assert result.code == 0
    assert "what passes cost is measured anew every time" in result.err


def test_ranges_of_single_sequence_proposers_refuse_batches() -> None:
    proposer = ContextLengthProposer(((0, SimpleNamespace(name="skip")),))
    context = SimpleNamespace(tokens=[1, 2])
    with pytest.raises(TypeError, match="one sequence at a time"):
        proposer.propose_batch([context], [1])  # type: ignore[list-item]


def test_weights_that_are_not_to_be_had_here(
    loaded: LoadedModel,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Drafts use the model's own then, and somebody says so."""
    monkeypatch.setattr(int4_linear, "_try_kernel", lambda device, dtype: "there is no kernel here")
    decoder = Decoder(loaded.model)
    plan = SkipPlan.of_layers([2])
    profile = profile_with(tmp_path / "p.yaml", model, replace(plan, weights="int4"), by="skip")
    path = Path("p.yaml")
    for way, told in (
        (DraftOptions(adaptive_draft_length=False), True),
        (DraftOptions(method=DraftMethod.NGRAM), False),
    ):
        assert build_proposer(loaded, decoder, profile, path, False, way) is not None
        note = "note: p.yaml: drafts use the model's own weights, not int4, which is slower: there"
        assert (note in caplog.text) == told
        caplog.clear()
