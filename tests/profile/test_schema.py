"""Profiles: what is written is read back, and what does not fit is refused in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from conflayers_cli.errors import ConfLayersError, InputError
from conflayers_cli.profile.describe import description
from conflayers_cli.profile.schema import (
    DraftSettings,
    Environment,
    FoundBy,
    Measured,
    ModelFingerprint,
    Profile,
    PromptsUsed,
    RangeSection,
    SkipSection,
    WeightSketchSection,
)
from conflayers_cli.skip_plan import SkipPlan

MODEL = ModelFingerprint(
    name="smollm2-deep",
    architecture="LlamaForCausalLM",
    depth=60,
    hidden_size=576,
    attention_heads=9,
    key_value_heads=3,
    intermediate_size=1536,
    vocabulary=49152,
    config_hash="ab" * 32,
    sketch=WeightSketchSection(
        rounding=0.083, projections=(0.25, -0.5, 0.125, 0.0, 1.0, -1.0, 0.3, -0.1)
    ),
)
FULL = Profile(
    model=MODEL,
    skip=SkipSection(attention=(1, 2, 5), mlp=(1, 2, 58)),
    draft=DraftSettings(max_tokens=6, stop_probability=0.4, tree=((0.8, 3), (0.25, 0), (0.0, 5))),
    ranges=(
        RangeSection(
            from_context=1000,
            skip=SkipSection(attention=(1, 2, 5, 58), mlp=(2,)),
            draft=DraftSettings(max_tokens=8, stop_probability=0.3),
        ),
        RangeSection(
            from_context=4000,
            skip=SkipSection(attention=(4,), mlp=()),
            draft=DraftSettings(max_tokens=9, stop_probability=0.2, tree=((0.0, 2),)),
        ),
    ),
    source="A paper, for one: its table 2",
    found_by=FoundBy(
        strategy="conflayers",
        refined=True,
        settings={"skip_ratio": 0.1 + 0.2, "interval": 30, "quick": False, "note": "on", "x": None},
        seed=0,
        prompts=PromptsUsed(count=4, sha256="0" * 64),
    ),
    measured=Measured(
        acceptance_rate=0.87,
        tokens_per_step=3.25,
        expected_speedup=1.41,
        measured_speedup=None,
        iterations=100,
        seconds=61.5,
        conclusion="Leaving out 30 layers pays: 1.4× – as expected.",
    ),
    environment=Environment(
        device="cpu",
        dtype="bfloat16",
        threads=2,
        python="3.11.9",
        torch="2.11.0",
        transformers="5.17.0",
        conflayers="0.1.0",
    ),
    tensors="summ.safetensors",
    tensors_sha256="ab" * 32,
)
BARE = Profile(model=MODEL, skip=FULL.skip, draft=FULL.draft)

HAND_WRITTEN = """\
schema_version: 1
model:
  name: m
  architecture: LlamaForCausalLM
  depth: 60
  hidden_size: 576
  attention_heads: 9
  key_value_heads: 3
  intermediate_size: null
  vocabulary: 49152
  config_hash: abc
skip:
  attention: [5, 3]
  mlp: []
draft: {max_tokens: 4, stop_probability: 1}
"""


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "p.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(path: Path) -> str:
    """The one line with which a file is refused, the path taken off."""
    with pytest.raises(InputError) as caught:
        Profile.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:")
    assert "\n" not in message
    return message.removeprefix(f"{path}:")


def edited(*path: str | int, value: object) -> str:
    """The full profile's YAML with one value replaced."""
    data = yaml.safe_load(FULL.to_yaml())
    section: Any = data
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    return yaml.safe_dump(data)


@pytest.mark.parametrize("profile", [FULL, BARE])
def test_round_trip(tmp_path: Path, profile: Profile) -> None:
    path = tmp_path / "p.yaml"
    profile.save(path)
    assert Profile.load(path) == profile
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.yaml"]


def test_a_profile_is_written_for_people() -> None:
    lines = FULL.to_yaml().splitlines()
    assert lines[0].startswith("# ") and "conflayers generate --profile" in lines[1]
    assert "  attention: [1, 2, 5]" in lines
    assert FULL.to_yaml().endswith("tensors: summ.safetensors\ntensors_sha256: " + "ab" * 32 + "\n")
    top = [line.split(":")[0] for line in lines if line[0] not in " #"]
    assert top == list(Profile.model_fields)
    assert "    projections: [0.25, -0.5, 0.125, 0.0, 1.0, -1.0, 0.3, -0.1]" in lines
    optional = {"ranges", "source", "found_by", "measured", "environment", "tensors"}
    optional.add("tensors_sha256")
    assert set(yaml.safe_load(BARE.to_yaml())) == set(Profile.model_fields) - optional
    assert "1.4× – as" in FULL.to_yaml()


