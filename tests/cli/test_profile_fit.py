"""What is said where a profile's weights or device are other ones, and nothing elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from safetensors.torch import load_file, save_file

from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.models.loaded_model import LoadedModel
from conflayers_cli.models.loader import load_model
from conflayers_cli.profile.check import current_environment, fingerprint_model
from conflayers_cli.profile.schema import (
    DraftSettings,
    Environment,
    Measured,
    Profile,
    RangeSection,
    SkipSection,
)
from conflayers_cli.skip_plan import SkipPlan
from tests import rounding
from tests.cli.conftest import Run, save_model

FAST = ("-n", "4", "--device", "cpu", "--dtype", "float32")
H100 = "cuda:1 (NVIDIA H100)"
SKIP = SkipSection.of(SkipPlan.of_layers([2]))
LOOKAHEAD = DraftSettings(max_tokens=4, stop_probability=0.5)
FIXED = DraftSettings(max_tokens=4, stop_probability=0.5, by="skip", lookahead=False)
MEASURED = Measured(
    acceptance_rate=0.5,
    tokens_per_step=2.0,
    expected_speedup=1.2,
    measured_speedup=1.2,
    iterations=3,
    seconds=1.0,
    conclusion="",
)


@pytest.fixture(scope="module")
def loaded(model: Path) -> LoadedModel:
    return load_model(str(model), LoadOptions(device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def here(loaded: LoadedModel) -> Environment:
    return current_environment(loaded)


def written(path: Path, loaded: LoadedModel, **fields: Any) -> Path:
    values = {"model": fingerprint_model(loaded), "skip": SKIP, "draft": FIXED, **fields}
    Profile(**values).save(path)
    return path


def resaved(model: Path, folder: Path, change: rounding.Change, **save: Any) -> Path:
    """A model's folder with its matrices changed, and stored in shards where that is asked for."""
    shutil.copytree(model, folder)
    weights = folder / "model.safetensors"
    tensors = {
        name: change(tensor).to(tensor.dtype) if "layers" in name and tensor.dim() == 2 else tensor
        for name, tensor in load_file(weights).items()
    }
    save_file(tensors, weights, metadata={"format": "pt"})
    if save:
        stored = hf.AutoModelForCausalLM.from_pretrained(folder)
        weights.unlink()
        stored.save_pretrained(folder, **save)
    return folder


