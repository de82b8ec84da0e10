"""Adapters of PEFT: found, put into their bases, refused; and decoded with as the adapted model."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from conflayers_cli.api.attached_model import attach, release
from conflayers_cli.api.hf_generate import conflayers_generate
from conflayers_cli.engine.cost_cache import make_model_key
from conflayers_cli.engine.decoder import Decoder
from conflayers_cli.errors import InputError
from conflayers_cli.generation.loop import Generation
from conflayers_cli.generation.request import GenerationRequest
from conflayers_cli.kernels.packed_linear import MergedLinearPart
from conflayers_cli.models import peft_loading
from conflayers_cli.models.config_fingerprint import config_fingerprint
from conflayers_cli.models.load_options import LoadOptions
from conflayers_cli.models.loader import load_model
from conflayers_cli.models.peft_modules import adapter_key
from conflayers_cli.models.weight_sketch import sketch_weights
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.mixed import MixedProposer
from conflayers_cli.spec_decode.proposer import SkipProposer
from conflayers_cli.spec_decode.tree import PAPER_SHAPE
from tests import tiny
from tests.cli.conftest import byte_tokenizer, save_model
from tests.spec_decode.test_mixed import costs as mixed_costs

peft = pytest.importorskip("peft")

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
SOME = ["q_proj", "v_proj", "down_proj"]
PLANS = (SkipPlan.of_layers([2]), SkipPlan(attention=(1,), mlp=(3,)))
VOCABULARY = 257
SIZES = {**tiny.LLAMA_LIKE, "vocab_size": VOCABULARY, "max_position_embeddings": 1024}


def lora(**more: Any) -> Any:
    return peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": SOME, "init_lora_weights": False, **more}
    )


KINDS: dict[str, Callable[[], Any]] = {
    "lora-attention": functools.partial(lora, target_modules=ATTENTION),
    "lora-mlp": functools.partial(lora, target_modules=MLP),
    "lora-all": functools.partial(lora, target_modules=[*ATTENTION, *MLP]),
    "lora-some": lora,
    "lora-head": functools.partial(lora, target_modules=[*SOME, "lm_head"]),
    "lora-head-whole": functools.partial(lora, modules_to_save=["lm_head"]),
    "lora-two-layers": functools.partial(lora, layers_to_transform=[1, 4]),
    "lora-tokens": functools.partial(lora, trainable_token_indices=[1, 2, 3]),
    "rslora": functools.partial(lora, use_rslora=True, rank_pattern={"v_proj": 2}),
    "dora": functools.partial(lora, use_dora=True),
    "adalora": lambda: peft.AdaLoraConfig(total_step=10, init_r=4, target_modules=SOME),
    "ia3": lambda: peft.IA3Config(target_modules=SOME, feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=SOME, init_weights=False),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=SOME, init_weights=False),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"], init_weights=False),
    "oft": lambda: peft.OFTConfig(
        r=0, oft_block_size=4, target_modules=["q_proj", "v_proj"], init_weights=False
    ),
}

STRENGTHS = {"adalora": 0.3, "ia3": 0.2}
"""How far weights are drawn from those that an adapter begins with."""


def base(dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    return tiny.build(hf.LlamaConfig(**{**SIZES, **more}), dtype=dtype, gain=0.5)


def adapted(kind: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A `PeftModel` whose adapter matters, in the model's dtype unless told otherwise."""
    torch.manual_seed(0)
    options = {"autocast_adapter_dtype": False, **more}
    model = peft.get_peft_model(base(dtype), KINDS[kind](), **options).eval()
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:  # several kinds begin with an adapter that does nothing
            drawn = torch.randn(weight.shape, generator=generator)
            weight.data += STRENGTHS.get(kind, 0.05) * drawn
    return model


def greedy(decoder: Decoder, prompt: list[int], proposer: Any = None) -> tuple[list[int], int]:
    """A text, and how many of its tokens were drafted."""
    generation = Generation(decoder, GenerationRequest(prompt, 24), proposer=proposer)
    steps = tiny.steps_of(generation)
    return generation.output, sum(step.accepted for step in steps)


