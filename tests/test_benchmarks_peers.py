"""The comparison with peers, without any of them: files, workers, figures and tables."""

from __future__ import annotations

import io
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from gguf import GGUFReader, GGUFWriter, TokenType

from benchmarks import peer_gguf, peer_models, peer_tables, peer_worker, peers
from benchmarks.gpu_shapes import Shape
from benchmarks.peer_arms import ARMS, LABELS, Bench
from benchmarks.peer_worker import PeerError, Worker
from conflayers_cli.models.loaded_model import wrap_model
from tests import tiny

SMALL = Shape("small", 4, 32, 64, 4, 2, tiny.VOCABULARY, positions=256)


def tokenizer_file(path: Path) -> Path:
    """A GGUF file with nothing but a tokenizer."""
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(tiny.VOCABULARY)])
    writer.add_token_types([TokenType.NORMAL] * tiny.VOCABULARY)
    writer.add_token_merges(["t 1"])
    writer.add_eos_token_id(3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [False, True])
def test_a_gguf_file_is_the_model_and_the_tokenizer_whole(tmp_path: Path, tied: bool) -> None:
    config = hf.LlamaConfig(**{**tiny.LLAMA_LIKE, "tie_word_embeddings": tied, "rope_theta": 5e4})
    tiny.build(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    file, tokenizer = tmp_path / "model.gguf", tokenizer_file(tmp_path / "tokenizer.gguf")
    peer_gguf.write_gguf(tmp_path / "model", file, tokenizer)

    fields = GGUFReader(file).fields
    copied = {key: field.contents() for key, field in GGUFReader(tokenizer).fields.items()}
    copied = {key: value for key, value in copied.items() if key.startswith("tokenizer.")}
    assert len(copied) == 5 and {key: fields[key].contents() for key in copied} == copied
    # transformers undoes what llama.cpp needs of the rotary embedding, by code of its own
    load = partial(hf.AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
    model, again = load(tmp_path / "model"), load(tmp_path, gguf_file=file.name)
    tokens = torch.arange(12)[None]
    with torch.inference_mode():
        expected = model(input_ids=tokens).logits
        found = again(input_ids=tokens).logits
    assert torch.allclose(found, expected, atol=1e-5)


def test_only_plain_llamas_are_written(tmp_path: Path) -> None:
    config = hf.LlamaConfig(**{**tiny.LLAMA_LIKE, "attention_bias": True})
    tiny.build(config).save_pretrained(tmp_path)
    with pytest.raises(PeerError, match=r"no plain Llama: it has .*bias"):
        peer_gguf.write_gguf(tmp_path, tmp_path / "m.gguf", tokenizer_file(tmp_path / "t.gguf"))


def test_a_planted_models_profile_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = tmp_path / "smollm2"
    built.mkdir()
    (built / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(peer_models, "ensure_built", lambda name: built)
    folder = peer_models._planted(SMALL, tmp_path)
    assert (folder / "tokenizer.json").exists()
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    profile = peer_models.known_profile(wrap_model(model, None, str(folder), ""))
    assert profile.plan.attention == profile.plan.mlp and profile.plan.weights == "int4"
    assert len(profile.plan.mlp) == 2 and profile.draft.by == "mixed"
    added = [layer.mlp.down_proj.weight.std() for layer in model.model.layers]
    assert sorted(range(4), key=lambda i: added[i])[:2] == list(profile.plan.mlp)
    assert peer_models._planted(SMALL, tmp_path) == folder  # made once


class Engine:
    """Stands in for a peer."""

    def load(self) -> None:
        self.versions = {"peer": "1.0"}
        self.loaded = True

    def double(self, number: int) -> dict[str, Any]:
        if number < 0:
            raise ValueError("it is negative")
        return {"number": 2 * number, "loaded": self.loaded}


def test_a_worker_answers_line_by_line() -> None:
    asked = [("double", {"number": 4}), ("double", {"number": -1}), ("memory", {})]
    lines = [json.dumps({"operation": name, **arguments}) for name, arguments in asked]
    answers = io.StringIO()
    peer_worker.serve(Engine(), io.StringIO("\n".join(lines)), answers)
    given: list[dict[str, Any]] = [json.loads(line) for line in answers.getvalue().splitlines()]
    loaded, doubled, failed, memory = given
    assert loaded == {"versions": {"peer": "1.0"}}
    assert doubled == {"number": 8, "loaded": True}
    assert failed == {"error": "ValueError: it is negative"}
    assert memory["bytes"] is None or memory["bytes"] >= 0


def test_a_worker_that_dies_says_why(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"(?s)ended \(code 1\).*no-such-engine"):
        Worker(sys.executable, {"engine": "no-such-engine", "threads": 1}, tmp_path / "log")


class FakeWorker:
    """Writes the same text at a speed of its own; the one that drafts wrongly ends otherwise."""

    def __init__(self, rate: float, last: int = 9) -> None:
        self.rate, self.last = rate, last
        self.loaded: dict[str, Any] = {"versions": {}}

    def call(self, operation: str, **asked: Any) -> dict[str, Any]:
        if operation == "generate":
            count = asked["budget"]
            rest = (count - 1) / self.rate / (2 if asked.get("drafts") else 1)
            found = {"tokens": [*range(count - 1), self.last], "first": 0.5, "rest": rest}
            return found | ({"drafted": 8, "accepted": 6, "steps": 5} if "drafts" in asked else {})
        if operation == "passes":
            seconds = (1 + asked["width"] / 10) / self.rate
            return {"seconds": [seconds * (0.5 if asked.get("draft") else 1)] * asked["count"]}
        return {"bytes": 3 << 20, "gigabytes_per_second": [10.0]}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    options = type("Options", (), {})()
    vars(options).update(rounds=2, max_new_tokens=11, contexts=[8, 16], context=4)
    vars(options).update(arms=["llama", "llama-q4", "transformers", "plain", "drafts"])
    hf.LlamaConfig(**tiny.LLAMA_LIKE).save_pretrained(tmp_path)
    prompts = ((1, 2), (3, 4), (5, 6))
    model = peer_models.Prepared("m", "m", tmp_path, tmp_path, None, (), prompts)
    workers: dict[str, Any] = {
        "llama": FakeWorker(20),
        "llama-q4": FakeWorker(40, 3),
        "plain": FakeWorker(10),
    }
    found = Bench(options, model, failed={"transformers": "it is not there"})
    found.workers.update({ARMS[name].holder: worker for name, worker in workers.items()})
    return found


def test_figures_and_tables(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    entry = {part: measure(bench) for part, measure in peers.MEASURE.items()}
    arms = entry["speed"]["arms"]
    assert list(arms) == ["llama", "llama-q4", "plain", "drafts"]
    assert arms["plain"]["over_llama"]["median"] == pytest.approx(0.5)
    assert arms["drafts"]["over_plain"]["median"] == pytest.approx(2)
    assert arms["drafts"]["acceptance"] == 0.75 and arms["drafts"]["tokens_per_step"] == 2
    assert arms["drafts"]["identical"] == {"to": "plain", "matching": 6, "total": 6}
    assert arms["llama-q4"]["identical"]["matching"] == 0
    assert arms["llama-q4"]["first_difference"]["median"] == 11  # ten tokens are the same
    seconds = entry["passes"]["seconds"]
    assert seconds["plain 8"]["median"] / seconds["plain 1"]["median"] == pytest.approx(1.8 / 1.1)
    machine = {"processor": "A", "native_unit": "avx2"}
    document = {"environment": machine, "threads": 2, "subjects": {"m": entry}}
    peer_tables.show(document, LABELS)
    shown = capsys.readouterr().out
    assert "| m | llama.cpp | 20.0 (20.0–20.0) | 1 |" in shown
    assert "| m | *llama.cpp Q4_1* | 40.0 (40.0–40.0) | 2.00 |" in shown
    assert "| m | plain | 110.0 (1.00) | 120.0 (1.09) | 140.0 (1.27) |" in shown
    assert "m, llama.cpp Q4_1: 0 of 6 texts are plain's, else alike for 10 tokens" in shown
    assert "m, transformers: did not run: it is not there" in shown


def test_what_a_pass_reads() -> None:
    model = tiny.build(hf.LlamaConfig(**tiny.LLAMA_LIKE))
    weights = [w for name, w in model.named_parameters() if w.ndim == 2 and "embed" not in name]
    cached = 2 * tiny.DEPTH * 2 * 8 * 100  # keys and values of two heads, 100 positions
    count = 2 * (sum(weight.numel() for weight in weights) + cached)
    assert peers.bytes_read(model.config.to_dict(), 100) == count
