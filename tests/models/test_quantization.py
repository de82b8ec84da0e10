"""Models with quantised weights: loading, refusals, and the same text with and without drafts.

What is not shown here: GPTQ and AWQ checkpoints, whose packages need CUDA to be built. Layers made
like theirs stand in for them.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from torch import nn

from conflayers_cli.cli.main import main
from conflayers_cli.engine import batch_invariance, cost_measurement
from conflayers_cli.engine.batch_invariance import rows_mix
from conflayers_cli.engine.cost_cache import make_model_key
from conflayers_cli.engine.cost_measurement import measure_costs
from conflayers_cli.engine.cost_model import CostTable
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.errors import InputError
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.kernels.packed_linear import Packing, is_plain
from conflayers_cli.models import quantization
from conflayers_cli.models.config_fingerprint import config_fingerprint
from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.models.loaded_model import LoadedModel
from conflayers_cli.models.loader import load_model
from conflayers_cli.models.quantization import quantization_method
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.mixed import MixedProposer
from conflayers_cli.spec_decode.proposer import SkipProposer
from conflayers_cli.spec_decode.tree import PAPER_SHAPE
from tests import tiny
from tests.cli.conftest import byte_tokenizer, quick_search, save_profile, write_prompts
from tests.spec_decode.test_mixed import costs as mixed_costs

VOCABULARY = 257
# Sizes that every method takes: 4-bit weights come in groups of 32 to 128 inputs.
SIZES = {
    **tiny.LLAMA_LIKE,
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 1024,
}
PLAN = SkipPlan.of_layers([2])
DTYPES = ("float32", "bfloat16")


def save(folder: Path, **more: Any) -> Path:
    """A random Llama with a tokenizer of bytes."""
    tiny.build(hf.LlamaConfig(**{**SIZES, **more}), gain=0.5).save_pretrained(folder)
    byte_tokenizer(None).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("quantised") / "plain")


@pytest.fixture(autouse=True)
def even_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits cost nothing here: what they really cost is noise on models as small as these."""
    ticks = itertools.count()
    monkeypatch.setattr(batch_invariance, "device_clock", lambda device: float(next(ticks)))


Load = Callable[[str, str], LoadedModel]


@pytest.fixture(scope="session")
def load(plain: Path) -> Load:
    """The plain model quantised while it is loaded, once for each way."""
    pytest.importorskip("torchao")

    def read(bits: str, dtype: str) -> LoadedModel:
        return load_model(str(plain), LoadOptions(device="cpu", dtype=dtype, quantize=bits))

    return functools.cache(read)


def greedy(decoder: Decoder, prompt: list[int], proposer: Any = None) -> tuple[list[int], int]:
    """A text, and how many of its tokens were drafted."""
    generation = Generation(decoder, GenerationRequest(prompt, 32), proposer=proposer)
    steps = tiny.steps_of(generation)
    return generation.output, sum(step.accepted for step in steps)


def assert_drafts_change_nothing(decoder: Decoder) -> None:
    """Chains, trees and n-grams, from prompts of several lengths; some of their tokens stand."""
    accepted = 0
    for seed in range(2):
        prompt = tiny.prompt(6 + 29 * seed, seed, VOCABULARY) * 2
        expected, _ = greedy(decoder, prompt)
        assert len(set(expected)) > 5
        for proposer in (
            SkipProposer(decoder, PLAN, 5, 0.0),
            SkipProposer(decoder, PLAN, 3, 0.0, PAPER_SHAPE),
            MixedProposer(decoder, None, mixed_costs()),
        ):
            text, stood = greedy(decoder, prompt, proposer)
            assert text == expected
            accepted += stood
    assert accepted > 20


def linears(model: Any) -> list[Any]:
    """The linear layers inside the decoder layers."""
    return [
        module
        for layer in model.model.layers
        for name, module in layer.named_modules()
        if name.endswith("_proj")
    ]