def assert_drafts_change_nothing(decoder: Decoder) -> None:
    """Chains, trees and n-grams, without whole layers and sub-layers; some of them stand."""
    accepted, seen = 0, set()
    for seed in range(2):
        prompt = tiny.prompt(6 + 29 * seed, seed, VOCABULARY) * 2
        expected, _ = greedy(decoder, prompt)
        seen.update(expected)
        for proposer in (
            *(SkipProposer(decoder, plan, 5, 0.0) for plan in PLANS),
            SkipProposer(decoder, PLANS[0], 3, 0.0, PAPER_SHAPE),
            MixedProposer(decoder, None, mixed_costs()),
        ):
            text, stood = greedy(decoder, prompt, proposer)
            assert text == expected
            accepted += stood
    assert accepted > 20
    assert len(seen) > 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_drafts_change_nothing(kind: str, dtype: torch.dtype) -> None:
    model = adapted(kind, dtype)
    ids = torch.tensor([tiny.prompt(40, 3, VOCABULARY)])
    with torch.inference_mode():
        expected = model(ids).logits
        with model.disable_adapter():
            without = model(ids).logits
    assert (expected - without).abs().max() > 0.1  # the adapter matters
    decoder = Decoder(model)
    assert decoder.exactness_note is None
    assert decoder.sub_layers == {"attention", "mlp"}
    logits = decoder.forward(ids, torch.arange(40)[None], decoder.new_cache(40))
    close = 1e-4 if dtype == torch.float32 else 0.1
    assert (logits - expected).abs().mean() < close * expected.std()
    assert_drafts_change_nothing(decoder)
    if dtype == torch.float32:
        prompt = tiny.prompt(11, 5, VOCABULARY)
        assert greedy(decoder, prompt)[0] == tiny.generated(decoder, prompt, 24)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gpt-neox", "gpt2", "phi3", "olmo2"])
def test_other_families_with_an_adapter(family: str) -> None:
    torch.manual_seed(0)
    config = lora(target_modules="all-linear", fan_in_fan_out=family == "gpt2")
    model = peft.get_peft_model(tiny.build(tiny.CONFIGS[family]()), config).eval()
    ids = torch.tensor([tiny.prompt(40, 3)])
    expected = model(ids).logits
    decoder = Decoder(model)
    assert decoder.sub_layers == {"attention", "mlp"}
    logits = decoder.forward(ids, torch.arange(40)[None], decoder.new_cache(40))
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    prompt = tiny.prompt(20)
    text = greedy(decoder, prompt)[0]
    for plan in PLANS:
        assert greedy(decoder, prompt, SkipProposer(decoder, plan, 5, 0.0))[0] == text
    assert text == tiny.generated(decoder, prompt, 24)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_experts_with_an_adapter(dtype: torch.dtype) -> None:
    """Weights that are no module's of their own: PEFT adds to them while the experts run."""
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = lora(target_modules=["q_proj"], target_parameters=experts)
    torch.manual_seed(0)
    whole = tiny.build(tiny.CONFIGS["mixtral"](), dtype=dtype)
    model = peft.get_peft_model(whole, config, autocast_adapter_dtype=False).eval()
    ids = torch.tensor([tiny.prompt(40, 3)])
    with torch.inference_mode():
        expected = model(ids).logits
    decoder = Decoder(model)
    logits = decoder.forward(ids, torch.arange(40)[None], decoder.new_cache(40))
    close = 1e-4 if dtype == torch.float32 else 0.1
    assert (logits - expected).abs().mean() < close * expected.std()
    prompt = tiny.prompt(20)
    text = greedy(decoder, prompt)[0]
    for plan in PLANS:
        assert greedy(decoder, prompt, SkipProposer(decoder, plan, 5, 0.0))[0] == text


def test_what_an_adapter_only_calls_is_packed() -> None:
    decoder = Decoder(adapted("lora-some"))
    if not decoder.packed:
        pytest.skip("no packing on this machine")
    attention: Any = decoder.stack.layers[1].get_submodule("self_attn")
    assert isinstance(attention.q_proj.base_layer, MergedLinearPart)
    assert isinstance(attention.k_proj, MergedLinearPart)
    assert type(attention.q_proj.lora_A.default) is torch.nn.Linear
    with decoder.plain() as model:  # and it can be merged when the weights are its own again
        assert type(model.model.layers[1].self_attn.q_proj.base_layer) is torch.nn.Linear


def test_what_an_adapter_computes_with_is_left_alone() -> None:
    model = adapted("dora")
    before = [m.base_layer.weight for m in model.modules() if hasattr(m, "base_layer")]
    decoder = Decoder(model)
    after = [m.base_layer.weight for m in decoder.model.modules() if hasattr(m, "base_layer")]
    assert len(before) == 3 * tiny.DEPTH
    assert all(one is other for one, other in zip(before, after, strict=True))


def test_a_norm_that_is_wrapped_is_not_read_past_its_adapter() -> None:
    config = lora(modules_to_save=["norm"])
    model = peft.get_peft_model(base(), config).eval()
    decoder = Decoder(model)
    assert decoder.passes.fused is None
    assert any("adapter around it" in disabled for disabled in decoder.disabled_paths)


