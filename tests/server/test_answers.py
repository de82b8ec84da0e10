"""What is answered: the model's own text, in OpenAI's forms."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from conflayers_cli.sampling_params import SamplingParams
from tests.server.conftest import GREEDY, Served, alone, tiny_model

PROMPTS = ("Why?", "abcabcabcabcabcabc", "x" * 200, "The sky", "one two one two one two")


def events(response: Any) -> list[Any]:
    """A stream's documents; the last line is [DONE]."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def streamed(response: Any, index: int = 0) -> str:
    return "".join(
        choice["delta"].get("content", "")
        for event in events(response)
        for choice in event["choices"]
        if choice["index"] == index
    )


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_greedy_answer_is_the_models_own(served: Served, prompt: str) -> None:
    expected = alone(prompt, 40)

    whole = served.chat(prompt, max_tokens=40, **GREEDY).json()
    stream = served.chat(prompt, max_tokens=40, stream=True, **GREEDY)

    (choice,) = whole["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
    assert choice["finish_reason"] == expected.finish_reason
    assert streamed(stream) == expected.text
    assert whole["usage"]["completion_tokens"] == len(expected.token_ids)
    assert whole["usage"]["prompt_tokens"] == expected.prompt_tokens


def test_many_at_once_are_what_each_is_alone(served: Served) -> None:
    asked = [(prompt, 5 + 7 * i) for i, prompt in enumerate(PROMPTS * 3)]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda each: served.answer(each[0], max_tokens=each[1]), asked))

    assert answers == [alone(*each).text for each in asked]


def test_sampled_texts_depend_on_the_seed_alone(served: Served) -> None:
    more = {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 7, "n": 2}
    sampling = SamplingParams(0.9, top_k=40, top_p=0.9, min_p=0.01, seed=7)
    expected = [alone("Why?", sampling=sampling, answer=answer).text for answer in (0, 1)]

    whole = served.chat("Why?", **more).json()
    stream = served.chat("Why?", **more, stream=True)

    assert [choice["message"]["content"] for choice in whole["choices"]] == expected
    assert [streamed(stream, index) for index in (0, 1)] == expected
    assert expected[0] != expected[1]
    assert served.chat("Why?", **{**more, "seed": 8}).json()["choices"] != whole["choices"]


def test_a_stop_string_ends_a_text(served: Served) -> None:
    text = alone("Why?", 40).text
    stop = text[10:12]

    choice = served.chat("Why?", max_tokens=40, stop=[stop, "never this"], **GREEDY).json()

    (choice,) = choice["choices"]
    assert choice["message"]["content"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_completions_continue_texts_and_tokens(served: Served) -> None:
    loaded, _ = tiny_model()
    texts = ["Once upon a time", "abcabcabc"]
    expected = [alone(text, 16, chat=False).text for text in texts]
    ids = loaded.tokenizer(texts[0])["input_ids"]

    def ask(prompt: Any, **more: Any) -> list[str]:
        response = served.client.post("/v1/completions", json={"prompt": prompt, **GREEDY, **more})
        return [choice["text"] for choice in response.json()["choices"]]

    assert ask(texts) == expected
    assert ask(ids) == ask([ids]) == expected[:1]
    assert ask(texts[0], max_tokens=4) == [alone(texts[0], 4, chat=False).text]
    stream = served.client.post(
        "/v1/completions", json={"prompt": texts[1], "stream": True, **GREEDY}
    )
    chunks = [choice["text"] for event in events(stream) for choice in event["choices"]]
    assert "".join(chunks) == expected[1]


def test_drafts_are_counted_in_openais_fields(served: Served) -> None:
    whole = served.chat("abcabcabcabcabc", max_tokens=60, **GREEDY).json()

    details = whole["usage"]["completion_tokens_details"]
    accepted = details["accepted_prediction_tokens"]
    rejected = details["rejected_prediction_tokens"]
    by_drafter = whole["conflayers"]["by_drafter"].values()
    assert accepted > 0
    assert accepted == sum(each["accepted"] for each in by_drafter)
    assert accepted + rejected == sum(each["drafted"] for each in by_drafter)
    assert accepted == sum(sum(each["by_position"]["accepted"]) for each in by_drafter)
    assert 1 + whole["conflayers"]["steps"] + accepted == 60


def test_a_stream_has_its_usage_at_the_end_if_asked(served: Served) -> None:
    more = {"stream": True, "stream_options": {"include_usage": True}, **GREEDY}
    *chunks, last = events(served.chat("Why?", **more))

    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == served.chat("Why?", **GREEDY).json()["usage"] | {
        "completion_tokens_details": last["usage"]["completion_tokens_details"],
        "prompt_tokens_details": last["usage"]["prompt_tokens_details"],
    }
    assert all("usage" not in chunk for chunk in events(served.chat("Why?", stream=True)))


def test_who_drafted_each_token_is_shown_if_asked(served: Served) -> None:
    prompt, more = "abcabcabcabc", {"max_tokens": 40, "show_drafts": True, **GREEDY}
    whole = served.chat(prompt, **more).json()
    stream = events(served.chat(prompt, stream=True, **more))

    (choice,) = whole["choices"]
    drafts = choice["drafts"]
    assert "".join(each["text"] for each in drafts) == choice["message"]["content"]
    accepted = whole["usage"]["completion_tokens_details"]["accepted_prediction_tokens"]
    assert sum(each["by"] != "model" for each in drafts) == accepted > 0
    assert {each["by"] for each in drafts} <= {"model", "skip", "ngram", "store"}
    pieces = [
        each for event in stream for part in event["choices"] for each in part.get("drafts", ())
    ]
    assert "".join(each["text"] for each in pieces) == choice["message"]["content"]


def test_log_probabilities_are_those_of_a_plain_forward(served: Served) -> None:
    loaded, _ = tiny_model()
    more = {"logprobs": True, "top_logprobs": 3, "max_tokens": 8, **GREEDY}
    (choice,) = served.chat("abcabcabc", **more).json()["choices"]
    (stream,) = [
        [each for event in events(served.chat("abcabcabc", stream=True, **more))
         for part in event["choices"] if part["logprobs"] for each in part["logprobs"]["content"]]
    ]  # fmt: skip

    result = alone("abcabcabc", 8)
    prompt = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "abcabcabc"}], add_generation_prompt=True, return_dict=False
    )
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([[*prompt, *result.token_ids]])).logits[0]
    expected = torch.log_softmax(logits.float(), -1)[len(prompt) - 1 :]
    content = choice["logprobs"]["content"]
    assert len(content) == len(result.token_ids) == 8
    for i, (entry, token) in enumerate(zip(content, result.token_ids, strict=True)):
        assert entry["logprob"] == pytest.approx(float(expected[i, token]), abs=1e-3)
        best = expected[i].topk(3)
        told = [other["logprob"] for other in entry["top_logprobs"]]
        assert told == pytest.approx(best.values.tolist(), abs=1e-3)
        assert entry["top_logprobs"][0]["bytes"] == entry["bytes"]
    assert [each["token"] for each in stream] == [each["token"] for each in content]
    text = bytes(byte for entry in content for byte in entry["bytes"])
    assert text.decode(errors="replace") == choice["message"]["content"]