def test_lists_stay_on_one_line_and_share_no_anchors() -> None:
    layers = tuple(range(1, 999))
    deep = MODEL.model_copy(update={"depth": 1000})
    profile = Profile(model=deep, skip=SkipSection(attention=layers, mlp=layers), draft=FULL.draft)
    lines = profile.to_yaml().splitlines()
    listed = ", ".join(map(str, layers))
    assert f"  attention: [{listed}]" in lines
    assert f"  mlp: [{listed}]" in lines


def test_trees_take_one_line_and_ranges_a_block() -> None:
    assert (
        FULL.to_yaml().split("draft:\n", 1)[1].split("found_by:")[0]
        == """\
  max_tokens: 6
  stop_probability: 0.4
  tree: [[0.8, 3], [0.25, 0], [0.0, 5]]
ranges:
  - from_context: 1000
    skip:
      attention: [1, 2, 5, 58]
      mlp: [2]
    draft:
      max_tokens: 8
      stop_probability: 0.3
  - from_context: 4000
    skip:
      attention: [4]
      mlp: []
    draft:
      max_tokens: 9
      stop_probability: 0.2
      tree: [[0.0, 2]]
source: 'A paper, for one: its table 2'
"""
    )


def test_what_is_not_known_is_left_out_and_what_was_not_measured_is_null() -> None:
    assert FULL.measured is not None and FULL.environment is not None
    unknown = MODEL.model_copy(update={"config_hash": None, "intermediate_size": None})
    profile = Profile(
        model=unknown,
        skip=FULL.skip,
        draft=FULL.draft.model_copy(update={"tree": None}),
        measured=FULL.measured,
        environment=FULL.environment.model_copy(update={"threads": None}),
    )
    data = yaml.safe_load(profile.to_yaml())
    assert list(data) == ["schema_version", "model", "skip", "draft", "measured", "environment"]
    assert "config_hash" not in data["model"]
    assert data["model"]["intermediate_size"] is None
    assert list(data["draft"]) == ["max_tokens", "stop_probability"]
    assert data["measured"]["measured_speedup"] is None
    assert data["environment"]["threads"] is None


def test_drafts_are_rounded_alike_at_every_length_and_trees_are_not(tmp_path: Path) -> None:
    draft = DraftSettings(
        max_tokens=4, stop_probability=0.123456, tree=((0.300002, 1), (0.300001, 2), (0.0, 3))
    )
    later = RangeSection(from_context=2, skip=FULL.skip, draft=draft)
    path = tmp_path / "p.yaml"
    Profile(model=MODEL, skip=FULL.skip, draft=draft, ranges=(later,)).save(path)
    loaded = Profile.load(path)
    assert loaded.ranges is not None
    for read in (loaded.draft, loaded.ranges[0].draft):
        assert read.stop_probability == 0.1235
        assert read.tree == draft.tree


def test_measured_figures_are_rounded_and_settings_are_not(tmp_path: Path) -> None:
    measured = {
        "acceptance_rate": 0.123456,
        "tokens_per_step": 3.99996,
        "expected_speedup": 0.0000123456,
        "measured_speedup": 0.0,
        "seconds": 123456.7,
    }
    assert FULL.measured is not None and FULL.found_by is not None
    profile = FULL.model_copy(update={"measured": FULL.measured.model_copy(update=measured)})
    path = tmp_path / "p.yaml"
    profile.save(path)
    loaded = Profile.load(path)
    assert loaded.measured is not None and loaded.found_by is not None
    assert loaded.measured.acceptance_rate == 0.1235
    assert loaded.measured.tokens_per_step == 4.0
    assert loaded.measured.expected_speedup == 1.235e-05
    assert loaded.measured.measured_speedup == 0.0
    assert loaded.measured.seconds == 123500.0
    assert loaded.found_by.settings == FULL.found_by.settings


def test_a_hand_written_profile(tmp_path: Path) -> None:
    profile = Profile.load(write(tmp_path, b"\xef\xbb\xbf" + HAND_WRITTEN.encode()))
    assert profile.plan == SkipPlan(attention=(3, 5))
    assert profile.draft.stop_probability == 1.0
    assert profile.found_by is None
    assert SkipSection.of(profile.plan) == profile.skip


