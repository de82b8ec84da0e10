"""``conflayers profile``: show, validate, diff, convert and schema."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save

from conflayers_cli.profile.schema import Profile, SkipSection
from conflayers_cli.profile.tensors import hash_content
from conflayers_cli.skip_plan import SkipPlan
from tests.cli.conftest import Run, save_profile
from tests.profile.test_migrations import OLD
from tests.profile.test_schema import FULL

PROFILES = Path(__file__).parents[2] / "profiles"
TENSORS = save({"trial_speedup": np.array([1.0, 1.2])})


def write(path: Path, **changes: Any) -> Path:
    """The full profile of the profile's tests with changes, without tensors unless they say so."""
    without = {"tensors": None, "tensors_sha256": None}
    FULL.model_copy(update={**without, **changes}).save(path)
    return path


def with_tensors(path: Path, content: bytes = TENSORS, sha256: str | None = None) -> Path:
    beside = path.with_suffix(".safetensors")
    beside.write_bytes(content)
    return write(path, tensors=beside.name, tensors_sha256=sha256)


def test_show_says_what_is_skipped_and_whose_the_figures_are(run: Run, tmp_path: Path) -> None:
    result = run("profile", "show", write(tmp_path / "p.yaml"))
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"{tmp_path / 'p.yaml'} (schema 1)\n")
    assert "smollm2-deep: LlamaForCausalLM, 60 layers, hidden size 576, 9 heads" in result.out
    assert f"█··██▄{'█' * 52}▀█" in result.out  # 5 has its MLP alone, 58 its attention
    assert "2 of 60 layers and 2 single sub-layers: 1 2, attention of 5, mlp of 58" in result.out
    assert "from 1000" in result.out and "from 4000" in result.out
    [measured] = [line for line in result.out.splitlines() if line.startswith("measured")]
    assert "acceptance 87.0%" in measured and measured.endswith("on cpu in bfloat16, 2 threads")


def test_show_in_a_terminal_that_knows_no_blocks(tmp_path: Path) -> None:
    path = write(tmp_path / "p.yaml")
    script = (
        "import sys\nfrom conflayers_cli.cli.main import main\n"
        f"sys.exit(main(['profile', 'show', {str(path)!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        env={"PYTHONIOENCODING": "ascii", "PYTHONPATH": ":".join(sys.path)},
        check=True,
    )
    assert f"#..##_{'#' * 52}^#" in done.stdout.decode("ascii")


def test_show_as_one_document(run: Run, tmp_path: Path) -> None:
    document = run("profile", "show", write(tmp_path / "p.yaml"), "--json").document
    assert document["profile"]["skip"]["attention"] == [1, 2, 5]
    assert document["figures_of"] == "cpu in bfloat16, 2 threads"
    assert document["profile_schema_version"] == 1 and document["tensors"] is None
    assert run("profile", "show", OLD, "--json").document["profile_schema_version"] == 0


def test_show_of_a_profile_that_knows_little(run: Run) -> None:
    result = run("profile", "show", OLD)
    assert result.code == 0
    assert "(schema 0)" in result.out and "40 layers, other sizes not known" in result.out
    assert "measured" not in result.out


def test_a_profile_with_linear_maps_is_refused_in_one_line(
    run: Run, model: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "p.yaml")
    data = yaml.safe_load(path.read_text())
    data["skip"]["stand_ins"] = [{"begin": 1, "end": 3}]
    path.write_text(yaml.safe_dump(data))
    for command in (("profile", "show", path), ("generate", "Hi", "-m", model, "--profile", path)):
        result = run(*command)
        assert (result.code, result.out) == (2, "")
        (line,) = result.err.splitlines()
        assert f"{path}: skip.stand_ins: linear maps in place of layers are no longer" in line
        assert "calibrate again" in line


