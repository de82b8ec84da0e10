"""A model on several processes or devices: the same text, and no rank that decides for itself."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf

from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.errors import InputError
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.kernels.packed_linear import is_plain
from conflayers_cli.models.config_fingerprint import config_fingerprint
from conflayers_cli.models.device import (
    check_device_map,
    describe_spread,
    find_device,
    input_device,
)
from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.models.loader import load_model
from conflayers_cli.models.tensor_parallel import sharding
from conflayers_cli.search.corpus import Continuation
from conflayers_cli.search.strategies.knapsack_window import TokenWindow
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.proposer import SkipProposer
from conflayers_cli.utils.distributed import (
    RankOutput,
    World,
    broadcast_rank0,
    is_rank0,
    run_on_rank0,
    world,
)
from tests.cli.conftest import save_model
from tests.ranks import run_ranks
from tests.utils.parallel_worker import PROMPT, decoded, in_some_ways

# Sizes that as many ranks can share.
SHAPES: dict[int, dict[str, Any]] = {
    2: {"vocab_size": 258},
    3: {
        "vocab_size": 258,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
    },
}
TORCHRUN = {
    "WORLD_SIZE": "4",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of one of four processes."""
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("spread") / "two", **SHAPES[2])


@pytest.mark.parametrize("size", SHAPES)
def test_ranks_decode_what_one_process_does(size: int, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", **SHAPES[size])
    files = [tmp_path / f"{rank}.json" for rank in range(size)]

    ended = run_ranks(size, lambda rank: [model, files[rank]], module="tests.utils.parallel_worker")

    assert [(each.code, each.out) for each in ended] == [(0, "")] * size, ended
    found = [json.loads(file.read_text()) for file in files]
    assert found[1:] == found[:1] * (size - 1)
    loaded = load_model(str(model), LoadOptions(dtype="float32"))
    ours, alone = found[0], in_some_ways(loaded, Decoder(loaded.model))
    assert ours["spread"] == f"a part of every layer on each of {size} processes"
    assert alone["spread"] is None
    assert ours["greedy"] == alone["greedy"]
    assert len(set(ours["greedy"])) > 3  # nothing is shown by a text that repeats itself
    assert ours["drafted"] == ours["greedy"]
    if size == 2:
        assert ours["mixed"] == ours["adaptive"] == ours["batch"][0] == ours["greedy"]
        assert ours["batch"][1] != ours["greedy"]
    # The hidden states that confidence is measured on are whole, not a rank's part of a sum.
    assert ours["confidence"] == pytest.approx(alone["confidence"], abs=1e-5)
    assert ours["heads"] == [heads // size for heads in alone["heads"]]
    assert ours["number"] == 0.1 and ours["truth"] is True
    assert ours["object"] == {"rank": 0, "text": "×"}
    assert ours["tensor"] == [[0, 0]] * 3
    assert ours["first"] == "rank 0" and ours["refusal"] == "rank 0 can't"
    assert (tmp_path / "lines.jsonl").read_text() == '{"written by": 0}\n'
    assert (tmp_path / "lines.json").read_text() == "0\n"


def test_alone_everything_is_ones_own() -> None:
    tensor = torch.ones(2)

    assert world() == World() and is_rank0()
    assert broadcast_rank0(tensor) is tensor
    assert run_on_rank0(lambda: 3) == 3
    assert sharding(hf.LlamaConfig(), "tiny") == {}
    assert RankOutput().common_exit_code(2) == 2


def test_torchruns_environment(torchrun: pytest.MonkeyPatch) -> None:
    assert world() == World(size=4, rank=3, local_rank=1, local_size=2)
    assert not is_rank0()

    torchrun.delenv("LOCAL_WORLD_SIZE")
    assert world().local_size == 2
    torchrun.setenv("WORLD_SIZE", "1")
    assert world() == World()


@pytest.mark.parametrize(
    ("name", "value"), [("RANK", "4"), ("RANK", "one"), ("LOCAL_RANK", "2"), ("WORLD_SIZE", "")]
)
def test_an_environment_that_cant_be(torchrun: pytest.MonkeyPatch, name: str, value: str) -> None:
    torchrun.setenv(name, value)

    with pytest.raises(InputError, match=f"{name}={value}"):
        world()


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_ADDR"])
def test_a_part_of_the_environment_is_another_programs(
    torchrun: pytest.MonkeyPatch, missing: str
) -> None:
    torchrun.delenv(missing)

    assert world() == World()


def test_devices_under_torchrun(torchrun: pytest.MonkeyPatch) -> None:
    torchrun.setattr(torch.cuda, "is_available", lambda: True)

    assert find_device("auto") == find_device("cuda") == torch.device("cuda", 1)
    assert find_device("cuda:1") == torch.device("cuda", 1)
    for other in ("cpu", "cuda:0", "nonsense"):
        with pytest.raises(InputError, match="leave device out"):
            find_device(other)


def test_device_maps_that_cant_be(torchrun: pytest.MonkeyPatch) -> None:
    check_device_map(None, "cpu")
    with pytest.raises(InputError, match="use one of the two"):
        check_device_map("auto", "auto")
    torchrun.delenv("RANK")
    check_device_map("auto", "auto")
    with pytest.raises(InputError, match="give one"):
        check_device_map("auto", "cuda")
    with pytest.raises(InputError, match="the only map is auto"):
        check_device_map("balanced", "auto")


def _mapped(**places: Any) -> Any:
    return SimpleNamespace(device=torch.device("cpu"), hf_device_map=places)


def test_where_a_spread_model_takes_its_tokens() -> None:
    cpu = torch.device("cpu")

    assert input_device(SimpleNamespace(device=cpu)) == cpu
    assert input_device(_mapped(embed=0, layers=1)) == torch.device("cuda", 0)
    assert input_device(_mapped(embed="cpu", layers=1)) == torch.device("cuda", 1)
    assert input_device(_mapped(embed="cpu", layers="disk")) == cpu


def test_how_a_model_is_spread_in_words() -> None:
    assert describe_spread(SimpleNamespace()) is None
    assert describe_spread(_mapped(all=0)) is None
    assert describe_spread(_mapped(a=0, b=0, c=1, d="cpu")) == (
        "whole layers on cuda:0 (2), cuda:1 (1), cpu (1)"
    )
    assert describe_spread(_mapped(all="disk")) == "whole layers on disk (1)"


def _sharding(size: int, monkeypatch: pytest.MonkeyPatch, config: Any) -> dict[str, Any]:
    monkeypatch.setenv("WORLD_SIZE", str(size))
    return sharding(config, "tiny")


def test_heads_that_cant_be_shared(torchrun: pytest.MonkeyPatch) -> None:
    config = hf.LlamaConfig(hidden_size=96, num_attention_heads=12, num_key_value_heads=6)

    assert _sharding(6, torchrun, config)["distributed_config"].tp_plan == "auto"
    with pytest.raises(InputError, match=r"6 key/value heads.*: --nproc-per-node 2 or 3"):
        _sharding(4, torchrun, config)
    config.num_key_value_heads = 1
    with pytest.raises(InputError, match="use device_map auto"):
        _sharding(4, torchrun, config)


def test_a_model_without_a_plan(torchrun: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no tensor-parallel plan for opt"):
        _sharding(4, torchrun, hf.OPTConfig())


def test_a_sharded_models_profile_is_the_models(folder: Path) -> None:
    from transformers.distributed import DistributedConfig

    config = hf.AutoConfig.from_pretrained(folder)
    before = config_fingerprint(config)

    config.distributed_config = DistributedConfig(tp_plan="auto", tp_size=2)

    assert config_fingerprint(config) == before


def _on_disk_from(folder: Path, layer: int, offload: Path) -> Any:
    """The model with the layers from one on read from the disk whenever they run."""
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    places = dict.fromkeys(parts, "cpu")
    places |= {f"model.layers.{i}": "cpu" if i < layer else "disk" for i in range(5)}
    return hf.AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=offload, dtype=torch.float32
    ).eval()


def test_layers_on_the_disk_decode_the_same(folder: Path, tmp_path: Path) -> None:
    decoder = Decoder(_on_disk_from(folder, 3, tmp_path))
    plain = Decoder(load_model(str(folder), LoadOptions(dtype="float32")).model)
    expected = decoded(plain, None, count=8)

    assert describe_spread(decoder.model) == "whole layers on cpu (7), disk (2)"
    plan = SkipPlan.of(attention=[1, 3, 4], mlp=[2, 3])
    assert decoded(decoder, SkipProposer(decoder, plan, 4, 0.0), count=8) == expected


def test_a_window_over_layers_on_the_disk(folder: Path, tmp_path: Path) -> None:
    decoder = Decoder(_on_disk_from(folder, 2, tmp_path))
    generation = Generation(decoder, GenerationRequest(PROMPT, 8))
    list(generation)
    window = TokenWindow(decoder, [Continuation(tuple(PROMPT), tuple(generation.output))], 8)
    last: list[torch.Tensor] = []

    def run(i: int, hidden: torch.Tensor, layer: Any) -> torch.Tensor:
        last.append(layer(hidden))
        return last[-1]

    window.forward(run)

    assert torch.equal(window.choices(last[-1])[0], window.following)


def test_linear_layers_with_hooks_are_not_plain(folder: Path, tmp_path: Path) -> None:
    model = _on_disk_from(folder, 3, tmp_path)

    assert not any(is_plain(module) for module in model.model.layers.modules())


def test_a_device_map_where_there_is_one_device(folder: Path) -> None:
    loaded = load_model(str(folder), LoadOptions(dtype="float32", device_map="auto"))

    assert loaded.device == torch.device("cpu") and loaded.spread is None
    plain = load_model(str(folder), LoadOptions(dtype="float32"))
    assert decoded(Decoder(loaded.model), None) == decoded(Decoder(plain.model), None)