def test_the_same_weights_in_another_form_and_dtype_get_no_word(
    run: Run, model: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    profile = written(tmp_path / "p.yaml", loaded)
    sharded = resaved(model, tmp_path / "sharded", lambda w: w, max_shard_size="50KB")
    assert not (sharded / "model.safetensors").exists()
    rounded = resaved(model, tmp_path / "q8", rounding.q8_0)
    for folder, dtype in ((sharded, "float32"), (model, "bfloat16"), (rounded, "float32")):
        arguments = ("generate", "x", "-m", folder, "-p", profile, "-n", 2, "--device", "cpu")
        result = run(*arguments, "--dtype", dtype)
        assert (result.code, result.err) == (0, "")


def test_a_fine_tune_gets_one_note_and_goes_on(
    run: Run, model: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    profile = written(tmp_path / "p.yaml", loaded)
    tuned = resaved(model, tmp_path / "tuned", rounding.tuned(0.02))
    plain = run("generate", "x", "-m", tuned, *FAST, "--json").document
    result = run("generate", "x", "-m", tuned, "-p", profile, *FAST, "--json")
    assert result.code == 0
    [told] = result.err.splitlines()
    assert told.startswith(
        f"conflayers: note: {profile}: was made for other weights than {tuned}'s"
    )
    assert "% away, as a fine-tune is" in told
    assert result.document["token_ids"] == plain["token_ids"]


def test_another_model_of_the_same_sizes_gets_a_warning(
    run: Run, model: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    profile = written(tmp_path / "p.yaml", loaded)
    other = resaved(model, tmp_path / "other", lambda w: w.flip(0, 1))
    result = run("generate", "x", "-m", other, "-p", profile, *FAST)
    assert result.code == 0
    [told] = result.err.splitlines()
    assert "warning" in told and "shares nothing" in told


def test_another_vocabulary_is_refused_whatever_the_weights(
    run: Run, loaded: LoadedModel, tmp_path: Path
) -> None:
    profile = written(tmp_path / "p.yaml", loaded)
    other = save_model(tmp_path / "other", vocab_size=300)
    result = run("generate", "x", "-m", other, "-p", profile, *FAST)
    assert result.code == 2
    assert "vocabulary 300 here, 257 in the profile" in result.err


def test_a_profile_of_version_0_works_and_says_what_completes_it(
    run: Run, model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(
        f"version: 0\nmodel: {model}\nnum_layers: 5\nskip_attn_layers: [2]\nskip_mlp_layers: [2]\n"
    )
    result = run("generate", "x", "-p", path, "--draft", "none", *FAST)
    assert result.code == 0
    [told] = result.err.splitlines()
    assert f"`conflayers profile convert {path} --model {model} --in-place`" in told
    result = run("generate", "x", "-m", save_model(tmp_path / "m", num_hidden_layers=6), "-p", path)
    assert result.code == 2
    assert "depth 6 here, 5 in the profile" in result.err


@pytest.mark.parametrize(
    ("fields", "flags", "said"),
    [
        ({"draft": FIXED}, [], "its draft lengths were tuned for cuda (NVIDIA H100) in float16"),
        ({"draft": LOOKAHEAD}, ["--no-adaptive-draft-length"], "its draft lengths were tuned"),
        ({"draft": FIXED}, ["--adaptive-draft-length"], None),
        ({"draft": FIXED, "measured": MEASURED}, ["--adaptive-draft-length"], "the figures of"),
        ({"draft": LOOKAHEAD, "measured": MEASURED}, [], "costs are measured here"),
        ({"draft": LOOKAHEAD}, [], None),
        ({"draft": FIXED, "measured": MEASURED}, ["--draft", "ngram"], None),
        ({"draft": FIXED, "measured": MEASURED}, ["--draft", "none"], None),
        (
            {"draft": LOOKAHEAD.model_copy(update={"tree": ((0.0, 2),)}), "measured": MEASURED},
            [],
            "its side candidates were chosen for cuda",
        ),
        (
            {"draft": LOOKAHEAD.model_copy(update={"tree": ((0.0, 2),)}), "measured": MEASURED},
            ["--no-tree"],
            "the figures of",
        ),
        (
            {
                "draft": LOOKAHEAD,
                "ranges": (RangeSection(from_context=50, skip=SKIP, draft=LOOKAHEAD),),
            },
            [],
            "its ranges of context lengths were chosen for cuda",
        ),
    ],
)
def test_another_device_gets_one_note_where_it_matters(
    run: Run,
    loaded: LoadedModel,
    here: Environment,
    tmp_path: Path,
    fields: dict[str, Any],
    flags: list[str],
    said: str | None,
) -> None:
    theirs = here.model_copy(update={"device": H100, "dtype": "float16"})
    profile = written(tmp_path / "p.yaml", loaded, environment=theirs, **fields)
    result = run("generate", "x", "-p", profile, *FAST, *flags)
    assert result.code == 0
    if said is None:
        assert result.err == ""
    else:
        [line] = result.err.splitlines()
        assert said in line and "in float32" in line
    again = written(tmp_path / "p.yaml", loaded, environment=here, **fields)
    assert run("generate", "x", "-p", again, *FAST, *flags).err == ""


def test_one_of_several_like_devices_is_as_good_as_another(here: Environment) -> None:
    from conflayers_cli.profile.check import device_and_dtype

    one, other = (here.model_copy(update={"device": f"cuda:{n} (NVIDIA H100)"}) for n in (0, 3))
    assert device_and_dtype(one) == device_and_dtype(other) == f"cuda (NVIDIA H100) in {here.dtype}"
    assert device_and_dtype(one) != device_and_dtype(
        here.model_copy(update={"device": "cuda:0 (NVIDIA A100)"})
    )