def test_optional_keys_may_be_written_as_null_or_empty(tmp_path: Path) -> None:
    bare = Profile.load(write(tmp_path, HAND_WRITTEN))
    nulls = "ranges: null\nsource: null\nfound_by: null\n"
    assert Profile.load(write(tmp_path, HAND_WRITTEN + nulls)) == bare
    assert Profile.load(write(tmp_path, HAND_WRITTEN + "ranges: []\n")) == bare
    no_tree = HAND_WRITTEN.replace("{max_tokens", "{tree: null, max_tokens")
    assert Profile.load(write(tmp_path, no_tree)) == bare
    no_hash = Profile.load(write(tmp_path, HAND_WRITTEN.replace("  config_hash: abc\n", "")))
    null_hash = Profile.load(
        write(tmp_path, HAND_WRITTEN.replace("config_hash: abc", "config_hash:"))
    )
    assert no_hash == null_hash
    assert no_hash.model.config_hash is None


def test_a_tree_may_be_written_with_whole_numbers(tmp_path: Path) -> None:
    text = HAND_WRITTEN.replace("{max_tokens", "{tree: [[0.5, 32], [0, 0]], max_tokens")
    assert Profile.load(write(tmp_path, text)).draft.tree == ((0.5, 32), (0.0, 0))


@pytest.mark.parametrize("layers", [(), (3, 4)])
def test_drafts_may_use_other_weights(tmp_path: Path, layers: tuple[int, ...]) -> None:
    plan = SkipPlan.of(layers, layers, weights="int4")
    profile = FULL.model_copy(update={"skip": SkipSection.of(plan), "ranges": None})
    assert "weights: int4" in profile.to_yaml()
    profile.save(tmp_path / "p.yaml")
    loaded = Profile.load(tmp_path / "p.yaml")
    assert loaded.plan == plan and loaded.drafts_with_int4
    assert not FULL.drafts_with_int4 and "weights" not in FULL.to_yaml()
    told = "\n".join(description(loaded, title="p.yaml"))
    numbers = ": 3 4" if layers else ""
    assert f"skips       {len(layers)} of 60 layers, int4 weights{numbers}\n" in told


def test_the_plans_and_from_which_context_on_they_are_used() -> None:
    assert [(length, plan, draft.max_tokens) for length, plan, draft in FULL.plans()] == [
        (0, SkipPlan((1, 2, 5), (1, 2, 58)), 6),
        (1000, SkipPlan((1, 2, 5, 58), (2,)), 8),
        (4000, SkipPlan((4,), ()), 9),
    ]


