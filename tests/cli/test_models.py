"""`conflayers models`: told from files alone, and nothing deleted but what can be made again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conflayers_cli.cli.models import size
from conflayers_cli.engine import cost_cache
from conflayers_cli.engine.cost_model import PassCosts
from conflayers_cli.models import inventory, registry
from tests import tiny
from tests.cli.conftest import Run


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("CONFLAYERS_CACHE", str(folder))
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    monkeypatch.setattr(inventory, "hub_folder", lambda: folder)
    return folder


@pytest.fixture
def measured(cache: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Costs kept of a model of smollm2's shape; what they are does not matter here."""
    costs = PassCosts({1: 1.0}, 0.1, 0.0, 0.0, 64)
    monkeypatch.setattr(cost_cache, "measure_costs", lambda *arguments, **more: costs)
    sizes = {"depth": tiny.DEPTH, "hidden_size": 32, "vocabulary": tiny.VOCABULARY}
    key = json.dumps({**sizes, "architecture": "LlamaForCausalLM"})
    found = cost_cache.cost_table(tiny.decoder("llama"), model_key=key, cache_folder=cache)
    assert found.cache_error is None
    return str(found.path)


def convert(folder: Path, **config: object) -> Path:
    """What a conversion leaves."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(bytes(2000))
    return folder


def snapshot(hub: Path, name: str, revision: str = "abc", **config: object) -> Path:
    """A model in the Hugging Face cache."""
    root = hub / f"models--{name.replace('/', '--')}"
    convert(root / "snapshots" / revision, **config)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(revision)
    return root


def test_nothing_is_there(run: Run, cache: Path, hub: Path) -> None:
    result = run("models", "--json")
    assert result.code == 0
    document = result.document
    assert [model["name"] for model in document["builtin"]] == ["smollm2", "smollm2-deep"]
    assert all(model["folder"] is None for model in document["builtin"])
    assert document["cache_folder"] == str(cache)
    assert document["costs"] == document["hub"] == document["outdated"] == []
    assert not cache.exists()  # looking leaves nothing behind
    text = run("models")
    assert (text.code, text.err) == (0, "")
    assert "smollm2-deep" in text.out
    assert str(cache) in text.out


def test_a_converted_model_its_costs_and_an_outdated_one(
    run: Run, cache: Path, hub: Path, measured: str
) -> None:
    llama = tiny.LLAMA_LIKE
    sizes = {key: llama[key] for key in ("num_hidden_layers", "hidden_size", "vocab_size")}
    folder = convert(registry.REGISTRY["smollm2"].folder, **sizes)
    convert(cache / "smollm2-v0")
    convert(cache / "smollm2-mine")
    (cache / "latencies" / "broken.json").write_text("{")
    document = run("models", "--json").document
    first, second = document["builtin"]
    assert first["folder"] == str(folder)
    assert first["bytes"] == 2000 + (folder / "config.json").stat().st_size
    assert second["folder"] is None
    assert document["outdated"] == [str(cache / "smollm2-v0")]
    (costs,) = document["costs"]
    assert (costs["model"], costs["depth"], costs["rows"]) == ("smollm2", tiny.DEPTH, [1])
    assert costs["dtype"] == "float32"
    assert costs["file"] == measured
    told = run("models").out
    assert "smollm2-v0" in told
    assert "float32" in told


def test_models_of_the_hub_are_told_by_their_configuration(
    run: Run, cache: Path, hub: Path
) -> None:
    snapshot(hub, "a/good", architectures=["LlamaForCausalLM"], num_hidden_layers=4)
    snapshot(hub, "b/t5", architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True)
    snapshot(hub, "c/bert", architectures=["BertModel"])
    kinds = ["linear_attention", "full_attention"]
    snapshot(hub, "d/linear", architectures=["QwenForCausalLM"], text_config={"layer_types": kinds})
    pickled = snapshot(hub, "e/pickled", architectures=["GPT2LMHeadModel"], n_layer=2)
    (pickled / "snapshots" / "abc" / "model.safetensors").rename(pickled / "x.bin")
    snapshot(hub, "f/tokenizer")
    (hub / "datasets--g--set").mkdir()
    newest = snapshot(hub, "h/two", "old", architectures=["XForCausalLM"], num_hidden_layers=1)
    snapshot(hub, "h/two", "new", architectures=["YForCausalLM"], num_hidden_layers=2)
    (newest / "refs" / "main").write_text("old")
    found = {model["name"]: model for model in run("models", "--json").document["hub"]}
    problems = {name: model["problem"] for name, model in found.items()}
    assert problems == {
        "a/good": None,
        "b/t5": "an encoder-decoder",
        "c/bert": "no causal language model",
        "d/linear": "has linear_attention layers",
        "e/pickled": "no safetensors here",
        "h/two": None,
    }
    assert (found["a/good"]["depth"], found["c/bert"]["depth"]) == (4, None)
    assert found["h/two"]["architecture"] == "XForCausalLM"
    (newest / "refs" / "main").unlink()
    later = newest / "snapshots" / "new"
    os.utime(later, (2e9, 2e9))
    found = {model["name"]: model for model in run("models", "--json").document["hub"]}
    assert found["h/two"]["architecture"] == "YForCausalLM"
    assert "a/good" in run("models").out


def test_clear_deletes_a_conversion_and_nothing_else(run: Run, cache: Path, hub: Path) -> None:
    entries = registry.REGISTRY
    for folder in (entries["smollm2"].folder, entries["smollm2-deep"].folder, cache / "smollm2-v0"):
        convert(folder)
    kept = convert(cache / "mine")
    result = run("models", "--clear", "smollm2")
    assert (result.code, result.out) == (0, "")
    assert "deleted" in result.err
    left = {path.name for path in cache.iterdir()}
    assert left == {entries["smollm2-deep"].folder.name, kept.name}
    again = run("models", "--clear", "smollm2", "--json")
    assert again.code == 0
    assert again.document["deleted"] == []


def test_clear_costs(run: Run, cache: Path, hub: Path, measured: str) -> None:
    assert run("models", "--json").document["costs"]
    assert run("models", "--clear", "costs").code == 0
    assert not (cache / "latencies").exists()


def test_clear_leaves_a_linked_folder_alone(run: Run, cache: Path, hub: Path) -> None:
    """Someone keeps it elsewhere: that is theirs."""
    elsewhere = convert(cache / "elsewhere")
    registry.REGISTRY["smollm2"].folder.symlink_to(elsewhere)
    result = run("models", "--clear", "smollm2")
    assert "there is nothing of smollm2" in result.err
    assert (elsewhere / "model.safetensors").is_file()


def test_clear_of_something_unknown(run: Run, cache: Path, hub: Path) -> None:
    result = run("models", "--clear", "smolm2")
    assert result.code == 2
    assert "smollm2, smollm2-deep, costs, learnt, compiled" in result.err
    assert "did you mean smollm2?" in result.err


def test_it_is_told_without_pytorch(cache: Path) -> None:
    heavy = ("torch", "transformers", "numpy", "safetensors")
    script = (
        "import sys\nfrom conflayers_cli.cli.main import main\n"
        "assert main(['models']) == 0 and main(['models', '--json']) == 0\n"
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stderr.decode() == "[]\n"


@pytest.mark.parametrize(
    ("count", "told"), [(5, "5 bytes"), (1536, "1.5 KiB"), (541_613_441, "516.5 MiB")]
)
def test_sizes_as_people_read_them(count: int, told: str) -> None:
    assert size(count) == told