def test_biases_and_penalties_change_what_is_chosen(served: Served) -> None:
    banned = alone("Why?", 1).token_ids[0]
    text = served.answer("Why?", logit_bias={str(banned): -100}, max_tokens=30)
    forced = served.answer("Why?", logit_bias={str(ord("Q")): 100}, max_tokens=3)
    loaded, _ = tiny_model()

    assert banned not in loaded.tokenizer(text)["input_ids"][:1]
    (only,) = set(forced)
    assert forced == only * 3
    plain = served.answer("abcabcabc", max_tokens=60)
    spread = served.answer("abcabcabc", max_tokens=60, frequency_penalty=2, presence_penalty=2)
    assert len(set(spread)) > len(set(plain))


def test_tools_and_arguments_reach_the_chat_template(served: Served) -> None:
    encoder = served.service.encoder.loaded.tokenizer
    before = encoder.chat_template
    encoder.chat_template = (
        "{{ tools[0]['function']['name'] if tools else 'no tools' }} {{ mood }}"
        "{% for m in messages %}{{ m['role'] }}{{ m['content'] }}"
        "{{ m['tool_calls'][0]['function']['arguments']['city'] if m['tool_calls'] else '' }}"
        "{% endfor %}"
    )
    try:
        body = {
            "messages": [
                {"role": "developer", "content": "D"},
                {"role": "user", "content": [{"type": "text", "text": "U"}]},
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"id": "1", "function": {"name": "f", "arguments": '{"city": "Rome"}'}}
                    ],
                },
                {"role": "tool", "content": "T", "tool_call_id": "1"},
            ],
            "tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}],
            "chat_template_kwargs": {"mood": "calm"},
            "max_tokens": 1,
        }
        response = served.client.post("/v1/chat/completions", json=body)
    finally:
        encoder.chat_template = before

    expected = "weather calmsystemDuserUassistantRometoolT"
    assert response.json()["usage"]["prompt_tokens"] == len(expected)


def test_a_prompts_beginning_is_read_once(serve: Callable[..., Served]) -> None:
    served = serve(drafts=False)
    text = "What was said before. " * 8
    first = served.chat(text, **GREEDY).json()
    second = served.chat(text + "And now?", **GREEDY).json()

    cached = [r["usage"]["prompt_tokens_details"]["cached_tokens"] for r in (first, second)]
    assert cached[0] == 0
    assert cached[1] >= len(text)
    assert second["choices"][0]["message"]["content"] == alone(text + "And now?").text
    without = serve(drafts=False, prefix_cache=0)
    without.chat(text, **GREEDY)
    again = without.chat(text, **GREEDY).json()
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_answers_that_come_again_are_drafted_by_key(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("first-key\nother-key\n")
    text = alone("Why?", 100).text

    def steps(served: Served, key: str) -> int:
        served.client.headers["Authorization"] = f"Bearer {key}"
        answer = served.chat("Why?", max_tokens=100, **GREEDY).json()
        assert answer["choices"][0]["message"]["content"] == text
        found: int = answer["conflayers"]["steps"]
        return found

    served = serve(api_keys=keys)
    first = steps(served, "first-key")
    assert steps(served, "other-key") > first * 0.7
    assert steps(served, "first-key") < first / 2
    without = serve(api_keys=keys, draft_texts=0)
    assert steps(without, "first-key") < 2 * steps(without, "first-key")


def test_a_predicted_text_is_drafted_from(serve: Callable[..., Served]) -> None:
    served = serve()
    text = alone("Why?", 100).text
    predicted = text[:40] + "!!!" + text[43:]

    def ask(**more: Any) -> Any:
        return served.chat("Why?", max_tokens=100, **GREEDY, **more).json()

    plain = ask()
    edited = ask(prediction={"type": "content", "content": predicted})
    wrong = ask(prediction={"type": "content", "content": "something else altogether"})

    texts = {each["choices"][0]["message"]["content"] for each in (plain, edited, wrong)}
    assert texts == {text}
    assert edited["conflayers"]["steps"] < plain["conflayers"]["steps"]