def test_without_ranges_there_is_one_plan() -> None:
    assert BARE.plans() == [(0, BARE.plan, BARE.draft)]


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("skip", "mlp"), [7, 8, 3, 77], "skip.mlp.3: 77 is out of range, allowed are 1–58"),
        (("skip", "attention"), [59], "skip.attention.0: 59 is out of range, allowed are 1–58"),
        (("skip", "attention"), [1, 0], "skip.attention.1: 0 is out of range, allowed are 1–58"),
        (("skip", "mlp"), [-3], "skip.mlp.0: -3 is out of range, allowed are 1–58"),
        (("skip", "mlp"), [9, 2, 9], "skip.mlp.2: 9 is repeated, allowed is each layer once"),
        (("skip", "mlp"), [1, True], "skip.mlp.1: true should be a valid integer"),
        (("skip", "mlp"), [1.0], "skip.mlp.0: 1.0 should be a valid integer"),
        (("skip", "mlp"), ["3"], "skip.mlp.0: '3' should be a valid integer"),
        (("skip", "mlp"), [[3]], "skip.mlp.0: a list should be a valid integer"),
        (("skip", "mlp"), {3, 77}, "skip.mlp: a set should be a list"),
        (("skip", "mlp"), None, "skip.mlp: null should be a list"),
        (("skip", "mlp"), 3, "skip.mlp: 3 should be a list"),
        (("skip", "weights"), "int8", "skip.weights: 'int8' should be 'int4'"),
        (("skip", "weights"), 4, "skip.weights: 4 should be 'int4'"),
        (
            ("skip", "mpl"),
            [3],
            "skip.mpl: is no known key, did you mean mlp? allowed are attention, mlp",
        ),
        (
            ("skip", "stand_ins"),
            [{"begin": 3, "end": 9}],
            "skip.stand_ins: linear maps in place of layers are no longer supported: calibrate "
            "again, to a new file",
        ),
        (("skip",), [3], "skip: a list should be keys and values"),
        (("model", "depth"), 0, "model.depth: 0 should be greater than or equal to 1"),
        (("model", "depth"), 60.0, "model.depth: 60.0 should be a valid integer"),
        (
            ("model", "depth"),
            2,
            "skip.attention.0: 1 is out of range, a model of 2 layers has none to leave out",
        ),
        (("model", "name"), "", "model.name: '' should have at least 1 character"),
        (("model", "config_hash"), 123, "model.config_hash: 123 should be a valid string"),
        (("draft", "max_tokens"), 65, "draft.max_tokens: 65 should be less than or equal to 64"),
        (("draft", "max_tokens"), -1, "draft.max_tokens: -1 should be greater than or equal to 0"),
        (("draft", "stop_probability"), 1.5, "draft.stop_probability: 1.5 should be less than"),
        (("draft", "stop_probability"), float("nan"), "draft.stop_probability: nan should be"),
        (("draft", "stop_probability"), True, "draft.stop_probability: true should be a valid"),
        (("draft", "stop_probability"), 10**400, "draft.stop_probability: 1000"),
        (("draft", "tree"), 3, "draft.tree: 3 should be a list"),
        (("draft", "tree"), [], "draft.tree: nothing (a list without entries) should be a list of"),
        (("draft", "tree"), [3], "draft.tree.0: 3 should be a pair [over, leaves]"),
        (("draft", "tree"), [[0]], "draft.tree.0: a list should be a pair [over, leaves]"),
        (("draft", "tree"), [[0, 1, 2]], "draft.tree.0: a list should be a pair [over, leaves]"),
        (("draft", "tree"), [[1.0, 3], [0, 1]], "draft.tree.0.0: 1.0 should be less than 1"),
        (("draft", "tree"), [[0.5, 3], [-0.1, 1]], "draft.tree.1.0: -0.1 should be greater than"),
        (("draft", "tree"), [[float("nan"), 3]], "draft.tree.0.0: nan should be"),
        (("draft", "tree"), [["0", 3]], "draft.tree.0.0: '0' should be a valid number"),
        (("draft", "tree"), [[0, 33]], "draft.tree.0.1: 33 should be less than or equal to 32"),
        (("draft", "tree"), [[0, -1]], "draft.tree.0.1: -1 should be greater than or equal to 0"),
        (("draft", "tree"), [[0, 1.0]], "draft.tree.0.1: 1.0 should be a valid integer"),
        (
            ("draft", "tree"),
            [[0.5, 3], [0.5, 4], [0, 5]],
            "draft.tree.1.0: 0.5 should be less than 0.5, which it follows",
        ),
        (
            ("draft", "tree"),
            [[0.5, 3], [0.2, 4], [0.3, 4], [0, 5]],
            "draft.tree.2.0: 0.3 should be less than 0.2, which it follows",
        ),
        (("draft", "tree"), [[0.5, 3], [0.1, 4]], "draft.tree.1.0: 0.1 should be 0: the last"),
        (("ranges",), {"from_context": 3}, "ranges: keys and values should be a list"),
        (("ranges",), [7], "ranges.0: 7 should be keys and values"),
        (("ranges", 1), {}, "ranges.1.from_context: is missing (and 2 more)"),
        (("ranges", 0, "from_context"), 0, "ranges.0.from_context: 0 should be greater than or eq"),
        (
            ("ranges", 1, "from_context"),
            1000,
            "ranges.1.from_context: 1000 should be greater than 1000, which it follows",
        ),
        (
            ("ranges", 0, "from_context"),
            4001,
            "ranges.1.from_context: 4000 should be greater than 4001, which it follows",
        ),
        (
            ("ranges", 0, "skip", "attention"),
            [7, 8, 77],
            "ranges.0.skip.attention.2: 77 is out of range, allowed are 1–58",
        ),
        (
            ("ranges", 1, "skip", "mlp"),
            [0],
            "ranges.1.skip.mlp.0: 0 is out of range, allowed are 1–58",
        ),
        (("ranges", 1, "skip", "mlp"), [3, 3], "ranges.1.skip.mlp.1: 3 is repeated, allowed is"),
        (("ranges", 0, "skip", "mlp"), 3, "ranges.0.skip.mlp: 3 should be a list"),
        (("ranges", 0, "skip"), [3], "ranges.0.skip: a list should be keys and values"),
        (("ranges", 0, "skip", "stand_ins"), [], "ranges.0.skip.stand_ins: linear maps in place"),
        (("ranges", 0, "draft", "max_tokens"), 65, "ranges.0.draft.max_tokens: 65 should be less"),
        (("ranges", 0, "draft", "tree"), [[0.1, 1]], "ranges.0.draft.tree.0.0: 0.1 should be 0"),
        (
            ("ranges", 0, "wat"),
            1,
            "ranges.0.wat: is no known key, allowed are from_context, skip, draft",
        ),
        (
            ("ranges", 1, "draft", "wat"),
            1,
            "ranges.1.draft.wat: is no known key, allowed are max_tokens, stop_probability, tree",
        ),
        (("source",), "", "source: '' should have at least 1 character"),
        (("source",), ["x"], "source: a list should be a valid string"),
        (("measured", "seconds"), float("inf"), "measured.seconds: inf should be"),
        (("measured", "iterations"), 10**4000, "measured.iterations: 1000"),
        (("measured", "gain"), 1, "measured.gain: is no known key, allowed are acceptance_rate,"),
        (("found_by", "seed"), -1, "found_by.seed: -1 should be greater than or equal to 0"),
        (("found_by", "refined"), 1, "found_by.refined: 1 should be a valid boolean"),
        (
            ("found_by", "prompts", "n"),
            1,
            "found_by.prompts.n: is no known key, allowed are count, sha256",
        ),
        (
            ("found_by", "prompts", "sha256"),
            "ab\n",
            "found_by.prompts.sha256: 'ab\\n' should match",
        ),
        (
            ("found_by", "settings", "x"),
            [1],
            "found_by.settings.x: a list should be a finite number, true, false, a text or null",
        ),
        (("found_by", "settings", "x"), float("inf"), "found_by.settings.x: inf should be"),
        (("found_by", "settings", "x\ny"), [], "found_by.settings.'x\\ny': "),
        (("environment", "threads"), 0, "environment.threads: 0 should be greater"),
        (("environment",), [], "environment: nothing (a list without entries) should be keys"),
        (("tensors",), "../x.safetensors", "tensors: '../x.safetensors' should be the name of"),
        (("model", "sketch"), 1, "model.sketch: 1 should be keys and values"),
        (("model", "sketch", "projections"), [0.1], "model.sketch.projections: a list should have"),
        (("model", "sketch", "rounding"), 2.0, "model.sketch.rounding: 2.0 should be less than"),
        (("tensors",), None, "tensors_sha256: 'abab"),
        (("tensors_sha256",), "12", "tensors_sha256: '12' should match pattern"),
        (("tensors",), "x.pt", "tensors: 'x.pt' should be the name of"),
        (("wat",), 1, "wat: is no known key, allowed are schema_version, model, skip"),
        (
            ("schema_version",),
            2,
            "written by a newer conflayers (schema 2; this one reads up to 1)",
        ),
        (("schema_version",), True, "schema_version: true is not supported, supported are 0–1"),
        (("schema_version",), "1", "schema_version: '1' is not supported, supported are 0–1"),
    ],
    ids=lambda part: str(part)[:30],
)
def test_a_value_that_does_not_fit(
    tmp_path: Path, path: tuple[str | int, ...], value: object, expected: str
) -> None:
    assert refusal(write(tmp_path, edited(*path, value=value))).startswith(f" {expected}")