def test_weights_are_quantised_as_they_are_loaded(load: Load, plain: Path) -> None:
    whole = load_model(str(plain), LoadOptions(device="cpu", dtype="bfloat16"))
    for bits, share in (("int8", 0.55), ("int4", 0.35)):
        loaded = load(bits, "bfloat16")
        model: Any = loaded.model
        assert loaded.dtype == model.dtype == torch.bfloat16
        assert "torchao" in loaded.dtype_reason
        layers = linears(model)
        assert len(layers) == 7 * tiny.DEPTH
        assert not any(is_plain(layer) for layer in layers)
        stored = sum(_bytes(layer.weight) for layer in layers)
        assert stored < share * sum(layer.weight.nbytes for layer in linears(whole.model))
        assert is_plain(model.lm_head)
        assert type(model.model.embed_tokens.weight) is nn.Parameter
        # What it computes is the plain model's, but for the rounding of its weights.
        ids = torch.tensor([tiny.prompt(40, 0, VOCABULARY)])
        got, expected = (m(ids).logits.float() for m in (model, whole.model))
        error = (got - expected).pow(2).mean().sqrt() / expected.std()
        assert 1e-4 < error < (0.05 if bits == "int8" else 0.5)


def _bytes(weight: Any) -> int:
    """Bytes of the plain tensors that a quantised one is made of."""
    names, _ = weight.__tensor_flatten__()
    return sum(getattr(weight, name).nbytes for name in names)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", quantization.BITS)
def test_drafts_change_nothing(load: Load, bits: str, dtype: str) -> None:
    decoder = Decoder(load(bits, dtype).model)
    assert decoder.exactness_note is None
    assert decoder.invariance.bitwise == (dtype == "bfloat16")
    assert_drafts_change_nothing(decoder)
    if dtype == "float32":
        prompt = tiny.prompt(11, 5, VOCABULARY)
        assert greedy(decoder, prompt)[0] == tiny.generated(decoder, prompt, 32)


def test_quantised_layers_are_neither_packed_nor_joined(load: Load) -> None:
    model = load("int8", "float32").model
    before = [layer.weight for layer in linears(model)]
    Decoder(model)
    assert Packing.existing(model) is None
    assert all(a.weight is b for a, b in zip(linears(model), before, strict=True))


def test_a_profile_fits_the_model_however_it_is_quantised(load: Load, plain: Path) -> None:
    expected = config_fingerprint(hf.AutoConfig.from_pretrained(plain))
    assert config_fingerprint(load("int8", "float32").model.config) == expected
    for method in ("gptq", "awq", "bitsandbytes", "compressed-tensors"):
        config = hf.AutoConfig.from_pretrained(plain)
        config.quantization_config = {"quant_method": method, "bits": 4, "group_size": 128}
        config.dtype = "float16"
        assert config_fingerprint(config) == expected


def test_costs_of_a_model_are_its_own_however_it_is_quantised(load: Load, plain: Path) -> None:
    """torchao's weights are in ordinary linear layers: modules alone don't tell them from plain."""
    models = [load_model(str(plain), LoadOptions(device="cpu", dtype="bfloat16")).model]
    models += [load(bits, "bfloat16").model for bits in quantization.BITS]
    assert len(set(map(make_model_key, models))) == 3
    again = load_model(str(plain), LoadOptions(device="cpu", dtype="bfloat16", quantize="int8"))
    assert make_model_key(again.model) == make_model_key(models[1])


def test_a_checkpoint_of_torchao_is_safetensors_and_loads_as_it_is(
    load: Load, tmp_path: Path
) -> None:
    made = load("int8", "bfloat16")
    folder = tmp_path / "saved"
    made.model.save_pretrained(folder)
    byte_tokenizer(None).save_pretrained(folder)
    assert not list(folder.glob("*.bin"))
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert any(name.endswith("_qdata") for name in file.keys())  # noqa: SIM118
    read = load_model(str(folder), LoadOptions(device="cpu", dtype="bfloat16"))
    assert quantization_method(read.model.config) == "torchao"
    assert "torchao" in read.dtype_reason
    ids = torch.tensor([tiny.prompt(9, 1, VOCABULARY)])
    decoder, other = Decoder(read.model), Decoder(made.model)
    assert greedy(decoder, ids[0].tolist()) == greedy(other, ids[0].tolist())
    with pytest.raises(InputError, match="torchao already"):
        load_model(str(folder), LoadOptions(device="cpu", quantize="int8"))


