"""The profiles that come with the project: valid, written as they would be saved, and right.

The layers below are written out once more, from the ConfLayers authors' release, so that a slip in
a file shows.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from conflayers_cli.profile.schema import Profile

FOLDER = Path(__file__).parents[2] / "profiles"
SHIPPED = sorted(FOLDER.glob("*.yaml"))

SIZES = {  # name, depth, hidden, attention heads, key and value heads, intermediate, vocabulary
    "llama-2-13b": ("meta-llama/Llama-2-13b-hf", 40, 5120, 40, 40, 13824, 32000),
    "llama-3-8b": ("meta-llama/Meta-Llama-3-8B", 32, 4096, 32, 8, 14336, 128256),
    "llama-2-70b": ("meta-llama/Llama-2-70b-hf", 80, 8192, 64, 8, 28672, 32000),
    "llama-3-70b": ("meta-llama/Meta-Llama-3-70B", 80, 8192, 64, 8, 28672, 128256),
}
LAYERS = {
    "llama-2-13b-cnndm": "2 4 6 11 14 16 19 22 24 25 27 29 31 34 35 36",
    "llama-2-13b-gsm8k": "2 5 8 15 16 18 19 20 22 23 24 25 27 29 30 31 34 35 36",
    "llama-2-13b-alpaca": "2 4 8 11 12 18 20 23 24 25 27 29 30 34 35 36",
    "llama-2-13b-wmt14-de-en": "2 8 12 14 15 18 20 22 24 25 27 29 30 32 34 35 36",
    "llama-3-8b-cnndm": "1 4 9 11 12 18 19 23 24 25 26 27 28",
    "llama-3-8b-gsm8k": "1 4 6 11 12 18 19 20 23 24 25 27 28",
    "llama-3-8b-alpaca": "1 3 8 9 11 12 18 19 20 23 24 26 28 29",
    "llama-3-8b-wmt14-de-en": "1 3 4 8 11 18 20 22 23 25 27 28 29",
    "llama-2-70b-cnndm": "9 11 13 16 19 21 23 25 26 27 30 36 37 38 40 41 42 45 46 48 49 50 51 53 "
    "54 55 57 58 60 61 63 65 67 68 70 74 75 78",
    "llama-2-70b-gsm8k": "2 9 10 16 22 23 25 27 28 30 35 37 38 41 43 45 46 48 50 51 53 54 55 57 "
    "58 60 61 63 65 68 70 71 72 75 78",
    "llama-2-70b-alpaca": "5 7 10 16 20 22 23 27 30 32 35 37 39 41 43 45 46 48 50 51 53 54 55 57 "
    "58 60 61 63 65 68 69 72 74 75 78",
    "llama-2-70b-wmt14-de-en": "7 10 11 13 15 16 23 25 28 30 32 35 37 41 43 45 46 48 50 51 53 54 "
    "55 57 58 60 61 65 68 70 74 75 78",
    "llama-3-70b-cnndm": "9 12 15 17 22 23 24 25 31 32 36 40 41 42 43 46 48 50 51 54 58 59 61 62 "
    "64 65 67 68 69 70 71 72",
    "llama-3-70b-gsm8k": "9 12 15 16 17 20 22 23 24 25 30 32 36 41 42 43 46 47 49 50 54 58 59 61 "
    "62 64 65 66 69 70 71 72",
    "llama-3-70b-alpaca": "6 14 17 21 22 24 25 27 30 32 36 41 42 43 46 47 50 51 53 54 57 58 61 62 "
    "65 66 67 68 69 72 75 76",
    "llama-3-70b-wmt14-de-en": "11 14 20 22 23 24 25 32 36 39 40 41 42 43 46 49 50 51 57 58 59 61 "
    "62 63 64 65 66 67 68 69 70 71 72",
}
# mean tokens per verify step and acceptance in the authors' logs, where they are known
FIGURES = {
    "llama-2-13b-cnndm": ("4.33", "0.972"),
    "llama-2-13b-gsm8k": ("3.39", "0.860"),
    "llama-2-70b-gsm8k": ("3.62", "0.946"),
}
TASKS = {"cnndm": "CNN/DailyMail", "gsm8k": "GSM8K", "alpaca": "Alpaca", "wmt14-de-en": "WMT14"}


def model_and_task(name: str) -> tuple[str, str]:
    """The two halves of a published profile's name."""
    [model] = [model for model in SIZES if name.startswith(f"{model}-")]
    return model, name.removeprefix(f"{model}-")


def test_each_model_has_a_profile_for_each_task() -> None:
    wanted = {f"{model}-{task}" for model in SIZES for task in TASKS}
    assert set(LAYERS) == wanted
    assert {path.stem for path in SHIPPED} == wanted | {"smollm2-deep", "smollm2"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_profile_is_what_saving_it_would_write(path: Path, tmp_path: Path) -> None:
    profile = Profile.load(path)
    assert profile.to_yaml() == path.read_text(encoding="utf-8")
    profile.save(tmp_path / "again.yaml")
    assert Profile.load(tmp_path / "again.yaml") == profile
    assert profile.tensors is None or (path.parent / profile.tensors).is_file()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_profile_skips_a_sensible_share_of_its_model(path: Path) -> None:
    profile = Profile.load(path)
    depth = profile.model.depth
    profile.plan.check(depth)
    for layers in (profile.plan.attention, profile.plan.mlp):
        assert not {0, depth - 1} & set(layers)
        assert 0.3 <= len(layers) / depth <= 0.6 or path.stem == "smollm2"
    assert (profile.plan.weights == "int4") == path.stem.startswith("smollm2")


@pytest.mark.parametrize("name", LAYERS)
def test_a_published_profile_skips_the_layers_of_the_release(name: str) -> None:
    profile = Profile.load(FOLDER / f"{name}.yaml")
    layers = tuple(map(int, LAYERS[name].split()))
    assert profile.skip.attention == layers
    assert profile.skip.mlp == layers
    # the paper's drafting, as a chain
    assert (profile.draft.max_tokens, profile.draft.stop_probability) == (25, 0.8)
    assert profile.draft.tree is None
    assert profile.ranges is None


@pytest.mark.parametrize("name", LAYERS)
def test_a_published_profile_is_for_the_released_model(name: str) -> None:
    model = Profile.load(FOLDER / f"{name}.yaml").model
    sizes = (
        model.name,
        model.depth,
        model.hidden_size,
        model.attention_heads,
        model.key_value_heads,
        model.intermediate_size,
        model.vocabulary,
    )
    assert sizes == SIZES[model_and_task(name)[0]]
    assert model.architecture == "LlamaForCausalLM"
    assert model.config_hash is None


@pytest.mark.parametrize("name", LAYERS)
def test_a_published_profile_says_whose_figures_it_has(name: str) -> None:
    profile = Profile.load(FOLDER / f"{name}.yaml")
    assert profile.source is not None
    model, task = model_and_task(name)
    for part in ("ConfLayers", "2604.14612", "authors' release", TASKS[task], "not measured here"):
        assert part in profile.source
    assert f"for {model} on" in profile.source.lower()
    told = [figure for figure in sum(FIGURES.values(), ()) if figure in profile.source]
    assert told == list(FIGURES.get(name, ()))
    assert ("the authors' figures" in profile.source) == (name in FIGURES)
    assert profile.found_by is None and profile.measured is None
    assert profile.environment is None and profile.tensors is None
