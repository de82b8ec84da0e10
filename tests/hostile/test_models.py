"""Folders and files that are broken or hostile models: one line, code 2, nothing run or made up."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Run
from tests.hostile.conftest import Refuse

FAST = ("-n", "3", "--device", "cpu", "--dtype", "float32")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Change = Callable[[Path], object]


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "m"))


def edit(file: str, **changes: Any) -> Change:
    def change(folder: Path) -> None:
        document = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**document, **changes}))

    return change


def content(file: str, make: bytes | Callable[[bytes], bytes]) -> Change:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_bytes(make if isinstance(make, bytes) else make(path.read_bytes()))

    return change


def tensors(make: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def change(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        make(held)
        save_file(held, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def header(entries: dict[str, Any], body: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + body


def shards(second: str = "b.safetensors", index: bytes | None = None) -> Change:
    """The weights in two files; the index calls the second one by the name given."""

    def change(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        half = len(held) // 2
        parts = {"a.safetensors": sorted(held)[:half], "b.safetensors": sorted(held)[half:]}
        for name, keys in parts.items():
            save_file({key: held[key] for key in keys}, folder / name, metadata={"format": "pt"})
        names = dict.fromkeys(sorted(held)[:half], "a.safetensors")
        names |= dict.fromkeys(sorted(held)[half:], second)
        document = json.dumps({"metadata": {}, "weight_map": names}).encode()
        (folder / INDEX).write_bytes(document if index is None else index)

    return change


def moved(file: str, to: str, before: Change = lambda folder: None) -> Change:
    def change(folder: Path) -> None:
        before(folder)
        (folder / file).rename(folder / to)

    return change


NORM = "model.norm.weight"
UP = "model.layers.2.mlp.up_proj.weight"
REFUSED: dict[str, tuple[Change, str]] = {
    "a header cut off": (content(WEIGHTS, lambda held: held[:300]), "invalid header length"),
    "data cut off": (content(WEIGHTS, lambda held: held[:-1]), "cannot read the weights"),
    "an absurd header": (
        content(WEIGHTS, lambda held: struct.pack("<Q", 2**63) + held[8:]),
        "header too large",
    ),
    "offsets beyond the file": (
        content(WEIGHTS, header({NORM: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})),
        "cannot read the weights",
    ),
    "a shape beyond numbers": (
        content(
            WEIGHTS,
            header({NORM: {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 0]}}),
        ),
        "overflow",
    ),
    "no tensors": (content(WEIGHTS, header({})), "48 missing"),
    "one is missing": (tensors(lambda held: held.pop(UP)), f"1 missing, the first is {UP}"),
    "the head is missing": (tensors(lambda held: held.pop("lm_head.weight")), "1 missing"),
    "another shape": (
        tensors(lambda held: held.update({NORM: torch.ones(16)})),
        f"1 of another shape, the first is {NORM}",
    ),
    "a scalar": (tensors(lambda held: held.update({NORM: torch.tensor(1.0)})), "another shape"),
    "integers": (
        tensors(lambda held: held.update({NORM: torch.ones(32, dtype=torch.int32)})),
        f"{NORM} holds I32, which are no weights",
    ),
    "truths": (tensors(lambda held: held.update({UP: held[UP] > 0})), f"{UP} holds BOOL"),
    "complex numbers": (
        tensors(lambda held: held.update({NORM: torch.ones(32, dtype=torch.complex64)})),
        "holds C64",
    ),
    "a shard is missing": (
        moved("b.safetensors", "c.safetensors", shards()),
        f"{INDEX} names b.safetensors",
    ),
    "a shard outside": (
        moved("b.safetensors", "../b.safetensors", shards("../b.safetensors")),
        "only .safetensors files in the same folder are read",
    ),
    "a shard elsewhere": (shards("/etc/b.safetensors"), "in the same folder are read"),
    "a pickle as a shard": (moved("b.safetensors", "b.bin", shards("b.bin")), "only .safetensors"),
    "a folder as a shard": (shards("."), "only .safetensors"),
    "an index of nothing": (shards(index=b'{"metadata": {}, "weight_map": {}}'), "is no index"),
    "an index without a map": (shards(index=b"{}"), "is no index of weights"),
    "an index of numbers": (
        shards(index=b'{"metadata": {}, "weight_map": {"a": 1}}'),
        "only .safetensors",
    ),
    "an index that is a list": (shards(index=b"[]"), f"{INDEX}: holds list, not a JSON object"),
    "an index cut off": (shards(index=b"{"), f"{INDEX}: is not valid JSON"),
    "an index of the wrong files": (shards("a.safetensors"), "missing, the first is"),
    "a pickle alone": (moved(WEIGHTS, "pytorch_model.bin"), "pytorch_model.bin is a pickle"),
    "weights of another name": (moved(WEIGHTS, "other.safetensors"), "has no weights"),
    "weights named in the config": (
        edit("config.json", transformers_weights="../x.safetensors"),
        "names weights that are no safetensors in its folder",
    ),
    "no layers": (edit("config.json", num_hidden_layers=0), "names no number of layers"),
    "less than none": (edit("config.json", num_hidden_layers=-1), "names no number of layers"),
    "many layers": (edit("config.json", num_hidden_layers=9999), "don't fit its config"),
    "too many layers": (edit("config.json", num_hidden_layers=10**9), "is 1,000,000,000"),
    "a layer count of 30 digits": (edit("config.json", num_hidden_layers=10**29), "is 1e+29"),
    "as a text": (edit("config.json", num_hidden_layers="5"), "num_hidden_layers"),
    "wide": (edit("config.json", hidden_size=10**9), "over 16,"),
    "wider": (edit("config.json", hidden_size=10**18), "cannot read the weights"),
    "widest": (edit("config.json", hidden_size=10**30), "cannot read the weights"),
    "no width": (edit("config.json", hidden_size=0), "config"),
    "many tokens": (edit("config.json", vocab_size=10**12), "over 16,"),
    "no tokens": (edit("config.json", vocab_size=0), "would have no numbers"),
    "wide layers": (edit("config.json", intermediate_size=10**12), "over 16,"),
    "no heads": (edit("config.json", num_attention_heads=0), "cannot read the config"),
    "no key heads": (edit("config.json", num_key_value_heads=0), "cannot read"),
    "no context": (edit("config.json", max_position_embeddings=0), "max_position_embeddings is 0"),
    "an unknown rotary": (edit("config.json", rope_parameters={"rope_type": "x"}), "cannot read"),
    "architectures that are numbers": (edit("config.json", architectures=[3]), "list of names"),
    "architectures that are an object": (edit("config.json", architectures={}), "list of names"),
    "a list as its type": (edit("config.json", model_type=["llama"]), "cannot read the config"),
    "an unknown dtype": (edit("config.json", dtype="x"), "cannot read the config"),
    "a number as quantisation": (edit("config.json", quantization_config=3), "is no object"),
    "an unknown quantisation": (
        edit("config.json", quantization_config={"quant_method": "x"}),
        "is quantised with 'x'",
    ),
    "attention from the hub": (
        edit("config.json", attn_implementation="someone/kernel"),
        "asks for code from elsewhere (attn_implementation 'someone/kernel' in config.json)",
    ),
    "attention from the hub, below": (
        edit("config.json", text_config={"_attn_implementation": "someone/kernel"}),
        "asks for code from elsewhere",
    ),
    "padding beyond all tokens": (edit("config.json", pad_token_id=10**9), "cannot read"),
    **{
        f"config.json: {text[:9]!r}": (content("config.json", text), "config.json: ")
        for text in (b"", b"{", b"[]", b"3", b"null", b"\xff", b"[" * 99_999, b'{"a": ' * 99_999)
    },
    "code of its own": (edit("config.json", auto_map={"AutoConfig": "x.Y"}), "--trust-remote-code"),
    "a tokenizer with code": (
        edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tok", None]}),
        "auto_map in tokenizer_config.json): --trust-remote-code",
    ),
    "a generation config cut off": (
        content("generation_config.json", b'{"eos_token_id": 256'),
        "generation_config.json: is not valid JSON",
    ),
    "a generation config that is a list": (
        content("generation_config.json", b"[]"),
        "generation_config.json: holds list",
    ),
    "an end that is a text": (
        edit("generation_config.json", eos_token_id="x"),
        "is broken: its end token (eos_token_id) is 'x'",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "the tokenizer of"),
    **{
        f"tokenizer.json: {text[:9]!r}": (content("tokenizer.json", text), "the tokenizer of")
        for text in (b"", b"{", b"[]", b"3", b"null", b"\xff", b"[" * 99_999, b'{"model": 3}')
    },
    "added tokens that are a list": (content("added_tokens.json", b"[]"), "holds list"),
    "a number as the end's text": (edit("tokenizer_config.json", eos_token=3), "the tokenizer of"),
    "a number as its class": (edit("tokenizer_config.json", tokenizer_class=3), "the tokenizer of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_is_refused(refused: Refuse, folder: Path, name: str) -> None:
    change, expected = REFUSED[name]
    change(folder)
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(folder / 'trace')!r})")
    told = refused("generate", "Hello", "-m", folder, *FAST)
    assert expected in told
    assert str(folder) in told
    assert not (folder / "trace").exists()


KEY = struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<I", 8)
GGUF = b"GGUF\x03\x00\x00\x00"


@pytest.mark.parametrize(
    "made",
    [
        b"",
        b"GGUF",
        GGUF + b"\xff" * 100,
        GGUF + struct.pack("<QQ", 0, 0),
        GGUF + struct.pack("<QQ", 1, 2**60),
        GGUF + struct.pack("<QQ", 2**40, 0),
        GGUF + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<Q", 5) + b"llama",
        GGUF + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<Q", 2**62) + b"llama",
        GGUF + struct.pack("<QQQ", 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 9, 2**40),
        b"GGUF\x63\x00\x00\x00" + bytes(100),
        bytes(range(256)) * 20,
    ],
    ids=range(11),
)
def test_a_gguf_file_is_refused(refused: Refuse, tmp_path: Path, made: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(made)
    assert str(path) in refused("generate", "Hello", "-m", path, *FAST)


def test_weights_of_the_right_kind_are_read_beside_what_is_of_no_use(
    run: Run, model: Path, folder: Path
) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(folder / "trace"),)

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    tensors(lambda held: held.update(position_ids=torch.arange(9), extra=torch.zeros(3)))(folder)
    expected = run("generate", "Hello", "-m", model, *FAST, "--json").document["token_ids"]
    assert run("generate", "Hello", "-m", folder, *FAST, "--json").document["token_ids"] == expected
    assert not (folder / "trace").exists()
    (folder / "pytorch_model.bin").unlink()
    shards()(folder)
    assert run("generate", "Hello", "-m", folder, *FAST, "--json").document["token_ids"] == expected


def test_a_tokenizer_of_another_model(refused: Refuse, folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["vocab"]["H"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(document))
    told = refused("generate", "Hello", "-m", folder, *FAST)
    assert "gives the token 5,000, and the model knows 257: they don't belong together" in told


def test_tokens_beyond_the_tokenizer_have_no_text(run: Run, model: Path, folder: Path) -> None:
    whole = run("generate", "Hello", "-m", model, *FAST, "-n", "40", "--json")
    tokens = whole.document["token_ids"]
    (last,) = sorted(set(tokens))[-1:]
    document = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    kept = {letter: number for letter, number in vocabulary.items() if number < last}
    document["model"]["vocab"], document["added_tokens"] = kept, []
    (folder / "tokenizer.json").write_text(json.dumps(document))
    edit("tokenizer_config.json", eos_token=None)(folder)
    result = run("generate", "Hello", "-m", folder, *FAST, "-n", "40", "--json")
    assert result.code == 0
    assert result.document["token_ids"] == tokens
    told = f"note: {tokens.count(last)} of the tokens are beyond the tokenizer's {last} and have no"
    assert told in result.err
    assert "beyond" not in whole.err


def test_a_long_text_for_the_tokenizer_is_no_news(run: Run, folder: Path) -> None:
    edit("tokenizer_config.json", model_max_length=2)(folder)
    assert run("generate", "Hello", "-m", folder, *FAST).err == ""