def test_missing_keys_and_the_count_of_further_errors(tmp_path: Path) -> None:
    no_version = HAND_WRITTEN.removeprefix("schema_version: 1\n")
    assert refusal(write(tmp_path, no_version)) == " schema_version is missing, supported is 1"
    no_depth = HAND_WRITTEN.replace("  depth: 60\n", "")
    assert refusal(write(tmp_path, no_depth)) == " model.depth: is missing"
    worse = no_depth.replace("max_tokens: 4", "max_tokens: 99")
    assert refusal(write(tmp_path, worse)) == " model.depth: is missing (and 1 more)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HAND_WRITTEN + "skip: {}\n", "16: is not a valid profile: the key 'skip' is repeated"),
        (HAND_WRITTEN.replace("mlp: []", "'attention': []"), "14: is not a valid profile: the key"),
        (
            HAND_WRITTEN.replace("[5, 3]", "&a [5, 3]").replace("mlp: []", "mlp: *a"),
            "13: is not a valid profile: anchors and aliases are not allowed",
        ),
        (HAND_WRITTEN.replace("mlp: []", "mlp: *b"), "14: is not a valid profile: anchors and"),
        (HAND_WRITTEN + "<<: {tensors: null}\n", "16: is not a valid profile: merge keys"),
        (
            HAND_WRITTEN.replace("name: m", "name: !!python/object/apply:os.getcwd []"),
            "3: is not a valid profile: could not determine a constructor",
        ),
        (HAND_WRITTEN.replace("[5, 3]", "[5, 3"), "14: is not a valid profile: "),
        (HAND_WRITTEN.replace("name: m", "name: m\n\tx: 1"), "4: is not a valid profile: "),
        (HAND_WRITTEN + "---\na: 1\n", "16: is not a valid profile: "),
        (
            HAND_WRITTEN.replace("name: m", "? [a]\n  : m"),
            "3: is not a valid profile: a key should be a text",
        ),
        (
            HAND_WRITTEN.replace("name: m", "name: 2020-99-99"),
            "3: is not a valid profile: '2020-99-99",
        ),
        (
            HAND_WRITTEN.replace("name: m", "name: 0b_"),
            "3: is not a valid profile: '0b_' is no plain",
        ),
        (
            HAND_WRITTEN.replace("depth: 60", "depth: " + "9" * 5000),
            "5: is not a valid profile: '99",
        ),
        (HAND_WRITTEN.replace("60", "1" + ":1" * 500 + ".0"), "5: is not a valid profile: '1:1"),
        (
            HAND_WRITTEN.replace("60", "0x3c"),
            "5: is not a valid profile: '0x3c' is no plain decimal",
        ),
        (HAND_WRITTEN.replace("60", "6_0"), "5: is not a valid profile: '6_0' is no plain decimal"),
        (HAND_WRITTEN.replace("60", "074"), "5: is not a valid profile: '074' is no plain decimal"),
        (HAND_WRITTEN.replace("60", "1:00"), "5: is not a valid profile: '1:00' is no plain"),
        (HAND_WRITTEN.replace("60", "60" + ":59" * 60_000), "5: is not a valid profile: '60:59:"),
        (HAND_WRITTEN.replace("60", "!!timestamp x"), "5: is not a valid profile: 'x' can't be"),
        (HAND_WRITTEN.replace("60", "!!bool x"), "5: is not a valid profile: 'x' can't be read"),
        (HAND_WRITTEN.replace("60", f"!{'t' * 99_999} 60"), "5: is not a valid profile: could not"),
        (HAND_WRITTEN + f"? {'k' * 9999}\n: 1\n", f" '{'k' * 57}"),
        (HAND_WRITTEN.replace("name: m", "yes: m"), "3: is not a valid profile: the key 'yes'"),
        (
            HAND_WRITTEN.replace("name: m", "1: m\n  '1': n"),
            "3: is not a valid profile: the key '1'",
        ),
        (HAND_WRITTEN.replace("name: m", "name: m\x07"), "3: has a character that YAML does not"),
        (HAND_WRITTEN.replace("name: m", "name: m\0"), "3: has a NUL byte"),
        (HAND_WRITTEN.replace("name: m", 'name: "\\ud800"'), " model.name: '\\ud800' should be"),
        (HAND_WRITTEN.replace("name: m", "a: m"), " model.name: is missing (and 1 more)"),
        (HAND_WRITTEN.encode().replace(b": m", b": \xff"), "3: is not UTF-8 text"),
        ("[" * 50_000, " is nested too deeply"),
        ("a: " + "x" * 200_000, " is too large, allowed are 200,000 bytes"),
        ("", " is not a profile: it holds null"),
        ("- 1\n", " is not a profile: it holds a list"),
        ("hello", " is not a profile: it holds 'hello'"),
        ("2020-01-01", " is not a profile: it holds 2020-01-01"),
    ],
)
def test_what_is_not_plain_yaml(tmp_path: Path, text: str | bytes, expected: str) -> None:
    assert refusal(write(tmp_path, text)).startswith(expected)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.yaml") == " there is no such file"
    assert refusal(tmp_path) == " is a folder, a file is needed"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"name": "other"}, None),
        ({"depth": 30}, "depth 60 here, 30 in the profile"),
        (
            {"architecture": "Qwen2ForCausalLM", "depth": 30, "vocabulary": 5},
            "architecture 'LlamaForCausalLM' here, 'Qwen2ForCausalLM' in the profile; "
            "depth 60 here, 30 in the profile",
        ),
        ({"intermediate_size": None}, "intermediate size 1536 here, null in the profile"),
        ({"key_value_heads": 9, "config_hash": "x"}, "key value heads 3 here, 9 in the profile"),
        ({"config_hash": None}, None),
        ({"hidden_size": None, "intermediate_size": None}, None),
        ({"architecture": None, "vocabulary": 3}, "vocabulary 49152 here, 3 in the profile"),
        ({"config_hash": None, "depth": 30}, "depth 60 here, 30 in the profile"),
        (
            {"config_hash": "cd" * 32},
            "same sizes, but another configuration "
            "(hash abababababab here, cdcdcdcdcdcd in the profile)",
        ),
    ],
)
def test_difference_of_models(change: dict[str, object], expected: str | None) -> None:
    assert MODEL.difference(MODEL.model_copy(update=change)) == expected


