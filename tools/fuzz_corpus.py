"""The valid files that `fuzz` mutates, and what it puts into them."""

from __future__ import annotations

import json
from typing import Any

import yaml

_USER = {"role": "user", "content": "Why is the sky blue?"}
_CHAT = [{"role": "system", "content": "Be brief."}, _USER, {"role": "assistant", "content": "So."}]
_TURN = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
PROMPT_LINES: tuple[dict[str, Any], ...] = (
    {"prompt": "naïve café 🙂", "id": "a", "category": "qa"},
    {"prompt": "line\nbreak", "id": 7, "other": {"deep": [1, 2.5e3, None, True]}},
    {"messages": [*_CHAT, _USER], "id": "m"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
    {"turns": ["First", "Second"], "question_id": 81, "category": "writing"},
    {"conversations": [{"from": "system", "value": ""}, *_TURN, _TURN[0]], "id": "x_0"},
    {"prompt": ["First", "Second"], "messages": None, "id": "l"},
    {"prompt": [*_CHAT, _USER], "id": "t"},
    {"conversations": _CHAT, "id": "c"},
    {"instruction": "Do", "input": "it", "output": "done", "id": "i"},
    {"question": "2 + 2?", "article": "", "id": "q"},
)
_BODY = {"model": "m", "messages": [_CHAT[0], _USER], "temperature": 0.5}
MORE_LINES: tuple[dict[str, Any], ...] = (
    {"custom_id": "r1", "method": "POST", "url": "/v1/chat/completions", "body": _BODY},
    {"custom_id": "r2", "params": {"system": "Be brief.", "messages": [_USER]}},
    {"instruction": "Do", "system": "Be brief.", "history": [["a", "b"], ["c", "d"]], "id": "h"},
    {"question": "Why?", "context": "So.", "system_prompt": "", "id": "s"},
    {"conversation": [_USER, {"role": "assistant", "content": None}], "id": "w"},
    {"messages": '[{"role": "developer", "content": "x"}, {"role": "user", "content": "y"}]'},
    {"prompt": [_USER], "completion": _CHAT[2:], "label": True, "images": [], "id": "k"},
)
PROMPT_TABLE = 'id,prompt,n\na,"one, ""two""",1\n,"with a\nline end",2\nb,plain,\n'

PROFILE_TEXT = """\
# A profile with every key
schema_version: 1
model:
  name: m/some-model
  architecture: LlamaForCausalLM
  depth: 32
  hidden_size: 576
  attention_heads: 9
  key_value_heads: 3
  intermediate_size: null
  vocabulary: 49152
  config_hash: 0123456789abcdef
skip:
  attention: [5, 3, 30]
  mlp: [5, 7]
draft: {max_tokens: 12, stop_probability: 0.5, by: mixed, lookahead: no, tree: [[0.8, 3], [0, 5]]}
ranges:
  - from_context: 1024
    skip: {attention: [4], mlp: []}
    draft:
      max_tokens: 4
      stop_probability: 1
source: "a paper, \\u00a7 3"
found_by:
  strategy: conflayers
  refined: true
  settings: {skip_ratio: 0.4, name: 'x', none: null, count: 12, 'on': yes}
  seed: 18446744073709551615
  prompts: {count: 30, sha256: SHA}
measured:
  acceptance_rate: 0.943
  tokens_per_step: 4.278
  expected_speedup: 1.418
  measured_speedup: null
  iterations: 15
  seconds: 148.2
  conclusion: |
    skipping 58 sub-layers
    decodes at 1.41×
environment:
  device: cpu
  dtype: bfloat16
  threads: 2
  python: 3.11.9
  torch: 2.13.0
  transformers: 5.23.0
  conflayers: 0.1.0
tensors: deep.safetensors
""".replace("SHA", "ab" * 32)

# fmt: off
_TEXTS = (
    "&a ", "*a", "<<: ", "!!python/object/apply:os.system ", "!!int ", "!!bool ", "!!float ",
    "!!timestamp ", "!!binary ", "!!set ", "!!omap ", "!!null ", "!x ", "? ", "? [a]\n: b\n",
    "---\n", "...\n", "%YAML 9.9\n", "%TAG ! tag:x:\n", "- ", "[", "]", "{", "}", "[" * 300,
    "{a: " * 200, "| \n", ">+9\n", "#", "'", '"', '"\\ud800"', '"\\U7fffffff"', "~", "null", "yes",
    "no", "on", "NaN", ".nan", ".inf", "-.inf", "Infinity", "-Infinity", "1e999", "1_000", "010",
    "0x1f", "0b11", "1:30", "1:30.5", "-1", "0", "-0", "1.0", "9" * 4301, "2020-01-01",
    "2020-99-99", "0001-01-01 00:00:00 +99:99", "=", "\\u0000", "\\ud83d", "\t", "\r", "\r\n",
    "\n", "\x0b", "\x1b[2J", "\x7f", "\x85", "\u2028", "\u202e", "\ufeff", "\ufffe", "\u200b", "é",
    "🙂", '"prompt": ', '"messages": ', '"turns": ', '"id": "a", ', '"role": "tool"',
    '"content": null', '{"type": "image"}', "x" * 5000, "a: " * 50,
)
NUMBERS = (
    "0", "-1", "1e308", "1e309", "4294967296", "9223372036854775808", "0.1", "-0.0", "1.5",
    "18446744073709551616", "1" + "0" * 400, "9" * 5000, "NaN", "1e-999",
)
# fmt: on
TOKENS = tuple(text.encode() for text in _TEXTS)
NO_TEXT = (
    b"\0",
    b"\xff",
    b"\xfe\xff",
    b"\xef\xbb\xbf",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
)


def prompt_corpus() -> tuple[bytes, ...]:
    """Prompt files of every form."""
    lines = [
        json.dumps(line, ensure_ascii=number % 2 == 0) for number, line in enumerate(PROMPT_LINES)
    ]
    return tuple(
        text.encode()
        for text in (
            "\n".join(lines),
            "\r\n".join([*lines[:2], "", lines[4]]),
            *lines,
            json.dumps(PROMPT_LINES, indent=1),
            json.dumps({"version": 1, "data": PROMPT_LINES[:3]}, indent=1),
            json.dumps({"rows": PROMPT_LINES[5:]}),
            PROMPT_TABLE,
            PROMPT_TABLE.replace(",", "\t").replace("\n", "\r\n"),
            "A plain text\n\n {odd} \n[1]\n",
            "\ufeffWith a mark\nand more",
        )
    )


def profile_corpus() -> tuple[bytes, ...]:
    """Profiles: with every key, with those that are needed, in other styles."""
    head, _, _ = PROFILE_TEXT.partition("ranges:")
    flow = json.dumps(yaml.safe_load(head), indent=1)  # JSON is YAML
    return (
        PROFILE_TEXT.encode(),
        head.encode(),
        head.replace("\n", "\r\n").encode(),
        flow.encode(),
    )
