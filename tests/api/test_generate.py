from __future__ import annotations

import gc
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, assert_type

import pytest
import torch
from transformers import AutoModelForCausalLM

import conflayers_cli
from conflayers_cli import (
    Answer,
    ConfLayersWarning,
    InputError,
    Model,
    Profile,
    Stream,
    generate,
    load,
    open_store,
    stream,
)
from conflayers_cli.api.options import parse_options
from conflayers_cli.profile import build_proposer
from conflayers_cli.skip_plan import SkipPlan
from conflayers_cli.spec_decode.store_file import StoredTexts
from tests.cli.conftest import save_model, save_profile
from tests.spec_decode.test_mixed import costs

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Costs that are measured are kept in a folder of this run's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONFLAYERS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def profile(folder: Path) -> Path:
    return save_profile(folder / "tiny.yaml", folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load(str(folder), device="cpu", dtype="float32")


def ids_of(model: Model, text: str) -> list[int]:
    """What transformers' own ``generate`` answers, in tokens."""
    tokenizer = model.loaded.tokenizer
    chat = [{"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    with model.engine().decoder.plain() as plain:
        mask = torch.ones_like(ids)
        out = plain.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False)
    new: list[int] = out[0, ids.shape[1] :].tolist()
    return new


def test_importing_the_package_brings_in_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, conflayers_cli\n"
        "assert 'generate' in dir(conflayers_cli)\n"
        "assert not {'torch', 'transformers', 'typer'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_that_is_promised_is_there() -> None:
    assert all(getattr(conflayers_cli, name) is not None for name in conflayers_cli.__all__)
    with pytest.raises(AttributeError, match="no attribute 'genrate'"):
        getattr(conflayers_cli, "genrate")  # noqa: B009


def test_an_answer_is_the_models_own(model: Model, profile: Path) -> None:
    answer = generate(model, "Why?", profile, max_new_tokens=24)
    assert_type(answer, Answer)
    assert list(answer.token_ids) == ids_of(model, "Why?")
    assert answer.stats.drafted > answer.stats.accepted > 0


def test_a_profile_may_be_an_object_or_a_name(model: Model, profile: Path) -> None:
    from_object = generate(model, "Why?", Profile.load(profile), max_new_tokens=24)
    from_name = generate(model, "Why?", str(profile), max_new_tokens=24)
    assert from_object.token_ids == from_name.token_ids
    assert from_object.stats.drafted == from_name.stats.drafted > 0
    proposers = {id(each) for each in model.engine().proposers.values() if each is not None}
    assert len(proposers) == 1  # one profile, one drafter that learns


def test_a_file_that_changes_is_read_again(model: Model, folder: Path, tmp_path: Path) -> None:
    own = save_profile(tmp_path / "own.yaml", folder, max_tokens=1)
    short = generate(model, "Why?", own, max_new_tokens=24).stats
    assert short.drafted <= short.steps
    save_profile(own, folder, max_tokens=6)
    assert generate(model, "Why?", own, max_new_tokens=24).stats.drafted > short.drafted
    own.unlink()
    with pytest.raises(InputError, match=r"own\.yaml: there is no such file"):
        generate(model, "Why?", own)


def test_nobody_drafts_unless_asked(model: Model) -> None:
    assert generate(model, "Why?", max_new_tokens=8).stats.drafted == 0


def test_several_prompts_give_several_answers(model: Model, profile: Path) -> None:
    answers = generate(model, ["Why?", "How, then?"], profile, max_new_tokens=24)
    assert_type(answers, list[Answer])
    expected = [ids_of(model, "Why?"), ids_of(model, "How, then?")]
    assert [list(answer.token_ids) for answer in answers] == expected
    none: list[str] = []
    assert not generate(model, none, profile)


def test_a_batch_gives_the_same(model: Model) -> None:
    prompts = ["Why?", "How, then?", "Who is it that asks?"]
    together = generate(model, prompts, max_new_tokens=16, batch_size=3, draft="ngram")
    alone = [generate(model, each, max_new_tokens=16).text for each in prompts]
    assert [answer.text for answer in together] == alone


@pytest.mark.parametrize(
    "options", [{"draft": "none"}, {"draft": "skip"}, {"adaptive_draft_length": False}]
)
def test_a_store_is_refused_where_no_ngrams_draft(
    model: Model, profile: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match="draft_store is about n-grams"):
        generate(model, "Why?", profile, draft_store="texts", **options)


def test_a_chat_is_one_prompt(model: Model) -> None:
    answer = generate(model, CHAT, max_new_tokens=8)
    assert_type(answer, Answer)
    (same,) = generate(model, [CHAT], max_new_tokens=8)
    assert answer.token_ids == same.token_ids
    assert answer.token_ids != generate(model, "Why?", max_new_tokens=8).token_ids


def test_sampling_is_by_seed(model: Model) -> None:
    def text(seed: int) -> str:
        return generate(model, "Why?", temperature=1.0, seed=seed, max_new_tokens=24).text

    assert text(1) == text(1) != text(2)


def test_stop_texts(model: Model) -> None:
    whole = generate(model, "Why?", max_new_tokens=24).text
    stop = whole[5:7]
    answer = generate(model, "Why?", max_new_tokens=24, stop=stop)
    assert (answer.text, answer.finish_reason) == (whole[: whole.index(stop)], "stop")
    assert generate(model, "Why?", max_new_tokens=24, stop=["¿", stop]).text == answer.text


BEGUN = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because é "}]


def test_a_final_message_is_continued_as_by_transformers(model: Model, profile: Path) -> None:
    """The text is what comes behind the message, drafted or not, at once or in pieces."""
    tokenizer = model.loaded.tokenizer
    ids = tokenizer.apply_chat_template(
        BEGUN, continue_final_message=True, return_tensors="pt", return_dict=False
    )
    with model.engine().decoder.plain() as plain:
        mask = torch.ones_like(ids)
        out = plain.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False)
    given, whole = (tokenizer.decode(each, skip_special_tokens=True) for each in (ids[0], out[0]))
    assert given.endswith("<assistant>Because é ")
    answer = generate(model, BEGUN, profile, continue_final_message=True, max_new_tokens=24)
    assert list(answer.token_ids) == out[0, ids.shape[1] :].tolist()
    assert given + answer.text == whole
    pieces = stream(model, BEGUN, draft="none", continue_final_message=True, max_new_tokens=24)
    assert "".join(pieces) == answer.text
    anew = generate(model, BEGUN, draft="none", max_new_tokens=24)  # a turn of its own
    assert anew.prompt_tokens == answer.prompt_tokens + len("\n<assistant>")


@pytest.mark.parametrize("prompt", ["Why?", CHAT])
def test_what_ends_with_no_message_of_the_assistant_is_not_continued(
    model: Model, prompt: Any
) -> None:
    with pytest.raises(InputError, match="continue_final_message goes on with a last message"):
        generate(model, prompt, continue_final_message=True)


def test_a_message_that_the_template_alters_is_not_continued(tmp_path: Path) -> None:
    altering = "{% for m in messages %}{{ m['content'] | replace('Because', 'As') }}{% endfor %}"
    own = load(str(save_model(tmp_path / "own", template=altering)), dtype="float32")
    with pytest.raises(InputError, match="it alters the last one, which can't be continued"):
        generate(own, BEGUN, continue_final_message=True)
    plain = load(str(save_model(tmp_path / "plain", template=None)), dtype="float32")
    with pytest.raises(InputError, match="has no chat template, which says where"):
        generate(plain, BEGUN, continue_final_message=True)
    with pytest.raises(InputError, match="goes by the chat template, which raw leaves out"):
        generate(own, BEGUN, continue_final_message=True, raw=True)


def test_a_stream_adds_up(model: Model, profile: Path) -> None:
    expected = generate(model, "Why?", profile, max_new_tokens=24)
    pieces = stream(model, "Why?", profile, max_new_tokens=24)
    assert_type(pieces, Stream)
    given = [next(pieces)]
    assert pieces.answer is None
    given += pieces
    assert len(given) > 1
    assert all(given)
    assert pieces.answer is not None
    assert "".join(given) == pieces.answer.text == expected.text
    assert pieces.answer.token_ids == expected.token_ids
    assert next(pieces, None) is None
    assert pieces.answer is not None  # asking once more takes nothing away


def test_a_stream_may_be_left_and_others_go_on(model: Model, profile: Path) -> None:
    whole = generate(model, "Why?", profile, max_new_tokens=24).text
    left, other = (stream(model, "Why?", profile, max_new_tokens=24) for _ in range(2))
    begin = next(left) + next(left)
    first = next(other)
    left.close()
    assert next(left, None) is None
    assert left.answer is None
    assert whole.startswith(begin)
    assert first + "".join(other) == whole
    assert generate(model, "Why?", profile, max_new_tokens=24).text == whole


def test_what_is_wrong_with_a_stream_is_said_at_once(model: Model) -> None:
    with pytest.raises(InputError, match="stream: takes one prompt"):
        stream(model, ["a", "b"])  # type: ignore[list-item]
    with pytest.raises(InputError, match="draft 'luck': allowed is one of skip, ngram"):
        stream(model, "a", draft="luck")  # type: ignore[arg-type]


def test_errors_name_keywords_in_place_of_flags(model: Model, profile: Path) -> None:
    with pytest.raises(InputError, match=r"^temperature -1: allowed is 0 or more$"):
        generate(model, "a", temperature=-1)
    with pytest.raises(InputError, match=r"^draft skip leaves out .*: give profile FILE, or draft"):
        generate(model, "a", draft="skip")
    with pytest.raises(InputError, match="tree is for one prompt at a time: leave batch_size out"):
        generate(model, ["a"], profile, tree=True, batch_size=2)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0: at least 1"),
        ({"batch_size": 0}, "batch_size 0: at least 1"),
        ({"stop": ["x", ""]}, "stop: an empty text"),
        ({"top_p": 2.0, "temperature": 1.0}, "top_p 2.0: allowed"),
    ],
)
def test_wrong_options(model: Model, wrong: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(model, "Why?", **wrong)  # type: ignore[call-overload]


def test_an_unknown_option_is_a_type_error(model: Model) -> None:
    with pytest.raises(TypeError, match="unknown options: temprature"):
        generate(model, "Why?", temprature=1.0)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "wrong", ["", " ", [[]], [3], [{"role": "user"}], [{"role": "user", "content": 3}], [CHAT, 4]]
)
def test_what_is_no_prompt(model: Model, wrong: str) -> None:
    with pytest.raises(InputError, match="prompt"):
        generate(model, wrong)