def test_loading_a_quantised_model_is_silent(
    load: Load, plain: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    load_model(str(plain), LoadOptions(device="cpu", dtype="bfloat16", quantize="int8"))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitsandbytes_checkpoints(
    plain: Path, tmp_path: Path, bits: int, dtype: str, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes")
    methods: dict[int, dict[str, Any]] = {
        4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        8: {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    }
    model: Any = hf.AutoModelForCausalLM.from_pretrained(
        plain,
        dtype=getattr(torch, dtype),
        quantization_config=hf.BitsAndBytesConfig(**methods[bits]),
        device_map={"": "cpu"},
    )
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    byte_tokenizer(None).save_pretrained(folder)
    capfd.readouterr()
    loaded = load_model(str(folder), LoadOptions(device="cpu", dtype=dtype))
    assert "bitsandbytes" in loaded.dtype_reason
    assert not any(map(is_plain, linears(loaded.model)))
    assert not rows_mix(loaded.model)
    decoder = Decoder(loaded.model)
    if decoder.exactness_note is None:
        assert decoder.invariance.bitwise
        assert_drafts_change_nothing(decoder)
    else:
        assert decoder.exactness_note.startswith("not exact to the bit")
        assert greedy(decoder, [1, 2, 3], SkipProposer(decoder, PLAN, 4, 0.0))[1] > 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("dtype", DTYPES)
def test_llm_int8_as_it_is_by_default_is_decoded_with_and_told(plain: Path, dtype: str) -> None:
    """In float32, too, where rounded inputs move logits by more than other kernels do."""
    pytest.importorskip("bitsandbytes")
    model: Any = hf.AutoModelForCausalLM.from_pretrained(
        plain,
        dtype=getattr(torch, dtype),
        quantization_config=hf.BitsAndBytesConfig(load_in_8bit=True),
        device_map={"": "cpu"},
    )
    decoder = Decoder(model)
    assert decoder.exactness_note is not None and "llm_int8_threshold" in decoder.exactness_note
    assert decoder.sub_layers == {"attention", "mlp"}
    assert greedy(decoder, [1, 2, 3], SkipProposer(decoder, PLAN, 4, 0.0))[1] > 0


def test_outliers_of_one_row_change_others_in_llm_int8(plain: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False, threshold=6.0)
    layer = layer.eval().to("cpu")
    row, other = torch.randn(1, 64, dtype=torch.float16), torch.randn(1, 64, dtype=torch.float16)
    with torch.inference_mode():
        beside = layer(torch.cat([row, other]))[0]
        other[0, 3] = 50.0
        changed = layer(torch.cat([row, other]))[0]
    assert not torch.equal(beside, changed)
    assert rows_mix(nn.Sequential(layer))
    layer.state.threshold = 0.0
    assert not rows_mix(nn.Sequential(layer))


class Grouped(nn.Module):
    """A linear layer as the packages for GPTQ and AWQ make it: integers and scales, no weight."""

    def __init__(self, linear: nn.Linear, group: int = 32) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float().view(self.out_features, -1, group)
        scales = weight.abs().amax(-1, keepdim=True) / 7
        self.register_buffer("qweight", (weight / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        qweight, scales = self.get_buffer("qweight"), self.get_buffer("scales")
        weight = (qweight * scales).flatten(1).to(rows.dtype)
        return nn.functional.linear(rows, weight)


def replaced(model: Any, make: Callable[[nn.Linear], nn.Module]) -> Any:
    """The model with something else in place of its layers' linear modules."""
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    parent._modules[name] = make(child)
    return model


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_without_a_weight_are_decoded_with_as_they_are(dtype: str) -> None:
    model = tiny.build(hf.LlamaConfig(**SIZES), dtype=getattr(torch, dtype), gain=0.5)
    decoder = Decoder(replaced(model, Grouped))
    assert Packing.existing(model) is None
    assert all(isinstance(layer, Grouped) for layer in linears(model))
    assert_drafts_change_nothing(decoder)


def wrapped(linear: nn.Linear) -> nn.Linear:
    """As compressed-tensors and accelerate do it: an ordinary layer with a forward of its own."""
    own = linear.forward
    vars(linear)["forward"] = lambda rows: own(rows.clamp(-1.5, 1.5))
    return linear


def hooked(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_hook(lambda module, args, output: output * 2)
    return linear


def hooked_before(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_pre_hook(lambda module, args: (args[0].clamp(-1.5, 1.5),))
    return linear


@pytest.mark.parametrize("change", [wrapped, hooked, hooked_before])
def test_layers_that_compute_more_than_their_weight_says_are_not_plain(
    change: Callable[[nn.Linear], nn.Linear],
) -> None:
    assert is_plain(nn.Linear(4, 4))
    assert not is_plain(change(nn.Linear(4, 4)))
    model = replaced(tiny.build(hf.LlamaConfig(**SIZES), gain=0.5), change)
    ids = torch.tensor([tiny.prompt(20, 0, VOCABULARY)])
    expected = model(ids).logits
    decoder = Decoder(model)
    assert Packing.existing(model) is None
    positions = torch.arange(20)[None]
    logits = decoder.forward(ids, positions, decoder.new_cache(20))
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


class Ticks:
    """A clock that runs by what linear layers say they take."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self, device: torch.device) -> float:
        return self.now


class ForOneRow(nn.Linear):
    """A kernel made for one row, as quantised ones are: more rows at once take ``wide`` times."""

    def __init__(self, linear: nn.Linear, ticks: Ticks, wide: float) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight
        self.ticks, self.wide = ticks, wide

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = input.numel() // self.in_features
        self.ticks.now += 1.0 if rows == 1 else self.wide
        return super().forward(input)


def drafted(monkeypatch: pytest.MonkeyPatch, wide: float) -> tuple[int, list[int], float]:
    """Tokens drafted, the text, and what a pass of two rows costs in passes of one."""
    model = tiny.build(hf.LlamaConfig(**tiny.LLAMA_LIKE), gain=0.5)
    model.lm_head.weight.data *= 10  # sure of what it says
    skipped = (1, 2, 3)
    for i in skipped:  # next to nothing, so that drafts without them are right
        model.model.layers[i].self_attn.o_proj.weight.data *= 1e-3
        model.model.layers[i].mlp.down_proj.weight.data *= 1e-3
    ticks = Ticks()
    decoder = Decoder(replaced(model, lambda linear: ForOneRow(linear, ticks, wide)))
    monkeypatch.setattr(cost_measurement, "clock", ticks)
    costs = measure_costs(decoder, context=32, rounds=2)
    table = CostTable({1: costs}, decoder.depth)
    plan = SkipPlan.of_layers(skipped)
    proposer = MixedProposer(decoder, plan, table, ngram=False, prior=0.95)
    generation = Generation(decoder, GenerationRequest(tiny.prompt(9), 60), proposer=proposer)
    steps = tiny.steps_of(generation)
    ratio = costs.verify_cost(2) / costs.verify_cost(1)
    return sum(step.drafted for step in steps), generation.output, ratio


def test_where_wider_passes_cost_more_less_is_drafted(monkeypatch: pytest.MonkeyPatch) -> None:
    """From measured costs to drafts: the draft length policy knows nothing of kernels."""
    many, text, ratio = drafted(monkeypatch, 1.0)
    assert ratio == pytest.approx(1.0)
    few, same, ratio = drafted(monkeypatch, 9.0)
    assert ratio == pytest.approx(9.0)
    assert text == same
    assert many > 30
    assert few <= 2  # what it takes to find out whether it pays now


def refusal(source: str, **options: Any) -> str:
    """The error's text, which must be one line."""
    with pytest.raises(InputError) as caught:
        load_model(source, LoadOptions(**options))
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("entry", "packages"),
    [
        ({"quant_method": "gptq", "bits": 4}, "optimum gptqmodel"),
        ({"quant_method": "awq", "bits": 4}, "gptqmodel"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "torchao"}, "torchao"),
    ],
)
def test_missing_packages_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: dict[str, Any], packages: str
) -> None:
    folder = save(tmp_path / "model")
    edit_config(folder, quantization_config=entry)
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    message = refusal(str(folder), device="cpu", dtype="float32")
    assert message.startswith(f"{folder} is quantised with {entry.get('quant_method', 'bitsa')}")
    assert message.endswith(f": pip install {packages}")


def test_the_flag_needs_torchao(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    message = refusal(str(plain), device="cpu", dtype="float32", quantize="int8")
    assert message == "quantize needs torchao: pip install torchao"


def test_flags_that_fit_nothing_are_refused(plain: Path, tmp_path: Path) -> None:
    assert "int8 or int4" in refusal(str(plain), quantize="int2")
    folder = save(tmp_path / "quantised")
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    message = refusal(str(folder), device="cpu", dtype="float32", quantize="int4")
    assert message.endswith("is quantised with gptq already: leave quantize out")
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    assert "GGUF" in refusal(str(tmp_path / "some.gguf"), quantize="int8")


def test_sizes_that_int4_does_not_take(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    folder = save(tmp_path / "odd", hidden_size=72)
    message = refusal(str(folder), device="cpu", dtype="float32", quantize="int4")
    assert "multiple of 32" in message
    assert "72" in message


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [("cuda", torch.float32, "bfloat16"), ("mps", torch.float16, "not on mps")],
)
def test_devices_that_int4_does_not_take(device: str, dtype: torch.dtype, reason: str) -> None:
    pytest.importorskip("torchao")
    with pytest.raises(InputError, match=reason):
        quantization.torchao_config("int4", torch.device(device), dtype, [128])


@pytest.mark.parametrize(
    ("sizes", "group"), [([4096, 14336], 128), ([576, 1536], 64), ([128, 96], 32)]
)
def test_int4_groups_are_as_large_as_the_sizes_allow(sizes: list[int], group: int) -> None:
    pytest.importorskip("torchao")
    for device in ("cpu", "cuda"):
        made = quantization.torchao_config("int4", torch.device(device), torch.bfloat16, sizes)
        assert made.quant_type.group_size == group


def test_what_could_run_code_stays_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    edit_config(
        folder,
        quantization_config={"quant_method": "gptq", "bits": 4},
        auto_map={"AutoModelForCausalLM": "modeling.Mine"},
    )
    assert "auto_map" in refusal(str(folder), device="cpu", dtype="float32")
    edit_config(folder, auto_map=None)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickle" in refusal(str(folder), device="cpu", dtype="float32")


FAST = ("--quantize", "int8", "--device", "cpu", "--dtype", "bfloat16")


@pytest.mark.usefixtures("without_native")
def test_commands_take_the_flag(
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("torchao")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONFLAYERS_CACHE", str(tmp_path / "cache"))
    prompts = write_prompts(tmp_path / "prompts.jsonl", *(f"Tell me about {i}." for i in range(4)))

    def run(*arguments: object) -> tuple[str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out, captured.err

    # A profile of the plain model goes with the quantised one, without a word.
    profile = save_profile(tmp_path / "p.yaml", plain, PLAN)
    vanilla, _ = run("generate", "Hello", "-m", plain, "-n", 12, *FAST, "--json")
    speculative, told = run("generate", "Hello", "-p", profile, "-n", 12, *FAST, "--json")
    assert "warning" not in told
    assert json.loads(vanilla)["token_ids"] == json.loads(speculative)["token_ids"]
    _, told = run("generate", "Hello", "-p", profile, "-n", 4, *FAST, "--stats")
    assert "weights quantised with torchao" in told
    quick = quick_search(2, 12, 4)
    run("calibrate", "-m", plain, "--data", prompts, "-o", "found.yaml", *quick, *FAST)
    out, _ = run(
        *("bench", "-p", profile, "--data", prompts, "-n", 6, "--runs", 1, *FAST, "--json")
    )
    assert json.loads(out)["identical_outputs"]["matching"] == 4