def test_a_model_whose_hash_is_not_known_is_told_by_its_sizes() -> None:
    unknown = MODEL.model_copy(update={"config_hash": None})
    assert unknown.difference(MODEL) is None
    assert unknown.difference(unknown) is None
    assert unknown.difference(MODEL.model_copy(update={"vocabulary": 5})) is not None


def test_construction_checks_as_loading_does() -> None:
    with pytest.raises(ValidationError, match="repeated"):
        SkipSection(attention=(1, 1), mlp=())
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        SkipSection(attention=(), mlp=(-1,))
    with pytest.raises(ValidationError, match=r"mlp\.1: 59 is out of range"):
        Profile(model=MODEL, skip=SkipSection(attention=(), mlp=(59, 3)), draft=FULL.draft)
    outside = RangeSection(
        from_context=5, skip=SkipSection(attention=(), mlp=(7, 59)), draft=FULL.draft
    )
    with pytest.raises(ValidationError, match=r"0\.skip\.mlp\.1: 59 is out of range"):
        Profile(model=MODEL, skip=FULL.skip, draft=FULL.draft, ranges=(outside,))
    with pytest.raises(ValidationError, match=r"1\.0: 0\.5 should be less than 0\.2"):
        DraftSettings(max_tokens=4, stop_probability=0.5, tree=((0.2, 1), (0.5, 2), (0.0, 3)))
    with pytest.raises(ValidationError, match="frozen"):
        FULL.tensors = None