def test_notes_are_warnings_and_nothing_is_printed(
    model: Model, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(ConfLayersWarning, match="top_p changes nothing at temperature 0") as told:
        generate(model, "Why?", top_p=0.5, max_new_tokens=4)
    assert [Path(each.filename) for each in told] == [Path(__file__)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, "Why?", max_new_tokens=4)
    assert capfd.readouterr() == ("", "")


def test_a_profile_of_another_model_is_refused_unless_forced(
    model: Model, folder: Path, tmp_path: Path
) -> None:
    other = save_profile(tmp_path / "other.yaml", folder, hidden_size=48)
    with pytest.raises(InputError, match=r"other\.yaml: was made for another model.*\(force goes"):
        generate(model, "Why?", other)
    with pytest.raises(InputError, match=r"^the profile: was made for another model"):
        generate(model, "Why?", Profile.load(other))
    with pytest.warns(ConfLayersWarning, match="was made for another model"):
        answer = generate(model, "Why?", other, force=True, max_new_tokens=24)
    assert list(answer.token_ids) == ids_of(model, "Why?")


def test_a_loaded_model_is_used_and_left_as_it_was(model: Model, profile: Path) -> None:
    own = load_own(model)
    before = dict(own.named_parameters())
    attention = own.config._attn_implementation
    handle = load(own, tokenizer=model.loaded.tokenizer)
    answer = generate(handle, "Why?", profile, max_new_tokens=24, force=True)
    assert list(answer.token_ids) == ids_of(model, "Why?")
    assert answer.stats.accepted > 0
    pieces = stream(handle, "Why?", profile, max_new_tokens=24, force=True)
    next(pieces)
    assert own.config._attn_implementation != attention  # the engine's while it is at work
    pieces.close()
    assert own.config._attn_implementation == attention
    after = dict(own.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is weight for name, weight in before.items())


def test_a_stream_that_nobody_holds_gives_the_model_back(model: Model) -> None:
    own = load_own(model)
    attention = own.config._attn_implementation
    pieces = stream(load(own, tokenizer=model.loaded.tokenizer), "Why?", max_new_tokens=8)
    next(pieces)
    del pieces
    gc.collect()
    assert own.config._attn_implementation == attention


def test_a_loaded_model_needs_its_tokenizer_and_a_name_has_one(folder: Path, model: Model) -> None:
    with pytest.raises(InputError, match="tokenizer: is needed"):
        load(load_own(model))
    with pytest.raises(InputError, match="tokenizer: comes with the model"):
        load(str(folder), tokenizer=model.loaded.tokenizer)
    with pytest.raises(InputError, match="no such model"):
        load("./nowhere")


def test_skip_plans_reach_the_decoder(model: Model, folder: Path, tmp_path: Path) -> None:
    """Leaving out nearly everything is rarely right; the text is the model's all the same."""
    plan = SkipPlan.of_layers([1, 2, 3])
    bold = save_profile(tmp_path / "bold.yaml", folder, plan)
    answer = generate(model, "Why?", bold, max_new_tokens=24)
    assert list(answer.token_ids) == ids_of(model, "Why?")
    rate = answer.stats.acceptance_rate
    careful = generate(model, "Why?", folder / "tiny.yaml", max_new_tokens=24).stats.acceptance_rate
    assert rate is not None
    assert careful is not None
    assert rate < careful


def load_own(model: Model) -> Any:
    """The same model anew, as somebody would load it with transformers."""
    return AutoModelForCausalLM.from_pretrained(model.loaded.name, dtype=torch.float32)


def test_lookahead_is_the_old_name_of_the_adaptive_draft_length() -> None:
    with pytest.warns(DeprecationWarning, match="adaptive_draft_length"):
        assert parse_options({"lookahead": False}).drafting.adaptive_draft_length is False
    with pytest.raises(InputError, match="give one of them"):
        parse_options({"lookahead": False, "adaptive_draft_length": True})


class TestStores:
    PROMPT = "one two three"

    @pytest.fixture(autouse=True)
    def drafts_pay(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(build_proposer, "costs_for", lambda *_, **__: costs())

    def test_texts_of_earlier_calls_draft(self, model: Model, tmp_path: Path) -> None:
        file = tmp_path / "store.safetensors"
        plain = generate(model, self.PROMPT, draft="ngram", max_new_tokens=24)
        with open_store(model, file) as store:
            for expected in (False, True):
                found = generate(
                    model, self.PROMPT, draft="ngram", max_new_tokens=24, draft_store=store
                )
                assert found.token_ids == plain.token_ids
                assert ("store" in found.stats.by_drafter) == expected
        later = generate(model, self.PROMPT, draft="ngram", max_new_tokens=24, draft_store=file)
        assert later.token_ids == plain.token_ids
        assert "store" in later.stats.by_drafter

    def test_a_stream_is_kept_in_its_file(self, model: Model, tmp_path: Path) -> None:
        file = tmp_path / "store"
        list(stream(model, self.PROMPT, draft="ngram", max_new_tokens=8, draft_store=str(file)))
        assert len(StoredTexts.read(file).tokens) > 8

    def test_texts_of_one_call_draft_later_ones(self, model: Model) -> None:
        one, two = generate(model, [self.PROMPT] * 2, draft="ngram", max_new_tokens=24)
        assert one.token_ids == two.token_ids
        assert "store" in two.stats.by_drafter

    def test_mistakes(self, model: Model, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="draft_store is about n-grams: not with draft none"):
            generate(model, "a", draft="none", draft_store=tmp_path / "s")
        with pytest.raises(InputError, match="there is no such file"):
            generate(model, "a", draft="ngram", draft_corpus=tmp_path / "missing")
        (tmp_path / "bad").write_text("no store")
        with pytest.raises(InputError, match="is no draft store"):
            open_store(model, tmp_path / "bad")