def test_an_adapter_in_another_dtype_is_told() -> None:
    """In float32 beside bfloat16 its kernels need four rows to keep a row's bits."""
    decoder = Decoder(adapted("lora-all", torch.bfloat16, autocast_adapter_dtype=True))
    if decoder.exactness_note is None:
        assert decoder.invariance.bitwise
        assert_drafts_change_nothing(decoder)
    else:
        assert "adapter's float32 kernels" in decoder.exactness_note
        assert decoder.inexact


@pytest.mark.parametrize("named", [True, False])
def test_generate_of_a_peft_model_takes_the_engine(named: bool) -> None:
    model = adapted("lora-all")
    ids = torch.tensor([tiny.prompt(9, 2, VOCABULARY)])
    how: dict[str, Any] = {
        **{"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        **{"max_new_tokens": 24, "do_sample": False},
    }
    expected = model.generate(**how)
    caller = model if named else model.get_base_model()
    found = caller.generate(**how, custom_generate=conflayers_generate, draft="ngram")
    assert found.tolist() == expected.tolist()
    assert model.generate(**how).tolist() == expected.tolist()  # as it was before


def test_a_peft_model_is_borrowed_and_given_back() -> None:
    model = adapted("lora-some")
    attached = attach(model)
    assert attach(model.get_base_model()) is attached
    with attached.active() as decoder:
        before = greedy(decoder, [1, 2, 3])[0]
    model.merge_adapter()
    assert attach(model) is not attached
    with attach(model).active() as decoder:
        assert greedy(decoder, [1, 2, 3])[0] == before
    release(model)


def several() -> Any:
    model = peft.get_peft_model(base(), lora())
    model.add_adapter("second", lora())
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "several": (several, "2 adapters \\(default, second\\)"),
    "prompt-tuning": (
        lambda: peft.get_peft_model(
            base(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        ),
        "virtual tokens",
    ),
    "activated": (
        lambda: peft.get_peft_model(
            base(), lora(task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6])
        ),
        "alora_invocation_tokens: it begins to act at a place in the text",
    ),
    "norms": (lambda: peft.get_peft_model(base(), peft.LNTuningConfig()), "LN_TUNING"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_adapters_that_cannot_be_decoded_with_are_refused(what: str) -> None:
    make, reason = REFUSED[what]
    model = make().eval()
    with pytest.raises(InputError, match=reason) as caught:
        Decoder(model)
    assert "\n" not in str(caught.value)


def test_a_sketch_is_of_the_weights_with_what_is_added_to_them() -> None:
    plain = sketch_weights(base())
    model = adapted("lora-some")
    beside = sketch_weights(model.get_base_model())
    with model.disable_adapter():
        assert sketch_weights(model.get_base_model()) == plain
    merged = sketch_weights(model.merge_and_unload())
    assert plain is not None and beside is not None and merged is not None
    apart = [
        torch.dist(torch.tensor(one.projections), torch.tensor(merged.projections)).item()
        for one in (plain, beside)
    ]
    assert apart[1] < 1e-3 < 0.02 < apart[0]
    assert sketch_weights(adapted("ia3").get_base_model()) is None


def test_costs_of_a_model_are_its_own_with_an_adapter() -> None:
    models = [base(), adapted("lora-some").get_base_model()]
    models.append(peft.get_peft_model(base(), lora(r=8)).get_base_model())
    models.append(adapted("lora-all").get_base_model())
    assert len(set(map(make_model_key, models))) == 4
    assert adapter_key(models[0]) is None


# --- from disk


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a base with a tokenizer, a LoRA of it that matters)."""
    root = tmp_path_factory.mktemp("adapters")
    folder = save_model(root / "base")
    return folder, save_adapter(root / "adapter", folder)


def save_adapter(
    target: Path, base_folder: Path, config: Any = None, draw: float = 0.05, **load: Any
) -> Path:
    """A random adapter of a saved model, as `save_pretrained` writes it."""
    model: Any = hf.AutoModelForCausalLM.from_pretrained(base_folder, **load)
    torch.manual_seed(2)
    wrapped = peft.get_peft_model(model, config or lora())
    for _, weight in wrapped.named_parameters():
        if weight.requires_grad:
            weight.data += draw * torch.randn_like(weight)
    wrapped.save_pretrained(target)
    return target


def copied(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of an adapter with other settings; None drops one."""
    shutil.copytree(folder, target)
    path = target / peft_loading.CONFIG
    settings = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    return target


def expected_logits(adapter: Path, base_folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = hf.AutoModelForCausalLM.from_pretrained(base_folder)
    with torch.inference_mode():
        logits: torch.Tensor = peft.PeftModel.from_pretrained(model, adapter)(ids).logits
    return logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("merge", [True, False])
def test_an_adapter_is_loaded_with_its_base(
    kind: str, merge: bool, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = save_adapter(tmp_path / "adapter", folders[0], KINDS[kind]())
    ids = torch.tensor([tiny.prompt(30, 3, VOCABULARY)])
    loaded = load_model(
        str(folder), LoadOptions(device="cpu", dtype="float32", merge_adapter=merge)
    )
    assert loaded.name == str(folder)
    assert ("merged into" if merge else "beside the") in loaded.dtype_reason
    assert any("lora" in type(m).__module__ for m in loaded.model.modules()) <= (not merge)
    with torch.inference_mode():
        logits = loaded.model(ids).logits
    torch.testing.assert_close(
        logits, expected_logits(folder, folders[0], ids), rtol=1e-3, atol=1e-3
    )
    assert config_fingerprint(loaded.model.config) == config_fingerprint(
        hf.AutoConfig.from_pretrained(folders[0])
    )


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_that_added_tokens(tmp_path: Path, tied: bool, merge: bool) -> None:
    """As somebody trains it: the base's embeddings were resized, and are saved with the adapter."""
    plain = tiny.build(hf.LlamaConfig(**{**tiny.LLAMA_LIKE, "tie_word_embeddings": tied}))
    plain.save_pretrained(tmp_path / "base")
    byte_tokenizer(None).save_pretrained(tmp_path / "base")
    plain.resize_token_embeddings(tiny.VOCABULARY + 3, mean_resizing=False)
    whole = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    model = peft.get_peft_model(plain, lora(modules_to_save=whole))
    for name, weight in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(settings))
    loaded = load_model(str(tmp_path / "adapter"), LoadOptions(merge_adapter=merge))
    ids = torch.tensor([[5, tiny.VOCABULARY + 1, 7, tiny.VOCABULARY + 2]])
    with torch.inference_mode():
        found, expected = loaded.model(ids).logits, model.eval()(ids).logits
    assert found.shape[-1] == tiny.VOCABULARY + 3
    if tied:  # the file has the inputs' new rows, and not the outputs'
        found, expected = (each[..., : tiny.VOCABULARY] for each in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_adapters_are_merged_unless_told_otherwise(folders: tuple[Path, Path]) -> None:
    loaded = load_model(str(folders[1]), LoadOptions(device="cpu", dtype="bfloat16"))
    assert "merged into the weights" in loaded.dtype_reason
    assert adapter_key(loaded.model) is None
    assert not any(weight.requires_grad for weight in loaded.model.parameters())
    assert loaded.sketch is not None


def test_weights_beside_are_in_the_model_s_dtype(folders: tuple[Path, Path]) -> None:
    loaded = load_model(
        str(folders[1]), LoadOptions(device="cpu", dtype="bfloat16", merge_adapter=False)
    )
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.bfloat16}
    decoder = Decoder(loaded.model)
    assert decoder.exactness_note is None
    assert_drafts_change_nothing(decoder)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_embeddings_that_share_a_weight_are_adapted_apart(
    target: str, merge: bool, tmp_path: Path
) -> None:
    whole = save_model(tmp_path / "base", tie_word_embeddings=True)
    config = lora(target_modules=[*SOME, target])
    folder = save_adapter(tmp_path / "adapter", whole, config)
    ids = torch.tensor([tiny.prompt(30, 3, VOCABULARY)])
    loaded = load_model(
        str(folder), LoadOptions(device="cpu", dtype="float32", merge_adapter=merge)
    )
    with torch.inference_mode():
        logits = loaded.model(ids).logits
    torch.testing.assert_close(logits, expected_logits(folder, whole, ids), rtol=1e-3, atol=1e-3)
    assert config_fingerprint(loaded.model.config) == config_fingerprint(
        hf.AutoConfig.from_pretrained(whole)
    )


def test_an_adapter_s_own_tokenizer_is_taken(folders: tuple[Path, Path], tmp_path: Path) -> None:
    assert load_model(str(folders[1]), LoadOptions(device="cpu", dtype="float32")).has_chat_template
    folder = copied(folders[1], tmp_path / "adapter")
    byte_tokenizer(None).save_pretrained(folder)
    assert not load_model(str(folder), LoadOptions(device="cpu", dtype="float32")).has_chat_template


def test_loading_is_silent(folders: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    for merge in (True, False):
        load_model(str(folders[1]), LoadOptions(device="cpu", dtype="float32", merge_adapter=merge))
    assert capfd.readouterr() == ("", "")


def refusal(folder: Path, **options: Any) -> str:
    """The error's text, which must be one line."""
    with pytest.raises(InputError) as caught:
        load_model(str(folder), LoadOptions(**{"device": "cpu", "dtype": "float32", **options}))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 900 + len(str(folder))
    assert str(folder) in message
    return message


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"base_model_name_or_path": "/no/such/base"}, "an adapter of '/no/such/base': no such"),
        ({"base_model_name_or_path": None}, "names no base"),
        ({"base_model_name_or_path": 7}, "names no base"),
        ({"peft_type": "PROMPT_TUNING"}, "virtual tokens"),
        ({"peft_type": "POLY"}, "there is LORA"),
        ({"peft_type": None}, "of the kind 'None'"),
        ({"task_type": "SEQ_CLS"}, "not for a causal language model"),
        ({"init_lora_weights": "pissa"}, "convert it to plain LoRA"),
        ({"init_lora_weights": ["pissa"]}, "convert it to plain LoRA"),
        ({"layer_replication": [[0, 3], [2, 5]]}, "layer_replication"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"target_modules": ["nothing_like_it"]}, "does not fit its base"),
        ({"target_modules": ["q_proj"]}, "weights that its base has no place for, the first is"),
        ({"target_modules": ["q_proj", "v_proj", "down_proj", "k_proj"]}, "missing, the first is"),
        ({"r": 5}, "does not fit its base"),
        ({"r": -1}, "does not fit its base"),
        ({"r": 1 << 40}, "does not fit its base"),
        ({"target_modules": 5}, "does not fit its base"),
        ({"target_modules": ["x" * 5000]}, "does not fit its base"),
        ({"lora_alpha": "much"}, "does not fit its base"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(
    changes: dict[str, Any], told: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    assert told in refusal(copied(folders[1], tmp_path / "adapter", **changes))


def test_an_adapter_of_another_model_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    sizes: dict[str, Any]
    for name, sizes in (("wide", {"hidden_size": 64}), ("deep", {"num_hidden_layers": 7})):
        other = save_model(tmp_path / name, template=None, **sizes)
        folder = save_adapter(tmp_path / f"{name}-adapter", other)
        moved = copied(folder, tmp_path / f"{name}-moved", base_model_name_or_path=str(folders[0]))
        assert "does not fit its base" in refusal(moved)


def test_broken_files_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copied(folders[1], tmp_path / "adapter")
    (folder / peft_loading.WEIGHTS).write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    assert "does not fit its base" in refusal(folder)
    (folder / peft_loading.WEIGHTS).unlink()
    assert f"no {peft_loading.WEIGHTS}" in refusal(folder)
    (folder / peft_loading.PICKLE).write_bytes(b"")
    assert "is a pickle" in refusal(folder)
    for text in ("[]", "{", "[" * 100_000, "\xff"):
        (folder / peft_loading.CONFIG).write_text(text, encoding="latin-1")
        assert peft_loading.CONFIG in refusal(folder)


def test_which_of_two_is_meant_must_be_plain(folders: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copied(folders[1], tmp_path / "both")
    shutil.copy(folders[0] / "model.safetensors", folder)
    assert "a whole model (model.safetensors) and an adapter" in refusal(folder)
    chain = copied(folders[1], tmp_path / "chain", base_model_name_or_path=str(folders[1]))
    assert "is an adapter itself" in refusal(chain)
    itself = copied(
        folders[1], tmp_path / "itself", base_model_name_or_path=str(tmp_path / "itself")
    )
    assert "is an adapter itself" in refusal(itself)


def test_flags_that_fit_no_adapter(folders: tuple[Path, Path]) -> None:
    whole, folder = folders
    assert refusal(whole, merge_adapter=True).startswith("merge_adapter: ")
    assert refusal(whole, merge_adapter=False).startswith("merge_adapter=False: ")
    assert "device_map can't spread" in refusal(folder, device="auto", device_map="auto")


def test_adapters_need_peft(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_loading, "find_spec", lambda name: None)
    assert refusal(folders[1]).endswith("which needs peft: pip install peft")


def test_weights_that_are_no_numbers_are_told(folders: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copied(folders[1], tmp_path / "adapter")
    tensors = load_file(folder / peft_loading.WEIGHTS)
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, folder / peft_loading.WEIGHTS)
    loaded = load_model(str(folder), LoadOptions(device="cpu", dtype="float32"))
    with pytest.raises(Exception, match="NaN"):
        Decoder(copy.deepcopy(loaded.model))