def test_validate_looks_at_all_files(run: Run, tmp_path: Path) -> None:
    good, older = write(tmp_path / "good.yaml"), shutil.copy(OLD, tmp_path / "older.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text(good.read_text().replace("mlp:", "mpl:", 1))
    result = run("profile", "validate", bad, good, tmp_path / "none.yaml", older)
    assert result.code == 2
    assert result.out.splitlines() == [
        f"{good}: ok (smollm2-deep, skips 2 of 60 layers and 2 single sub-layers)",
        f"{older}: ok (schema 0, meta-llama/Llama-2-13b-hf, skips 3 of 40 layers and 3 single "
        "sub-layers)",
    ]
    wrong, missing = result.err.splitlines()
    assert wrong.startswith(f"conflayers: error: {bad}: skip.m") and "(and 1 more)" in wrong
    assert missing.startswith(f"conflayers: error: {tmp_path / 'none.yaml'}: ")
    document = run("profile", "validate", bad, good, "--json").document
    assert document["ok"] is False
    assert [each["ok"] for each in document["files"]] == [False, True]
    assert "skip.m" in document["files"][0]["error"]


def test_shipped_profiles_are_valid(run: Run) -> None:
    paths = sorted(PROFILES.glob("*.yaml"))
    result = run("profile", "validate", *paths)
    assert (result.code, result.err) == (0, "")
    assert len(result.out.splitlines()) == len(paths) > 1


def test_validate_looks_at_the_tensors(run: Run, tmp_path: Path) -> None:
    right = hash_content(TENSORS)
    for sha256 in (None, right):
        path = with_tensors(tmp_path / "p.yaml", sha256=sha256)
        result = run("profile", "validate", path)
        assert result.code == 0 and "1 tensors beside it" in result.out
    for content, sha256, told in (
        (TENSORS, "0" * 64, "tensors_sha256: p.safetensors is not the file written with this"),
        (TENSORS + b" ", right, "tensors_sha256: p.safetensors is not the file"),
        (b"hello, hello, hello", None, "is no safetensors file"),
        (b"", None, "is no safetensors file"),
    ):
        path = with_tensors(tmp_path / "p.yaml", content, sha256)
        result = run("profile", "validate", path)
        assert (result.code, result.out) == (2, "")
        assert told in result.err and result.err.count("\n") == 1
    (tmp_path / "p.safetensors").unlink()
    assert "p.safetensors is not beside it" in run("profile", "validate", path).err


def test_validate_against_a_model(run: Run, model: Path, profile: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.yaml")
    wrong = save_profile(tmp_path / "wrong.yaml", model, vocabulary=3)
    result = run("profile", "validate", profile, other, wrong, "-m", model, "--device", "cpu")
    assert result.code == 2
    assert result.out == f"{profile}: ok ({model}, skips 1 of 5 layers)\n"
    assert "depth 5 here, 60 in the profile" in result.err
    assert "vocabulary 257 here, 3 in the profile" in result.err
    assert run("profile", "validate", profile, "-m", tmp_path / "none").code == 2


def test_diff_of_equal_profiles_says_nothing(run: Run, tmp_path: Path) -> None:
    one, other = write(tmp_path / "a.yaml"), write(tmp_path / "b.yaml")
    other.write_text("# a comment\n" + other.read_text())
    result = run("profile", "diff", one, other)
    assert (result.code, result.out, result.err) == (0, "", "")
    assert run("profile", "diff", one, other, "--json").document["equal"] is True


def test_diff_tells_what_changes_drafting_apart(run: Run, tmp_path: Path) -> None:
    assert FULL.measured is not None and FULL.environment is not None
    one = write(tmp_path / "a.yaml")
    other = write(
        tmp_path / "b.yaml",
        skip=SkipSection(attention=(1, 5, 7, 9), mlp=(1, 2, 58)),
        draft=FULL.draft.model_copy(update={"max_tokens": 8, "lookahead": False}),
        ranges=FULL.ranges[1:] if FULL.ranges else None,
        measured=FULL.measured.model_copy(update={"seconds": 99.0, "acceptance_rate": 0.5}),
        environment=FULL.environment.model_copy(update={"device": "cuda:0 (NVIDIA H100)"}),
    )
    result = run("profile", "diff", one, other)
    assert (result.code, result.err) == (1, "")
    lines = result.out.splitlines()
    assert lines[:3] == [f"--- {one}", f"+++ {other}", "changes drafting:"]
    at = lines.index("says how, when and where it was found:")
    drafting, found = lines[3:at], lines[at + 1 :]
    assert drafting[0] == "  skip.attention: + 7 9, − 2"
    assert drafting[1:3] == ["  draft.max_tokens: 6 → 8", "  draft.lookahead: – → false"]
    assert "  ranges.1000.skip.attention: − 1 2 5 58" in drafting
    assert "  measured.acceptance_rate: 0.87 → 0.5" in drafting
    assert found == [
        "  measured.seconds: 61.5 → 99.0",
        "  environment.device: cpu → cuda:0 (NVIDIA H100)",
    ]
    document = run("profile", "diff", one, other, "--json").document
    keys = {each["key"]: each for each in document["differences"]}
    assert keys["skip.attention"]["added"] == [7, 9] and keys["skip.attention"]["removed"] == [2]
    assert keys["measured.seconds"]["changes_drafting"] is False
    assert keys["draft.lookahead"] == {
        "key": "draft.lookahead",
        "before": None,
        "after": False,
        "added": None,
        "removed": None,
        "changes_drafting": True,
    }


@pytest.mark.parametrize(
    ("moved", "told"), [(0.001, "but for rounding"), (0.4, "40.00% apart (other weights)")]
)
def test_diff_tells_the_distance_of_the_weights(
    run: Run, tmp_path: Path, moved: float, told: str
) -> None:
    sketch = FULL.model.sketch
    assert sketch is not None
    first, *rest = sketch.projections
    other = sketch.model_copy(update={"projections": (first + moved, *rest)})
    model = FULL.model.model_copy(update={"sketch": other})
    paths = write(tmp_path / "a.yaml"), write(tmp_path / "b.yaml", model=model)
    lines = run("profile", "diff", *paths).out.splitlines()
    assert len(lines) == 4 and told in lines[3]
    document = run("profile", "diff", *paths, "--json").document
    assert document["weights_distance"] == pytest.approx(moved)


def test_diff_of_what_is_no_profile_is_an_error(run: Run, tmp_path: Path) -> None:
    result = run("profile", "diff", write(tmp_path / "a.yaml"), tmp_path / "none.yaml")
    assert (result.code, result.out) == (2, "")


def test_convert_writes_the_newest_schema(run: Run, tmp_path: Path) -> None:
    old = shutil.copy(OLD, tmp_path / "old.yaml")
    before = Path(old).read_bytes()
    result = run("profile", "convert", old, "--output", tmp_path / "new.yaml")
    assert (result.code, result.out) == (0, "")
    assert "--model MODEL adds the rest" in result.err and "was schema 0, is schema 1" in result.err
    assert Path(old).read_bytes() == before
    assert (tmp_path / "new.yaml").read_text() == Profile.load(Path(old)).to_yaml()
    assert run("profile", "convert", old).out == (tmp_path / "new.yaml").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.yaml", "old.yaml"]


def test_convert_never_writes_over_its_input_unasked(run: Run, tmp_path: Path) -> None:
    old = Path(shutil.copy(OLD, tmp_path / "old.yaml"))
    (tmp_path / "link.yaml").symlink_to(old)
    for output in (old, tmp_path / "link.yaml"):
        result = run("profile", "convert", old, "--output", output)
        assert result.code == 2 and "--in-place" in result.err
    assert run("profile", "convert", old, "-o", tmp_path / "n.yaml", "--in-place").code == 2
    (tmp_path / "notes.txt").write_text("mine")
    assert run("profile", "convert", old, "-o", tmp_path / "notes.txt").code == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert old.read_bytes() == OLD.read_bytes()
    assert run("profile", "convert", old, "--in-place").code == 0
    assert Profile.load_versioned(old) == (Profile.load(OLD), 1)


def test_convert_completes_what_a_model_tells(run: Run, model: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.yaml"
    old.write_text(
        "version: 0\nmodel: mine\nnum_layers: 5\nskip_attn_layers: [2]\nskip_mlp_layers: []\n"
    )
    arguments = ("profile", "convert", old, "--model", model, "--device", "cpu", "--dtype")
    result = run(*arguments, "float32", "--in-place")
    assert result.code == 0 and "note:" not in result.err
    profile = Profile.load(old)
    assert profile.model.name == "mine" and profile.model.vocabulary == 257
    assert profile.model.architecture == "LlamaForCausalLM"
    assert profile.model.sketch is not None and not profile.model.lacks_sizes
    assert profile.plan == SkipPlan.of([2], [])
    assert run("generate", "x", "-p", old, "-m", model, "-n", "2", "--draft", "none").err == ""
    again = run(*arguments, "bfloat16")
    assert again.out == old.read_text()  # what is known stays, a sketch of other bits, too
    wrong = write(tmp_path / "wrong.yaml")
    result = run("profile", "convert", wrong, "--model", model)
    assert (result.code, result.out) == (2, "")
    assert "depth 5 here, 60 in the profile" in result.err


def test_convert_to_json(run: Run, tmp_path: Path) -> None:
    path = write(tmp_path / "p.yaml")
    result = run("profile", "convert", path, "--to", "json")
    assert json.loads(result.out) == yaml.safe_load(path.read_text())
    (tmp_path / "p.json").write_text(result.out)
    assert Profile.load(tmp_path / "p.json") == Profile.load(path)


def test_convert_says_where_the_tensors_are_missed(run: Run, tmp_path: Path) -> None:
    path = with_tensors(tmp_path / "p.yaml")
    assert "p.safetensors" not in run("profile", "convert", path, "-o", tmp_path / "q.yaml").err
    (tmp_path / "sub").mkdir()
    result = run("profile", "convert", path, "-o", tmp_path / "sub" / "q.yaml")
    assert result.code == 0
    assert f"p.safetensors belongs beside {tmp_path / 'sub' / 'q.yaml'}" in result.err


def test_schema_is_one_document(run: Run) -> None:
    document = run("profile", "schema").document
    assert document["title"] == "A conflayers profile"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["profile", "sho"], "conflayers profile --help"),
        (["profile", "show"], "conflayers profile show --help"),
        (["profile", "diff", "a"], "conflayers profile diff --help"),
        (["profile", "validate", "x", "--modl", "y"], "conflayers profile validate --help"),
        (["profile", "convert", "x", "--to", "toml"], "conflayers profile convert --help"),
        (["--nope", "profile", "show"], "conflayers --help"),
    ],
)
def test_wrong_usage_hints_at_the_inner_command(run: Run, arguments: list[str], hint: str) -> None:
    result = run(*arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.endswith(f"see '{hint}'\n") and result.err.count("\n") == 1


@pytest.mark.parametrize("command", ["show", "validate", "diff", "plot", "convert", "schema"])
def test_help_has_an_example(run: Run, command: str) -> None:
    result = run("profile", command, "--help")
    assert (result.code, result.err) == (0, "")
    assert f"conflayers profile {command}" in result.out


def test_profile_alone_gets_the_help(run: Run) -> None:
    result = run("profile")
    assert result.code == 2 and "validate" in result.out + result.err


@pytest.mark.parametrize("arguments", [["show"], ["validate"], ["diff", "x"], ["plot"]])
def test_reading_profiles_needs_no_torch(tmp_path: Path, arguments: list[str]) -> None:
    path = str(with_tensors(tmp_path / "p.yaml"))
    words = ["profile", *(path if word == "x" else word for word in arguments), path]
    script = (
        f"import sys\nfrom conflayers_cli.cli.main import main\nassert main({words!r}) == 0\n"
        "print([n for n in ('torch', 'transformers') if n in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stderr.decode().splitlines()[-1] == "[]"