def test_saving_replaces_whole_files_and_keeps_links(tmp_path: Path) -> None:
    path, link = tmp_path / "p.yaml", tmp_path / "link.yaml"
    path.write_text("old" * 10_000)
    link.symlink_to(path)
    FULL.save(link)
    assert link.is_symlink()
    assert path.read_text(encoding="utf-8") == FULL.to_yaml()


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_the_umask_decides_who_may_read(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        FULL.save(tmp_path / "p.yaml")
    finally:
        os.umask(before)
    assert (tmp_path / "p.yaml").stat().st_mode & 0o777 == 0o640


def test_places_a_profile_cannot_be_saved_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none" / "p.yaml", tmp_path / "file" / "p.yaml"):
        with pytest.raises(InputError, match="does not exist"):
            FULL.save(path)
    for path in (tmp_path, Path(os.devnull)):
        with pytest.raises(InputError, match="is a folder or a device"):
            FULL.save(path)
    with pytest.raises(ConfLayersError, match="can't be written"):
        FULL.save(tmp_path / ("n" * 300))


def fail(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("broken", ["os.fsync", "pathlib.Path.replace"])
def test_a_failed_save_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = tmp_path / "p.yaml"
    BARE.save(path)
    monkeypatch.setattr(broken, fail)
    with pytest.raises(ConfLayersError, match="can't be written: No space left") as caught:
        FULL.save(path)
    assert caught.value.exit_code == 1
    assert Profile.load(path) == BARE
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.yaml"]


def test_profile_imports_without_torch() -> None:
    code = (
        "import sys, conflayers_cli.profile.schema;"
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
SIZES = st.integers(1, 10**9)
# four significant digits, so that nothing is lost to rounding
SHARES = st.integers(0, 1000).map(lambda n: n / 1000)
FIGURES = st.none() | st.tuples(st.integers(1, 9999), st.integers(-8, 8)).map(
    lambda pair: float(f"{pair[0]}e{pair[1]}")
)
SETTINGS = st.dictionaries(
    TEXTS,
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS
    | st.sampled_from(
        ["yes", "null", "1e5", "0o7", "1:30", "~", "<<", "2020-01-01", "", "=", "- a"]
    ),
    max_size=4,
)


def optional(make: Callable[..., Any], **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | st.builds(make, **fields)


@st.composite
def drafts(draw: st.DrawFn) -> DraftSettings:
    """Draft settings, with a tree or without."""
    overs = st.sets(st.floats(0, 1, exclude_min=True, exclude_max=True), max_size=4)
    falling = [*sorted(draw(overs), reverse=True), 0.0]
    tree = tuple((over, draw(st.integers(0, 32))) for over in falling)
    return DraftSettings(
        max_tokens=draw(st.integers(0, 64)),
        stop_probability=draw(SHARES),
        tree=draw(st.sampled_from([None, tree])),
    )


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    depth = draw(st.integers(1, 80))
    layers = st.sets(st.integers(1, depth - 2)).map(sorted) if depth > 2 else st.just([])
    model = draw(
        st.builds(
            ModelFingerprint,
            name=TEXTS,
            architecture=TEXTS,
            depth=st.just(depth),
            hidden_size=SIZES,
            attention_heads=SIZES,
            key_value_heads=SIZES,
            intermediate_size=st.none() | SIZES,
            vocabulary=SIZES,
            config_hash=st.none() | TEXTS,
            sketch=optional(
                WeightSketchSection,
                rounding=st.floats(0, 1),
                projections=st.lists(st.floats(-1e3, 1e3), min_size=8, max_size=40).map(tuple),
            ),
        )
    )
    used = st.builds(
        PromptsUsed, count=SIZES, sha256=st.text("0123456789abcdef", min_size=64, max_size=64)
    )
    weights = st.sampled_from([None, "int4"])
    skips = st.builds(SkipPlan.of, layers, layers, weights=weights).map(SkipSection.of)
    starts = sorted(draw(st.sets(SIZES, max_size=3)))
    ranges = tuple(
        RangeSection(from_context=start, skip=draw(skips), draft=draw(drafts())) for start in starts
    )
    return Profile(
        model=model,
        skip=draw(skips),
        draft=draw(drafts()),
        ranges=ranges or None,
        source=draw(st.none() | TEXTS),
        found_by=draw(
            optional(
                FoundBy,
                strategy=TEXTS,
                refined=st.booleans(),
                settings=SETTINGS,
                seed=st.integers(0, 2**64 - 1),
                prompts=used,
            )
        ),
        measured=draw(
            optional(
                Measured,
                acceptance_rate=st.none() | SHARES,
                tokens_per_step=FIGURES,
                expected_speedup=FIGURES,
                measured_speedup=FIGURES,
                iterations=SIZES,
                seconds=SHARES,
                conclusion=st.just("") | TEXTS,
            )
        ),
        environment=draw(
            optional(
                Environment,
                device=TEXTS,
                dtype=TEXTS,
                threads=st.none() | SIZES,
                python=TEXTS,
                torch=TEXTS,
                transformers=TEXTS,
                conflayers=TEXTS,
            )
        ),
        tensors=draw(
            st.sampled_from([None, "a.safetensors", "ä b.safetensors", "yes.safetensors"])
        ),
    )


@settings(deadline=None)  # files are written, and disks stall
@given(profiles())
def test_any_profile_round_trips(
    tmp_path_factory: pytest.TempPathFactory, profile: Profile
) -> None:
    path = tmp_path_factory.mktemp("profiles") / "p.yaml"
    profile.save(path)
    loaded = Profile.load(path)
    assert loaded == profile
    assert loaded.to_yaml() == path.read_text(encoding="utf-8")
    assert list(loaded.plan.attention) == sorted(set(profile.skip.attention))


@settings(deadline=None)  # files are written, and disks stall
@given(st.floats(0, 1e12))
def test_rounding_keeps_four_digits_and_is_stable(seconds: float) -> None:
    assert FULL.measured is not None
    profile = FULL.model_copy(
        update={"measured": FULL.measured.model_copy(update={"seconds": seconds})}
    )
    written = yaml.safe_load(profile.to_yaml())["measured"]["seconds"]
    assert written == pytest.approx(seconds, rel=5.01e-4, abs=5e-324)
    again = profile.model_copy(
        update={"measured": FULL.measured.model_copy(update={"seconds": written})}
    )
    assert yaml.safe_load(again.to_yaml())["measured"]["seconds"] == written


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None)  # files are written, and disks stall
@given(
    st.sampled_from(
        [
            ("model",),
            ("model", "depth"),
            ("model", "name"),
            ("skip", "mlp"),
            ("draft", "stop_probability"),
            ("draft", "tree"),
            ("draft", "tree", 1),
            ("ranges",),
            ("ranges", 1),
            ("ranges", 0, "skip"),
            ("ranges", 0, "skip", "attention"),
            ("source",),
            ("found_by", "settings"),
            ("found_by", "prompts", "sha256"),
            ("measured",),
            ("schema_version",),
        ]
    ),
    JUNK,
)
def test_any_value_is_accepted_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, path: tuple[str | int, ...], value: object
) -> None:
    file = write(tmp_path_factory.mktemp("junk"), edited(*path, value=value))
    try:
        Profile.load(file)
    except InputError as error:
        assert "\n" not in str(error)
        assert str(error).startswith(f"{file}: ")


@settings(deadline=None)  # files are written, and disks stall
@given(st.text(max_size=100) | st.text("[]{}:,-&*!|>'\"? \n\tab#%@<", max_size=60))
def test_any_text_is_no_profile(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    message = refusal(write(tmp_path_factory.mktemp("text"), text.encode("utf-8", "replace")))
    assert len(message) < 300
